"""Results on a terminal, as wide as that is: a table that would be wider is turned on its side."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_quant.errors import printable
from hf_quant.jobs.results import Grid

if TYPE_CHECKING:
    from rich.console import Console

GAP = 2  # columns between two cells
TURNED = 6  # rows at most of a table that is turned: more would be too wide again
COLORS = {"chosen": "green", "out": "red", "missed": "red", "sound": "green"}
Part = str | Grid


def show(parts: Sequence[Part]) -> None:
    """Print sentences and tables to stdout: with colors and folded lines in a terminal, as plain text anywhere else."""
    if not sys.stdout.isatty():
        print("\n".join(printable(str(part), sys.maxsize) for part in parts))  # noqa: T201
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, file=sys.stdout)
    for part in parts:
        console.print(_table(fitted(part, console)) if isinstance(part, Grid) else Text(printable(part, sys.maxsize)))


def fitted(grid: Grid, console: Console) -> Grid:
    """The table, with titles in two lines, or turned on its side where it would be too wide."""
    if _width(grid) <= console.width:
        return grid
    folded = Grid(tuple(re.sub(r"[ /](?=\w)", _break, title) for title in grid.head), grid.rows)
    if _width(folded) <= console.width or len(grid.head) < 3 or len(grid.rows) > TURNED:
        return folded
    columns = list(zip(grid.head, *grid.rows, strict=True))
    return Grid(("", *columns[0][1:]), columns[1:])


def _break(match: re.Match[str]) -> str:
    return "/\n" if match[0] == "/" else "\n"


def _width(grid: Grid) -> int:
    lines = [[max(map(len, cell.split("\n"))) for cell in row] for row in (grid.head, *grid.rows)]
    return sum(max(column) + GAP for column in zip(*lines, strict=True)) - GAP


def _table(grid: Grid) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold", show_header=any(grid.head))
    for i, title in enumerate(grid.head):
        right = grid.is_numeric(i) or (i > 0 and any(grid.head) and not grid.head[0])  # turned: words among numbers
        table.add_column(Text(printable(title)), justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in grid.rows:
        table.add_row(*(Text(printable(cell, lines=False), COLORS.get(cell, "")) for cell in row))
    return table
