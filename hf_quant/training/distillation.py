"""Distillation: a model learns the distributions of next tokens that a teacher gives (arXiv:1503.02531), and its hidden states
(TinyBERT, arXiv:1909.10351)."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.core.numerics import relative_error
from hf_quant.errors import PlanError

CACHED = 1 << 20  # logits that a core works on at a time: 4 MB in float32
IGNORED = -100  # a label that is not scored, in transformers
# What only the student is given.
STUDENTS = ("labels", "num_items_in_batch", "use_cache", "past_key_values", "cache", "output_hidden_states")


class Distillation:
    """The KL divergence from the teacher to the student, for ``Trainer(model=student, compute_loss_func=Distillation(student, teacher))``.

    Only the student trains. The teacher sees what the student was given last, so each needs a loss of its own where several
    students have one teacher.

    Args:
        student: A causal language model of transformers.
        teacher: Another one with the same vocabulary, on the same device.
        temperature: Logits of both are divided by it, and the loss is multiplied by its square.
        hidden_weight: While the student trains, `hidden_error` times this is added; the loss of an evaluation is the divergence
            alone. 3 helped short trainings of a rounded teacher, and long ones not (``benchmarks/distilled.py``).

    Raises:
        PlanError: One of them is no causal language model, or both are one, the vocabularies differ, the temperature is not a
            positive number, or the hidden states cannot be compared.
    """

    def __init__(self, student: Any, teacher: Any, *, temperature: float = 1.0, hidden_weight: float = 0.0) -> None:
        if not temperature > 0:
            raise PlanError(f"distillation: the temperature must be more than 0, got {temperature!r}")
        if not 0 <= hidden_weight < math.inf:
            raise PlanError(f"distillation: hidden_weight must be 0 or a positive number, got {hidden_weight!r}")
        if teacher is student:
            raise PlanError("distillation: the teacher is the model itself, which would be frozen: load it once more")
        for role, model in (("model", student), ("teacher", teacher)):
            _refuse_not_causal(role, model)
        sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise PlanError(
                f"distillation: the teacher has a vocabulary of {sizes[1]} tokens and the model one of {sizes[0]}: choose a teacher "
                "with the same tokenizer"
            )
        if hidden_weight:
            refuse_other_shape(student.config, teacher.config)
        self.teacher, self.temperature = teacher.eval().requires_grad_(False), temperature
        self.hidden_weight, self._hidden = hidden_weight, False
        self._given: dict[str, Any] = {}
        handle = student.register_forward_pre_hook(_Listener(self), with_kwargs=True)
        weakref.finalize(self, handle.remove)

    def _keep(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._given = {name: value for name, value in kwargs.items() if name not in STUDENTS}
        if args:
            self._given["input_ids"] = args[0]
        self._hidden = bool(self.hidden_weight) and student.training
        return args, kwargs | ({"output_hidden_states": True} if self._hidden else {})

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss per token that is scored: the divergence in nats, and what is added for hidden states.

        Args:
            outputs: Of the student, with ``logits [B, T, V]``.
            labels: int64 ``[B, T]``, of which -100 is not scored; None scores all tokens.
            num_items_in_batch: What the sum is divided by, where batches are accumulated; None for the tokens scored here.
        """
        if not self._given:
            raise PlanError(
                "distillation: the loss has not seen what the model was given: make it with the model that trains"
            )
        if not hasattr(outputs, "logits"):
            raise PlanError(
                f"distillation: the model returns {type(outputs).__name__} without logits: leave return_dict out"
            )
        with torch.no_grad():
            expected = self.teacher(**self._given, use_cache=False, output_hidden_states=self._hidden)
        given = outputs.logits[:, :-1]
        scored = torch.ones_like(given[..., 0], dtype=torch.bool) if labels is None else labels[:, 1:] != IGNORED
        total = divergence(given[scored], expected.logits[:, :-1][scored], self.temperature).sum()
        if self._hidden:
            states = ([state[:, :-1][scored] for state in hidden_states(model)] for model in (outputs, expected))
            total = total + self.hidden_weight * hidden_error(*states).sum()
        return total / (scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


class _Listener:
    """Hands what a model is given to its loss, as long as there is that; a copy of the model has one that hears nothing."""

    def __init__(self, loss: Distillation) -> None:
        self._loss = weakref.ref(loss)

    def __call__(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        loss = self._loss()
        return None if loss is None else loss._keep(student, args, kwargs)

    def __reduce__(self) -> Any:
        return _Deaf, ()


class _Deaf:
    def __call__(self, *_: Any) -> None:
        return None


def _refuse_not_causal(role: str, model: Any) -> None:
    """Refuse a model that does not say what token comes next, as far as it can be asked."""
    generates = getattr(model, "can_generate", None)
    if getattr(model.config, "is_encoder_decoder", False) or (generates is not None and not generates()):
        raise PlanError(
            f"distillation: the {role} is {type(model).__name__}, which is no causal language model, and distributions of next "
            "tokens are compared"
        )


def divergence(given: Tensor, expected: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of two distributions of next tokens, in log space: nats ``[P]``, float32 or wider.

    Args:
        given: Logits of the student ``[P, V]``, or ``[..., V]``.
        expected: Logits of the teacher, likewise; -inf for tokens that it rules out.
        temperature: Of both; the result is multiplied by its square, so that gradients keep their size.
    """
    rows = (logits.reshape(-1, logits.shape[-1]) for logits in (given, expected))
    nats: Tensor = _Divergence.apply(*rows, temperature)  # type: ignore[no-untyped-call]
    return nats.view(given.shape[:-1])


def hidden_states(outputs: Any) -> Sequence[Tensor]:
    """What each layer of a model gave, ``[B, T, d]``, without the embeddings.

    Raises:
        PlanError: It did not give them.
    """
    states = getattr(outputs, "hidden_states", None)
    if states is None:
        raise PlanError("distillation: the model returns no hidden states; with a hidden weight of 0 none are needed")
    return tuple(states[1:])


def hidden_error(given: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """Squared error of the hidden states of every token over their squared size, the mean of all layers.

    Args:
        given: Of the student: one ``[..., d]`` for each layer.
        expected: Of the teacher, likewise.

    Returns:
        float32 or wider, ``[...]``. Without the size that it is divided by, the few tokens with states a thousand times as large
        as others (arXiv:2402.17762) would be all that counts.
    """
    wide = torch.promote_types(given[0].dtype, torch.float32)
    pairs = zip(given, expected, strict=True)
    return torch.stack([relative_error(ours.to(wide), theirs.to(wide)) for ours, theirs in pairs]).mean(0)


def refuse_other_shape(student: Any, teacher: Any) -> None:
    """Refuse to compare hidden states that have not the same number and width.

    Args:
        student: Config of a model.
        teacher: Likewise.

    Raises:
        PlanError: Names what differs.
    """
    for name in ("num_hidden_layers", "hidden_size"):
        ours, theirs = (getattr(config.get_text_config(), name, None) for config in (student, teacher))
        if ours != theirs:
            raise PlanError(
                f"distillation: the teacher has a {name} of {theirs} and the model one of {ours}, so their hidden states cannot be "
                "compared; a hidden weight of 0 compares the distributions of tokens alone"
            )


class _Divergence(torch.autograd.Function):
    """`divergence`, some rows at a time: what is kept for the backward pass is the gradient, in the dtype of the logits, and on a
    CPU everything else stays in its cache."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, expected: Tensor, temperature: float) -> Tensor:
        nats = torch.empty(len(given), dtype=torch.promote_types(given.dtype, torch.float32), device=given.device)
        ctx.gradient = torch.empty_like(given) if ctx.needs_input_grad[0] else None
        size = max(1, CACHED // given.shape[-1]) if given.device.type == "cpu" else max(1, len(given))
        for rows in (slice(i, i + size) for i in range(0, len(given), size)):
            log_q, log_p = ((part[rows].to(nats.dtype) / temperature).log_softmax(-1) for part in (given, expected))
            p = log_p.exp()
            nats[rows] = (p * (log_p - log_q).masked_fill_(p == 0, 0)).sum(-1) * temperature**2
            if ctx.gradient is not None:
                ctx.gradient[rows] = log_q.exp_().sub_(p) * temperature
        return nats

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient * grad[:, None].to(ctx.gradient.dtype), None, None
