"""All that this package uses of transformers, accelerate and huggingface_hub beyond their public interface, in one place.

Each function here uses one private name, and its docstring says what for. Seen with transformers 5.10.1 to 5.24, accelerate
1.15 and huggingface_hub 2.4. `tests/unit/test_hooks.py` has one test for each function, named after it: where a new version
breaks one, that test says which.

Three things have to stand elsewhere: `hf_quant._autoload`, which may import nothing, `hf_quant.nn._hooks`, which stands below
transformers, and `hf_quant.core.private_torch`.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import _http
from transformers.utils.hub import PushToHubMixin

# in the first, modules that a model in float16 has in float32; in the second, those that one in bfloat16 has so too
FLOAT32 = {
    "_keep_in_fp32_modules": (torch.float16,),
    "_keep_in_fp32_modules_strict": (torch.float16, torch.bfloat16),
}

# -- loading and saving -----------------------------------------------------------------------------------------------


def patterns_of(converter: Any) -> tuple[list[str], list[str]]:
    """The names that a converter reads and writes, as the model's class gave them.

    ``WeightConverter._original_source_patterns`` and ``_original_target_patterns``: the public ones are rewritten, and a new
    converter made of those would rewrite them once more.
    """
    return list(converter._original_source_patterns), list(converter._original_target_patterns)


def conversions_of(model: Any) -> list[Any]:
    """The conversions that ``save_pretrained`` undoes: ``PreTrainedModel._weight_conversions``; empty if it has none."""
    return list(getattr(model, "_weight_conversions", None) or [])


def set_conversions(model: Any, conversions: list[Any]) -> None:
    """Replace `conversions_of` a model: what loading used is not what has to be undone, and there is no public way to say so."""
    model._weight_conversions = conversions


def download_options() -> Mapping[str, Any]:
    """What ``from_pretrained`` was told about the Hub (``token``, ``local_files_only``, ...); empty outside of it.

    transformers tells a quantizer only which files it loads. These options are in the local variable ``download_kwargs`` of
    ``from_pretrained``, which is read here.
    """
    return _argument("download_kwargs")


def key_mapping() -> Mapping[str, Any]:
    """Patterns of names of tensors that ``from_pretrained`` was told to rename; empty outside of it.

    They are in its local variable ``key_mapping``, and transformers tells a quantizer nothing of them.
    """
    return _argument("key_mapping")


def _argument(name: str) -> Mapping[str, Any]:
    """The local variable of that name in the ``from_pretrained`` that runs; empty if there is none."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "from_pretrained":
            options = frame.f_locals.get(name)
            if isinstance(options, Mapping):
                return options
        frame = frame.f_back
    return {}


# -- what a model says about itself -----------------------------------------------------------------------------------


def build(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model of a class of transformers, with random weights or on the meta device.

    ``PreTrainedModel._from_config``: ``kind(config)`` would ignore ``dtype`` and the choice of an attention implementation.
    """
    return kind._from_config(config, dtype=dtype)


def modules_in_float32(model: Any) -> set[str]:
    """Names of modules that the model wants in float32: ``_keep_in_fp32_modules`` and ``_keep_in_fp32_modules_strict``."""
    return {name for attribute in FLOAT32 for name in getattr(model, attribute, None) or ()}


def stays_in_float32(model: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether transformers loads a parameter in float32 although the model has ``dtype``: ``PreTrainedModel._get_dtype_plan``."""
    patterns = [attribute for attribute, halves in FLOAT32.items() if dtype in halves]
    wanted = [pattern for attribute in patterns for pattern in getattr(model, attribute, None) or ()]
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in wanted)


def may_be_missing(model: Any) -> list[str]:
    """Patterns of tensors that its checkpoints need not have: ``_keys_to_ignore_on_load_missing``."""
    return list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


def computed(model: Any, name: str) -> torch.Tensor | None:
    """A parameter that checkpoints need not have, as its class computes it: ``PreTrainedModel._init_weights``.

    None if they must have it, or if the class draws it at random.
    """
    if not any(re.search(pattern, name) for pattern in may_be_missing(model)):
        return None
    path, _, leaf = name.rpartition(".")
    values = []
    for filling in (0, 1):
        module = copy.deepcopy(model.get_submodule(path)).to_empty(device="cpu")
        with torch.no_grad():
            getattr(module, leaf).fill_(filling)
            model._init_weights(module)
        values.append(getattr(module, leaf).data)
    return values[0] if torch.equal(*values) else None


def may_be_unexpected(model: Any) -> list[str]:
    """Patterns of tensors that its checkpoints have and the model has not: ``_keys_to_ignore_on_load_unexpected``."""
    return list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())


def attention_of(config: Any) -> str | None:
    """How attention is computed: ``PreTrainedConfig._attn_implementation``."""
    implementation: str | None = getattr(config, "_attn_implementation", None)
    return implementation


def takes_static_cache(model: Any) -> bool:
    """Whether ``generate`` runs with ``cache_implementation="static"``: ``_can_compile_fullgraph``."""
    return bool(getattr(model, "_can_compile_fullgraph", False))


def has_adapters(model: Any) -> bool:
    """Whether ``model.add_adapter`` or ``load_adapter`` was called: ``_hf_peft_config_loaded``.

    ``peft_config`` is no substitute: PEFT's own wrapper sets it on the base model too.
    """
    return bool(getattr(model, "_hf_peft_config_loaded", False))


# -- replaced methods -------------------------------------------------------------------------------------------------


@contextmanager
def replaced(instance: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Inside, ``instance.name`` is ``method``; afterwards what it was before, such as a ``forward`` of accelerate's."""
    before = vars(instance).get(name)
    setattr(instance, name, method)
    try:
        yield
    finally:
        delattr(instance, name)
        if before is not None:
            setattr(instance, name, before)


def refuse_uploads(refusal: Callable[[Any, Path], Exception | None]) -> None:
    """Ask ``refusal(object, folder)`` before transformers uploads a folder, and raise the error that it returns.

    ``PushToHubMixin._upload_modified_files`` is the one function through which models, pipelines and others upload.
    """
    original: Any = PushToHubMixin._upload_modified_files
    if original.__module__ == __name__:
        return

    @wraps(original)
    def _upload_modified_files(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if (error := refusal(self, Path(working_dir))) is not None:
            raise error
        return original(self, working_dir, *args, **kwargs)

    _upload_modified_files.__module__ = __name__
    PushToHubMixin._upload_modified_files = _upload_modified_files  # type: ignore[method-assign]


def client_factory() -> Callable[[], Any]:
    """What makes the Hub's HTTP clients now: ``huggingface_hub.set_client_factory`` sets it, and nothing public gets it."""
    return getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)
