"""A GGUF file as a checkpoint in the native format: codes stay codes, block by block."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_quant.core.pieces import rows_at
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.disk.atomic import write_json
from hf_quant.disk.safetensors import write_tensors
from hf_quant.disk.strict_json import shown
from hf_quant.errors import CheckpointError, FormatError, HfQuantError
from hf_quant.formats import formats, in_memory_format
from hf_quant.gguf.architectures import ROPE, Architecture, config_of, model_name, of_file, rope_divisors, row_order
from hf_quant.gguf.blocks import unpack
from hf_quant.gguf.codes import tensor_of
from hf_quant.gguf.file import File
from hf_quant.gguf.tokenizer import SPLITS, tokenizer_json
from hf_quant.hf.config import VERSION
from hf_quant.hf.shards import write_index
from hf_quant.jobs.progress import Say

_NUMBER = re.compile(r"blk\.(\d+)\.")
LLAMA3 = {  # scaling of rotary embeddings: these are in no key of a file, and alike in all models of that family
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file.

    Raises:
        HfQuantError: It would be, and there is nothing.
    """
    if path.suffix.lower() != ".gguf":
        return False
    if not path.exists():
        raise HfQuantError(f"{path}: no such file")
    return path.is_file()


def read_gguf(path: Path, out: Path, say: Say) -> str:
    """Write the checkpoint of a GGUF file into an empty folder; gives the name of the model.

    Args:
        path: The file.
        out: The folder.
        say: Is told if the tokenizer is not read.

    Raises:
        CheckpointError: The file is damaged, or holds what is not read here; names the file and the tensor or key.
    """
    file = File.open(path)
    try:
        _write(file, out)
        _write_tokenizer(file, out, say)
    except FormatError as error:
        raise CheckpointError(f"{path.name}: {error}") from None
    name = file.metadata.get("general.name")
    return name if isinstance(name, str) and name else path.stem


def _write(file: File, out: Path) -> None:
    architecture = of_file(file.metadata)
    config = _config(file, architecture)
    shards: dict[int, list[str]] = {}
    for name in file.tensors:
        if name != ROPE:
            shards.setdefault(int(match[1]) if (match := _NUMBER.match(name)) else -1, []).append(name)
    if max(shards) >= config["num_hidden_layers"]:
        raise FormatError(f"blk.{max(shards)} is there, and block_count is {config['num_hidden_layers']}")
    schemes: dict[str, QuantScheme] = {}
    files = []
    for at, names in enumerate(shards.values()):
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= _read(file, name, architecture, config, schemes)
        files.append(f"model-{at + 1:05d}-of-{len(shards):05d}.safetensors")
        write_tensors(out / files[-1], tensors)
    write_index(out, files)
    left = [
        n.removesuffix(".weight")
        for n in map(model_name, (n for n in file.tensors if n != ROPE))
        if n.endswith(("proj.weight", "head.weight"))
    ]
    if not schemes:
        raise FormatError("all of its tensors are floating point: nothing is quantized here")
    native = formats()[in_memory_format()]
    stored = native.config(schemes, sorted(set(left) - set(schemes)))
    write_json(
        out / "config.json", config | {"dtype": "float16", "quantization_config": stored | {"version": VERSION}}
    )


def _write_tokenizer(file: File, out: Path, say: Say) -> None:
    files = tokenizer_json(file.metadata)
    for name, content in files.items():
        write_json(out / name, content)
    if not files:
        kinds = [file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre")]
        say(
            f"{file.path.name}: its tokenizer ({', '.join(shown(kind) for kind in kinds)}) is not read, only those of GPT-2, "
            f"{' and '.join(SPLITS.values())} are: copy the files of the base model's tokenizer into the result"
        )


def _config(file: File, architecture: Architecture) -> dict[str, Any]:
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise FormatError("token_embd.weight is missing or no matrix")
    tied = "output.weight" not in file.tensors
    config = config_of(
        file.metadata, architecture, table.shape[0], tied=tied, bias="blk.0.attn_q.bias" in file.tensors
    )
    if ROPE in file.tensors:
        if (kind := config["rope_parameters"]["rope_type"]) != "default":
            raise FormatError(
                f"{ROPE} and {architecture.name}.rope.scaling.type {kind}: transformers scales one way only"
            )
        divisors = file.floats(ROPE)
        config["rope_parameters"] |= LLAMA3 | {"factor": float(divisors.max())}
        expected = rope_divisors(config)
        if expected is None or expected.shape != divisors.shape or not torch.allclose(expected, divisors, rtol=1e-5):
            raise FormatError(f"{ROPE}: its factors are not those of Llama 3")
    for field, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        value = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(value) is int and value < table.shape[0]:
            config[field] = value
    return config


def _read(
    file: File, name: str, architecture: Architecture, config: Mapping[str, Any], schemes: dict[str, QuantScheme]
) -> dict[str, Tensor]:
    """The tensors of a checkpoint for one of the file."""
    stored, target = file.tensors[name], model_name(name)
    order = row_order(name, architecture, config, stored.shape[0])
    back = None if order is None else order.argsort()
    if stored.block is None:
        floats = file.floats(name)
        return {target: floats if back is None else floats[back]}
    if len(stored.shape) != 2 or not target.endswith(".weight"):
        raise FormatError(f"tensor {name}: shape {list(stored.shape)} in {stored.type}")
    weight = tensor_of(unpack(file.bytes_of(name), stored.block), stored.block)
    if back is not None:
        weight = rows_at(weight, back)
    module = target.removesuffix(".weight")
    schemes[module] = weight.scheme
    return _parts(module, weight)


def _parts(module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    native = formats()[in_memory_format()]
    return {f"{module}.{local}": tensor for local, tensor in native.write(weight).items()}
