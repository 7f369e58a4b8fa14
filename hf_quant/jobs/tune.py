"""End to end: the scales of a quantized model are trained until it says what its base says; its codes stay as they are.

As in EfficientQAT's second phase (arXiv:2407.11062) and MLX's DWQ, with the divergence from the base's distributions of next
tokens as the loss. These come from the cache that evaluation keeps, so the base is not in memory meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.data.calibration import Calibration
from hf_quant.data.held_windows import held_from_learning
from hf_quant.data.text import Windows
from hf_quant.disk.atomic import put
from hf_quant.disk.safetensors import TORCH, write_tensors
from hf_quant.errors import HfQuantError
from hf_quant.evaluation.metrics import BaseTokens
from hf_quant.evaluation.metrics.kl import kl
from hf_quant.evaluation.pieces import Piece
from hf_quant.evaluation.reference import Part, Reference, log_probabilities
from hf_quant.evaluation.yardstick import Base
from hf_quant.hf import load
from hf_quant.nn import QuantExperts, QuantMatrix
from hf_quant.training.scales import Moving, trainable_scales

WARM, LAST = 10, 0.05  # steps until the learning rate is reached, and the share of it that is left in the end
PATIENCE = 3  # steps in a row without a finite loss
PASSES, ENOUGH = 4, 450  # over a text, unless fewer are as many steps as this


@dataclass(frozen=True)
class Tuning:
    """How to train scales.

    Attributes:
        epochs: Passes over the text; None for four, or for fewer over a long one.
        scales: Learning rate, relative to each scale.
        seed: Of the order of the text.
    """

    epochs: int | None = None
    scales: float = 0.002
    seed: int = 0


@dataclass(frozen=True)
class Tuned:
    """What became of it: KL divergence to the base on the windows held out, nats per token.

    ``method="learned"`` keeps these windows from everything before, too. Codes that another method, or another program, has
    calibrated on the same text have seen them: then the divergence on a text that nothing has seen is larger.

    Attributes:
        before: With the scales as they were.
        after: With those that are kept; the same number where no pass was better.
        skipped: Steps without a finite loss.
        tuning: How it was done, with the passes that it took.
    """

    before: float
    after: float
    skipped: int
    tuning: Tuning

    def to_dict(self) -> dict[str, Any]:
        """For the recipe."""
        return {"kl_before": self.before, "kl_after": self.after, "skipped": self.skipped, **asdict(self.tuning)}


def windows_of(data: Calibration) -> Windows:
    """All tokens of a calibration text, as something that a base is asked about."""
    number = torch.arange(len(data.ids))[:, None].expand(data.ids.shape)
    return Windows(data.ids, number, torch.ones_like(data.ids[:, 1:], dtype=torch.bool), data.ids.shape[1])


def tune_checkpoint(
    folder: Path, base: Base, data: Calibration, tuning: Tuning, options: dict[str, Any], say: Callable[[str], None]
) -> Tuned:
    """`tune` the model in ``folder``, whose files of weights are written anew where that helps.

    Args:
        folder: Of a model in a format of this package; nobody else may read it yet.
        base: What it was made from; run once, in memory, before the model is loaded.
        data: The text.
        tuning: How.
        options: For loading.
        say: Told of every pass.
    """
    reference = base.reference_on(windows_of(data), noise=False, say=say)
    stored = {name: TORCH[info.dtype] for name, info in Checkpoint.open(folder).tensors.items()}
    model = load(str(folder), dtype=torch.float32, **options).eval()
    tuned = tune(model, reference, tuning, say, stored)
    if tuned.after < tuned.before:
        store_scales(model, folder)
    return tuned


def store_scales(model: nn.Module, folder: Path) -> None:
    """Put the scales of ``model`` in place of those of its checkpoint, in the dtype that they have there.

    No file changes that something else may link to.

    Raises:
        HfQuantError: The checkpoint has no such tensor; names it.
    """
    scales = {
        f"{name}.{weight}_scale": module._quantized(weight).parts(weight)[f"{weight}_scale"].cpu()
        for name, module in model.named_modules()
        if isinstance(module, (QuantMatrix, QuantExperts))
        for weight in module._schemes()
    }
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        tuned = {name: scales.pop(name).to(tensors[name].dtype) for name in tensors if name in scales}
        wrong = next((name for name in tuned if tuned[name].shape != tensors[name].shape), None)
        if wrong is not None:
            raise HfQuantError(f"{file.name}: {wrong} has shape {list(tensors[wrong].shape)}, not that of its layer")
        if tuned:
            put(file, lambda draft, updated=tensors | tuned: write_tensors(draft, updated))  # type: ignore[misc]
    if scales:
        raise HfQuantError(f"{folder.name}: no tensor {min(scales)}, whose new values would be lost")


def tune(
    model: Any, reference: Reference, tuning: Tuning, say: Callable[[str], None],
    stored: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> Tuned:  # fmt: skip
    """Train the scales of ``model``, in place, and keep those with the least divergence on the windows held out.

    Args:
        model: Quantized; a causal language model.
        reference: The stored outputs of the base on a text.
        tuning: How.
        say: Told of every pass.
        stored: What its tensors are stored in, by name, where that is not the dtype they have in the model: what is trained is
            rounded to it in every step.

    Raises:
        HfQuantError: The vocabularies differ, the model has no scales, or the loss is not finite again and again.
    """
    if (vocabulary := model.config.get_text_config().vocab_size) != reference.meta["vocabulary"]:
        raise HfQuantError(f"vocabularies differ: {vocabulary} tokens, the base has {reference.meta['vocabulary']}")
    stored = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)} | dict(
        stored
    )
    steps = sum(len(_training(reference, number)) for number in range(len(reference)))
    epochs = tuning.epochs or min(PASSES, max(1, round(ENOUGH / steps)))
    with trainable_scales(model) as scales:
        if not scales:
            raise HfQuantError(f"{type(model).__name__}: no quantized layers, so there are no scales to train")
        tensors = [Moving(scale, stored[name]) for name, scale in scales.items()]
        before = least = _divergence(model, reference)
        best, skipped = [tensor.parameter.data.clone() for tensor in tensors], 0
        for epoch, failed in enumerate(_passes(model, reference, tensors, tuning, epochs * steps)):
            skipped += failed
            held = _divergence(model, reference)
            say(
                f"scales, pass {epoch + 1} of {epochs}: KL {held:.5f} on windows not trained on, {before:.5f} at first"
            )
            if held < least:
                least, best = held, [tensor.parameter.data.clone() for tensor in tensors]
        for tensor, value in zip(tensors, best, strict=True):
            tensor.parameter.data.copy_(value)
    return Tuned(before, least, skipped, replace(tuning, epochs=epochs))


def _passes(
    model: Any, reference: Reference, tensors: list[Moving], tuning: Tuning, steps: int
) -> Iterator[int]:  # fmt: skip
    """Train for ``steps`` steps, and stop after every pass for a look at the result; yields how many were skipped in it."""
    optimizer = torch.optim.Adam([tensor.moved for tensor in tensors], betas=(0.9, 0.95))
    step, failed = 0, 0
    draw = torch.Generator().manual_seed(tuning.seed)
    while step < steps:
        skipped = 0
        for number in torch.randperm(len(reference), generator=draw).tolist():
            part = reference[number]
            for rows in _training(reference, number).split(1):  # small steps, and many of them
                loss = _loss(model, _selected(part, rows))
                loss.backward()
                finite = all([math.isfinite(loss.item()), *(tensor.take() for tensor in tensors)])
                failed, skipped = (0, skipped) if finite else (failed + 1, skipped + 1)
                if failed == PATIENCE:
                    raise HfQuantError(f"the loss of the trained scales is not finite, {PATIENCE} steps in a row")
                if finite:
                    optimizer.param_groups[0]["lr"] = tuning.scales * _rate(step, steps)
                    optimizer.step()
                    for tensor in tensors:
                        tensor.put()
                step += 1
        yield skipped


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM) * (LAST + (1 - LAST) * (1 + math.cos(math.pi * step / steps)) / 2)


def _held(reference: Reference, number: int) -> Tensor:
    """bool ``[B]``: which windows of a part are held out; of very few, the last one."""
    piece = reference.pieces[number]
    return held_from_learning(_windows(reference))[piece.first : piece.first + len(piece.scored)]


def _windows(reference: Reference) -> int:
    return sum(len(piece.scored) for piece in reference.pieces)


def _training(reference: Reference, number: int) -> Tensor:
    """Rows of a part that are learned from."""
    held = _held(reference, number)
    return (~held).nonzero().flatten() if _windows(reference) > 1 else held.nonzero().flatten()


def _selected(part: Part, rows: Tensor) -> Part:
    """Some windows of a part."""
    piece = part.piece
    mask = torch.zeros(len(piece.scored), dtype=torch.bool).index_fill_(0, rows, True)
    positions = mask[:, None].expand(piece.scored.shape)[piece.scored]
    base = BaseTokens(**{name: tensor[positions] for name, tensor in vars(part.base).items()})
    inputs = {name: tensor[mask] for name, tensor in piece.inputs.items()}
    selected = Piece(inputs, piece.scored[mask], piece.target[positions], piece.inside[positions], piece.first)
    return Part(selected, base)


@torch.enable_grad()
def _loss(model: Any, part: Part) -> Tensor:
    """Cross-entropy with the base's distributions, the mean of all positions: its gradient is that of the divergence."""
    logits = part.piece.logits(model)
    log_q = logits[part.piece.scored.to(logits.device)].float().log_softmax(-1)
    base = BaseTokens(**{name: tensor.to(log_q.device) for name, tensor in vars(part.base).items()})
    lost = _expected(base.top.exp().float(), log_q.gather(-1, base.top_ids))
    if base.tail_ids.shape[-1]:
        share = (base.tail_mass.exp() / base.tail_ids.shape[-1]).float()[:, None]
        lost = lost + _expected(share.expand(base.tail_ids.shape), log_q.gather(-1, base.tail_ids))
    return lost.mean()


def _expected(p: Tensor, log_q: Tensor) -> Tensor:
    return -(p * log_q.masked_fill(p == 0, 0)).sum(-1)


@torch.no_grad()
def _divergence(model: Any, reference: Reference) -> float:
    """Mean KL divergence from the base on the windows held out, nats per token."""
    total, count = 0.0, 0
    for number in range(len(reference)):
        rows = _held(reference, number).nonzero().flatten()
        if len(rows):
            part = _selected(reference[number], rows)
            value, _ = kl(part.base, log_probabilities(model, part.piece), part.piece.target)
            total, count = total + float(value.sum()), count + len(value)
    return total / count
