"""Times linear layers on a GPU, and finds the fastest tiles there."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.disk.atomic import make_folder, write_json
from hf_quant.errors import HfQuantError
from hf_quant.kernels import LinearSpec, select
from hf_quant.kernels._triton.tiles import Tile, as_list, forget, key, too_old, tuned, tuned_path
from hf_quant.nn import QuantMatrix

ROWS = (8, 16, 32, 64, 128, 256, 512, 1024)
CACHES = 4  # total size of the weights of one timing, in sizes of the last cache
Layer = tuple[QuantScheme, int, int, torch.dtype]  # scheme, N, K, dtype of the product
Launch = tuple[Layer, int, "Tile | None", torch.device]  # layer, rows of x, tile (None: what a model takes), device


def need_gpu() -> torch.device:
    """The current GPU.

    Raises:
        HfQuantError: There is no GPU.
    """
    if not torch.cuda.is_available():
        raise HfQuantError("no GPU here: times of its kernels and their tiles can only be found on one")
    return torch.device("cuda", torch.cuda.current_device())


def copies(nbytes: int) -> int:
    """Number of weights of ``nbytes`` bytes that together exceed the last cache several times."""
    cache = torch.cuda.get_device_properties(need_gpu()).L2_cache_size
    return max(2, -(-CACHES * cache // nbytes))


def microseconds(calls: Sequence[Callable[[], Any]], repeats: int = 9) -> float:
    """Time of one call: the median over replays of a CUDA graph of all calls, so that Python adds nothing."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(calls))
    return statistics.median(times)


def weight(scheme: QuantScheme, n: int, k: int, dtype: torch.dtype, device: torch.device) -> QuantizedTensor:
    """A weight ``[n, k]`` of random codes."""
    packed = torch.randint(256, (n, scheme.packed_bytes(k)), dtype=torch.uint8, device=device)
    groups = (n, scheme.groups(k))
    scale = (torch.rand(groups, dtype=torch.float32, device=device) * 0.01 + 0.01).to(dtype)
    if scheme.symmetric:
        return QuantizedTensor(packed, scale, None, scheme)
    zero = torch.randint(scheme.qmax + 1, groups, device=device)
    return QuantizedTensor(packed, scale, zero.to(dtype if scheme.real_zero else torch.uint8), scheme)


def candidates(rows: int) -> list[Tile]:
    """Tiles to try for ``rows`` rows of x."""
    high = [8, 16, 32] if rows <= 32 else [64, 128]
    tiles = []
    for m in (m for m in high if m >= min(rows, high[-1]) or m == high[-1]):
        for n, warps in ((32, 2), (64, 2), (64, 4), (128, 4), (128, 8)):
            for stages in (2, 3, 4):
                tiles += [Tile(m, n, warps, stages, split) for split in ((1, 2, 4, 8, 16) if rows <= 64 else (1,))]
    return tiles


def layers_of(model: nn.Module) -> list[Layer]:
    """The distinct linear layers of a model: tiles depend on scheme, shape and dtype, but not on zero points."""
    layers: dict[str, Layer] = {}
    for module in model.modules():
        if isinstance(module, QuantMatrix):
            scheme, n, k = module.spec.scheme, module.spec.out_features, module.spec.in_features  # with padding
            layers.setdefault(key(scheme.bits, n, k), (scheme, n, k, module.compute_dtype))
    return list(layers.values())


def compile_all(launches: Sequence[Launch], processes: int) -> None:
    """Launch each once in one of several processes, so that Triton's cache on disk holds what it is compiled to.

    A launch that fails leaves nothing there; whoever needs it meets the error.
    """
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_launch_once, launches, chunksize=4))


def _launch_once(launch: Launch) -> None:
    (scheme, n, k, dtype), rows, tile, device = launch
    with suppress(Exception), torch.inference_mode():  # of any type: what the compiler and the GPU raise
        x = torch.zeros(rows, k, dtype=dtype, device=device)
        _product(scheme, n, k, dtype, device)(x, tile)


@lru_cache(maxsize=1)
def _product(
    scheme: QuantScheme, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor, Tile | None], Tensor]:
    """``x`` times a weight of random codes, in a tile, or as a model would."""
    from hf_quant.kernels.triton_wna16 import launch

    spec = LinearSpec(scheme, n, k, dtype, device.type)
    backend = select(spec)
    w: Any = backend.prepare(weight(scheme, n, k, dtype, device), spec)

    def run(x: Tensor, tile: Tile | None) -> Tensor:
        if tile is None:
            return backend.linear(x, w, spec)
        return launch(x, w.packed, w.counters, w.scale, w.zero, w.table, None, None, None, scheme, tile)

    return run


def tune(layers: Iterable[Layer], processes: int = 1) -> dict[str, Any]:
    """Time all tiles for every layer, and store the fastest ones in the cache of this machine.

    Args:
        layers: The layers.
        processes: So many compile, before anything is timed.

    Raises:
        HfQuantError: There is no GPU.
    """
    device = need_gpu()
    if (reason := too_old()) is not None:
        raise HfQuantError(f"nothing to tune: the kernel for GPUs {reason}")
    path, tuned_tiles = tuned_path(device), tuned(device)
    for scheme, n, k, dtype in layers:
        if processes > 1:
            layer = scheme, n, k, dtype
            compile_all([(layer, rows, tile, device) for rows in ROWS for tile in candidates(rows)], processes)
        tuned_tiles[key(scheme.bits, n, k)] = _tuned(scheme, n, k, dtype, device)
        make_folder(path.parent)
        write_json(path, tuned_tiles)
    forget()
    return tuned_tiles


def _tuned(scheme: QuantScheme, n: int, k: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    from hf_quant.kernels.triton_wna16 import BACKEND, densely, launch

    spec, backend = LinearSpec(scheme, n, k, dtype, "cuda"), BACKEND()
    quantized = weight(scheme, n, k, dtype, device)
    prepared = [backend.prepare(quantized, spec) for _ in range(copies(quantized.qweight.numel()))]

    def sparsely(x: Tensor, tile: Tile, i: int) -> Tensor:
        w = prepared[i]
        return launch(x, w.packed, w.counters, w.scale, w.zero, w.table, None, None, None, scheme, tile)

    def many(x: Tensor, i: int) -> Tensor:
        w = prepared[i]
        return densely(x, w.packed, w.scale, w.zero, w.table, None, None, None, scheme)

    tiles: dict[str, list[int]] = {}
    for rows in ROWS:
        x = torch.randn(rows, k, device=device, dtype=dtype)
        fastest_time, fastest = microseconds([partial(many, x, i) for i in range(len(prepared))]), None
        for tile in candidates(rows):
            try:
                took = microseconds([partial(sparsely, x, tile, i) for i in range(len(prepared))])
            except Exception:  # the tile needs too much shared memory, for example
                continue
            if took < fastest_time:
                fastest_time, fastest = took, tile
        if fastest is None and tiles:
            return {"tiles": tiles, "dense": int(next(reversed(tiles)))}
        tiles[str(rows)] = as_list(fastest or Tile(16, 64, 2, 2))
    return {"tiles": tiles, "dense": ROWS[-1]}
