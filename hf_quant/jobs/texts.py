"""Which texts or inputs a model is calibrated and measured on, and the measuring itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_quant.errors import HfQuantError, OptionError, suggestion
from hf_quant.jobs.options import DTYPES, hub
from hf_quant.jobs.progress import Reporter
from hf_quant.jobs.token_ids import refuse_unreadable

if TYPE_CHECKING:
    from hf_quant.data.calibration import Calibration
    from hf_quant.data.chat import Chat
    from hf_quant.data.held_out import HeldOut
    from hf_quant.data.text import Text
    from hf_quant.evaluation.gate import Budget
    from hf_quant.evaluation.results import Quality
    from hf_quant.evaluation.yardstick import Base

TEXT, CALIBRATION = "heldout.txt", "calibration.txt"  # what a model's folder may bring along
CALIBRATION_TOKENS = 65536  # looked at by default
Data = str | Iterable[Mapping[str, Any]]  # a file or data set, or batches of inputs
BASE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Measuring:
    """What to measure on, and how.

    Attributes:
        text: UTF-8 or JSONL file; None for heldout.txt beside the model or its base, or else a text that comes with this package.
        dataset: ``ID[:CONFIG][@SPLIT][#COLUMN]`` of a ``datasets`` set, in place of ``text``.
        context: Tokens in a window; None for 512, or what the model allows.
        stride: Tokens from one window to the next; None for ``context``.
        max_tokens: About that many are measured at most; None for all.
        base_dtype: What the base computes in while it is the yardstick.
        allow_overlap: Measure even on what was calibrated on.
        inputs: A safetensors file with inputs of the model by their names, or batches of them, in place of ``text``.
        usual_tokens: What ``max_tokens`` is of a text where it is not given; None for all.

    Raises:
        OptionError: Two of them contradict each other.
        HfQuantError: There is no such file.
    """

    text: str | None
    dataset: str | None
    context: int | None
    stride: int | None
    max_tokens: int | None
    base_dtype: str
    allow_overlap: bool
    inputs: Data | None = None
    usual_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.text is not None and self.dataset is not None:
            raise OptionError("--text and --dataset name two texts to measure on: give one of them")
        if self.inputs is not None:
            self._check_inputs(self.inputs)
        if self.stride is not None and self.context is not None and self.stride > self.context:
            raise OptionError(f"--stride {self.stride} is more than --context {self.context}")
        for name, value, least in (
            ("context", self.context, 2),
            ("stride", self.stride, 1),
            ("max-tokens", self.max_tokens, 1),
        ):
            if value is not None and value < least:
                raise OptionError(f"--{name} {value}: must be at least {least}")
        dtype = DTYPES.get(str(self.base_dtype).removeprefix("torch.").lower())
        if dtype not in BASE_DTYPES:
            raise OptionError(f"--base-dtype {self.base_dtype!r} is not one of {', '.join(BASE_DTYPES)}")
        object.__setattr__(self, "base_dtype", dtype)  # its full name
        find_text(self.text)
        need_datasets(self.dataset)

    def _check_inputs(self, inputs: Data) -> None:
        """Whether other options go with inputs, and whether there is such a file; known without torch."""
        for name in ("text", "dataset"):
            if getattr(self, name) is not None:
                raise OptionError(f"--inputs and --{name} both say what to measure on: give one of them")
        for name in ("context", "stride", "max_tokens"):
            if getattr(self, name) is not None:
                raise OptionError(
                    f"--{name.replace('_', '-')} is about text: all samples of --inputs are measured as they are"
                )
        if isinstance(inputs, str) and Path(inputs).suffix != ".safetensors":
            raise OptionError(
                f"--inputs {inputs}: not a safetensors file of inputs by their names; --text or --dataset name a text"
            )
        if isinstance(inputs, str) and not Path(inputs).is_file():
            raise HfQuantError(f"--inputs {inputs}: no such file{nearby(inputs)}")

    def beside(self, chat: Chat, *folders: str) -> HeldOut | None:
        """What to measure on: what is named, or the text in ``folders``; None if there is none.

        Messages are rendered by ``chat``.
        """
        from hf_quant.data.held_out import HeldOut
        from hf_quant.data.text import dataset_rows, documents, read_documents

        if self.inputs is not None:
            return HeldOut.of_inputs(self.inputs)
        if self.dataset is not None:
            return HeldOut(self.dataset, documents(self.dataset, dataset_rows(self.dataset), chat))
        file = find_text(self.text, *folders)
        return None if file is None else HeldOut(file.name, read_documents(file, chat))

    def find(self, chat: Chat, *folders: str) -> HeldOut:
        """The same, or else the bundled text."""
        from hf_quant.data.held_out import HeldOut
        from hf_quant.data.text import BUNDLED, read_text

        return self.beside(chat, *folders) or HeldOut("the bundled text (documentation of Python)", read_text(BUNDLED))

    def yardstick(
        self,
        model: str,
        held_out: HeldOut,
        tokenizer: Any,
        report: Reporter,
        *,
        device: str | None,
        gate: Budget | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Callable[[Any], Quality]:
        """Measures models against ``model``; its outputs are computed here, unless they are cached.

        Limits of ``gate`` on what is not measured of such a model are refused before that.
        """
        import torch

        from hf_quant.evaluation.yardstick import Base, inputs_yardstick, yardstick

        base = Base(model, revision, getattr(torch, self.base_dtype), device, trust_remote_code)
        progress = report.over("measuring")
        if held_out.batches:
            return inputs_yardstick(base, tokenizer, held_out.batches, gate=gate, say=report.say, progress=progress)
        self.check_text(base, tokenizer)
        return yardstick(
            base, tokenizer, held_out.text, context=self.context, stride=self.stride,
            max_tokens=self.max_tokens or self.usual_tokens, gate=gate, say=report.say, progress=progress,
        )  # fmt: skip

    def check_text(self, base: Base, tokenizer: Any) -> None:
        """Refuse windows that ``base`` cannot read, before anything is measured.

        Raises:
            HfQuantError: Says why.
        """
        from hf_quant.hf.auto import why_not_text

        reason: str | None = "has no tokenizer"
        if tokenizer is not None:
            reason = why_not_text(base.model, **hub(base.revision, base.trust_remote_code))
        if reason is not None:
            raise HfQuantError(
                f"{base.model} {reason}, so it cannot be measured on text: --inputs names a safetensors file with its inputs by "
                "name to measure on, and --no-eval leaves measuring out of quantize"
            )
        if self.context is not None:
            base.refuse_longer(self.context)
        if self.stride is not None and not base.predicts():
            raise OptionError("--stride: passages that an encoder reads do not overlap: leave it out")

    def check_length(self, base: Base, tokenizer: Any, texts: Mapping[str, Text | None]) -> None:
        """Refuse texts, by what they are, that are shorter than one window.

        Raises:
            HfQuantError: Names the first one.
        """
        from hf_quant.data.text import windows

        for what, text in texts.items():
            try:
                if text is not None:
                    windows(tokenizer, text, self.context or base.context(), None, self.stride)
            except HfQuantError as error:
                raise HfQuantError(f"{what}: {error}; --context names shorter windows") from None


def refuse_measuring(measure: bool | None, gated: bool, named: bool) -> None:
    """Refuse ``--no-eval`` beside a gate, or beside something that is named to measure on."""
    if measure is False and gated:
        raise OptionError("a gate has to measure: it cannot go with --no-eval")
    if measure is False and named:
        raise OptionError("--text, --dataset and --inputs say what to measure on: they cannot go with --no-eval")


def need_datasets(name: str | None) -> None:
    """Refuse the name of a ``datasets`` set where that package is not installed."""
    if name is not None and find_spec("datasets") is None:
        raise HfQuantError(f"{name}: needs the package datasets: pip install datasets")


def find_text(text: str | None, *folders: str) -> Path | None:
    """The file asked for, else the held-out text in one of the folders."""
    if text is not None:
        if not Path(text).is_file():
            raise HfQuantError(f"{text}: no such file{nearby(text) or '; name a UTF-8 text file'}")
        refuse_unreadable("--text", text)
        return Path(text)
    return next((path for folder in folders if (path := Path(folder) / TEXT).is_file()), None)


def check_overlap(recipe: Mapping[str, Any], held_out: HeldOut) -> None:
    """Refuse it if the ``recipe`` of a model says that it was calibrated or trained on it."""
    records = [recipe.get("calibration"), (recipe.get("training") or {}).get("text")]
    held_out.refuse_overlap([str(part) for record in records if record for part in record.get("paragraphs", [])])


def nearby(file: str) -> str:
    """The end of a message about a file that is not there: another one that is called much like it."""
    folder = Path(file).parent
    names = [path.name for path in folder.iterdir() if path.is_file()][:1000] if folder.is_dir() else []
    return suggestion(Path(file).name, names)


def find_calibration(text: Data | None, model: str, option: str = "--calibration") -> Data | None:
    """The calibration text asked for, else the one beside the model, else None for the bundled one; batches as they are.

    Raises:
        HfQuantError: What is asked for looks like a file, and there is none.
    """
    if text is None:
        beside = Path(model) / CALIBRATION
        return str(beside) if beside.is_file() else None
    if not isinstance(text, str):
        return text
    if Path(text).is_dir() or (
        Path(text).suffix in (".txt", ".jsonl", ".json", ".md", ".safetensors") and not Path(text).is_file()
    ):
        raise HfQuantError(f"{option} {text}: no such file{nearby(text) or '; name a UTF-8 or JSONL file'}")
    if not Path(text).is_file():
        need_datasets(text)
    refuse_unreadable(option, text)
    return text


def needs_calibration(
    method: str, slugs: Iterable[str], calibration: Data | None, tokens: int = CALIBRATION_TOKENS,
    memory: int | str | None = None,
) -> bool:  # fmt: skip
    """Whether the method needs calibration data for one of the schemes.

    Raises:
        OptionError: Calibration data are named, or how many tokens of them or how much memory for them, and nothing would
            look at them.
    """
    from hf_quant.core.scheme import QuantScheme
    from hf_quant.solve.recipes import Decision

    calibrated = Decision.of(method, map(QuantScheme.parse, slugs)).calibrated
    named = {
        "--calibration": calibration is not None,
        "--calibration-tokens": tokens != CALIBRATION_TOKENS,
        "--max-memory": memory is not None,
    }
    if unused := [option for option, is_named in named.items() if is_named and not calibrated]:
        raise OptionError(f"{unused[0]}: --method {method} looks at no text: leave it out, or name another method")
    return calibrated


def template_arguments(
    given: Mapping[str, Any] | None, sources: Iterable[Any], asked: bool = False
) -> dict[str, Any] | None:
    """Arguments of the chat template; None where none are given.

    Args:
        given: What was given.
        sources: Of texts, such as files and data sets.
        asked: Whether something else applies the template.

    Raises:
        OptionError: They are no JSON object, or nothing applies the template.
    """
    from hf_quant.data.chat import NOTHING_ASKED, may_hold_chats

    if given is None:
        return None
    try:
        json.dumps(given := dict(given), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OptionError(f"--chat-template-kwargs: must be names and values that JSON can hold: {error}") from None
    if not asked and not any(map(may_hold_chats, sources)):
        raise OptionError(f"--chat-template-kwargs: {NOTHING_ASKED}")
    return given


def calibration_for(model: str, source: Data | None, tokens: int, chat: Chat, from_hub: dict[str, Any]) -> Calibration:
    """What calibrated methods look at."""
    from hf_quant.data.calibration import calibration
    from hf_quant.evaluation.yardstick import Base
    from hf_quant.hf.auto import refuse_other_inputs

    if source is None or (isinstance(source, str) and Path(source).suffix != ".safetensors"):
        refuse_other_inputs(model, **from_hub)
    base = Base(model, **from_hub)
    return calibration(source, chat.tokenizer, base.context(), tokens, base.vocabulary(), chat)


def measured_on(quality: Quality, name: str) -> str:
    """A sentence on what a quality was measured on."""
    from hf_quant.evaluation.results import amount_of, why_no_interval

    record = quality.to_dict()
    reason = why_no_interval(record)
    of = f"{amount_of(record)} from {name}" if quality.inputs else f"{quality.tokens:,} held-out tokens of {name}"
    return f"measured on {of}" + (f"; {reason}" if reason else "")


def endings(quality: Quality) -> list[str]:
    """Sentences on how likely model and base end answers and thoughts, where the text does."""
    of = quality.metrics
    return [
        f"where the text ends {what} ({of[kind].positions:,} tokens), the model does with {of[kind].value:.1%}, its base with "
        f"{of[f'{kind}_base'].value:.1%}"
        for kind, what in (("stop", "an answer or a document"), ("end_of_thought", "a thought"))
        if kind in of
    ]


def missed(misses: Sequence[str], layers: Sequence[Any]) -> list[str]:
    """Sentences on what missed the gate, and on the layers to look at first."""
    lines = [f"gate missed: {miss}" for miss in misses]
    if lines and layers:
        worst = ", ".join(f"{layer.layer} ({layer.error:.1%})" for layer in layers[:3])
        lost = (
            "layers whose outputs lose most"
            if layers[0].of == "outputs"
            else "layers farthest from the base's weights"
        )
        lines.append(f"{lost}: {worst}")
    return lines
