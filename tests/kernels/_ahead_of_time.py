"""Run by test_triton.py: compile the kernels for GPUs that are not here and look at the machine code.

sys.argv[1] names the target. Prints one JSON object per configuration.
"""

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_quant.kernels._outliers import outlier_kernel
from hf_quant.kernels.triton_codebook import codebook_kernel
from hf_quant.kernels.triton_wna16 import FEW, MANY, STAGES, WARPS, wna16_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def compiled(target, dtype, bits, has_zero, blocks):
    types = {"x_ptr": f"*{dtype}", "q_ptr": "*i32", "scale_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
    types |= dict.fromkeys(("M", "N", "K", "WORDS", "G", "GROUP"), "i32")
    consts = {"BITS": bits, "HAS_ZERO": bool(has_zero)}
    if has_zero:
        types["zero_ptr"] = "*fp16" if has_zero == "real" else "*u8"
    else:
        consts["zero_ptr"] = None
    return built(target, wna16_kernel, types, consts, blocks)


def compiled_codebook(target, dtype, blocks):
    types = {"x_ptr": f"*{dtype}", "q_ptr": "*u8", "scale_ptr": "*fp32", "table_ptr": "*fp32", "y_ptr": f"*{dtype}"}
    return built(target, codebook_kernel, types | dict.fromkeys(("M", "N", "K", "G", "GROUP"), "i32"), {}, blocks)


def outliers(target, dtype, block_m, block_n):
    types = {"x_ptr": f"*{dtype}", "index_ptr": "*i32", "value_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
    return built(target, outlier_kernel, types | dict.fromkeys(("M", "N", "K", "R"), "i32"), {}, (block_m, block_n))


def built(target, function, types, consts, blocks):
    consts = consts | dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=False))
    uneven = ("M", "N", "WORDS", "G", "GROUP", "R")
    names = function.arg_names
    at = {name: (i,) for i, name in enumerate(names)}
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={at[name]: value for name, value in consts.items()},
        attrs={at[name]: [["tt.divisibility", 16]] for name in types if name not in uneven},
    )
    options = {"num_warps": WARPS, "num_stages": STAGES if target.backend == "cuda" else 2, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def facts(kernel, target):
    if target.backend == "hip":
        asm = kernel.asm["amdgcn"]
        return {
            "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", asm)[1]),
            "spills": int(re.search(r"\.vgpr_spill_count:\s*(\d+)", asm)[1]),
            "mma": len(re.findall(r"\bv_mfma", asm)),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", file.name], **run).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], **run).stdout
    ops = collections.Counter(re.findall(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass))
    count = lambda pattern: sum(c for op, c in ops.items() if re.match(pattern, op))  # noqa: E731
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": count(r"LDL|STL"),
        "mma": count(r"HMMA|HGMMA|UTC\w*MMA"),
    }


name = sys.argv[1]
for dtype, bits, has_zero, blocks in (
    ("bf16", 4, False, FEW),
    ("bf16", 4, True, MANY),
    ("fp16", 4, True, FEW),
    ("bf16", 3, True, FEW),
    ("bf16", 3, False, MANY),
    ("bf16", 2, False, FEW),
    ("bf16", 8, True, MANY),
    ("fp16", 4, "real", FEW),
    ("bf16", "codebook", False, FEW),
    ("bf16", "codebook", False, MANY),
):
    if bits == "codebook":
        kernel = compiled_codebook(TARGETS[name], dtype, blocks)
    else:
        kernel = compiled(TARGETS[name], dtype, bits, has_zero, blocks)
    row = {"target": name, "dtype": dtype, "bits": bits, "has_zero": has_zero, "blocks": blocks}
    sys.stdout.write(json.dumps(row | facts(kernel, TARGETS[name])) + "\n")
for dtype, blocks in (("bf16", (16, 64)), ("fp16", (1, 256))):
    row = {"target": name, "outliers": True, "dtype": dtype, "blocks": blocks}
    sys.stdout.write(json.dumps(row | facts(outliers(TARGETS[name], dtype, *blocks), TARGETS[name])) + "\n")
