"""What the package imports is declared: the core needs its dependencies only, and a missing extra is one sentence."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from debias.cli.errors import readable_errors
from debias.extras import CORE as CORE_MODULES
from debias.extras import EXTRAS, PACKAGES, install_hint, needs_extra

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
# Rooms that are not of the core, and the extra that their commands and functions ask for.
ROOMS = {"cli": "recipes", "compare": "compare", "audit": "audit"}
ASKED = re.compile(r"needs_extra\('(?P<extra>\w+)'\)")


def declared(extra: str) -> set[str]:
    """The packages that an extra brings, with those of the extras that it names."""
    found = set()
    for line in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            found |= set().union(*map(declared, requirement.extras))
        else:
            found.add(canonicalize_name(requirement.name))
    return found


def imports(file: Path) -> Iterator[tuple[str, bool, str | None]]:
    """The packages that a file imports, whether it does so when it is imported itself, and the extra it asks for."""

    def walk(node: ast.AST, first: bool, extra: str | None) -> Iterator[tuple[str, bool, str | None]]:
        for child in ast.iter_child_nodes(node):
            names = [name.name for name in child.names] if isinstance(child, ast.Import) else []
            if isinstance(child, ast.ImportFrom) and not child.level:
                names = [child.module or ""]
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"debias"}:
                yield name, first, extra
            if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
                asked = ASKED.fullmatch(ast.unparse(child.items[0])) if isinstance(child, ast.With) else None
                yield from walk(
                    child, first and not isinstance(child, ast.FunctionDef), asked["extra"] if asked else extra
                )

    return walk(ast.parse(file.read_text()), True, None)


@pytest.mark.parametrize("file", sorted((ROOT / "debias").rglob("*.py")), ids=lambda f: f.relative_to(ROOT).as_posix())
def test_imports_are_declared(file):
    room = file.relative_to(ROOT / "debias").parts[0]
    at_once = CORE | (declared(ROOMS[room]) if room in ROOMS else set())
    for name, first, extra in imports(file):
        package = canonicalize_name(PACKAGES.get(name, name))
        if name == "pyarrow":  # the message says to install it, or to write another format
            assert not first
        elif package not in CORE:
            assert package in declared(EXTRAS[name]), f"{EXTRAS[name]} does not bring {package}"
            assert extra is None or package in declared(extra), f"{extra} does not bring {package}"
            assert extra or not first or package in at_once, f"{file} imports {name}, which the core does not bring"


def test_all_brings_everything():
    assert {canonicalize_name(name) for name in CORE_MODULES} == CORE | {"debias"}
    # `recipes` is what the demo, the comparisons and the data modules need.
    assert {canonicalize_name(PACKAGES.get(name, name)) for name in EXTRAS} <= declared("all") <= declared("test")
    assert declared("recipes") >= declared("compare") | declared("images") | declared("detection") | declared("wandb")


def test_a_hint_names_the_package_and_the_extra():
    assert install_hint("sklearn.cluster") == (
        "`scikit-learn` is not installed; `pip install 'lightning-debias[sklearn]'` brings it."
    )
    assert install_hint("torch") is None


def test_an_import_that_fails_names_what_is_missing():
    from debias.errors import DebiasError

    with (
        pytest.raises(DebiasError, match=r"`nowhere` to be installed.*'lightning-debias\[images\]'`\.$"),
        needs_extra("images"),
    ):
        import nowhere.deep  # noqa: F401


def test_a_class_of_a_config_names_the_extra_that_brings_its_package():
    from debias.errors import DebiasError

    with pytest.raises(DebiasError, match=r"'lightning-debias\[images\]'"), needs_extra("cli"):
        raise ImportError("No module named 'torchvision'", name="torchvision")


@pytest.mark.parametrize("kind", [ModuleNotFoundError, ValueError])  # jsonargparse puts it into an error of its own
def test_a_loggers_missing_package_is_one_sentence(kind, capsys):
    with pytest.raises(SystemExit), readable_errors():
        raise kind("Problem with 'a.Logger':\n  Requirement 'mlflow>=1.0' not met. HINT: Try running `pip install`")
    assert capsys.readouterr().err == "error: `mlflow` is not installed; `pip install mlflow` brings it.\n"


def test_an_error_in_the_core_is_no_missing_extra():
    with pytest.raises(ImportError, match="cannot import name"), needs_extra("images"):
        from debias.errors import no_such_name  # noqa: F401


def _closure(name: str, found: dict[str, Distribution]) -> None:
    """All that pip would install with ``name``, of what is installed here."""
    todo = [Requirement(name)]
    while todo:
        requirement = todo.pop()
        try:
            dist = distribution(requirement.name)
        except PackageNotFoundError:
            continue
        known = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        if known not in found or requirement.extras:
            todo += [
                needed
                for needed in map(Requirement, dist.requires or [])
                if not needed.marker or any(needed.marker.evaluate({"extra": extra}) for extra in extras)
                if canonicalize_name(needed.name) not in found or needed.extras
            ]
        found[known] = dist


@pytest.fixture(scope="module")
def core_alone(tmp_path_factory):
    """A folder with what `pip install lightning-debias` would bring, as links to what is installed here."""
    folder, found = tmp_path_factory.mktemp("core"), {}
    for line in PROJECT["dependencies"]:
        _closure(line, found)
    for dist in found.values():
        for top in {file.parts[0] for file in dist.files or () if file.parts[0] not in ("..", "__pycache__")}:
            link = folder / top
            if not link.exists():
                link.symlink_to(dist.locate_file(top))
    return folder


COMMANDS = [
    (["fit", "--config", "x.yaml"], "cli"),
    (["compare", "recipes/colored_digits"], "compare"),
    (["report", "somewhere"], "compare"),
    (["demo"], "recipes"),
    (["gallery"], "recipes"),
    (["shift-selection"], "recipes"),
    (["audit", "--predictions", "p.csv"], "audit"),
]


def test_the_core_works_alone_and_says_what_is_missing(core_alone, tmp_path):
    code = (
        "import debias, sys; [getattr(debias, name) for name in debias.__all__]\n"
        "import debias.functional, debias.mixins, debias.data, debias.models.classifier\n"
        "from debias.cli import main\n"
        "main(['methods']); main(['recipes'])\n"
        "print('listed', file=sys.stderr)\n"
        f"for words in {[words for words, _ in COMMANDS]}:\n"
        "    try: main(words)\n"
        "    except SystemExit as stop: assert stop.code == 1, words\n"
        "    else: raise AssertionError(words)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{core_alone}"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "GroupDRO" in done.stdout
    said = done.stderr.split("listed\n")[1].splitlines()
    assert len(said) == len(COMMANDS), said
    for line, (words, extra) in zip(said, COMMANDS, strict=True):
        assert line.endswith(f"Run `pip install 'lightning-debias[{extra}]'`."), (words, line)
