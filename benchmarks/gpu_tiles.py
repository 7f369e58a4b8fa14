"""Find the fastest tiles of the Triton product on this GPU for layers of a 7B model: what ``hf-quant bench --tune`` does.

python benchmarks/gpu_tiles.py [--rows FILE] [--schemes W4A16-g128 ...]
"""

import os
import time

import torch
from _gpu import Rows, device_for, parser

from hf_quant.bench.gpu import candidates, tune
from hf_quant.core.scheme import QuantScheme
from hf_quant.kernels._triton.tiles import tuned_path

SCHEMES = ("W4A16-g128", "W8A16-g128")
SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192))  # N, K: the first of `gpu_linear`


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--schemes", nargs="*", default=SCHEMES)
    arguments = options.parse_args()
    rows, device = Rows("tiles", arguments.rows), device_for(arguments.dry_run)
    if arguments.dry_run:
        rows.add(candidates={m: len(candidates(m)) for m in (8, 16, 32, 64, 128)})
        return
    for slug in arguments.schemes:
        for n, k in SHAPES:
            start, layer = time.perf_counter(), (QuantScheme.parse(slug), n, k, torch.bfloat16)

            def tuned(
                layer: tuple[QuantScheme, int, int, torch.dtype] = layer, start: float = start
            ) -> dict[str, object]:
                with torch.inference_mode():
                    tiles = tune([layer], max(1, (os.cpu_count() or 1) - 2))
                return {"tiles": tiles, "file": tuned_path(device).name, "seconds": time.perf_counter() - start}

            rows.attempt({"scheme": slug, "N": n, "K": k}, tuned)


if __name__ == "__main__":
    main()
