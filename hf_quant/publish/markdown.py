"""Escapes text for Markdown and the shell, and formats numbers for people."""

from __future__ import annotations

import re
import shlex


def shell_word(text: object) -> str:
    """One shell word, on one line."""
    word = str(text)
    if word.isprintable():
        return shlex.quote(word)
    escaped = "".join(
        c if c.isprintable() and c not in "\\'" else "".join(f"\\x{b:02x}" for b in c.encode()) for c in word
    )
    return f"$'{escaped}'"


def md(text: object) -> str:
    """Text with all Markdown and HTML escaped."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", line(text))


def code(text: object) -> str:
    """Text as a code span, also inside a table."""
    return f"`{line(text).replace('`', chr(39)).replace('|', '/')}`"


def line(text: object) -> str:
    """Text on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else " " for c in str(text)).split())


def plain(text: object) -> str:
    """A Hub id or path, without characters that end a link or a string."""
    return re.sub(r"[^\w./-]", "", str(text), flags=re.ASCII)


def size(count: float) -> str:
    """Bytes in a suitable unit."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{count / 1e3:.1f} kB"


def percent(share: float, form: str = "%.1f") -> str:
    """A share as a percentage."""
    return f"{form % (100 * share)} %"


def number(value: float) -> str:
    """A number with four digits."""
    return f"{value:.4g}"
