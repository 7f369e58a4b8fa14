"""Configuration, class and tokenizer of a model, found by transformers; code in a checkpoint runs only if it is trusted.

Without ``trust_remote_code=True`` transformers asks on the terminal whether to run such code. Here that is an error that says what
to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_quant.checkpoint.config import check_config, read_config
from hf_quant.disk.strict_json import shown
from hf_quant.errors import CheckpointError, HfQuantError, PlanError

HUB = (
    "revision", "code_revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download",
    "trust_remote_code",
)  # fmt: skip
CHARACTERS = 0x110000  # code points of Unicode
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
CODE = (
    "is defined by code in the checkpoint, which is run only where you trust it: "
    "trust_remote_code=True, or --trust-remote-code"
)


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` about the source of files, and about whether their code may run."""
    return {name: options[name] for name in HUB if options.get(name) is not None}


def config_of(model: str, **hub: Any) -> PretrainedConfig:
    """The configuration of a model.

    Args:
        model: Folder or Hub id.
        hub: As `hub_options`.

    Raises:
        CheckpointError: There is none, it is malformed, or it needs code that is not trusted.
    """
    try:
        _check(model, hub)
        return _typed(AutoConfig.from_pretrained(model, **({"trust_remote_code": False} | hub)))
    except HfQuantError:
        raise
    except Exception as error:  # of transformers, the client and json; they have no common type
        if "trust_remote_code" in str(error):
            raise CheckpointError(f"{model}: config.json: its configuration {CODE}") from None
        raise CheckpointError(f"{model}: {_why(model, error)}") from error


def _check(model: str, hub: Mapping[str, Any]) -> None:
    """Refuse numbers that would make transformers run endlessly, before it reads them."""
    folder = Path(model) / hub.get("subfolder", "")
    if (folder / "config.json").is_file():
        read_config(folder)
    elif not Path(model).is_dir():
        check_config(PretrainedConfig.get_config_dict(model, **hub)[0])


def _typed(config: Any) -> Any:
    """Refuse a dtype that weights cannot have; transformers accepts every name of a ``torch.dtype``."""
    dtype = getattr(config, "dtype", None)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise CheckpointError(
            f"config.json: dtype must be a type of floating point of 16 bits or more, got {shown(dtype)}"
        )
    return config


def class_of(config: PretrainedConfig, **hub: Any) -> Any:
    """The class named by ``config.architectures``, or else ``AutoModel``.

    Raises:
        CheckpointError: transformers has no such class, and no trusted code of the checkpoint defines it.
    """
    names = getattr(config, "architectures", None)
    if not names:
        return AutoModel
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise CheckpointError(f"config.json: architectures: must be a list of names, got {shown(names)}")
    model_class = getattr(transformers, names[0], None)
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        return model_class
    references = getattr(config, "auto_map", None) or {}
    auto = next((a for a, r in references.items() if isinstance(r, str) and r.endswith(f".{names[0]}")), None)
    if auto is None:
        raise CheckpointError(
            f"config.json: architectures: transformers {transformers.__version__} has no model {names[0]}"
        )
    if not hub.get("trust_remote_code"):
        raise CheckpointError(f"{config.name_or_path}: config.json: {names[0]} {CODE}")
    options = {name: value for name, value in hub.items() if name != "trust_remote_code"}
    kind: Any = get_class_from_dynamic_module(references[auto], str(config.name_or_path), **options)
    kind.register_for_auto_class(auto)  # `save_pretrained` then copies its code
    return kind


def vocabulary_of(config: Any) -> int:
    """The number of token ids; a model without a vocabulary, such as CANINE, reads code points of Unicode."""
    sizes = (getattr(part, "vocab_size", None) for part in (config.get_text_config(), config))
    return next((size for size in sizes if isinstance(size, int) and size > 0), CHARACTERS)


def positions_of(model: Any) -> int | None:
    """The most tokens that a model (which may be on the meta device) reads at once; None where its config knows no limit.

    RoBERTa and its relatives number the first token behind the padding id, and so have fewer positions than rows for them.
    """
    rows = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(rows, int) or rows < 1:
        return None
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    padded = [table for table in tables if getattr(table, "padding_idx", None) is not None]
    return min([rows, *(table.num_embeddings - table.padding_idx - 1 for table in padded)])


def why_not_text(model: str, **hub: Any) -> str | None:
    """Why a model cannot be run on token ids alone: what it reads; None where it can."""
    config = config_of(model, **hub)
    kind = class_of(config, **hub)
    inputs = other_inputs(kind, config)
    return None if inputs is None else f"({kind.__name__}) reads {inputs}"


def other_inputs(kind: Any, config: Any) -> str | None:
    """What a class of models reads if that is more than token ids."""
    inputs: str = getattr(kind, "main_input_name", "input_ids")
    parts = [part for part in ("vision_config", "audio_config") if hasattr(config, part)]
    if inputs == "input_ids" and parts and not kind.can_generate():
        inputs = f"more than input_ids ({parts[0]})"
    return None if inputs == "input_ids" else inputs


def refuse_other_inputs(model: str, **hub: Any) -> None:
    """Refuse a model that does not read text: without other inputs the commands check and measure models on token ids.

    Raises:
        PlanError: Names the input of the model.
    """
    if (reason := why_not_text(model, **hub)) is not None:
        raise PlanError(
            f"{model} {reason}, and the commands check what they write on text, or on what --inputs names, with --no-eval too: a "
            "safetensors file with the model's inputs by name; in Python, "
            "from_pretrained(..., quantization_config=HfQuantConfig(...)) and save_pretrained quantize it"
        )


def tokenizer_of(model: str, **hub: Any) -> Any:
    """The tokenizer of a model; None if it has none.

    Raises:
        CheckpointError: It needs code that is not trusted, or one of its files is damaged.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **({"trust_remote_code": False} | hub))
        # of some models without files of a tokenizer, such as Whisper, transformers makes one that knows nothing
        return None if getattr(tokenizer, "vocab_size", None) == 0 else tokenizer
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise CheckpointError(f"{model}: its tokenizer {CODE}") from None
        files = [name for name in TOKENIZER_FILES if (Path(model) / hub.get("subfolder", "") / name).is_file()]
        if not files:  # which transformers reports in many ways
            return None
        config_of(model, **hub)  # which is read first, and may be what is wrong
        raise CheckpointError(f"{model}: {files[0]}: {_first_line(error)}") from error


def _why(model: str, error: Exception) -> str:
    """The first sentence of transformers' error about a configuration; says if the model does not exist."""
    first = _first_line(error)
    if isinstance(error, OSError) and not Path(model).exists():
        return f"there is no such folder here, and the Hub gives no model of that name ({first})"
    return f"config.json: {first}"


def _first_line(error: Exception) -> str:
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first
