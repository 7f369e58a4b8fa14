"""Text that a model writes itself: more to calibrate on where there is little text, without any text from elsewhere.

Calibration on such text is LLM-QAT's idea (arXiv:2305.17888); that it serves as well as real text was measured by Williams et al.
(arXiv:2410.17170).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_quant.disk.journal import is_journal
from hf_quant.errors import HfQuantError, OptionError
from hf_quant.jobs.options import check_model, check_seed, hub, load_options
from hf_quant.jobs.outputs import check_places, shown, work_folder
from hf_quant.jobs.progress import Bar, Say, reporting
from hf_quant.jobs.results import Result, Row
from hf_quant.jobs.texts import CALIBRATION_TOKENS, calibration_for, find_calibration, template_arguments
from hf_quant.jobs.token_ids import refuse_inputs


@dataclass(frozen=True, repr=False)
class GenerateResult(Result):
    """What `generate` wrote.

    Attributes:
        model: Folder or Hub id of the model.
        file: safetensors, one tensor of token ids ``[S, T]``.
        sequences: S.
        context: T.
        generated: Of these tokens, those that the model wrote.
    """

    model: str
    file: Path
    sequences: int
    context: int
    generated: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"file": str(self.file)}

    def title(self) -> str:
        return f"text in {self.file}"

    def head(self) -> Row:
        return ("model", "sequences", "tokens in each", "written by the model")

    def rows(self) -> Iterator[Row]:
        yield self.model, f"{self.sequences:,}", f"{self.context:,}", f"{self.generated:,}"


def generate(
    model: str | os.PathLike[str], output: str | os.PathLike[str], *, tokens: int = 262144, calibration: str | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS, prompt_tokens: int = 64, temperature: float = 1.0, batch: int = 32, seed: int = 0,
    dtype: Any = "auto", device: str | None = None, revision: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None, trust_remote_code: bool = False, progress: bool | Bar = False,
    say: Say | None = None,
) -> GenerateResult:  # fmt: skip
    """Let a model go on from the beginnings of a text, and write both into a file to calibrate on; ``hf-quant generate``.

    The file holds the text first, as `quantize` would look at it, and then what the model wrote. A run that was stopped goes on
    from the last finished batch, and ends with the bytes of one that was not.

    Args:
        model: Folder or Hub id of a causal language model.
        output: The safetensors file that shall appear: ``--calibration`` of `quantize`, `ladder` and `repair`, ``--data`` of `train`.
        tokens: What the model writes, about.
        calibration: Text to go on from: as for `hf_quant.quantize`, like the next one.
        calibration_tokens: How much of it.
        prompt_tokens: Tokens of a window of the text that the model goes on from, up to the end of the window.
        temperature: Of sampling, from the whole distribution.
        batch: Windows that are written together.
        seed: Of sampling.
        dtype: What the model computes in.
        device: Where.
        revision: Of a Hub model.
        chat_template_kwargs: Arguments of the chat template that renders messages in the text.
        trust_remote_code: Run code that the checkpoint brings along.
        progress: As for `hf_quant.quantize`, like the last one.
        say: Is told what is worth knowing.

    Raises:
        OptionError: An option makes no sense.
        HfQuantError: The model generates no text, the text is too short, or the file may not be written.
    """
    model, out = check_model(model, revision), Path(output)
    _check_numbers(
        temperature, tokens=tokens, calibration_tokens=calibration_tokens, prompt_tokens=prompt_tokens, batch=batch
    )
    check_seed(seed)
    text = find_calibration(calibration, model)
    _check_file(out, [model, *([text] if isinstance(text, str) else [])])
    arguments, from_hub = template_arguments(chat_template_kwargs, [text]), hub(revision, trust_remote_code)
    given = load_options(dtype, device, from_hub)

    from hf_quant.data.chat import Chat
    from hf_quant.evaluation.yardstick import Base
    from hf_quant.hf.auto import tokenizer_of, why_not_text
    from hf_quant.jobs.generated import Sampling, write

    base = Base(model, device=device, **from_hub)
    tokenizer = tokenizer_of(model, **from_hub)
    reason = "has no tokenizer" if tokenizer is None else why_not_text(model, **from_hub)
    if reason is not None or not base.causal():
        raise HfQuantError(f"{model} {reason or 'is no causal language model'}, so it cannot go on from a text")
    with reporting(progress, say) as report:
        chat = Chat(tokenizer, arguments)
        data = calibration_for(model, text, calibration_tokens, chat, from_hub)
        chat.refuse_unused()
        refuse_inputs(f"--calibration {calibration}", "a model goes on from", data)
        base.refuse_longer(data.ids.shape[1])
        sampling = Sampling(tokens, prompt_tokens, temperature, batch, seed)
        written = write(base, data, sampling, out, given, report)
    return GenerateResult(model, out, **asdict(written))


def _check_numbers(temperature: float, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise OptionError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not 0 < temperature < math.inf:
        raise OptionError(f"--temperature {temperature}: must be a number above 0")


def _check_file(out: Path, inputs: list[str]) -> None:
    """Refuse a file that is there already, or a place where it may not be."""
    if out.suffix != ".safetensors":
        raise OptionError(f"{shown(out)}: token ids are written as safetensors: call it {out.name}.safetensors")
    if not out.exists():
        check_places([out], inputs, overwrite=False, gate=False)
    elif not is_journal(work_folder(out)) or any(Path(name).exists() and out.samefile(name) for name in inputs):
        raise HfQuantError(f"{shown(out)}: exists, and no file is replaced: name another one with -o")
