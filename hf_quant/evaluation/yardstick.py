"""A base model and a held-out text or batches of inputs, which other models are measured against."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.constants import HF_HOME
from transformers.utils import logging

from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.data.batches import Inputs
from hf_quant.data.text import Text, Windows, windows
from hf_quant.errors import HfQuantError
from hf_quant.evaluation.encoders import (
    Passages,
    base_outputs,
    evaluate_encoder,
    measures_of,
    passages,
    sample_passages,
    without_logits,
)
from hf_quant.evaluation.endings import NO_ENDINGS, Endings
from hf_quant.evaluation.gate import Budget
from hf_quant.evaluation.measure import evaluate, means
from hf_quant.evaluation.metrics import all_metrics
from hf_quant.evaluation.reference import Progress, Reference, cached_reference
from hf_quant.evaluation.results import Quality
from hf_quant.evaluation.samples import Samples, samples
from hf_quant.evaluation.seq2seq import second_halves
from hf_quant.hf import load
from hf_quant.hf._hooks import attention_of
from hf_quant.hf.auto import class_of, config_of, hub_options, positions_of, vocabulary_of
from hf_quant.hf.loading import skeleton

CONTEXT = 512
logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Base:
    """A base model, and how to run it.

    Attributes:
        model: Folder or Hub id.
        revision: Commit, branch or tag of a Hub model.
        dtype: In which it computes.
        device: As ``device_map``.
        trust_remote_code: Whether code in the checkpoint may run.
    """

    model: str
    revision: str | None = None
    dtype: torch.dtype = torch.float32
    device: str | None = None
    trust_remote_code: bool = False

    def load(self, dtype: torch.dtype) -> Any:
        """Load the model in ``dtype``, for evaluation."""
        return load(
            self.model, dtype=dtype, **self._hub(), **({"device_map": self.device} if self.device else {})
        ).eval()

    def identity(self) -> str:
        """A digest that changes whenever the weights may have changed."""
        if not Path(self.model).is_dir():
            return f"{self.model}@{self.commit()}"
        digest = hashlib.sha256()
        for file in sorted(Path(self.model).iterdir()):
            if file.name == "config.json" or file.suffix == ".py":  # of code, what it says
                digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
            elif file.suffix == ".safetensors":
                stat = file.stat()  # the times of a change of its bytes, and of its inode, which no copy takes along
                parts = (file.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
                digest.update(" ".join(map(str, parts)).encode())
        return digest.hexdigest()

    def circumstances(self) -> str:
        """What else affects its outputs: versions, device, precision and the implementation of attention."""
        wanted_device = self.device or "cpu"
        gpu = wanted_device != "cpu" and torch.cuda.is_available()
        device = torch.cuda.get_device_name() if gpu else f"{wanted_device} {torch.backends.cpu.get_cpu_capability()}"
        attention = attention_of(self.skeleton().config)
        return (
            f"torch {torch.__version__}, transformers {version('transformers')}, {device}, attention {attention}, float32 "
            f"products {torch.get_float32_matmul_precision()}"
        )

    def commit(self) -> str | None:
        """The commit that is loaded of a Hub model; None for a folder."""
        if Path(self.model).is_dir():
            return None
        return Path(hf_hub_download(self.model, "config.json", revision=self.revision)).parent.name  # in snapshots/

    def skeleton(self) -> Any:
        """The model without its weights."""
        return skeleton(self.model, **self._hub())

    def checkpoint(self) -> Checkpoint:
        """Its checkpoint."""
        if Path(self.model).is_dir():
            return Checkpoint.open(Path(self.model))
        return Checkpoint.open(
            Path(snapshot_download(self.model, revision=self.revision, allow_patterns=["*.json", "*.safetensors"]))
        )

    def context(self) -> int:
        """The default number of tokens in a window."""
        return min(CONTEXT, self.positions or CONTEXT)

    @cached_property
    def positions(self) -> int | None:
        """The most tokens that it reads at once; None where it has no such limit."""
        return positions_of(self.skeleton())

    def refuse_longer(self, length: int) -> None:
        """Refuse windows with more tokens than the model has positions; its encoder and its decoder read half of one.

        Raises:
            HfQuantError: Says how many there are.
        """
        most = self.positions
        if most and (length - length // 2 if self._seq2seq() else length) > most:
            raise HfQuantError(f"windows of {length:,} tokens are longer than the {most:,} positions of {self.model}")

    def vocabulary(self) -> int:
        """The number of token ids."""
        return vocabulary_of(self.config())

    def config(self) -> Any:
        """Its config."""
        return config_of(self.model, **self._hub())

    def kind(self) -> Any:
        """Its class."""
        return class_of(config_of(self.model, **self._hub()), **self._hub())

    def predicts(self) -> bool:
        """Whether it predicts next tokens; otherwise it is measured as an encoder."""
        return bool(self.kind().can_generate())

    def causal(self) -> bool:
        """Whether it predicts next tokens without an encoder beside it."""
        return self.predicts() and not self._seq2seq()

    def _seq2seq(self) -> bool:
        return bool(getattr(config_of(self.model, **self._hub()), "is_encoder_decoder", False))

    def reference(
        self, tokenizer: Any, text: Text, *, context: int | None = None, stride: int | None = None,
        max_tokens: int | None = None, noise: bool = True, say: Callable[[str], None] = logger.info, progress: Progress = iter,
        cache: Path | None = None,
    ) -> Reference:  # fmt: skip
        """Its outputs on a text, computed or read from the cache.

        Args:
            tokenizer: Its tokenizer.
            text: Documents, separated by ``<|endoftext|>``.
            context: Tokens in a window; None for 512, or for the number of positions if that is smaller.
            stride: Tokens from one window to the next.
            max_tokens: About the number of tokens to score.
            noise: Also measure the base in bf16.
            say: Receives messages.
            progress: Wraps lists of batches.
            cache: Folder of stored outputs; None for a folder in the Hugging Face cache.
        """
        context = context or self.context()
        if self._seq2seq():  # at most one half of every window is scored
            step = context if stride is None else stride
            most = None if max_tokens is None else max_tokens * step // max(1, min(step, context - context // 2))
            text_windows: Windows = second_halves(windows(tokenizer, text, context, most, stride), self.config())
        else:
            text_windows = windows(tokenizer, text, context, max_tokens, stride)
        return self.reference_on(
            text_windows, noise=noise, say=say, progress=progress, cache=cache, endings=self.endings(tokenizer)
        )

    def endings(self, tokenizer: Any) -> Endings:
        """Its tokens that end something."""
        return Endings.of(self.model, tokenizer, **self._hub())

    def reference_on(
        self, text: Windows | Samples, *, noise: bool = True, say: Callable[[str], None] = logger.info, progress: Progress = iter,
        cache: Path | None = None, endings: Endings = NO_ENDINGS,
    ) -> Reference:  # fmt: skip
        """The same for a text that is tokens already, or for batches of inputs; ``endings`` as in `cached_reference`."""
        self._refuse_unread(text)
        return cached_reference(
            self.load, f"{self.identity()} {self.circumstances()}", text,
            cache=cache or Path(HF_HOME) / "hf_quant" / "base", base_dtype=self.dtype, noise=means if noise else None,
            say=say, progress=progress, endings=endings,
        )  # fmt: skip

    def _refuse_unread(self, text: Windows | Samples) -> None:
        """Refuse what would be an index outside of one of its tables.

        Raises:
            HfQuantError: A token id is outside of the vocabulary, or there are more tokens than positions.
        """
        if isinstance(text, Windows):
            largest, most = int(text.ids.max()), self.vocabulary()
            if largest >= most:
                raise HfQuantError(
                    f"the tokenizer gives token id {largest}, and the vocabulary of {self.model} has {most}"
                )
        elif not self._seq2seq():
            every = [piece.inputs["input_ids"] for piece in text.pieces if "input_ids" in piece.inputs]
            self.refuse_longer(max((ids.shape[1] for ids in every), default=0))

    def _hub(self) -> dict[str, Any]:
        return hub_options({"revision": self.revision, "trust_remote_code": self.trust_remote_code or None})


def yardstick(
    base: Base, tokenizer: Any, text: Text, *,
    context: int | None = None, stride: int | None = None, max_tokens: int | None = None,
    gate: Budget | None = None, say: Callable[[str], None], progress: Progress = iter, cache: Path | None = None,
) -> Callable[[Any], Quality]:  # fmt: skip
    """A function that measures a model; the outputs of the base are computed here, or read from the cache.

    Args:
        base: The model to measure against.
        tokenizer: Of both models.
        text: Held-out documents, separated by ``<|endoftext|>``.
        context: Tokens in a window; None for 512, or for the number of positions if that is smaller.
        stride: Tokens from one window to the next.
        max_tokens: About the number of tokens to score.
        gate: Limits that the models will be held against.
        say: Receives messages.
        progress: Wraps lists of batches.
        cache: Folder of stored outputs; None for a folder in the Hugging Face cache.

    Raises:
        HfQuantError: The gate limits what is not measured of such a model.
    """
    if not base.predicts():
        return _of_encoder(
            base, lambda: passages(tokenizer, text, context or base.context(), max_tokens), gate, progress
        )
    _refuse_of_encoders(gate)
    base_outputs_on_disk = base.reference(
        tokenizer, text, context=context, stride=stride, max_tokens=max_tokens, say=say, progress=progress, cache=cache
    )
    return lambda model: evaluate(model, base_outputs_on_disk, progress)


def inputs_yardstick(
    base: Base, tokenizer: Any, batches: Sequence[Inputs], *,
    gate: Budget | None = None, say: Callable[[str], None], progress: Progress = iter, cache: Path | None = None,
) -> Callable[[Any], Quality]:  # fmt: skip
    """The same on batches of inputs, as `data.batches.checked_batches` returns them; ``tokenizer`` may be None."""
    model = base.skeleton()
    if not base.predicts():
        return _of_encoder(base, lambda: sample_passages(model, batches), gate, progress)
    _refuse_of_encoders(gate)
    stored = base.reference_on(
        samples(model, batches), say=say, progress=progress, cache=cache, endings=base.endings(tokenizer)
    )
    return lambda model: evaluate(model, stored, progress)


def _refuse_of_encoders(gate: Budget | None) -> None:
    """Refuse limits on what only models are measured by that predict no tokens."""
    (gate or Budget()).refuse_unmeasured(list(all_metrics()), "models that predict tokens")


def _of_encoder(
    base: Base, read: Callable[[], Passages], gate: Budget | None, progress: Progress
) -> Callable[[Any], Quality]:
    """Measures models that predict no tokens; limits on what is not measured of them are refused as early as that is known."""
    gate = gate or Budget()
    gate.refuse_unmeasured(("top1", "embedding_cosine"), "encoder models")
    if without_logits(base.kind()):
        gate.refuse_unmeasured(("embedding_cosine",), "an encoder without a head")
    texts = read()
    base_result = base_outputs(base.load, texts, base.dtype, progress)
    measured = measures_of(base_result["outputs"])
    gate.refuse_unmeasured(measured, f"an encoder without {'hidden states' if 'top1' in measured else 'a head'}")
    return lambda model: evaluate_encoder(model, base_result, texts, progress)
