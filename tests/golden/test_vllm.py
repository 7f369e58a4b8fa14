"""Our exports through vLLM's own reference packers, where vLLM is installed; its code is loaded without the rest of it."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.formats.awq import AWQ
from hf_quant.formats.compressed_tensors import CompressedTensors
from hf_quant.formats.gptq import GPTQ
from hf_quant.methods import method

N, K = 64, 256


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``vllm.model_executor.layers.quantization.utils.quant_utils``, which asks for a GPU only to name its float8."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vllm is not installed")
    root = Path(next(iter(spec.submodule_search_locations)))

    def module(name: str, **fields: Any) -> Any:
        made = types.ModuleType(name)
        made.__dict__.update(fields)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    def load(name: str, path: str) -> Any:
        found = importlib.util.spec_from_file_location(name, root / path)
        assert found is not None and found.loader is not None
        made = importlib.util.module_from_spec(found)
        monkeypatch.setitem(sys.modules, name, made)
        found.loader.exec_module(made)
        return made

    module("vllm", __path__=[])
    module("vllm.distributed", __path__=[])
    module("vllm.distributed.parallel_state", get_ep_group=None, get_tp_group=None)
    platform = types.SimpleNamespace(fp8_dtype=lambda: torch.float8_e4m3fn, is_fp8_fnuz=lambda: False)
    module("vllm.platforms", current_platform=platform)
    load("vllm.scalar_type", "scalar_type.py")
    yield load("vllm_quant_utils", "model_executor/layers/quantization/utils/quant_utils.py")


def made(bits: int, symmetric: bool) -> QuantizedTensor:
    return method("rtn").quantize(torch.randn(N, K) + 0.2, QuantScheme(bits, 128, symmetric), torch.float16)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(utils: Any, bits: int, symmetric: bool) -> None:
    ours, kind = made(bits, symmetric), utils.scalar_types.uint4 if bits == 4 else utils.scalar_types.uint8
    written = GPTQ(v2=True).write(ours)
    assert torch.equal(written["qweight"], utils.gptq_pack(ours.codes().T.int(), bits, K, N))
    unpacked = utils.unpack_quantized_values_into_int32(written["qweight"], kind, packed_dim=0)
    assert torch.equal(unpacked, ours.codes().T.int())
    zeros = utils.unpack_cols(written["qzeros"], bits, K // 128, N)
    assert torch.equal(zeros, ours.zeros().T.int())
    first = GPTQ().write(ours)
    if symmetric:  # version 1 says one less
        assert torch.equal(utils.unpack_cols(first["qzeros"], bits, K // 128, N) + 1, ours.zeros().T.int())


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq(utils: Any, symmetric: bool) -> None:
    ours = made(4, symmetric)
    written = AWQ().write(ours)
    assert torch.equal(written["qweight"], utils.awq_pack(ours.codes().T.int(), 4, K, N))
    assert torch.equal(written["qzeros"], utils.awq_pack(ours.zeros().T.int(), 4, K // 128, N))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors(utils: Any, bits: int, symmetric: bool) -> None:
    ours, kind = made(bits, symmetric), utils.scalar_types.uint4 if bits == 4 else utils.scalar_types.uint8
    written = CompressedTensors().write(ours)
    assert torch.equal(
        utils.unpack_quantized_values_into_int32(written["weight_packed"], kind, packed_dim=1), ours.codes().int()
    )
    if not symmetric:
        zeros = utils.unpack_quantized_values_into_int32(written["weight_zero_point"], kind, packed_dim=0)
        assert torch.equal(zeros, ours.zeros().int())


@pytest.mark.parametrize("bits", [4, 8])
def test_what_it_quantizes_means_the_same_here(utils: Any, bits: int) -> None:
    """vLLM's own quantizer and float weights, packed by vLLM, read by us."""
    weight, kind = torch.randn(K, N), utils.scalar_types.uint4b8 if bits == 4 else utils.scalar_types.uint8b128
    reference, codes, scale = utils.gptq_quantize_weights(weight, kind, 128)[:3]
    zeros = torch.full((K // 128, N), 1 << (bits - 1), dtype=torch.int32)
    stored = {
        "qweight": utils.gptq_pack(codes, bits, K, N),
        "qzeros": utils.pack_cols(zeros, bits, K // 128, N),
        "scales": scale,
    }
    read = GPTQ(v2=True).read(stored, QuantScheme(bits, 128))
    torch.testing.assert_close(read.dequantize(torch.float32), reference.T, rtol=0, atol=0)
