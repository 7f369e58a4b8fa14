"""What every transform promises, and what each one is for."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from hf_quant import _plugins
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.methods import method
from hf_quant.methods._descent import descend
from hf_quant.transforms import Stage, Transform, transform
from hf_quant.transforms._fold import fold, powers_of_two
from hf_quant.transforms._judge import close
from hf_quant.transforms.hadamard import hadamard

NAMES = _plugins.names("transforms")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 8
        self.v_proj, self.o_proj = nn.Linear(32, 16), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        values = self.v_proj(x).unflatten(-1, (2, 1, 8)).expand(-1, -1, 2, 8).flatten(-3)  # grouped: two heads a value
        return self.o_proj(values.cumsum(0))  # type: ignore[no-any-return]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.self_attn = nn.LayerNorm(32), Attention()
        self.norm2, self.up_proj, self.down_proj = nn.RMSNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm(x))
        return x + self.down_proj(self.up_proj(self.norm2(x)))  # type: ignore[no-any-return]


def stage(layers: tuple[str, ...], source: str | None, block: nn.Module | None = None) -> tuple[Stage, Tensor]:
    if block is None:
        block = Tiny()
        block.up_proj.weight.data *= torch.logspace(-1, 1, 64)[:, None]
    block.requires_grad_(False)
    x, seen = torch.randn(64, 32) * torch.logspace(-1, 1, 32), []
    handle = block.get_submodule(layers[0]).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    block(x)
    handle.remove()
    stats = InputStats.empty(seen[0].shape[-1], drift=True)
    for held, part in enumerate(seen[0].chunk(2)):
        stats.update(part, part + 0.01, held=held)
    made = Stage(block, None, dict.fromkeys(layers, QuantScheme(3, 16)), stats, source, {}, lambda m: m(x))
    return made, x


STAGES = [
    (("self_attn.v_proj",), "norm"),
    (("self_attn.o_proj",), None),
    (("up_proj",), "norm2"),
    (("down_proj",), "up_proj"),
]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "drift"])
@pytest.mark.parametrize(("layers", "source"), STAGES)
def test_the_function_stays(name: str, layers: tuple[str, ...], source: str | None) -> None:
    made, x = stage(layers, source)
    before = made.block(x)
    weights = {n: p.clone() for n, p in made.block.named_parameters()}
    rewriter = transform(name)
    assert isinstance(rewriter, Transform)
    said = rewriter.apply(made)
    torch.testing.assert_close(made.block(x), before, rtol=1e-4, atol=1e-4)
    changed = any(not torch.equal(p, weights[n]) for n, p in made.block.named_parameters())
    assert changed == bool(said) and all(not torch.equal(made.weight(n), weights[f"{n}.weight"]) for n in said)
    if name == "hadamard":  # the others do nothing where that is best
        assert changed == (layers == ("self_attn.v_proj",)), made.notes


def test_statistics_follow_the_scales() -> None:
    made, x = stage(("up_proj",), "norm2")
    scales = powers_of_two(torch.rand(32) * 10)
    assert fold(made, scales) is None
    seen = made.block.norm2(x + made.block.self_attn(made.block.norm(x))).double()  # type: ignore[operator]
    torch.testing.assert_close(made.stats.gram, seen[:32].T @ seen[:32], rtol=1e-4, atol=1e-4)
    rest, off = made.stats.held[0]
    torch.testing.assert_close(rest, seen[32:].float())
    torch.testing.assert_close(off, (torch.full_like(scales, 0.01) / scales).expand_as(off))


def test_what_is_used_elsewhere_is_left_alone() -> None:
    class Shared(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.norm2(x)  # type: ignore[no-any-return]

    made, x = stage(("up_proj",), "norm2", Shared())
    before, weights = made.block(x), {n: p.clone() for n, p in made.block.named_parameters()}
    assert "is used elsewhere too" in (fold(made, powers_of_two(torch.rand(32) * 10)) or "")
    assert all(torch.equal(p, weights[n]) for n, p in made.block.named_parameters())
    assert torch.equal(made.block(x), before)


class Norm(nn.Module):
    """Multiplies by ``offset + weight``, as Gemma's does for an offset of one, or by something else."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.rand(32) + (0.5 if kind != "one more" else -0.5))
        if kind == "bias":
            self.bias = nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        y = x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        gain = {"one more": 1 + self.weight, "exp": self.weight.exp()}.get(self.kind, self.weight)
        return y * gain + (self.bias if self.kind == "bias" else 0)


class Gated(nn.Module):
    """A massive activation for the first token, and perhaps a router that reads what the projection reads."""

    def __init__(self, kind: str, router: str = "") -> None:
        super().__init__()
        self.norm, self.up_proj, self.router = Norm(kind), nn.Linear(32, 64), nn.Linear(32, 4, bias=False)
        self.experts, self.how = nn.Linear(64, 32), router

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        up = self.up_proj(y)
        if self.how == "weights":
            up = up * (y @ self.router.weight.T).softmax(-1)[..., :1]
        if self.how == "module":
            up = up * self.router(y).softmax(-1)[..., :1]
        if self.how == "index":
            up = torch.where(self.router(y).argmax(-1, keepdim=True) > 1, up, -up)
        massive = torch.zeros_like(x)
        massive[0, 5] = 1e6
        return x + massive + self.experts(up)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "one more", "bias"])
def test_every_norm_that_scales_takes_the_scales(kind: str, dtype: torch.dtype) -> None:
    block = Gated(kind)
    block.norm.to(dtype).float()
    made, x = stage(("up_proj",), "norm", block)
    made.stored = lambda _name: dtype
    before = block.up_proj(block.norm(x))
    assert fold(made, powers_of_two(torch.rand(32) * 10)) is None
    assert not torch.equal(before, block.norm(x) @ block.up_proj.weight.T)
    for parameter in block.norm.parameters():
        assert torch.equal(parameter, parameter.to(dtype).float())  # as it will be stored
    torch.testing.assert_close(block.up_proj(block.norm(x)), before, rtol=1e-4, atol=1e-4)


def test_a_norm_that_computes_otherwise_is_left_alone() -> None:
    made, _ = stage(("up_proj",), "norm", Gated("exp"))
    before = {n: p.clone() for n, p in made.block.named_parameters()}
    assert "does not multiply by its weight" in (fold(made, powers_of_two(torch.rand(32) * 10)) or "")
    assert all(torch.equal(p, before[n]) for n, p in made.block.named_parameters())


@pytest.mark.parametrize("router", ["weights", "module", "index"])
def test_a_massive_activation_hides_no_wrong_fold(router: str) -> None:
    """The router reads the norm too; the block's output, of size 1e6, hardly shows it."""
    made, _ = stage(("up_proj",), "norm", Gated("plain", router))
    before = {n: p.clone() for n, p in made.block.named_parameters()}
    assert "is used elsewhere too" in (fold(made, powers_of_two(torch.rand(32) * 10)) or "")
    assert all(torch.equal(p, before[n]) for n, p in made.block.named_parameters())


def test_nan_is_not_the_same() -> None:
    x = torch.randn(4, 8)
    assert close(x, x) and not close(x, x.index_fill(1, torch.tensor(3), torch.nan)) and not close(x, x[:2])
    small = x.index_fill(0, torch.tensor(0), 1e8)
    assert not close(small, small + 0.1)  # one massive row hides nothing, nor does a column
    assert not close(small.T, small.T + 0.1) and close(small, small * (1 + 1e-6))
    assert not close(torch.tensor([1, 2]), torch.tensor([1, 3])) and close(torch.tensor([1]), torch.tensor([1]))


def test_codes_whose_scales_cannot_be_divided_stay() -> None:
    made, _ = stage(("down_proj",), "up_proj")
    weight = made.weight("up_proj")
    codes = method("rtn").quantize(weight * 1e-5, QuantScheme(4, 16), torch.float16)
    weight.copy_(codes.dequantize(torch.float32))
    made.codes["up_proj"] = codes
    assert "cannot hold it" in (fold(made, 2.0 ** torch.arange(64).remainder(12)) or "")
    assert made.codes["up_proj"] is codes


def test_codes_of_the_layer_before_are_divided_too() -> None:
    made, _ = stage(("down_proj",), "up_proj")
    weight, scheme = made.weight("up_proj"), QuantScheme(4, 16, False, outliers=0.05)
    codes = method("rtn").quantize(weight, scheme, torch.bfloat16)
    weight.copy_(codes.dequantize(torch.float32))
    made.codes["up_proj"] = codes
    scales = powers_of_two(torch.rand(64) * 10)
    assert fold(made, scales) is None
    assert torch.equal(made.codes["up_proj"].dequantize(torch.float32), made.weight("up_proj"))


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_hadamard_is_orthogonal(size: int) -> None:
    H = hadamard(size)
    torch.testing.assert_close(H @ H.T, torch.eye(size))


@pytest.mark.parametrize("name", ["awq", "smoothquant"])
def test_outlier_channels_are_undone(name: str) -> None:
    """Columns that are small where inputs are large: rounding loses them, scaled it does not."""
    made, _x = stage(("up_proj",), "norm2")
    made.block.norm2.weight[:3] *= 30  # type: ignore[index,operator]
    made.block.up_proj.weight[:, :3] /= 30  # type: ignore[index,operator]
    again, _ = stage(("up_proj",), "norm2", made.block)
    W = again.weight("up_proj").clone()
    rounded = method("rtn").quantize(W, QuantScheme(3, 16), torch.float32, again.stats).dequantize()
    lost = again.stats.error(W, rounded)
    transform(name).apply(again)
    scaled = again.weight("up_proj")
    kept = method("rtn").quantize(scaled, QuantScheme(3, 16), torch.float32, again.stats).dequantize()
    assert again.stats.error(scaled, kept) < (0.7 if name == "awq" else 0.9) * lost


def test_drift_makes_up_for_what_was_lost() -> None:
    draw = torch.Generator().manual_seed(0)
    true = torch.randn(2000, 64, generator=draw) @ torch.randn(64, 64, generator=draw)
    seen = true + 0.3 * true.roll(1, 1) + 0.1 * torch.randn(true.shape, generator=draw)
    stats, W = InputStats.empty(64, drift=True), torch.randn(32, 64, generator=draw)
    stats.update(seen[:1000], true[:1000])
    stats.update(seen[1000:1500], true[1000:1500], held=1)
    target, blend = stats.target(W)
    fresh, wanted = seen[1500:], true[1500:] @ W.T
    assert 0.8 < blend <= 1
    assert (fresh @ target.T - wanted).norm() < 0.5 * (fresh @ W.T - wanted).norm()


def test_drift_that_does_not_hold_is_not_followed() -> None:
    stats, W = InputStats.empty(64, drift=True), torch.randn(32, 64)
    x = torch.randn(70, 64)
    stats.update(x, x + torch.randn(70, 64))  # hardly more rows than columns, and nothing to be learned
    stats.update(torch.randn(500, 64), torch.randn(500, 64), held=1)
    _, blend = stats.target(W)
    assert blend < 0.5
    alone = InputStats.empty(64)
    alone.update(x, x + 1)
    assert alone.target(W)[1] == 0 and torch.equal(alone.target(W)[0], W)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_descent_never_loses(bits: int, free: bool) -> None:
    x = torch.randn(500, 64) @ torch.randn(64, 64)
    H, W, scheme = x.T @ x / 500, torch.randn(64, 16), QuantScheme(bits, 32, symmetric=False)
    codes = torch.randint(0, scheme.qmax + 1, (64, 16)).float()
    scale, zero = torch.full((2, 16), 0.5), torch.full((2, 16), float(scheme.zero))
    values = (torch.rand(64, 16) < 0.1, torch.zeros(64, 16)) if free else None
    lost = []
    for _ in range(4):
        Q = ((codes.view(2, 32, 16) - zero[:, None]) * scale[:, None]).view(64, 16)
        Q = Q if values is None else torch.where(values[0], values[1], Q)
        lost.append((((Q - W).T @ H) * (Q - W).T).sum().item())
        descend(W, codes, scale, zero, H, scheme, torch.float32, 1, values)
    assert all(after < before * (1 + 1e-5) for before, after in itertools.pairwise(lost)) and lost[-1] < lost[0] / 4
    assert codes.min() >= 0 and codes.max() <= scheme.qmax and torch.equal(codes, codes.round())
