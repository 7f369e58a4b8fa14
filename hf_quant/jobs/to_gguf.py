"""A quantized checkpoint as one GGUF file, for llama.cpp and what is built on it: the same codes, read back and compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_quant.checkpoint.contents import Contents
from hf_quant.core.pieces import rows_at
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.disk.safetensors import TORCH
from hf_quant.errors import CheckpointError, FormatError, HfQuantError
from hf_quant.gguf.architectures import ROPE, Architecture, gguf_name, metadata_of, of_config, rope_divisors, row_order
from hf_quant.gguf.blocks import BLOCKS, pack, unpack
from hf_quant.gguf.codes import blocks_of, tensor_of
from hf_quant.gguf.codes import why_not as why_no_blocks
from hf_quant.gguf.file import File
from hf_quant.gguf.tokenizer import FILE as TOKENIZER
from hf_quant.gguf.tokenizer import SPECIAL, tokenizer_keys
from hf_quant.hf.auto import config_of
from hf_quant.jobs.progress import Reporter

FILE = "model.gguf"
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18}


@dataclass(frozen=True)
class _Source:
    contents: Contents
    config: dict[str, Any]
    architecture: Architecture

    @classmethod
    def of(cls, contents: Contents) -> _Source:
        stored = contents.checkpoint.config
        of_config(stored)
        filled = config_of(str(contents.checkpoint.folder)).to_dict()
        # numbers of tokens only as they are stored: those that transformers fills in are of another vocabulary
        config = filled | {field: stored.get(field) for field in SPECIAL.values()}
        return cls(contents, config, of_config(config))

    def layer(self, module: str) -> QuantizedTensor:
        """A quantized layer with its rows in the order of GGUF."""
        read = self.contents.read(module)
        assert isinstance(read, QuantizedTensor)
        order = self.order(gguf_name(f"{module}.weight"), read.scale.shape[0])
        return read if order is None else rows_at(read, order)

    def floats(self, name: str) -> Tensor:
        """A tensor in floating point, likewise: vectors in float32, matrices in 16 bits where they have no more."""
        tensor = self.contents.checkpoint.read(name)
        order = self.order(gguf_name(name), tensor.shape[0])
        tensor = tensor if order is None else tensor[order]
        return tensor.float() if tensor.ndim == 1 else tensor

    def floats_shape(self, name: str) -> Tensor:
        """`floats` on the meta device, from the header alone."""
        info = self.contents.checkpoint.tensors[name]
        if info.dtype not in TORCH:
            raise FormatError(f"--to gguf: tensor {name}: GGUF holds no {info.dtype}")
        dtype = torch.float32 if len(info.shape) == 1 else TORCH[info.dtype]
        return torch.empty(info.shape, dtype=dtype, device="meta")

    def order(self, name: str, rows: int) -> Tensor | None:
        return row_order(name, self.architecture, self.config, rows)

    def rest(self) -> list[str]:
        """Tensors in floating point that a file has a place for."""
        tied = self.config.get("tie_word_embeddings")
        return [
            n
            for n in self.contents.rest
            if not n.endswith("rotary_emb.inv_freq") and not (tied and n == "lm_head.weight")
        ]


def why_not_gguf(contents: Contents) -> dict[str, list[str]]:
    """Why a GGUF file cannot hold a checkpoint, from its headers alone: sentence to layers, to none if it concerns all of it;
    empty if it may.

    Raises:
        CheckpointError: config.json or a file of the tokenizer is damaged.
    """
    try:
        source = _Source.of(contents)
        rope_divisors(source.config)
        metadata_of(source.config, source.architecture)
        tokenizer_keys(contents.checkpoint.folder, source.config)
        for name in source.rest():
            gguf_name(name)
    except FormatError as error:
        return {str(error): []}
    reasons: dict[str, list[str]] = {}
    for module, layer in contents.layers.items():
        reason = f"not integer codes ({layer.note})" if layer.scheme is None else why_no_blocks(layer.scheme)
        if reason is not None:
            reasons.setdefault(f"{reason}; --to dense makes it floating point", []).append(module)
    return reasons


def write_gguf(contents: Contents, name: str, stage: Path, report: Reporter) -> Path:
    """Write ``model.gguf`` into a folder, and compare every layer with what reads back.

    Args:
        contents: The checkpoint.
        name: What the file calls the model.
        stage: The folder.
        report: Of progress.

    Raises:
        FormatError: A layer has no exact place in it; names the layer.
        CheckpointError: What was written does not read back as it was.
        HfQuantError: The package gguf is missing.
    """
    _package()  # before every layer is looked at
    source, path = _Source.of(contents), stage / FILE
    types = {module: _type(source, module) for module in report.bar(list(contents.layers), "layers")}
    writer = _writer(source, name, types, path)
    divisors = rope_divisors(source.config)
    infos: dict[str, Tensor] = {} if divisors is None else {ROPE: divisors}
    for name, tensor in _tensors(source, infos, types, shapes=True):
        raw = types.get(name.removesuffix(".weight"))
        _announce(writer, ROPE if name == ROPE else gguf_name(name), tensor, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in _tensors(source, infos, types, shapes=False):
        writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())
    writer.close()
    _compare(source, File.open(path))
    counts = Counter(types.values())
    if not (source.contents.checkpoint.folder / TOKENIZER).is_file():
        report.say(f"{path.name}: without a tokenizer, since the folder has no {TOKENIZER}; llama.cpp needs one")
    report.say(f"{path.name}: " + ", ".join(f"{count} layers in {name}" for name, count in counts.most_common()))
    return path


def _type(source: _Source, module: str) -> str:
    try:
        return blocks_of(source.layer(module)).block.name
    except FormatError as error:
        raise FormatError(f"--to gguf: {module}: {error}; --to dense makes it floating point") from None


def _tensors(
    source: _Source, infos: dict[str, Tensor], types: dict[str, str], *, shapes: bool
) -> Iterator[tuple[str, Tensor]]:
    """All tensors in the order of the file; for ``shapes``, on the meta device and without reading any."""
    yield from infos.items()
    for name in source.rest():
        yield name, source.floats_shape(name) if shapes else source.floats(name)
    for module, layer in source.contents.layers.items():
        block = BLOCKS[types[module]]
        if shapes:
            size = layer.shape[1] // block.weights * block.size
            yield f"{module}.weight", torch.empty(layer.shape[0], size, dtype=torch.uint8, device="meta")
        else:
            fit = blocks_of(source.layer(module))
            yield f"{module}.weight", pack(fit.parts, fit.block)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise HfQuantError("--to gguf needs the package gguf: pip install 'hf-quant[gguf]'") from None
    return gguf


def _writer(source: _Source, name: str, types: dict[str, str], path: Path) -> Any:
    """A writer that knows all keys of the file."""
    writer = _package().GGUFWriter(path, source.architecture.name)
    keys = metadata_of(source.config, source.architecture) | tokenizer_keys(
        source.contents.checkpoint.folder, source.config
    )
    most = Counter(types.values()).most_common(1)[0][0]
    keys |= {"general.name": name, "general.file_type": FILE_TYPES[most],
             "general.quantization_version": 2}  # fmt: skip
    for key, value in keys.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](key, value)
    return writer


def _announce(writer: Any, name: str, tensor: Tensor, block: str | None) -> None:
    types = _package().GGMLQuantizationType
    if block is not None:
        shape, raw = tuple(tensor.shape), types[block]
    else:
        raw = {torch.float32: types.F32, torch.float16: types.F16, torch.bfloat16: types.BF16}.get(tensor.dtype)
        if raw is None:
            raise FormatError(f"--to gguf: tensor {name}: GGUF holds no {tensor.dtype}")
        shape = (*tensor.shape[:-1], tensor.shape[-1] * tensor.element_size())
    as_bytes = torch.empty(0, dtype=torch.uint8).numpy().dtype
    writer.add_tensor_info(name, shape, as_bytes, tensor.nbytes, raw)


def _compare(source: _Source, written: File) -> None:
    for name in source.rest():
        if not torch.equal(written.floats(gguf_name(name)).float(), source.floats(name).float()):
            raise CheckpointError(f"{name}: what was written does not read back as it was; nothing is kept")
    for module in source.contents.layers:
        name = gguf_name(f"{module}.weight")
        block = written.tensors[name].block
        assert block is not None
        read = tensor_of(unpack(written.bytes_of(name), block), block).dequantize(torch.float32)
        if not torch.equal(read, source.layer(module).dequantize(torch.float32)):
            raise CheckpointError(f"{module}: what was written does not read back as it was; nothing is kept")
