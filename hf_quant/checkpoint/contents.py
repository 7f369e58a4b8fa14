"""The quantized layers of a checkpoint: which they are, their format and schemes; and reading them one at a time.

All of this is found in config.json, the headers of the weights, and tensors of a few kilobytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_quant.checkpoint.config import FIELDS, read_json
from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.core.layout import wrong_values
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.disk.safetensors import TORCH, TensorInfo
from hf_quant.errors import CheckpointError, FormatError
from hf_quant.formats import Called, Format, Layer, by_itself, format_of, formats

TINY, SMALL = 1 << 12, 1 << 24  # bytes of a tensor that is read in a quick look, and in a thorough one


def quantization_of(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a local checkpoint, from whichever file has it; None if it is not quantized.

    Args:
        folder: The checkpoint.
        config: Its config.json.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for field in FIELDS:
            if (stored := part.get(field)) is not None:
                return stored
    for fmt in formats().values():
        if fmt.marker_file is not None and (folder / fmt.marker_file).is_file():
            return {"quant_method": fmt.label}
        if fmt.config_file is not None and (folder / fmt.config_file).is_file():
            return {"quant_method": fmt.label} | read_json(folder, fmt.config_file)
    return None


def refuse_training(folder: str | Path, stored: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of a training that can go on, which ``Trainer`` writes: it holds no codes yet.

    Raises:
        FormatError: It is one; says what to do.
    """
    if stored.get("quant_method") == "hf_quant" and stored.get("training"):
        raise FormatError(
            f"{folder}: holds a training that can go on, and no codes yet: load it with from_pretrained, and save_pretrained into a "
            "folder of another name writes the quantized model"
        )


@dataclass(frozen=True)
class Header:
    """A tensor of which only the header is known."""

    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self.info.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in torch; ``bits8`` for those that no format reads."""
        return TORCH.get(self.info.dtype, torch.bits8)


@dataclass(frozen=True)
class Contents:
    """The tensors of a checkpoint, sorted by layer.

    Attributes:
        checkpoint: The files.
        format: Name of the format of its quantized layers.
        layers: The quantized layers, by module name.
        names: For each of them, local name to full name of its tensors.
    """

    checkpoint: Checkpoint
    format: str
    fmt: Format
    layers: dict[str, Layer]
    names: dict[str, dict[str, str]]

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, stored: Mapping[str, Any], *, thorough: bool = True, called: Called = by_itself
    ) -> Contents:
        """Sort the tensors of a checkpoint whose ``quantization_config`` is ``stored``.

        Args:
            checkpoint: With checked headers.
            stored: Names the format.
            thorough: Whether to read tensors of up to 16 MB (g_idx, zero points), or only up to four kilobytes.
            called: The names that ``stored`` may use for a module of the file.

        Raises:
            FormatError: This package does not read the format, or a field of ``stored``; or it is a training that can go on.
            CheckpointError: Tensors of a layer are missing or contradict each other; names file and tensor.
        """
        refuse_training(checkpoint.folder, stored)
        name, fmt = format_of(stored)
        names = _by_module(checkpoint.tensors, fmt)
        headers = {
            module: {local: Header(checkpoint.tensors[full]) for local, full in tensors.items()}
            for module, tensors in names.items()
        }
        limit = SMALL if thorough else TINY

        def value(full: str) -> Tensor | None:
            info = checkpoint.tensors.get(full)
            return checkpoint.read(full) if info is not None and info.nbytes <= limit else None

        try:
            layers = fmt.layers(headers, value, called)
        except FormatError as error:
            raise CheckpointError(f"{_file(checkpoint, names, str(error))}{error}") from None
        return cls(checkpoint, name, fmt, layers, {module: names[module] for module in layers})

    def tensors(self, module: str) -> dict[str, Tensor]:
        """The tensors of one layer, as stored."""
        return {local: self.checkpoint.read(full) for local, full in self.names[module].items()}

    def check(self, module: str) -> None:
        """Check the small tensors of a layer in our own format. Its codes need no check, since every code is valid.

        Raises:
            CheckpointError: A tensor has an invalid value; names file and tensor.
        """
        layer = self.layers[module]
        if self.fmt.in_memory and layer.scheme is not None:
            small = {
                local: self.checkpoint.read(full) for local, full in self.names[module].items() if local != "weight"
            }
            if (wrong := wrong_values(small, layer.scheme, layer.shape[-1])) is not None:
                raise CheckpointError(f"{self.where(module)}: {wrong}")

    def where(self, module: str) -> str:
        """The file of a layer and its name there, for messages."""
        return f"{self.checkpoint.tensors[next(iter(self.names[module].values()))].file.name}: {module}"

    def read(self, module: str, *, dense: bool = False) -> QuantizedTensor | Tensor:
        """One layer: codes if it has a scheme; the weight in float32 if it has none, or for ``dense=True``.

        Raises:
            CheckpointError: A tensor has an invalid value; names file and tensor.
        """
        scheme = self.layers[module].scheme
        try:
            tensors = self.tensors(module)
            if scheme is None:
                return self.fmt.of_columns(self.layers[module].shape[-1]).dense(tensors)
            coded = self.fmt.read(tensors, scheme)
            return coded.dequantize(torch.float32) if dense else coded
        except FormatError as error:
            raise CheckpointError(f"{self.where(module)}: {error}") from None

    @property
    def rest(self) -> list[str]:
        """Names of all tensors that do not belong to a quantized layer."""
        coded = {full for tensors in self.names.values() for full in tensors.values()}
        return [name for name in self.checkpoint.tensors if name not in coded]


def _by_module(tensors: Mapping[str, TensorInfo], fmt: Format) -> dict[str, dict[str, str]]:
    """Module to local name to full name; a stack of experts counts as a module, with its codes as ``weight``."""
    modules: dict[str, dict[str, str]] = {}
    longest = sorted(fmt.suffixes, key=len, reverse=True)
    companions = [suffix.removeprefix("weight") for suffix in longest if suffix.startswith("weight_")]
    for full in tensors:
        ending = next((e for e in fmt.stack_endings if full.endswith(e)), None)
        if ending is not None:
            modules.setdefault(full.removesuffix(ending), {})[ending] = full
            continue
        suffix = next((s for s in longest if full.endswith(f".{s}")), None)
        if suffix is not None:
            modules.setdefault(full[: -len(suffix) - 1], {})[suffix] = full
            continue
        for companion in companions:
            stack = full.removesuffix(companion)
            if stack != full and stack in tensors and len(tensors[stack].shape) in (3, 4):
                modules.setdefault(stack, {"weight": stack})[f"weight{companion}"] = full
    return modules


def _file(checkpoint: Checkpoint, names: Mapping[str, Mapping[str, str]], message: str) -> str:
    """The file of the module that a message starts with."""
    tensors = names.get(message.split(":", 1)[0])
    return f"{checkpoint.tensors[next(iter(tensors.values()))].file.name}: " if tensors else ""
