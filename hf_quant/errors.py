"""Every error this package raises on purpose."""


class HfQuantError(Exception):
    """Base class: catch this to catch them all."""


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


class PushError(HfQuantError):
    """A folder may not be published, or the upload did not end; the message says why and how to go on."""


class GateError(PushError):
    """A model that missed its quality gate, or was never held against one, may not be published."""
