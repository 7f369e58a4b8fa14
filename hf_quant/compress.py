"""One model, one scheme: quantize, check what was written, measure it, and only then let it appear."""

from __future__ import annotations

import copy
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from hf_quant.checkpoint import staged, write_json
from hf_quant.digests import weight_files
from hf_quant.errors import HfQuantError
from hf_quant.evaluation.gate import Budget
from hf_quant.evaluation.layers import layer_errors
from hf_quant.evaluation.reference import Progress
from hf_quant.evaluation.yardstick import Base
from hf_quant.hf import HfQuantConfig, load
from hf_quant.hf.loading import sample_logits
from hf_quant.hf.streaming import digest_of, quantize_streaming
from hf_quant.hub.source import copy_notices, describe
from hf_quant.methods import method
from hf_quant.results import Quality

SMALL = 1_000_000_000  # parameters


@dataclass(frozen=True)
class Calibration:
    """Tokens that calibrated methods look at.

    Attributes:
        ids: int64 ``[S, T]``.
        name: Of the text.
        paragraphs: Hashes of the text's paragraphs, so that nobody measures on it.
    """

    ids: Tensor
    name: str
    paragraphs: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For the recipe: never the text itself."""
        return {
            "name": self.name, "sequences": self.ids.shape[0], "context": self.ids.shape[1],
            "sha256": digest_of(self.ids), "paragraphs": self.paragraphs,
        }  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What every scheme of one call shares.

    Attributes:
        model: Folder or Hub id.
        load: For ``from_pretrained``: dtype, device_map, revision.
        shard: Largest file, such as ``"5GB"``.
        overwrite: Whether an existing folder may be replaced.
        say: Told what is worth knowing.
        tokenizer: Saved beside the model; None if it has none.
        budget: What the result may cost.
        measure: Measures a model; None where there is no text.
        calibration: What calibrated methods look at.
        progress: Wraps the list of blocks, for a progress bar.
    """

    model: str
    load: dict[str, Any]
    shard: str
    overwrite: bool
    say: Callable[[str], None]
    tokenizer: Any = None
    budget: Budget = field(default_factory=Budget)
    measure: Callable[[Any], Quality] | None = None
    calibration: Calibration | None = None
    progress: Progress = iter

    def quantized(self, config: HfQuantConfig) -> Any:
        """The model with ``config`` applied, in memory."""
        return load(self.model, quantization_config=copy.deepcopy(config), **self.load).eval()  # loading fills it in


class _GateMissedError(Exception):
    """Unwinds the stage of the folder that a model may not have."""


def compress(job: Job, config: HfQuantConfig, out: Path) -> dict[str, Any]:
    """Quantize with one scheme and check what was written; it appears as ``out``, or as ``out-failed`` past the gate."""
    asked = {
        "overrides": dict(config.overrides), "modules_to_not_convert": list(config.modules_to_not_convert),
        "quantize_lm_head": config.quantize_lm_head, "quantize_embeddings": config.quantize_embeddings,
    }  # fmt: skip
    row: dict[str, Any] = {}
    with suppress(_GateMissedError), staged(out, overwrite=job.overwrite) as stage:
        start = time.perf_counter()
        calibrated = method(config.method).calibrated
        made, blocks = _streamed(job, config, out, stage) if calibrated else (job.quantized(config), [])
        seconds = time.perf_counter() - start
        plan = made.hf_quantizer.plan
        job.say(f"{config.scheme}: {plan.summary()}")
        if plan.params < SMALL:
            job.say(f"{plan.params / 1e6:.0f}M parameters: small models lose more; look at the numbers")
        if not calibrated:
            made.save_pretrained(stage, max_shard_size=job.shard)
        if job.tokenizer is not None:
            job.tokenizer.save_pretrained(stage)
        write_json(stage / "recipe.json", _recipe(job, config, asked, made, blocks) | {"source": _source(job, stage)})
        again = load(str(stage), dtype=made.dtype)
        if not torch.equal(sample_logits(again), sample_logits(made)):
            raise HfQuantError(f"{config.scheme}: the saved model computes something else than the one in memory")
        del again
        row |= {
            "scheme": config.scheme, "folder": out.name, "format": plan.format, "share_quantized": plan.share,
            "bits_per_weight": plan.bits_per_weight, "bytes": sum(f.stat().st_size for f in stage.glob("*.safetensors")),
            "base_bytes": plan.bytes_float, "parameters": plan.params, "seconds": seconds,
            "layers_by_scheme": dict(Counter(map(str, plan.schemes.values()))), "date": str(date.today()),
            "files": weight_files(stage),
        }  # fmt: skip
        row |= _measured(job, made)
        if row.get("gate", {}).get("misses"):
            row["folder"] = f"{out.name}-failed"
        write_json(stage / "results.json", row)
        if row["folder"] != out.name:
            with staged(out.with_name(row["folder"]), overwrite=True) as aside:
                for file in stage.iterdir():
                    file.rename(aside / file.name)
            raise _GateMissedError
    shutil.rmtree(out.with_name(f"{out.name}.work"), ignore_errors=True)
    return row


def _streamed(job: Job, config: HfQuantConfig, out: Path, stage: Path) -> tuple[Any, list[dict[str, Any]]]:
    """Calibrate block by block into ``stage``; what is finished stays in ``out.work`` until all is done."""
    if job.calibration is None:
        raise HfQuantError(f"{config.method} needs text to calibrate on: name one with --calibration")
    work = out.with_name(f"{out.name}.work")
    _, blocks = quantize_streaming(
        Base(job.model, job.load.get("revision")).checkpoint().folder, config, job.calibration.ids, work, stage,
        say=job.say, progress=job.progress,
    )  # fmt: skip
    device = {name: job.load[name] for name in ("device_map", "dtype") if name in job.load}
    return load(str(stage), **device).eval(), blocks


def _measured(job: Job, model: Any) -> dict[str, Any]:
    """Quality and gate where there is a text to measure on, and how far each layer is from the base's."""
    errors = layer_errors(model, Base(job.model, job.load.get("revision")).checkpoint())
    made: dict[str, Any] = {"layers": [each.to_dict() for each in errors]}
    if job.measure is not None:
        quality = job.measure(model)
        made["quality"] = quality.to_dict()
        if job.budget:
            made["gate"] = job.budget.verdict(quality)
    return made


def _recipe(
    job: Job, config: HfQuantConfig, asked: dict[str, Any], model: Any, blocks: list[dict[str, Any]]
) -> dict[str, Any]:
    """How the model was made."""
    plan = model.hf_quantizer.plan
    return {
        "scheme": config.scheme, "method": config.method, "format": plan.format, "format_reason": plan.format_reason,
        "asked": asked, "dtype": str(model.dtype).removeprefix("torch."),
        "share_quantized": plan.share, "bits_per_weight": plan.bits_per_weight,
        "schemes": {name: str(scheme) for name, scheme in plan.schemes.items()},
        "left": plan.left, "regrouped": plan.regrouped,
        "calibration": job.calibration.to_dict() if blocks and job.calibration else None, "blocks": blocks,
        "versions": {name: version(name) for name in ("hf-quant", "torch", "transformers", "safetensors")},
    }  # fmt: skip


def _source(job: Job, stage: Path) -> dict[str, Any]:
    """What the base is, by its name and never its path, and under which licence; its notices are copied to ``stage``."""
    commit = Base(job.model, job.load.get("revision")).commit()
    try:
        copy_notices(job.model, commit, stage)
        return describe(job.model, commit)
    except HfQuantError as error:  # the model itself may come from the cache, with no Hub in reach
        job.say(f"{job.model}: its card cannot be read now, so push will ask again: {error}")
        return {"model": job.model, "revision": commit}


def tokenizer_of(model: str, revision: str | None, say: Callable[[str], None]) -> Any:
    """The model's tokenizer, or None."""
    try:
        return AutoTokenizer.from_pretrained(model, revision=revision)
    except (OSError, ValueError, KeyError):
        say(f"{model}: no tokenizer found, none is saved")
        return None
