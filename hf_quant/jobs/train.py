"""Train a model with its weights rounded, write it quantized into a folder, and measure what that cost."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_quant.errors import HfQuantError, OptionError
from hf_quant.jobs.base import remember
from hf_quant.jobs.options import (
    budget,
    check_model,
    check_seed,
    configs,
    hub,
    load_options,
    overrides,
    schemes,
    size_in_bytes,
)
from hf_quant.jobs.outputs import check_places
from hf_quant.jobs.progress import Bar, Say, reporting
from hf_quant.jobs.quantize import TOKENS, QuantizedModel, QuantizeResult, resumable
from hf_quant.jobs.texts import Measuring, find_calibration, template_arguments
from hf_quant.jobs.token_ids import refuse_inputs

if TYPE_CHECKING:
    from hf_quant.data.calibration import Calibration
    from hf_quant.data.chat import Chat
    from hf_quant.data.held_out import HeldOut
    from hf_quant.evaluation.yardstick import Base

LEARN = ("weights", "all")


def train(
    model: str | os.PathLike[str], output: str | os.PathLike[str], *, data: str, teacher: str | None = None,
    steps: int | None = None, epochs: float | None = None, lr: float | None = None, batch: int = 8, train_context: int | None = None,
    hidden_weight: float = 0.0, seed: int = 0, checkpoint_minutes: float = 5.0, learn: str = "weights",
    float32: bool = False, scheme: str | Sequence[str] | None = None,
    bits: int | None = None, group_size: int | None = None, asym: bool | None = None, method: str = "rtn", start: str | os.PathLike[str] | None = None,
    format: str = "auto", ignore: Sequence[str] = (), override: Mapping[str, str | None] | None = None, lm_head: bool = False, embeddings: bool = False,
    dtype: Any = "auto", device: str | None = None, revision: str | None = None, trust_remote_code: bool = False,
    max_shard_size: int | str = "5GB", overwrite: bool = False,
    text: str | None = None, dataset: str | None = None, context: int | None = None, stride: int | None = None,
    max_tokens: int | None = None, base_dtype: str = "float32", allow_overlap: bool = False,
    inputs: str | Iterable[Mapping[str, Any]] | None = None,
    max_kl: float | None = None, max_ppl_increase: float | None = None, min_top1: float | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None, progress: bool | Bar = False, say: Say | None = None,
) -> QuantizeResult:  # fmt: skip
    """Train a model with its weights rounded to a scheme, and write it quantized into a folder; ``hf-quant train``.

    What is trained are the weights that are rounded, their scales and zero points, or the whole model. The same call goes on with
    a training that was stopped, and ends with the bytes of one that was not. A few windows of the text are held out,
    and the state with the least loss on them is written, which may be that before the first step.

    Args:
        model: Folder or Hub id, in floating point.
        output: Folder of the result; checkpoints lie beside it in ``OUTPUT.work`` until it is there.
        data: What to train on: a UTF-8 or JSONL file, a safetensors file with token ids, or ``ID[:CONFIG][@SPLIT][#COLUMN]`` of a ``datasets`` set.
        teacher: Folder or Hub id of the model whose distributions of next tokens are learned; None: of ``model`` itself.
            ``"none"``: the text is learned.
        steps: Updates of the weights.
        epochs: Times that the text, without the windows held out, is seen, in place of ``steps``; default: 1.
        lr: Learning rate of AdamW, which rises in the first steps and then falls along a cosine. None: a fifth of the mean distance
            between two codes, over the square root of ``steps``, and 1e-3 at most. A training that begins from a trained
            model needs a lower one.
        batch: Windows of text in an update.
        train_context: Tokens in a window; default: 512, or what the model allows.
        hidden_weight: Of the relative squared error of hidden states, which is added to the divergence from the teacher; 0 compares
            the distributions of tokens alone.
        seed: Of the order of the windows.
        checkpoint_minutes: From one checkpoint to the next.
        learn: ``"weights"``: the weights that are rounded, with their scales and zero points; everything else stays as it is.
            ``"all"``: everything else too, in particular embeddings, norms and biases, which stay in floating point.
        float32: Train in float32, slower and more exactly; the result is in ``dtype`` all the same.
        scheme: As for `quantize`; one of them.
        bits: Likewise.
        group_size: Likewise.
        asym: Likewise.
        method: How the codes are chosen that training begins from; calibrated methods look at the first tokens of ``data``.
        start: Quantized checkpoint of the same architecture, of the scheme that is asked for, which training begins from in place of
            ``method``: its codes, and everything that is not rounded.
        format: As for `quantize`, like all that follow.
        ignore: Globs of layers to leave in floating point.
        override: Glob to another scheme; None or ``"float"`` leaves layers in floating point.
        lm_head: Quantize the output head too.
        embeddings: Quantize the input embeddings too.
        dtype: What the model computes in; the weights that are trained are in float32.
        device: Where to train.
        revision: Of a Hub model.
        trust_remote_code: Run code that the checkpoint brings along.
        max_shard_size: Largest file of weights, in bytes or as ``"5GB"``.
        overwrite: Replace a folder that hf-quant wrote.
        text: UTF-8 or JSONL file to measure on; None: heldout.txt beside the model, else a text that comes with this package.
        dataset: ``datasets`` set to measure on, in place of ``text``.
        context: Tokens in a window that is measured.
        stride: Tokens from one window to the next.
        max_tokens: Measure about that many at most; default: 32768.
        base_dtype: What the base computes in while it is the yardstick.
        allow_overlap: Measure even on text that was trained on.
        inputs: Inputs of the model to measure on, in place of ``text``.
        max_kl: Gate: KL divergence to the base, nats per token.
        max_ppl_increase: Gate: perplexity over the base's minus one.
        min_top1: Gate: share of predictions whose likeliest token is the base's.
        chat_template_kwargs: Arguments of the chat template that renders messages in ``data`` and in what is measured on.
        progress: True for progress bars; or a function that wraps the items of a step, given them and the step's name.
        say: Is told what is worth knowing; None passes it to the logger ``hf_quant``.

    Raises:
        OptionError: Options contradict each other, or make no sense; the scheme cannot be trained.
        PlanError: The teacher has another vocabulary, or the model cannot be quantized like that.
        HfQuantError: The text is too short or is measured on too, losses are not finite, or the output may not be written.
    """
    model, slugs, out = check_model(model, revision), schemes(scheme, bits, group_size, asym), Path(output)
    gate, other = budget(max_kl, max_ppl_increase, min_top1), overrides(override or {})
    _check_options(slugs, steps, epochs, lr, batch, train_context, learn)
    _check_from_zero(hidden_weight=hidden_weight, checkpoint_minutes=checkpoint_minutes)
    _check_hidden_weight(hidden_weight, teacher)
    check_seed(seed)
    begun = None if start is None else _check_start(start, method)
    how = Measuring(text, dataset, context, stride, max_tokens, base_dtype, allow_overlap, inputs, TOKENS)
    from_hub = hub(revision, trust_remote_code)
    given = load_options(dtype, device, from_hub)
    shard = size_in_bytes(max_shard_size)
    files = [name for name in (text, dataset, inputs, data) if isinstance(name, str) and name]
    find_calibration(data, model, "--data")
    arguments = template_arguments(chat_template_kwargs, files)
    check_places([out], [model, *files, *filter(None, [begun])], overwrite=overwrite, gate=bool(gate))
    _check_schemes([*slugs, *filter(None, other.values())])

    from hf_quant.data.calibration import calibration
    from hf_quant.data.chat import Chat
    from hf_quant.evaluation.yardstick import Base
    from hf_quant.hf.auto import tokenizer_of
    from hf_quant.jobs.beginning import refuse_beginning
    from hf_quant.jobs.compress import Job
    from hf_quant.jobs.training import Training, held_windows, train_model
    from hf_quant.training.loop import Settings

    (plan,) = configs(
        slugs, method="rtn", format=format, ignore=ignore, override=other, lm_head=lm_head, embeddings=embeddings
    )
    with reporting(progress, say) as report:
        base = Base(model, revision, device=device, trust_remote_code=trust_remote_code)
        instructor = _teacher(teacher, base)
        for one in filter(None, (base, instructor)):
            if not one.causal():
                raise HfQuantError(f"{one.model} is no causal language model, and training learns next tokens")
        checkpoint = None if begun is None else replace(base, model=begun, revision=None)
        refuse_beginning(base, plan, method, checkpoint)
        tokenizer = tokenizer_of(model, **from_hub)
        if tokenizer is None:
            raise HfQuantError(f"{model}: no tokenizer found, and training begins with text")
        chat = Chat(tokenizer, arguments)
        learned = calibration(data, tokenizer, train_context or base.context(), sys.maxsize, base.vocabulary(), chat)
        held_out = how.find(chat, model)
        chat.refuse_unused()
        refuse_inputs(f"--data {data}", "training is on", learned)
        base.refuse_longer(learned.ids.shape[1])
        if train_context not in (None, learned.ids.shape[1]):
            raise OptionError(
                f"--train-context {train_context}: the windows of {learned.name} have {learned.ids.shape[1]} tokens"
            )
        if not allow_overlap:
            _refuse_overlap(data, learned, held_out, chat)
        held = held_windows(len(learned.ids))
        _check_batch(batch, int((~held).sum()), int(held.sum()), learned)
        measure = how.yardstick(model, held_out, tokenizer, report, device=device, **from_hub)
        updates = steps or math.ceil((epochs or 1) * int((~held).sum()) / batch)
        report.say(f"{updates} steps of {batch * learned.ids.shape[1]:,} tokens of {learned.name}")
        training = Training(
            learned, Settings(updates, batch, lr, seed=seed, everything=learn == "all"), instructor, hidden_weight, method, checkpoint,
            float32, 60 * checkpoint_minutes, report.over("training"),
        )  # fmt: skip
        job = Job(
            model,
            given,
            shard,
            overwrite,
            report.say,
            tokenizer,
            gate,
            measure,
            inputs=files,
            held_out=held_out.batches,
            stage=report.stage,
        )
        with resumable({out: plan.scheme}, "the last checkpoint", report):
            record = train_model(job, training, plan, out)
    trained = QuantizedModel.of(record, out)
    remember(trained.folder, model)
    return QuantizeResult(model, [trained], held_out.name)


def _check_options(
    schemes: Sequence[str], steps: int | None, epochs: float | None, lr: float | None, batch: int,
    train_context: int | None, learn: str,
) -> None:  # fmt: skip
    if len(schemes) > 1:
        raise OptionError("--scheme: one training has one scheme")
    if learn not in LEARN:
        raise OptionError(f"--learn {learn}: one of {', '.join(LEARN)} is trained")
    if steps is not None and epochs is not None:
        raise OptionError("--steps and --epochs both say how long: give one of them")
    for name, value, least in (("steps", steps, 1), ("batch", batch, 1), ("train-context", train_context, 2)):
        if value is not None and value < least:
            raise OptionError(f"--{name} {value}: must be at least {least}")
    for name, number in (("lr", lr), ("epochs", epochs)):
        if number is not None and not 0 < number < math.inf:
            raise OptionError(f"--{name} {number}: must be a number above 0")


def _check_schemes(slugs: Sequence[str]) -> None:
    from hf_quant.core.scheme import QuantScheme
    from hf_quant.training import why_not

    for slug in slugs:
        if (reason := why_not(QuantScheme.parse(slug))) is not None:
            raise OptionError(f"{slug}: {reason}")


def _check_from_zero(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 <= number < math.inf:
            raise OptionError(f"--{name.replace('_', '-')} {number}: must be 0 or a number above 0")


def _check_hidden_weight(weight: float, teacher: str | None) -> None:
    if weight and teacher == "none":
        raise OptionError(
            "--hidden-weight compares hidden states with those of a teacher, and --teacher none has none"
        )


def _check_start(start: str | os.PathLike[str], method: str) -> str:
    if method != "rtn":
        raise OptionError(f"--start and --method {method} both say what training begins from: give one of them")
    return check_model(start)


def _check_batch(batch: int, windows: int, held: int, learned: Calibration) -> None:
    if windows < batch:
        raise OptionError(
            f"--batch {batch}: {learned.name} has {windows} windows of {learned.ids.shape[1]} tokens, beside {held} held out, fewer "
            f"than one batch: --batch {windows} works; so does more text, or windows of fewer tokens (--train-context)"
        )


def _refuse_overlap(data: str, learned: Calibration, held_out: HeldOut, chat: Chat) -> None:
    from hf_quant.data.text import read_documents, words

    file = Path(data)
    readable = file.is_file() and file.suffix != ".safetensors"
    # paragraphs may be too short to be compared
    if readable and words(read_documents(file, chat)) == words(held_out.text):
        raise HfQuantError(
            f"--data {data} is the text that is measured on: the numbers would flatter the model; measure on another "
            "text (--text), or pass --allow-overlap"
        )
    held_out.refuse_overlap(learned.paragraphs)


def _teacher(teacher: str | None, base: Base) -> Base | None:
    """The base itself where nobody says; None where the text is to be learned."""
    if teacher == "none":
        return None
    return base if teacher is None else replace(base, model=check_model(teacher), revision=None)
