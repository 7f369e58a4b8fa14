"""What a training begins from: refused from configs and headers alone, before any text is read and anything is loaded."""

from __future__ import annotations

from pathlib import Path

from hf_quant.checkpoint.contents import refuse_training
from hf_quant.data.calibration import Source
from hf_quant.errors import HfQuantError
from hf_quant.evaluation.yardstick import Base
from hf_quant.hf import HfQuantConfig, plan_of
from hf_quant.hf.auto import hub_options
from hf_quant.hf.likeness import refuse_other
from hf_quant.hf.loading import stored_in, stored_plan
from hf_quant.hf.trainable import refuse_other_schemes, refuse_stacks


def trainable(config: HfQuantConfig, method: str, calibration: Source | None = None) -> HfQuantConfig:
    """The settings of the trainable form of a model.

    Args:
        config: Of the result.
        method: Whose codes training begins from.
        calibration: What that method looks at, if it looks at something.
    """
    return HfQuantConfig(
        config.scheme, method=method, overrides=config.overrides, format=config.format, training=True,
        modules_to_not_convert=config.modules_to_not_convert, quantize_lm_head=config.quantize_lm_head,
        quantize_embeddings=config.quantize_embeddings, calibration=calibration,
    )  # fmt: skip


def refuse_beginning(base: Base, config: HfQuantConfig, method: str, start: Base | None) -> None:
    """Refuse what a training cannot begin from.

    Args:
        base: The model that is trained.
        config: Of the result.
        method: Whose codes training begins from.
        start: Checkpoint that it begins from in their place.

    Raises:
        PlanError: The model cannot be quantized or trained like that, or the checkpoint is another model, or quantized in another
            way; names the field, layer or tensor.
        HfQuantError: The checkpoint is not quantized, or damaged.
    """
    requested = trainable(config, method)
    model, plan = plan_of(base.model, requested, **hub_options(vars(base)))
    if start is not None or requested.calibrated:
        refuse_stacks(model, plan.schemes)
    if start is None:
        return
    stored = stored_in(start.config(), Path(start.model))
    if stored is None:
        raise HfQuantError(
            f"--start {start.model}: is not quantized; training that begins from MODEL itself needs no --start"
        )
    refuse_training(start.model, stored)
    other = start.skeleton()
    refuse_other(f"--start {start.model}", other, base.model, model)
    refuse_other_schemes(plan.schemes, stored_plan(other, start.checkpoint(), stored).schemes)
