"""One quantized linear layer on a GPU: ours beside cuBLAS in bf16, gemlite, torchao, bitsandbytes, GPTQModel and vLLM.

    python benchmarks/gpu_linear.py [--rows FILE] [--schemes W4A16-g128 ...] [--again]
    python benchmarks/gpu_linear.py --dry-run  # without a GPU: every layer small, on the CPU

Every contender gets the same x; its weights are copies that together exceed the last cache four times, all in one CUDA graph.
Medians in microseconds, the share of the bandwidth of a copy and of the FLOPs of a large bf16 product, both measured in the
same run, and our error against float64. Contenders that are not installed, or refuse, are named with their reason. ``--again``
marks rows that were measured with tiles found on this machine.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _gpu import Rows, device_for, parser
from torch import Tensor

from hf_quant.bench.gpu import compile_all, copies, microseconds, weight
from hf_quant.core.scheme import QuantScheme
from hf_quant.kernels import LinearSpec, select

SCHEMES = ("W4A16-g128", "W8A16-g128", "W4A16-g128-asym", "W8A8", "W4A8-g128", "W3A16-g128-asym", "W2A16-g64-asym",
           "W4A16-g64-nf4")  # fmt: skip
SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (1536, 576))  # N, K
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPE = torch.bfloat16
Contender = Callable[[Tensor], Any]


def ours(scheme: QuantScheme, n: int, k: int, device: torch.device) -> tuple[Contender, Tensor]:
    own = weight(scheme, n, k, DTYPE, device)
    spec = LinearSpec(scheme, n, k, DTYPE, device.type)
    backend = select(spec)
    prepared = backend.prepare(own, spec)
    return partial(_product, backend, prepared, spec), own.dequantize(torch.float64)


def _product(backend: Any, prepared: Any, spec: LinearSpec, x: Tensor) -> Tensor:
    return backend.linear(x, prepared, spec)


def gemlite(bits: int, linear: torch.nn.Linear) -> Contender:
    from gemlite.helper import A16Wn

    n, k = linear.weight.shape
    codes = torch.randint(1 << bits, (n, k), dtype=torch.uint8, device=linear.weight.device)
    scale = torch.rand(n * k // 128, 1, device=linear.weight.device).to(DTYPE)
    return A16Wn(device=str(linear.weight.device), dtype=DTYPE).from_weights(
        codes, scale, torch.full_like(scale, 1 << bits - 1), bits, 128, None
    )


def torchao(bits: int, linear: torch.nn.Linear) -> Contender:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    layer = torch.nn.Sequential(linear)
    quantize_(layer, Int4WeightOnlyConfig(group_size=128) if bits == 4 else Int8WeightOnlyConfig())
    return layer


def bitsandbytes(bits: int, linear: torch.nn.Linear) -> Contender:
    import bitsandbytes as bnb

    n, k = linear.weight.shape
    layer = (
        bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=DTYPE, quant_type="nf4")
        if bits == 4
        else bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to(linear.weight.device)


def gptqmodel(bits: int, linear: torch.nn.Linear) -> Contender:
    from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2QuantLinear

    n, k = linear.weight.shape
    layer = TritonV2QuantLinear(bits=bits, group_size=128, sym=True, desc_act=False, in_features=k, out_features=n)
    layer = layer.to(linear.weight.device)
    layer.post_init()
    return layer


def vllm(bits: int, linear: torch.nn.Linear) -> Contender:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils.marlin_utils import apply_gptq_marlin_linear
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_quantize
    from vllm.scalar_type import scalar_types

    assert ops is not None
    kind = scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128
    n, k = linear.weight.shape
    _, packed, scale, g_idx, order, _ = marlin_quantize(linear.weight.T.contiguous(), kind, 128, False)
    space = torch.zeros(n // 64 * 16, dtype=torch.int, device=linear.weight.device)
    return lambda x: apply_gptq_marlin_linear(
        x, packed, scale, g_idx.new_empty(0), g_idx, order, space, kind, n, k, True
    )


OTHERS = {"gemlite": gemlite, "torchao": torchao, "bitsandbytes": bitsandbytes, "gptqmodel": gptqmodel, "vllm": vllm}


def roofs() -> dict[str, float]:
    """GB/s of a copy and TFLOP/s of a large bf16 product, here and now."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    copied = microseconds([lambda: b.copy_(a)])
    w = torch.randn(8192, 8192, device="cuda", dtype=DTYPE)
    product = microseconds([lambda: w @ w])
    return {"GB/s": 2e-3 * a.numel() / copied, "TFLOP/s": 2e-6 * 8192**3 / product}


def measured(rows: Rows, slug: str, n: int, k: int, roof: dict[str, float], marks: dict[str, Any]) -> None:
    """One layer, all numbers of rows; a contender that fails is named, and the others go on."""
    scheme, device = QuantScheme.parse(slug), torch.device("cuda")
    size = scheme.packed_bytes(k) * n
    layers = [ours(scheme, n, k, device)[0] for _ in range(copies(size))]
    exact = ours(scheme, n, k, device)
    floats = [torch.randn(n, k, device=device, dtype=DTYPE) for _ in range(copies(2 * n * k))]
    contenders: dict[str, list[Contender]] = {"ours": layers, "bf16": [partial(F.linear, weight=w) for w in floats]}
    if scheme.bits in (4, 8) and scheme.symmetric and scheme.activations is None and not scheme.codebook:
        contenders |= others(rows, scheme.bits, floats[: copies(size)])
    for m in ROWS:
        x = torch.randn(m, k, device=device, dtype=DTYPE)

        def row(x: Tensor = x, m: int = m) -> dict[str, Any]:
            expected = x.double() @ exact[1].T
            times = {name: microseconds([partial(call, x) for call in calls]) for name, calls in contenders.items()}
            moved = scheme.bits_per_weight(k) / 8 * n * k + 2 * m * (n + k)
            return {
                "error": float((exact[0](x).double() - expected).norm() / expected.norm()), "us": times,
                "bandwidth": 1e-3 * moved / times["ours"] / roof["GB/s"],
                "flops": 2e-6 * m * n * k / times["ours"] / roof["TFLOP/s"],
            }  # fmt: skip

        rows.attempt({"scheme": slug, "N": n, "K": k, "M": m, **marks}, row)


def others(rows: Rows, bits: int, floats: list[Tensor]) -> dict[str, list[Contender]]:
    """The other packages that work here, each with as many copies of the weight as ours."""
    working: dict[str, list[Contender]] = {}
    n, k = floats[0].shape
    for name, make in OTHERS.items():
        try:
            calls = []
            for w in floats:
                linear = torch.nn.Linear(k, n, bias=False, device="meta")
                linear.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
                calls.append(make(bits, linear))
            calls[0](floats[0][:1])
            working[name] = calls
        except Exception as error:  # whatever a contender lacks here is reported, not hidden
            rows.add(contender=name, bits=bits, N=n, K=k, missing=f"{type(error).__name__}: {str(error)[:160]}")
    return working


def dry_run(rows: Rows) -> None:
    """Every scheme and number of rows, small and on the CPU: shapes, layers and errors."""
    for slug in SCHEMES:
        call, exact = ours(QuantScheme.parse(slug), 64, 256, torch.device("cpu"))
        for m in ROWS:
            x = torch.randn(m, 256).to(DTYPE)
            expected = x.double() @ exact.T
            error = float((call(x).double() - expected).norm() / expected.norm())
            rows.add(scheme=slug, N=64, K=256, M=m, error=error)
            assert error < 3e-2, (slug, m, error)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--schemes", nargs="*", default=SCHEMES)
    options.add_argument("--again", action="store_true", help="With tiles that were found on this machine.")
    arguments = options.parse_args()
    rows, device = Rows("linear", arguments.rows), device_for(arguments.dry_run)
    torch.manual_seed(0)
    with torch.inference_mode():
        if arguments.dry_run:
            dry_run(rows)
            return
        marks = {"tuned": True} if arguments.again else {}
        schemes = [(slug, QuantScheme.parse(slug)) for slug in arguments.schemes]
        launches = [((scheme, n, k, DTYPE), m, None, device) for _, scheme in schemes for n, k in SHAPES for m in ROWS]
        compile_all(launches, max(1, (os.cpu_count() or 1) - 2))
        roof = roofs()
        rows.add(roofs=roof, gpu=torch.cuda.get_device_name(), torch=torch.__version__)
        for slug, _ in schemes:
            for n, k in SHAPES:
                rows.attempt({"layer": [slug, n, k]}, partial(_all, rows, slug, n, k, roof, marks))


def _all(rows: Rows, slug: str, n: int, k: int, roof: dict[str, float], marks: dict[str, Any]) -> dict[str, Any]:
    measured(rows, slug, n, k, roof, marks)
    return {"done": True}


if __name__ == "__main__":
    main()
