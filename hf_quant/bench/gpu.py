"""Times of the GPU's linear layers, and which tiles are fastest on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_quant.disk import write_atomically
from hf_quant.errors import HfQuantError
from hf_quant.kernels import LinearSpec
from hf_quant.kernels._tiles import Tile, as_list, forget, key, kind_of, tables, tuned_path
from hf_quant.methods import method
from hf_quant.scheme import QuantScheme

ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BEYOND_CACHE = 4  # times the second-level cache that the weights of one timing take
Call = Callable[[Tensor], Tensor]
