"""How much memory may still be taken, with and without a container."""

from __future__ import annotations

from pathlib import Path

import click
import psutil
import pytest

from hf_quant.cli import main
from hf_quant.disk import memory

GB = 10**9


def test_files_kept_in_memory_count_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_left_in_containers", lambda: iter(()))
    before, free, after = psutil.virtual_memory(), memory.free_memory(), psutil.virtual_memory()
    slack = GB  # other processes come and go
    assert min(before.available, after.available) - slack < free < max(before.available, after.available) + slack
    assert free > psutil.virtual_memory().free - slack


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        ("0::/\n", {"memory.max": f"{4 * GB}\n", "memory.current": f"{3 * GB}\n"}, GB),
        (
            "0::/a/b\n",
            {
                "a/b/memory.max": "max\n", "a/b/memory.current": f"{GB}\n", "a/memory.max": f"{4 * GB}\n",
                "a/memory.current": f"{3 * GB}\n", "a/memory.stat": f"anon 5\ninactive_file {GB}\nfile 7\n",
            },
            2 * GB,
        ),
        (
            "12:cpu:/x\n4:hugetlb,memory:/docker/c\n0::/\n",
            {
                "memory/docker/c/memory.limit_in_bytes": f"{2 * GB}\n",
                "memory/docker/c/memory.usage_in_bytes": f"{GB}\n",
                "memory/memory.limit_in_bytes": f"{2**63 - 4096}\n", "memory/memory.usage_in_bytes": "0\n",
            },
            GB,
        ),
        # the path of the machine outside, which a container does not see: only the top is there
        ("0::/system.slice/docker-1.scope\n", {"memory.max": f"{GB}\n", "memory.current": "0\n"}, GB),
        ("0::/../..\n", {"memory.max": "nonsense", "memory.current": "0\n"}, None),
        ("nonsense\n", {}, None),
    ],
)  # fmt: skip
def test_limits_of_containers(tmp_path: Path, own: str, files: dict[str, str], left: int | None) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = list(memory._left_in_containers(tmp_path, tmp_path / "own"))
    assert min(found, default=None) == left
    assert not list(memory._left_in_containers(tmp_path, tmp_path / "none"))


def test_the_smallest_limit_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for left, free in (([5, 3], 3), ([-7], 0)):
        monkeypatch.setattr(memory, "_left_in_containers", lambda left=left: iter(left))
        assert memory.free_memory() == free


class Panic(BaseException):
    """What a library in Rust raises."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory, or of threads: the system gives this process no more"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 7 bytes.\nmore"), "tried 7 bytes.)"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "(CUDA out of memory"),
        (Panic('IOError(Os { code: 11, message: "Resource temporarily unavailable" })'), "code: 11"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (KeyError("memory"), None),
    ],
)  # fmt: skip
def test_no_more_memory_is_a_sentence(
    error: BaseException, said: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*_: object) -> None:
        raise error

    monkeypatch.setattr(click.Group, "invoke", command)
    if said is None:
        with pytest.raises(type(error)):
            main(["doctor"], standalone_mode=False)
    else:
        with pytest.raises(SystemExit) as ended:
            main(["doctor"], standalone_mode=False)
        assert ended.value.code == 1 and said in capsys.readouterr().err.splitlines()[0]


@pytest.mark.skipif(not hasattr(memory._glibc(), "mallinfo2"), reason="the C library is another or an older one")
def test_freed_memory_is_given_back_where_that_is_worth_it() -> None:
    blocks = [bytes(100_000) for _ in range(3000)]  # too small to be mapped each by itself
    kept = blocks[::100]  # so that the heap cannot shrink from its end
    full = psutil.Process().memory_info().rss
    del blocks
    memory.give_back_memory(least=GB)
    assert psutil.Process().memory_info().rss > full - GB // 20
    memory.give_back_memory(least=GB // 10)
    assert psutil.Process().memory_info().rss < full - GB // 5 and len(kept) == 30
