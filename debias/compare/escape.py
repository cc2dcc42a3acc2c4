"""Names and messages as another format reads them. Whatever they hold, they stay text: no markup, link or formula.

What recipes, methods, groups, settings and folders are called may come from somebody else. Each format has one function
here, and whatever is written in that format goes through it.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

__all__ = ["csv_cell", "fenced", "markdown", "markdown_code", "plain"]

_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control and format characters, line separators
# Links and images need `](`, `][` or `]:`; brackets around numbers stay as they are.
_MARKUP = re.compile(r"[\\`*<>|~$]|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])|(?<=:)/(?=/)|(?<=www)\.")
_LINE_START = re.compile(r"^(?:[-+](?=\s)|#+(?=\s|$)|[-=](?=[-=]+$)|\d+(?=[.)](?:\s|$)))")  # a list, a heading, a rule
_FORMULA = re.compile(r"^\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")  # also the wide forms, which spreadsheets take for them


def plain(text: str, *, lines: bool = False) -> str:
    r"""Text for a terminal: what a terminal would obey, or cannot show, is written as its code.

    Args:
        text: of any origin.
        lines: keep line breaks; else each becomes a space.

    Example:
        >>> from debias.compare.escape import plain
        >>> plain("red\x1b[31m")
        'red\\x1b[31m'
    """
    text = text if lines else " ".join(text.splitlines())
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in _HIDDEN else c.encode("unicode_escape").decode() for c in text
    )


def markdown(text: str) -> str:
    r"""Text within a line, a cell or a heading of Markdown.

    Example:
        >>> from debias.compare.escape import markdown
        >>> markdown("group_dro [x](y) <b>"), markdown("# 1")
        ('group_dro [x\\](y) &lt;b&gt;', '\\# 1')
    """
    found = _MARKUP.sub(lambda m: {"<": "&lt;", ">": "&gt;"}.get(m[0], "\\" + m[0]), plain(text).strip())
    return _LINE_START.sub(lambda m: "\\" + m[0] if not m[0].isdigit() else m[0] + "\\", found.replace("&#", "&amp;#"))


def markdown_code(text: str) -> str:
    """Text as code within a line of Markdown.

    Example:
        >>> from debias.compare.escape import markdown_code
        >>> markdown_code("waterbirds"), markdown_code("a`b")
        ('`waterbirds`', '`` a`b ``')
    """
    text = plain(text).replace("|", "\u00a6")  # a cell would end there
    ticks = max(map(len, re.findall("`+", text)), default=0)
    return f"{'`' * (ticks + 1)} {text} {'`' * (ticks + 1)}" if ticks else f"`{text}`"


def fenced(command: str, language: str = "bash") -> str:
    r"""A block of code in Markdown, whose fence is longer than any in it.

    Example:
        >>> from debias.compare.escape import fenced
        >>> fenced("ls")
        '```bash\nls\n```'
    """
    command = plain(command, lines=True)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", command)), 0)
    return f"{fence}{language}\n{command}\n{fence}"


def csv_cell(value: Any) -> Any:
    """A value for a CSV file: text that a spreadsheet would compute begins with an apostrophe; numbers stay.

    Example:
        >>> from debias.compare.escape import csv_cell
        >>> csv_cell("=1+1"), csv_cell(-0.5), csv_cell("erm")
        ("'=1+1", -0.5, 'erm')
    """
    if not isinstance(value, str):
        return value
    text = plain(value)
    return f"'{text}" if _FORMULA.match(text) else text
