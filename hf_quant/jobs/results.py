"""How results show themselves: a title and a table, as text in a terminal and as HTML in a notebook."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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

    def grid(self) -> Grid:
        """The table, not laid out yet."""
        return Grid(self.head(), list(self.rows()))

    def table(self) -> str:
        """The table as text."""
        return str(self.grid())

    def __repr__(self) -> str:
        lines = (printable(line, lines=False) for line in (self.title(), *self.footnotes()))
        return "\n".join([next(lines), self.table(), *lines])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{_html(cell)}</th>" for cell in self.head())
        body = "".join("<tr>" + "".join(f"<td>{_html(cell)}</td>" for cell in row) + "</tr>" for row in self.rows())
        notes = "".join(f"<p>{_html(note)}</p>" for note in self.footnotes())
        return f"<p>{_html(self.title())}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"


class Grid(NamedTuple):
    """A table before it is laid out; ``str`` aligns its columns, numbers to the right."""

    head: Row
    rows: Sequence[Row]

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers, or nothing; the first one holds names."""
        return column > 0 and all(re.match(r"[-+±]?\d|-?$|within", row[column]) for row in self.rows)

    def __str__(self) -> str:
        lines = [[printable(cell, lines=False) for cell in row] for row in (self.head, *self.rows)][
            0 if any(self.head) else 1 :
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        right = [self.is_numeric(i) for i in range(len(self.head))]
        columns = list(zip(widths, right, strict=True))
        return "\n".join(
            "  ".join(c.rjust(w) if r else c.ljust(w) for c, (w, r) in zip(line, columns, strict=True)).rstrip()
            for line in lines
        )


def table(head: Row, rows: Iterable[Row]) -> str:
    """Columns aligned; a cell is one printable line."""
    return str(Grid(head, list(rows)))


def interval(estimate: Estimate) -> str:
    """Both ends of the interval of a measured value; ``-`` where it has none."""
    return "-" if estimate.low is None else f"{estimate.low:.5f}..{estimate.high:.5f}"


def fields(record: Mapping[str, Any]) -> Iterator[Row]:
    """Rows of a table with one line for each field of a record, in words; what is empty is left out."""
    for name, value in record.items():
        if value not in (None, "", [], (), {}):
            yield name.replace("_", " "), in_words(name, value)


def in_words(name: str, value: Any) -> str:
    """A value as people write it; the name of the field says what a number means."""
    match value:
        case bool():
            return "yes" if value else "no"
        case int() if "bytes" in name:
            return size(value)
        case float() if "share" in name:
            return f"{value:.1%}"
        case int():
            return f"{value:,}"
        case Mapping():
            return ", ".join(f"{key}: {in_words(name, number)}" for key, number in value.items())
        case list() | tuple():
            return ", ".join(in_words(name, item) for item in value)
        case None:
            return "none"
    return str(value)


def size(count: float) -> str:
    """Bytes, as people write them: ``"18.2 MB"``."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}" if count < 100 * unit else f"{count / unit:,.0f} {name}"
    return f"{count:.0f} bytes"


def _html(text: str) -> str:
    return html.escape(printable(text))
