"""Registers ``quant_method: "hf_quant"`` in transformers without an ``import hf_quant``; the classes are imported on first use.

transformers has no plug-ins, so the wheel names `autoload` in the entry-point group ``torch.backends``, which is meant for
device backends: torch calls its members at the end of ``import torch``. This module must import nothing heavy and must not
raise. HF_QUANT_AUTOLOAD=0 disables it, HF_QUANT_DEBUG=1 shows errors. Seen with torch 2.6 to 2.13 and transformers 5.10.1 to
5.24; `tests/unit/test_autoload.py` tests every step of it.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from hf_quant import _upwards

METHOD = "hf_quant"
AUTO = "transformers.quantizers.auto"
taken_over = set(os.environ.get("HF_QUANT_TAKE_OVER", "").replace(",", " ").split())  # see `hf_quant.take_over`
PATCHED_MODULES = (
    AUTO,
    "transformers.modeling_utils",
)  # the second one, since torch may be imported from inside the first


class _Proxy:
    """Stands for a class in one of transformers' two mappings until it is used."""

    def __init__(self, class_name: str) -> None:
        self._class_name = class_name

    def _real(self) -> Any:
        try:
            return getattr(_upwards.transformers_plugin(), self._class_name)
        except BaseException:
            _quietly(_register)  # otherwise transformers would skip the quantization at the next attempt
            raise

    def from_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The configuration from its form in config.json."""
        return self._real().from_dict(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)


class _Finder:
    """On ``sys.meta_path``: finds no module itself, but registers after a target has been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec from the other finders, whose loader calls `_register` afterwards."""
        if name not in PATCHED_MODULES:
            return None
        others = [finder for finder in sys.meta_path if hasattr(finder, "find_spec") and not _ours(finder)]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        _quietly(lambda: _register_after(spec.loader if spec else None))
        return spec


def autoload() -> None:
    """Called by torch; an exception here would break ``import torch``."""
    if os.environ.get("HF_QUANT_AUTOLOAD") != "0":
        _quietly(install)


def install() -> None:
    """Register now if transformers is imported, or else as soon as it is; may be called repeatedly."""
    if not any(map(_ours, sys.meta_path)):
        sys.meta_path.insert(0, _Finder())
    _register()


def drop_proxies() -> None:
    """Remove the proxies before the real classes are registered: transformers refuses a name that is taken."""
    auto: Any = sys.modules.get(AUTO)
    for mapping in ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"):
        entries = getattr(auto, mapping, {})
        if _ours(entries.get(METHOD)):
            del entries[METHOD]


def _register_after(loader: Any) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _quietly(_register)

    loader.exec_module = exec_module


def _register() -> None:
    auto: Any = sys.modules.get(AUTO)
    if not hasattr(auto, "get_hf_quantizer"):  # not imported, or partly
        return
    if "hf_quant.hf" not in sys.modules:  # that module registers the real classes
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, _Proxy("HfQuantConfig"))
        auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, _Proxy("HfQuantQuantizer"))
    _wrap(auto.AutoHfQuantizer, "merge_quantization_configs", _taking_over)
    _wrap(auto.AutoQuantizationConfig, "from_dict", _without_its_package)
    _wrap(auto.AutoHfQuantizer, "supports_quant_method", _supporting)


def _wrap(owner: type, name: str, by: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    if original.__module__ != __name__:
        function = getattr(original, "__func__", lambda _cls, *args: original(*args))  # a static method is one itself
        setattr(owner, name, classmethod(by(function)))


def _taking_over(original: Callable[..., Any]) -> Callable[..., Any]:
    def merge_quantization_configs(cls: type, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        """transformers' own, except for checkpoints in other formats that this package wrote or was asked to run.

        A configuration of this package that says how to quantize is refused for a checkpoint that is already quantized.
        """
        stored, requested = _as_dict(quantization_config), quantization_config_from_args
        of_this_package = type(requested).__name__ == "HfQuantConfig"
        if _foreign(stored):
            if of_this_package or (_to_take_over(stored) and (requested is None or _repeats(requested, stored))):
                hf = _upwards.transformers_plugin()
                if not of_this_package:
                    return hf.taken_over(stored, None)
                if isinstance(requested, hf.HfQuantConfig):
                    config = hf.taken_over(stored, requested.activations)
                    hf.refuse_requantizing(stored, requested)
                    return config
        elif of_this_package:
            _upwards.transformers_plugin().refuse_requantizing(stored, requested)
        return original(cls, stored, requested)

    return merge_quantization_configs


def _without_its_package(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_dict(cls: type, quantization_config_dict: Any) -> Any:
        """transformers' own, which may need the package of the format; this package's own where that is missing."""
        try:
            return original(cls, quantization_config_dict)
        except ImportError:
            if not (_foreign(quantization_config_dict) and _to_take_over(quantization_config_dict)):
                raise
            return _upwards.transformers_plugin().taken_over(quantization_config_dict, None)

    return from_dict


def _supporting(original: Callable[..., Any]) -> Callable[..., Any]:
    def supports_quant_method(cls: type, quantization_config_dict: Any) -> Any:
        """transformers' own, every format that this package wrote (a plug-in's has a name of its own), and those it alone reads."""
        stored = _as_dict(quantization_config_dict)
        return METHOD in stored or _read_here_alone(stored) or original(cls, stored)

    return supports_quant_method


def _as_dict(stored: Any) -> Any:
    """The configuration in ``config`` of ``from_pretrained``, which is an object where that is of a model that was loaded."""
    return stored.to_dict() if type(stored).__name__ == "HfQuantConfig" else stored


def _foreign(stored: Any) -> bool:
    method = stored.get("quant_method") if isinstance(stored, dict) else METHOD
    return isinstance(method, str) and method != METHOD


def _to_take_over(stored: dict[str, Any]) -> bool:
    known = _upwards.transformers_plugin().known_methods() if taken_over else []
    if unknown := sorted(taken_over - set(known)):
        from hf_quant.errors import PlanError

        raise PlanError(f"HF_QUANT_TAKE_OVER: {unknown[0]!r} is not one of {', '.join(known)}")
    return METHOD in stored or stored["quant_method"] in taken_over or _read_here_alone(stored)


def _read_here_alone(stored: dict[str, Any]) -> bool:
    """Whether transformers does not know a format that this package reads: it would pass over scales, and load codes as weights."""
    auto: Any = sys.modules[AUTO]
    unknown = _foreign(stored) and stored["quant_method"] not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    return unknown and stored["quant_method"] in _upwards.transformers_plugin().known_methods()


def _repeats(requested: Any, stored: dict[str, Any]) -> bool:
    """Whether a caller passes on the configuration of the checkpoint, as lm-evaluation-harness does."""
    auto: Any = sys.modules[AUTO]
    same = auto.AutoQuantizationConfig.from_dict(dict(stored))
    return type(same) is type(requested) and vars(same) == vars(requested)


def _ours(thing: object) -> bool:
    return type(thing).__module__ == __name__  # not isinstance: this module may have been imported twice


def _quietly(step: Callable[[], None]) -> None:
    try:
        step()
    except Exception:
        if os.environ.get("HF_QUANT_DEBUG") == "1":
            traceback.print_exc()  # no warning: an import must not fail where warnings are errors
