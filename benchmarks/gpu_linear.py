"""One quantized linear layer on a GPU: ours beside cuBLAS in bf16, gemlite, torchao, bitsandbytes, GPTQModel and vLLM.

    python benchmarks/gpu_linear.py            # needs a GPU; writes results/gpu_linear.json and .md
    python benchmarks/gpu_linear.py --dry-run  # without one: makes every layer small, on the CPU, and runs our fall-back

Every contender gets the same x; its weights are copies that together exceed the last cache four times, all in one CUDA graph.
Medians in microseconds, the share of the bandwidth of a copy and of the FLOPs of a large bf16 product, both measured in the
same run, and our error against float64. Contenders that are not installed, or refuse, are named with their reason.
"""

import argparse
import platform
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _results import write
from torch import Tensor

from hf_quant.bench.gpu import copies, microseconds, weight
from hf_quant.core.scheme import QuantScheme
from hf_quant.kernels import LinearSpec, select

SCHEMES = ("W4A16-g128", "W4A16-g128-asym", "W8A16-g128", "W3A16-g128", "W2A16-g64")
SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (57344, 8192))  # N, K
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
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


def measured(slug: str, n: int, k: int, roof: dict[str, float], notes: dict[str, str]) -> list[dict[str, Any]]:
    scheme, device = QuantScheme.parse(slug), torch.device("cuda")
    size = scheme.packed_bytes(k) * n
    layers = [ours(scheme, n, k, device)[0] for _ in range(copies(size))]
    exact = ours(scheme, n, k, device)
    floats = [torch.randn(n, k, device=device, dtype=DTYPE) for _ in range(copies(2 * n * k))]
    contenders: dict[str, list[Contender]] = {"ours": layers, "bf16": [partial(F.linear, weight=w) for w in floats]}
    for name, make in OTHERS.items() if scheme.bits in (4, 8) and scheme.symmetric else ():
        try:
            made = []
            for w in floats[: copies(size)]:
                linear = torch.nn.Linear(k, n, bias=False, device="meta")
                linear.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
                made.append(make(scheme.bits, linear))
            made[0](torch.randn(1, k, device=device, dtype=DTYPE))
            contenders[name] = made
        except Exception as error:  # whatever a contender lacks here is reported, not hidden
            notes[f"{name} {slug}"] = f"not measured: {type(error).__name__}: {str(error)[:160]}"
    rows = []
    for m in ROWS:
        x = torch.randn(m, k, device=device, dtype=DTYPE)
        expected = x.double() @ exact[1].T
        row: dict[str, Any] = {"scheme": slug, "N": n, "K": k, "M": m}
        row["error"] = float((exact[0](x).double() - expected).norm() / expected.norm())
        for name, calls in contenders.items():
            row[name] = microseconds([partial(call, x) for call in calls])
        moved = scheme.bits_per_weight(k) / 8 * n * k + 2 * m * (n + k)
        row["bandwidth"] = 1e-3 * moved / row["ours"] / roof["GB/s"]
        row["flops"] = 2e-6 * m * n * k / row["ours"] / roof["TFLOP/s"]
        rows.append(row)
        print(row, flush=True)
    return rows


def dry_run() -> None:
    """Every scheme and row count, small and on the CPU: shapes, layers and errors; no times."""
    for slug in SCHEMES:
        call, exact = ours(QuantScheme.parse(slug), 64, 256, torch.device("cpu"))
        for m in ROWS:
            x = torch.randn(m, 256).to(DTYPE)
            expected = x.double() @ exact.T
            error = float((call(x).double() - expected).norm() / expected.norm())
            assert error < 2e-2, (slug, m, error)
    print(f"{len(SCHEMES)} schemes, {len(ROWS)} numbers of rows: made and multiplied on the CPU. Nothing was timed.")


def report(rows: list[dict[str, Any]], notes: dict[str, str], roof: dict[str, float]) -> None:
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": str(date.today()), **roof}
    about["python"] = platform.python_version()
    names = ["bf16", *OTHERS]
    lines = [str(about), "", "| scheme | N x K | M | ours us | bandwidth | FLOPs | " + " | ".join(names) + " |"]
    lines.append("|---" * (6 + len(names)) + "|")
    slower = []
    for r in rows:
        cells = [f"{r[o]:.1f} ({r[o] / r['ours']:.2f}x)" if o in r else "-" for o in names]
        lines.append(f"| {r['scheme']} | {r['N']} x {r['K']} | {r['M']} | {r['ours']:.1f} | {r['bandwidth']:.0%} | "
                     f"{r['flops']:.0%} | " + " | ".join(cells) + " |")  # fmt: skip
        if r["ours"] > r["bf16"]:
            slower.append(f"{r['scheme']} {r['N']}x{r['K']} M={r['M']}")
    lines += [
        "",
        f"Slower than bf16: {', '.join(slower) or 'nowhere'}.",
        "",
        *(f"- {k}: {v}" for k, v in notes.items()),
    ]
    write("gpu_linear", {"about": about, "notes": notes, "rows": rows}, "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true", help="Without a GPU; times nothing.")
    if parser.parse_args().dry_run:
        dry_run()
        return
    if not torch.cuda.is_available():
        sys.exit("No GPU here: nothing was measured. --dry-run checks the script without one.")
    torch.manual_seed(0)
    notes: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        roof = roofs()
        for slug in SCHEMES:
            for n, k in SHAPES:
                rows += measured(slug, n, k, roof, notes)
    report(rows, notes, roof)


if __name__ == "__main__":
    main()
