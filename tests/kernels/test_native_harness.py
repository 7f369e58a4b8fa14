"""The compiled kernels beside plain loops, in C++ alone: for this processor, and for ARM in an emulator where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "hf_quant" / "kernels" / "_native" / "csrc"
HARNESS = Path(__file__).parent / "native" / "harness.cpp"
UNITS = ("portable", "avx2", "avx512", "vnni", "dotprod", "i8mm", "bfmmla")  # each is empty for other processors
OPTIONS = ("-std=c++17", "-O2", "-ffp-contract=fast", "-w")


def built(compiler: str, *options: str, out: Path, sources: Path = SOURCES) -> Path:
    """The harness, built by a compiler."""
    units = [str(sources / f"{unit}.cpp") for unit in UNITS]
    subprocess.run([compiler, *OPTIONS, f"-I{sources}", *options, str(HARNESS), *units, "-o", str(out)], check=True)
    return out


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """The harness, maybe in an emulator."""
    return subprocess.run(command, capture_output=True, text=True, check=False)


def own_compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    return compiler or pytest.skip("there is no C++ compiler")


def test_every_level_of_this_processor(tmp_path: Path) -> None:
    done = run(str(built(own_compiler(), out=tmp_path / "harness")))
    assert done.returncode == 0 and ", 0 differ" in done.stdout, done.stdout


def test_every_level_of_arm(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    harness = str(built(compiler, "-static", out=tmp_path / "harness"))
    for processor, lacks in (
        ("max", set()),
        ("neoverse-n1", {"i8mm", "bf16"}),
        ("cortex-a57", {"dotprod", "i8mm", "bf16"}),
    ):
        done = run(emulator, "-cpu", processor, harness)
        assert done.returncode == 0 and ", 0 differ" in done.stdout, done.stdout
        for level in ("dotprod", "i8mm", "bf16"):
            assert (f"{level}: this processor has it not" in done.stdout) == (level in lacks), done.stdout


@pytest.mark.parametrize(
    ("header", "right", "wrong", "what"),
    [
        ("vector.h", "return sum * scale;", "return sum;", "product"),
        ("panels.h", "(high - zero) * scale", "(high - zero * scale)", "many rows"),
        ("tiles.h", "out[r / per] |= pair", "out[r / per] = pair", "tiles"),
        ("transpose.h", "word[i + by] ^= other", "word[i + by] = other", "transpose of codes"),
    ],
)
def test_a_wrong_kernel_is_noticed(tmp_path: Path, header: str, right: str, wrong: str, what: str) -> None:
    compiler, copy = own_compiler(), tmp_path / "csrc"
    shutil.copytree(SOURCES, copy)
    text = (copy / header).read_text(encoding="utf-8")
    assert text.count(right) == 1
    (copy / header).write_text(text.replace(right, wrong), encoding="utf-8")
    done = run(str(built(compiler, "-O1", out=tmp_path / "wrong", sources=copy)))
    assert done.returncode == 1 and f"portable, {what}" in done.stdout


def test_the_harness_knows_every_unit_of_vectors() -> None:
    """Kernels of tiles (AMX, AVX512-BF16, INT8 prompts) are compared through PyTorch, in test_cpu_native.py."""
    there = {path.stem for path in SOURCES.glob("*.cpp")} - {"module", "amx", "amx_int8", "bf16", "int8"}
    assert there == set(UNITS)
