"""The divergence from a teacher, and what is refused as one."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_quant.errors import PlanError
from hf_quant.training import Distillation
from hf_quant.training.distillation import divergence


def naive(given: Tensor, expected: Tensor, temperature: float) -> float:
    """Of one token."""

    def probabilities(logits: Tensor) -> list[float]:
        weights = [math.exp(logit / temperature) for logit in logits.tolist()]
        return [weight / sum(weights) for weight in weights]

    p, q = probabilities(expected), probabilities(given)
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def test_divergence() -> None:
    given, expected = torch.randn(2, 4, 9, dtype=torch.float64)
    expected[1, 3] = -torch.inf
    made = divergence(given, expected, 2.0)
    for row in range(4):
        assert made[row].item() == pytest.approx(naive(given[row], expected[row], 2.0))
    given[2, 5] = expected[2, 5] = -torch.inf  # padding of the vocabulary, which both rule out
    given.requires_grad_()
    divergence(given, expected).sum().backward()
    assert given.grad is not None and given.grad.isfinite().all()
    assert divergence(expected, expected).abs().max() < 1e-12
    finite = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda logits: divergence(logits, expected[:3, :7].clamp(min=-9), 0.5), (finite,))


class Toy(nn.Module):
    """As much of a language model as a teacher needs."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=vocabulary))
        self.seen: list[dict[str, Any]] = []

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        self.seen.append(kwargs)
        return SimpleNamespace(logits=self.table(input_ids))


def test_the_teacher_sees_what_the_student_was_given() -> None:
    student, teacher, ids = Toy(11), Toy(11), torch.randint(0, 11, (2, 5))
    loss = Distillation(student, teacher)
    labels = ids.clone()
    labels[0, :3] = -100
    mask = torch.ones_like(ids)
    outputs = student(input_ids=ids, attention_mask=mask, labels=labels)
    made = loss(outputs, labels)
    assert teacher.seen[0].keys() == {"attention_mask", "use_cache"}
    parts = [
        divergence(student.table(ids[row, at]), teacher.table(ids[row, at]))
        for row in range(2) for at in range(4) if labels[row, at + 1] != -100
    ]  # fmt: skip
    assert len(parts) == 6
    torch.testing.assert_close(made, torch.stack(parts).mean())
    torch.testing.assert_close(loss(outputs, labels, num_items_in_batch=3), torch.stack(parts).sum() / 3)
    made.backward()
    assert student.table.weight.grad is not None and teacher.table.weight.grad is None


def test_what_cannot_teach_is_refused() -> None:
    with pytest.raises(PlanError, match="teacher has a vocabulary of 12 tokens and the model one of 11"):
        Distillation(Toy(11), Toy(12))
    with pytest.raises(PlanError, match="temperature"):
        Distillation(Toy(11), Toy(11), temperature=0.0)
