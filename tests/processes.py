"""Several processes on one machine, joined by gloo."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_quant.errors import HfQuantError
from hf_quant.solve.ranks import Ranks


def together(work: Callable[[Ranks], Any], folder: Path, world: int = 3, seconds: float = 60) -> list[Any]:
    """What ``work`` gives in each of ``world`` processes; one that raises gives the error's text."""
    children = []
    for rank in range(world):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads: a child has but one
            child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                wait = timedelta(seconds=seconds)
                dist.init_process_group("gloo", f"file://{folder}/store", timeout=wait, rank=rank, world_size=world)
                result = work(Ranks(rank, world, dist.new_group(backend="gloo")))
            except HfQuantError as error:
                result = str(error)
            except BaseException:
                result = traceback.format_exc()
            torch.save(result, folder / f"{rank}.pt")
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
