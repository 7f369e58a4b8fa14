"""Damaged and hostile checkpoints, made by hand: each is refused at once, by an error that says where and what."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_quant.checkpoint.contents import Contents
from hf_quant.checkpoint.folder import INDEX, WEIGHTS, Checkpoint
from hf_quant.core.scheme import QuantScheme
from hf_quant.disk.safetensors import read_header
from hf_quant.errors import CheckpointError, FormatError
from hf_quant.formats import format_named, format_of
from hf_quant.formats._compressed_tensors_config import config_of
from hf_quant.methods import method

CONFIG = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256, "intermediate_size": 96}
GOOD = {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def raw(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def folder_of(tmp_path: Path, files: dict[str, Any]) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name, content in ({"config.json": CONFIG} | files).items():
        if content is not None:
            made = content if isinstance(content, bytes) else json.dumps(content).encode()
            (folder / name).write_bytes(made)
    return folder


def entry(**fields: Any) -> bytes:
    return raw({"w": GOOD["w"] | fields})


NESTED = b'{"w":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
HEADERS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "truncated"),
    "seven bytes": (bytes(7), "truncated"),
    "header longer than the file": (raw(GOOD, length=1000), "truncated"),
    "header of 2**63 bytes": (raw(GOOD, length=2**63), "limit"),
    "header of 2**64 - 1 bytes": (raw(GOOD, length=2**64 - 1), "limit"),
    "data cut off": (raw(GOOD, bytes(15)), "truncated.*w"),
    "data missing": (raw(GOOD, b""), "truncated.*w"),
    "trailing bytes": (raw(GOOD, bytes(17)), "trailing"),
    "no header at all": (raw(b"", b""), "header"),
    "not JSON": (raw(b"{abc}"), "JSON"),
    "not UTF-8": (raw(b'{"\xff":1}'), "JSON"),
    "a list": (raw([1]), "header"),
    "JSON after a blank": (raw(b" " + json.dumps(GOOD).encode()), "header"),
    "nested too deep": (raw(NESTED), "JSON"),
    "a number of 5000 digits": (raw(b'{"w":' + b"9" * 5000 + b"}"), "JSON"),
    "a tensor twice": (raw(b'{"w":%b,"w":%b}' % ((json.dumps(GOOD["w"]).encode(),) * 2)), "w.*twice"),
    "shape twice": (raw(b'{"w":{"dtype":"F32","shape":[4],"shape":[2,2],"data_offsets":[0,16]}}'), "shape.*twice"),
    "metadata of numbers": (raw(GOOD | {"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata a list": (raw(GOOD | {"__metadata__": []}), "__metadata__"),
    "unknown dtype": (entry(dtype="F128"), "tensor w.*dtype.*F128"),
    "dtype a list": (entry(dtype=["F32"]), "tensor w.*dtype"),
    "negative axis": (entry(shape=[-2, -2]), "tensor w.*shape"),
    "fractional axis": (entry(shape=[2.0, 2]), "tensor w.*shape"),
    "true as an axis": (entry(shape=[True, 4]), "tensor w.*shape"),
    "huge axis": (entry(shape=[2**62, 4]), "tensor w.*shape"),
    "product overflows": (entry(shape=[2**32, 2**32, 4]), "tensor w.*needs"),
    "a hundred axes": (entry(shape=[1] * 100), "tensor w.*shape"),
    "shape and size differ": (entry(shape=[2, 3]), "tensor w.*needs 24"),
    "offsets reversed": (entry(data_offsets=[16, 0]), "tensor w.*data_offsets"),
    "negative offset": (entry(data_offsets=[-16, 0]), "tensor w.*data_offsets"),
    "one offset": (entry(data_offsets=[0]), "tensor w.*data_offsets"),
    "offsets beyond the file": (entry(data_offsets=[1000, 1016]), "tensor w.*gap"),
    "an unknown field": (entry(more=1), "tensor w.*expected"),
    "an entry that is a number": (raw({"w": 1}), "tensor w.*expected"),
    "gap": (raw({"w": GOOD["w"], "v": GOOD["w"] | {"data_offsets": [20, 36]}}, bytes(36)), "tensor v.*gap"),
    "overlap": (raw({"w": GOOD["w"], "v": GOOD["w"] | {"data_offsets": [8, 24]}}, bytes(24)), "tensor v.*overlap"),
    "the same bytes twice": (raw({"w": GOOD["w"], "v": GOOD["w"]}), "tensor .*overlap"),
    "a path as a name": (raw({"../w": GOOD["w"]}), "name.*not allowed"),
    "control characters in a name": (raw({"w\u001b[2J": GOOD["w"]}), "name.*not allowed"),
    "letters that look alike": (raw({"\u0435mbed": GOOD["w"]}), "name.*not allowed"),
    "a name without an end": (raw({"w" * 100_000: GOOD["w"]}), "name.*not allowed"),
    "an empty name": (raw({"": GOOD["w"]}), "name.*not allowed"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_header(case: str, tmp_path: Path) -> None:
    content, message = HEADERS[case]
    folder = folder_of(tmp_path, {WEIGHTS: content})
    for way in (lambda: Checkpoint.open(folder), lambda: Checkpoint.of_files([folder / WEIGHTS])):
        with pytest.raises(CheckpointError, match=message) as caught:
            way()
        assert WEIGHTS in str(caught.value) and len(str(caught.value)) < 500 and str(caught.value).isprintable()


def test_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_quant.disk.safetensors.MAX_TENSORS", 3)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    (tmp_path / WEIGHTS).write_bytes(raw({f"w{i}": empty for i in range(4)}, b""))
    with pytest.raises(CheckpointError, match="4 tensors"):
        read_header(tmp_path / WEIGHTS)


def shard(name: str) -> bytes:
    return raw({name: GOOD["w"]})


def index(**weight_map: Any) -> dict[str, Any]:
    return {"metadata": {"total_size": 16}, "weight_map": weight_map}


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FOLDERS: dict[str, tuple[dict[str, Any], str]] = {
    "no config": ({"config.json": None, WEIGHTS: raw(GOOD)}, "config.json"),
    "config a list": ({"config.json": [1], WEIGHTS: raw(GOOD)}, "config.json.*object"),
    "config not JSON": ({"config.json": b"{", WEIGHTS: raw(GOOD)}, "config.json.*JSON"),
    "config nested too deep": ({"config.json": NESTED, WEIGHTS: raw(GOOD)}, "config.json.*JSON"),
    "config key twice": ({"config.json": b'{"a":1,"a":2}', WEIGHTS: raw(GOOD)}, "config.json.*a.*twice"),
    "a million layers": ({"config.json": {"num_hidden_layers": 10**6}, WEIGHTS: raw(GOOD)}, "num_hidden_layers"),
    "no layers": ({"config.json": {"n_layer": 0}, WEIGHTS: raw(GOOD)}, "n_layer"),
    "negative width": ({"config.json": {"hidden_size": -64}, WEIGHTS: raw(GOOD)}, "hidden_size"),
    "width a string": ({"config.json": {"hidden_size": "64"}, WEIGHTS: raw(GOOD)}, "hidden_size"),
    "width true": ({"config.json": {"n_embd": True}, WEIGHTS: raw(GOOD)}, "n_embd"),
    "vocabulary of 2**40": ({"config.json": {"vocab_size": 2**40}, WEIGHTS: raw(GOOD)}, "vocab_size"),
    "no heads": ({"config.json": {"num_attention_heads": 0}, WEIGHTS: raw(GOOD)}, "num_attention_heads"),
    "one layer too wide": (
        {"config.json": {"intermediate_size": [8, 2**40]}, WEIGHTS: raw(GOOD)},
        "intermediate_size",
    ),
    "inner config": ({"config.json": {"text_config": {"hidden_size": 0}}, WEIGHTS: raw(GOOD)}, "text_config.hidden"),
    "quantization_config": ({"config.json": {"quantization_config": [1]}, WEIGHTS: raw(GOOD)}, "quantization_config"),
    "no weights": ({}, "neither"),
    "only pickles": ({"pytorch_model.bin": b"x"}, "pytorch_model.bin.*only safetensors"),
    "only a .pt": ({"weights.pt": b"x"}, "weights.pt.*only safetensors"),
    "file and index": ({WEIGHTS: raw(GOOD), INDEX: index(w=ONE), ONE: shard("w")}, "both"),
    "index a list": ({INDEX: []}, INDEX),
    "no weight_map": ({INDEX: {"metadata": {}}}, "weight_map"),
    "empty weight_map": ({INDEX: index()}, "weight_map"),
    "weight_map a list": ({INDEX: {"weight_map": [ONE]}}, "weight_map"),
    "climbs out": ({INDEX: index(w="../secret.safetensors")}, "w.*secret.*not a plain"),
    "absolute": ({INDEX: index(w="/etc/secret.safetensors")}, "w.*secret.*not a plain"),
    "backslashes": ({INDEX: index(w="..\\secret.safetensors")}, "w.*secret.*not a plain"),
    "a folder": ({INDEX: index(w="sub/model.safetensors")}, "w.*sub.*not a plain"),
    "hidden file": ({INDEX: index(w=".safetensors")}, "w.*not a plain"),
    "a pickle": ({INDEX: index(w="model.bin")}, "w.*model.bin.*not a plain"),
    "a NUL": ({INDEX: index(w="model\0.safetensors")}, "w.*not a plain"),
    "shard a number": ({INDEX: index(w=1)}, "w.*not a plain"),
    "shard missing": ({INDEX: index(w=ONE)}, f"{ONE}.*cannot be read"),
    "tensor missing": ({INDEX: index(w=ONE, v=ONE), ONE: shard("w")}, f"{ONE}.*v.*missing"),
    "tensor in the other shard": ({INDEX: index(w=TWO, v=ONE), ONE: shard("w"), TWO: shard("v")}, "tensor w.*index"),
    "tensor unlisted": ({INDEX: index(w=ONE, v=TWO), ONE: shard("w"), TWO: shard("u")}, "tensor u.*index"),
    "tensor in two shards": ({INDEX: index(w=ONE, v=TWO), ONE: shard("w"), TWO: shard("w")}, "tensor w.*both"),
    "shard damaged": ({INDEX: index(w=ONE), ONE: b"abc"}, f"{ONE}.*truncated"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folder(case: str, tmp_path: Path) -> None:
    files, message = FOLDERS[case]
    (tmp_path / "secret.safetensors").write_bytes(shard("w"))
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder_of(tmp_path, files))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, INDEX])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "loop", "link out", "dangling link"])
def test_not_a_file(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(raw(GOOD))
    files = {WEIGHTS: raw(GOOD)} if name == "config.json" else {}
    folder = folder_of(tmp_path, files | {name: None})
    make: dict[str, Callable[[Path], Any]] = {
        "fifo": os.mkfifo,
        "folder": Path.mkdir,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "loop": lambda path: path.symlink_to(path),
        "link out": lambda path: path.symlink_to("../secret"),
        "dangling link": lambda path: path.symlink_to("nothing"),
    }
    make[kind](folder / name)
    with pytest.raises(CheckpointError, match=name):
        Checkpoint.open(folder)


@pytest.mark.parametrize("outside", ["../secret.safetensors", "{tmp}/secret.safetensors"])
def test_files_that_an_index_led_out_of_the_folder(outside: str, tmp_path: Path) -> None:
    """transformers joins whatever the index says to the folder; these are the paths it would then open."""
    (tmp_path / "secret.safetensors").write_bytes(shard("v"))
    outside = outside.format(tmp=tmp_path)
    folder = folder_of(tmp_path, {INDEX: index(w=ONE, v=outside), ONE: shard("w")})
    for names in ([ONE, outside], [outside, ONE]):
        with pytest.raises(CheckpointError, match=r"secret\.safetensors"):
            Checkpoint.of_files([Path(os.path.join(folder, name)) for name in names])  # noqa: PTH118
    if outside.startswith(".."):
        with pytest.raises(CheckpointError, match=r"secret\.safetensors"):
            Checkpoint.of_files([Path(os.path.join(folder, outside))])  # noqa: PTH118


def test_files_without_or_against_their_index(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {ONE: shard("w"), TWO: shard("v"), "model.bin": b""})
    for names in ([ONE, TWO], [ONE]):
        with pytest.raises(CheckpointError, match=INDEX):
            Checkpoint.of_files([folder / name for name in names])
    (folder / INDEX).write_text(json.dumps(index(w=ONE)))
    with pytest.raises(CheckpointError, match=INDEX):
        Checkpoint.of_files([folder / ONE, folder / TWO])
    with pytest.raises(CheckpointError, match=r"model\.bin"):
        Checkpoint.of_files([folder / "model.bin"])
    with pytest.raises(CheckpointError):
        Checkpoint.of_files([])


# -- values -------------------------------------------------------------------------------------------------------

SCHEME = QuantScheme(4, 32, symmetric=False)
Change = Callable[[dict[str, torch.Tensor]], Any]


def with_value(name: str, value: float) -> Change:
    return lambda tensors: tensors[name].view(-1)[3:4].fill_(value)


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


NATIVE, PACKED = "native", "compressed_tensors"
MODULES: dict[str, tuple[str, str, Change]] = {
    "scale NaN": (NATIVE, "weight_scale", with_value("weight_scale", float("nan"))),
    "scale infinite": (PACKED, "weight_scale", with_value("weight_scale", float("inf"))),
    "scale zero": (NATIVE, "weight_scale", with_value("weight_scale", 0.0)),
    "scale of integers": (PACKED, "weight_scale", replaced("weight_scale", lambda t: t.to(torch.int32))),
    "scale in double": (NATIVE, "weight_scale", replaced("weight_scale", torch.Tensor.double)),
    "scale of another group size": (NATIVE, "weight_scale", replaced("weight_scale", lambda t: t[:, ::2])),
    "scale missing": (NATIVE, "weight_scale", lambda t: t.pop("weight_scale")),
    "zero point unpacked": (NATIVE, "weight_zero_point", replaced("weight_zero_point", lambda t: t.repeat(1, 2))),
    "zero point signed": (NATIVE, "weight_zero_point", replaced("weight_zero_point", lambda t: t.to(torch.int8))),
    "zero point missing": (PACKED, "weight_zero_point", lambda t: t.pop("weight_zero_point")),
    "zero point short": (PACKED, "weight_zero_point", replaced("weight_zero_point", lambda t: t[:-1])),
    "zero point of bytes": (PACKED, "weight_zero_point", replaced("weight_zero_point", lambda t: t.to(torch.uint8))),
    "codes short": (NATIVE, "weight", replaced("weight", lambda t: t[:, :-1])),
    "codes of words": (NATIVE, "weight", replaced("weight", lambda t: t.to(torch.int32))),
    "codes flat": (PACKED, "weight_packed", replaced("weight_packed", torch.flatten)),
    "codes missing": (PACKED, "weight_packed", lambda t: t.pop("weight_packed")),
    "shape of another": (PACKED, "weight_shape", with_value("weight_shape", 0) and replaced("weight_shape", lambda t: t + 1)),
    "shape swapped": (PACKED, "weight_shape", replaced("weight_shape", lambda t: t.flip(0))),
    "shape negative": (PACKED, "weight_shape", replaced("weight_shape", lambda t: -t)),
    "shape of three": (PACKED, "weight_shape", replaced("weight_shape", lambda t: t.new_tensor([40, 128, 1]))),
}  # fmt: skip


def contents(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> Contents:
    """What is read of a folder with these tensors, whose config names one scheme in one format."""
    fmt = format_named(name)
    save_file(tensors, folder / WEIGHTS)
    return Contents.of(Checkpoint.of_files([folder / WEIGHTS]), fmt.config({"a.b": SCHEME}, []))


@pytest.mark.parametrize("case", MODULES)
def test_module(case: str, tmp_path: Path) -> None:
    name, bad, change = MODULES[case]
    tensors = format_named(name).write(method("rtn", steps=0).quantize(torch.randn(40, 128), SCHEME, torch.float32))
    tensors = {local: tensor.clone() for local, tensor in tensors.items()}
    contents(tmp_path, name, {f"a.b.{local}": tensor for local, tensor in tensors.items()}).read("a.b")
    change(tensors)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: a\.b: .*\b{bad}\b"):
        contents(tmp_path, name, {f"a.b.{local}": tensor for local, tensor in tensors.items()}).read("a.b")


@pytest.mark.parametrize("bad", ["", "_scale", "_zero_point"])
@pytest.mark.parametrize("bits", [4, 8])
def test_stack_of_experts(bad: str, bits: int, tmp_path: Path) -> None:
    scheme, fmt = QuantScheme(bits, 32, symmetric=False), format_named("native")
    one = fmt.write(method("rtn", steps=0).quantize(torch.randn(40, 128), scheme, torch.float32))
    stack = {f"x.up{local.removeprefix('weight')}": torch.stack([t] * 3) for local, t in one.items()}
    save_file(stack, tmp_path / WEIGHTS)
    said = fmt.config({"x.up": scheme}, [])
    assert Contents.of(Checkpoint.of_files([tmp_path / WEIGHTS]), said).layers["x.up"].shape == (3, 40, 128)
    stack[f"x.up{bad}"] = stack[f"x.up{bad}"][:2].contiguous()
    save_file(stack, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: x\.up: weight"):
        Contents.of(Checkpoint.of_files([tmp_path / WEIGHTS]), said)


# -- quantization_config of strangers -----------------------------------------------------------------------------


def config(**fields: Any) -> dict[str, Any]:
    return config_of(SCHEME, {}, []) | fields


def weights(**fields: Any) -> dict[str, Any]:
    group = config_of(SCHEME, {}, [])["config_groups"]["group_0"]
    return config(config_groups={"group_0": group | {"weights": group["weights"] | fields}})


def group(**fields: Any) -> dict[str, Any]:
    return config(config_groups={"group_0": config()["config_groups"]["group_0"] | fields})


CONFIGS: dict[str, tuple[Any, str]] = {
    "another method": (config(quant_method="eetq"), "quant_method"),
    "method a list": (config(quant_method=["gptq"]), "quant_method"),
    "another format": (config(format="nvfp4-pack-quantized"), "format"),
    "no format": (config(format=None), "format"),
    "half done": (config(quantization_status="calibration"), "quantization_status"),
    "cache": (config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "transform": (config(transform_config={"config_groups": {"R1": {}}}), "transform_config"),
    "sparse": (config(sparsity_config={"format": "sparse-24"}), "sparsity_config"),
    "sparsity a list": (config(sparsity_config=[1]), "sparsity_config"),
    "no groups": (config(config_groups={}), "config_groups"),
    "groups a list": (config(config_groups=[1]), "config_groups"),
    "a preset": (config(config_groups={"W4A16": ["Linear"]}), "config_groups.W4A16"),
    "targets a string": (group(targets="Linear"), "targets"),
    "targets of numbers": (group(targets=["Linear", 1]), "targets"),
    "outputs": (group(output_activations={"num_bits": 8}), "output_activations"),
    "group format": (group(format="nvfp4-pack-quantized"), "format"),
    "no weights": (group(weights=None), "weights"),
    "groups of floats": (weights(type="float", num_bits=8), "strategy"),
    "a third type": (weights(type="complex"), "type"),
    "dynamic": (weights(dynamic=True), "dynamic"),
    "blocks": (weights(strategy="block", block_structure=[128, 128]), "block_structure"),
    "nine bits": (weights(num_bits=9), "num_bits"),
    "floats of four bits": (weights(type="float", num_bits=4, group_size=64, symmetric=True), "group_size"),
    "floats with zero points": (weights(type="float", num_bits=4, symmetric=False), "symmetric"),
    "an unknown strategy": (weights(strategy="tensor_group"), "strategy"),
    "no bits": (weights(num_bits=None), "bits"),
    "groups of nothing": (weights(group_size=0), "group_size"),
    "groups a string": (weights(group_size="32"), "group_size"),
    "symmetric a string": (weights(symmetric="no"), "symmetric"),
    "ignore a string": (config(ignore="lm_head"), "ignore"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_quantization_config(case: str) -> None:
    stored, message = CONFIGS[case]
    with pytest.raises(FormatError, match=message):
        format_of(stored)


@pytest.mark.parametrize("pattern", ["re:(a+)+$", "re:(a|a)*b", r"re:(a*|.*)*(.*)*..X$", r"re:layers\.\d+", "re:a|b"])
def test_patterns_of_strangers_are_never_run(pattern: str) -> None:
    """One of them hung transformers for half a minute."""
    module = "a" * 64 + "!"
    tensors = format_named("compressed_tensors").write(
        method("rtn", steps=0).quantize(torch.randn(40, 128), SCHEME, torch.float32)
    )
    one = config()["config_groups"]["group_0"]
    only = format_of(config(config_groups={"a": one | {"targets": [pattern]}}, ignore=[pattern]))[1]
    assert only.layers({module: tensors}, lambda name: tensors[name.rpartition(".")[2]])[module].scheme == SCHEME
    eight = {"targets": [pattern], "weights": one["weights"] | {"num_bits": 8}}
    with pytest.raises(FormatError, match="targets"):
        format_of(config(config_groups={"a": one, "b": eight}))[1].layers(
            {module: tensors}, lambda name: tensors[name.rpartition(".")[2]]
        )


def test_the_same_target_in_two_groups() -> None:
    one = config()["config_groups"]["group_0"]
    other = one | {"weights": one["weights"] | {"num_bits": 8}}
    with pytest.raises(FormatError, match=r"targets.*Linear"):
        format_of(config(config_groups={"a": one, "b": other}))
