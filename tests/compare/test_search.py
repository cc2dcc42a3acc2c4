"""Ranges, draws and overrides, on made-up configs; then on every recipe, through the parser."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from debias.cli.recipes import recipes, recipes_folder
from debias.cli.training import DebiasCLI, parse_config
from debias.compare.grid import Recipe, settings_of
from debias.compare.search import Space, applies, draw_settings, override, read_config, read_spaces
from debias.errors import DebiasError

RECIPES = recipes_folder()
FILES = sorted(RECIPES.rglob("*.yaml"))
LR = "model.init_args.optimizer.init_args.lr"
BASE = {
    "data": {"init_args": {"n_groups": 4}},
    "model": {"init_args": {"optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.001}}}},
    "trainer": {"callbacks": [{"class_path": "debias.GroupMonitor", "init_args": {"n_groups": 4}}]},
}
METHOD = {"trainer": {"callbacks+": [{"class_path": "debias.GroupDRO", "init_args": {"n_groups": 4}}]}}


def files(*contents: dict) -> list[dict[str, Any]]:
    return copy.deepcopy(list(contents) or [BASE, METHOD])


# spaces


@pytest.mark.parametrize(
    ("given", "space"),
    [
        ([1, "a", None], Space("choices", (1, "a", None))),
        ({"choices": [[0.0, 0.5], True]}, Space("choices", ([0.0, 0.5], True))),
        ({"uniform": [-1, 0.5]}, Space("uniform", (-1, 0.5))),
        ({"log_uniform": [1e-4, 1]}, Space("log_uniform", (1e-4, 1))),
        ({"integers": [-3, 3]}, Space("integers", (-3, 3))),
    ],
)
def test_forms(given, space):
    assert read_spaces({"trainer.x": given, "A.b": [1]}, "f.yaml") == {
        "trainer.x": space,
        "A.b": Space("choices", (1,)),
    }


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (0.1, "to be a list of choices, or one of choices, uniform, log_uniform, integers, but got 0.1"),
        ("log_uniform", "to be a list of choices"),
        (None, "to be a list of choices"),
        ({"loguniform": [1, 2]}, "to be a list of choices"),
        ({"uniform": [1, 2], "choices": [1]}, "to be a list of choices"),
        ({}, "to be a list of choices"),
        ([], "at least one choice, but got []"),
        ({"choices": "ab"}, "at least one choice, but got 'ab'"),
        ({"uniform": [2, 1]}, "two numbers, `uniform: [low, high]` with low below high, but got [2, 1]"),
        ({"uniform": [1, 1]}, "low below high"),
        ({"uniform": [1]}, "two numbers"),
        ({"uniform": 1}, "two numbers"),
        ({"uniform": [0, "1e-3"]}, "two numbers"),
        ({"uniform": [False, True]}, "two numbers"),
        ({"uniform": [0, math.inf]}, "two numbers"),
        ({"uniform": [math.nan, 1]}, "two numbers"),
        ({"log_uniform": [0, 1]}, "two numbers above 0"),
        ({"integers": [1, 2.5]}, "two integers"),
    ],
)
def test_wrong_ranges_are_refused(given, rule):
    with pytest.raises(DebiasError, match=re.escape(rule)) as caught:
        read_spaces({"GroupDRO.step_size": given}, "my.yaml")
    assert "`search: GroupDRO.step_size` in my.yaml" in str(caught.value)


@pytest.mark.parametrize("search", [["a"], "a", 1, {1: [2]}, {"": [2]}, {"a..b": [2]}])
def test_wrong_sections_are_refused(search):
    with pytest.raises(DebiasError, match=r"`search` in my\.yaml"):
        read_spaces(search, "my.yaml")


def test_draws_follow_their_distribution():
    random = np.random.RandomState(0)

    def draws(kind: str, *values: Any) -> list[Any]:
        return [Space(kind, values).draw(random) for _ in range(4000)]

    # quarters of a uniform sample hold a quarter each; 0.03 is four standard errors
    for kind, scale, low, high in (("uniform", float, -2.0, 6.0), ("log_uniform", math.log10, 1e-4, 1.0)):
        values = draws(kind, low, high)
        assert all(type(v) is float and low <= v <= high for v in values)
        at = [(scale(v) - scale(low)) / (scale(high) - scale(low)) for v in values]
        assert np.histogram(at, bins=4, range=(0, 1))[0] / 4000 == pytest.approx(0.25, abs=0.03)
    for kind, values, expected in (("integers", (1, 4), [1, 2, 3, 4]), ("choices", ("a", None), ["a", None])):
        drawn = draws(kind, *values)
        assert all(drawn.count(v) / 4000 == pytest.approx(1 / len(expected), abs=0.03) for v in expected)
        assert {type(v) for v in drawn} == {type(v) for v in expected}  # not numpy's, which YAML would not read


def test_draws_read_well_and_stay_inside():
    random = np.random.RandomState(0)
    for _ in range(200):
        value = Space("log_uniform", (1e-5, 1e5)).draw(random)
        assert len(re.sub(r"e.*|\D", "", f"{value:e}").rstrip("0")) <= 4
        assert 0.123456 <= Space("uniform", (0.123456, 0.123457)).draw(random) <= 0.123457


# settings

SPACES = {"A.b": Space("log_uniform", (0.01, 1.0)), "trainer.max_epochs": Space("integers", (1, 9))}


def test_settings_begin_with_the_recipe_and_repeat_with_the_seed():
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    settings = draw_settings(SPACES, 8, seed=1)
    assert settings[0] == {}
    assert [list(setting) for setting in settings[1:]] == [list(SPACES)] * 7
    assert draw_settings(SPACES, 8, seed=1) == settings
    assert draw_settings(SPACES, 3, seed=1) == settings[:3]  # more draws later repeat none of these runs
    assert draw_settings(SPACES, 8, seed=2)[1:] != settings[1:]
    assert np.random.get_state()[1].tolist() == before
    assert yaml.safe_load(yaml.safe_dump(settings)) == settings


def test_settings_are_distinct_and_end_where_the_choices_do():
    spaces = {"A.b": Space("choices", (1, 2)), "A.c": Space("integers", (1, 3))}
    settings = draw_settings(spaces, 50, seed=0)
    assert sorted(tuple(s.values()) for s in settings[1:]) == [(b, c) for b in (1, 2) for c in (1, 2, 3)]
    assert draw_settings({}, 5, seed=0) == [{}]
    with pytest.raises(DebiasError, match="at least 1, but got 0"):
        draw_settings(SPACES, 0, seed=0)


# overrides


def test_callback_arguments_are_set_where_the_callback_is_listed():
    base, method = given = files()
    override(given, "GroupDRO.step_size", 0.5)
    override(given, "GroupMonitor.n_groups", 6)
    assert method["trainer"]["callbacks+"][0]["init_args"] == {"n_groups": 4, "step_size": 0.5}
    assert base["trainer"]["callbacks"][0]["init_args"] == {"n_groups": 6}
    assert {k: v for k, v in base.items() if k != "trainer"} == {k: v for k, v in BASE.items() if k != "trainer"}
    assert list(method) == ["trainer"]


@pytest.mark.parametrize(
    "callback",
    ["my.GroupDRO", {"class_path": "GroupDRO"}, {"class_path": "my.GroupDRO", "init_args": None}],
    ids=["string", "short", "null"],
)
@pytest.mark.parametrize("listed", [True, False])
def test_other_ways_to_write_a_callback(callback, listed):
    given = files(BASE, {"trainer": {"callbacks+": [callback] if listed else callback}})
    override(given, "GroupDRO.optimizer.init_args.lr", 0.5)
    entry = given[1]["trainer"]["callbacks+"]
    entry = entry[0] if listed else entry
    assert entry["init_args"] == {"optimizer": {"init_args": {"lr": 0.5}}}
    assert entry["class_path"].endswith("GroupDRO")


def test_paths_from_the_root_are_set_in_the_last_file():
    base, method = given = files()
    override(given, LR, 0.5)
    override(given, "trainer.max_epochs", 3)
    override(given, "seed_everything", 7)
    assert base == BASE
    assert method["model"] == {"init_args": {"optimizer": {"init_args": {"lr": 0.5}}}}
    assert method["trainer"] == {**METHOD["trainer"], "max_epochs": 3}
    assert method["seed_everything"] == 7


@pytest.mark.parametrize(
    ("contents", "key", "message"),
    [
        ((BASE, METHOD), "GroupDR.step_size", "none is a GroupDR; the nearest is `GroupDRO` of GroupDRO, GroupMonitor"),
        ((BASE, METHOD), "Zzz.step_size", "there are GroupDRO, GroupMonitor"),
        (({},), "GroupDRO.step_size", "there are none at all"),
        ((BASE, METHOD, {"trainer": {"callbacks": []}}), "GroupDRO.step_size", "there are none at all"),
        ((METHOD, METHOD), "GroupDRO.step_size", "lists 2 of them"),
        ((BASE, METHOD), "GroupDRO", "to name an argument"),
        ((BASE, METHOD), "trainer..x", "names joined by dots"),
        ((), "trainer.x", "a file to set it in"),
        ((BASE,), "trainer.callbacks.n_groups", "`trainer.callbacks` to hold further keys"),
    ],
)
def test_overrides_without_a_place_are_refused(contents, key, message):
    given = copy.deepcopy(list(contents))
    with pytest.raises(DebiasError, match=re.escape(message)):
        override(given, key, 1)
    assert given == list(contents)


def test_two_callbacks_of_a_class_in_one_file_are_refused():
    twice = {"trainer": {"callbacks+": METHOD["trainer"]["callbacks+"] * 2}}
    with pytest.raises(DebiasError, match=r"one callback of class GroupDRO .* lists 2 of them"):
        override(files(BASE, twice), "GroupDRO.step_size", 1)


def test_applies():
    given = files()
    assert applies(given, "GroupDRO.step_size")
    assert applies(given, "GroupMonitor.group")
    assert applies(given, "model.init_args.lr")
    assert not applies(given, "VREx.penalty_weight")
    assert not applies(given[:1], "GroupDRO.step_size")
    assert given == files()


# files


def test_files_keep_their_interpolation(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("search: {GroupDRO.step_size: {log_uniform: [1e-3, 1]}}\ndata:\n  a: ${b.c}\n  n: ???\n")
    assert read_config(file) == {
        "search": {"GroupDRO.step_size": {"log_uniform": [0.001, 1]}}, "data": {"a": "${b.c}", "n": "???"}
    }  # fmt: skip


@pytest.mark.parametrize("text", ["- a\n", "word\n", "a: [1\n", "a: 1\na: 2\n", None, b"\xff\xfe\x00"])
def test_files_that_are_no_config_are_refused(tmp_path, text):
    file = tmp_path / "a.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DebiasError, match=r"a\.yaml to be a "):
        read_config(file)


def test_a_file_of_comments_is_an_empty_config(tmp_path):
    (tmp_path / "a.yaml").write_text("# plain training\n")
    assert read_config(tmp_path / "a.yaml") == {}


# recipes


def _pairs() -> list[Any]:
    """Every file with a method, with each base that is meant for it; methods for all on the coloured digits."""
    bases = {folder.name: folder / "base.yaml" for folder in recipes().values()}
    pairs = [(base, file) for base in bases.values() for file in sorted(base.parent.glob("*.yaml")) if file != base]
    for file in sorted((RECIPES / "methods").glob("*.yaml")):
        home = "identity_shortcut" if file.stem == "identity_adversarial" else "colored_digits"
        pairs.append((bases[home], file))
    return [pytest.param(*pair, id=f"{pair[0].parent.name}-{pair[1].parent.name}-{pair[1].stem}") for pair in pairs]


def spaces_of(*paths: Path) -> dict[str, Space]:
    spaces = {}
    for path in paths:
        spaces |= read_spaces(read_config(path).get("search", {}), path.name)
    return spaces


def configs(folder: Path, paths: tuple[Path, ...], setting: dict[str, Any]) -> list[str]:
    """Command-line words for the files with ``setting``."""
    contents = [read_config(path) for path in paths]
    for key, value in setting.items():
        override(contents, key, value)
    words = []
    for i, content in enumerate(contents):
        (folder / f"{i}.yaml").write_text(yaml.safe_dump(content))
        words += ["--config", str(folder / f"{i}.yaml")]
    return words


def found(config: dict[str, Any], key: str) -> Any:
    """The value of ``key`` in a resolved config."""
    first, *rest = key.split(".")
    if first[0].isupper():
        (config,) = (c for c in config["trainer"]["callbacks"] if c["class_path"].endswith(f".{first}"))
        rest = ["init_args", *rest]
    else:
        rest = [first, *rest]
    for name in rest:
        config = config[name]
    return config


def test_most_methods_have_ranges():
    without = {f.stem for f in (RECIPES / "methods").glob("*.yaml") if not spaces_of(f)}
    assert without == {"balanced", "erm", "dsu", "dfr"}  # DFR chooses its strength itself


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_ranges_name_their_source(file):
    lines = file.read_text().splitlines()
    if "search:" in lines:
        assert re.match(r"# [A-Z]?.*\w", lines[lines.index("search:") - 1])
        assert spaces_of(file)
    if file.stem != "base":  # what all methods share is tuned alike, but for what the file sets itself
        own = OmegaConf.create(read_config(file))
        assert all(key[0].isupper() or OmegaConf.select(own, key) is not None for key in spaces_of(file))


def test_draws_find_what_is_best_on_waterbirds():
    """Adjusted GroupDRO on shuffled batches; domain penalisation with a low temperature."""
    recipe = Recipe("waterbirds", RECIPES / "waterbirds", RECIPES / "methods")
    drawn = settings_of(recipe, ["group_dro", "domain_penalisation"], draws=40)
    dro, penalisation = drawn["group_dro"], drawn["domain_penalisation"]
    assert dro[0] == penalisation[0] == {}  # what was published
    assert any(s.get("GroupDRO.adjustment") == 3 and s["data.init_args.balance"] is None for s in dro)
    assert any(0.2 < s.get("DomainPenalisation.temperature", 1) < 0.3 for s in penalisation)
    balance = {OmegaConf.merge(*recipe.configs("group_dro", s)).data.init_args.get("balance") for s in dro}
    assert balance == {"group", None}
    words = [(RECIPES / path).read_text() for path in ("waterbirds/group_dro.yaml", "methods/domain_penalisation.yaml")]
    assert all(re.search(r"(?i)\bours\b.*on frozen features of Waterbirds", text) for text in words)


@pytest.mark.parametrize(("base", "method"), _pairs())
def test_draws_reach_the_parser(base, method, tmp_path):
    contents = [read_config(base), read_config(method)]
    spaces = spaces_of(base, method)
    assert all(applies(contents, key) for key in spaces)
    setting = draw_settings(spaces, 2, seed=0)[-1]
    assert list(setting) == list(spaces)
    config = parse_config(configs(tmp_path, (base, method), setting))
    assert {key: found(config, key) for key in setting} == setting


@pytest.mark.parametrize(
    ("base", "method"), [p for p in _pairs() if p.values[0].parent.name in ("colored_digits", "identity_shortcut")]
)
@pytest.mark.parametrize("end", [0, -1])
def test_both_ends_of_the_ranges_can_be_built(base, method, end, tmp_path):
    setting = {key: space.values[end] for key, space in spaces_of(base, method).items()}
    words = configs(tmp_path, (base, method), setting)
    quiet = ["--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    cli = DebiasCLI("fit", [*words, *quiet])
    assert cli.datamodule.batch_size == setting["data.init_args.batch_size"]


# the command line


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_runs_do_without_the_ranges(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "more.yaml"
    file.write_text("search:\n  GroupDRO.step_size: [1]\n  nonsense.key: {nobody: [reads, it]}\n")
    base, method = RECIPES / "colored_digits" / "base.yaml", RECIPES / "methods" / "group_dro.yaml"
    words = [word for path in (base, method, file) for word in ("--config", str(path))]
    cli = DebiasCLI(stage, [*words, "--trainer.logger=false", "--trainer.accelerator=cpu"])
    assert "search" not in cli.config.as_dict()
    assert "search" not in cli.config_init.as_dict()
    assert "search" not in yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
