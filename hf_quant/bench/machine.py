"""What the numbers are measured on."""

from __future__ import annotations

import platform
from pathlib import Path

INFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """Of the processor, as Linux has it; elsewhere as Python has it, or at least the architecture."""
    lines = INFO.read_text().splitlines() if INFO.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()
