"""Recipes are found, every combination parses, and every one builds the classes that it names."""

import functools
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from debias import __version__
from debias.cli import main
from debias.cli.recipes import recipes, recipes_folder
from debias.cli.training import parse_config

ROOT = Path(__file__).parents[1]
METHODS = sorted(file.stem for file in (recipes_folder() / "methods").glob("*.yaml"))


def _numbers(file: Path) -> set[str]:
    """The numbers of the data that a method file refers to."""
    return set(re.findall(r"\$\{data\.init_args\.(\w+)\}", file.read_text()))


def _bases() -> dict[str, Path]:
    return {name: folder / "base.yaml" for name, folder in recipes().items()}


@functools.cache
def _data(base: Path) -> set[str]:
    """The arguments of the data that a recipe gives."""
    return set(yaml.safe_load(base.read_text())["data"]["init_args"])


def _fits(method: Path, base: Path) -> bool:
    return _numbers(method) <= _data(base)


def _combinations() -> list[Any]:
    """Every method on the coloured digits, or else on the first dataset it fits; every dataset with its own files."""
    bases = _bases()
    order = sorted(bases.values(), key=lambda base: base.parent.name != "colored_digits")
    pairs = [
        (next(base for base in order if _fits(recipes_folder() / "methods" / f"{name}.yaml", base)), "methods", name)
        for name in METHODS
    ]
    for base in bases.values():
        pairs += [(base, "methods", "erm"), (base, "methods", "group_dro")]
        pairs += [(base, base.parent.name, file.stem) for file in sorted(base.parent.glob("*.yaml")) if file != base]
    return [
        pytest.param(base, recipes_folder() / folder / f"{name}.yaml", id=f"{base.parent.name}-{folder}-{name}")
        for base, folder, name in dict.fromkeys(pairs)
        if _fits(recipes_folder() / folder / f"{name}.yaml", base)
    ]


def test_recipes_and_methods_are_there():
    assert {
        "bccd", "bp4d", "colored_digits", "colored_mnist", "digits_adaptation", "digits_shift", "disfa", "gwhd",
        "identity_shortcut", "mnist_shift", "pacs", "shapes_detection", "waterbirds",
    } <= set(recipes())  # fmt: skip
    assert {
        "adv_style", "balanced", "cdann", "coral", "dann", "domain_penalisation", "dsu", "edge_view", "erm", "fishr",
        "group_dro", "group_mixup", "hessian_alignment", "identity_adversarial", "irm", "mixstyle", "mmd", "reweight",
        "vrex",
    } <= set(METHODS)  # fmt: skip


@pytest.mark.parametrize(("base", "method"), _combinations())
def test_combinations_parse(base, method):
    config = parse_config(["--config", str(base), "--config", str(method)])
    callbacks = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert any("Monitor" in name or name == "ShiftedValidation" for name in callbacks[:2])  # the base's survive
    assert "ModelCheckpoint" in callbacks
    assert "${" not in str(config)


def test_a_config_is_printed_as_it_is_run(capsys):
    words = ["--config", str(_bases()["colored_digits"]), "--config", str(recipes_folder() / "methods" / "vrex.yaml")]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *words, "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    printed = yaml.safe_load(printed[printed.index("# lightning") :] if "# lightning" in printed else printed)
    ran = json.loads(json.dumps({key: parse_config(words)[key] for key in ("data", "model")}, default=str))
    assert printed["data"] == ran["data"]
    assert printed["model"]["class_path"] == ran["model"]["class_path"]


def test_a_method_that_the_data_cannot_serve_says_what_is_missing(capsys):
    base, method = _bases()["colored_digits"], recipes_folder() / "methods" / "identity_adversarial.yaml"
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(base), "--config", str(method), "--print_config"])
    assert stop.value.code
    assert "Expected the config to set `data.init_args.n_identities`" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(recipes_folder().rglob("*.yaml")), ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_every_recipe_says_what_it_is(file):
    assert re.match(r"# \w.{20,}", file.read_text())


def test_versions_agree():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", sorted(_bases()))
def test_balanced_erm_names_what_the_data_can_balance(name):
    from debias.cli.compare import find_recipe

    base, method = find_recipe(str(recipes_folder() / name)).configs("balanced")
    module, _, cls = base["data"]["class_path"].rpartition(".")
    assert method["data"]["init_args"]["balance"] in getattr(import_module(module), cls).balances
