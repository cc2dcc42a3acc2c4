"""The FAQ quotes messages as the package says them."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GAP = "…"


@functools.cache
def messages() -> list[str]:
    """Every string of the source, with a gap for each value that is put into it."""
    found = []
    for file in (ROOT / "debias").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else GAP for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


QUOTED = re.findall(r"^> (.+)$", (ROOT / "docs" / "faq.md").read_text(), re.M)


def is_said(quote: str, said: list[str]) -> bool:
    """Whether one message holds the parts of a quote in this order, with values between them only where it has gaps."""
    pattern = re.compile(rf".*?{GAP}.*?".join(map(re.escape, re.split(rf"`?{GAP}`?", quote))), re.S)
    return any(pattern.search(message) for message in said)


@pytest.mark.parametrize("quote", QUOTED)
def test_quoted_messages_are_in_the_source(quote):
    assert is_said(quote, messages())


def test_there_are_quotes_and_others_are_not_found():
    assert len(QUOTED) >= 30
    assert not is_said("Expected the training step to compute three losses for …, but got …", messages())
    assert is_said("Expected `x` of …, but got", [f"Expected `x` of {GAP} here, but got {GAP}."])
