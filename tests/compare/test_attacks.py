"""A folder of runs that somebody else prepared: nothing of it runs, nothing outside it is touched, names stay text."""

import csv
import io
import json
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from rich.console import Console

from _support.recipes import digits, one
from _support.records import failed, record, save
from debias.cli import one_run
from debias.compare.escape import csv_cell, fenced, markdown, plain
from debias.compare.grid import RunSpec, prepare, spec_hash
from debias.compare.keeping import Keeper, check_checkpoint
from debias.compare.records import find_records, read_record, read_spec, write_json
from debias.compare.report import print_report, write_report
from debias.errors import DebiasError

pytestmark = pytest.mark.usefixtures("coarse_figures")

NAMES = (
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![x](https://example.invalid/x.png)",
    "\n# heading",
    "\n\n[x]: javascript:alert(1)\n\n[x]",
    "[bold red]x[/] [/] [link=https://a.invalid]x",
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "\t=1+1",
    "\uff1d1+1",
    "red\x1b[31m\x1b]0;title\x07",
    "left\u202eright",
    "a | b | c",
    "```\n<b>out</b>\n````",
    "$\\frac{1}$ and $x",
    "\\",
    "<b onmouseover=alert(1)>&#60;b&#62;",
)

# Tags of the page itself.
INERT = {"h1", "h2", "p", "code", "pre", "ul", "li", "picture", "source", "img", "strong"}
INERT |= {"table", "thead", "tbody", "tr", "th", "td"}


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def pickled(path: Path, payload: Payload) -> None:
    path.write_bytes(pickle.dumps(payload))


def legacy(path: Path, payload: Payload) -> None:
    torch.save({"state_dict": payload}, path, _use_new_zipfile_serialization=False)


def zipped(path: Path, payload: Payload) -> None:
    torch.save({"state_dict": {"w": torch.zeros(2)}, "callbacks": {"Keeper": payload}}, path)


def tarred(path: Path, payload: Payload) -> None:
    with tarfile.open(path, "w") as archive:
        content = pickle.dumps(payload)
        entry = tarfile.TarInfo("pickle")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))


def arrays(path: Path, payload: Payload) -> None:
    with path.open("wb") as file:
        np.savez(file, x=np.array([payload], dtype=object))


@pytest.mark.parametrize("write", [pickled, legacy, zipped, tarred, arrays])
def test_no_kind_of_checkpoint_runs_code(tmp_path, write):
    mark, path = tmp_path / "mark", tmp_path / "last.ckpt"
    write(path, Payload(mark))
    with pytest.raises(DebiasError, match=r"Expected .*last\.ckpt to be a checkpoint of tensors.* Delete .*last\.ckpt"):
        check_checkpoint(path, f"Delete {path}.")
    assert not mark.exists()
    assert isinstance(Payload(mark).__reduce__()[0](mark), type(None))
    assert mark.exists()  # it would have been left


def test_a_run_with_a_prepared_checkpoint_fails_and_says_what_to_delete(tmp_path):
    folder, mark = one(tmp_path, "erm"), tmp_path / "mark"
    (folder / "checkpoints").mkdir()
    zipped(folder / "checkpoints" / "last.ckpt", Payload(mark))
    assert one_run.main(folder) == 1
    assert re.search(
        r"DebiasError: Expected .*last\.ckpt to be a checkpoint", read_record(folder / "result.json").error
    )
    assert not mark.exists()


def state(name: str) -> dict:
    best = {"val_average": {"score": 1.0, "epoch": 1, "step": 2, "val": {}, "checkpoint": name}}
    return {
        "epochs": 1, "best": json.dumps(best), "val": "{}", "validated": 2, "stopped": False, "generators": [{}],
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["../../x.ckpt", "/elsewhere/x.ckpt", "checkpoints/../../x.ckpt", "checkpoints/x/../y.ckpt", ""]
)
def test_a_checkpoint_of_another_folder_is_no_best_one(tmp_path, name):
    with pytest.raises(DebiasError, match="to name checkpoints in its own folder"):
        Keeper(tmp_path).load_state_dict(state(name))


def test_a_prepared_best_checkpoint_is_found_before_training(tmp_path):
    keeper, mark = Keeper(tmp_path), tmp_path / "mark"
    (tmp_path / "checkpoints").mkdir()
    keeper.load_state_dict(state("checkpoints/val_average-step2.ckpt"))
    with pytest.raises(DebiasError, match=r"val_average-step2\.ckpt .* FileNotFound|FileNotFound"):
        keeper.on_fit_start(None, None)
    zipped(tmp_path / "checkpoints" / "val_average-step2.ckpt", Payload(mark))
    with pytest.raises(DebiasError, match="to be a checkpoint of tensors"):
        keeper.on_fit_start(None, None)
    assert not mark.exists()


# What is trained


def test_only_what_was_checked_is_trained(tmp_path):
    folder = one(tmp_path, "erm")
    checked = spec_hash(read_spec(folder))
    spec = read_spec(folder)
    spec["configs"][-1].setdefault("trainer", {})["callbacks+"] = [{"class_path": "subprocess.Popen"}]
    (folder / "config0.yaml").write_text("model: {class_path: subprocess.Popen, init_args: {args: [touch, mark]}}\n")
    words = one_run._words(folder, read_spec(folder), {})
    assert "Popen" not in str(words)  # whatever other files say
    write_json(folder / "spec.json", spec)
    with pytest.raises(DebiasError, match=r"spec\.json to be what `debias compare` checked .* has changed since"):
        one_run.main(folder, checked=checked)
    with pytest.raises(DebiasError, match=r"to be configured as before.*callbacks"):
        prepare(digits(), [RunSpec("erm-seed0", "erm", 0)], tmp_path)


@pytest.mark.parametrize("key", ["id", "recipe", "method", "seed", "params", "held_out", "configs", "recipe_hash"])
def test_every_field_of_a_spec_is_checked(tmp_path, key):
    folder = one(tmp_path, "erm")
    spec = read_spec(folder)
    write_json(
        folder / "spec.json", spec | {key: {"seed": 5, "held_out": 1, "params": {"a": 1}, "configs": []}.get(key, "x")}
    )
    with pytest.raises(DebiasError, match="Nothing was changed"):
        prepare(digits(), [RunSpec("erm-seed0", "erm", 0)], tmp_path)


@pytest.mark.parametrize(
    "place", ["runs", "runs/erm-seed0", "runs/erm-seed0/log.txt", "runs/erm-seed0/checkpoints", ".lock", "report.md"]
)
def test_a_folder_that_leads_out_of_itself_is_refused(tmp_path, place):
    out, outside = tmp_path / "out", tmp_path / "outside"
    outside.mkdir()
    (outside / "log.txt").write_text("mine")
    path = out / place
    path.parent.mkdir(parents=True)
    path.symlink_to(outside / "log.txt" if "." in path.name else outside, target_is_directory="." not in path.name)
    with pytest.raises(DebiasError, match=r"to lie there, but .* leads to .*outside.* Nothing"):
        prepare(digits(), [RunSpec("erm-seed0", "erm", 0)], out)
    assert {p.name: p.read_text() for p in outside.iterdir()} == {"log.txt": "mine"}


def test_links_within_the_folder_and_those_of_wandb_are_fine(tmp_path):
    folder = one(tmp_path, "erm")
    (folder / "wandb" / "run").mkdir(parents=True)
    (folder / "latest").symlink_to("wandb")
    (folder / "wandb" / "run" / "code.py").symlink_to(__file__)
    prepare(digits(), [RunSpec("erm-seed0", "erm", 0)], tmp_path)


# Names


@pytest.mark.parametrize("name", NAMES)
def test_names_stay_text_in_every_format(tmp_path, name, monkeypatch):
    draw = Figure.savefig  # once: the text of the dark figures is the same
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, **o: path.touch() if "-dark" in path.name else draw(figure, path, **o)
    )
    logged = {"test/accuracy": 0.5, "test/worst_group_accuracy": 0.25, f"test/accuracy_by_group/{name}": 0.25}
    versions, git = {name: name}, {"revision": name, "changed": True}
    options = {"versions": versions, "git": git, "params": {name: name}, "device": name, "recipe": name}
    method = name.replace("/", "").replace("\\", "") or "x"  # as a file may be called
    runs = [record(m, s, {}, logged, rules=("last",), **options) for m in ("erm", method) for s in (0, 1)]
    runs.append(failed(method, 3, error=name, recipe=name))
    for i, run in enumerate(runs):
        object.__setattr__(run, "id", f"run{i}")
    out = save(runs, tmp_path / "out")
    comparison, paths = write_report(find_records([out]), "last", out, folders=[Path(f"/elsewhere/{name}")])
    page = (out / "report.md").read_text(encoding="utf-8")
    html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(page)
    tags = {tag.lower() for tag in re.findall(r"<(\w+)", html)}
    assert tags <= INERT
    assert html.count("<h1>") == 1
    assert html.count("<h2>") == 4
    assert html.count("<img") == html.count("<picture>")  # the figures
    assert "javascript:" not in "".join(re.findall(r'(?:href|src)="([^"]*)"', html))
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    cells = [len(re.findall(r"(?<!\\)\|", row)) for row in rows[:3]]
    assert len(set(cells)) == 1  # as many columns as the header has
    for file in ("table.csv", "runs.csv"):
        with (out / file).open(newline="", encoding="utf-8") as lines:
            text = [cell for row in csv.reader(lines) for cell in row if not re.fullmatch(r"[-+.\de]*", cell)]
        assert not [cell for cell in text if re.match(r"\s*[=+\-@\uff1d]", cell)]
    shown = io.StringIO()
    print_report(comparison, paths, Console(file=shown, force_terminal=False, width=200))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown.getvalue())
    if name.startswith("[bold"):
        assert "[bold red]" in shown.getvalue()


def test_what_needs_no_escape_stays_as_it_is():
    for text in ("group_dro", "72.3 ±1.2", "+1.0 [-0.5, +2.5]", "land bird", "-", "1e-3", "step_size=0.1"):
        assert markdown(text) == plain(text) == text
    assert csv_cell(-0.5) == -0.5
    assert csv_cell(None) is None
    assert fenced("ls -l") == "```bash\nls -l\n```"
