"""The tiles of the Triton product: a table for each kind of GPU, and the results of `bench.gpu.tune` on this machine.

Nothing is timed while a model runs. The tables follow from the machine code (``benchmarks/gpu_static.py``), not from timings.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

AFTER = 32  # up to this many rows of x, scales are multiplied into the sums of groups, above it into the weights
MOST_PARTS = 16


@dataclass(frozen=True, slots=True)
class Tile:
    """The blocks of a product.

    Attributes:
        block_m: Rows of x in a tile.
        block_n: Rows of the weight in a tile.
        warps: Warps of a program.
        stages: Blocks of columns that are loaded at once.
        split_k: Programs that share the columns; 0 to choose a number by `parts`.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    split_k: int = 0

    @property
    def after(self) -> bool:
        """Whether scales multiply sums, and not weights."""
        return self.block_m <= AFTER


@lru_cache
def tables() -> dict[str, Any]:
    """The bundled table: kind of GPU to its tiles, and the number of rows from which to dequantize."""
    content: dict[str, Any] = json.loads(Path(__file__).with_name("tiles.json").read_text())
    return content


def kind_of(device: torch.device) -> str:
    """The table for a GPU; for a CPU (the interpreter), that of sm_90."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major in (8, 12):  # consumer GPUs have less shared memory
        return "sm_80" if (major, minor) == (8, 0) else "sm_86"
    return "sm_100" if major >= 10 else "sm_90"


def tuned_path(device: torch.device) -> Path:
    """The file where `bench.gpu.tune` stores its results."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    safe = "".join(c if c.isalnum() else "-" for c in name)
    return Path(os.environ.get("HF_HOME", cache), "hf_quant", "tiles", f"{safe}.json").expanduser()


def holds_outliers(tile: Tile) -> bool:
    """Whether the threads have enough registers for outliers at different positions in each row: a factor for each number of a tile."""
    return tile.block_m * tile.block_n <= 64 * 128


@lru_cache
def _on(device: torch.device) -> tuple[str, int, dict[str, Any]]:
    """Kind, number of processors and tuned tiles of a GPU."""
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return kind_of(device), count, tuned(device)


def tuned(device: torch.device) -> dict[str, Any]:
    """The results of `bench.gpu.tune`: layer to its tiles. Invalid files and entries are ignored."""
    path = tuned_path(device)
    try:
        kept = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        kept = {}
    layers = kept.items() if isinstance(kept, dict) else ()
    return {name: tiles for name, tiles in layers if _sound(tiles)}


def _sound(entry: Any) -> bool:
    """Whether an entry has the form that `bench.gpu.tune` writes, and numbers that a kernel accepts."""
    if not isinstance(entry, dict) or type(entry.get("dense")) is not int or not isinstance(entry.get("tiles"), dict):
        return False
    tiles = entry["tiles"]
    return bool(tiles) and all(rows.isdecimal() and _is_tile(numbers) for rows, numbers in tiles.items())


def _is_tile(numbers: Any) -> bool:
    if (
        not isinstance(numbers, list)
        or len(numbers) not in (4, 5)
        or any(type(number) is not int for number in numbers)
    ):
        return False
    block_m, block_n, warps, stages, split_k = (*numbers, 0)[:5]
    return (
        all(_power(number, 1, 256) for number in (block_m, block_n, warps))
        and 1 <= stages <= 8
        and (split_k == 0 or _power(split_k, 1, MOST_PARTS))
    )


def _power(number: int, least: int, most: int) -> bool:
    """Whether it is a power of two in that range."""
    return least <= number <= most and number & (number - 1) == 0


OLDEST = (8, 0)


@lru_cache
def why_no_triton() -> str | None:
    """Why the kernels cannot be compiled or interpreted here; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    return None if hasattr(triton, "knobs") else f"triton {triton.__version__} is older than 3.4"


@lru_cache
def too_old() -> str | None:
    """Why the kernels cannot run on the GPUs here: one of them lacks their instructions or shared memory; None if none does.

    A layer may be moved to any of them, so the weakest GPU decides.
    """
    if torch.version.hip or not torch.cuda.is_available():
        return None
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        if (major, minor) < OLDEST:
            return f"needs compute capability {OLDEST[0]}.{OLDEST[1]}, cuda:{i} has {major}.{minor}"
    return None


def forget() -> None:
    """Read the tuned tiles again."""
    _on.cache_clear()
    tile_for.cache_clear()


def key(bits: int, n: int, k: int) -> str:
    """Key of a layer in the tuned tiles."""
    return f"W{bits} {n}x{k}"


def parts(tile: Tile, m: int, n: int, blocks: int, processors: int) -> int:
    """Number of programs that share the columns, so that every processor has several: a power of two, with at least two blocks each."""
    tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
    split = 1
    while split < MOST_PARTS and tiles * split * 2 <= 4 * processors and blocks >= 4 * split:
        split *= 2
    return split


@lru_cache(maxsize=4096)  # prompts have many lengths
def tile_for(
    device: torch.device, bits: int, m: int, n: int, k: int, blocks: int, experts: int = 1, *, scattered: bool = False
) -> Tile | None:
    """The tile for ``x [m, k] @ W.T``, W ``[n, k]``; None where W should be dequantized and multiplied densely.

    Rows are assumed to be spread evenly over as many ``experts`` as possible, since only the GPU knows the real numbers.
    ``scattered``: outliers have different columns in every row.
    """
    kind, processors, kept = _on(device)
    table = tables()[kind]
    entry = kept.get(key(bits, n, k), table)
    hit = min(experts, m)
    rows_per_expert = -(-m // hit)
    if rows_per_expert > entry["dense"]:
        return None
    tiles = {int(rows): Tile(*numbers) for rows, numbers in entry["tiles"].items()}
    if scattered:
        tiles = {rows: tile for rows, tile in tiles.items() if holds_outliers(tile)} or tiles
    tile = next((tile for rows, tile in tiles.items() if rows_per_expert <= rows), list(tiles.values())[-1])
    if tile.split_k and experts == 1:
        return tile
    full = hit * -(-rows_per_expert // tile.block_m) * tile.block_m
    return replace(tile, split_k=parts(tile, full, n, blocks, processors))


def as_list(tile: Tile) -> list[int]:
    """For JSON."""
    return list(astuple(tile))
