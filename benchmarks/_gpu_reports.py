"""A plug-in of pytest for `gpu_day`: every test that does not pass becomes a row at once, and the rest are counted."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from _gpu import Rows

_rows = Rows(os.environ.get("GPU_DAY_STAGE", "tests"), Path(os.environ["GPU_DAY_ROWS"]))
_counts: Counter[str] = Counter()


def pytest_runtest_logreport(report: Any) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # the process that hands out the tests gets every report, too
    if report.when == "call" or report.outcome != "passed":
        _counts[report.outcome] += 1
    if report.outcome == "failed":
        _rows.add(test=report.nodeid, when=report.when, failed=str(report.longrepr)[-3000:])


def pytest_sessionfinish() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _rows.add(tests=dict(_counts))
