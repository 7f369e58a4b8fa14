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

from hf_quant.checkpoint.config import check_config
from hf_quant.checkpoint.folder import INDEX, WEIGHTS, Checkpoint
from hf_quant.disk.safetensors import DTYPES, TensorInfo, read_header, write_tensors
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


def test_sizes_that_models_of_transformers_have() -> None:
    """GLM-5's attention without positions has heads of dimension 0, LXMERT a number of layers for each of its parts."""
    check_config({"text_config": {"head_dim": 0}, "num_hidden_layers": {"language": 9, "vision": 5}})
    with pytest.raises(CheckpointError, match="num_hidden_layers must be an integer from 1 to 1000, got 100000"):
        check_config({"num_hidden_layers": {"language": 9, "vision": 10**5}})


@pytest.mark.parametrize("named", ["consolidated.safetensors", "consolidated.safetensors.index.json"])
def test_the_file_that_the_config_names_is_read(named: str, tmp_path: Path) -> None:
    """transformers loads it before model.safetensors: what is checked has to be what is loaded."""
    save_file({"other": torch.ones(1)}, tmp_path / WEIGHTS)
    save_file({"w": torch.ones(2, 3)}, tmp_path / "consolidated.safetensors")
    index = {"metadata": {}, "weight_map": {"w": "consolidated.safetensors"}}
    (tmp_path / "consolidated.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": named}))
    assert list(Checkpoint.open(tmp_path).tensors) == ["w"]


@pytest.mark.parametrize(
    "named", ["true", "../model.safetensors", "model.bin", 3, ["model.safetensors"], "gone.safetensors"]
)
def test_a_config_that_names_no_weights(named: Any, tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": named}))
    with pytest.raises(CheckpointError, match=r"transformers_weights|gone\.safetensors"):
        Checkpoint.open(tmp_path)


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


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    tensors = {f"m.{name}": torch.arange(6).reshape(2, 3).to(dtype) for dtype, name in DTYPES.items()}
    tensors |= {"t": torch.arange(6.0).view(2, 3).T, "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4)}
    tensors["grad"] = torch.nn.Parameter(torch.ones(3))
    write_tensors(one, tensors)
    write_tensors(two, dict(reversed(tensors.items())))
    assert one.read_bytes() == two.read_bytes()
    assert {name: info.offset % info.nbytes for name, info in read_header(one).items() if info.numel == 1} == {
        "scalar": 0
    }
    with safe_open(one, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert found.float().tolist() == tensor.float().tolist()
