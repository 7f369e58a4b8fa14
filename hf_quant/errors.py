"""All errors that this package raises on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 2000  # characters of a message


def printable(text: str, longest: int = LONGEST, *, lines: bool = True) -> str:
    """Text from an untrusted source, safe to show: unprintable characters are escaped, so that it can neither control a terminal nor
    hide or imitate other text.

    Args:
        text: Any text, also with lone surrogates, as in the name of a file that is not valid UTF-8.
        longest: Characters beyond that number are cut out of the middle.
        lines: Whether to keep line breaks, which a name does not have.
    """
    breaks = "\n" if lines else ""
    short = _cut(text, longest)
    return _cut("".join(c if c.isprintable() or c in breaks else ascii(c)[1:-1] for c in short), longest)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest * 2 // 3]} ... {text[-(longest // 4) :]}"


def suggestion(word: str, names: Iterable[str]) -> str:
    """The end of a message about a name that is not known: ``"; did you mean gptq?"``, or nothing if no name is like it."""
    known = {name.lower().replace("_", "-"): name for name in names}
    close = difflib.get_close_matches(word[:LONGEST].lower().replace("_", "-"), known, 1)
    return f"; did you mean {known[close[0]]}?" if close else ""


class HfQuantError(Exception):
    """Base class of all errors here. The message is short and printable, whatever names are in it."""

    def __str__(self) -> str:
        return printable(super().__str__())


class SchemeError(HfQuantError, ValueError):
    """A scheme is impossible, or does not fit the tensor it is applied to."""


class OptionError(HfQuantError, ValueError):
    """Options contradict each other, or one has a value that it cannot have."""


class PlanError(HfQuantError, ValueError):
    """A plan names modules that do not exist, or asks for something that a module does not allow."""


class UnchainedError(HfQuantError):
    """The blocks of a model do not run one after the other, each once; calibration then takes the model as a whole."""


class CheckpointError(HfQuantError, ValueError):
    """A checkpoint is damaged, hostile or contradicts its config; the message names file and tensor or field."""


class DiskError(HfQuantError, OSError):
    """A file cannot be written or read: the disk is full, or fails; the message names the file."""


class FormatError(HfQuantError, ValueError):
    """A checkpoint cannot be read as, or written in, the named format."""


class BackendError(HfQuantError, RuntimeError):
    """No kernel can run this layer; the message lists each one's reason."""


class KernelError(HfQuantError, RuntimeError):
    """A kernel was given an invalid tensor; the message names the operation and the tensor."""


class PushError(HfQuantError):
    """A folder may not be published, or the upload is incomplete; the message says why and how to continue."""


class GateError(PushError):
    """A model that failed its quality gate, or was never measured, may not be published."""
