"""``hf-quant doctor``: what this machine and environment give."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import click

from hf_quant.cli._common import emit, output_options

PACKAGES = (
    "hf-quant", "torch", "transformers", "accelerate", "safetensors", "huggingface-hub", "triton", "peft",
    "compressed-tensors", "optimum",
)  # fmt: skip
SCHEMES = ("W8A8", "W4A8-g128", "W8A16-g128", "W4A16-g128", "W3A16-g128", "W2A16-g128")


@click.command()
@output_options
def command(as_json: bool, quiet: bool) -> None:
    """Show versions, devices, and which kernel runs which scheme here, and why not the others."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    record: dict[str, Any] = {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_kernels": _compiled(),
        "threads": torch.get_num_threads(),
        "loads_without_import": _autoloads(),
        "kernels": [_kernel(slug, dtype, device) for slug in SCHEMES for dtype in (torch.bfloat16, torch.float32)],
    }
    lines = [f"{name:<19} {value or 'not installed'}" for name, value in record["versions"].items()]
    lines += [
        f"{key:<19} {record[key]}"
        for key in ("device", "cpu_capability", "cpu_kernels", "threads", "loads_without_import")
    ]
    for kernel in record["kernels"]:
        lines.append(f"{kernel['scheme']} {kernel['dtype']}: {kernel['chosen']}")
        lines += [f"    not {name}: {reason}" for name, reason in kernel["not"].items()]
    chosen = next(kernel["chosen"] for kernel in record["kernels"] if kernel["scheme"] == "W4A16-g128")
    emit(as_json, quiet, record=record, essential=chosen, human="\n".join(lines))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _compiled() -> str:
    from hf_quant.kernels._native.compiled import LEVELS, built

    if (level := built()) is None:
        return "not built: install a C++ compiler (g++, clang++) and reinstall hf-quant to make decoding faster"
    better = LEVELS[LEVELS.index(level) + 1 :]
    return f"{level}" + (f"; a processor with {better[-1]} would be faster at many rows" if better else "")


def _autoloads() -> str:
    if os.environ.get("HF_QUANT_AUTOLOAD") == "0":
        return "no: HF_QUANT_AUTOLOAD=0"
    is_registered = any(point.name == "hf_quant" for point in entry_points(group="torch.backends"))
    return "yes" if is_registered else "no: the package is not installed, only imported"


def _kernel(slug: str, dtype: Any, device: str) -> dict[str, Any]:
    from hf_quant import _plugins
    from hf_quant.core.scheme import QuantScheme
    from hf_quant.kernels import LinearSpec, refusal, select

    spec = LinearSpec(QuantScheme.parse(slug), 4096, 4096, dtype, device)
    reasons = {name: refusal(_plugins.load("kernels", name).BACKEND(), spec) for name in _plugins.names("kernels")}
    backend = select(spec)
    inner = getattr(backend, "inner", None)
    chosen = type(backend).__name__ if inner is None else f"{type(inner).__name__} on rounded activations"
    refused = {name: reason for name, reason in reasons.items() if reason}
    return {"scheme": slug, "dtype": str(dtype).removeprefix("torch."), "chosen": chosen, "not": refused}


COMMAND = command
