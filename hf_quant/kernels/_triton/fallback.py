"""What happens where a compiled kernel cannot be launched: a slower product with the same result, and one warning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

from torch import Tensor

logger = logging.getLogger(__name__)

_failed: set[tuple[Hashable, ...]] = set()  # configurations that were refused once are not compiled again


def launched(configuration: tuple[Hashable, ...], kernel: Callable[[], Tensor], plain: Callable[[], Tensor]) -> Tensor:
    """The result of ``kernel``, or of ``plain`` where the GPU or its compiler refuses to launch it.

    Only refusals before a launch are caught: too much shared memory, registers or threads, and errors of the compiler. An
    error of a running kernel leaves the GPU's state undefined, and is raised.

    Args:
        configuration: What decides whether the kernel can be launched, such as the scheme and the tile; named in the warning.
        kernel: Launches.
        plain: Computes the same in another way.
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    if configuration in _failed:
        return plain()
    try:
        return kernel()
    except (CompilationError, OutOfResources, PTXASError) as error:
        _failed.add(configuration)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning(
            f"{', '.join(map(str, configuration))}: the Triton kernel cannot be launched here ({reason}); "
            "the dequantized weight is multiplied in its place, which is slower"
        )
        return plain()
