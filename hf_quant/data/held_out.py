"""What a model is measured on: a text, or batches of its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from hf_quant.data.batches import TOGETHER, Inputs, checked_batches, hashes_of, holds_inputs, read_batches
from hf_quant.data.text import Text, refuse_overlap, refuse_shared
from hf_quant.disk.safetensors import read_header
from hf_quant.errors import HfQuantError

PURPOSE = "inputs to measure on"
TOKENS = ("input_ids", "decoder_input_ids", "labels")  # inputs that make the outputs as large as a vocabulary


@dataclass(frozen=True)
class HeldOut:
    """What a model is measured on.

    Attributes:
        name: Of the text, or of the file of inputs.
        text: Documents; empty where there are batches.
        batches: Inputs of the model, checked.
    """

    name: str
    text: Text = ""
    batches: tuple[Inputs, ...] = ()

    @classmethod
    def of_inputs(cls, source: str | Path | Iterable[Mapping[str, Any]]) -> HeldOut:
        """Batches as a processor returns them, or a safetensors file as for calibration.

        Raises:
            HfQuantError: They are not as they must be; names the file, or the batch and the input.
        """
        if isinstance(source, str | Path):
            path = Path(source)
            return cls(path.name, batches=checked_batches(_read(path), 1, f"{PURPOSE}: {path.name}"))
        return cls("batches", batches=checked_batches(source, 1, PURPOSE))

    def refuse_overlap(self, calibrated_on: Iterable[str]) -> None:
        """Refuse it if more than one in a hundred of its parts were calibrated on.

        Args:
            calibrated_on: `Calibration.paragraphs`, as a recipe stores them.

        Raises:
            HfQuantError: Says how many parts are shared.
        """
        if self.batches:
            refuse_shared(set(hashes_of(self.batches)), calibrated_on, "samples", "inputs to measure on")
        else:
            refuse_overlap(self.text, calibrated_on)


def _read(path: Path) -> list[Inputs]:
    """One sample at a time where logits are as large as a vocabulary; token ids alone may have any name."""
    names = list(read_header(path))
    if len(names) == 1 and not holds_inputs(path):
        (ids,) = load_file(path).values()
        if ids.is_floating_point() or ids.ndim != 2:
            raise HfQuantError(
                f"{path.name}: {names[0]} {ids.dtype} {list(ids.shape)} is no input of a model by its name, nor token ids [S, T]"
            )
        return [{"input_ids": row[None]} for row in ids]
    return read_batches(path, 1 if set(names) & {*TOKENS} else TOGETHER)
