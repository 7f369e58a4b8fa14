"""The Triton kernels without a GPU: every tile of the tables compiled ahead of time, and what the machine code says.

    python benchmarks/gpu_static.py                        # all tiles and schemes, several minutes; writes results/gpu_static.*
    python benchmarks/gpu_static.py --target sm_90 --quick # what the tests run; prints one JSON object per line

For each configuration: registers, spills, shared memory, the matrix instruction, loads of 16 bytes, and the instructions of
the inner loop per weight. A GPU issues 128 of them per processor and clock, so that many per weight are the most that leave a
product of few rows bound by memory: 4.6 on an H100 at four bits (132 processors, 1.98 GHz, 3.35 TB/s, 0.53 bytes a weight).
These are counts, not timings. Exits with 1 where a limit is broken.
"""

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_quant.core.scheme import QuantScheme
from hf_quant.kernels._triton.constants import constants
from hf_quant.kernels._triton.tiles import Tile, holds_outliers, tables
from hf_quant.kernels._triton.wna16 import dequantize_kernel, wna16_kernel

RESULTS = Path(__file__).parent / "results"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # the wheel has ptxas, cuobjdump and nvdisasm
TARGETS = {
    "sm_80": ("sm_80", GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_89": ("sm_86", GPUTarget("cuda", 89, 32), 99 << 10),
    "sm_90": ("sm_90", GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": ("sm_100", GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": ("gfx942", GPUTarget("hip", "gfx942", 64), 64 << 10),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
K = 4096
SCHEMES = (
    "W4A16-g128", "W4A16-g128-asym", "W4A16-g128-asym-real", "W4A16-g64", "W4A16-g32", "W4A16-g-1", "W4A16-g64-nf4",
    "W8A16-g128", "W8A16-g128-asym", "W8A16-g-1", "W3A16-g128", "W3A16-g128-asym", "W2A16-g64", "W2A16-g64-asym",
)  # fmt: skip
OUTLIERS = ("W4A16-g128-o1%", "W4A16-g128-o1%-columns")
CHOSEN = "experts, chosen rows"  # as in the first product of experts
IN_ORDER = "experts, rows in order"  # as in the last
MOST_PER_WEIGHT = {  # instructions of the inner loop for up to eight rows of x, on sm_90
    "W4A16-g128": 2.7, "W4A16-g128-asym": 2.7, "W4A16-g128-asym-real": 2.7, "W4A16-g64": 2.7, "W4A16-g-1": 2.7,
    "W8A16-g128": 4.6, "W3A16-g128": 2.7, "W2A16-g64": 2.4,
}  # fmt: skip


def compiled(function: Any, target: GPUTarget, types: dict[str, str], consts: dict[str, Any], **options: int) -> Any:
    uneven = ("M", "GROUPS", "OUTLIERS", "FIRST", "ROWS")
    names = function.arg_names
    at = {name: (i,) for i, name in enumerate(names)}
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={at[name]: consts.get(name) for name in names if name not in types},
        attrs={at[name]: [["tt.divisibility", 16]] for name in types if name not in uneven},
    )
    return triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})


def product(target: GPUTarget, slug: str, dtype: str, tile: Tile, experts: str | None) -> Any:
    """`wna16_kernel` as `launch` would start it."""
    scheme = QuantScheme.parse(slug)
    cuda, split = target.backend == "cuda", 4 if tile.after else 1
    types = {"x_ptr": f"*{dtype}", "word_ptr": "*i16", "scale_ptr": "*fp32" if scheme.codebook else f"*{dtype}"}
    types |= {"y_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}"} | dict.fromkeys(
        ("M", "N", "K", "WORDS", "GROUPS", "OUTLIERS"), "i32"
    )
    if not scheme.symmetric:
        types["zero_ptr"] = f"*{dtype}" if scheme.real_zero else "*u8"
    if scheme.codebook:
        types["table_ptr"] = "*fp32"
    if scheme.outliers:
        types |= {"index_ptr": "*i32", "value_ptr": f"*{dtype}"}
    if split > 1:
        types |= {"part_ptr": "*fp32", "count_ptr": "*i32"}
    if experts is not None:
        types["tile_ptr"] = "*i32"
    if experts == CHOSEN:
        types["row_ptr"] = "*i32"
    consts = constants(scheme, K, DTYPES[dtype], cuda, tile.after) | {
        "AFTER": tile.after, "COLUMNS": scheme.outlier_columns, "TOP_K": 2 if experts == CHOSEN else 1,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SPLIT_K": split, "STAGES": tile.stages,
    }  # fmt: skip
    return compiled(wna16_kernel, target, types, consts, num_warps=tile.warps, num_stages=tile.stages), consts


def dequantizing(target: GPUTarget, slug: str, dtype: str) -> Any:
    scheme = QuantScheme.parse(slug)
    names = ("FIRST", "ROWS", "N", "K", "WORDS", "GROUPS")
    types = {"word_ptr": "*i16", "scale_ptr": f"*{dtype}", "w_ptr": f"*{dtype}"} | dict.fromkeys(names, "i32")
    if not scheme.symmetric:
        types["zero_ptr"] = "*u8"
    own = constants(scheme, K, DTYPES[dtype], False, True)
    consts = {name: own[name] for name in ("BITS", "GROUP", "P", "FIXED")} | {"BLOCK_N": 16}
    return compiled(dequantize_kernel, target, types, consts, num_warps=4)


def sass(kernel: Any) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run: dict[str, Any] = {"capture_output": True, "text": True}
        usage = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", file.name], check=True, **run).stdout
        return usage, subprocess.run([TOOLS / "nvdisasm", "-c", file.name], check=True, **run).stdout


def instructions(text: str, cuda: bool) -> tuple[list[str], list[tuple[int, int]]]:
    """All instructions, and from where to where each loop goes."""
    if cuda:
        label, one = r"^\s*(\.L\w+):", r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
        jump, to = r"BRA", r"`\((\.L\w+)\)"
    else:
        label, one, jump, to = r"^(\.LBB\w+):", r"^\s+([a-z]+_\w+)(.*)$", r"s_c?branch", r"(\.LBB\w+)"
    found: list[str] = []
    labels, loops = {}, []
    for line in text.splitlines():
        if here := re.match(label, line):
            labels[here[1]] = len(found)
        elif match := re.search(one, line):
            found.append(match[1])
            target = re.search(to, match[2])
            if re.match(jump, match[1]) and target and target[1] in labels:
                loops.append((labels[target[1]], len(found)))
    return found, loops


def facts(kernel: Any, cuda: bool) -> dict[str, Any]:
    mma = r"HMMA|HGMMA|UTC\w*MMA|v_mfma"
    if cuda:
        usage, text = sass(kernel)
        registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    else:
        text = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])  # type: ignore[index]
    found, loops = instructions(text, cuda)
    ops = collections.Counter(found)
    bodies = [found[i:j] for i, j in loops]
    inner = max(bodies, key=lambda body: sum(bool(re.match(mma, op)) for op in body), default=[])
    spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
    return {
        "registers": registers,
        "spills": sum(c for op, c in ops.items() if re.match(r"LDL|STL", op)) if cuda else int(spilled[1]),  # type: ignore[index]
        "shared": kernel.metadata.shared,
        "mma": sorted({".".join(op.split(".")[:2]) for op in ops if re.match(mma, op)}),
        "wide_loads": sum(c for op, c in ops.items() if re.search(r"LDG.*\.128|_load_dwordx4", op)),
        "loop": len(inner),
    }


def wrong(name: str, row: dict[str, Any], tile: Tile | None) -> list[str]:
    """Which limits a configuration breaks."""
    found = []
    if row["spills"]:
        found.append(f"{row['spills']} spills")
    if row["registers"] > (512 if name == "gfx942" else 255):
        found.append(f"{row['registers']} registers")
    if row["shared"] > TARGETS[name][2]:
        found.append(f"{row['shared']} bytes of shared memory")
    if tile is None:
        return found
    expected = {"gfx942": "v_mfma"}.get(name, "HMMA")
    if tile.warps >= 4:  # four warps issue the large instructions of Hopper and Blackwell together
        expected = {"sm_90": "HGMMA", "sm_100": "UTCHMMA|HMMA"}.get(name, expected)
    if not any(re.match(expected, op) for op in row["mma"]):
        found.append(f"no {expected} but {row['mma']}")
    if not row["wide_loads"]:
        found.append("no loads of 16 bytes")
    most = MOST_PER_WEIGHT.get(row["scheme"])
    if name == "sm_90" and tile.block_m == 8 and most and row["per_weight"] > most:
        found.append(f"{row['per_weight']} instructions per weight, more than {most}")
    return found


def configurations(name: str, quick: bool) -> list[tuple[str, str, Tile, str | None]]:
    """``(scheme, dtype, tile, experts)``."""
    tiles = [Tile(*numbers) for numbers in tables()[TARGETS[name][0]]["tiles"].values()]
    few, many = tiles[0], tiles[-1]
    if quick and name == "sm_90":
        made = [(slug, "bf16", few, None) for slug in (*SCHEMES, *OUTLIERS)]
        made += [(slug, "fp16", few, None) for slug in ("W4A16-g128", "W8A16-g128", "W2A16-g64")]
        made += [("W4A16-g128", "bf16", tile, CHOSEN if tile is many else None) for tile in tiles[1:]]
        return [*made, (OUTLIERS[1], "bf16", few, IN_ORDER)]
    if quick:
        return [("W4A16-g128-asym", "bf16", few, None), ("W8A16-g128", "fp16", many, None),
                ("W3A16-g128", "fp16", few, CHOSEN)]  # fmt: skip
    schemes = [slug for slug in SCHEMES if not (name == "gfx942" and "nf4" in slug)]  # looked up by PTX
    made = [(slug, "bf16", tile, None) for slug in schemes for tile in tiles]
    made += [(slug, "fp16", few, None) for slug in ("W4A16-g128", "W4A16-g128-asym", "W8A16-g128", "W2A16-g64")]
    return made + [
        (slug, "bf16", tile, experts)
        for experts in (None, CHOSEN, IN_ORDER)
        for slug in ("W4A16-g128", *OUTLIERS)[experts is None :]
        for tile in tiles
        if slug != OUTLIERS[0] or holds_outliers(tile)
    ]


def rows(name: str, quick: bool) -> list[dict[str, Any]]:
    target = TARGETS[name][1]
    cuda, made = target.backend == "cuda", []
    for slug, dtype, tile, experts in configurations(name, quick):
        kernel, consts = product(target, slug, dtype, tile, experts)
        found = facts(kernel, cuda)
        weights = tile.block_n * consts["P"] * (16 // consts["BITS"])
        lanes = tile.warps * target.warp_size
        row = {
            "target": name,
            "scheme": slug,
            "dtype": dtype,
            "tile": [tile.block_m, tile.block_n, tile.warps, tile.stages],
        }
        row |= {"experts": experts, **found, "per_weight": round(found["loop"] * lanes / weights, 2)}
        made.append(row | {"wrong": wrong(name, row, tile)})
        print(json.dumps(made[-1]), flush=True)
    for slug in ("W4A16-g128-asym",) if quick else ("W4A16-g128-asym", "W8A16-g-1", "W3A16-g32", "W2A16-g64-asym"):
        row = {"target": name, "scheme": slug, "dtype": "bf16", "dequantize": True}
        row |= facts(dequantizing(target, slug, "bf16"), cuda)
        made.append(row | {"wrong": wrong(name, row, None)})
        print(json.dumps(made[-1]), flush=True)
    return made


def report(found: list[dict[str, Any]]) -> None:
    """Replace the rows of these targets in the results, and write the table anew."""
    path = RESULTS / "gpu_static.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    targets = {row["target"] for row in found}
    every = sorted(
        [r for r in old if r["target"] not in targets] + found, key=lambda r: list(TARGETS).index(r["target"])
    )
    path.write_text(
        json.dumps({"triton": triton.__version__, "rows": every}, separators=(",", ":")).replace("},{", "},\n{") + "\n"
    )
    lines = [f"Machine code of the Triton kernels, compiled with triton {triton.__version__} on a machine without a GPU "
             "(`benchmarks/gpu_static.py`). **Counts, not timings.**", ""]  # fmt: skip
    lines += [f"{len(every)} configurations, {sum(bool(r['wrong']) for r in every)} of them beyond a limit "
              "(no spills, registers, shared memory, matrix instruction, loads of 16 bytes, instructions per weight).", ""]  # fmt: skip
    lines += ["Few rows of x (the first tile of each table), bfloat16:", "",
              "| GPU | scheme | tile M x N, warps, stages | instructions per weight | registers | shared KB | matrix instruction |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, (kind, *_) in TARGETS.items():
        first = next(iter(tables()[kind]["tiles"].values()))
        for r in every:
            if r["target"] == name and r.get("tile") == first and r["dtype"] == "bf16" and not r["experts"]:
                lines.append(_line(r))
    lines += ["", "Other tiles, W4A16-g128, bfloat16:", "", *lines[6:8]]
    for r in every:
        kind = TARGETS[r["target"]][0]
        first = next(iter(tables()[kind]["tiles"].values()))
        if (r["scheme"], r["dtype"]) == ("W4A16-g128", "bf16") and r.get("tile") not in (None, first):
            lines.append(_line(r))
    broken = [
        f"- {r['target']} {r['scheme']} {r['dtype']} {r.get('tile', '')} {r.get('experts') or ''}: {'; '.join(r['wrong'])}"
        for r in every
        if r["wrong"]
    ]
    lines += ["", "Beyond a limit:" if broken else "Nothing is beyond a limit.", *broken]
    (RESULTS / "gpu_static.md").write_text("\n".join(lines) + "\n")


def _line(r: dict[str, Any]) -> str:
    m, n, warps, stages = r["tile"]
    kind = f"{r['scheme']}{f' ({experts})' if (experts := r['experts']) else ''}"
    return (f"| {r['target']} | {kind} | {m} x {n}, {warps}, {stages} | {r['per_weight']} | {r['registers']} | "
            f"{r['shared'] / 1024:.0f} | {', '.join(r['mma'])} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--quick", action="store_true", help="What the tests run; writes nothing.")
    args = parser.parse_args()
    found = [row for name in args.target or TARGETS for row in rows(name, args.quick)]
    if not args.quick:
        report(found)
    sys.exit(any(row["wrong"] for row in found))


if __name__ == "__main__":
    main()
