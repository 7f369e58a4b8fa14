"""A quantized checkpoint, whoever made it, comes closer to its base: its scales are trained end to end, its codes stay."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_quant.errors import FormatError, HfQuantError, OptionError
from hf_quant.jobs.options import check_device, check_model, hub
from hf_quant.jobs.outputs import CONVERSION, check_output, claimed, record
from hf_quant.jobs.outputs import output as output_folder
from hf_quant.jobs.progress import Bar, Say, reporting
from hf_quant.jobs.results import Result, Row
from hf_quant.jobs.texts import CALIBRATION_TOKENS, calibration_for, find_calibration, template_arguments
from hf_quant.jobs.token_ids import refuse_inputs

if TYPE_CHECKING:
    from hf_quant.checkpoint.contents import Contents


@dataclass(frozen=True, repr=False)
class RepairResult(Result):
    """What `repair` wrote.

    Attributes:
        source: Format it came in.
        to: Format of what was written.
        folder: Where it is.
        base: What it was made from.
        before: KL divergence to the base on the windows held out, nats per token, as it came.
        after: The same as it was written; no more than ``before``.
        record: As ``--json`` prints it.
    """

    source: str
    to: str
    folder: Path
    base: str
    before: float
    after: float
    record: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.record)

    def title(self) -> str:
        return f"quantized model in {self.folder}, closer to {self.base}"

    def head(self) -> Row:
        return ("from", "to", "KL before (nats)", "KL after", "change")

    def rows(self) -> Iterator[Row]:
        yield (
            self.source,
            self.to,
            f"{self.before:.5f}",
            f"{self.after:.5f}",
            f"{self.after / self.before - 1:+.1%}" if self.before else "-",
        )


def repair(
    folder: str | os.PathLike[str], output: str | os.PathLike[str], *, base: str, calibration: str | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS, passes: int | None = None, device: str | None = None, revision: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None, trust_remote_code: bool = False, overwrite: bool = False,
    progress: bool | Bar = False, say: Say | None = None,
) -> RepairResult:  # fmt: skip
    """Train the scales of a quantized checkpoint until it says what its base says; ``hf-quant repair``.

    Works on every checkpoint of integer codes that `hf_quant.convert` reads: GPTQ, AWQ, compressed-tensors, native. The base is run
    once, before the quantized model is loaded. One window of the text in eight is held out, and what is worse there is not kept.

    Args:
        folder: The quantized model.
        output: Folder of the result, in compressed-tensors, or native where that cannot hold the codes.
        base: Folder or Hub id of the model that it was made from, in floating point.
        calibration: As for `hf_quant.quantize`, like the next one.
        calibration_tokens: How many tokens are looked at.
        passes: Times that the text is seen; None: four times, or less often if it is long.
        device: Where to train.
        revision: Of a base from the Hub.
        chat_template_kwargs: As for `hf_quant.quantize`.
        trust_remote_code: Run code that the checkpoints bring along.
        overwrite: Replace a folder that hf-quant wrote.
        progress: As for `hf_quant.quantize`.
        say: As for `hf_quant.quantize`.

    Raises:
        OptionError: ``passes`` is less than 1, or there is no such device.
        FormatError: The codes are none that can be put into another format.
        HfQuantError: The vocabularies differ, or something in one of the models is not as it must be.
    """
    source, out, base = Path(check_model(folder)), Path(output), check_model(base, revision)
    if passes is not None and passes < 1:
        raise OptionError(f"--passes {passes}: must be at least 1")
    check_device(device)
    check_output(out, [source, base], overwrite=overwrite)
    text = find_calibration(calibration, base)
    arguments = template_arguments(chat_template_kwargs, [text])

    from hf_quant.data.chat import Chat
    from hf_quant.evaluation.yardstick import Base
    from hf_quant.formats import label_of
    from hf_quant.hf.auto import tokenizer_of
    from hf_quant.jobs.convert import convert, open_quantized
    from hf_quant.jobs.tune import Tuning, tune_checkpoint

    contents: Contents = open_quantized(source)
    to, from_hub = _target(contents), hub(revision, trust_remote_code)
    _refuse_other_base(base, contents, from_hub)
    with reporting(progress, say) as report:
        tokenizer = tokenizer_of(base, **from_hub)
        if tokenizer is None:
            raise HfQuantError(f"{base}: no tokenizer found, and training begins with text")
        chat = Chat(tokenizer, arguments)
        data = calibration_for(base, text, calibration_tokens, chat, from_hub)
        chat.refuse_unused()
        refuse_inputs(f"--calibration {calibration}", "repair trains on", data)
        with (
            claimed(out),
            output_folder(out, [source, base], overwrite=overwrite) as stage,
            tempfile.TemporaryDirectory(dir=stage) as scratch,  # goes with the stage if this is killed
        ):
            draft = Path(scratch) / out.name
            convert(str(source), str(draft), to=to, say=report.say)
            options = {"trust_remote_code": trust_remote_code} | ({} if device is None else {"device_map": device})
            tuned = tune_checkpoint(
                draft,
                Base(base, device=device, **from_hub),
                data,
                Tuning(passes),
                options,
                report.say,
            )
            for file in draft.iterdir():
                file.rename(stage / file.name)
            came_from = label_of(contents.format)
            changes = {"from": came_from, "to": to, "tuned": tuned.to_dict(), "calibration": data.to_dict()}
            _note(stage, changes)
    shown = {name: value for name, value in changes.items() if name != "calibration"} | {"folder": str(out)}
    return RepairResult(came_from, to, out, base, tuned.before, tuned.after, shown)


def _target(contents: Contents) -> str:
    """The format of the result.

    Raises:
        FormatError: None can hold these codes.
    """
    from hf_quant.formats import conversion_targets, saved_formats
    from hf_quant.jobs.convert import refuse, why_not

    for name, layer in contents.layers.items():
        if layer.scheme is not None and layer.scheme.blocks:
            raise FormatError(
                f"{name}: scales of {layer.scheme} stay whole multiples of one number, and training moves each by itself; "
                "--method calibrated makes the best K-quants"
            )
    _refuse_split_experts(contents)
    labels = {name: label for label, name in conversion_targets().items()}
    *others, last = [labels[name] for name in reversed(saved_formats())]  # the last one holds every plan
    to = next((label for label in others if not why_not(contents, label)), last)
    refuse(contents, to)
    return to


def _refuse_split_experts(contents: Contents) -> None:
    """Their scales are trained as a stack, which has no tensors in such a file."""
    from hf_quant.jobs.convert import kinds_of

    for name, kind in kinds_of(contents).items():
        if kind == "experts" and len(contents.layers[name].shape) == 2:
            raise FormatError(
                f"{name}: experts that lie in the file one by one are not repaired yet; hf-quant quantize --method learned "
                "makes such a model anew"
            )


def _refuse_other_base(base: str, contents: Contents, from_hub: dict[str, Any]) -> None:
    """Refuse a base that this checkpoint was not made from, as far as the configs tell."""
    from hf_quant.hf.likeness import refuse_other
    from hf_quant.hf.loading import refuse_quantized, skeleton

    refuse_quantized(base, **from_hub)
    source = str(contents.checkpoint.folder)
    code = {name: value for name, value in from_hub.items() if name != "revision"}  # which is that of the base
    refuse_other(f"--base {base}", skeleton(base, **from_hub), source, skeleton(source, **code))


def _note(stage: Path, changes: dict[str, Any]) -> None:
    """The record of the conversion says what was trained since."""
    from hf_quant.disk.atomic import write_json

    file = stage / CONVERSION
    before = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, before | changes | record(stage))
