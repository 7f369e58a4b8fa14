"""The only differences between the versions of transformers that this package supports (5.10.1 and newer)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def updated_conversions(update: Callable[..., list[Any]], conversions: list[Any], model: Any) -> list[Any]:
    """Call the base class's ``update_weight_conversions``: it takes the model since 5.21."""
    return update(conversions) if model is None else update(conversions, model)


def keep_for_saving(model: Any, converters: list[Any] | None) -> None:
    """Leave on the model the conversions that saving has to undo.

    ``save_pretrained`` reverses ``model._weight_conversions`` (private, 5.8 to now). It holds what loading used: a
    load-only converter of ours would rename every weight on saving, and the converters of scales and zero points are
    missing after quantizing on load, since the float checkpoint had none. So: the renamings that were used, and all
    the model's own converters.
    """
    used = getattr(model, "_weight_conversions", None) or []
    renamings = [c for c in used if not hasattr(c, "operations")]
    model._weight_conversions = renamings + [c for c in converters or [] if hasattr(c, "operations")]
