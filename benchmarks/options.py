"""Every method with every scheme, format and way to run, on a tiny model with outlier channels: about five minutes.

    python benchmarks/options.py [WORD ...]

Runs the cases whose name holds all words given (`tests/options.py` says what they are) and prints those that fail.
"""

import sys
import tempfile
from pathlib import Path

from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.options import Options, cases


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    wanted = [case for case in cases() if all(word in str(case) for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as folder:
        options = Options(Path(folder))
        faults = {case: fault for case in wanted if (fault := options.fault(case)) is not None}
    for case, fault in faults.items():
        print(f"{case}: {fault}")
    print(f"{len(wanted)} cases, {len(faults)} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
