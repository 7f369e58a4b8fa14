"""The compiled kernels for CPUs: built where a C++ compiler is at hand, left out where there is none.

HF_QUANT_SANITIZE adds options of the compiler and the linker; ``.ci/sanitize`` sets it.
"""

import os
import runpy
from pathlib import Path

from setuptools import Extension, setup

SOURCES = runpy.run_path("hf_quant/kernels/_native/sources.py")["digest"]()
UNITS = (
    "module",
    "portable",
    "avx2",
    "avx512",
    "vnni",
    "bf16",
    "int8",
    "amx",
    "amx_int8",
    "dotprod",
    "i8mm",
    "bfmmla",
)
kernels = Extension(
    "hf_quant.kernels._cpu",
    sources=[f"hf_quant/kernels/_native/csrc/{unit}.cpp" for unit in UNITS],
    depends=sorted(map(str, Path("hf_quant/kernels/_native/csrc").glob("*.h"))),
    define_macros=[("SOURCES", f'"{SOURCES}"')],
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-ffp-contract=fast",
        "-g0",
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
        *os.environ.get("HF_QUANT_SANITIZE", "").split(),
    ],
    extra_link_args=os.environ.get("HF_QUANT_SANITIZE", "").split(),
    language="c++",
    py_limited_api=True,
    optional=True,
)
setup(ext_modules=[kernels], options={"bdist_wheel": {"py_limited_api": "cp310"}})
