"""How long a newcomer reads from the landing page to a first result: ``python docs/reading_time.py``."""

import re
from pathlib import Path

DOCS = Path(__file__).parent
PROSE, CODE = 230, 100  # words a minute: code is read more slowly
FENCE = re.compile(r"^(```+|:::+)(?:\{([\w-]+)\})?.*?\n(.*?)^\1 *$", re.M | re.S)


def words(text):
    """The words of prose and of code that a page of Markdown shows."""
    code = 0

    def fence(found):
        nonlocal code
        _, directive, body = found.groups()
        if directive is None:
            code += len(body.split())
        return ""  # figures and tables of contents

    text = re.sub(r"^:{3,}.*$", "", text, flags=re.M)  # containers: what they hold is shown
    text = FENCE.sub(fence, text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"[`*|]|(?<=\|)-+|^#+|^- ", " ", text, flags=re.M)
    return len(re.findall(r"\w\S*", text)), code


def minutes(text):
    """The time to read a page."""
    prose, code = words(text)
    return prose / PROSE + code / CODE


def page(name):
    """The Markdown of a page."""
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def paths():
    """What a newcomer reads: the landing page, then the pages that one paragraph of a door names, by door."""
    doors = re.findall(r"^::::\{container\} door\n\*\*(.+?)\*\*\n(.*?)^::::$", page("index"), re.M | re.S)
    for title, text in doors:
        for paragraph in text.split("\n\n"):
            if linked := re.findall(r"\]\((\w+)\.md\)", paragraph):
                yield title, ["index", *linked]


if __name__ == "__main__":
    row = "{:<24}{:<20}{:>8}{:>8}{:>9}".format
    print(row("door", "page", "prose", "code", "minutes"))
    for title, names in paths():
        total = 0.0
        for name in names:
            total += minutes(page(name))
            print(row(title, name, *words(page(name)), f"{minutes(page(name)):.1f}"))
        print(row(title, "together", "", "", f"{total:.1f}"), end="\n\n")
