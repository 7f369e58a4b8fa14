"""The smallest model inside a quality budget, or the best one inside a size: walk, choose, write, measure again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_quant.errors import HfQuantError, OptionError
from hf_quant.jobs.base import remember
from hf_quant.jobs.options import budget, check_model, dtype_of, hub, load_options, size_in_bytes
from hf_quant.jobs.outputs import check_places, claimed
from hf_quant.jobs.progress import Bar, Reporter, Say, reporting
from hf_quant.jobs.results import Result, Row, interval
from hf_quant.jobs.texts import (
    CALIBRATION,
    CALIBRATION_TOKENS,
    Measuring,
    calibration_for,
    find_calibration,
    find_text,
    measured_on,
    needs_calibration,
    template_arguments,
)

if TYPE_CHECKING:
    from hf_quant.data.chat import Chat
    from hf_quant.data.text import Text
    from hf_quant.evaluation.results import Quality
    from hf_quant.evaluation.yardstick import Base
    from hf_quant.hf import HfQuantConfig
    from hf_quant.jobs.walk import Rung

TOKENS, TRIAL_TOKENS = 32768, 4096


@dataclass(frozen=True, repr=False)
class LadderResult(Result):
    """What `ladder` measured and chose.

    Attributes:
        model: The base: a folder or a Hub id.
        rungs: All models that were measured, in that order; the base first.
        chosen: Name of the one that was written; None if none is inside the limits.
        folder: Where it is; its name ends in ``-failed`` if it is out of the budget on documents that chose nothing.
        passed: Whether there is a chosen model, inside the budget on those documents too.
        text: Name of what was measured on.
        held_back: The chosen model measured on documents that chose nothing; None where there are too few.
        record: As ladder.json holds it.
    """

    model: str
    rungs: Sequence[Rung]
    chosen: str | None
    folder: Path | None
    passed: bool
    text: str
    held_back: Quality | None
    record: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.record)

    def title(self) -> str:
        if self.folder is None:
            return f"{self.model} down the precision ladder: no rung is inside the limits"
        return f"{self.model} down the precision ladder: {self.chosen}, in {self.folder}"

    def head(self) -> Row:
        return ("model", "MB", "bits/weight", "KL (nats)", "95 % interval", "perplexity", "top-1", "tokens/s", "")

    def rows(self) -> Iterator[Row]:
        """Largest first; the base in bf16 has the noise floor for its quality."""
        for rung in sorted(self.rungs, key=lambda rung: -rung.bytes):
            quality = rung.quality or self.rungs[1].quality
            assert quality is not None
            kl, perplexity, top1 = (quality.metrics[name] for name in ("kl", "perplexity", "top1"))
            if rung.quality is None:
                shown = _shown(kl.noise, "noise floor", perplexity.noise, top1.noise)
            else:
                shown = _shown(kl.value, interval(kl), perplexity.value, top1.value)
            size = (f"{rung.bytes / 1e6:.1f}", f"{rung.bits_per_weight:.2f}")
            yield rung.name, *size, *shown, f"{rung.speed.decode:.0f}", self._mark(rung)

    def _mark(self, rung: Rung) -> str:
        if rung.name == self.chosen and rung.bytes == self.record.get("chosen_bytes"):
            return "chosen"
        return "out" if rung.misses else ""

    def footnotes(self) -> Iterator[str]:
        assert self.rungs[1].quality is not None
        yield measured_on(self.rungs[1].quality, self.text)
        if self.folder is None:
            yield "no rung is inside the limits"
            return
        yield f"chosen: {self.chosen}, in {self.folder.name}"
        if self.held_back is not None:
            kl = self.held_back.metrics["kl"]
            yield (
                f"measured again on {self.held_back.tokens:,} tokens of {self.held_back.documents} documents that chose "
                f"nothing: KL {kl.value:.5f}" + ("" if kl.low is None else f" ({interval(kl)})")
            )

    def _repr_html_(self) -> str:
        from hf_quant.publish.inline_chart import size_against_kl

        return super()._repr_html_() + size_against_kl(self.record)

    def misses(self) -> list[str]:
        """Sentences on what is out of the limits."""
        lines = [f"{rung.name}: {miss}" for rung in self.rungs for miss in rung.misses]
        if self.folder is not None and self.held_back is not None and not self.passed:
            lines.append(f"{self.folder}: on documents that chose nothing, {self.chosen} is out of the budget")
        return lines


def _shown(kl: float | None, ends: str, perplexity: float | None, top1: float | None) -> tuple[str, str, str, str]:
    if kl is None or perplexity is None or top1 is None:
        return "-", "-", "-", "-"
    return f"{kl:.5f}", ends, f"{perplexity:.3f}", f"{top1:.1%}"


def ladder(
    model: str | os.PathLike[str], output: str | os.PathLike[str], *, max_size: int | str | None = None,
    max_kl: float | None = None, max_ppl_increase: float | None = None, min_top1: float | None = None,
    group_size: int = 128, asym: bool | None = None, int8_activations: bool = False, method: str | None = None, ignore: Sequence[str] = (),
    lm_head: bool = False, embeddings: bool = False,
    calibration: str | None = None, calibration_tokens: int = CALIBRATION_TOKENS, epochs: int | None = None, max_memory: int | str | None = None,
    text: str | None = None, dataset: str | None = None, context: int | None = None, stride: int | None = None,
    max_tokens: int | None = None, base_dtype: str = "float32", allow_overlap: bool = False, inputs: str | None = None,
    trial_text: str | None = None, trial_tokens: int = TRIAL_TOKENS, chat_template_kwargs: Mapping[str, Any] | None = None,
    dtype: Any = "auto", device: str | None = None, revision: str | None = None, trust_remote_code: bool = False,
    max_shard_size: int | str = "5GB", overwrite: bool = False, progress: bool | Bar = False, say: Say | None = None,
) -> LadderResult:  # fmt: skip
    """Walk a model down the precision ladder and write the smallest one inside the budget; ``hf-quant ladder``.

    Without a quality limit it is the best one inside ``max_size``. If none is inside the limits, ``passed`` is False and
    ``folder`` None; nothing is written then.

    Args:
        model: Folder or Hub id of a causal language model.
        output: Folder of the chosen model.
        max_size: Bytes of all weights, also as ``"4GB"``.
        max_kl: KL divergence to the base, nats per token.
        max_ppl_increase: Perplexity over the base's minus one, such as 0.01.
        min_top1: Share of predictions whose likeliest token is the base's, such as 0.95.
        group_size: Columns that share a scale.
        asym: With zero points; default: at 2 and 3 bits.
        int8_activations: W8A8 and W4A8 on the way down, for speed in prefill and batches.
        method: How codes are chosen; None: ``"calibrated"`` where ``calibration`` names a text or calibration.txt lies beside the
            model, else ``"rtn"``.
        ignore: Globs of layers to leave in floating point.
        lm_head: Quantize the output head too.
        embeddings: Quantize the input embeddings too.
        calibration: As for `quantize`, like the next three.
        calibration_tokens: How many tokens calibrated methods look at.
        epochs: How often ``"learned"`` goes through them for each block; default: 6.
        max_memory: Bytes that hidden states may take before they go to disk.
        text: As for `quantize`, like the next six.
        dataset: ``datasets`` set to measure on, in place of ``text``.
        context: Tokens in a window.
        stride: Tokens from one window to the next.
        max_tokens: Measure about that many at most; default: 32768.
        base_dtype: What the base computes in while it is the yardstick.
        allow_overlap: Measure even on text that was calibrated on.
        inputs: Refused: the ladder divides a text to choose and to measure.
        trial_text: UTF-8 or JSONL file that sensitivities are measured on; None: calibration.txt beside the model.
        trial_tokens: How many of its tokens.
        chat_template_kwargs: As for `quantize`.
        dtype: What the models compute in.
        device: Where to run.
        revision: Of a Hub model.
        trust_remote_code: Run code that the checkpoint brings along.
        max_shard_size: Largest file of weights.
        overwrite: Replace a folder that hf-quant wrote.
        progress: As for `quantize`.
        say: As for `quantize`.

    Raises:
        OptionError: Nothing says what to keep; no model can be as small as ``max_size``; options contradict each other; or
            ``inputs`` are given.
        HfQuantError: The output may not be written, or something in the model is not as it must be.
    """
    model, out = check_model(model, revision), Path(output)
    gate = budget(max_kl, max_ppl_increase, min_top1)
    size = None if max_size is None else size_in_bytes(max_size)
    if not gate and size is None:
        raise OptionError("say what to keep: --max-kl, --max-ppl-increase, --min-top1 or --max-size")
    source = find_calibration(calibration, model)
    method = method or ("rtn" if source is None else "calibrated")
    slugs = _slugs(group_size, asym, int8_activations)
    calibrated = needs_calibration(method, slugs, calibration, calibration_tokens, max_memory)
    if inputs is not None:
        raise OptionError("--inputs: the ladder chooses by text; quantize and eval measure one scheme on inputs")
    how = Measuring(text, dataset, context, stride, max_tokens, base_dtype, allow_overlap, usual_tokens=TOKENS)
    _check_trial(trial_text, trial_tokens)
    files = list(filter(None, (text, dataset, trial_text, calibration)))
    arguments = template_arguments(chat_template_kwargs, [text, dataset, trial_text, source if calibrated else None])
    shard, memory = size_in_bytes(max_shard_size), None if max_memory is None else size_in_bytes(max_memory)
    from_hub = hub(revision, trust_remote_code)
    load_arguments = load_options(dtype, device, from_hub)
    check_places([out], [model, *files], overwrite=overwrite, gate=bool(gate))
    with claimed(out):  # what stands in the way of writing is said now, and not when all is measured
        pass

    from hf_quant.data.chat import Chat
    from hf_quant.evaluation.results import Quality
    from hf_quant.hf import HfQuantConfig
    from hf_quant.hf.auto import tokenizer_of
    from hf_quant.hf.loading import refuse_quantized
    from hf_quant.jobs.compress import Job, compress
    from hf_quant.jobs.walk import Ladder, Limits, rungs

    refuse_quantized(model, **from_hub)
    steps = rungs(group_size, asym, int8_activations)
    planned: dict[str, Any] = {
        "method": method, "modules_to_not_convert": list(ignore), "quantize_lm_head": lm_head,
        "quantize_embeddings": embeddings, "epochs": epochs,
    }  # fmt: skip
    smallest = HfQuantConfig(str(steps[-1]), **planned)
    if size is not None:
        _refuse_too_small(model, size, smallest, load_arguments)
    base = _base(model, how.base_dtype, device, from_hub)
    with reporting(progress, say) as report:
        tokenizer = tokenizer_of(model, **from_hub)
        chat = Chat(tokenizer, arguments)
        held_out = how.find(chat, model)
        choosing, held_back = _parts(held_out.text, report)
        looked_at = calibration_for(model, source, calibration_tokens, chat, from_hub) if calibrated else None
        trial = _trial_text(model, chat, trial_text)
        chat.refuse_unused()
        how.check_text(base, tokenizer)
        texts = {"the documents that choose": choosing, "those held back": held_back, "those for sensitivities": trial}
        how.check_length(base, tokenizer, texts)
        if looked_at is not None and not allow_overlap:
            held_out.refuse_overlap(looked_at.paragraphs)

        def measure_on(part: Text) -> Any:
            return how.yardstick(model, replace(held_out, text=part), tokenizer, report, device=device, **from_hub)

        limits = Limits(gate, size, 2.0 if held_back else 1.0)
        job = Job(
            model, load_arguments, shard, overwrite, report.say, tokenizer, gate, measure_on(choosing), looked_at,
            report.over("blocks"), memory, inputs=files, stage=report.stage,
        )  # fmt: skip
        options = planned | ({} if looked_at is None else {"calibration": looked_at.batches or looked_at.ids})
        walk = Ladder(
            job, limits, steps, options, base.load,
            lambda: _trial(base, tokenizer, how, choosing, trial, trial_tokens, report), report.over("sensitivity"),
        ).walk()  # fmt: skip
        record = walk.to_dict() | {"limits": asdict(gate) | {"max_size": size}, "held_back": None}
        folder = None
        if walk.chosen is not None:
            assert walk.chosen.config is not None
            record["chosen_bytes"] = walk.chosen.bytes
            last = replace(
                job, finish=lambda stage, row: _finish(stage, record, row, held_back is not None, report.say)
            )
            if held_back is not None:
                last = replace(last, measure=measure_on(held_back))
            folder = out.with_name(compress(last, walk.chosen.config, out)["folder"])
            remember(folder, model)
    again = record["held_back"]
    return LadderResult(
        model, walk.rungs, record["chosen"], folder, folder is not None and folder.name == out.name, held_out.name,
        None if again is None else Quality.from_dict(again), record,
    )  # fmt: skip


def _refuse_too_small(model: str, size: int, smallest: HfQuantConfig, load: dict[str, Any]) -> None:
    """Refuse a size that not even the lowest rung has, before anything is measured; ``load`` as of `load_options`."""
    from hf_quant.hf import plan_of
    from hf_quant.hf.auto import hub_options

    least = plan_of(model, smallest, dtype=dtype_of(load), **hub_options(load))[1].bytes_quantized
    if least > size:
        raise OptionError(
            f"--max-size {size / 1e6:.3g}MB: the smallest model, {smallest.scheme}, has {least / 1e6:.3g} MB; --embeddings, "
            "--lm-head and a larger --group-size make smaller ones"
        )


def _base(model: str, dtype: str, device: str | None, from_hub: dict[str, Any]) -> Base:
    import torch

    from hf_quant.evaluation.yardstick import Base

    base = Base(model, dtype=getattr(torch, dtype), device=device, **from_hub)
    if not base.causal():
        raise HfQuantError(
            f"{model} is no causal language model, and the ladder goes by its predictions: use quantize"
        )
    return base


def _slugs(group_size: int, asym: bool | None, int8_activations: bool) -> list[str]:
    """Of the rungs, as `hf_quant.jobs.walk.rungs` makes them; no torch is needed to know whether text is looked at."""
    from hf_quant.core.scheme import QuantScheme, fixed_zero

    plain = [str(QuantScheme(bits, group_size, fixed_zero(bits, asym))) for bits in (8, 4, 3, 2)]
    return [*plain, "W8A8"] if int8_activations else plain


def _parts(text: Text, report: Reporter) -> tuple[Text, Text | None]:
    """Documents that choose, and documents that are held back to measure what was chosen."""
    from hf_quant.data.text import halves, split
    from hf_quant.evaluation.results import FEWEST_DOCUMENTS

    documents = len(split(text))
    if documents >= 2 * FEWEST_DOCUMENTS:
        return halves(text)
    report.say(
        f"the text has {documents} document{'s' if documents != 1 else ''}: with fewer than {2 * FEWEST_DOCUMENTS} none are held back, so the model is "
        "chosen and measured on the same ones, which flatters it"
    )
    return text, None


def _finish(stage: Path, record: dict[str, Any], row: dict[str, Any], held_back: bool, say: Say) -> dict[str, Any]:
    """Write the walk and its pictures beside the model before that appears; returns what results.json holds of it."""
    from hf_quant.disk.atomic import write_bytes, write_json
    from hf_quant.publish import charts

    record |= {"folder": row["folder"], "held_back": row["quality"] if held_back else None}
    write_json(stage / "ladder.json", record)
    if (reason := charts.available()) is not None:
        say(reason)
    else:
        for name, draw in (("size_and_kl", charts.size_and_kl), ("sensitivity", charts.sensitivity)):
            if name != "sensitivity" or record["sensitivity"]["kl"]:
                for dark in (False, True):
                    write_bytes(stage / f"{name}-{'dark' if dark else 'light'}.png", draw(record, dark))
    return {"ladder": {key: record[key] for key in ("rungs", "chosen", "chosen_bytes", "limits", "held_back")}}


def _check_trial(text: str | None, tokens: int) -> None:
    find_text(text)
    if tokens < 1:
        raise OptionError(f"--trial-tokens {tokens}: must be at least 1")


def _trial_text(model: str, chat: Chat, trial_text: str | None) -> Text | None:
    """The text that sensitivities are measured on; None where there is none but the held-out one."""
    from hf_quant.data.text import read_documents

    beside = Path(model) / CALIBRATION
    file = find_text(trial_text) or (beside if beside.is_file() else None)
    return None if file is None else read_documents(file, chat)


def _trial(
    base: Base, tokenizer: Any, how: Measuring, choosing: Text, trial: Text | None, tokens: int, report: Reporter
) -> Any:
    """The base's outputs on a text that the result is not measured on, if there is one."""
    if trial is None:
        report.say("sensitivities are measured on the held-out text itself: --trial-text names another")
    text = choosing if trial is None else trial
    return base.reference(tokenizer, text, context=how.context, stride=how.stride, max_tokens=tokens, noise=False)
