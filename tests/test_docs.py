"""The code in docstrings, the README and the pages of the documentation runs, and the commands in them parse."""

import doctest
import importlib
import pkgutil
import re
import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import debias
from debias.cli import TRAINING, main, make_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTES = sorted((ROOT / "docs" / "notes").glob("*.md"))  # become parts of the methods' pages, one folder below
FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>```+)(?P<language>\w+) *\n(?P<code>.*?)^(?P=indent)(?P=ticks) *$", re.M | re.S
)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Collect the fenced blocks of one language, each with the number of the line before it."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    return [
        (text.count("\n", 0, found.start("code")), re.sub(rf"(?m)^{found['indent']}", "", found["code"]))
        for found in FENCE.finditer(text)
        if found["language"] == language
    ]


def commands(page: Path) -> list[str]:
    """Collect the calls of ``debias`` in the shell blocks of a page."""
    lines = "\n".join(code for _, code in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    words = (part.strip().removeprefix("$ ") for line in lines for part in line.split("#")[0].split("&&"))
    return [part for part in words if re.match(r"debias\s", part)]


MODULES = [found.name for found in pkgutil.walk_packages(debias.__path__, "debias.") if "__main__" not in found.name]


@pytest.mark.parametrize("name", ["debias", *MODULES])
def test_docstring_examples_run(name, tmp_path, monkeypatch, capsys):
    if "shift" in name:
        pytest.importorskip("kornia", reason="crafted shifts need Python 3.11")
    monkeypatch.chdir(tmp_path)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert result.failed == 0, capsys.readouterr().out


def cases(collect) -> list:
    return [pytest.param(p, id=str(p.relative_to(ROOT))) for p in [*PAGES, *NOTES] if collect(p)]


@pytest.mark.parametrize("page", cases(lambda page: blocks(page, "python")))
def test_code_blocks_run_in_order(page, tmp_path, monkeypatch):
    if page.stem == "crafted_shifts":
        pytest.importorskip("kornia", reason="crafted shifts need Python 3.11")
    monkeypatch.chdir(tmp_path)
    module = ModuleType(f"page_{page.stem.lower()}")  # registered, so that what a page defines can be pickled
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for line, code in blocks(page, "python"):
        if any(find_spec(name) is None for name in re.findall(r"^from (accelerate|transformers|monai)\b", code, re.M)):
            continue  # only single examples need them
        exec(compile("\n" * line + code, str(page), "exec"), vars(module))


EXAMPLES = sorted((ROOT / "docs" / "examples").glob("plot_*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")
def test_examples_run_and_draw_a_figure(script, tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(tmp_path)
    plt.close("all")
    runpy.run_path(str(script))
    assert len(plt.get_fignums()) == 1
    plt.close("all")
    assert len(script.read_text().splitlines()) < 100


@pytest.mark.parametrize(
    ("page", "command"),
    [pytest.param(p, c, id=f"{p.relative_to(ROOT)}: {c}") for p in PAGES for c in dict.fromkeys(commands(p))],
)
def test_commands_parse(page, command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)[1:]
    if words[0] in TRAINING:
        with pytest.raises(SystemExit) as stop:
            main([*words, "--print_config"])
        assert stop.value.code == 0, capsys.readouterr().err
    else:
        make_parser().parse_args(words)


def test_code_of_a_page_that_fails_names_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n```python\nx = 1\n```\n\n```bash\ndebias fit \\\n  --config a.yaml && debias methods  # b\n```\n"
    )
    assert blocks(page, "python") == [(3, "x = 1\n")]
    assert commands(page) == ["debias fit    --config a.yaml", "debias methods"]


@pytest.fixture
def method_pages(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("method_pages")


def test_api_and_methods_document_every_public_name_once(method_pages):
    text = (ROOT / "docs" / "api.md").read_text() + "".join(map(method_pages.page, method_pages.methods()))
    assert [name for name in debias.__all__[1:] if text.count(f":: debias.{name}\n") != 1] == []
    for path in re.findall(r"^\.\. auto(?:class|function):: ([\w.]+)$", text, re.M):
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


SCHEME = [
    "How it works",
    "What it needs and costs",
    "Code",
    "Numbers",
    "Differences from published code",
    "What to expect",
]


def test_every_method_has_a_page_in_the_scheme(method_pages):
    for name in method_pages.methods():
        page = method_pages.page(name)
        headings = re.findall(r"^## (.+)$", FENCE.sub("", page), re.M)
        assert headings == [heading for heading in [*SCHEME, "Arguments"] if heading in headings], name
        assert {"How it works", "What it needs and costs", "Code", "Arguments"} <= set(headings), name
        for fact in ("works when", "fails when", "needs", "reference"):
            assert re.search(rf"^\| \*\*{fact}\*\* \| \S", page, re.M), (name, fact)
        exec(method_pages.code(name).replace("L.Trainer", "dict"), {})


def test_every_method_says_in_two_sentences_what_it_does_and_why_that_helps(method_pages):
    for name, cls in method_pages.methods().items():
        for sentence in method_pages.idea(cls):
            assert re.fullmatch(r"[A-Z][^.`]*\.", sentence), (name, sentence)
            assert len(sentence) < 220, (name, sentence)


def test_numbers_of_a_method_are_those_of_the_tables(method_pages):
    table = (ROOT / "docs" / "compare.md").read_text()
    (row,) = re.findall(r"^\| `vrex` \|.*$", table, re.M)
    assert row in method_pages.page("VREx")
    assert "| `irm` |" not in method_pages.page("VREx")


def toctree(page: str) -> list[str]:
    """The pages that a page puts below itself in the navigation."""
    if not (ROOT / "docs" / f"{page}.md").exists():  # made when the pages are built
        return []
    found = re.search(r"```\{toctree\}\n(?::\w+:.*\n)*\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.S)
    return found[1].split() if found else []


def test_navigation_is_short_and_ends_with_the_inside():
    top = toctree("index")
    assert len(top) <= 7
    assert top[-1] == "inside"
    reached = {"index", *top, *(below for page in top for below in toctree(page))} - {"method/*", "gallery/index"}
    assert reached == {page.stem for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("page", [*PAGES, *NOTES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    links = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'(?:src|srcset)="([^"]+)"', text)]
    for link in links:
        if not re.match(r"\w+:|#", link):
            folder = ROOT / "docs" if page in NOTES else page.parent
            assert (folder / link.partition("#")[0]).exists(), link


def test_formulas_are_drawn_by_the_browser(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    mathml = importlib.import_module("mathml").mathml
    assert mathml(r"\bar Q", block=False).startswith("<math")
    assert "mover" in mathml(r"\bar Q", block=False)
    pages = "".join(FENCE.sub("", page.read_text()) for page in (ROOT / "docs").glob("*.md"))
    found = re.findall(r"\$\$(.+?)\$\$", pages, re.S)
    assert len(found) > 5
    assert all("<math" in mathml(formula, block=True) for formula in found)
