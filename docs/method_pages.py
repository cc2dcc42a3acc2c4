"""One page a method, in one scheme, made of what its source says: docstrings, class attributes, tables of other pages.

What only prose can say stands in ``notes/<class>.md`` and is put into the page.
"""

import inspect
import json
import re
import sys
from pathlib import Path

import debias.methods
from debias.cli.listing import list_monitors, methods

DOCS = Path(__file__).parent
RECIPES = DOCS.parent / "recipes" / "methods"
# Pages about what several methods share.
GUIDES = {
    "penalties": ("Penalties on how domains differ", "VREx IRM Fishr HessianAlignment CORAL MMD"),
    "hessian_alignment": ("Hessian alignment in closed form", "HessianAlignment"),
    "augmentation": ("Augmentation against shortcuts", "MixStyle DSU AdvStyle GroupMixup EdgeView"),
    "crafted_shifts": ("Crafted shifts", "CraftedShifts"),
    "identity_adversarial": ("Identity-adversarial training", "IdentityAdversarial DomainAdversarial"),
    "no_group_labels": (
        "No group labels?",
        "InferGroups JustTrainTwice LearningFromFailure CVaRDRO ChiSquareDRO LastLayerRetraining LogitAdjustment"
        " ClassBalanced LDAM FocalLoss",
    ),
}
# Values of arguments without a default, and callbacks that need something else.
SAMPLE = {
    "group": "place", "n_groups": 4, "domain": "hospital", "n_domains": 3, "identity": "person", "n_identities": 41,
    "n_classes": 10, "epochs": 2,
}  # fmt: skip
CALLS = {
    "InferGroups": 'InferGroups("errors", epochs=2), GroupDRO(group="inferred", n_groups=2)',
    "LastLayerRetraining": 'LastLayerRetraining(group="place", n_groups=4)',
    "GroupMixup": 'GroupMixup(domain="hospital")',
}
NUMBERS = {"compare": "a comparison on coloured digits", "no_group_results": "a comparison without group labels"}
SECTION = re.compile(r"(?:^|(?<=[.;)] ))(?=(?:Published[: ]|Published for|Differences from|Costs[: ]|Needs |Memory ))")


def sections(docstring):
    """A module's docstring by what its sentences begin with; under ``""`` all that is left, the formula first."""
    found = {"": []}
    for paragraph in docstring.partition("\n\n")[2].split("\n\n"):
        if paragraph.startswith((" ", "=")) or "\n    " in paragraph:
            found[""].append(paragraph)
            continue
        for part in SECTION.split(" ".join(paragraph.split())):
            first = part.partition(" ")[0].rstrip(":")
            key = {"Published": "Published", "Differences": "Differences from", "Memory": "Costs"}.get(first, first)
            found.setdefault(key if key in ("Published", "Differences from", "Costs", "Needs") else "", []).append(part)
    return {key: "\n\n".join(parts) for key, parts in found.items() if parts}


def idea(cls):
    """What the method does and why that helps against shortcuts: the first two paragraphs of its docstring."""
    what, why, *_ = inspect.getdoc(cls).split("\n\n")
    return [" ".join(part.split()) for part in (what, why)]


def classes(name):
    """The callback's class, its module, mixin and layer: all public ones of its file."""
    module = methods()[name].__module__
    found = [n for n, value in vars(debias.methods).items() if inspect.isclass(value) and value.__module__ == module]
    return sorted(found, key=lambda n: n != name)


def recipes(name):
    """The method files that begin with this callback."""
    files = {file.stem: re.findall(r"class_path: debias\.(\w+)", file.read_text()) for file in RECIPES.glob("*.yaml")}
    return sorted(stem for stem, names in files.items() if names[:1] == [name])


def rows(page, wanted):
    """The rows of a page's first table of results that are about these methods, below its header and ERM."""
    text = (DOCS / f"{page}.md").read_text()
    for table in re.findall(r"(?m)^\| test accuracy.*\n(?:\|.*\n)+", text):
        header, rule, *lines = table.splitlines()
        found = [line for line in lines if re.match(rf"\| `(?:{'|'.join(wanted)})`", line)]
        if found:
            return [header, rule, *found, *(line for line in lines if line.startswith("| ERM "))]
    return []


def code(name):
    """How the callback is made, with what it cannot do without."""
    parameters = inspect.signature(methods()[name]).parameters.values()
    given = ", ".join(f"{p.name}={json.dumps(SAMPLE[p.name])}" for p in parameters if p.default is p.empty)
    callbacks = CALLS.get(name, f"{name}({given})")
    names = ", ".join(sorted(set(re.findall(r"([A-Z]\w+)\(", callbacks))))
    return f"import lightning as L\n\nfrom debias import {names}\n\ntrainer = L.Trainer(callbacks=[{callbacks}])"


def capital(text):
    """A sentence that has lost its beginning."""
    return text[:1].upper() + text[1:]


def rst(text):
    """Text of a docstring on a Markdown page."""
    return f"```{{eval-rst}}\n{text.strip()}\n```\n"


def page(name):
    """The page of one method."""
    cls, own = methods()[name], classes(name)
    module = sys.modules[cls.__module__]
    said = sections(inspect.getdoc(module) or "")
    guides = [f"[{title}](../{page}.md)" for page, (title, names) in GUIDES.items() if name in names.split()]
    files = recipes(name)
    facts = {
        "works when": cls.works,
        "fails when": cls.fails,
        "needs": ", ".join(f"`{need}`" for need in cls.needs) or "nothing but the batch",
        "recipe": ", ".join(f"`recipes/methods/{file}.yaml`" for file in files),
        "reference": cls.reference,
        "read on": ", ".join(guides),
    }
    parts = [f"# {name}\n", f"{' '.join(idea(cls))}\n", "| | |\n|---|---|"]
    parts += [f"| **{key}** | {value} |" for key, value in facts.items() if value]
    formulas = f".. highlight:: none\n\n{said['']}\n\n.. highlight:: default"  # which are no code
    parts += ["\n## How it works\n", rst(f".. py:module:: {cls.__module__}\n\n{formulas}")]
    costs = " ".join(said[key] for key in ("Needs", "Costs") if key in said)
    if costs:
        parts += ["## What it needs and costs\n", rst(costs)]
    parts += ["## Code\n", f"```python\n{code(name)}\n```\n"]
    if files:
        config = f"--config recipes/colored_digits/base.yaml --config recipes/methods/{files[0]}.yaml"
        parts += ["From YAML, on a recipe that has what the method needs:\n", f"```bash\ndebias fit {config}\n```\n"]
    numbers = {place: rows(place, files) for place in NUMBERS} if files else {}
    if any(numbers.values()) or "Published" in said:
        parts.append("## Numbers\n")
    if "Published" in said:
        parts.append(rst(said["Published"]))
    for place, lines in numbers.items():
        if lines:
            parts += [
                f"Our own, from [{NUMBERS[place]}](../{place}.md), where it says how they were made:\n",
                *lines,
                "",
            ]
    if "Differences from" in said:
        parts += [
            "## Differences from published code\n",
            rst(capital(re.sub(r"^[^:]*: ", "", said["Differences from"]))),
        ]
    notes = DOCS / "notes" / f"{name}.md"
    if notes.exists():
        parts.append(re.sub(r"\]\((?=[\w/.]+\.md)", "](../", notes.read_text()))
    parts += ["## Arguments\n", *(rst(f".. autoclass:: debias.{n}") for n in own)]
    return "\n".join(parts) + "\n"


def table():
    """Methods and monitors with what each does, needs and where it is from."""
    lines = ["| method | what it does | needs | reference |", "|---|---|---|---|"]
    for name, cls in methods().items():
        needs = ", ".join(cls.needs) or "nothing"
        lines.append(f"| [{name}](method/{name}.md) | {idea(cls)[0]} | {needs} | {cls.reference} |")
    for name, does, needs, source in list_monitors():
        lines.append(f"| {{py:class}}`debias.{name}` | {does} | {', '.join(needs) or 'nothing'} | {source} |")
    return "\n".join(lines)


def filled(text):
    """A page with the table of methods where it has the mark."""
    return text.replace("<!-- the table of methods -->", table())


def write():
    """Write the pages that are not there as they should be; Sphinx reads those that have changed."""
    folder = DOCS / "method"
    folder.mkdir(exist_ok=True)
    wanted = {folder / f"{name}.md": page(name) for name in methods()}
    for file in set(folder.glob("*.md")) - set(wanted):
        file.unlink()
    for file, text in wanted.items():
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
