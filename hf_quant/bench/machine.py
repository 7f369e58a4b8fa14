"""The machine that numbers are measured on."""

from __future__ import annotations

import platform
from pathlib import Path

INFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """Name of the processor from Linux or from Python, or at least its architecture."""
    lines = INFO.read_text().splitlines() if INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
