"""What stands under ``quantization_config`` in config.json."""

from __future__ import annotations

import difflib
import inspect
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_quant.core.scheme import QuantScheme, fixed_zero
from hf_quant.data.calibration import Source
from hf_quant.data.chat import NOTHING_ASKED, may_hold_chats
from hf_quant.data.given import as_source
from hf_quant.disk.strict_json import shown
from hf_quant.errors import FormatError, PlanError, SchemeError, printable
from hf_quant.formats import format_of, formats, saved_formats
from hf_quant.solve.recipes import EPOCHS, Decision
from hf_quant.training import why_not

TOKENS = 65536  # calibrated on by default
UNSTORED = (
    "calibration",
    "calibration_tokens",
    "chat_template_kwargs",
    "epochs",
    "activations",
    "stored",
    "dequantize",
    "given",
    "convolutions",
    "files",
    "training",
    "saves_training",
)  # the text may be private; the recipe has its hash
SAID_BY_SCHEME = ("bits", "group_size", "symmetric")
AUTO = "auto"  # compressed-tensors where it can hold the plan
VERSION = 1  # of this configuration's meaning
OTHER_NAMES = {  # of the same things in other packages
    "load_in_4bit": "bits=4", "load_in_8bit": "bits=8", "wbits": "bits", "w_bit": "bits", "nbits": "bits",
    "q_group_size": "group_size", "sym": "symmetric", "zero_point": "symmetric=False", "dataset": "calibration",
    "ignore": "modules_to_not_convert", "llm_int8_skip_modules": "modules_to_not_convert",
    "bnb_4bit_quant_type": "scheme='W4A16-g64'", "bnb_4bit_use_double_quant": "scheme='W4A16-g64'",
    "bnb_4bit_compute_dtype": "dtype=... of from_pretrained", "dtype": "dtype=... of from_pretrained",
    "torch_dtype": "dtype=... of from_pretrained", "device_map": "device_map=... of from_pretrained",
    "llm_int8_threshold": "scheme='W8A8-threshold'", "quant_type": "scheme", "weights": "scheme", "desc_act": "method='gptq'",
    "act_order": "method='gptq'", "lm_head": "quantize_lm_head=True", "iters": "epochs", "nsamples": "calibration_tokens",
    "num_samples": "calibration_tokens", "tokenizer": "calibration, which takes texts or token ids",
}  # fmt: skip
logger = logging.get_logger(__name__)


class _SaidByScheme:
    """A field of the scheme under a name of its own; a new value gives another scheme."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, config: HfQuantConfig | None, owner: type) -> Any:
        return self if config is None else getattr(config.default_scheme, self.name)

    def __set__(self, config: HfQuantConfig, value: Any) -> None:
        config.scheme = str(replace(config.default_scheme, **{self.name: value}))


@register_quantization_config("hf_quant")
class HfQuantConfig(QuantizationConfigMixin):
    """How to quantize a model, and after that how it was.

    Args:
        scheme: Slug of the scheme of every layer not named below, for example ``"W4A16-g128-asym"``; in place of the
            three that follow, which may not contradict it.
        bits: Width of one code: 8, 4, 3 or 2; 4 by default.
        group_size: Input columns that share a scale: a power of two from 16, or -1 for a whole row; 128 by default.
        symmetric: Whether the zero point is fixed; by default it is not at 2 and 3 bits.
        method: ``"rtn"`` (rounding, needs no data), ``"calibrated"`` (what loses least at each width without
            training), ``"learned"`` (`calibrated`, then training block by block), ``"gptq"``, ``"awq"``, ``"hqq"``, or transforms and a method joined by ``+``: see `hf_quant.solve.recipes`.
        overrides: Glob over module names to slug, or to None to leave those modules in floating point; the first match
            wins. A module named here is quantized even if the defaults would skip it (output head, vision tower).
        modules_to_not_convert: Globs, names or trailing names (``"o_proj"``) of modules to leave in floating point,
            besides those left by default.
        quantize_lm_head: Quantize the output head too. Where it is tied to the embeddings, both become one quantized
            table.
        quantize_embeddings: Quantize the input embeddings too, likewise.
        format: ``"native"``, ``"compressed_tensors"``, or ``"auto"``: compressed-tensors where it can hold the plan, since
            other software reads it, native otherwise.
        calibration: What calibrated methods look at while the model loads: token ids ``[S, T]``, a list of texts, a text or
            JSONL file, or a ``datasets`` set, by its name or loaded, with ``text``, ``messages`` or ``input_ids``; None for the
            text that comes with this package. Or batches of the model's inputs, as its processor or tokenizer returns them
            (``pixel_values``, ``input_features``, ``input_ids``, ...), at least two. Never stored.
        calibration_tokens: How many of its tokens to take at most.
        chat_template_kwargs: Arguments of the chat template that renders messages of ``calibration``, such as
            ``{"enable_thinking": False}``. Never stored.
        epochs: How often ``"learned"`` goes through them for each block; 6 by default. Never stored.
        activations: Of a checkpoint that another program quantized: ``"float"`` runs its layers against activations in
            floating point, ``"int8"`` as that program would (for LLM.int8 with its threshold of 6). None follows the config
            of compressed-tensors, and keeps floating point for LLM.int8, which is more exact.
        training: Whether the model shall train: its weights stay in floating point, and the forward pass rounds them.
            ``save_pretrained`` then writes what ``training=False`` would have: the quantized model.
        version: Of this configuration's meaning; a newer one is refused, not guessed at.
        share_quantized: Filled in after quantizing: share of the parameters that became codes.
        convolutions: Likewise: names of the quantized convolutions.

    Raises:
        SchemeError: The scheme is impossible, or another field contradicts it.
        PlanError: A field is unknown, has the wrong type, or names no method or format.
        FormatError: The checkpoint was written by a newer version.
    """

    bits, group_size, symmetric = _SaidByScheme(), _SaidByScheme(), _SaidByScheme()

    def __init__(
        self,
        scheme: str | None = None,
        *,
        bits: int | None = None,
        group_size: int | None = None,
        symmetric: bool | None = None,
        method: str = "rtn",
        overrides: Mapping[str, str | None] | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        quantize_lm_head: bool = False,
        quantize_embeddings: bool = False,
        format: str = "auto",
        calibration: Source | None = None,
        calibration_tokens: int = TOKENS,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        epochs: int | None = None,
        activations: str | None = None,
        training: bool = False,
        version: int = VERSION,
        share_quantized: float | None = None,
        convolutions: list[str] | None = None,
        quant_method: str = "hf_quant",
        **unknown: Any,
    ) -> None:
        if type(version) is not int or not 1 <= version <= VERSION:
            raise FormatError(f"quantization_config.version {version!r}: this hf-quant reads versions up to {VERSION}")
        if unknown:
            raise PlanError(_unknown(unknown))
        says = {
            "scheme": scheme, "bits": bits, "group_size": group_size, "symmetric": symmetric, "overrides": overrides or None,
            "method": None if method == "rtn" else method, "modules_to_not_convert": modules_to_not_convert or None,
            "quantize_lm_head": quantize_lm_head or None, "quantize_embeddings": quantize_embeddings or None,
            "format": None if format == "auto" else format, "training": training or None, "calibration": calibration,
            "calibration_tokens": None if calibration_tokens == TOKENS else calibration_tokens, "epochs": epochs,
            "chat_template_kwargs": chat_template_kwargs, "activations": activations,
        }  # fmt: skip
        self.given = tuple(
            name for name, value in says.items() if value is not None
        )  # what a checkpoint must not ignore
        default = _default_scheme(scheme, bits=bits, group_size=group_size, symmetric=symmetric)
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers types it as its own enum
        self.version = version
        self.format = format.replace("-", "_") if isinstance(format, str) else format
        self.method = method
        self.scheme = str(default)
        self.overrides = dict(_typed("overrides", overrides or {}, Mapping))
        self.modules_to_not_convert = _names("modules_to_not_convert", modules_to_not_convert)
        self.quantize_lm_head: bool = _typed("quantize_lm_head", quantize_lm_head, bool)
        self.quantize_embeddings: bool = _typed("quantize_embeddings", quantize_embeddings, bool)
        self.share_quantized = share_quantized
        self.stored: Mapping[str, Any] | None = None  # of a checkpoint that is being taken over
        self.convolutions = _names("convolutions", convolutions)
        self.files: Mapping[str, str] = {}  # quantized module to its name in the files, where they call it otherwise
        self.dequantize = False
        if activations not in ("float", "int8", None):
            raise PlanError(f"quantization_config.activations {activations!r}: must be 'float', 'int8' or None")
        self.activations = activations
        self.training: bool = _typed("training", training, bool)
        self.saves_training = False  # while a training is saved that shall go on
        for glob, slug in self.overrides.items():
            _typed("overrides: each key", glob, str)
            if slug is not None:
                _parsed(f"overrides[{glob!r}]", slug)
        self.calibration = as_source(calibration)  # now, since a loader yields its batches once
        if type(calibration_tokens) is not int or calibration_tokens < 1:
            raise PlanError(
                f"quantization_config.calibration_tokens {calibration_tokens!r}: must be a whole number from 1"
            )
        self.calibration_tokens = calibration_tokens
        self.chat_template_kwargs = _checked_arguments(chat_template_kwargs, self.calibration)
        self.epochs = _checked_epochs(epochs, method)
        self._check_ranges()
        self._check_data()
        if training:
            self._check_trainable()
        if self.format != AUTO and self.format not in saved_formats():
            raise PlanError(
                f"quantization_config.format {format!r}: a model is saved as {' or '.join(saved_formats())}; hf-quant convert "
                "writes other formats"
            )
        self._check_format()
        if share_quantized is not None and (
            type(share_quantized) not in (int, float) or not 0 <= share_quantized <= 1
        ):
            raise PlanError(f"quantization_config.share_quantized {share_quantized!r}: must be a number from 0 to 1")

    def __repr__(self) -> str:
        """What differs from the defaults, on one line."""
        known = inspect.signature(type(self)).parameters
        names = [name for name in known if name not in ("scheme", *SAID_BY_SCHEME, *UNSTORED) and hasattr(self, name)]
        values = {name: getattr(self, name) for name in names}
        shown = [f"{name}={value!r}" for name, value in values.items() if value and value != known[name].default]
        return printable(f"{type(self).__name__}({', '.join([repr(self.scheme), *shown])})", lines=False)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What config.json holds; fields that other software added are left out, with a warning."""
        extra = sorted(map(str, config_dict.keys() - inspect.signature(cls).parameters.keys()))
        if extra:
            logger.warning(printable(f"quantization_config: ignored unknown fields {extra}"))
        known = {name: value for name, value in config_dict.items() if name not in extra}
        return super().from_dict(known, return_unused_kwargs, **kwargs)  # type: ignore[no-untyped-call]

    __hash__ = None  # type: ignore[assignment]  # as of every config of transformers: they can be changed

    def __eq__(self, other: object) -> bool:
        """Whether both ask for the same; calibration data are the same where they are one object, or equal names."""
        if not isinstance(other, HfQuantConfig):
            return NotImplemented
        data, others = self.calibration, other.calibration
        alike = data is others or (isinstance(data, str) and isinstance(others, str) and data == others)
        fields = [
            {name: value for name, value in vars(config).items() if name not in ("calibration", "given")}
            for config in (self, other)
        ]
        return alike and fields[0] == fields[1]

    def _check_format(self) -> None:
        """Refuse schemes that the format has no place for, which its own config could not name either."""
        if self.format != AUTO:
            for scheme in self._decision().presets:
                if (reason := formats()[self.format].why_not(scheme)) is not None:
                    raise PlanError(f"format {self.format} cannot hold this plan: {reason}")

    def _check_ranges(self) -> None:
        """Refuse schemes that take a look at activations, where nothing looks."""
        wanting = [scheme for scheme in self._decision().presets if scheme.needs_ranges]
        if wanting and not self.calibrated and self.share_quantized is None:
            what = "the range" if wanting[0].activations == "tensor" else "outlier columns"
            raise PlanError(
                f"{wanting[0]}: {what} of the activations must be found by calibration, which {self.method!r} does not do; "
                "'calibrated' does, as the method"
            )

    def _check_data(self) -> None:
        """Refuse calibration data where nothing looks at them."""
        fields = [name for name in ("calibration", "calibration_tokens", "chat_template_kwargs") if name in self.given]
        if fields and not self.calibrated:
            raise PlanError(f"{fields[0]}: method {self.method!r} looks at no data; 'calibrated' does")

    def _check_trainable(self) -> None:
        """Refuse schemes that cannot be trained."""
        for scheme in self._decision().presets:
            if (reason := why_not(scheme)) is not None:
                raise PlanError(f"training: {scheme}: {reason}")

    def _decision(self) -> Decision:
        """Of the schemes named here; the plan's own decision is about those that layers really have."""
        overrides = [QuantScheme.parse(slug) for slug in self.overrides.values() if slug is not None]
        return Decision.of(self.method, [self.default_scheme, *overrides], self.epochs)

    @property
    def calibrated(self) -> bool:
        """Whether the method needs calibration data, as far as that is known before there is a plan."""
        return self._decision().calibrated

    @property
    def default_scheme(self) -> QuantScheme:
        """The scheme of every layer that no override names."""
        return QuantScheme.parse(self.scheme)

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json: in the vocabulary of the format."""
        fmt = None if self.format == AUTO else formats()[self.format]
        if fmt is None or fmt.in_memory or self.saves_training:
            return (
                ({"training": True} if self.saves_training else {})
                | {name: value for name, value in self.__dict__.items() if name not in UNSTORED}
                | {name: getattr(self.default_scheme, name) for name in SAID_BY_SCHEME}
                | {"overrides": self._both(self.overrides)}
                | ({"convolutions": self._also_in_files(self.convolutions)} if self.convolutions else {})
            )
        overrides = {
            name: QuantScheme.parse(slug) for name, slug in self._both(self.overrides).items() if slug is not None
        }
        config = fmt.config_of_plan(self.default_scheme, overrides, self.modules_to_not_convert)
        ours = {"version": self.version, "method": self.method, "share_quantized": self.share_quantized}
        return config | {"hf_quant": ours}  # the key that marks checkpoints of this package

    def _both(self, overrides: Mapping[str, str | None]) -> dict[str, str | None]:
        """Under the names of the modules, and under those in the files too: readers of checkpoints know either."""
        return dict(overrides) | {self.files[name]: slug for name, slug in overrides.items() if name in self.files}

    def _also_in_files(self, names: Sequence[str]) -> list[str]:
        return [*names, *(self.files[name] for name in names if name in self.files)]

    def resolve(self, schemes: Mapping[str, QuantScheme], left: Sequence[str]) -> None:
        """Say which layers of the model are quantized and how, and which are not, where another program decided it."""
        default = Counter(schemes.values()).most_common(1)[0][0] if schemes else self.default_scheme
        self.dequantize = not schemes  # by this name transformers knows that the model is an ordinary one
        self.scheme = str(default)
        self.overrides = {name: str(scheme) for name, scheme in schemes.items() if scheme != default}
        self.modules_to_not_convert = sorted(left)
        self.format, self.stored = "auto", None

    def get_loading_attributes(self) -> dict[str, Any]:
        """Nothing of a saved checkpoint may be changed while loading it."""
        return {}


def taken_over(stored: Mapping[str, Any], activations: str | None = None) -> HfQuantConfig:
    """The configuration that runs a checkpoint which another program quantized, with its own bits.

    Args:
        stored: ``quantization_config`` of the checkpoint; what its layers are is found in the headers, while loading.
        activations: As in `HfQuantConfig`.

    Raises:
        FormatError: The checkpoint holds what this package cannot run; the message names the field.
    """
    format_of(stored)
    ours = stored.get("hf_quant") or {}
    if not isinstance(ours, Mapping):
        raise FormatError(f"quantization_config.hf_quant must be an object, got {shown(ours)}")
    config = HfQuantConfig(
        method=ours.get("method", "rtn"), version=ours.get("version", VERSION),
        share_quantized=ours.get("share_quantized"), activations=activations,
    )  # fmt: skip
    config.stored, config.given = dict(stored), ()
    return config


def _default_scheme(scheme: str | None, **fields: Any) -> QuantScheme:
    """The scheme that is named, or the one of the fields that are not None."""
    named = {name: value for name, value in fields.items() if value is not None}
    if scheme is None:
        bits = named.get("bits", 4)
        return QuantScheme(**({"bits": bits, "symmetric": fixed_zero(bits)} | named))
    parsed = QuantScheme.parse(scheme)
    for name, value in named.items():
        if getattr(parsed, name) != value:
            raise SchemeError(
                f"quantization_config: scheme {scheme!r} and {name}={value!r} contradict each other: give one of them"
            )
    return parsed


def _checked_epochs(epochs: int | None, method: str) -> int:
    if epochs is None:
        return EPOCHS
    if type(epochs) is not int or epochs < 1:
        raise PlanError(f"epochs {epochs!r}: must be a whole number from 1")
    if method != "learned":
        raise PlanError(f"epochs: method {method!r} learns nothing; 'learned' does")
    return epochs


def _checked_arguments(arguments: Mapping[str, Any] | None, calibration: Any) -> Mapping[str, Any] | None:
    if arguments is not None:
        _typed("chat_template_kwargs", arguments, Mapping)
        if not may_hold_chats(calibration):
            raise PlanError(f"quantization_config.chat_template_kwargs: {NOTHING_ASKED}")
    return arguments


def _unknown(names: Collection[str]) -> str:
    """What is wrong with fields that do not exist, and which ones were probably meant."""
    fields = [name for name in inspect.signature(HfQuantConfig).parameters if name != "unknown"]
    hints = []
    for name in sorted(names):
        suggestion = OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, fields, 1)), None)
        hints.append(f"{name!r}" + (f" (did you mean {suggestion}?)" if suggestion else ""))
    return f"quantization_config has no field {', '.join(hints)}; there is {', '.join(fields)}"


def _typed(field: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise PlanError(f"quantization_config.{field} must be a {kind.__name__}, got {value!r}")
    return value


def _names(field: str, value: Sequence[str] | None) -> list[str]:
    names = list(value) if isinstance(value, tuple) else _typed(field, value or [], list)
    if "" in names:
        raise PlanError(f"quantization_config.{field}: one of the names is empty")
    return [_typed(field, name, str) for name in names]


def _parsed(field: str, slug: Any) -> QuantScheme:
    try:
        return QuantScheme.parse(slug)
    except SchemeError as error:
        raise SchemeError(f"quantization_config.{field}: {error}") from None
