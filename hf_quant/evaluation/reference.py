"""The base's outputs on a text or on batches of inputs, stored on disk: computed once, one or two kilobytes a token.

Only the most likely tokens and a sample of the others are stored (`metrics.BaseTokens`). For a vocabulary of 150,000 that is
400 times less than all logits, and the estimate of the KL divergence is unbiased with a known error.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hf_quant.data.text import Windows
from hf_quant.disk.atomic import write_json
from hf_quant.disk.folders import staged
from hf_quant.errors import HfQuantError
from hf_quant.evaluation.endings import NO_ENDINGS, Endings
from hf_quant.evaluation.metrics import BaseTokens
from hf_quant.evaluation.metrics.kl import log_mass_without
from hf_quant.evaluation.pieces import Piece, of_windows
from hf_quant.evaluation.samples import Samples
from hf_quant.hf.auto import vocabulary_of

VERSION = 3  # of the files: increased whenever their numbers change
TOP, SAMPLES = 128, 64
LOGITS = 1 << 26  # bytes of logits in one forward pass, in float32
META = "meta.json"

Progress = Callable[[Iterable[Any]], Iterable[Any]]
Load = Callable[[torch.dtype], Any]
Measure = Callable[[Any, "Reference"], dict[str, float]]


@dataclass(frozen=True)
class Part:
    """A piece with the base's outputs for it."""

    piece: Piece
    base: BaseTokens


@dataclass(frozen=True)
class Reference:
    """The stored outputs of a base.

    Attributes:
        folder: Where they are stored.
        windows: The text, or batches of inputs.
        meta: What `META` holds: vocabulary, base_dtype, batch, noise, and a checksum of every part.
    """

    folder: Path
    windows: Windows | Samples
    meta: dict[str, Any]

    @cached_property
    def pieces(self) -> list[Piece]:
        """What the parts are about."""
        return pieces_of(self.windows, self.meta["batch"])

    def __iter__(self) -> Iterator[Part]:
        """The parts, in order.

        Raises:
            HfQuantError: A part is damaged.
        """
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Part:
        return Part(self.pieces[number], _read(self.folder / _name(number), self.meta["parts"][number]))

    def __len__(self) -> int:
        return len(self.meta["parts"])


def pieces_of(windows: Windows | Samples, rows: int) -> list[Piece]:
    """What goes through a model at once: ``rows`` windows, or a batch as it is."""
    return list(windows.pieces) if isinstance(windows, Samples) else of_windows(windows, rows)


def cached_reference(
    load_base: Load, identity: str, windows: Windows | Samples, *,
    cache: Path, base_dtype: torch.dtype, noise: Measure | None, say: Callable[[str], None], progress: Progress = iter,
    endings: Endings = NO_ENDINGS,
) -> Reference:  # fmt: skip
    """The outputs of the base on ``windows``, read from the cache or computed.

    Args:
        load_base: Loads the base in a dtype; the model is freed before this returns.
        identity: Of the base (a commit, or a digest of its files) and of what computes its outputs (`Base.circumstances`).
        windows: What to measure on.
        cache: Folder of all stored outputs.
        base_dtype: What the base computes in.
        noise: Measures the base in bf16 against itself; None skips that, and so does a base in bf16.
        say: Told if the stored outputs are damaged.
        progress: Wraps lists of batches.
        endings: Tokens whose probability is kept at every position, if the text has some of their kind.
    """
    endings = endings.in_text(windows)
    key = hashlib.sha256(
        f"{VERSION} {identity} {base_dtype} {windows.sha256} {TOP} {SAMPLES} {noise is None} {endings}".encode()
    ).hexdigest()
    folder = cache / key[:32]
    if folder.is_dir():
        try:
            cached = Reference(folder, windows, json.loads((folder / META).read_text()))
            for _ in cached:  # check all parts now, and not after minutes
                pass
        except (OSError, ValueError, KeyError, TypeError, HfQuantError) as error:
            say(f"cached outputs of the base are damaged ({error}): computing them again")
            shutil.rmtree(folder, ignore_errors=True)
        else:
            return cached
    with staged(folder, overwrite=True) as stage:
        computed = _compute(load_base(base_dtype), stage, windows, endings, base_dtype, progress)
        if noise is not None and base_dtype is not torch.bfloat16:
            computed.meta["noise"] = noise(load_base(torch.bfloat16), computed)
        write_json(stage / META, computed.meta)
    return Reference(folder, windows, computed.meta)


def require_predictions(model: Any) -> None:
    """Raise an `HfQuantError` if ``model`` does not predict next tokens."""
    if not model.can_generate():
        raise HfQuantError(f"{type(model).__name__} predicts no next tokens")


@torch.inference_mode()
def _compute(
    model: Any, folder: Path, windows: Windows | Samples, endings: Endings, dtype: torch.dtype, progress: Progress
) -> Reference:
    require_predictions(model)
    vocabulary = vocabulary_of(model.config)
    batch = max(1, LOGITS // (windows.context * vocabulary * 4))
    draw = torch.Generator().manual_seed(0)
    checksums = []
    for i, piece in enumerate(progress(pieces_of(windows, batch))):
        log_p = log_probabilities(model, piece)
        data = save(_stored(compact(log_p, piece.target, draw, endings)))
        (folder / _name(i)).write_bytes(data)
        checksums.append(zlib.crc32(data))
    meta = {
        "version": VERSION, "vocabulary": log_p.shape[-1], "base_dtype": str(dtype).removeprefix("torch."),
        "batch": batch, "noise": {}, "parts": checksums,
    }  # fmt: skip
    return Reference(folder, windows, meta)


def log_probabilities(model: Any, piece: Piece) -> Tensor:
    """Log-probabilities of the tokens at the scored positions: float64 ``[P, V]`` on the CPU; -inf for masked tokens.

    Args:
        model: A model that predicts tokens.
        piece: What it is given.

    Raises:
        HfQuantError: Logits are not finite (-inf is allowed: it masks a token, as padding of the vocabulary is masked);
            names the row and the module that gave the first such value.
    """
    every = piece.logits(model)
    logits = every[piece.scored.to(every.device)]
    bad = (logits.isnan() | (logits == torch.inf) | (logits == -torch.inf).all(-1, True)).any(-1).nonzero()
    if len(bad):
        origin = first_not_finite(model, piece)
        raise HfQuantError(f"logits of {type(model).__name__} are not finite in {piece.row(int(bad[0]))}: {origin}")
    return logits.cpu().double().log_softmax(-1)  # on the CPU, since not every device has float64


def first_not_finite(model: Any, piece: Piece) -> str:
    """A sentence that names the first module whose output for ``piece`` is NaN or infinite."""
    names: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(_module: Any, _args: Any, output: Any) -> None:
            if not names and isinstance(output, Tensor) and not output.isfinite().all():
                names.append(name)

        return look

    leaves = [(name, m) for name, m in model.named_modules() if not next(m.children(), None)]
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    try:
        piece.logits(model)
    finally:
        for handle in handles:
            handle.remove()
    return f"{names[0]} is the first module whose output is not" if names else "every module's output is"


def compact(log_p: Tensor, target: Tensor, draw: torch.Generator, endings: Endings = NO_ENDINGS) -> BaseTokens:
    """What is stored of the log-probabilities ``[P, V]`` (float64) of the base, and of the tokens ``[P]`` of the text."""
    vocabulary = log_p.shape[-1]
    top, top_ids = log_p.topk(vocabulary if vocabulary <= TOP + SAMPLES else TOP, -1)
    came = log_p.gather(-1, target[:, None]).squeeze(-1)
    stop, end_of_thought = (
        torch.tensor(ids, dtype=torch.int64).repeat(len(log_p), 1) for ids in (endings.stop, endings.end_of_thought)
    )
    exact = (came, stop, log_p.gather(-1, stop), end_of_thought, log_p.gather(-1, end_of_thought))
    if top.shape[-1] == vocabulary:
        nothing, no_mass = top.new_empty(len(top), 0), top.new_full((len(top),), -torch.inf)
        return BaseTokens(top_ids, top, nothing.long(), nothing, no_mass, *exact)
    mass = log_mass_without(log_p, top_ids)
    # the logarithm is shifted first, so that a tail of 1e-300 can be sampled like any other
    inside = (log_p - mass.clamp(min=torch.finfo(mass.dtype).min)[:, None]).exp_().scatter_(-1, top_ids, 0)
    reached = inside.cumsum_(-1)
    steps = (torch.arange(SAMPLES) + torch.rand(len(top), 1, generator=draw, dtype=torch.float64)) / SAMPLES
    targets = (steps * reached[:, -1:]).clamp(min=torch.finfo(torch.float64).tiny)
    tail_ids = torch.searchsorted(reached, targets).clamp(max=vocabulary - 1)  # past the end where there is no tail
    return BaseTokens(top_ids, top, tail_ids, log_p.gather(-1, tail_ids), mass, *exact)


def _stored(base: BaseTokens) -> dict[str, Tensor]:
    """In half the space: a logarithm in float32 has seven digits, however small the probability."""
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor.int() for name, tensor in vars(base).items()
    }


def _name(i: int) -> str:
    return f"part-{i:05d}.safetensors"


def _read(path: Path, checksum: int) -> BaseTokens:
    data = path.read_bytes()
    if zlib.crc32(data) != checksum:
        raise HfQuantError(f"{path.name}: wrong checksum")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise HfQuantError(f"{path.name}: {error}") from None
    return BaseTokens(**{name: t.double() if t.is_floating_point() else t.long() for name, t in tensors.items()})
