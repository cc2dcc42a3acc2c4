"""Recipes are found, every combination parses, and every one builds the classes that it names."""

import re
from pathlib import Path

import pytest
import yaml

from debias import __version__
from debias.cli import main
from debias.cli.recipes import recipes, recipes_folder

ROOT = Path(__file__).parents[1]
METHODS = sorted(file.stem for file in (recipes_folder() / "methods").glob("*.yaml"))
COMBINATIONS = [
    pytest.param(base, file, id=f"{name}-{file.parent.name}-{file.stem}")
    for name, base in recipes().items()
    for file in [*sorted((recipes_folder() / "methods").glob("*.yaml")), *sorted(base.glob("*.yaml"))]
    if file.name != "base.yaml"
]


def test_recipes_and_methods_are_there():
    assert {"colored_digits", "colored_mnist", "digits_shift", "mnist_shift", "pacs", "waterbirds"} <= set(recipes())
    assert {
        "balanced",
        "coral",
        "erm",
        "fishr",
        "group_dro",
        "hessian_alignment",
        "irm",
        "mmd",
        "reweight",
        "vrex",
    } <= set(METHODS)


@pytest.mark.parametrize(("base", "method"), COMBINATIONS)
def test_every_combination_parses(base, method, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(base / "base.yaml"), "--config", str(method), "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    callbacks = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert callbacks[:2] == ["GroupMonitor", "ModelCheckpoint"]
    assert "${" not in printed
    for callback in config["trainer"]["callbacks"]:
        sizes = config["data"]["init_args"]
        assert callback.get("init_args", {}).get("n_groups", 4) in (sizes["n_groups"], sizes.get("n_domains"), 4)


@pytest.mark.parametrize("file", sorted(recipes_folder().rglob("*.yaml")), ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_every_recipe_says_what_it_is(file):
    assert re.match(r"# \w.{20,}", file.read_text())


def test_versions_agree():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
