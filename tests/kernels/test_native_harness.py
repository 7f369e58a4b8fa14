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


def compiled(compiler: str, source: Path, out: Path, sources: Path = SOURCES) -> str:
    """An object file."""
    subprocess.run([compiler, *OPTIONS, f"-I{sources}", "-c", str(source), "-o", str(out)], check=True)
    return str(out)


def built(compiler: str, *options: str, out: Path) -> Path:
    """The harness and the files that it is made of, in a folder."""
    out.mkdir()
    sources = [HARNESS, *(SOURCES / f"{unit}.cpp" for unit in UNITS)]
    objects = [compiled(compiler, source, out / f"{source.stem}.o") for source in sources]
    subprocess.run([compiler, *options, *objects, "-o", str(out / "harness")], check=True)
    return out


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """The harness, maybe in an emulator."""
    return subprocess.run(command, capture_output=True, text=True, check=False)


def own_compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    return compiler or pytest.skip("there is no C++ compiler")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(own_compiler(), out=tmp_path_factory.mktemp("own") / "harness")


def test_every_level_of_this_processor(own: Path) -> None:
    done = run(str(own / "harness"))
    assert done.returncode == 0 and ", 0 differ" in done.stdout, done.stdout


def test_every_level_of_arm(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    harness = str(built(compiler, "-static", out=tmp_path / "harness") / "harness")
    for processor, lacks, fewer in (
        ("max", set(), ()),
        ("neoverse-n1", {"i8mm", "bf16"}, ("fewer",)),  # what it has was compared in full above
        ("cortex-a57", {"dotprod", "i8mm", "bf16"}, ("fewer",)),
    ):
        done = run(emulator, "-cpu", processor, harness, *fewer)
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
def test_a_wrong_kernel_is_noticed(own: Path, tmp_path: Path, header: str, right: str, wrong: str, what: str) -> None:
    copy, harness = tmp_path / "csrc", str(tmp_path / "wrong")
    shutil.copytree(SOURCES, copy)
    text = (copy / header).read_text(encoding="utf-8")
    assert text.count(right) == 1
    (copy / header).write_text(text.replace(right, wrong), encoding="utf-8")
    spoilt = compiled(own_compiler(), copy / "portable.cpp", tmp_path / "portable.o", sources=copy)
    rest = [str(path) for path in own.glob("*.o") if path.name != "portable.o"]
    subprocess.run([own_compiler(), spoilt, *rest, "-o", harness], check=True)
    done = run(harness, "fewer")
    assert done.returncode == 1 and f"portable, {what}" in done.stdout


def test_the_harness_knows_every_unit_of_vectors() -> None:
    """Kernels of tiles (AMX, AVX512-BF16, INT8 prompts) are compared through PyTorch, in test_cpu_native.py."""
    there = {path.stem for path in SOURCES.glob("*.cpp")} - {"module", "amx", "amx_int8", "bf16", "int8"}
    assert there == set(UNITS)
