"""``hf-quant doctor``: what this machine and environment give."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import click

from hf_quant.cli._common import emit, output_options, waiting
from hf_quant.cli._screen import Part
from hf_quant.jobs.results import Grid, Row

PACKAGES = (
    "hf-quant", "torch", "transformers", "accelerate", "safetensors", "huggingface-hub", "triton", "peft",
    "compressed-tensors", "optimum",
)  # fmt: skip
LAYER = (4096, 4096)
SCHEMES = ("W8A8", "W4A8-g128", "W8A16-g128", "W4A16-g128", "W3A16-g128", "W2A16-g128")


@click.command(short_help="What runs here, and how fast.")
@click.option("-v", "--verbose", is_flag=True, help="Why each of the other kernels does not run a scheme.")
@click.option("--speed/--no-speed", default=True, show_default=True, help="Time each kernel on one layer.")
@output_options
def command(verbose: bool, speed: bool, as_json: bool, quiet: bool) -> None:
    """Show versions, devices, and which kernel runs which scheme here, how fast, and what would be faster."""
    with waiting("looking at this machine", quiet or as_json):
        record = _record(timed=speed and not quiet)
    chosen = next(kernel["chosen"] for kernel in record["kernels"] if kernel["scheme"] == "W4A16-g128")
    emit(as_json, quiet, record=record, essential=chosen, human=_human(record, verbose))


def _record(timed: bool) -> dict[str, Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_kernels": _compiled(),
        "threads": torch.get_num_threads(),
        "loads_without_import": _autoloads(),
        "kernels": [
            _kernel(slug, dtype, device, timed) for slug in SCHEMES for dtype in (torch.bfloat16, torch.float32)
        ],
    }


def _human(record: dict[str, Any], verbose: bool) -> list[Part]:
    versions = [f"{name} {number}" for name, number in record["versions"].items() if number]
    lacking = [name for name, number in record["versions"].items() if not number]
    lines = [("versions", ", ".join(versions)), ("not installed", ", ".join(lacking) or "-")]
    names = ("device", "cpu_capability", "cpu_kernels", "threads", "loads_without_import")
    lines += [(name.replace("_", " "), str(record[name])) for name in names]
    kernels = record["kernels"]
    parts: list[Part] = [
        Grid(("", ""), lines),
        "",
        Grid(("scheme", "kernel", "speed", "would be faster"), _lines(kernels)),
    ]
    if any(kernel["speed"] for kernel in kernels):
        n, k = LAYER
        parts += [
            "",
            f"speed: one row times a layer of {n} x {k} in bfloat16, beside PyTorch's own product in bfloat16, just now",
        ]
    if not verbose:
        return [*parts, "why not another kernel: hf-quant doctor --verbose"]
    for kernel in kernels:
        parts += ["", f"{kernel['scheme']} in {kernel['dtype']}: {kernel['chosen']}"]
        parts += [f"    not {name}: {reason}" for name, reason in kernel["not"].items()]
    return parts


def _lines(kernels: list[dict[str, Any]]) -> list[Row]:
    """One line a scheme; another kernel for float32 models is named beside."""
    lines: list[Row] = []
    for narrow, wide in zip(kernels[::2], kernels[1::2], strict=True):
        same = narrow["chosen"] == wide["chosen"]
        chosen = narrow["chosen"] if same else f"{narrow['chosen']}; float32: {wide['chosen']}"
        speed = f"{narrow['speed']:.1f} times" if narrow["speed"] else "-"
        lines.append((narrow["scheme"], chosen, speed, narrow["faster"] or "-"))
    return lines


def _cpu() -> str:
    from hf_quant.bench.machine import cpu_name

    return cpu_name()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _compiled() -> str:
    from hf_quant.kernels._native.compiled import LEVELS, built, why_not_built

    if (level := built()) is None:
        return f"not compiled, so that decoding is slower: {why_not_built()}"
    better = LEVELS[LEVELS.index(level) + 1 :]
    return f"{level}" + (f"; a processor with {better[-1]} would be faster at many rows" if better else "")


def _autoloads() -> str:
    if os.environ.get("HF_QUANT_AUTOLOAD") == "0":
        return "no: HF_QUANT_AUTOLOAD=0"
    is_registered = any(point.name == "hf_quant" for point in entry_points(group="torch.backends"))
    return "yes" if is_registered else "no: the package is not installed, only imported"


def _kernel(slug: str, dtype: Any, device: str, timed: bool) -> dict[str, Any]:
    import torch

    from hf_quant import _plugins
    from hf_quant.bench.kernels import times_dense
    from hf_quant.core.scheme import QuantScheme
    from hf_quant.kernels import LinearSpec, refusal, select

    spec = LinearSpec(QuantScheme.parse(slug), *LAYER, dtype, device)
    backends = {name: _plugins.load("kernels", name).BACKEND() for name in _plugins.names("kernels")}
    reasons = {name: refusal(backend, spec) for name, backend in backends.items()}
    backend = select(spec)
    inner = getattr(backend, "inner", None)
    chosen = _name(backend) if inner is None else f"{_name(inner)} on rounded activations"
    return {
        "scheme": slug, "dtype": str(dtype).removeprefix("torch."), "chosen": chosen,
        "not": {name: reason for name, reason in reasons.items() if reason},
        "speed": times_dense(spec) if timed and dtype is torch.bfloat16 else None,
        "faster": _faster(backends, reasons, _name(inner or backend), device),
    }  # fmt: skip


def _name(backend: Any) -> str:
    """As HF_QUANT_BACKEND wants it."""
    return type(backend).__module__.rpartition(".")[2]


def _faster(backends: dict[str, Any], reasons: dict[str, str | None], chosen: str, device: str) -> str | None:
    """Why a kernel that would be tried before the chosen one cannot run; None if there is none for this machine."""
    before = [name for name in backends if backends[name].priority > backends[chosen].priority]
    for name in sorted(before, key=lambda name: -backends[name].priority):
        reason = reasons[name] or ""
        if reason.startswith("not built") or (
            device == "cuda" and "GPU" not in reason and "activations" not in reason
        ):
            return f"{name}: {reason}"
    return _better_processor() if device == "cpu" else None


def _better_processor() -> str | None:
    from hf_quant.kernels._native.compiled import LEVELS, built

    level = built()
    if level is None:
        return "the compiled kernels"
    better = LEVELS[LEVELS.index(level) + 1 :]
    return f"many rows: a processor with {better[-1].upper()}" if better else None


COMMAND = command
