"""`QuantExperts` whose stacks are multiplied at once; started by test_triton.py with TRITON_INTERPRET=1, or on a GPU."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import transformers as tf
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("no GPU, and TRITON_INTERPRET is not set", allow_module_level=True)

from hf_quant import HfQuantConfig
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.formats import format_named
from hf_quant.kernels import triton_wna16 as module
from hf_quant.methods import method
from hf_quant.nn import QuantExperts, as_quant_experts
from hf_quant.nn._weight import frozen
from hf_quant.nn.experts import stacks

DEVICE = "cpu" if INTERPRETED else "cuda"
MOE = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "head_dim": 32, "intermediate_size": 96, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "mixtral": tf.MixtralConfig(**MOE, num_local_experts=4),
    "qwen3-moe": tf.Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=32),
    "gpt-oss": tf.GptOssConfig(**MOE, num_local_experts=4),  # transposed, with biases, gate and up interleaved
}
EXACT = 1e-5  # float32 added up in another order; one product is held to that against float64 in test_wna16.py


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("moe")

    def get(name: str) -> Path:
        if not (root / name).exists():
            torch.manual_seed(0)
            model = tf.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
            for part, parameter in model.named_parameters():
                if part.endswith("_bias"):  # zeros, or nobody would miss them
                    parameter.data.normal_(std=0.1)
            model.save_pretrained(root / name)
        return root / name

    return get


def load(folder: Path, **how: Any) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=DEVICE, **how)


def experts_of(model: Any) -> list[QuantExperts]:
    return [m for m in model.modules() if isinstance(m, QuantExperts)]


def off(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("name", "scheme", "tokens"),
    [("mixtral", "W4A16-g32", 16), ("mixtral", "W3A16-g32-asym-o2%", 1), ("qwen3-moe", "W4A16-g32-asym", 33),
     ("qwen3-moe", "W8A16-g-1", 1), ("gpt-oss", "W4A16-g32", 33), ("gpt-oss", "W2A16-g32-o4%-columns", 7)],
)  # fmt: skip
def test_a_model_gives_the_logits_of_its_dequantized_weights(saved: Any, name: str, scheme: str, tokens: int) -> None:
    model = load(saved(name), quantization_config=HfQuantConfig(scheme))
    assert len(experts_of(model)) == 2
    for experts in experts_of(model):
        assert type(experts._backend) is module.BACKEND and set(experts._repacked) == {"gate_up_proj", "down_proj"}
        stored = dict(experts.named_parameters(recurse=False))
        assert stored["gate_up_proj"].nbytes == stored["down_proj"].nbytes == 0, "one copy of the codes"
    ids = torch.arange(1, tokens + 1, device=DEVICE)[None]
    with torch.no_grad():
        got = model(ids).logits
        dense = model.dequantize()
        assert not experts_of(dense) and off(got, dense(ids).logits) < 10 * EXACT  # two blocks of six products


def test_what_is_saved_is_portable(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = HfQuantConfig("W4A16-g32-asym-o2%")
    model = load(saved("gpt-oss"), quantization_config=config)
    with monkeypatch.context() as patch:
        patch.setenv("HF_QUANT_BACKEND", "reference")
        plain = load(saved("gpt-oss"), quantization_config=config)
    assert experts_of(plain) and not any(experts._repacked for experts in experts_of(plain))
    ours, theirs = model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    model.save_pretrained(tmp_path)
    again, ids = load(tmp_path), torch.arange(1, 17, device=DEVICE)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    model.load_state_dict(theirs)
    assert all(experts._repacked for experts in experts_of(model)) and torch.equal(
        again(ids).logits, model(ids).logits
    )


def made(slug: str = "W4A16-g32-asym", dtype: torch.dtype = torch.float32, name: str = "gpt-oss") -> Any:
    """An experts layer of its own, in the portable layout."""
    float_class = {
        "gpt-oss": tf.models.gpt_oss.modeling_gpt_oss.GptOssExperts,
        "mixtral": tf.models.mixtral.modeling_mixtral.MixtralExperts,
    }[name]
    experts: Any = float_class(CONFIGS[name]).to(dtype)
    scheme = QuantScheme.parse(slug)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.3)
        parameter.requires_grad_(False)
    weights = {
        stack: QuantizedTensor.stack(
            [method("rtn", steps=0).quantize(torch.randn(n, k) * 0.2, scheme, dtype) for _ in range(e)]
        )
        for stack, (e, n, k) in stacks(experts).items()
    }
    as_quant_experts(experts, dict.fromkeys(weights, scheme), quantized=True)
    for stack, weight in weights.items():
        for local, tensor in format_named("native").write(weight).items():
            setattr(experts, stack + local.removeprefix("weight"), frozen(tensor))
    return experts.to(DEVICE)


def laid_out(experts: Any) -> Any:
    other = copy.deepcopy(experts)
    other.choose_kernel()
    assert other._repacked and not experts._repacked
    return other


ROUTES = {
    "one token": [[3, 1]],
    "one expert": [[2, 0]] * 37,
    "experts without tokens": [[0, 3]] * 17,
    "experts of other ranks": [[4, 1], [0, 4], [4, 4]],
    "nowhere": [[4, 4]] * 3,
    "no tokens": [],
    "over and under a tile": [[0, 1]] * 16 + [[0, 2]] * 17,
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("dtype", "name", "most"), [(torch.float32, "gpt-oss", EXACT), (torch.float16, "mixtral", 2e-3)]
)
def test_routes(route: str, dtype: torch.dtype, name: str, most: float) -> None:
    """As one expert after the other, whose results are added up in the dtype of the activations."""
    experts = made("W4A16-g32-asym", dtype, name)
    chosen = torch.tensor(ROUTES[route], dtype=torch.int64, device=DEVICE).view(-1, 2)
    x, weights = torch.randn(len(chosen), 64, device=DEVICE), torch.rand(chosen.shape, device=DEVICE)
    wide = copy.deepcopy(experts).to(torch.float32)  # the same weights
    expected, got = wide(x.to(dtype).float(), chosen, weights), laid_out(experts)(x.to(dtype), chosen, weights)
    assert got.dtype is dtype and got.shape == expected.shape and not got.isnan().any()
    assert (got.float() - expected).norm() <= most * expected.norm()


@pytest.mark.parametrize("densely", [False, True])
def test_gradients_are_those_of_one_expert_after_the_other(densely: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if densely:
        monkeypatch.setattr(module, "FLOAT32", None)
    experts = made("W4A16-g32-asym-o2%")
    experts.down_proj_bias.requires_grad_()
    chosen = torch.tensor([[0, 2], [2, 4], [0, 1], [2, 0], [1, 0]], device=DEVICE)
    found = []
    for each in (experts, laid_out(experts)):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        weights = torch.linspace(0.1, 1, 10, device=DEVICE).view(5, 2).requires_grad_()
        y = each(x, chosen, weights)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, weights, each.down_proj_bias))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_moves_copies_and_state_dicts() -> None:
    experts = made("W8A16-g32")
    state, other = experts.state_dict(), laid_out(experts)
    x, chosen = torch.randn(6, 64, device=DEVICE), torch.tensor([[0, 2]] * 6, device=DEVICE)
    weights = torch.rand(6, 2, device=DEVICE)
    y = other(x, chosen, weights)
    for each in (other, copy.deepcopy(other), copy.deepcopy(other).to(torch.float16).to(DEVICE)):
        assert each._repacked and each.down_proj.numel() == 0
        assert all(
            torch.equal(each.state_dict()[name], tensor.to(each.state_dict()[name].dtype))
            for name, tensor in state.items()
        )
    assert torch.equal(copy.deepcopy(other)(x, chosen, weights), y)
    half = copy.deepcopy(other).to(torch.float16)
    assert half.compute_dtype is torch.float16 and off(half(x.half(), chosen, weights), y) < 2e-3
    assert torch.equal(other.expert_weight("down_proj"), experts.expert_weight("down_proj"))
    other.load_state_dict({name: tensor.flip(0) for name, tensor in state.items()})  # the experts the other way round
    assert other._repacked and torch.equal(other(x, 3 - chosen, weights), y)
    other._unpack()
    assert all(torch.equal(other.state_dict()[name], tensor.flip(0)) for name, tensor in state.items())


def test_the_same_bits_every_time_and_in_one_graph() -> None:
    experts = laid_out(made("W4A16-g32-o2%", torch.float16))
    x, chosen = torch.randn(40, 64, device=DEVICE).half(), torch.randint(4, (40, 2), device=DEVICE)
    weights = torch.rand(40, 2, device=DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad():
            y = experts(x, chosen, weights)
            assert torch.equal(experts(x, chosen, weights), y)
            assert torch.equal(torch.compile(experts, fullgraph=True, backend="aot_eager")(x, chosen, weights), y)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("why", ["offloaded", "permuted", "one stack in floating point", "another backend", "INT8"])
def test_what_stays_one_expert_after_the_other(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = made("W8A8" if why == "INT8" else "W4A16-g32")
    if why == "offloaded":
        experts.keeps_layout = True
    if why == "permuted":
        experts.schemes["gate_up_proj"] = QuantScheme.parse("W4A16-g32-perm")
        order = torch.stack([torch.randperm(64) for _ in range(4)])[:, None].int()
        experts.register_parameter("gate_up_proj_perm", frozen(order.to(DEVICE)))
    if why == "one stack in floating point":
        del experts.schemes["down_proj"]
        experts.down_proj = frozen(torch.randn(4, 96, 64, device=DEVICE))
    if why == "another backend":
        monkeypatch.setenv("HF_QUANT_BACKEND", "dequant")
    x, chosen = torch.randn(6, 64, device=DEVICE), torch.randint(4, (6, 2), device=DEVICE)
    before = experts(x, chosen, torch.rand(6, 2, device=DEVICE).fill_(0.5))
    experts.choose_kernel()
    assert not experts._repacked
    assert torch.equal(experts(x, chosen, torch.rand(6, 2, device=DEVICE).fill_(0.5)), before)
