"""Every error this package raises on purpose."""

LONGEST = 2000  # characters of a message


def printable(text: str, longest: int = LONGEST, *, lines: bool = True) -> str:
    """A stranger's text, safe to show: whatever is not printable becomes an escape, so that it can neither drive a terminal
    nor hide nor pass for other text.

    Args:
        text: Anything, also with lone surrogates, as in the name of a file that is not valid UTF-8.
        longest: More characters than that are cut out of the middle.
        lines: Whether ends of lines stay what they are; a name has none.
    """
    kept = "\n" if lines else ""
    short = _cut(text, longest)
    return _cut("".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in short), longest)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest * 2 // 3]} ... {text[-(longest // 4) :]}"


class HfQuantError(Exception):
    """Base class: catch this to catch them all. The message is short and printable, whatever names are in it."""

    def __str__(self) -> str:
        return printable(super().__str__())


class SchemeError(HfQuantError, ValueError):
    """A scheme is impossible, or does not fit the tensor it is applied to."""


class PlanError(HfQuantError, ValueError):
    """A plan names modules that do not exist, or asks for what cannot be done to them."""


class CheckpointError(HfQuantError, ValueError):
    """A checkpoint is damaged, hostile or contradicts its config; the message names file and tensor or field."""


class DiskError(HfQuantError, OSError):
    """A file cannot be written or read: the disk is full, or fails; the message names the file."""


class FormatError(HfQuantError, ValueError):
    """A checkpoint cannot be read as, or written in, the named format."""


class BackendError(HfQuantError, RuntimeError):
    """No kernel can run this layer; the message lists each one's reason."""


class KernelError(HfQuantError, RuntimeError):
    """A kernel was given a tensor it cannot take; the message names the operation and the tensor."""


class PushError(HfQuantError):
    """A folder may not be published, or the upload did not end; the message says why and how to go on."""


class GateError(PushError):
    """A model that missed its quality gate, or was never held against one, may not be published."""
