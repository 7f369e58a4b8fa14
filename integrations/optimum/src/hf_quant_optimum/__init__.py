"""hf-quant behind the interface of ``optimum.quantization_base.OptimumQuantizer``."""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path
from typing import Any

from optimum.quantization_base import OptimumQuantizer
from transformers import AutoTokenizer

import hf_quant

__all__ = ["HfQuantizer"]
TRIED = "2.3."
logger = logging.getLogger(__name__)
if not (found := importlib.metadata.version("optimum")).startswith(TRIED):
    logger.warning("hf-quant-optimum was tried with optimum %sx, and this is %s", TRIED, found)


class HfQuantizer(OptimumQuantizer):
    """Quantizes one model: ``HfQuantizer.from_pretrained(model).quantize(folder, scheme="W4A16-g128")``."""

    def __init__(self, model: str) -> None:
        self.model = model

    @classmethod
    def from_pretrained(cls, model_or_path: str | Path, file_name: str | None = None) -> HfQuantizer:
        """Name the model; it is loaded by `quantize`, since it becomes codes while it is read.

        Args:
            model_or_path: Folder or Hub id.
            file_name: Must be None: transformers finds the weights by their own names.

        Raises:
            ValueError: ``file_name`` is given.
        """
        if file_name is not None:
            raise ValueError(f"file_name {file_name!r}: name the folder of the model; its weights are found in it")
        return cls(str(model_or_path))

    def quantize(self, save_dir: str | Path, file_prefix: str | None = None, **kwargs: Any) -> None:
        """Write the quantized model and its tokenizer.

        Args:
            save_dir: A folder that is empty or not there.
            file_prefix: Must be None: transformers finds the weights by their own names.
            kwargs: Fields of `hf_quant.HfQuantConfig`: ``scheme``, ``method``, ``overrides``, ...

        Raises:
            ValueError: ``file_prefix`` is given, or ``save_dir`` holds files.
            HfQuantError: The model or a field is not as it must be.
        """
        if file_prefix is not None:
            raise ValueError(f"file_prefix {file_prefix!r}: a file under another name would not be found on loading")
        folder = Path(save_dir)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty: nothing is overwritten")
        model = hf_quant.load(self.model, quantization_config=hf_quant.HfQuantConfig(**kwargs))
        model.save_pretrained(folder)
        try:
            AutoTokenizer.from_pretrained(self.model).save_pretrained(folder)
        except (OSError, ValueError) as error:  # a model of images has none
            logger.warning("%s: no tokenizer was written (%s)", self.model, error)
