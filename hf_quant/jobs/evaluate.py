"""Measure a model against the one it was made from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_quant.errors import HfQuantError, OptionError
from hf_quant.jobs.base import base_of, recipe_of, refuse_itself
from hf_quant.jobs.options import budget, check_device, check_model, hub
from hf_quant.jobs.progress import Bar, Say, reporting
from hf_quant.jobs.results import Result, Row
from hf_quant.jobs.stored import check_results, store_beside_base
from hf_quant.jobs.texts import Measuring, check_overlap, measured_on, missed, template_arguments

if TYPE_CHECKING:
    from hf_quant.data.chat import Chat
    from hf_quant.evaluation.gate import Gate
    from hf_quant.evaluation.layers import LayerError
    from hf_quant.evaluation.results import Estimate, Quality
    from hf_quant.evaluation.yardstick import Base

KV_CACHES = ("int8", "int4")


@dataclass(frozen=True, repr=False)
class EvaluateResult(Result):
    """What `evaluate` measured.

    Attributes:
        model: What was measured: a folder or a Hub id.
        base: What it was measured against.
        text: Name of what it was measured on.
        quality: KL divergence, perplexity, top-1 agreement; of an encoder, distances of its embeddings.
        layers: Relative error of each quantized layer, worst first.
        gate: Whether the quality is inside the budget; None without a budget.
        kv_cache: Kind of the cache of keys and values, and its bytes; None for the model's own.
        tasks: Task of lm-evaluation-harness to its numbers; empty if none were asked for.
    """

    model: str
    base: str
    text: str
    quality: Quality
    layers: Sequence[LayerError]
    gate: Gate | None = None
    kv_cache: Mapping[str, Any] | None = None
    tasks: Mapping[str, Mapping[str, float]] | None = None

    @property
    def passed(self) -> bool:
        """Whether it is inside its budget; True if it has none."""
        return self.gate is None or self.gate.passed

    @property
    def main(self) -> Estimate:
        """The measure that counts most: of a causal language model its KL divergence, in nats per token."""
        metrics = self.quality.metrics
        return next(iter(metrics.values())) if self.quality.kind == "encoder" else metrics["kl"]

    def to_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = {"quality": self.quality.to_dict()}
        if self.kv_cache is not None:
            record["kv_cache"] = dict(self.kv_cache)
        if self.gate is not None:
            record["gate"] = asdict(self.gate)
        record["layers"] = [layer.to_dict() for layer in self.layers]
        if self.tasks is not None:
            record["tasks"] = {name: dict(numbers) for name, numbers in self.tasks.items()}
        return record

    def title(self) -> str:
        return f"{self.model} against {self.base}"

    def head(self) -> Row:
        return ("measure", "value", "95 % interval", "base in bf16")

    def rows(self) -> Iterator[Row]:
        for name, estimate in self.quality.metrics.items():
            noise = "-"
            if estimate.noise is not None:
                noise = f"{estimate.noise:.5g}" + (" (within)" if estimate.within_noise else "")
            interval = "-" if estimate.low is None else f"{estimate.low:.5g} .. {estimate.high:.5g}"
            title = name if estimate.positions is None else f"{name} ({estimate.positions:,} tokens)"
            yield title, f"{estimate.value:.5g}", interval, noise
        for name, value in self.quality.quantiles.items():
            yield name, f"{value:.5g}", "-", "-"

    def footnotes(self) -> Iterator[str]:
        yield measured_on(self.quality, self.text)
        for task, numbers in (self.tasks or {}).items():
            yield from (f"{task}: {name} {value:.4g}" for name, value in numbers.items())

    def misses(self) -> list[str]:
        """Sentences on what missed the gate, and on the layers to look at first; empty if nothing did."""
        return missed(self.gate.misses if self.gate else (), self.layers)


def evaluate(
    model: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None, device: str | None = None,
    kv_cache: str | None = None, tasks: str | Sequence[str] | None = None,
    text: str | None = None, dataset: str | None = None, context: int | None = None, stride: int | None = None,
    max_tokens: int | None = None, base_dtype: str = "float32", allow_overlap: bool = False,
    inputs: str | Iterable[Mapping[str, Any]] | None = None,
    max_kl: float | None = None, max_ppl_increase: float | None = None, min_top1: float | None = None, min_cosine: float | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None, trust_remote_code: bool = False, progress: bool | Bar = False,
    say: Say | None = None,
) -> EvaluateResult:  # fmt: skip
    """Measure a model against the model it was made from; ``hf-quant eval``.

    What is measured of a folder beside the model it was made from is added to its results.json, but for what a ``kv_cache`` costs.

    Args:
        model: Folder or Hub id.
        base: The model it was made from; None: the one that its recipe.json names, or the folder that it was made from here.
        device: Where to run both, such as ``"cpu"``, ``"cuda"`` or ``"auto"``.
        kv_cache: ``"int8"`` or ``"int4"``: measure it with keys and values kept like that.
        tasks: Tasks of lm-evaluation-harness too: a list, or names separated by commas.
        text: As for `quantize`, like the next six; all of it is measured unless ``max_tokens`` says otherwise.
        dataset: ``datasets`` set to measure on, in place of ``text``.
        context: Tokens in a window.
        stride: Tokens from one window to the next.
        max_tokens: Measure about that many at most.
        base_dtype: What the base computes in.
        allow_overlap: Measure even on what was calibrated on.
        inputs: Inputs of the model to measure on, in place of ``text``: as for `quantize`.
        max_kl: Gate: KL divergence to the base, nats per token.
        max_ppl_increase: Gate: perplexity over the base's minus one.
        min_top1: Gate: share of predictions whose likeliest token is the base's.
        min_cosine: Gate: cosine similarity of an encoder's embeddings to the base's, such as 0.99.
        chat_template_kwargs: As for `quantize`; with them, tasks are asked through the chat template too.
        trust_remote_code: Run code that the checkpoints bring along.
        progress: As for `quantize`.
        say: As for `quantize`.

    Raises:
        OptionError: Options contradict each other, or make no sense.
        HfQuantError: The two models cannot be compared, or something in one of them is not as it must be.
    """
    model, base = check_model(model), None if base is None else check_model(base)
    how = Measuring(text, dataset, context, stride, max_tokens, base_dtype, allow_overlap, inputs)
    names = _task_names(tasks)
    arguments = template_arguments(chat_template_kwargs, [text, dataset], bool(names))
    limits, device = budget(max_kl, max_ppl_increase, min_top1, min_cosine), check_device(device)
    _check_cache(kv_cache, inputs, names)

    from hf_quant.data.chat import Chat
    from hf_quant.evaluation.gate import Gate
    from hf_quant.evaluation.layers import layer_errors
    from hf_quant.evaluation.tasks import refuse_tasks
    from hf_quant.evaluation.yardstick import Base
    from hf_quant.hf import load
    from hf_quant.hf.auto import tokenizer_of

    recipe = recipe_of(model)
    base, revision = base_of(model, recipe, base)
    _check_folders(model, recipe, base, kv_cache)
    from_hub, of_base = hub(None, trust_remote_code), hub(revision, trust_remote_code)
    if kv_cache:
        _refuse_uncached(Base(base, **of_base))
    tokenizer = tokenizer_of(base, **of_base)
    if names:
        refuse_tasks(base, tokenizer)
    chat = Chat(tokenizer, arguments)
    held_out = how.find(chat, model, base)
    if not names:
        chat.refuse_unused()
    if not allow_overlap:
        check_overlap(recipe, held_out)
    with reporting(progress, say) as report:
        _same_tokenizer(model, tokenizer, from_hub)
        report.say(f"measuring {model} against {base} on {held_out.name}")
        measure = how.yardstick(base, held_out, tokenizer, report, device=device, gate=limits, **of_base)
        with report.stage(f"loading {Path(model).name}"):
            loaded = load(model, **from_hub, **({"device_map": device} if device else {})).eval()
        measured = _cached(loaded, kv_cache)
        quality = measure(measured)
        done = EvaluateResult(
            model, base, held_out.name, quality,
            layer_errors(loaded, Base(base, **of_base).checkpoint(), recipe.get("blocks") or ()),
            Gate(**limits.verdict(quality)) if limits else None,
            {"kind": kv_cache, "bytes": measured.nbytes} if kv_cache else None,
        )  # fmt: skip
        if kv_cache:  # results.json is about the model alone
            return done
        try:
            done = _with_tasks(done, loaded, chat, names)
        finally:  # a task that cannot be run takes nothing of what was measured with it
            with report.stage("sha256 of the files"):
                store_beside_base(model, recipe, base, done.to_dict(), report.say)
    return done


def _task_names(tasks: str | Sequence[str] | None) -> list[str]:
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks or ())]
    if not all(names):
        raise OptionError(f"--tasks {tasks!r}: one of the names is empty")
    return names


def _check_cache(kind: str | None, inputs: Any, tasks: Sequence[str]) -> None:
    """Refuse a cache that there is not, or what is not measured with one."""
    if kind is None:
        return
    if kind not in KV_CACHES:
        raise OptionError(f"--kv-cache {kind!r} is not one of {', '.join(KV_CACHES)}")
    if inputs is not None:
        raise OptionError("--kv-cache is measured on text alone: leave --inputs out, or --kv-cache")
    if tasks:
        raise OptionError("--kv-cache: tasks are run with the model's own cache: leave --tasks out, or --kv-cache")


def _check_folders(model: str, recipe: Mapping[str, Any], base: str, kv_cache: str | None) -> None:
    """Refuse what is wrong with the two models, as far as that is known before anything is measured."""
    from hf_quant.checkpoint.folder import Checkpoint

    if not kv_cache:
        refuse_itself(model, recipe, base)
        check_results(Path(model))
    for folder in (Path(model), Path(base)):
        if folder.is_dir():
            Checkpoint.open(folder)


def _refuse_uncached(base: Base) -> None:
    if not base.causal():
        raise HfQuantError(f"--kv-cache: {base.kind().__name__} is no causal language model, so it keeps none")


def _cached(model: Any, kind: str | None) -> Any:
    from hf_quant.evaluation.cached import Cached

    return Cached(model, kind) if kind else model


def _with_tasks(done: EvaluateResult, model: Any, chat: Chat, names: Sequence[str]) -> EvaluateResult:
    from hf_quant.evaluation.tasks import run_tasks

    return replace(done, tasks=run_tasks(model, chat, names)) if names else done


def _same_tokenizer(model: str, base: Any, from_hub: dict[str, Any]) -> None:
    from hf_quant.hf.auto import tokenizer_of

    if any((Path(model) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        of_model = tokenizer_of(model, **from_hub)
        if of_model is not None and base is not None and of_model.get_vocab() != base.get_vocab():
            raise HfQuantError(f"the tokenizer of {model} differs from the base's: their numbers cannot be compared")
