"""What only a GPU can show: large and awkward layers in every scheme, graphs, streams, compilation, whole models.

Without a GPU these tests are skipped; interpreted (TRITON_INTERPRET=1) those run that need no more than the kernel itself, on
small layers. ``benchmarks/gpu_day.py`` runs this file beside the other tests of kernels.
"""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_quant import HfQuantConfig
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.kernels import LinearSpec, outlier_linear, select
from hf_quant.kernels import triton_wna16 as module
from hf_quant.kernels._triton import fallback
from hf_quant.kernels._triton.tiles import Tile
from hf_quant.methods import method
from hf_quant.nn import QuantLinear

pytestmark = pytest.mark.gpu
INTERPRETED = triton.knobs.runtime.interpret
REAL = torch.cuda.is_available() and not INTERPRETED
if not (REAL or INTERPRETED):
    pytest.skip("no GPU here", allow_module_level=True)
DEVICE = "cuda" if REAL else "cpu"
DTYPES = (torch.bfloat16, torch.float16) if REAL else (torch.float16,)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
SCHEMES = ("W4A16-g128", "W4A16-g32-asym", "W8A16-g128", "W3A16-g128-asym", "W2A16-g64-asym", "W4A16-g-1",
           "W4A16-g128-o1%", "W8A16-g64-asym-o1%-columns", "W8A8", "W4A8-g128", "W8A8-o1%-columns")  # fmt: skip
SHAPES = ((4096, 4096), (11008, 4096), (1536, 576), (4864, 896), (960, 640)) if REAL else ((96, 576), (33, 128))
ROWS = (1, 7, 16, 33, 64, 257, 1024) if REAL else (1, 17)
only_real = pytest.mark.skipif(not REAL, reason="needs a GPU")


def layer(slug: str, n: int, k: int, dtype: torch.dtype) -> tuple[QuantizedTensor, LinearSpec]:
    scheme = QuantScheme.parse(slug).fitted(k)
    weight = method("rtn", steps=0).quantize(torch.randn(n, k, device=DEVICE) * k**-0.5, scheme, dtype)
    return weight, LinearSpec(scheme, n, k, dtype, DEVICE)


def product(weight: QuantizedTensor, spec: LinearSpec, x: Tensor) -> Tensor:
    backend = select(spec)
    y = backend.linear(x, backend.prepare(weight, spec), spec)
    return y if weight.outliers is None else y + outlier_linear(x, weight.outliers.index, weight.outliers.value)


def off(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def exact(weight: QuantizedTensor, x: Tensor) -> Tensor:
    """In float64; of INT8 activations, with the rows on their grid, columns of outliers as they are."""
    dense, rows = weight.dequantize(torch.float64), x.double()
    if weight.scheme.activations is not None:
        kept = rows
        if weight.outliers is not None:
            kept = rows.index_fill(1, weight.outliers.index.long(), 0)
        scale = (kept.abs().amax(-1, keepdim=True) / 127).float().double().clamp(min=1e-36)
        rows = (kept / scale + 0.5).floor().clamp(-127, 127) * scale + rows - kept
    return rows @ dense.T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slug", SCHEMES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_equals_float64(slug: str, n: int, k: int, dtype: torch.dtype) -> None:
    weight, spec = layer(slug, n, k, dtype)
    for rows in ROWS:
        x = torch.randn(rows, k, device=DEVICE).to(dtype)
        most = TOLERANCE[dtype] * (2 if weight.scheme.activations else 1)  # a tie may fall to the other side
        assert off(product(weight, spec, x), exact(weight, x)) < most, rows


@pytest.mark.parametrize("slug", ["W4A16-g128", "W8A16-g128", "W3A16-g32-asym", "W2A16-g32-asym", "W4A8-g64"])
def test_smallest(slug: str) -> None:
    """Few blocks of odd sizes: what a checker of memory can run through."""
    for n, k, rows in ((33, 128, 1), (5, 192, 3), (65, 96, 17)):
        weight, spec = layer(slug, n, k, torch.float16)
        x = torch.randn(rows, k, device=DEVICE).half()
        assert off(product(weight, spec, x), exact(weight, x)) < 4e-3


def module_of(slug: str, n: int = 512, k: int = 1024, dtype: torch.dtype = torch.bfloat16) -> QuantLinear:
    return QuantLinear.from_weight(torch.randn(n, k, device=DEVICE, dtype=dtype) * k**-0.5, slug)


@only_real
@pytest.mark.parametrize("slug", ["W4A16-g128", "W8A8", "W4A16-g128-o1%"])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_cuda_graph_gives_the_same_bits(slug: str, rows: int) -> None:
    own = module_of(slug)
    x = torch.randn(rows, 1024, device=DEVICE, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = own(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = own(x)
        for _ in range(3):
            got.fill_(torch.nan)
            graph.replay()
            assert torch.equal(got, expected)


@only_real
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own compiler
@pytest.mark.parametrize("slug", ["W4A16-g128", "W4A8-g128"])
def test_compiled_as_one_graph(slug: str) -> None:
    own = module_of(slug)
    x = torch.randn(3, 1024, device=DEVICE, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert off(torch.compile(own, fullgraph=True)(x), own(x)) < 1e-2


@only_real
def test_layers_on_two_streams() -> None:
    layers = [module_of("W4A16-g128"), module_of("W8A16-g128")]
    x = torch.randn(1, 1024, device=DEVICE, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = [own(x) for own in layers]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in layers]
        for _ in range(50):
            got = []
            for own, stream in zip(layers, streams, strict=True):
                with torch.cuda.stream(stream):
                    got.append(own(x))
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@only_real
@pytest.mark.parametrize(("slug", "rows"), [*itertools.product(["W4A16-g128", "W2A16-g64-asym", "W8A8"], [1, 300])])
def test_gradients(slug: str, rows: int) -> None:
    own = module_of(slug, dtype=torch.float16)
    dense = own.float_weight("weight", torch.float64)
    x = torch.randn(rows, 1024, device=DEVICE, dtype=torch.float16, requires_grad=True)
    grad = torch.randn(rows, 512, device=DEVICE, dtype=torch.float16)
    own(x).backward(grad)
    assert x.grad is not None and off(x.grad, grad.double() @ dense) < 4e-3


@only_real
def test_a_tile_that_needs_too_much_memory_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_failed", set())
    monkeypatch.setattr(module, "tile_for", lambda *_, **__: Tile(256, 256, 8, 8, 1))
    weight, spec = layer("W4A16-g128", 512, 4096, torch.bfloat16)
    x = torch.randn(300, 4096, device=DEVICE, dtype=torch.bfloat16)
    assert off(product(weight, spec, x), exact(weight, x)) < 1e-2
    assert len(fallback._failed) == 1


@only_real
def test_codes_survive_the_way_to_the_gpu_and_back() -> None:
    own = module_of("W3A16-g128-asym")
    on_cpu = copy.deepcopy(own).to("cpu")
    again = copy.deepcopy(on_cpu).to(DEVICE)
    assert all(
        torch.equal(a.cpu(), b) for a, b in zip(own.state_dict().values(), on_cpu.state_dict().values(), strict=True)
    )
    x = torch.randn(2, 1024, device=DEVICE, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(own(x), again(x))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, num_hidden_layers=2, intermediate_size=512, num_attention_heads=4, vocab_size=512
    )
    out = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    return out


@only_real
@pytest.mark.parametrize("slug", ["W4A16-g128", "W8A8", "W4A8-g128", "W2A16-g64-asym"])
def test_a_model_gives_what_it_gives_on_a_cpu(slug: str, folder: Path, tmp_path: Path) -> None:
    def load(where: Any, device: str, **how: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, device_map=device, **how).eval()

    ids = torch.arange(1, 40)[None]
    with torch.inference_mode():
        on_cpu = load(folder, "cpu", quantization_config=HfQuantConfig(slug))
        on_gpu = load(folder, DEVICE, quantization_config=HfQuantConfig(slug))
        assert off(on_gpu(ids.to(DEVICE)).logits.cpu(), on_cpu(ids).logits) < 2e-2
        on_gpu.save_pretrained(tmp_path)
        again = load(tmp_path, DEVICE)
        assert torch.equal(again(ids.to(DEVICE)).logits, on_gpu(ids.to(DEVICE)).logits)
        how = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(again.generate(ids.to(DEVICE), **how), on_gpu.generate(ids.to(DEVICE), **how))
