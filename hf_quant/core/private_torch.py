"""All that this package uses of PyTorch beyond its public interface, in one place.

Every name is looked up when this module is imported, and has a fallback: a version of PyTorch without it costs speed, not the
package. Seen with torch 2.13. `tests/unit/test_hooks.py` has one test for each name, and one without each of them.

=============================================  ===========================================================================
name                                           reason
=============================================  ===========================================================================
``_C._len_torch_dispatch_stack``, ...          the dispatcher takes as long as a small product: `may_skip_dispatcher`
``forward_ad._current_level``                  custom operations drop tangents without an error: `refuse_forward_mode`
``_C._dynamo.guards._empty_strided_cpu``       ``torch.empty`` takes 3 to 6 us longer: `empty_on_cpu`
``cpu._is_avx512_bf16_supported``, ...         the kernel depends on the instructions of the processor: `cpu_has`
``aten._weight_int4pack_mm_for_cpu``, ...      four-bit weights without a compiler: `pack_int4`, `multiply_int4`
``Tensor._make_wrapper_subclass``              a float weight that is dequantized only when it is used: `wrapper_subclass`
``OpOverload._schema``                         which arguments an operation writes to: `written_arguments`
``utils._pytree``                              tensors within nested arguments: `tree_leaves`, `tree_map`, `tree_map_only`
=============================================  ===========================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_quant.errors import KernelError


def private(path: str) -> Any:
    """``torch.<path>``, or None where this version of PyTorch does not have it."""
    value: Any = torch
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


# -- the dispatcher ---------------------------------------------------------------------------------------------------

# Looked up once: walking through modules on each call reads memory that a matrix product has evicted from the caches.
_compiling, _grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled
_dispatch_modes = private("_C._len_torch_dispatch_stack")
_function_transform = private("_C._functorch.peek_interpreter_stack")
_tracing = private("_C._is_tracing")
_forward_mode = vars(forward_ad)
_all_present = None not in (_dispatch_modes, _function_transform, _tracing) and "_current_level" in _forward_mode


def may_skip_dispatcher(x: Tensor) -> bool:
    """Whether a kernel may be called on ``x`` directly, since no transform, tracer or gradient needs to see the operation.

    PyTorch's dispatcher takes as long as a small product. False where PyTorch does not tell.
    """
    return (
        _all_present
        and not _compiling()
        and type(x) is Tensor
        and x.is_cpu
        and not x.is_neg()
        and not (_grad_enabled() and x.requires_grad)
        and not _dispatch_modes()
        and _function_transform() is None
        and not _tracing()
        and _forward_mode.get("_current_level", 0) < 0
    )


def refuse_forward_mode(x: Tensor) -> None:
    """Refuse an ``x`` that carries a tangent of forward-mode differentiation, which PyTorch's custom operations drop."""
    if _forward_mode.get("_current_level", 0) >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise KernelError(
            "forward-mode differentiation (torch.func.jvp) is not supported by quantized layers; gradients are, and "
            "dequantize() gives weights that support both"
        )


# -- memory -----------------------------------------------------------------------------------------------------------

_Empty = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]
_compiled_empty: _Empty | None = private("_C._dynamo.guards._empty_strided_cpu")  # what compiled graphs call


def _public_empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype)


empty_on_cpu: _Empty = _compiled_empty or _public_empty


# -- the processor ----------------------------------------------------------------------------------------------------


def cpu_has(*instructions: str) -> bool:
    """Whether the processor has one of these: ``"avx512_bf16"``, ``"avx512_vnni"``, ``"vnni"``, ``"amx_tile"``.

    False where PyTorch does not tell.
    """
    probes = [private(f"cpu._is_{name}_supported") for name in instructions]
    return any(probe is not None and probe() for probe in probes)


# -- products of packed weights ---------------------------------------------------------------------------------------

pack_int4: Any = private("ops.aten._convert_weight_to_int4pack_for_cpu")
multiply_int4: Any = private("ops.aten._weight_int4pack_mm_for_cpu")

# -- tensor subclasses ------------------------------------------------------------------------------------------------

wrapper_subclass: Callable[..., Tensor] | None = private("Tensor._make_wrapper_subclass")


def written_arguments(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes to; of an unknown one whose name ends in ``_``, the first."""
    schema = getattr(operation, "_schema", None)
    if schema is None:
        return list(args[:1]) if str(operation).split(".")[-2:][0].endswith("_") else []
    named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    aliases = {a.name: a.alias_info for a in schema.arguments}
    return [value for name, value in named.items() if (alias := aliases.get(name)) is not None and alias.is_write]


# -- nested arguments -------------------------------------------------------------------------------------------------


def _public_tree_map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """As PyTorch's, without the containers that other packages have registered."""
    if isinstance(tree, dict):
        return type(tree)((key, _public_tree_map(fn, value)) for key, value in tree.items())
    if isinstance(tree, tuple | list):
        values = [_public_tree_map(fn, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return fn(tree)


_pytree = private("utils._pytree")
tree_map: Callable[[Callable[[Any], Any], Any], Any] = getattr(_pytree, "tree_map", _public_tree_map)


def tree_leaves(tree: Any) -> list[Any]:
    """The values within nested tuples, lists and dicts."""
    if hasattr(_pytree, "tree_leaves"):
        return list(_pytree.tree_leaves(tree))
    leaves: list[Any] = []
    _public_tree_map(leaves.append, tree)
    return leaves


def tree_map_only(kind: type, fn: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` with ``fn`` applied to its values of one type."""
    return tree_map(lambda leaf: fn(leaf) if isinstance(leaf, kind) else leaf, tree)
