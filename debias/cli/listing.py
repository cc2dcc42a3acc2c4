"""``debias methods``: found by looking at the public names, so that a new method lists itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib.util import find_spec

__all__ = ["methods", "print_methods", "print_table"]


def methods() -> dict[str, type]:
    """Collect the public callbacks of ``debias.methods``, by name.

    Example:
        >>> "GroupDRO" in methods()
        True
    """
    import debias.methods
    from debias.step.watcher import StepWatcher

    found = vars(debias.methods).items()
    return {name: value for name, value in found if inspect.isclass(value) and issubclass(value, StepWatcher)}


def print_methods() -> None:
    """Print one row a method: its name, what it does, what it needs from a batch, where it comes from."""
    rows = []
    for name, method in methods().items():
        summary = (inspect.getdoc(method) or "").partition("\n\n")[0].replace("\n", " ")
        rows.append((name, summary, ", ".join(getattr(method, "needs", ())), getattr(method, "reference", "")))
    print_table(("method", "what it does", "needs", "reference"), rows)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with rich where it is installed, else as aligned text."""
    if find_spec("rich"):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(show_lines=True)
        for i, column in enumerate(header):
            table.add_column(column, no_wrap=i == 0)  # what is typed stays whole, however narrow the terminal
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    for line in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
