"""Which of vLLM's kernels will run a layer, and which layers none will."""

import pytest
import torch

from hf_quant.core.scheme import QuantScheme
from hf_quant.errors import HfQuantError, OptionError
from hf_quant.formats import Layer
from hf_quant.jobs.engine_rules import ENGINE_NAMES, RULES
from hf_quant.jobs.engines import ENGINES, vllm
from hf_quant.jobs.targets import check_target, served

ATTN, MLP, EXPERT = "model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.0.mlp.experts.3"


def layer(slug: str, n: int = 4096, k: int = 4096) -> Layer:
    return Layer((n, k), QuantScheme.parse(slug), torch.float16)


RUNS = {
    ("compressed_tensors", "W4A16-g128", 4096, 4096): "Machete on Hopper, else Marlin",
    ("compressed_tensors", "W4A16-g128-asym", 4096, 4096): "Machete on Hopper, else Marlin",
    ("compressed_tensors", "W8A16-g-1", 4096, 4096): "Machete on Hopper, else Marlin",
    ("compressed_tensors", "W8A16-g128-asym", 4096, 4096): "Machete (Hopper only)",
    ("compressed_tensors", "W4A16-g32", 4096, 4096): "Marlin",
    ("compressed_tensors", "W4A16-g128", 4160, 4096): "Marlin",
    ("compressed_tensors", "W4A16-g256", 4096, 4096): "Exllama (float16 only)",
    ("compressed_tensors", "W4A16-g256-asym", 4096, 4096): "Triton",
    ("compressed_tensors", "W3A16-g128", 4096, 4096): "Humming (Turing and newer)",
    ("compressed_tensors", "W2A16-g64-asym", 4096, 4096): "Humming (Turing and newer)",
    ("compressed_tensors", "W4A16-g16-asym", 4096, 4096): "Humming (Turing and newer)",
    ("compressed_tensors", "W4A8-g128", 4096, 4096): "Humming (Turing and newer)",
    ("gptq", "W4A16-g128", 4096, 4096): "Machete on Hopper, else Marlin",
    ("awq", "W4A16-g128-asym", 4096, 4096): "Marlin",
    ("awq", "W4A16-g128", 4096, 4096): "AWQ kernel",
}
REFUSED = {
    ("gptq", "W4A16-g128-perm"): "another order",
    ("gptq", "W4A16-g128-asym"): "without zero points",
    ("gptq", "W4A16-g256"): "groups of 32, 64, 128",
    ("native", "W4A16-g128"): "does not read native",
    ("native", "W4A16-g64-nf4"): "does not read native",
    ("compressed_tensors", "W4A16-g64-asym-real"): "none of its types",
}


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_runs(case: tuple[str, str, int, int]) -> None:
    fmt, slug, n, k = case
    verdict = vllm(fmt, {f"{MLP}.down_proj": layer(slug, n, k)})
    assert verdict.kernels == {RUNS[case]: 1} and not verdict.refused


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refused(case: tuple[str, str]) -> None:
    verdict = vllm(case[0], {f"{MLP}.down_proj": layer(case[1])})
    assert not verdict.kernels and REFUSED[case] in "".join(verdict.lines())


def test_splitting_cuts_groups_of_what_is_split_by_its_input() -> None:
    layers = {f"{MLP}.down_proj": layer("W4A16-g128", 4096, 11008), f"{MLP}.gate_proj": layer("W4A16-g128", 11008, 4096),
              f"{MLP}.up_proj": layer("W4A16-g128", 11008, 4096)}  # fmt: skip
    assert not vllm("compressed_tensors", layers, 2).refused
    verdict = vllm("compressed_tensors", layers, 4)
    assert (
        list(verdict.refused.values()) == [[f"{MLP}.down_proj"]]
        and "groups of 128 are cut where 2752" in verdict.lines()[-1]
    )
    assert "cannot be split over 3" in vllm("gptq", {f"{ATTN}.q_proj": layer("W4A16-g128")}, 3).lines()[0]
    with pytest.raises(HfQuantError, match="--tp 0"):
        vllm("gptq", layers, 0)


def test_what_becomes_one_layer_must_be_quantized_alike() -> None:
    layers = {f"{ATTN}.{leaf}": layer("W4A16-g128") for leaf in ("q_proj", "k_proj", "v_proj")}
    assert not vllm("compressed_tensors", layers).refused
    layers[f"{ATTN}.k_proj"] = layer("W8A16-g128")
    assert "must have one scheme" in "".join(vllm("compressed_tensors", layers).lines())
    del layers[f"{ATTN}.k_proj"]
    assert "must have one scheme" in "".join(vllm("compressed_tensors", layers).lines())


@pytest.mark.parametrize(
    ("slug", "n", "k", "tp", "said"),
    [
        ("W4A16-g128", 2048, 768, 1, "fused Marlin"),
        ("W4A16-g128", 2048, 768, 6, "fused Marlin"),
        ("W4A16-g128", 2048, 768, 4, "are cut"),
        ("W4A16-g128", 2000, 768, 1, "multiples of 128"),
        ("W8A16-g128-asym", 2048, 768, 1, "Humming"),
    ],
)
def test_experts(slug: str, n: int, k: int, tp: int, said: str) -> None:
    assert said in "".join(vllm("compressed_tensors", {f"{EXPERT}.down_proj": layer(slug, n, k)}, tp).lines())


def test_stacks_and_floats_are_refused() -> None:
    stack = Layer((4, 64, 64), QuantScheme(4, 32), torch.float16)
    assert "apart" in vllm("compressed_tensors", {"experts.down_proj": stack}).lines()[0]
    dense = Layer((64, 64), None, torch.float16, "8-bit floats")
    assert "integer codes" in vllm("compressed_tensors", {f"{MLP}.down_proj": dense}).lines()[0]


OTHERS = {  # engine, format, scheme, out and in features, GPUs -> what is said
    ("vllm-cpu", "compressed_tensors", "W4A16-g32", 64, 64, 1): "CPU WNA16",
    ("vllm-cpu", "compressed_tensors", "W8A8", 64, 64, 1): "CPU INT8",
    ("vllm-cpu", "compressed_tensors", "W4A8-g32", 64, 64, 1): "activations in 16 bits",
    ("vllm-cpu", "compressed_tensors", "W4A16-g32", 48, 64, 1): "out_features in multiples of 32",
    ("vllm-cpu", "compressed_tensors", "W2A16-g32", 64, 64, 1): "nearest that it runs is W4A16-g128",
    ("vllm-rocm", "compressed_tensors", "W3A16-g128", 64, 128, 1): "nearest that it runs is W4A16-g128",
    ("vllm-rocm", "gptq", "W8A16-g128", 64, 128, 1): "Exllama",
    ("vllm-xpu", "compressed_tensors", "W4A8-g32", 64, 64, 1): "XPU W4A8",
    ("sglang", "compressed_tensors", "W8A8", 64, 64, 1): "CUTLASS INT8",
    ("sglang", "compressed_tensors", "W4A16-g128", 128, 256, 4): "in_features of 128",
    ("llama.cpp", "compressed_tensors", "W4A16-g32", 64, 64, 1): "from gguf: hf-quant convert --to",
    ("llama.cpp", "gguf", "W4A16-g32", 64, 64, 1): "Q4_0",
    ("llama.cpp", "gguf", "W4A16-g16", 64, 64, 1): "nearest that it runs is",
    ("mlx", "mlx", "W3A16-g64-asym", 64, 64, 1): "affine",
    ("mlx", "gptq", "W3A16-g64-asym", 64, 64, 1): "from mlx",
    ("onnx", "gptq", "W4A16-g32-asym", 64, 64, 1): "MatMulNBits",
    ("onnx", "compressed_tensors", "W4A16-g32-nf4", 64, 64, 1): "nearest",
}


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_other_engines_name_their_kernel_or_the_nearest_that_works(case: tuple[str, str, str, int, int, int]) -> None:
    engine, fmt, slug, n, k, tp = case
    verdict = ENGINES[engine](fmt, {f"{MLP}.down_proj": layer(slug, n, k)}, tp)
    assert OTHERS[case] in "".join(verdict.lines())


def test_what_a_rule_runs_its_formats_hold() -> None:
    from hf_quant.formats import formats

    assert set(ENGINE_NAMES) == set(ENGINES)
    for rules in RULES.values():
        for rule in rules:
            assert rule.takes(rule.example())
            for name in rule.formats:
                assert (
                    name == "gguf" or formats()[name].why_not(rule.example()) is None or not rule.example().symmetric
                )


def test_linear_attention_is_fused_too() -> None:
    stem = "model.layers.0.linear_attn"
    layers = {f"{stem}.in_proj_qkv": layer("W4A16-g128"), f"{stem}.in_proj_z": layer("W8A16-g128")}
    assert "in_proj_qkv, in_proj_z become one layer" in "".join(vllm("compressed_tensors", layers).lines())


@pytest.mark.parametrize(("target", "now", "slug", "to"), [
    ("llama.cpp", "native", "Q4_K", "gguf"), ("llama.cpp", "compressed_tensors", "W4A16-g32", "gguf"),
    ("mlx", "compressed_tensors", "W4A16-g64", "mlx"), ("vllm", "compressed_tensors", "W2A16-g64-asym", None),
    ("vllm", "native", "W4A16-g128", "compressed-tensors"), ("onnx", "native", "W4A16-g128-asym", "awq"),
])  # fmt: skip
def test_the_format_that_an_engine_runs_is_found(target: str, now: str, slug: str, to: str | None) -> None:
    result = served(target, 1, now, {f"{MLP}.down_proj": layer(slug)})
    assert not result.verdict.refused and sum(result.verdict.kernels.values()) == 1
    assert result.to == to or (to == "awq" and result.to == "gptq")
    assert ("as it is" if to is None else f"convert --to {result.to}") in result.lines()[0]


def test_what_no_format_helps_is_refused_by_name() -> None:
    result = served("mlx", 1, "native", {f"{MLP}.down_proj": layer("Q4_K"), f"{MLP}.up_proj": layer("W4A16-g64")})
    assert result.to == "mlx" and result.verdict.kernels == {"affine quantized_matmul": 1}
    assert "Q4_K" in next(iter(result.verdict.refused)) and result.to_dict()["refused"]
    with pytest.raises(OptionError, match=r"llama\.cpp"):
        check_target("llama", 1)
    with pytest.raises(OptionError, match="--tp"):
        check_target(None, 2)
