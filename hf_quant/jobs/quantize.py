"""Quantize a model into a folder, with one scheme or several, and measure what that cost."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_quant.errors import HfQuantError, OptionError
from hf_quant.jobs.base import remember
from hf_quant.jobs.options import budget, check_model, configs, hub, load_options, overrides, schemes, size_in_bytes
from hf_quant.jobs.outputs import check_places, work_folder
from hf_quant.jobs.progress import Bar, Important, Reporter, Say, reporting
from hf_quant.jobs.results import Result, Row, interval
from hf_quant.jobs.texts import (
    CALIBRATION_TOKENS,
    Measuring,
    calibration_for,
    endings,
    find_calibration,
    measured_on,
    missed,
    needs_calibration,
    refuse_measuring,
    template_arguments,
)

if TYPE_CHECKING:
    from hf_quant.evaluation.gate import Gate
    from hf_quant.evaluation.layers import LayerError
    from hf_quant.evaluation.results import Quality
    from hf_quant.jobs.tune import Tuning

PREDICTIONS = ("perplexity", "KL (nats)", "95 % interval", "top-1")  # what is shown of a model that predicts tokens
TOKENS = 32768  # measured by default: enough for intervals, and soon done


@dataclass(frozen=True, repr=False)
class QuantizedModel(Result):
    """A model that was quantized into a folder.

    Attributes:
        scheme: What its layers are quantized with, such as ``"W4A16-g128"``.
        folder: Where it is; its name ends in ``-failed`` if it missed its gate.
        format: Of the checkpoint.
        bytes: Of its weight files.
        base_bytes: Of the base's weights.
        parameters: How many numbers the model has.
        bits_per_weight: Of the whole model, scales included.
        share_quantized: Of the parameters, 0 to 1.
        layers_by_scheme: How many layers each scheme has.
        seconds: What quantizing took.
        quality: What was measured beside the base; None if nothing was.
        gate: Whether that is inside the budget; None if there is no budget, or nothing was measured.
        layers: Relative error of each layer, worst first.
        record: As results.json holds it.
    """

    scheme: str
    folder: Path
    format: str
    bytes: int
    base_bytes: int
    parameters: int
    bits_per_weight: float
    share_quantized: float
    layers_by_scheme: Mapping[str, int]
    seconds: float
    quality: Quality | None
    gate: Gate | None
    layers: Sequence[LayerError]
    record: Mapping[str, Any]

    @classmethod
    def of(cls, record: dict[str, Any], out: Path) -> QuantizedModel:
        """From a record of `compress`, which was asked to write ``out``."""
        from hf_quant.evaluation.gate import Gate
        from hf_quant.evaluation.layers import LayerError
        from hf_quant.evaluation.results import Quality

        return cls(
            record["scheme"], out.with_name(record["folder"]), record["format"], record["bytes"], record["base_bytes"],
            record["parameters"], record["bits_per_weight"], record["share_quantized"], record["layers_by_scheme"],
            record["seconds"], Quality.from_dict(record["quality"]) if "quality" in record else None,
            Gate(**record["gate"]) if "gate" in record else None,
            [LayerError(**layer) for layer in record["layers"]], record,
        )  # fmt: skip

    @property
    def passed(self) -> bool:
        """Whether it is inside its budget; True if it has none."""
        return self.gate is None or self.gate.passed

    def to_dict(self) -> dict[str, Any]:
        return dict(self.record)

    def title(self) -> str:
        return f"quantized model in {self.folder}"

    def head(self) -> Row:
        quality = ("cosine", "95 % interval", "top-1") if self._encoder() else PREDICTIONS
        return ("scheme", "MB", "bits/weight", "quantized", *quality, "seconds")

    def rows(self) -> Iterator[Row]:
        of = {} if self.quality is None else self.quality.metrics
        base, quality = ["-"] * 4, ["-"] * 4
        top1 = f"{of['top1'].value:.1%}" if "top1" in of else "-"
        if self._encoder():
            cosine = next(iter(of.values()))
            base, quality = ["-"] * 3, [f"{cosine.value:.5f}", interval(cosine), top1]
        elif of:
            base[0] = f"{of['base_perplexity'].value:.3f}"
            quality = [f"{of['perplexity'].value:.3f}", f"{of['kl'].value:.5f}", interval(of["kl"]), top1]
        yield "base", f"{self.base_bytes / 1e6:.1f}", "-", "-", *base, "-"
        size = (f"{self.bytes / 1e6:.1f}", f"{self.bits_per_weight:.2f}", f"{self.share_quantized:.1%}")
        yield self.scheme, *size, *quality, f"{self.seconds:.1f}"

    def _encoder(self) -> bool:
        return self.quality is not None and self.quality.kind == "encoder"

    def footnotes(self) -> list[str]:
        kept = [kept_state(self.record["training"])] if "training" in self.record else []
        ends = endings(self.quality) if self.quality else []
        return [*kept, *ends, *missed(self.gate.misses if self.gate else (), self.layers)]


def kept_state(training: Mapping[str, Any]) -> str:
    """Which state of a training was written, and why."""
    losses = f"held-out loss {training['before']:.4f} -> {training['after']:.4f}"
    start = "" if training["step"] else ": the model before training, since no step was better"
    return f"kept step {training['step']} of {training['steps']}; {losses}{start}"


@dataclass(frozen=True, repr=False)
class QuantizeResult(Result):
    """What `quantize` made.

    Attributes:
        model: The base: a folder or a Hub id.
        results: One for every scheme; empty in all processes but the first, where several share the work.
        text: Name of the text or inputs that were measured on; None if nothing was measured.
        generated: What the last of the models continues ``prompt`` with; None without a prompt.
    """

    model: str
    results: Sequence[QuantizedModel]
    text: str | None = None
    generated: str | None = None

    @property
    def passed(self) -> bool:
        """Whether all models are inside their budget."""
        return all(result.passed for result in self.results)

    @property
    def folder(self) -> Path:
        """Of the last model."""
        return self.results[-1].folder

    def to_dict(self) -> dict[str, Any]:
        record = {"model": self.model, "results": [result.to_dict() for result in self.results]}
        return record | ({"generated": self.generated} if self.generated else {})

    def title(self) -> str:
        return f"{self.model}, quantized: {', '.join(str(result.folder) for result in self.results)}"

    def head(self) -> Row:
        return self.results[0].head() if self.results else ("scheme",)

    def rows(self) -> Iterator[Row]:
        for i, result in enumerate(self.results):
            base, row = result.rows()
            yield from (base, row) if i == 0 else (row,)

    def footnotes(self) -> Iterator[str]:
        quality = self.results[0].quality if self.results else None
        if quality is not None and self.text is not None:
            yield measured_on(quality, self.text)
        for result in self.results:
            yield from result.footnotes()


def quantize(
    model: str | os.PathLike[str], output: str | os.PathLike[str], *, scheme: str | Sequence[str] | None = None,
    bits: int | None = None, group_size: int | None = None, asym: bool | None = None, method: str = "rtn", format: str = "auto",
    ignore: Sequence[str] = (), override: Mapping[str, str | None] | None = None, lm_head: bool = False, embeddings: bool = False,
    dtype: Any = "auto", device: str | None = None, revision: str | None = None, trust_remote_code: bool = False,
    max_shard_size: int | str = "5GB", overwrite: bool = False, eval: bool | None = None,
    calibration: str | Iterable[Mapping[str, Any]] | None = None, calibration_tokens: int = CALIBRATION_TOKENS, epochs: int | None = None, tune: bool = True, max_memory: int | str | None = None,
    text: str | None = None, dataset: str | None = None, context: int | None = None, stride: int | None = None,
    max_tokens: int | None = None, base_dtype: str = "float32", allow_overlap: bool = False,
    inputs: str | Iterable[Mapping[str, Any]] | None = None,
    max_kl: float | None = None, max_ppl_increase: float | None = None, min_top1: float | None = None, min_cosine: float | None = None,
    prompt: str | None = None, chat_template_kwargs: Mapping[str, Any] | None = None, progress: bool | Bar = False,
    say: Say | None = None,
) -> QuantizeResult:  # fmt: skip
    """Quantize a model into a folder, check what was written, and measure what that cost; ``hf-quant quantize``.

    A model that misses its gate is a result too: it lies in ``OUTPUT-failed``, and ``passed`` is False.

    Args:
        model: Folder or Hub id.
        output: Folder of the result; of several schemes, their parent.
        scheme: Slug such as ``"W4A16-g128"``, or several of them; in place of ``bits``, ``group_size`` and ``asym``.
        bits: 8, 4, 3 or 2; default: 4.
        group_size: Columns that share a scale, -1 for a whole row; default: 128.
        asym: With zero points; default: at 2 and 3 bits.
        method: How codes are chosen: a file of ``hf_quant/methods``, a preset, or transforms and a method joined by ``+``.
        format: Of the checkpoint: ``"auto"``, ``"native"`` or ``"compressed_tensors"``.
        ignore: Globs of layers to leave in floating point.
        override: Glob to another scheme; None or ``"float"`` leaves layers in floating point.
        lm_head: Quantize the output head too.
        embeddings: Quantize the input embeddings too.
        dtype: What the model computes in, such as ``"bfloat16"``.
        device: Where to quantize, such as ``"cpu"``, ``"cuda"`` or ``"auto"``.
        revision: Of a Hub model.
        trust_remote_code: Run code that the checkpoint brings along.
        max_shard_size: Largest file of weights, in bytes or as ``"5GB"``.
        overwrite: Replace a folder that hf-quant wrote.
        eval: Measure the result; None: if there is a gate, a ``text``, ``inputs``, or heldout.txt beside the model.
        calibration: For calibrated methods: a UTF-8 or JSONL file, or ``ID[:CONFIG][@SPLIT][#COLUMN]`` of a ``datasets`` set;
            None: calibration.txt beside the model, else a text that comes with this package. Or a safetensors file of the
            model's inputs by their names, or batches of them as its processor returns them.
        calibration_tokens: How many of its tokens are looked at.
        epochs: How often ``"learned"`` goes through them for each block; default: 6.
        tune: After ``"learned"``, train the scales end to end; the whole base has to fit into memory for that.
        max_memory: Bytes that hidden states may take before they go to disk.
        text: UTF-8 or JSONL file to measure on; None: heldout.txt beside the model, else a text that comes with this package.
        dataset: ``datasets`` set to measure on, in place of ``text``.
        context: Tokens in a window; default: 512, or what the model allows.
        stride: Tokens from one window to the next; default: ``context``.
        max_tokens: Measure about that many at most; default: 32768.
        base_dtype: What the base computes in while it is the yardstick.
        allow_overlap: Measure even on what was calibrated on.
        inputs: What to measure a model on that reads images or sounds, in place of ``text``: a safetensors file of its inputs
            by their names, or batches of them as its processor returns them.
        max_kl: Gate: KL divergence to the base, nats per token.
        max_ppl_increase: Gate: perplexity over the base's minus one, such as 0.01.
        min_top1: Gate: share of predictions whose likeliest token is the base's, such as 0.95.
        min_cosine: Gate: cosine similarity of an encoder's embeddings to the base's, such as 0.99.
        prompt: Let the saved model continue this; with ``chat_template_kwargs``, let it answer this.
        chat_template_kwargs: Arguments of the chat template that renders messages, such as ``{"enable_thinking": False}``.
        progress: True for progress bars; or a function that wraps the items of a step, given them and the step's name.
        say: Is told what is worth knowing; None passes it to the logger ``hf_quant``.

    Raises:
        OptionError: Options contradict each other, or make no sense.
        SchemeError: A scheme is impossible.
        PlanError: The model cannot be quantized like that.
        HfQuantError: The output may not be written, or something in the model is not as it must be.
    """
    model = check_model(model, revision)
    slugs, gate = schemes(scheme, bits, group_size, asym), budget(max_kl, max_ppl_increase, min_top1, min_cosine)
    refuse_measuring(eval, bool(gate), bool(text or dataset or inputs is not None))
    how = Measuring(text, dataset, context, stride, max_tokens, base_dtype, allow_overlap, inputs, TOKENS)
    other = overrides(override or {})
    _refuse_two_bits([*slugs, *filter(None, other.values())], bool(gate))
    source = find_calibration(calibration, model)
    calibrated = needs_calibration(method, slugs, calibration, calibration_tokens, max_memory)
    outs = [Path(output) / slug for slug in slugs] if len(slugs) > 1 else [Path(output)]
    files = [name for name in (text, dataset, inputs, source) if isinstance(name, str) and name]
    arguments = template_arguments(chat_template_kwargs, files, bool(prompt))
    from_hub = hub(revision, trust_remote_code)
    given = load_options(dtype, device, from_hub)
    shard, memory = size_in_bytes(max_shard_size), None if max_memory is None else size_in_bytes(max_memory)
    check_places(outs, [model, *files], overwrite=overwrite, gate=bool(gate))

    from hf_quant.data.chat import Chat
    from hf_quant.hf.auto import tokenizer_of
    from hf_quant.hf.loading import refuse_quantized
    from hf_quant.jobs.compress import Job, compress
    from hf_quant.jobs.grids import grid_of
    from hf_quant.solve.ranks import Ranks

    plans = configs(
        slugs, method=method, format=format, ignore=ignore, override=other, lm_head=lm_head, embeddings=embeddings,
        epochs=epochs,
    )  # fmt: skip
    ranks = Ranks.of_process_group()
    with reporting(progress if ranks.first else False, say if ranks.first else _silent) as report:
        _check_folder(model, report)
        refuse_quantized(model, **from_hub)
        if (grid := grid_of(model, slugs)) is not None:
            report.say(grid)
        tokenizer = tokenizer_of(model, **from_hub)
        if tokenizer is None:
            report.say(Important(f"{model}: no tokenizer found, none is saved"))
        chat = Chat(tokenizer, arguments)
        question = chat.question(prompt) if prompt else None
        looked_at = calibration_for(model, source, calibration_tokens, chat, from_hub) if calibrated else None
        held_out = measure = None
        if eval is not False and ranks.first:
            always = bool(eval or gate or (looked_at is not None and not looked_at.batches))
            held_out = how.find(chat, model) if always else how.beside(chat, model)
        if ranks.first:
            chat.refuse_unused()
        if held_out is not None:
            if looked_at is not None and not allow_overlap:
                held_out.refuse_overlap(looked_at.paragraphs)
            measure = how.yardstick(model, held_out, tokenizer, report, device=device, gate=gate, **from_hub)
        job = Job(
            model, given, shard, overwrite, report.say, tokenizer, gate, measure, looked_at, report.over("blocks"), memory,
            ranks, files, _tuning(tune and method == "learned", model, from_hub, report),
            held_out.batches if held_out else (), stage=report.stage,
        )  # fmt: skip
        with resumable(
            {out: plan.scheme for plan, out in zip(plans, outs, strict=True)}, "the finished blocks", report
        ):
            records = [compress(job, plan, out) for plan, out in zip(plans, outs, strict=True)]
        if not ranks.first:
            return QuantizeResult(model, ())
        models = [QuantizedModel.of(record, out) for record, out in zip(records, outs, strict=True)]
        for quantized in models:
            remember(quantized.folder, model)
        generated = _continue(models[-1].folder, question, tokenizer, trust_remote_code) if question else None
    return QuantizeResult(model, models, held_out.name if held_out else None, generated)


def _tuning(wanted: bool, model: str, from_hub: dict[str, Any], report: Reporter) -> Tuning | None:
    """How scales are trained end to end; None where that is not wanted, or the model is no causal language model."""
    from hf_quant.evaluation.yardstick import Base
    from hf_quant.jobs.tune import Tuning

    if wanted and not Base(model, **from_hub).causal():
        report.say("the scales are learned block by block, not end to end too: this is no causal language model")
        return None
    return Tuning() if wanted else None


def _silent(_line: str) -> None:
    """What processes that only lend a hand say: nothing."""


@contextmanager
def resumable(schemes: dict[Path, str], what: str, report: Reporter) -> Iterator[None]:
    """Whoever stops this, or has no disk left, is told how to go on; what is whole already would be refused then.

    Args:
        schemes: Output folders, and the scheme of each.
        what: What the work folders hold.
        report: Told how.
    """
    from hf_quant.disk.journal import is_journal

    try:
        yield
    except (KeyboardInterrupt, OSError):
        for out, scheme in schemes.items():
            if is_journal(work_folder(out)):
                only = f" with --scheme {scheme} -o {out}" if len(schemes) > 1 else ""
                report.say(Important(f"{work_folder(out)} holds {what}: the same command{only} goes on from there"))
        raise


def _refuse_two_bits(slugs: Sequence[str], gated: bool) -> None:
    from hf_quant.core.scheme import QuantScheme

    two = next((slug for slug in slugs if QuantScheme.parse(slug).bits == 2), None)
    if two is not None and not gated:
        raise OptionError(
            f"{two}: 2 bits break most models, so they need a gate: say what it may cost, for example --max-kl 0.1"
        )


def _check_folder(model: str, report: Reporter) -> None:
    """Refuse a damaged checkpoint before anything is loaded; say if it seems to be still training."""
    from hf_quant.checkpoint.folder import Checkpoint

    folder = Path(model)
    if not folder.is_dir():
        return
    Checkpoint.open(folder)
    for name in ("optimizer.pt", "optimizer.bin", "scheduler.pt"):
        if (folder / name).is_file():
            training = "so it may still be training; quantize last, or train with QAT"
            report.say(Important(f"{folder}: {name} lies beside the model, {training}"))
            return


def _continue(folder: Path, prompt: str, tokenizer: Any, trust_remote_code: bool) -> str:
    """What the model that was written continues ``prompt`` with, greedily."""
    import torch

    from hf_quant.hf import load

    if tokenizer is None:
        raise HfQuantError("--prompt needs a tokenizer")
    model = load(str(folder), trust_remote_code=trust_remote_code)
    ids = torch.tensor([tokenizer(prompt).input_ids], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text
