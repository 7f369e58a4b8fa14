"""What modules use of the private protocols of transformers; see `hf_quant.hf._hooks`, which stands above."""

from __future__ import annotations

from typing import Any

from torch import Tensor

AWAITED = "awaited"
FORWARD, HOOK = "_old_forward", "_hf_hook"  # accelerate sets them in this order, and moves weights in between
GATE = "_apply_gate"  # the method of transformers' experts layers that computes their activation


def mark_initialized(thing: Any, mark: bool | str = True) -> None:
    """Keep transformers from filling a module or a parameter with random numbers: ``_is_hf_initialized``.

    Without it, ``normal_()`` is called on integer weights that a checkpoint lacks.

    Args:
        thing: Module or parameter.
        mark: `AWAITED` for a parameter that a checkpoint must bring; the loader replaces it by True.
    """
    thing._is_hf_initialized = mark


def is_initialized(parameter: Any) -> bool:
    """Whether the loader has filled a parameter."""
    return getattr(parameter, "_is_hf_initialized", None) is True


def moves_weights(module: Any) -> bool:
    """Whether accelerate takes the weights of a module out of memory after every call: ``AlignDevicesHook.offload``."""
    hook = getattr(module, HOOK, None)
    return any(getattr(one, "offload", None) is True for one in getattr(hook, "hooks", (hook,)))


def has_gate_function(module: Any) -> bool:
    """Whether an experts layer follows transformers' protocol."""
    return hasattr(module, GATE)


def apply_gate(module: Any, y: Tensor) -> Tensor:
    """The activation of an experts layer, on the output of its stack of gates and ups."""
    activated: Tensor = getattr(module, GATE)(y)
    return activated
