"""Checkpoints: sound ones are read, damage of any kind is a CheckpointError, and writing is all or nothing."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_quant.checkpoint import INDEX, WEIGHTS, Checkpoint, TensorInfo, read_header, staged, write_json
from hf_quant.errors import CheckpointError

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(folder: Path, **index: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.ones(2, 3)}, folder / ONE)
    save_file({"v": torch.zeros(4, dtype=torch.bfloat16)}, folder / TWO, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": {"w": ONE, "v": TWO}}))
    (folder / "config.json").write_text('{"hidden_size": 64, "head_dim": null, "time_step_limit": [0.0, Infinity]}')
    return folder


# -- sound checkpoints --------------------------------------------------------------------------------------------


def test_one_file(tmp_path: Path) -> None:
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0, 5, dtype=torch.uint8)}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text("{}")
    made = Checkpoint.open(tmp_path)
    info = made.tensors["a"]
    assert isinstance(info, TensorInfo) and made.folder == tmp_path and made.config == {}
    assert (info.file, info.dtype, info.shape, info.nbytes, info.numel) == (tmp_path / WEIGHTS, "F32", (2, 3), 24, 6)
    assert info.is_float and not made.tensors["b"].is_float
    data = (tmp_path / WEIGHTS).read_bytes()[info.offset : info.offset + info.nbytes]
    assert struct.unpack("<6f", data) == tuple(range(6))
    assert torch.equal(made.read("a"), torch.arange(6.0).view(2, 3))
    assert Checkpoint.of_files([tmp_path / WEIGHTS]).tensors == made.tensors
    with pytest.raises(CheckpointError, match="missing"):
        made.read("c")


@pytest.mark.parametrize("index", [{}, {"metadata": {"total_size": 32}}])
def test_shards_with_and_without_metadata(index: dict[str, Any], tmp_path: Path) -> None:
    folder = sharded(tmp_path, **index)
    made = Checkpoint.open(folder)
    assert {name: info.file.name for name, info in made.tensors.items()} == {"w": ONE, "v": TWO}
    assert made.config["hidden_size"] == 64
    assert Checkpoint.of_files([folder / ONE, folder / TWO]).tensors == made.tensors


@pytest.mark.parametrize("below", ["", "sub"])
def test_the_hugging_face_cache(below: str, tmp_path: Path) -> None:
    repo = tmp_path / "models--a--b"
    sharded(repo / "blobs")
    folder = repo / "snapshots" / "abc" / below
    folder.mkdir(parents=True)
    for i, name in enumerate((ONE, TWO, INDEX, "config.json")):
        (repo / "blobs" / name).rename(repo / "blobs" / f"hash{i}")
        (folder / name).symlink_to(os.path.relpath(repo / "blobs" / f"hash{i}", folder))
    for made in (Checkpoint.open(folder), Checkpoint.of_files([folder / ONE, folder / TWO])):
        assert torch.equal(made.read("w"), torch.ones(2, 3))
    shared = tmp_path / "blobs" / "ab" / "abc0"
    shared.parent.mkdir(parents=True)
    (repo / "blobs" / "hash0").rename(shared)
    (repo / "blobs" / "hash0").symlink_to(os.path.relpath(shared, repo / "blobs"))
    assert torch.equal(Checkpoint.open(folder).read("w"), torch.ones(2, 3)), "a store that repositories share"
    (tmp_path / "linked").symlink_to(folder)
    assert set(Checkpoint.open(tmp_path / "linked").tensors) == {"w", "v"}
    (folder / ONE).unlink()
    (folder / ONE).symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match=f"{ONE}: points outside"):
        Checkpoint.open(folder)


def test_variants_and_paths_with_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sharded(tmp_path / "a")
    renamed = {ONE: ONE.replace("model", "model.fp16"), TWO: TWO.replace("model", "model.fp16")}
    for old, new in renamed.items():
        (folder / new).write_bytes((folder / old).read_bytes())
    index = {"weight_map": {"w": renamed[ONE], "v": renamed[TWO]}}
    (folder / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    assert Checkpoint.of_files([folder / name for name in renamed.values()]).tensors.keys() == {"w", "v"}
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    for way in (tmp_path / "b" / ".." / "a", Path("../a"), folder / ".." / "a"):
        assert Checkpoint.of_files([way / ONE, way / TWO]).tensors.keys() == {"w", "v"}


def test_a_file_cut_after_it_was_checked(tmp_path: Path) -> None:
    save_file({"a": torch.ones(64)}, tmp_path / WEIGHTS)
    made = Checkpoint.of_files([tmp_path / WEIGHTS])
    os.truncate(tmp_path / WEIGHTS, 100)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: tensor a"):
        made.read("a")


# -- mutations ----------------------------------------------------------------------------------------------------

VALUES = [0, 1, -1, 3, 2**31, 2**63, 2**64, 1.5, True, None, "", "F32", "I8", [], [0], [2, 2], [0, 16], [16, 32], {}]


def mutated(header: dict[str, Any], rng: random.Random) -> None:
    """Change one thing somewhere in the header, so that it stays JSON of about the right structure."""
    name = rng.choice(list(header))
    entry = header[name]
    field = rng.choice(list(entry)) if isinstance(entry, dict) and entry else None
    action = rng.randrange(6)
    if action == 0:
        header[rng.choice(["w", "x", "__metadata__", "../x", "\u0000", ""])] = rng.choice([entry, *VALUES])
    elif action == 1 and len(header) > 1:
        del header[name]
    elif field is None:
        header[name] = rng.choice(VALUES)
    elif action == 2:
        del entry[field]
    elif action == 3 and isinstance(entry[field], list) and entry[field]:
        at = rng.randrange(len(entry[field]))
        entry[field][at] = rng.choice([*VALUES, entry[field][at]])
    elif action == 4:
        entry[rng.choice([field, "more"])] = rng.choice(VALUES)
    else:
        other = header[rng.choice(list(header))]
        entry[field] = other.get(field) if isinstance(other, dict) else other


def damaged(rng: random.Random) -> bytes:
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "v": {"dtype": "I8", "shape": [16], "data_offsets": [16, 32]},
        "e": {"dtype": "BF16", "shape": [0, 4], "data_offsets": [16, 16]},
    }
    for _ in range(rng.randrange(3)):
        mutated(header, rng)
    text = bytearray(json.dumps(header).encode() + b" " * rng.randrange(8))
    for _ in range(rng.choice([0, 0, 1, 3])):
        text[rng.randrange(len(text))] = rng.randrange(256)
    length = len(text) + rng.choice([0] * 8 + [-1, 1, 2**40, 2**63])
    return struct.pack("<Q", length) + bytes(text) + bytes(max(0, 32 + rng.choice([0] * 8 + [-1, 1, -32])))


def test_whatever_is_accepted_the_library_accepts_too(tmp_path: Path) -> None:
    rng, path, accepted, refused = random.Random(0), tmp_path / WEIGHTS, 0, 0
    for _ in range(800):
        path.write_bytes(damaged(rng))
        try:
            found = read_header(path)  # nothing but CheckpointError may come out
        except CheckpointError as error:
            refused += 1
            assert WEIGHTS in str(error) and str(error).isprintable()
            continue
        accepted += 1
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == set(found)
            for name, info in found.items():
                assert tuple(file.get_slice(name).get_shape()) == info.shape
    assert accepted > 50 and refused > 200


def test_sound_files_of_the_library_are_accepted(tmp_path: Path) -> None:
    dtypes = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16]
    dtypes += [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
    rng = random.Random(0)
    for _ in range(30):
        tensors = {
            f"model.layers.{i}.w-{i}/x": torch.zeros([rng.randrange(4) for _ in range(rng.randrange(4))]).to(
                rng.choice(dtypes)
            )
            for i in range(rng.randrange(1, 12))
        }
        save_file(tensors, tmp_path / WEIGHTS)
        found = read_header(tmp_path / WEIGHTS)
        assert {name: info.shape for name, info in found.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
        assert {name: info.is_float for name, info in found.items()} == {
            n: t.is_floating_point() for n, t in tensors.items()
        }


# -- writing ------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Not an Exception: like KeyboardInterrupt."""


def test_staged_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with staged(out) as stage:
        assert stage.is_dir() and stage.parent == out.parent and not out.exists()
        (stage / "sub").mkdir()
        (stage / "sub" / "a").write_text("1")
    assert (out / "sub" / "a").read_text() == "1"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, Crash, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_staged_leaves_nothing_after_a_crash(overwrite: bool, error: type[BaseException], tmp_path: Path) -> None:
    out = tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "old").write_text("1")
    with pytest.raises(error), staged(out, overwrite=overwrite) as stage:
        (stage / "a").write_text("1")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if overwrite else [])
    assert not overwrite or [path.name for path in out.iterdir()] == ["old"]


def test_staged_refuses_what_exists(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with pytest.raises(CheckpointError, match="out: exists"), staged(tmp_path / "out"):
        pytest.fail("the body must not run")
    (tmp_path / "file").write_text("1")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="file"), staged(tmp_path / "file", overwrite=overwrite):
            pytest.fail("the body must not run")
    assert (tmp_path / "file").read_text() == "1"
    (tmp_path / "empty").mkdir()
    with staged(tmp_path / "empty") as stage:
        (stage / "a").write_text("1")
    assert (tmp_path / "empty" / "a").exists()


def test_staged_overwrites_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    with staged(out, overwrite=True) as stage:
        (stage / "new").write_text("1")
        assert (out / "old").exists()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_staged_puts_the_old_back_if_the_last_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()
    (out / "old").write_text("1")

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(f"stage-{os.getpid()}"):
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk full"), staged(out, overwrite=True) as stage:
        (stage / "new").write_text("1")
    assert [path.name for path in out.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_everything_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    log: list[int | str] = []
    fsync, rename = os.fsync, Path.rename

    def noted(handle: int) -> None:
        log.append(os.fstat(handle).st_ino)
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        log.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    with staged(out) as stage:
        (stage / "sub").mkdir()
        (stage / "sub" / "a").write_text("1")
    want = {path.stat().st_ino for path in (out, out / "sub", out / "sub" / "a")}
    assert want <= set(log[: log.index("rename")])
    assert log[-1] == tmp_path.stat().st_ino


def test_write_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
