"""No module is longer than can be read at a sitting: 400 lines."""

from pathlib import Path

import hf_quant

MOST = 400
SOURCES = ("*.py", "*.cpp", "*.h")


def too_long(root: Path) -> dict[str, int]:
    """Modules under ``root`` with more lines than `MOST`."""
    files = {file for kind in SOURCES for file in root.rglob(kind)}
    lines = {file.relative_to(root).as_posix(): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    return {name: count for name, count in lines.items() if count > MOST}


def test_no_module_is_longer() -> None:
    assert not too_long(Path(hf_quant.__file__).parent)


def test_a_longer_one_is_found(tmp_path: Path) -> None:
    for name, count in (("fits.py", MOST), ("long.py", MOST + 1), ("long.h", MOST + 2)):
        (tmp_path / name).write_text("#\n" * count)
    assert too_long(tmp_path) == {"long.py": MOST + 1, "long.h": MOST + 2}
