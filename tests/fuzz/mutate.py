"""Ways to spoil a checkpoint. Each takes a source of chance and changes what it is given."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tests.fuzz.originals import Original

NAN, INF = float("nan"), float("inf")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 64, 128, 255, 256, 1024, 2**31 - 1, 2**31, 2**32, 2**63,
    2**64, 10**12, 10**30, -(2**63), 0.0, 0.5, -0.0, 1e308, -1e308, NAN, INF, -INF, 4.0, 128.0,
    "", "0", "4", "128", "true", "None", "null", "\0", "\ud800", "\u202e", "é" * 50, "a" * 5000, "re:.*", "re:(a+)+$", "*",
    "**", "*.*.*", "[", "[!", "(", "../../etc/passwd", "/dev/zero", "lm_head", "Linear", "model", "gptq", "awq", "hqq",
    "bitsandbytes", "compressed-tensors", "torchao", "quanto", "hf_quant", "auto-round", "W4A16-g128", "W4A16-g32", "W8A8",
    "W2A16-g16", "W9A16-g128", "W4A16-g99999", "W4A16-g-1-o10%", "W4A8-g128-o1%-columns", "float", "int", "group",
    "channel", "tensor", "block", "token", "native", "compressed_tensors", "auto", "rtn", "calibrated", "gptq+gptq",
    "torch.float16", "float32", "int8", "eager", "sdpa", "kernels-community/x", "\x1b[31mred",
    [], [None], [1], ["a"], [[]], [{}], [0, 0], [128, 128], [-1], [NAN], ["x"] * 300, {}, {"a": 1}, {"": ""},
    {"*": "W4A16-g32"}, {"*": None}, {"*": 5}, {"quant_method": "gptq"},
    {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}},
    {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
]  # fmt: skip
FIELDS = [
    "quant_method",
    "bits",
    "w_bit",
    "group_size",
    "q_group_size",
    "sym",
    "desc_act",
    "zero_point",
    "version",
    "format",
    "checkpoint_format",
    "packing_format",
    "dynamic",
    "extra_config",
    "static_groups",
    "lm_head",
    "modules_to_not_convert",
    "ignore",
    "config_groups",
    "targets",
    "weights",
    "num_bits",
    "strategy",
    "symmetric",
    "block_structure",
    "actorder",
    "input_activations",
    "output_activations",
    "kv_cache_scheme",
    "sparsity_config",
    "transform_config",
    "quantization_status",
    "load_in_4bit",
    "load_in_8bit",
    "llm_int8_threshold",
    "quant_type",
    "scheme",
    "overrides",
    "method",
    "share_quantized",
    "quantize_lm_head",
    "quantize_embeddings",
    "calibration",
    "calibration_tokens",
    "activations",
    "stored",
    "dequantize",
    "hf_quant",
    "self",
    "text_config",
    "quantization_config",
    "architectures",
    "model_type",
    "dtype",
    "torch_dtype",
    "auto_map",
    "_attn_implementation",
    "tie_word_embeddings",
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "rope_parameters",
    "rope_theta",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "base_model_tp_plan",
    "is_encoder_decoder",
    "id2label",
    "problem_type",
    "_name_or_path",
    "transformers_weights",
]
DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
    torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64, torch.complex64,
]  # fmt: skip
UP = "model.layers.0.mlp.up_proj"
STRANGE = ["..", "a b", "é", "x" * 600, f"{UP}.weight.quant_state.bitsandbytes__nf4", f"{UP}.weight", "lm_head.qweight",
           "model.layers.1.mlp.up_proj.qweight", "lm_head.bias", f"{UP}.bias", f"{UP}.gamma_scale"]  # fmt: skip


def encoded(value: Any) -> bytes:
    """JSON with whatever Python can hold, lone surrogates too."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


# -- JSON ---------------------------------------------------------------------------------------------------------


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from _paths(value[key], (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def spoil_json(chance: Random, value: Any, below: tuple[Any, ...] = ()) -> None:
    """Change one to three places of ``value`` that lie below a path."""
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        places = [path for path in _paths(value) if path[: len(below)] == below and len(path) > len(below)]
        objects = [
            path for path in _paths(value) if path[: len(below)] == below and isinstance(_at(value, path), dict)
        ]
        how = chance.random()
        if how < 0.7 and places:
            *owner, key = chance.choice(places)
            if how < 0.55:
                _at(value, tuple(owner))[key] = copy.deepcopy(chance.choice(JUNK))
            else:
                _at(value, tuple(owner)).pop(key)
        elif how < 0.9 and objects:
            _at(value, chance.choice(objects))[chance.choice(FIELDS)] = copy.deepcopy(chance.choice(JUNK))
        elif len(places) > 1:
            one, other = chance.sample(places, 2)
            _at(value, one[:-1])[one[-1]] = copy.deepcopy(_at(value, other))


# -- tensors ------------------------------------------------------------------------------------------------------


def _one_value(chance: Random, tensor: Tensor) -> Tensor:
    flat = tensor.clone().view(-1)
    number = chance.choice([0, 1, -1, 255, 127, -128, 2**31 - 1, -(2**31), NAN, INF, -INF, 1e-45, 65504, 1e38])
    if flat.numel() and (tensor.is_floating_point() or float(number).is_integer()):
        flat[chance.randrange(flat.numel())] = number
    return flat.view(tensor.shape)


def _bytes(chance: Random, tensor: Tensor) -> Tensor:
    raw = bytearray(tensor.contiguous().view(-1).view(torch.uint8).tolist())
    for _ in range(chance.choice([1, 4, 64])):
        raw[chance.randrange(len(raw))] = chance.randrange(256)
    return torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape).clone()


def _narrowed(chance: Random, tensor: Tensor) -> Tensor:
    axis = chance.randrange(tensor.ndim)
    return tensor.narrow(axis, 0, chance.randrange(tensor.shape[axis] + 1)).clone()


TENSORS: list[Callable[[Random, Tensor], Tensor]] = [
    lambda chance, t: t.to(chance.choice(DTYPES)),
    lambda chance, t: t.contiguous().view(chance.choice(DTYPES)),
    lambda chance, t: t.flatten()[: chance.randrange(max(1, t.numel()))].clone(),
    _narrowed,
    lambda chance, t: torch.cat([t] * chance.choice([2, 3]), chance.randrange(t.ndim)),
    lambda _, t: t.T.contiguous() if t.ndim == 2 else t.reshape(-1),
    lambda chance, t: t[None].clone() if chance.random() < 0.5 else t.reshape(*t.shape, 1).clone(),
    _one_value, _one_value, _bytes,
    lambda _, t: torch.zeros_like(t),
]  # fmt: skip


def spoil_tensors(chance: Random, tensors: dict[str, Tensor], _: Any = None) -> None:
    """Change, drop, add, rename or swap one to three tensors."""
    for _time in range(chance.choice([1, 1, 2, 3])):
        name = chance.choice(sorted(tensors))
        how = chance.randrange(len(TENSORS) + 5)
        try:
            if how < len(TENSORS):
                tensors[name] = TENSORS[how](chance, tensors[name])
            elif how == len(TENSORS):
                tensors.pop(name)
            elif how == len(TENSORS) + 1:
                ending = chance.choice([".x", "_scale", ".bias", "_g_idx", ".g_idx", "_zero_point", ".qzeros", ""])
                tensors[name + ending + chance.choice(["", "2"])] = tensors[name].clone()
            elif how == len(TENSORS) + 2:
                other = chance.choice(sorted(tensors))
                tensors[name], tensors[other] = tensors[other], tensors[name]
            elif how == len(TENSORS) + 3:
                tensors[chance.choice(STRANGE)] = tensors[name].clone()
            else:  # as transformers knows to add and remove it again
                for full in list(tensors):
                    tensors[full.removeprefix("model.")] = tensors.pop(full)
        except (RuntimeError, TypeError, IndexError, ValueError, OverflowError):
            pass  # not for a tensor like this one
        if not tensors:
            return


def spoil_state(chance: Random, tensors: dict[str, Tensor], _: Any = None) -> None:
    """Change the JSON that bitsandbytes keeps in a tensor."""
    names = [name for name in tensors if "quant_state" in name]
    if not names:
        return spoil_tensors(chance, tensors)
    name = chance.choice(names)
    state = json.loads(bytes(tensors[name].tolist()))
    spoil_json(chance, state)
    if chance.random() < 0.3:
        key = chance.choice(["shape", "blocksize", "quant_type", "nested_blocksize", "nested_offset", "dtype"])
        state[key] = chance.choice(JUNK)
    tensors[name] = torch.tensor(list(encoded(state)), dtype=torch.uint8)
    return None


# -- files --------------------------------------------------------------------------------------------------------


def spoil_header(chance: Random, raw: bytes) -> bytes:
    """A safetensors file whose length, header or end is wrong."""
    (length,) = struct.unpack("<Q", raw[:8])
    head, data = raw[8 : 8 + length], raw[8 + length :]
    how = chance.randrange(8)
    if how == 0:
        wrong = [0, 1, 2, length - 1, length + 1, 2**31, 2**32, 2**63, 2**64 - 1, len(raw), chance.randrange(len(raw))]
        return struct.pack("<Q", chance.choice(wrong)) + head + data
    if how == 1:
        return raw[: chance.randrange(len(raw))]
    if how == 2:
        return raw + bytes(chance.choice([1, 7, 8, 4096]))
    if how == 3:
        spoilt = bytearray(head)
        for _ in range(chance.choice([1, 2, 8])):
            spoilt[chance.randrange(len(spoilt))] = chance.randrange(256)
        head = bytes(spoilt)
    else:
        header = json.loads(head)
        one, other = (chance.choice([name for name in header if name != "__metadata__"]) for _ in range(2))
        if how == 4:
            wrong_offsets: list[Any] = [
                [0, 0],
                [0],
                [1, 2, 3],
                [10**30, 10**31],
                [-1, 5],
                [NAN, NAN],
                ["0", "1"],
                None,
            ]
            header[one]["data_offsets"] = chance.choice([*wrong_offsets, header[other]["data_offsets"]])
        elif how == 5:
            wrong_shapes: list[Any] = [[], [0], [2**48], [2**62, 4], [1] * 9, [1] * 8, [-1], [1.0], "x", None, [[1]]]
            header[one]["shape"] = chance.choice([*wrong_shapes, header[other]["shape"]])
        elif how == 6:
            header[one]["dtype"] = chance.choice(
                ["F32", "BF16", "U8", "I8", "I32", "F64", "C64", "F4", "f32", 5, None, []]
            )
        else:
            spoil_json(chance, header)
        head = encoded(header)
    return struct.pack("<Q", len(head)) + head + data


def _sharded(files: dict[str, bytes], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Two shards in place of one file; their index."""
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        shard = f"model-0000{i + 1}-of-00002.safetensors"
        files[shard] = save({name: tensors[name].contiguous() for name in part}, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    return {"metadata": {"total_size": 1}, "weight_map": weight_map}


def spoil_index(chance: Random, files: dict[str, bytes], tensors: dict[str, Tensor]) -> None:
    """Shards whose index is wrong."""
    index = _sharded(files, tensors)
    weight_map, how = index["weight_map"], chance.randrange(6)
    if how == 0:
        spoil_json(chance, index)
    elif how == 1:
        elsewhere = [
            "../x.safetensors",
            "/etc/passwd",
            WEIGHTS,
            "a/b.safetensors",
            "CON.safetensors",
            "\0.safetensors",
            5,
        ]
        weight_map[chance.choice(sorted(weight_map))] = chance.choice(elsewhere)
    elif how == 2:
        weight_map.pop(chance.choice(sorted(weight_map)))
    elif how == 3:
        weight_map["ghost"] = chance.choice(sorted(weight_map.values()))
    elif how == 4:
        files.pop(chance.choice(sorted(set(weight_map.values()))))
    files[INDEX] = encoded(index)


KINDS = {"config": 14, "quantization": 26, "tensors": 28, "state": 5, "header": 10, "index": 6, "both": 6, "manifest": 3,
         "quanto": 2, "bytes": 3, "nothing": 1}  # fmt: skip


def spoil(chance: Random, good: Original, folder: Path) -> str:
    """Write a spoilt copy of ``good`` into an empty folder; what kind of damage it is."""
    kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
    files, config, tensors = dict(good.files), copy.deepcopy(good.config), dict(good.tensors)
    _spoil_inside(chance, kind, config, tensors)
    files["config.json"] = encoded(config)
    if kind == "index":
        spoil_index(chance, files, tensors)
    else:
        files[WEIGHTS] = save({name: t.contiguous() for name, t in tensors.items()}, metadata={"format": "pt"})
    _spoil_files(chance, kind, files)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return kind


def _spoil_inside(chance: Random, kind: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """What config.json says, and the tensors."""
    if kind in ("config", "both"):
        spoil_json(chance, config)
    if kind in ("quantization", "both") and isinstance(config.get("quantization_config"), dict):
        spoil_json(chance, config, ("quantization_config",))
    if kind in ("tensors", "both"):
        spoil_tensors(chance, tensors)
    if kind == "state":
        spoil_state(chance, tensors)
    if kind == "quanto":
        config.pop("quantization_config", None)


def _spoil_files(chance: Random, kind: str, files: dict[str, bytes]) -> None:
    """The bytes of files, and files beside the weights."""
    if kind == "quanto":
        files["quanto_qmap.json"] = b"{}"
    if kind == "bytes":
        raw = bytearray(files["config.json"])
        for _ in range(chance.choice([1, 3])):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        files["config.json"] = bytes(raw)
    if kind == "header":
        files[WEIGHTS] = spoil_header(chance, files[WEIGHTS])
    if kind == "manifest":
        listed = {n: {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()} for n, raw in files.items()}
        manifest = {"version": 1, "files": listed}
        spoil_json(chance, manifest)
        files["manifest.json"] = encoded(manifest)
