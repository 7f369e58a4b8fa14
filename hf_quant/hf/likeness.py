"""Whether two models compute the same with the same weights, as far as their configs and the shapes of their parameters tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hf_quant.disk.strict_json import shown
from hf_quant.errors import PlanError

BESIDE = re.compile(  # fields of a config that decide nothing of what is computed, or that the shapes of parameters tell better
    "_.*|architectures|auto_map|transformers_version|dtype|torch_dtype|quantization_config|compression_config|"
    "tie_word_embeddings|max_position_embeddings|use_cache|pretraining_tp|gradient_checkpointing|tokenizer_class|"
    "(bos|eos|pad|sep|cls|mask|unk|decoder_start)_token_id|id2label|label2id|num_labels|problem_type|task_specific_params|"
    "output_.*|return_dict.*|chunk_size_feed_forward|.*(attn|experts)_implementation|"
    "init.*|.*_init(ializer)?_.*|.*dropout.*|.*_pdrop|router_.*coef|.*jitter.*"
)


def refuse_other(what: str, model: Any, name: str, expected: Any) -> None:
    """Refuse a model that computes something else than another one would with the same weights.

    Args:
        what: The model, as messages begin with it.
        model: On the meta device, in floating point.
        name: Of the other one.
        expected: The other one, likewise.

    Raises:
        PlanError: Names the field of config.json or the parameter that differs.
    """
    difference = (
        _of_fields(model.config.to_dict(), expected.config.to_dict(), name)
        or _of_classes(type(model).__name__, type(expected).__name__, name)
        or _of_shapes(_shapes(model), _shapes(expected), name)
    )
    if difference is not None:
        raise PlanError(f"{what}: {difference}: the two must be the same model but for their weights")


def _of_fields(fields: Mapping[str, Any], others: Mapping[str, Any], name: str, where: str = "") -> str | None:
    """The first field of both configs that differs, the type of the model before all others."""
    common = [field for field in fields if field in others and not BESIDE.fullmatch(field)]
    for field in sorted(common, key=lambda field: field != "model_type"):
        value, other = _plain(fields[field]), _plain(others[field])
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            if (inner := _of_fields(value, other, name, f"{where}{field}.")) is not None:
                return inner
        elif value != other:
            return f"{where}{field} is {shown(value)}, that of {name} is {shown(other)}"
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _of_classes(kind: str, other: str, name: str) -> str | None:
    return None if kind == other else f"is a {kind}, and {name} is a {other}"


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Of all parameters, those that are tied under each of their names."""
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}


def _of_shapes(shapes: Mapping[str, tuple[int, ...]], others: Mapping[str, tuple[int, ...]], name: str) -> str | None:
    for parameter in [*shapes, *others]:
        shape, other = shapes.get(parameter), others.get(parameter)
        if shape != other:
            return f"{parameter} is {size_of(shape)}, and of {name} it is {size_of(other)}"
    return None


def size_of(shape: Sequence[int] | None) -> str:
    """A shape as messages say it: ``64x128``."""
    return "missing" if shape is None else "x".join(map(str, shape))
