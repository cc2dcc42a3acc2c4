"""Which runs a comparison has, what each is configured to do, and that a folder is never taken for another's."""

import hashlib
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from debias.cli.recipes import recipes_folder
from debias.compare.grid import LOCK, Recipe, RunSpec, expand, prepare, settings_of
from debias.compare.records import read_spec
from debias.errors import DebiasError

BASE = """# A base.
seed_everything: 0
search:
  model.init_args.width: [8, 16]
data:
  class_path: data.Set
  init_args: {n_groups: 4}
model:
  class_path: net.Net
  init_args: {width: 32}
trainer:
  max_epochs: 3
  callbacks:
    - class_path: debias.GroupMonitor
      init_args: {group: group, n_groups: "${data.init_args.n_groups}"}
"""
ERM = "# Plain.\ndata:\n  init_args: {balance: null}\n"
DRO = """# Reweighs.
search:
  GroupDRO.step_size: {log_uniform: [0.001, 0.1]}
trainer:
  callbacks+:
    - class_path: debias.GroupDRO
      init_args: {group: group, n_groups: "${data.init_args.n_groups}", step_size: 0.01}
"""


@pytest.fixture
def recipe(tmp_path):
    for name, text in (("toy/base", BASE), ("methods/erm", ERM), ("methods/group_dro", DRO)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text)
    return Recipe("toy", tmp_path / "toy", tmp_path / "methods")


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file and a hash of its content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_runs_come_seed_by_seed_under_names_that_say_what_they_are():
    runs = expand({"erm": [{}], "group_dro": [{}, {"GroupDRO.step_size": 0.1}]}, [3, 5])
    assert [(run.method, run.seed) for run in runs[:3]] == [("erm", 3), ("group_dro", 3), ("group_dro", 3)]
    assert [run.id for run in runs[:2]] == ["erm-seed3", "group_dro-seed3"]
    assert runs[2].id.startswith("group_dro-")
    assert len({run.id for run in runs}) == len(runs) == 6
    other = expand({"group_dro": [{"GroupDRO.step_size": 0.2}]}, [3])
    assert other[0].id not in {run.id for run in runs}


def test_domains_are_held_out_one_by_one():
    runs = expand({"erm": [{}]}, [0], domains=2)
    assert [(run.id, run.held_out) for run in runs] == [
        ("erm-seed0", None), ("erm-without0-seed0", 0), ("erm-without1-seed0", 1),
    ]  # fmt: skip


def test_values_are_varied_where_they_apply(recipe):
    vary = {"GroupDRO.step_size": [0.1, 0.2], "model.init_args.width": [8, 16]}
    settings = settings_of(recipe, ["erm", "group_dro"], vary=vary)
    assert settings["erm"] == [{"model.init_args.width": 8}, {"model.init_args.width": 16}]
    assert len(settings["group_dro"]) == 4
    assert {"GroupDRO.step_size": 0.2, "model.init_args.width": 16} in settings["group_dro"]
    with pytest.raises(DebiasError, match=r"none of erm, group_dro has `VREx`"):
        settings_of(recipe, ["erm", "group_dro"], vary={"VREx.penalty_weight": [1]})


def test_draws_start_with_the_recipe_itself_and_depend_on_their_seed_alone(recipe):
    first = settings_of(recipe, ["erm", "group_dro"], draws=4)
    assert first == settings_of(recipe, ["erm", "group_dro"], draws=4)
    assert first["group_dro"][0] == {}
    assert len(first["group_dro"]) == 4
    assert all(set(params) == {"GroupDRO.step_size", "model.init_args.width"} for params in first["group_dro"][1:])
    assert all(set(params) == {"model.init_args.width"} for params in first["erm"][1:])
    assert settings_of(recipe, ["group_dro"], draws=4, draw_seed=1)["group_dro"][1:] != first["group_dro"][1:]


def test_settings_reach_the_files_of_the_run(recipe, tmp_path):
    params = {"GroupDRO.step_size": 0.5, "model.init_args.width": 64}
    fixed = Recipe("toy", recipe.folder, recipe.shared, (), {"trainer.max_epochs": 9})
    (folder,) = prepare(fixed, [RunSpec("x", "group_dro", 7, params)], tmp_path / "out")
    base, method = read_spec(folder)["configs"]
    merged = base["trainer"] | {k: v for k, v in method["trainer"].items() if k != "callbacks+"}
    assert merged["max_epochs"] == 9
    assert method["trainer"]["callbacks+"][0]["init_args"]["step_size"] == 0.5
    assert method["trainer"]["callbacks+"][0]["init_args"]["n_groups"] == "${data.init_args.n_groups}"
    assert {**base["model"]["init_args"], **method.get("model", {}).get("init_args", {})}["width"] == 64
    assert "search" not in base
    assert "search" not in method
    assert read_spec(folder)["seed"] == 7


def test_a_recipes_own_method_file_takes_the_place_of_the_shared_one(recipe):
    (recipe.folder / "group_dro.yaml").write_text(DRO.replace("0.01}", "0.7}"))
    assert recipe.configs("group_dro")[1]["trainer"]["callbacks+"][0]["init_args"]["step_size"] == 0.7
    (recipe.folder / "single.yaml").write_text("# A variant of the data, no method.\ndata:\n  init_args: {x: 1}\n")
    assert recipe.methods() == ["erm", "group_dro"]


def test_prepare_again_changes_nothing(recipe, tmp_path):
    runs = expand(settings_of(recipe, ["erm", "group_dro"]), [0, 1])
    folders = prepare(recipe, runs, tmp_path / "out")
    before = fingerprint(tmp_path / "out")
    assert prepare(recipe, runs, tmp_path / "out") == folders
    assert fingerprint(tmp_path / "out") == before


def test_comments_and_ranges_are_no_difference(recipe, tmp_path):
    runs = expand(settings_of(recipe, ["erm"]), [0])
    prepare(recipe, runs, tmp_path / "out")
    (recipe.folder / "base.yaml").write_text(BASE.replace("[8, 16]", "[8]").replace("# A base.", "# The base."))
    prepare(recipe, runs, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "toy/base",
            "width: 32",
            "width: 33",
            r"another base or `--set`: `base.yaml: model.init_args.width` was 32, and is 33",
        ),
        ("methods/group_dro", "0.01}", "0.02}", r"`group_dro.yaml: .*step_size` was 0.01, and is 0.02"),
    ],
)
def test_a_folder_of_something_else_is_refused_untouched(recipe, tmp_path, file, old, new, message):
    runs = expand(settings_of(recipe, ["erm", "group_dro"]), [0])
    out = tmp_path / "out"
    prepare(recipe, runs, out)
    before = fingerprint(out)
    path = tmp_path / f"{file}.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DebiasError, match=message):
        prepare(recipe, expand(settings_of(recipe, ["erm", "group_dro"]), [0, 1]), out)
    assert fingerprint(out) == before


def test_a_method_that_changed_is_refused_for_further_seeds_too(recipe, tmp_path):
    out = tmp_path / "out"
    prepare(recipe, expand(settings_of(recipe, ["erm", "group_dro"]), [0]), out)
    before = fingerprint(out)
    path = recipe.shared / "group_dro.yaml"
    path.write_text(path.read_text().replace("0.01}", "0.02}"))
    with pytest.raises(DebiasError, match=r"the run `group_dro-seed0` .* step_size` was 0.01, and is 0.02|step_size"):
        prepare(recipe, expand(settings_of(recipe, ["group_dro"]), [1]), out)
    assert fingerprint(out) == before
    prepare(recipe, expand(settings_of(recipe, ["erm"]), [1]), out)  # which has not changed


def test_a_parameter_of_a_callback_that_is_gone(recipe, tmp_path):
    out = tmp_path / "out"
    prepare(recipe, expand({"group_dro": [{"GroupDRO.step_size": 0.1}]}, [0]), out)
    path = recipe.shared / "group_dro.yaml"
    path.write_text(path.read_text().replace("debias.GroupDRO", "debias.VREx"))
    with pytest.raises(DebiasError, match=r"was debias.GroupDRO, and is debias.VREx"):
        prepare(recipe, expand({"group_dro": [{}]}, [0]), out)


def test_a_second_command_waits_until_the_first_has_written_its_folders(recipe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    other = Recipe("toy", recipe.folder, recipe.shared, (), {"trainer.max_epochs": 9})
    errors = []

    def second():
        try:
            prepare(other, expand({"erm": [{}]}, [0]), out)
        except DebiasError as error:
            errors.append(str(error))

    thread = threading.Thread(target=second)
    with FileLock(out / LOCK, thread_local=False):
        thread.start()
        time.sleep(0.5)
        assert not list(out.glob("runs/*/*"))
        (out / "runs" / "erm-seed0").mkdir(parents=True)
        (first,) = prepare(recipe, expand({"erm": [{}]}, [0]), tmp_path / "elsewhere")
        shutil.copytree(first, out / "runs" / "erm-seed0", dirs_exist_ok=True)
    thread.join(30)
    assert "`toy` with another base or `--set`" in errors[0]


def test_what_is_set_for_all_runs_is_not_drawn(recipe):
    fixed = Recipe("toy", recipe.folder, recipe.shared, (), {"model.init_args.width": 64})
    drawn = settings_of(fixed, ["erm", "group_dro"], draws=3)
    assert drawn["erm"] == [{}]
    assert all(set(params) == {"GroupDRO.step_size"} for params in drawn["group_dro"][1:])


@pytest.mark.parametrize("base", sorted(recipes_folder().glob("*/base.yaml")), ids=lambda path: path.parent.name)
def test_the_seed_of_a_run_is_that_of_its_data(base):
    assert yaml.safe_load(base.read_text())["data"]["init_args"]["seed"] == "${seed_everything}"


def test_a_folder_of_another_recipe_is_refused_untouched(recipe, tmp_path):
    out = tmp_path / "out"
    prepare(recipe, expand({"erm": [{}]}, [0]), out)
    before = fingerprint(out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "base.yaml").write_text(BASE)
    (tmp_path / "other" / "base.yaml").write_text(BASE.replace("max_epochs: 3", "max_epochs: 4"))
    other = Recipe("other", tmp_path / "other", recipe.shared)
    with pytest.raises(DebiasError, match=r"holds runs of the recipe `toy`, not of `other`.*--out"):
        prepare(other, expand({"erm": [{}]}, [1]), out)
    assert fingerprint(out) == before


def test_a_folder_that_cannot_be_written(recipe, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DebiasError, match=r"Expected `out` to be a folder that can be written"):
        prepare(recipe, expand({"erm": [{}]}, [0]), tmp_path / "file")


def test_a_damaged_spec(recipe, tmp_path):
    runs = expand({"erm": [{}]}, [0])
    (folder,) = prepare(recipe, runs, tmp_path / "out")
    (folder / "spec.json").write_text("{")
    with pytest.raises(DebiasError, match=r"spec.json to say what the run does"):
        prepare(recipe, runs, tmp_path / "out")
    assert (folder / "spec.json").read_text() == "{"


def test_every_recipe_of_the_package_expands():
    shared = recipes_folder() / "methods"
    for base in sorted(recipes_folder().glob("*/base.yaml")):
        recipe = Recipe(base.parent.name, base.parent, shared)
        assert {"erm", "balanced", "group_dro"} <= set(recipe.methods())
        assert json.dumps(recipe.configs("group_dro"))
        assert recipe.hash == Recipe("copy", base.parent, shared).hash
