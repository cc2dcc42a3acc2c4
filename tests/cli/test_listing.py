"""`debias methods` reads the source and says what the classes say."""

import inspect
import os
import re
import shlex
import subprocess
import sys
import time

import pytest

import debias
from debias.cli import EXAMPLES, TRAINING, example, main, make_parser
from debias.cli.listing import list_methods, list_monitors, methods, print_methods
from debias.cli.recipes import recipes_folder


def as_classes_say(name, cls):
    summary = (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")
    return name, summary, tuple(cls.needs), cls.reference


def test_what_is_read_is_what_the_classes_say():
    assert list_methods() == [as_classes_say(name, cls) for name, cls in methods().items()]
    monitors = [name for name, module in debias._EXPORTS.items() if ".monitors." in module]
    assert list_monitors() == [as_classes_say(name, getattr(debias, name)) for name in monitors]


def test_every_recipe_is_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    print_methods()
    printed = capsys.readouterr().out
    for file in (recipes_folder() / "methods").glob("*.yaml"):
        assert file.stem in printed
    row = next(line for line in printed.splitlines() if "GroupDRO " in line)
    assert "group_dro" in row
    assert "Sagawa" in row
    assert "GroupMonitor" in printed


@pytest.mark.parametrize("words", [["methods"], ["recipes"], ["--help"], ["compare", "--help"]])
def test_listings_are_quick_and_import_neither_torch_nor_lightning(words):
    code = (
        "import sys\nfrom debias.cli import main\n"
        f"try: main({words})\nexcept SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    took = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert not {"torch", "lightning", "torchmetrics"} & set(done.stderr.split())
    assert took < 10  # two seconds where nothing else runs


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name])
def test_help_shows_defaults_and_examples_that_parse(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    examples = re.findall(r"^  (debias .+)$", printed.split("examples:")[1], re.M)
    assert examples
    for line in examples:
        make_parser().parse_args(shlex.split(line)[1:])


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "one run per method, setting and seed (default: [0, 1, 2])" in printed
    assert "seed of these draws (default: 0)" in printed
    assert "(default: None)" not in printed


def test_every_command_has_an_example():
    assert {*make_parser().get_default("commands")} == {*TRAINING} | {name for name in EXAMPLES if name}
    assert "--ckpt_path" in example("test")


@pytest.mark.parametrize("rich", [True, False])
def test_a_reader_that_has_read_enough_is_no_error(rich):
    reader, writer = os.pipe()
    os.close(reader)
    without = "" if rich else "import debias.cli.listing as listing; listing.find_spec = lambda name: None; "
    command = [sys.executable, "-c", f"{without}from debias.cli import main; main(['methods'])"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100)
    os.close(writer)
    assert done.stderr == ""
