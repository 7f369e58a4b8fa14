"""What `generate` does: a model goes on from places in a text, batch by batch, and each batch is on disk when it is done."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig

from hf_quant.data.calibration import Calibration
from hf_quant.disk.atomic import put
from hf_quant.disk.folders import discard
from hf_quant.disk.journal import Journal, open_journal
from hf_quant.disk.safetensors import write_tensors
from hf_quant.errors import HfQuantError, OptionError
from hf_quant.evaluation.yardstick import Base
from hf_quant.hf import load
from hf_quant.hf._hooks import takes_static_cache
from hf_quant.jobs.outputs import shown, work_folder
from hf_quant.jobs.progress import Reporter

IDS = "ids"  # the tensor in a file


@dataclass(frozen=True)
class Sampling:
    """How a model goes on from a text.

    Attributes:
        tokens: What it writes, about.
        prompt_tokens: Tokens that it goes on from, up to the length of a window.
        temperature: Of the distribution that a token is drawn from, which is not cut.
        batch: Windows that are written together.
        seed: Of the draw.
    """

    tokens: int
    prompt_tokens: int
    temperature: float
    batch: int
    seed: int

    def prompts(self, windows: Tensor) -> Tensor:
        """``[W, P]``: the beginnings of ``windows [S, T]``, and then other places in them, spread evenly.

        Raises:
            OptionError: They are no longer than a prompt.
        """
        context = windows.shape[1]
        if self.prompt_tokens >= context:
            raise OptionError(f"--prompt-tokens {self.prompt_tokens}: must be fewer than the {context} of a window")
        count = math.ceil(self.tokens / (context - self.prompt_tokens))
        rounds = math.ceil(count / len(windows))
        starts = [turn * (context - self.prompt_tokens) // rounds for turn in range(rounds)]
        return torch.cat([windows[:, start : start + self.prompt_tokens] for start in starts])[:count]


@dataclass(frozen=True)
class Written:
    """What is in the file.

    Attributes:
        sequences: How many.
        context: Tokens in each.
        generated: Tokens that the model wrote, of all.
    """

    sequences: int
    context: int
    generated: int


def write(
    base: Base, data: Calibration, sampling: Sampling, out: Path, given: dict[str, Any], report: Reporter
) -> Written:  # fmt: skip
    """Write the windows of ``data``, and what ``base`` goes on with from places in them, into a safetensors file of token ids.

    Args:
        base: A causal language model.
        data: Text as tokens.
        sampling: How.
        out: The file; finished batches lie beside it until it is there.
        given: For loading the model.
        report: Is told how far it is.
    """
    prompts, context = sampling.prompts(data.ids), data.ids.shape[1]
    plan = {
        **asdict(sampling), "text": data.sha256, "dtype": str(given["dtype"]), "base": base.identity(),
        "circumstances": base.circumstances(),
    }  # fmt: skip
    with open_journal(work_folder(out), plan, report.say) as journal:
        batches = prompts.split(sampling.batch)
        left = range(len(journal.parts), len(batches))
        if left and out.exists():  # a run that was stopped after the file was there has only to clear up
            raise HfQuantError(f"{shown(out)}: exists, and no file is replaced: name another one with -o")
        model = load(base.model, **given).eval() if left else None
        for number in report.bar(left, "batches of text"):
            ids = continued(model, batches[number], context, sampling.temperature, sampling.seed + number)
            _add(journal, ids)
        parts = [load_file(journal.folder / part["file"])[IDS] for part in journal.parts]
        windows = torch.cat([data.ids, *parts])
        if out.exists() and not _holds(out, windows):
            raise HfQuantError(f"{shown(out)}: exists with something else in it, and no file is replaced")
        put(out, lambda draft: write_tensors(draft, {IDS: windows}))
    discard(work_folder(out), out)
    return Written(len(windows), context, len(prompts) * (context - sampling.prompt_tokens))


def continued(model: Any, prompts: Tensor, length: int, temperature: float, seed: int) -> Tensor:
    """``prompts [B, P]`` and what a model writes after them, int64 ``[B, length]``; a text that ends is followed by another."""
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_length=length, pad_token_id=0,
        cache_implementation="static" if takes_static_cache(model) else None,  # does not grow: half the time on a CPU
        disable_compile=True,
    )  # fmt: skip
    prompts = prompts.to(model.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ids: Tensor = model.generate(prompts, attention_mask=torch.ones_like(prompts)).cpu()
    return ids


def _holds(file: Path, windows: Tensor) -> bool:
    """Whether a file is what this run would write."""
    try:
        return torch.equal(load_file(file)[IDS], windows)
    except (OSError, KeyError, SafetensorError):
        return False


def _add(journal: Journal, ids: Tensor) -> None:
    name = f"batch-{len(journal.parts):05d}.safetensors"
    journal.add(name, lambda draft: write_tensors(draft, {IDS: ids}), {"windows": len(ids)})
