"""K-quants: the rule for scales of two levels beside one screen of plain Python, and what is said of what cannot work."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_quant.core.k_quants import COLUMNS, K_QUANTS, KQuant
from hf_quant.core.numerics import search
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.core.two_levels import holds
from hf_quant.errors import PlanError, SchemeError
from hf_quant.gguf.blocks import BLOCKS
from hf_quant.hf import HfQuantConfig
from hf_quant.methods import method
from hf_quant.solve.recipes import preset


def near(x: float) -> int:
    return round(x)  # to even, as torch does


def naive_code(w: float, s: float, o: float, kind: KQuant) -> int:
    half = 1 << kind.bits >> 1
    low, high = (0, 2 * half - 1) if kind.offset else (-half, half - 1)
    return min(max(near((w + o) / (s or 1)), low), high)


def naive_lost(group: list[float], weight: list[float], s: float, o: float, kind: KQuant) -> float:
    return sum(i * (naive_code(w, s, o, kind) * s - o - w) ** 2 for w, i in zip(group, weight, strict=True))


def naive_real(group: list[float], weight: list[float], kind: KQuant, steps: int, least: float) -> tuple[float, float]:
    """The best real scale and offset among the least-squares ones for shrunk ranges."""
    low, high, peak = min(0.0, *group), max(group), max(group, key=abs)
    half, best = 1 << kind.bits >> 1, (math.inf, 0.0, 0.0)
    for share in torch.linspace(1, least, steps).tolist():
        tries = [(peak * share / -half, 0.0), (peak * share / (half - 1), 0.0)]
        if kind.offset:
            tries = [((high - low) * share / (2 * half - 1), (high - low) / 2 * share - (high + low) / 2)]
        for s, o in tries:
            q = [naive_code(w, s, o, kind) for w in group]
            a, b, c, d, e = (sum(i * x for i, x in zip(weight, xs, strict=True)) for xs in (
                [1] * len(q), q, [x * x for x in q], group, [x * w for x, w in zip(q, group, strict=True)]))  # fmt: skip
            s, o = e / c, 0.0
            if kind.offset and (b * e - c * d) / (a * c - b * b) >= 0:
                s, o = (a * e - b * d) / (a * c - b * b), (b * e - c * d) / (a * c - b * b)
            best = min(best, (naive_lost(group, weight, s, o, kind), s, o), key=lambda tried: tried[0])
    return best[1:]


def naive_block(groups: list[list[float]], weight: list[list[float]], kind: KQuant) -> list[tuple[float, float]]:
    """Scale and zero point of each group of one block."""
    real = [naive_real(group, by, kind, 20, 0.6) for group, by in zip(groups, weight, strict=True)]
    peak = max((s for s, _ in real), key=abs) / (kind.scales[1] if kind.offset else kind.scales[0])
    d, dmin = (float(torch.tensor(x).half()) for x in (peak, max(o for _, o in real) / max(1, kind.offset)))
    chosen = []
    for group, by, (s, o) in zip(groups, weight, real, strict=True):
        tried = []
        for whole in (min(max(near(s / d) + step, kind.scales[0]), kind.scales[1]) or 1 for step in (0, -1, 1)):
            off = [naive_code(w, whole * d, o, kind) * whole * d - w for w in group]
            below = math.floor(sum(x * i for x, i in zip(off, by, strict=True)) / sum(by) / dmin) if kind.offset else 0
            for m in (min(max(below + up, 0), kind.offset) for up in (0, 1)):
                tried.append((naive_lost(group, by, whole * d, m * dmin, kind), whole * d, m * dmin))
        _, s, o = min(tried, key=lambda one: one[0])
        chosen.append((s, o / s if kind.offset else float(QuantScheme(kind.bits).zero)))
    return chosen


@pytest.mark.parametrize("name", K_QUANTS)
def test_the_rule_is_what_plain_python_makes_of_it(name: str) -> None:
    kind = K_QUANTS[name]
    groups = torch.randn(2, kind.groups, kind.group, dtype=torch.float64) * 0.02
    weight = torch.rand(kind.groups, kind.group, dtype=torch.float64) + 0.1
    scale, zero = search(groups, QuantScheme.of_blocks(name), torch.float32, 20, 0.6, weight)
    for row in range(2):
        expected = torch.tensor(naive_block(groups[row].tolist(), weight.tolist(), kind), dtype=torch.float64)
        torch.testing.assert_close(torch.cat((scale[row], zero[row]), 1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", K_QUANTS)
def test_the_data_are_those_of_the_files(name: str) -> None:
    kind, block, scheme = K_QUANTS[name], BLOCKS[name], QuantScheme.parse(name.lower())
    widths = [sum(plane.width for plane in planes) for planes in (block.scales, block.offsets)]
    least = -128 if block.signed else -block.zero_scale
    assert (kind.bits, kind.group, kind.offset) == (block.bits, block.group, (1 << widths[1]) - 1)
    assert kind.scales == (least, least + (1 << widths[0]) - 1)
    assert kind.bits_per_weight == 8 * block.size / block.weights and block.weights == COLUMNS
    assert str(scheme) == name and scheme.qmax - scheme.qmin == (1 << block.bits) - 1 and scheme.foreign is None


@pytest.mark.parametrize("name", K_QUANTS)
def test_scales_divided_too_far_are_not_held_any_more(name: str) -> None:
    """A transform divides the rows of quantized producers by powers of two: float16 ends before float32 does."""
    made = method("rtn").quantize(torch.randn(8, 512), QuantScheme.parse(name), torch.float16)
    assert holds(made.scale, made.zero_point, K_QUANTS[name]) and holds(
        made.scale / 2, made.zero_point, K_QUANTS[name]
    )
    assert not holds(made.scale / 2**14, made.zero_point, K_QUANTS[name])
    assert not holds(made.scale * 1.0001, made.zero_point, K_QUANTS[name])


def seen(k: int) -> InputStats:
    draw = torch.Generator().manual_seed(0)
    stats = InputStats.empty(k)
    stats.update(torch.randn(2048, k, generator=draw) @ (torch.eye(k) + torch.randn(k, k, generator=draw) / k**0.5))
    return stats


@pytest.mark.parametrize("name", K_QUANTS)
def test_gptq_beats_rounding_and_sweeps_beat_gptq(name: str) -> None:
    weight, stats, scheme = torch.randn(24, 512) * 0.02, seen(512), QuantScheme.parse(name)
    weight[3] = 0
    weight[4, :256] = 0.01
    plain, greedy, swept = (
        stats.error(
            weight, method(how, **more).quantize(weight, scheme, torch.bfloat16, stats).dequantize(torch.float32)
        )
        for how, more in (("rtn", {}), ("gptq", {}), ("gptq", {"sweeps": 2}))
    )
    assert swept < greedy < 0.8 * plain


@pytest.mark.parametrize(
    ("how", "match"), [("learned", "calibrated, gptq and rtn"), ("hqq", "calibrated, gptq and rtn")]
)
def test_methods_that_do_not_make_them_say_which_do(how: str, match: str) -> None:
    with pytest.raises(PlanError, match=match):
        preset(how, QuantScheme.parse("Q4_K"))


@pytest.mark.parametrize(
    "fields", [{"bits": 8}, {"group_size": 64}, {"outliers": 0.01}, {"blocks": "Q4_0"}, {"activations": "token"}]
)
def test_a_type_has_its_own_fields(fields: dict[str, Any]) -> None:
    own = {"bits": 4, "group_size": 32, "symmetric": False, "real_zero": True, "blocks": "Q4_K"}
    assert QuantScheme(**own) == QuantScheme.parse("Q4_K")
    with pytest.raises(SchemeError, match=r"Q4_K|blocks"):
        QuantScheme(**(own | fields))


def test_rows_that_blocks_do_not_divide_are_refused_with_what_works() -> None:
    import transformers as tf

    config = tf.LlamaConfig(
        vocab_size=32, hidden_size=256, intermediate_size=384, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    from hf_quant.hf.plan import make_plan

    with pytest.raises(PlanError, match=r"down_proj: blocks of Q4_K have 256 columns.*384; .*W8A16-g32"):
        make_plan(model, HfQuantConfig("Q4_K"))
    plan = make_plan(model, HfQuantConfig("Q4_K", overrides={"*.down_proj": "W8A16-g32"}))
    assert plan.format == "native" and "GGUF" in plan.format_reason
