"""How a table is printed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

__all__ = ["print_table"]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with rich where it is installed, else as aligned text."""
    if find_spec("rich"):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(show_lines=True)
        for i, column in enumerate(header):
            table.add_column(column, no_wrap=i == 0, overflow="fold")  # what is typed stays, however narrow it gets
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    for line in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
