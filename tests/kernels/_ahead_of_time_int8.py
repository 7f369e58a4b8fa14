"""Run by test_int8.py: compile the INT8 kernels for GPUs that are not here and look at the machine code.

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

from hf_quant.kernels.triton_int8 import FEW, GROUPED, MANY, STAGES, WARPS, int8_kernel, round_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
UNEVEN = ("M", "N", "G", "GROUP")


def built(target, function, types, consts, warps):
    names = function.arg_names
    at = {name: (i,) for i, name in enumerate(names)}
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={at[name]: value for name, value in consts.items()},
        attrs={at[name]: [["tt.divisibility", 16]] for name in types if name not in UNEVEN},
    )
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": STAGES})


def facts(kernel):
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
        "integer_mma": count(r"IMMA|IGMMA"),
        "float_mma": count(r"HMMA|HGMMA"),
    }


name = sys.argv[1]
target = GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
for bits, in_groups, fused, has_zero, kept, static, blocks in (
    (8, False, True, False, False, False, FEW),
    (8, False, True, False, True, True, FEW),
    (8, False, False, False, False, False, MANY),
    (8, True, False, False, False, False, GROUPED),
    (4, True, True, False, False, False, FEW),
    (4, True, False, True, False, False, GROUPED),
    (4, True, False, False, False, False, (64, 128, 64)),
    (4, False, False, False, False, False, MANY),
):
    types = {
        "x_ptr": "*bf16" if fused else "*i8", "q_ptr": "*u8", "scale_ptr": "*bf16", "y_ptr": "*bf16",
        **dict.fromkeys(("M", "N", "K", "G", "GROUP"), "i32"),
    }  # fmt: skip
    consts = {
        "BITS": bits, "HAS_ZERO": has_zero, "IN_GROUPS": in_groups, "FUSED": fused, "HAS_KEPT": kept,
        "STATIC": static, "BLOCK_M": blocks[0], "BLOCK_N": blocks[1], "BLOCK_K": blocks[2],
    }  # fmt: skip
    for pointer, there, kind in (
        ("zero_ptr", has_zero, "*u8"), ("kept_ptr", kept, "*u8"),
        ("range_ptr", static or not fused, "*bf16" if static else "*fp32"),
    ):  # fmt: skip
        if there:
            types[pointer] = kind
        else:
            consts[pointer] = None
    kernel = built(target, int8_kernel, types, consts, WARPS if blocks[0] == 16 else 2 * WARPS)
    row = {"target": name, "bits": bits, "in_groups": in_groups, "fused": fused, "blocks": blocks}
    sys.stdout.write(json.dumps(row | facts(kernel)) + "\n")
for kept, static, planes in ((False, False, 1), (True, True, 2)):
    types = {"x_ptr": "*bf16", "q_ptr": "*i8", "scale_ptr": "*fp32", "K": "i32"}
    types |= ({"kept_ptr": "*u8"} if kept else {}) | ({"range_ptr": "*bf16"} if static else {})
    consts = {"HAS_KEPT": kept, "STATIC": static, "PLANES": planes, "BLOCK_K": 1024}
    consts |= ({} if kept else {"kept_ptr": None}) | ({} if static else {"range_ptr": None})
    row = {"target": name, "rounds": planes}
    sys.stdout.write(json.dumps(row | facts(built(target, round_kernel, types, consts, WARPS))) + "\n")
