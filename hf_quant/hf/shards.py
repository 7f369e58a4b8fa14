"""Files of a checkpoint during writing: their index, and tensors that no module of the model reads.

Some checkpoints have more tensors than their class in transformers reads, such as layers for multi-token prediction (``mtp``).
transformers drops them; here they are copied unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_quant.checkpoint.folder import INDEX, Checkpoint
from hf_quant.disk.atomic import write_json
from hf_quant.disk.safetensors import read_header, write_tensors
from hf_quant.hf._compat import renamer

BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias|position_ids)$")  # stored by old versions


def write_index(folder: Path, files: Sequence[str]) -> None:
    """Write the index of a checkpoint, which maps tensors to ``files``."""
    headers = {file: read_header(folder / file) for file in files}
    size = sum(info.nbytes for tensors in headers.values() for info in tensors.values())
    where = {tensor: file for file, tensors in headers.items() for tensor in tensors}
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def unclaimed(checkpoint: Checkpoint, model: Any) -> list[str]:
    """Names of the tensors in ``checkpoint`` that no module of ``model`` reads; the model may be on the meta device."""
    rename = renamer(model)
    known = {*model.state_dict(), *(name for name, _ in model.named_buffers()), *model.all_tied_weights_keys}
    return sorted(
        name
        for name in checkpoint.tensors
        if name not in known and rename(name)[0] not in known and not BUFFERS.search(name)
    )


def keep(checkpoint: Checkpoint, names: Sequence[str], folder: Path) -> None:
    """Add tensors to a complete checkpoint, in a separate file, unless they are in it already.

    Layers that they may belong to are recorded as not quantized, for programs that have modules for them.

    Args:
        checkpoint: The source of the tensors.
        names: Names of the tensors.
        folder: The checkpoint that they are added to.

    Raises:
        DiskError: Names the file that could not be written.
    """
    files = sorted(folder.glob("*.safetensors"))
    stored_names = {name for file in files for name in read_header(file)}
    if missing := [name for name in names if name not in stored_names]:
        count = len(files) + 1
        shards = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for file, shard in zip(files, shards, strict=False):
            file.rename(folder / shard)
        write_tensors(folder / shards[-1], {name: checkpoint.read(name) for name in missing})
        write_index(folder, shards)
    linear = [n for n in names if n.endswith(".weight") and len(checkpoint.tensors[n].shape) == 2]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = config["quantization_config"]
    field = "ignore" if "ignore" in stored else "modules_to_not_convert"
    stored[field] = sorted({*stored.get(field, ()), *(name.removesuffix(".weight") for name in linear)})
    write_json(folder / "config.json", config)
