"""KL divergence from what is kept of the base, beside that of full logits in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_quant.evaluation.metrics import BaseTokens
from hf_quant.evaluation.metrics.kl import kl
from hf_quant.evaluation.reference import SAMPLES, TOP, _stored, compact

NOTHING = torch.zeros(0)


def kept(log_p: Tensor, seed: int = 0) -> BaseTokens:
    """What a cache on disk gives back."""
    base = compact(log_p, log_p.argmax(-1), torch.Generator().manual_seed(seed))
    return BaseTokens(**{name: t.double() if t.is_floating_point() else t.long() for name, t in _stored(base).items()})


def exact(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL of each row, and the variance that drawing `SAMPLES` tokens of the tail independently would give it."""
    zero = log_p == -torch.inf
    value = (log_p.exp() * (log_p - log_q)).masked_fill(zero, 0).sum(-1)
    if log_p.shape[-1] <= TOP + SAMPLES:
        return value, torch.zeros_like(value)
    top = log_p.topk(TOP, -1).indices
    p, q = (each.scatter(-1, top, -torch.inf) for each in (log_p, log_q))
    mass = p.logsumexp(-1, keepdim=True)
    log_r = (q - q.logsumexp(-1, keepdim=True)) - (p - mass)
    nothing = (p == -torch.inf) | (mass == -torch.inf)
    inside, term = (p - mass).exp().masked_fill(nothing, 0), (log_r.expm1() - log_r).masked_fill(nothing, 0)
    mean = (inside * term).sum(-1, keepdim=True)
    return value, mass.squeeze(-1).exp().square() * (inside * (term - mean).square()).sum(-1) / SAMPLES


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    vocabulary=st.sampled_from([100, 193, 1000, 32_000, 256_000]),
    peak=st.floats(0, 60),
    other=st.sampled_from(["near", "nearer", "flat", "peaked elsewhere", "itself"]),
    masked=st.sampled_from([0.0, 0.1, 0.9]),
    turned=st.booleans(),
    seed=st.integers(0, 99),
)
def test_kl_is_that_of_full_logits(
    vocabulary: int, peak: float, other: str, masked: float, turned: bool, seed: int
) -> None:
    """From flat to 60 nats of certainty, with tokens ruled out, either of the two being the certain one."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, vocabulary, generator=draw, dtype=torch.float64)
    noise = torch.randn(2, vocabulary, generator=draw, dtype=torch.float64)
    logits[:, 5] += peak
    model = {
        "near": logits + 0.3 * noise, "nearer": logits + 1e-3 * noise, "itself": logits, "flat": noise,
        "peaked elsewhere": logits.roll(1, -1),
    }[other].clone()  # fmt: skip
    ruled_out = vocabulary - int(masked * vocabulary)
    logits[:, ruled_out:] = model[:, ruled_out:] = -torch.inf
    log_p, log_q = (each.log_softmax(-1) for each in ((model, logits) if turned else (logits, model)))
    got, _ = kl(kept(log_p, seed), log_q, NOTHING)
    want, variance = exact(log_p, log_q)
    assert (got >= 0).all()
    assert ((got - want).abs() <= 1e-3 * want + 1e-11 + 6 * variance.sqrt()).all(), (got, want, variance.sqrt())


@pytest.mark.parametrize("peak", [20, 26, 34, 60, 800])
def test_confident_tokens_cost_what_they_cost(peak: float) -> None:
    """Where all others together weigh less than the spacing of float32 around 1."""
    torch.manual_seed(0)
    logits = torch.randn(16, 32000)
    logits[:, 5] += peak
    log_p, log_q = (each.double().log_softmax(-1) for each in (logits, logits + 0.01 * torch.randn(16, 32000)))
    (got, variance), (want, _) = kl(kept(log_p), log_q, NOTHING), exact(log_p, log_q)
    error = 5 * variance.sum().sqrt().item() / 16 + 1e-16  # float64 itself rounds there
    assert error < max(0.3 * want.mean().item(), 2e-16)
    assert got.mean().item() == pytest.approx(want.mean().item(), abs=error)


def test_certainty_and_its_opposite() -> None:
    """One token with all probability, against a model that has no idea."""
    certain = torch.full((1, 300), -torch.inf, dtype=torch.float64)
    certain[0, 5] = 0
    flat = torch.zeros(1, 300).double().log_softmax(-1)
    assert kl(kept(certain), flat, NOTHING)[0].item() == pytest.approx(math.log(300))
    assert kl(kept(certain), certain, NOTHING)[0].item() == 0
    assert kl(kept(flat), certain, NOTHING)[0].item() == math.inf


def test_sampling_the_tail_is_unbiased() -> None:
    """Over many draws the mean is the exact KL, and its scatter what the variance says."""
    torch.manual_seed(0)
    log_p = torch.randn(1, 4096).double().log_softmax(-1).expand(500, -1).contiguous()
    log_q = (log_p[:1] + 0.1 * torch.randn(1, 4096)).log_softmax(-1).expand(500, -1)
    base = kept(log_p)
    assert base.tail.shape == (500, 64) and 0.5 < base.tail_mass[0].exp() < 1
    got, variance = kl(base, log_q, NOTHING)
    want = exact(log_p[:1], log_q[:1])[0].item()
    assert got.mean().item() == pytest.approx(want, abs=4 * got.std().item() / 500**0.5)
    assert got.std().item() < 0.25 * want
    assert 0.6 * variance.mean() < got.var() < 1.1 * variance.mean()  # even steps scatter a little less than free ones


def test_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).double(), torch.tensor([[0.25, 0.25, 0.5]]).double()
    assert kl(kept(p.log()), q.log(), NOTHING)[0].item() == pytest.approx(0.25 * math.log(2))
