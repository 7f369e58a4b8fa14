"""The divergence from a teacher, and what is refused as one."""

from __future__ import annotations

import copy
import math
import pickle
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_quant.errors import PlanError
from hf_quant.training import Distillation
from hf_quant.training.distillation import divergence, hidden_error, hidden_states


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
        shape = SimpleNamespace(vocab_size=vocabulary, num_hidden_layers=2, hidden_size=vocabulary)
        self.config = SimpleNamespace(get_text_config=lambda: shape)
        self.seen: list[dict[str, Any]] = []

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False, **kwargs: Any) -> Any:
        self.seen.append(kwargs)
        row = self.table(input_ids)
        return SimpleNamespace(logits=row, hidden_states=(row, row.tanh(), row) if output_hidden_states else None)


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


def test_hidden_states_count_while_the_student_trains() -> None:
    student, teacher, ids = Toy(11), Toy(11), torch.randint(0, 11, (2, 5))
    labels = ids.clone()
    labels[0, :3] = -100
    plain, both = Distillation(student, teacher), Distillation(student, teacher, hidden_weight=2.5)
    outputs = student(input_ids=ids)
    errors = []
    for row, at in ((row, at) for row in range(2) for at in range(4) if labels[row, at + 1] != -100):
        pairs = [
            (state[row, at].tolist(), expected[row, at].tolist())
            for state, expected in zip(outputs.hidden_states[1:], teacher(ids, True).hidden_states[1:], strict=True)
        ]
        errors += [
            sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) / sum(b * b for b in pair[1]) for pair in pairs
        ]
    made = both(outputs, labels)
    assert made.item() == pytest.approx(plain(outputs, labels).item() + 2.5 * sum(errors) / len(errors), rel=1e-5)
    made.backward()
    assert student.table.weight.grad is not None and teacher.table.weight.grad is None
    outputs = student.eval()(input_ids=ids)
    assert outputs.hidden_states is None
    torch.testing.assert_close(both(outputs, labels), plain(outputs, labels))


def test_a_large_token_counts_as_much_as_another() -> None:
    expected = torch.randn(2, 3, 8, dtype=torch.float64)
    given = (expected * 1.1).requires_grad_()
    scale = torch.tensor([1.0, 1.0, 3000.0]).double()[:, None]
    torch.testing.assert_close(hidden_error([given * scale], [expected * scale]), torch.full((2, 3), 0.01).double())
    assert hidden_error([torch.zeros(1, 4)], [torch.zeros(1, 4)]).item() == 0
    torch.autograd.gradcheck(lambda x: hidden_error([x, x**2], [expected, expected]), (given,))


def test_copies_of_a_student_leave_the_teacher_behind() -> None:
    student, teacher, ids = Toy(11), Toy(11), torch.randint(0, 11, (2, 5))
    loss = Distillation(student, teacher, hidden_weight=1.0)
    (hook,) = student._forward_pre_hooks.values()
    assert len(pickle.dumps(hook)) < 200 and pickle.loads(pickle.dumps(hook))(student, (), {}) is None
    outputs = copy.deepcopy(student)(input_ids=ids)
    assert outputs.hidden_states is None  # the copy asks for nothing
    with pytest.raises(PlanError, match="has not seen what the model was given"):
        loss(outputs, ids)
    assert student(input_ids=ids).hidden_states is not None
    kept = weakref.ref(teacher)
    del loss, teacher
    assert kept() is None and not student._forward_pre_hooks
    assert student(input_ids=ids).hidden_states is None


def test_what_cannot_teach_is_refused() -> None:
    same, ids = Toy(11), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(PlanError, match="load it once more"):
        Distillation(same, same)
    masked, other = Toy(11), Toy(11)
    masked.can_generate = lambda: False  # type: ignore[assignment]
    with pytest.raises(PlanError, match="the model is Toy, which is no causal language model"):
        Distillation(masked, other)
    masked.config.is_encoder_decoder, masked.can_generate = True, lambda: True  # type: ignore[assignment]
    with pytest.raises(PlanError, match="the teacher is Toy, which is no causal language model"):
        Distillation(other, masked)
    loss = Distillation(same, other)
    same(ids)
    with pytest.raises(PlanError, match="returns tuple without logits: leave return_dict out"):
        loss((same(ids).logits,), ids)
    with pytest.raises(PlanError, match="teacher has a vocabulary of 12 tokens and the model one of 11"):
        Distillation(Toy(11), Toy(12))
    with pytest.raises(PlanError, match="temperature"):
        Distillation(Toy(11), Toy(11), temperature=0.0)
    with pytest.raises(PlanError, match="hidden_weight must be 0 or a positive number"):
        Distillation(Toy(11), Toy(11), hidden_weight=-1.0)
    wide = Toy(11)
    wide.config.get_text_config().hidden_size = 12
    Distillation(wide, Toy(11))
    with pytest.raises(PlanError, match="teacher has a hidden_size of 11 and the model one of 12"):
        Distillation(wide, Toy(11), hidden_weight=1.0)
    with pytest.raises(PlanError, match="returns no hidden states; with a hidden weight of 0"):
        hidden_states(SimpleNamespace(logits=torch.zeros(1)))
