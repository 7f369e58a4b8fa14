"""How results show themselves: a title and a table, as text in a terminal and as HTML in a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hf_quant.errors import printable

if TYPE_CHECKING:
    from hf_quant.evaluation.results import Estimate

Row = Sequence[str]


class Result:
    """Base of what the public functions return.

    ``repr`` is a title and a table in words; `to_dict` is the whole record, as the command prints it with ``--json``.
    """

    def to_dict(self) -> dict[str, Any]:
        """The record that the command of the same name prints with ``--json``."""
        raise NotImplementedError

    def title(self) -> str:
        """One line on what this is."""
        raise NotImplementedError

    def head(self) -> Row:
        """Titles of the columns."""
        return ("field", "value")

    def rows(self) -> Iterator[Row]:
        """Cells of the table."""
        raise NotImplementedError

    def footnotes(self) -> Iterable[str]:
        """Lines below the table."""
        return ()

    def table(self) -> str:
        """The table as text."""
        return table(self.head(), self.rows())

    def __repr__(self) -> str:
        lines = (printable(line, lines=False) for line in (self.title(), *self.footnotes()))
        return "\n".join([next(lines), self.table(), *lines])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{_html(cell)}</th>" for cell in self.head())
        body = "".join("<tr>" + "".join(f"<td>{_html(cell)}</td>" for cell in row) + "</tr>" for row in self.rows())
        notes = "".join(f"<p>{_html(note)}</p>" for note in self.footnotes())
        return f"<p>{_html(self.title())}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"


def table(head: Row, rows: Iterable[Row]) -> str:
    """Columns aligned: the first to the left, numbers to the right; a cell is one printable line."""
    lines = [[printable(cell, lines=False) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def interval(estimate: Estimate) -> str:
    """Both ends of the interval of a measured value; ``-`` where it has none."""
    return "-" if estimate.low is None else f"{estimate.low:.5f}..{estimate.high:.5f}"


def fields(record: dict[str, Any]) -> Iterator[Row]:
    """Rows of a table with one line for each field of a record."""
    return ((name, str(value)) for name, value in record.items())


def _html(text: str) -> str:
    return html.escape(printable(text))
