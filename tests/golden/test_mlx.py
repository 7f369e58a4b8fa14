"""MLX: bytes that it wrote itself, whole checkpoints converted, MLX as oracle where it is installed, and hostile tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_quant
from hf_quant.core.scheme import QuantScheme
from hf_quant.errors import CheckpointError, FormatError
from hf_quant.formats import format_named, format_of
from hf_quant.jobs.convert import convert, open_quantized
from hf_quant.methods import method

MLX = format_named("mlx")
FIXTURES = Path(__file__).parent / "fixtures"
# Made by mlx 0.32.4: i = arange(64).reshape(2, 32); mx.quantize((((i * 7 + 3 + i // 32) % 2**bits) - 1) * 0.5, group_size=32, bits=bits)
GOLDEN = {
    2: ("e4e4e4e4e4e4e4e49393939393939393", "0000803f0000803f"),
    3: ("ac8f68ac8f68ac8f68ac8f68637d44637d44637d44637d44", "0000404000004040"),
    4: ("5c7e90b2d4f6183a5c7e90b2d4f6183a4b6d8fa1c3e507294b6d8fa1c3e50729", "0000e0400000e040"),
    5: (
        "bcba03b25ca4db87829eacf80b93d8b4998fa31a9b36f3715483577740968b74fb50d093157f6112",
        "0000704100007041",
    ),
    6: (  # in two rows of 64, with group_size=64
        "7ced9e60262d446fbf68a84d4ce1df702a6e5463fc78ac8e5ce51c402eaf64673d48a0cf6ce95d5022ec746b7e58a40c"
        "3bdd9a1f1629035fbb2798490bd1db2f1a6a1353f8379c8a1bd5183f1eab2357390790cb2bd9590f12e8335b7a179408",
        "0000f8410000f841",
    ),
}


def raw(text: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=dtype).view(2, -1)


@pytest.mark.parametrize("bits", GOLDEN)
def test_what_mlx_wrote_itself(bits: int) -> None:
    codes, biases = GOLDEN[bits]
    state = {
        "weight": raw(codes, torch.uint32),
        "scales": torch.full((2, 1), -0.5),
        "biases": raw(biases, torch.float32),
    }
    k = state["weight"].shape[1] * 32 // bits
    name, fmt = format_of({"group_size": k, "bits": bits})
    found = fmt.layers({"a": state}, lambda full: None)["a"]
    assert name == "mlx" and found.shape == (2, k) and found.scheme is None and found.note
    i = torch.arange(2 * k).reshape(2, k)
    assert torch.equal(fmt.dense(state), ((i * 7 + 3 + i // k) % 2**bits - 1) * 0.5)


SLUGS = ["W4A16-g32", "W3A16-g64-asym", "W2A16-g128-asym", "W8A16-g256", "W4A16-g-1-asym"]


@pytest.mark.parametrize("slug", SLUGS)
def test_codes_times_scale_plus_bias_is_the_weight(slug: str) -> None:
    tensor = method("rtn", steps=0).quantize(torch.randn(24, 512) + 0.3, QuantScheme.parse(slug), torch.bfloat16)
    written = MLX.write(tensor)
    assert 512 // written["scales"].shape[1] in (32, 64, 128)
    codes = tensor.codes().unflatten(-1, (written["scales"].shape[1], -1)).float()
    made = codes * written["scales"].float()[..., None] + written["biases"].float()[..., None]
    assert torch.equal(made.flatten(1), tensor.dequantize(torch.float32))


@pytest.mark.parametrize("slug", SLUGS)
def test_mlx_makes_the_same_weight_of_it(slug: str) -> None:
    mx: Any = pytest.importorskip("mlx.core")
    scheme = QuantScheme.parse(slug)
    tensor = method("rtn", steps=0).quantize(torch.randn(24, 512) + 0.3, scheme, torch.float16)
    written = MLX.write(tensor)
    parts = [mx.array(written[name].numpy()) for name in ("weight", "scales", "biases")]
    size = 512 // written["scales"].shape[1]
    wide = [parts[0], *(part.astype(mx.float32) for part in parts[1:])]  # in 16 bits MLX rounds after every step
    made = mx.dequantize(*wide, group_size=size, bits=scheme.bits)
    assert torch.equal(torch.tensor(made.tolist()), tensor.dequantize(torch.float32))
    x = torch.randn(3, 512)
    product = mx.quantized_matmul(mx.array(x.numpy()), *parts, transpose=True, group_size=size, bits=scheme.bits)
    torch.testing.assert_close(
        torch.tensor(product.tolist()), x @ tensor.dequantize(torch.float32).T, rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("name", ["gptq-mixed", "ct-3bit-asym", "awq-gemm"])
def test_a_checkpoint_as_mlx_lm_looks_for_it(name: str, tmp_path: Path) -> None:
    before = open_quantized(FIXTURES / name)
    convert(FIXTURES / name, tmp_path / "mlx", to="mlx")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    stored = config["quantization"]
    after = open_quantized(tmp_path / "mlx")
    for module, layer in before.layers.items():
        assert layer.scheme is not None and after.layers[module].scheme == layer.scheme
        entry = stored.get(module, stored)  # as in mlx_lm.utils.load_model
        assert entry["bits"] == layer.scheme.bits and entry["group_size"] in (32, 64, 128)
    convert(tmp_path / "mlx", tmp_path / "back", to="native")
    ids = torch.arange(1, 17)[None]
    one, other = (hf_quant.load(str(path), dtype=torch.float32) for path in (FIXTURES / name, tmp_path / "back"))
    assert torch.equal(one(ids).logits, other(ids).logits)
    assert "quantization" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_two_widths_whose_tensors_have_one_shape_are_told_by_their_columns(tmp_path: Path) -> None:
    """Four bits in groups of 128 columns, and eight in groups of 64, without the schemes that only this package writes."""
    convert(FIXTURES / "gptq-mixed", tmp_path / "mlx", to="mlx")
    path = tmp_path / "mlx" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["schemes"], config["quantization"]["schemes"]
    path.write_text(json.dumps(config))
    before, after = open_quantized(FIXTURES / "gptq-mixed"), open_quantized(tmp_path / "mlx")
    for module, layer in after.layers.items():
        assert layer.scheme is None
        torch.testing.assert_close(after.read(module), before.read(module, dense=True))
    ids = torch.arange(1, 17)[None]
    one, other = (
        hf_quant.load(str(folder), dtype=torch.float32) for folder in (FIXTURES / "gptq-mixed", tmp_path / "mlx")
    )
    torch.testing.assert_close(one(ids).logits, other(ids).logits)


SCHEME = QuantScheme(4, 64, False)
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no codes": (lambda s: s.pop("weight"), "weight"),
    "no scales": (lambda s: s.pop("scales"), "scales"),
    "no biases": (lambda s: s.pop("biases"), "biases"),
    "codes of another type": (lambda s: s.update(weight=s["weight"].view(torch.int32)), "dtype"),
    "codes of no columns": (lambda s: s.update(weight=s["weight"][:, :3]), "shape|columns"),
    "a row short": (lambda s: s.update(scales=s["scales"][:-1]), "shape"),
    "a group short": (lambda s: s.update(scales=s["scales"][:, :-1]), "shape"),
    "biases of another shape": (lambda s: s.update(biases=s["biases"][:, :-1]), "shape"),
    "a scale that is NaN": (lambda s: s["scales"].view(-1)[:1].fill_(float("nan")), "finite"),
    "an infinite bias": (lambda s: s["biases"].view(-1)[:1].fill_(float("inf")), "zero points"),
    "a bias between zero points": (
        lambda s: s["biases"].view(-1)[:1].add_(0.4 * s["scales"].view(-1)[:1]),
        "zero points",
    ),
    "a bias beyond zero points": (lambda s: s["biases"].view(-1)[:1].fill_(1.0), "zero points"),
    "scales that are all zero": (lambda s: s.update(scales=s["scales"] * 0), "zero"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tensors_are_refused(case: str) -> None:
    state = MLX.write(method("rtn", steps=0).quantize(torch.randn(24, 512), SCHEME, torch.float32))
    fmt = format_of(MLX.config({"a": SCHEME}, []))[1]
    change, said = HOSTILE[case]
    change(state)
    with pytest.raises(FormatError, match=said):
        (found,) = fmt.layers({"a": state}, lambda full: None).values()
        fmt.read(state, found.scheme or SCHEME)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bits": 7}, "bits"), ({"bits": True}, "bits"), ({"group_size": 48}, "group_size"), ({"mode": "mxfp4"}, "mode"),
        ({"schemes": []}, "schemes"), ({"schemes": {"a": "W9"}}, "schemes"), ({"a.b": {"bits": 4}}, "group_size"),
    ],
)  # fmt: skip
def test_hostile_configs_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(FormatError, match=said):
        format_of({"quant_method": "mlx", "bits": 4, "group_size": 64} | fields)


def test_a_scheme_that_contradicts_the_tensors_is_refused(tmp_path: Path) -> None:
    convert(FIXTURES / "awq-gemm", tmp_path / "mlx", to="mlx")
    path = tmp_path / "mlx" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["schemes"] = dict.fromkeys(config["quantization_config"]["schemes"], "W8A16-g64")
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="8"):
        open_quantized(tmp_path / "mlx")
