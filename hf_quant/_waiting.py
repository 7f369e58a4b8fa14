"""How long PyTorch's threads spin before they sleep, while they wait for work.

GNU OpenMP, which PyTorch's wheels bring along, lets a waiting thread spin about 300,000 times. Where another program uses a core,
the thread that is waited for may not be running, and every parallel operation loses its time slice: rounding 2048 x 2048 weights
takes nine times as long beside one busy process on two cores, and 2.4 times as long with 10,000. On a quiet machine the two did
not differ by more than measurements do.
"""

from __future__ import annotations

import os
import sys

SPINS = "10000"


def spin_briefly() -> None:
    """Ask OpenMP for `SPINS`, unless the user says how to wait, or PyTorch is imported: it reads this at its import."""
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
