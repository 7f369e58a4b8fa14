"""Run by test_rounding.py with HF_QUANT_CPU_LEVEL set: scales and codes beside PyTorch's, and errors in float64."""

import json
import sys
from itertools import cycle

import torch

from hf_quant.core import numerics, packing, rounding
from hf_quant.core.scheme import QuantScheme
from hf_quant.kernels._native import compiled

SCHEMES = (
    "W4A16-g128", "W4A16-g128-asym", "W3A16-g64", "W3A16-g16-asym", "W2A16-g16", "W2A16-g64-asym", "W8A16-g32",
    "W8A16-g-1-asym", "W8A8", "W5A16-g32", "W7A16-g-1",
)  # fmt: skip
WIDTHS = ((3, 576), (1, 960), (2, 4864), (7, 32), (70, 256))
torch.manual_seed(0)
own = torch.Tensor.new_empty, torch.empty


def spoilt(tensor):
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(1)


torch.empty = lambda *a, **k: spoilt(own[1](*a, **k))


def weights(n, k):
    """Kinds of weights, float32."""
    normal = torch.randn(n, k) * 0.02
    yield "normal", normal
    yield "peaked", torch.randn(n, k) * torch.rand(n, k).pow(8)
    yield "outliers", torch.where(torch.rand(n, k) < 0.01, normal * 100, normal)
    yield "tails", torch.distributions.StudentT(2.0).sample((n, k))
    yield "positive", normal.abs() + 0.01
    yield "zeros", torch.zeros(n, k)
    yield "mostly zeros", torch.where(torch.rand(n, k) < 0.97, 0, normal)
    yield "on a grid", torch.randint(-2, 3, (n, k)) * 0.5
    yield "equal", torch.full((n, k), -0.3)
    yield "tiny", normal * 1e-20
    yield "huge", normal * 1e25
    yield "tails of dtypes", normal * torch.logspace(-6, 6, k)


def compare(groups, scheme, dtype, steps, importance, what):
    """Bit for bit beside PyTorch, and the error of the range beside the least one, both in float64."""
    got = rounding.search(groups, scheme, dtype, steps, 0.6, importance)
    expected = numerics.search(groups.float(), scheme, dtype, steps, 0.6, importance)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), (what, int((one != other).sum()))
    scale, zero = got
    if groups.shape[-2] * groups.shape[-1] % 32 == 0 and groups.dim() == 3:
        codes = numerics.quantize(groups.float(), scale, zero, scheme).to(torch.uint8)
        packed = packing.pack(codes.flatten(-2), scheme.bits)
        assert torch.equal(rounding.encode(groups, scale, zero, scheme), packed), what


def lost(groups, scale, zero, scheme, importance):
    wide, s, z = groups.double(), scale.double(), zero.double()
    off = ((wide / s).round().clamp(-z, scheme.qmax - z) * s - wide).square()
    return (off if importance is None else off * importance.double()).sum(-1)


def against_float64(groups, scheme, importance):
    """How much more than the least error of all ranges, in float64, the chosen one has."""
    scale, zero = rounding.search(groups, scheme, torch.float32, 20, 0.6, importance)
    widest, full_zero = numerics.minmax(groups.float(), scheme)
    least = torch.full(groups.shape[:-1], torch.inf, dtype=torch.float64)
    for share in torch.linspace(1, 0.6, 20):
        tried = widest * share
        moved = (full_zero * widest * share / tried).round().clamp(0, scheme.qmax)
        least = torch.minimum(least, lost(groups, tried, full_zero if scheme.symmetric else moved, scheme, importance))
    return float((lost(groups, scale, zero, scheme, importance) / least - 1).max())


worst, compared = 0.0, 0
dtypes = cycle((torch.float32, torch.bfloat16, torch.float16, torch.bfloat16, torch.float32))
importance = cycle(
    (lambda by: by, torch.zeros_like, lambda by: by[0], lambda by: by, lambda by: by + 1, lambda by: by)
)
for threads in (1, 3):
    torch.set_num_threads(threads)
    for slug in SCHEMES:
        for n, k in WIDTHS[threads // 2 :]:
            scheme = QuantScheme.parse(slug).fitted(k)
            shape = (scheme.groups(k), -1)
            squares = torch.rand(k).pow(4) * 3
            squares[: k // 4] = 0
            for name, weight in weights(n, k):
                for by in (None, next(importance)(squares.view(shape))):
                    dtype = next(dtypes)
                    groups, what = weight.to(dtype).unflatten(-1, shape), (slug, n, k, name, str(dtype))
                    compare(groups, scheme, dtype, 20, by, what)
                    compared += groups.shape[0] * groups.shape[1]
                compare(weight.unflatten(-1, shape), scheme, torch.bfloat16, 0, None, (*what, "no steps"))
                columns = weight.t().contiguous()[: scheme.columns(k) // shape[0]].t()  # as GPTQ has a group
                compare(columns, scheme, torch.bfloat16, 7, squares[: columns.shape[1]], (*what, "turned"))
            for by in (None, squares.view(shape) + 0.1):
                worst = max(worst, against_float64(torch.randn(n, k).unflatten(-1, shape), scheme, by))
    odd = torch.randn(9, 4, 32)
    odd[0, 0, 3], odd[1, 2, 5], odd[2, 3, 0], odd[3] = torch.nan, torch.inf, -torch.inf, torch.nan
    for slug in ("W4A16-g32", "W4A16-g32-asym"):
        compare(odd, QuantScheme.parse(slug), torch.bfloat16, 20, None, (slug, "not finite"))
        compare(odd[..., :23], QuantScheme.parse(slug), torch.float16, 20, None, (slug, "odd width"))
sys.stdout.write(json.dumps({"level": compiled.built(), "worst": worst, "compared": compared}))
