"""One model, one scheme: quantize, check what was written, measure it, and only then let it appear."""

from __future__ import annotations

import gc
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from hf_quant.data.batches import Inputs
from hf_quant.data.calibration import Calibration
from hf_quant.disk.atomic import blaming, need_space, write_json
from hf_quant.disk.digests import measured_files
from hf_quant.disk.folders import discard
from hf_quant.disk.journal import is_journal, recorded
from hf_quant.errors import HfQuantError
from hf_quant.evaluation.gate import Budget
from hf_quant.evaluation.layers import layer_errors
from hf_quant.evaluation.reference import Progress
from hf_quant.evaluation.results import Quality
from hf_quant.evaluation.yardstick import Base
from hf_quant.hf import HfQuantConfig, load
from hf_quant.hf.auto import hub_options, refuse_other_inputs
from hf_quant.hf.calibrate_shards import Settings, quantize_streaming
from hf_quant.hf.loading import refuse_quantized, sample_logits, skeleton
from hf_quant.hf.plan import Plan
from hf_quant.hf.shards import keep, unclaimed
from hf_quant.jobs.companions import PATTERNS, copy_companions
from hf_quant.jobs.outputs import RECIPE, check_name, check_places, claimed, failed_folder, output, record, work_folder
from hf_quant.jobs.progress import Stage, unshown
from hf_quant.jobs.tune import Tuned, Tuning, tune_checkpoint
from hf_quant.publish.source import copy_notices, describe
from hf_quant.solve.ranks import ALONE, Ranks

SMALL = 1_000_000_000  # parameters


@dataclass(frozen=True)
class Job:
    """The settings that all schemes of one call share.

    Attributes:
        model: Folder or Hub id.
        load: Arguments of ``from_pretrained``: dtype, device_map, revision, trust_remote_code.
        shard: Largest size of a file of weights, in bytes.
        overwrite: Whether a folder that hf-quant wrote may be replaced.
        say: Receives messages.
        tokenizer: Saved with the model; None if it has none.
        budget: Limits of quality loss.
        measure: Measures a model; None without a text.
        calibration: Data for calibrated methods.
        progress: Wraps the list of blocks, for a progress bar.
        max_memory: Bytes that hidden states may take in memory; None for a default.
        ranks: The processes that share the work; the first one writes.
        inputs: Files and folders that are read besides the model; an output must not overwrite them.
        tuning: How the scales are trained end to end after ``learned``; None leaves them as they are.
        held_out: Inputs that the models are measured on, if it is not a text.
        finish: Adds files to the folder before it appears. It receives the folder and the content of results.json so far, and
            returns further content.
        stage: Shows a step that has no items.
    """

    model: str
    load: dict[str, Any]
    shard: int
    overwrite: bool
    say: Callable[[str], None]
    tokenizer: Any = None
    budget: Budget = field(default_factory=Budget)
    measure: Callable[[Any], Quality] | None = None
    calibration: Calibration | None = None
    progress: Progress = iter
    max_memory: int | None = None
    ranks: Ranks = ALONE
    inputs: Sequence[str] = ()
    tuning: Tuning | None = None
    held_out: Sequence[Inputs] = ()
    finish: Callable[[Path, dict[str, Any]], dict[str, Any]] = lambda _folder, _row: {}
    stage: Stage = unshown

    def options(self, *names: str) -> dict[str, Any]:
        """Arguments of `load` that are not None."""
        return {name: self.load[name] for name in names if name in self.load}

    def sample(self) -> Sequence[Inputs]:
        """A batch to check on that what is written computes something, and the same as in memory; empty for a few tokens."""
        calibrated_on = () if self.calibration is None else self.calibration.batches
        return (*calibrated_on, *self.held_out)[:1]

    def base(self) -> Base:
        """The model as a base for measurements."""
        return Base(self.model, **hub_options(self.load))

    def quantized(self, config: HfQuantConfig) -> Any:
        """The model with ``config`` applied, in memory."""
        return load(self.model, quantization_config=config, **self.load).eval()


class _GateMissedError(Exception):
    """Ends the writing of a folder whose model failed the gate."""


def compress(job: Job, config: HfQuantConfig, out: Path) -> dict[str, Any]:
    """Quantize with one scheme and check the result; it appears as ``out``, or as ``out-failed`` if it fails the gate.

    Raises:
        HfQuantError: ``out`` may not be written (see `check_places`), another process is writing it, the disk is full, or
            the model is invalid.
    """
    check_name(out)
    real = Path(os.path.realpath(out))
    work = work_folder(out)
    calibrated = config.calibrated  # decides the way through this module, before there is a plan
    if not job.ranks.first:  # the others only lend a hand
        if calibrated:
            _stream(job, config, work, out)
        return {}
    refuse_quantized(job.model, **hub_options(job.load))
    if not job.sample():
        refuse_other_inputs(job.model, **hub_options(job.load))
    check_places([out], (job.model, *job.inputs), overwrite=job.overwrite, gate=bool(job.budget))
    with claimed(out):
        overwrite = job.overwrite or (calibrated and _published(out, work))
        row = _compress(job, config, out, work, calibrated=calibrated, overwrite=overwrite)
        if calibrated and is_journal(work):  # another one belongs to a calibration that is not at its end
            discard(work, real)
    return row


def _published(out: Path, work: Path) -> bool:
    """Whether ``out`` was made from the blocks in ``work``, by a process that was killed right after that."""
    try:
        blocks = json.loads((out / "recipe.json").read_text(encoding="utf-8"))["blocks"]
        return bool(blocks) and blocks == recorded(work)
    except (OSError, ValueError, KeyError, TypeError, HfQuantError):
        return False


def _compress(
    job: Job, config: HfQuantConfig, out: Path, work: Path, *, calibrated: bool, overwrite: bool
) -> dict[str, Any]:
    asked = {
        "overrides": dict(config.overrides), "modules_to_not_convert": list(config.modules_to_not_convert),
        "quantize_lm_head": config.quantize_lm_head, "quantize_embeddings": config.quantize_embeddings,
    } | ({"epochs": config.epochs} if config.method == "learned" else {})  # fmt: skip
    row: dict[str, Any] = {}
    tuned = None
    inputs, source = (job.model, *job.inputs), _folder(job)
    trusted = bool(job.load.get("trust_remote_code"))
    with suppress(_GateMissedError), output(out, inputs, overwrite=overwrite) as stage:
        start = time.perf_counter()
        if calibrated:
            plan, blocks = _stream(job, config, work, stage)
            copy_companions(source, stage, job.say, code=trusted)  # including the model's code
            tuned = _tune(job, plan, stage)
            quantized_model = load(str(stage), **job.options("device_map", "dtype", "trust_remote_code")).eval()
        else:
            with job.stage(f"loading and quantizing, {config.scheme}"):
                quantized_model, blocks = job.quantized(config), []
            plan = quantized_model.hf_quantizer.plan
        seconds = time.perf_counter() - start
        kinds = {scheme.stored for scheme in plan.schemes.values()}
        job.say(f"{config.scheme if len(kinds) < 2 else 'mixed bits'}: {plan.summary()}")
        if plan.params < SMALL:
            job.say(f"{plan.params / 1e6:.0f}M parameters: small models lose more; look at the numbers")
        if not calibrated:
            need_space(stage, plan.bytes_quantized)
            with job.stage("saving"):
                _save(quantized_model, stage, max_shard_size=job.shard)
            copy_companions(source, stage, job.say, code=trusted)
        unclaimed_names = _keep_unclaimed(job, stage)
        if job.tokenizer is not None:
            _save(job.tokenizer, stage)
        recipe = _recipe(job, config, asked, quantized_model, plan, blocks) | {"source": _source(job, stage)}
        recipe |= {} if tuned is None else {"tuned": tuned.to_dict()}
        write_json(stage / RECIPE, recipe | {"unclaimed": unclaimed_names, "files": record(stage)["files"]})
        logits, again, dtype = sample_logits(quantized_model, *job.sample()), None, quantized_model.dtype
        if not calibrated:  # a calibrated model is read from there already
            del quantized_model
            gc.collect()  # frees the first model, which has reference cycles, before the second is loaded
            with job.stage("reading back and comparing"):
                quantized_model = load(
                    str(stage), dtype=dtype, **job.options("device_map", "trust_remote_code")
                ).eval()
                again = sample_logits(quantized_model, *job.sample())
        _check(logits, again, config.scheme)
        with job.stage("sha256 of the files"):
            files = measured_files(stage)
        row |= {
            "scheme": config.scheme, "folder": out.name, "format": plan.format, "share_quantized": plan.share,
            "bits_per_weight": plan.bits_per_weight, "bytes": sum(f.stat().st_size for f in stage.glob("*.safetensors")),
            "base_bytes": plan.bytes_float, "parameters": plan.params, "seconds": seconds,
            "layers_by_scheme": dict(Counter(map(str, plan.schemes.values()))), "date": str(date.today()),
            "files": files,
        }  # fmt: skip
        row |= _measured(job, quantized_model, blocks)
        if row.get("gate", {}).get("misses"):
            row["folder"] = failed_folder(out).name
        row |= job.finish(stage, row)
        write_json(stage / "results.json", row)
        if row["folder"] != out.name:
            with output(failed_folder(out), inputs, overwrite=job.overwrite) as aside:
                for file in stage.iterdir():
                    file.rename(aside / file.name)
            raise _GateMissedError
    return row


def _stream(job: Job, config: HfQuantConfig, work: Path, stage: Path) -> tuple[Plan, list[dict[str, Any]]]:
    """Calibrate block by block; finished blocks stay in ``work`` until the end."""
    if job.calibration is None:
        raise HfQuantError(f"{config.method} needs text to calibrate on: name one with --calibration")
    return quantize_streaming(
        job.base().checkpoint().folder, config, job.calibration, work, stage,
        Settings(
            job.say, job.progress, job.max_memory, job.ranks, _device(job), bool(job.load.get("trust_remote_code"))
        ),
    )  # fmt: skip


def _tune(job: Job, plan: Plan, stage: Path) -> Tuned | None:
    """Train the scales end to end, where codes were learned and that is wanted."""
    data = job.calibration
    if (
        job.tuning is None
        or data is None
        or data.batches
        or not any(map(plan.decision.learning, plan.schemes.values()))
    ):
        return None
    options = job.options("device_map", "trust_remote_code")
    return tune_checkpoint(stage, job.base(), data, job.tuning, options, job.say)


def _folder(job: Job) -> Path:
    """Folder of the model's small files, which are downloaded if it comes from the Hub."""
    if Path(job.model).is_dir():
        return Path(job.model)
    return Path(snapshot_download(job.model, revision=job.load.get("revision"), allow_patterns=PATTERNS))


def _device(job: Job) -> str:
    """The device of a calibrated method: the CPU by default; several processes use different GPUs."""
    name = job.load.get("device_map") or "cpu"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, dtype=torch.uint8, device=device)
    except (RuntimeError, AssertionError) as error:
        raise HfQuantError(f"--device {name}: {str(error).splitlines()[0]}") from None
    alike = device.type == "cuda" and device.index is None
    return f"cuda:{job.ranks.rank % torch.cuda.device_count()}" if alike else name


def _keep_unclaimed(job: Job, stage: Path) -> list[str]:
    """Copy the tensors that no module reads, and report them; returns their names."""
    checkpoint = job.base().checkpoint()
    names = unclaimed(checkpoint, skeleton(job.model, **hub_options(job.load)))
    if names:
        keep(checkpoint, names, stage)
        others = f" and {len(names) - 3} more" if len(names) > 3 else ""
        job.say(
            f"{', '.join(names[:3])}{others}: no module of the model takes these tensors; they are kept as they are"
        )
    return names


def _save(model: Any, folder: Path, **options: Any) -> None:
    """``save_pretrained``, with errors that name the file."""
    try:
        with blaming(folder):
            model.save_pretrained(folder, **options)
    except HfQuantError:
        raise
    except Exception as error:
        raise HfQuantError(f"{folder}: {error}") from error


def _measured(job: Job, model: Any, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Quality and gate if there is a text to measure on, and the error of each layer."""
    errors = layer_errors(model, job.base().checkpoint(), blocks)
    measured: dict[str, Any] = {"layers": [layer.to_dict() for layer in errors]}
    if job.measure is not None:
        quality = job.measure(model)
        measured["quality"] = quality.to_dict()
        if job.budget:
            measured["gate"] = job.budget.verdict(quality)
    return measured


def _recipe(
    job: Job, config: HfQuantConfig, settings: dict[str, Any], model: Any, plan: Plan, blocks: list[dict[str, Any]]
) -> dict[str, Any]:
    """How the model was made."""
    done = {name: steps for block in blocks for name, steps in block["steps"].items()}
    return {
        "scheme": config.scheme, "method": config.method, "format": plan.format, "format_reason": plan.format_reason,
        "steps": plan.decision.steps(plan.schemes, done), "skipped": plan.decision.skipped(plan.schemes, done),
        "asked": settings, "dtype": str(model.dtype).removeprefix("torch."),
        "share_quantized": plan.share, "bits_per_weight": plan.bits_per_weight,
        "schemes": {name: str(scheme) for name, scheme in plan.schemes.items()},
        "left": plan.left | plan.others, "regrouped": plan.regrouped,
        "calibration": job.calibration.to_dict() if blocks and job.calibration else None, "blocks": blocks,
        "versions": {name: version(name) for name in ("hf-quant", "torch", "transformers", "safetensors")},
    }  # fmt: skip


def _check(logits: Tensor, again: Tensor | None, scheme: str) -> None:
    """Check that the model read ``again`` computes the same as the one in memory, and finite values.

    The last digits of a product in floating point depend on where in memory its operands lie, so they may differ.
    """
    if not logits.isfinite().all():
        raise HfQuantError(f"{scheme}: the quantized model computes NaN or infinite values")
    rounding = max(1e-5, 4 * torch.finfo(logits.dtype).eps) * float(logits.abs().max())
    if again is not None and not torch.allclose(again, logits, rtol=0, atol=rounding):
        raise HfQuantError(f"{scheme}: the saved model computes something else than the one in memory")


def _source(job: Job, stage: Path) -> dict[str, Any]:
    """The base by name (never by path), with its licence; its notices are copied to ``stage``."""
    commit = job.base().commit()
    try:
        copy_notices(job.model, commit, stage, job.say)
        return describe(job.model, commit)
    except HfQuantError as error:  # the model may come from the cache, without access to the Hub
        job.say(f"{job.model}: its card cannot be read now, so push will ask again: {error}")
        return {"model": Path(job.model).resolve().name if Path(job.model).is_dir() else job.model, "revision": commit}
