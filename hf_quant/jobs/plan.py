"""What quantizing a model would give, from its config.json and its headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_quant.jobs.options import check_model, configs, hub, schemes
from hf_quant.jobs.results import Result, Row

if TYPE_CHECKING:
    from hf_quant.hf.plan import Plan
    from hf_quant.jobs.targets import Served

WORKING = 60e6  # bytes of working memory while quantizing on load; benchmarks/rtn_memory.py measures it
SMALL = 1_000_000_000
ENOUGH = 0.2  # of weights and KV cache together: less saved than this is hardly felt
KV_BITS = {
    "int8": 8.25,
    "int4": 5,
}  # of each value with its scales, in heads of 64; the newest tokens of INT4 left out
LITTLE = 0.05  # of the memory there is


@dataclass(frozen=True)
class PlannedModel:
    """What one scheme would give. Bytes are estimates; nothing was read but config.json and headers.

    Attributes:
        scheme: Such as ``"W4A16-g128"``.
        bytes_before: Of the model as it is.
        bytes_after: Of the quantized model.
        peak_bytes: Of memory while quantizing on load.
        bits_per_weight: Of the whole model, scales included.
        share_quantized: Of the parameters, 0 to 1.
        parameters: How many numbers the model has.
        format: Of the checkpoint that would be written.
        format_reason: Why it is that one.
        left: Layer that stays in floating point to the reason.
        kv_cache_bytes: Keys and values of one sequence as long as the model allows, in 16 bits; 0 where it is unknown.
        kv_cache_bytes_int8: The same in INT8.
        kv_cache_bytes_int4: The same in INT4.
        advice: Sentences on whether to do it.
        summary: A few lines on the layers.
        served: How the engine that was asked for runs it; None if none was.
    """

    scheme: str
    bytes_before: int
    bytes_after: int
    peak_bytes: int
    bits_per_weight: float
    share_quantized: float
    parameters: int
    format: str
    format_reason: str
    left: Mapping[str, str]
    kv_cache_bytes: int
    kv_cache_bytes_int8: int
    kv_cache_bytes_int4: int
    advice: Sequence[str]
    summary: str
    served: Served | None = None


@dataclass(frozen=True, repr=False)
class PlanResult(Result):
    """What `plan` found out.

    Attributes:
        model: Folder or Hub id.
        plans: One for every scheme.
    """

    model: str
    plans: Sequence[PlannedModel]

    def to_dict(self) -> dict[str, Any]:
        records = []
        for plan in self.plans:
            record = asdict(plan)
            del record["summary"], record["served"]
            records.append(record | ({} if plan.served is None else {"served": plan.served.to_dict()}))
        return {"model": self.model, "plans": records}

    def title(self) -> str:
        return f"what quantizing {self.model} would give"

    def head(self) -> Row:
        return ("scheme", "MB before", "MB after", "peak MB", "bits/weight", "quantized")

    def rows(self) -> Iterator[Row]:
        for plan in self.plans:
            yield (
                plan.scheme, f"{plan.bytes_before / 1e6:.1f}", f"{plan.bytes_after / 1e6:.1f}",
                f"{plan.peak_bytes / 1e6:.0f}", f"{plan.bits_per_weight:.2f}", f"{plan.share_quantized:.1%}",
            )  # fmt: skip

    def footnotes(self) -> Iterator[str]:
        for plan in self.plans:
            yield from f"{plan.scheme}: {plan.summary}".split("\n")
            yield from plan.served.lines() if plan.served is not None else ()
        yield from sorted({line for plan in self.plans for line in plan.advice})


def plan(
    model: str | os.PathLike[str], *, scheme: str | Sequence[str] | None = None, bits: int | None = None,
    group_size: int | None = None, asym: bool | None = None, method: str = "rtn", format: str = "auto", ignore: Sequence[str] = (),
    override: Mapping[str, str | None] | None = None, lm_head: bool = False, embeddings: bool = False,
    revision: str | None = None, trust_remote_code: bool = False, target: str | None = None, tp: int = 1,
) -> PlanResult:  # fmt: skip
    """Say what quantizing a model would give, without reading its weights; ``hf-quant plan``.

    Args:
        model: Folder or Hub id.
        scheme: As for `quantize`, like all others.
        bits: 8, 4, 3 or 2; default: 4.
        group_size: Columns that share a scale; default: 128.
        asym: With zero points; default: at 2 and 3 bits.
        method: How codes are chosen.
        format: Of the checkpoint.
        ignore: Globs of layers to leave in floating point.
        override: Glob to another scheme.
        lm_head: Quantize the output head too.
        embeddings: Quantize the input embeddings too.
        revision: Of a Hub model.
        trust_remote_code: Run code that the checkpoint brings along.
        target: An engine (`hf_quant.jobs.engines.ENGINES`) that shall run the result.
        tp: GPUs that it splits each layer over.

    Raises:
        OptionError: Options contradict each other, or there is no such engine.
        SchemeError: A scheme is impossible.
        PlanError: The model cannot be quantized like that.
        CheckpointError: The checkpoint is damaged.
    """
    model = check_model(model, revision)
    slugs = schemes(scheme, bits, group_size, asym)

    from hf_quant.checkpoint.folder import Checkpoint
    from hf_quant.hf import plan_of
    from hf_quant.jobs.grids import grid_of
    from hf_quant.jobs.targets import check_target

    check_target(target, tp)
    if Path(model).is_dir():
        Checkpoint.open(Path(model))
    plans, grid = [], grid_of(model, slugs)
    for config in configs(
        slugs, method=method, format=format, ignore=ignore, override=override or {}, lm_head=lm_head, embeddings=embeddings
    ):  # fmt: skip
        skeleton, planned = plan_of(model, config, **hub(revision, trust_remote_code))
        cache = _cache_bytes(skeleton.config.get_text_config())
        engine = None if target is None else _served(target, tp, skeleton, planned)
        plans.append(replace(_planned(config.scheme, config.bits, planned, cache, grid), served=engine))
    return PlanResult(model, plans)


def _planned(scheme: str, bits: int, plan: Plan, cache: int, grid: str | None) -> PlannedModel:
    return PlannedModel(
        scheme, plan.bytes_float, plan.bytes_quantized, int(plan.bytes_quantized + WORKING), plan.bits_per_weight, plan.share,
        plan.params, plan.format, plan.format_reason, plan.left | plan.others, cache, int(cache * KV_BITS["int8"] / 16),
        int(cache * KV_BITS["int4"] / 16), [*_advice(plan.params, bits), *_worth(plan, cache), *filter(None, [grid])], plan.summary(),
    )  # fmt: skip


def _served(target: str, tp: int, skeleton: Any, plan: Plan) -> Served:
    from hf_quant.formats import Layer
    from hf_quant.hf.candidates import candidates
    from hf_quant.jobs.targets import served

    shapes = {name: candidate.shape for name, candidate in candidates(skeleton).items()}
    layers = {name: Layer(shapes[name], scheme, skeleton.dtype) for name, scheme in plan.schemes.items()}
    return served(target, tp, plan.format, layers)


def _cache_bytes(config: Any) -> int:
    """Keys and values of one sequence as long as the model allows, in 16 bits; 0 where that is unknown or not used."""
    tokens, layers = getattr(config, "max_position_embeddings", None), getattr(config, "num_hidden_layers", None)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if not (tokens and layers and heads and getattr(config, "use_cache", False)):
        return 0
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 2 * layers * heads * width * tokens)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 10e6 else f"{size / 1e6:.2g} MB"


def _worth(plan: Plan, cache: int) -> list[str]:
    """Whether what is saved matters, beside the KV cache and on this machine."""
    sentences, saved = [], plan.bytes_float - plan.bytes_quantized
    if cache and saved < ENOUGH * (plan.bytes_float + cache):
        sentences.append(
            f"hardly worth it at long context: keys and values at the full length take {_megabytes(cache)}, and the "
            f"{_megabytes(saved)} that quantizing the weights saves are {saved / (plan.bytes_float + cache):.0%} of both; "
            f"hf_quant.QuantCache holds keys and values in {_megabytes(cache * KV_BITS['int8'] / 16)} (INT8) or "
            f"{_megabytes(cache * KV_BITS['int4'] / 16)} (INT4)"
        )
    memory = _memory()
    if memory and plan.bytes_float < LITTLE * memory:
        sentences.append(
            f"hardly worth it for memory on this machine: unquantized it takes {plan.bytes_float / memory:.1%} of "
            f"{memory / 1e9:.0f} GB"
        )
    return sentences


def _memory() -> int:
    """Bytes of the first GPU, else of the machine; 0 where that is unknown."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _advice(params: int, bits: int) -> list[str]:
    """When not to quantize, or not without a measurement."""
    sentences = []
    if params < SMALL:
        sentences.append(
            f"{params / 1e6:.0f}M parameters: small models lose more from quantization; measure before you publish"
        )
    if bits == 2:
        sentences.append("2 bits without evidence usually break a model: measure before you use it")
    return sentences
