"""Which module of a model gets which scheme, what stays in floating point, and why."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from hf_quant.core.layout import bytes_of
from hf_quant.core.scheme import MULTIPLE, QuantScheme
from hf_quant.errors import CheckpointError, PlanError, SchemeError
from hf_quant.hf._hooks import modules_in_float32
from hf_quant.hf.candidates import Candidate, candidates
from hf_quant.hf.config import HfQuantConfig
from hf_quant.hf.plan_format import Draft, format_of, leave_convolutions, leave_padded
from hf_quant.hf.unquantized import others
from hf_quant.solve.recipes import Decision

ROUTERS = {"gate", "router", "shared_expert_gate"}
GATED = "down_proj"  # its input, a product of two activations, has peaks that one scale cannot represent
READ_DIRECTLY = {"dt_proj"}  # Mamba multiplies by this weight without calling the module
RESCALED = (
    "attention.output",
    "feed_forward.value",
)  # RWKV divides these weights in place, as config.rescale_every says


@dataclass(frozen=True)
class Plan:
    """The plan for every weight of a model.

    Attributes:
        schemes: Module name, or full name of a stack (``...experts.down_proj``), to its scheme.
        left: Candidates that stay in floating point, with the reason.
        regrouped: Modules whose scheme differs from the requested one, with a sentence.
        tied: Whether the quantized output head and embeddings are one table.
        params: Parameters of the model, tied ones counted once.
        params_quantized: Parameters that are quantized.
        bytes_float: Size of all weights before.
        bytes_quantized: Size of all weights after, scales and zero points included.
        format: Name of the format for saving.
        format_reason: The reason for that format.
        decision: Transforms and method for every scheme in ``schemes``.
        others: Weights of kinds that are never quantized, with the reason; with `schemes` and `left`, these are all weights.
        kept: Parameters of each weight in `left` and `others`; 0 of one that is tied to another.
        convolutions: The quantized convolutions.
    """

    schemes: dict[str, QuantScheme]
    left: dict[str, str]
    regrouped: dict[str, str]
    tied: bool
    params: int
    params_quantized: int
    bytes_float: int
    bytes_quantized: int
    format: str
    format_reason: str
    decision: Decision
    others: dict[str, str]
    kept: dict[str, int]
    convolutions: list[str]

    @property
    def share(self) -> float:
        """Share of the quantized parameters, 0 to 1."""
        return self.params_quantized / max(1, self.params)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the whole model, with the weights in floating point."""
        return 8 * self.bytes_quantized / max(1, self.params)

    def summary(self) -> str:
        """A line of totals, then a line for each reason why weights stay in floating point."""
        lines = [
            f"{self.share:.1%} of {self.params:,} parameters quantized in {len(self.schemes)} layers, "
            f"{self.bits_per_weight:.2f} bits per weight, format {self.format} ({self.format_reason})"
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in (self.left | self.others).items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            share = sum(self.kept[name] for name in names) / max(1, self.params)
            of = f"{share:.2%} of the parameters" if share else "the same numbers as another weight"
            lines.append(f"in floating point: {shown} ({of}): {reason}")
        lines += sorted({f"{sentence}: {_count(self.regrouped, sentence)}" for sentence in self.regrouped.values()})
        return "\n".join(lines)


def _count(named: dict[str, str], sentence: str) -> str:
    names = [name for name, other in named.items() if other == sentence]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def make_plan(
    model: Any, config: HfQuantConfig, *, frozen: bool = False, stored: Mapping[str, QuantScheme] | None = None
) -> Plan:
    """Plan every weight.

    Args:
        model: A transformers model before any module is replaced; may be on the meta device.
        config: The settings.
        frozen: Whether ``config`` comes from a quantized checkpoint, so that nothing is defaulted or adjusted.
        stored: The layers of a quantized checkpoint, if its files are available; then nothing is decided here.

    Raises:
        PlanError: A glob matches nothing, nothing is left to quantize, the format cannot hold the plan, or the method a layer.
        CheckpointError: A frozen plan contradicts the model.
    """
    by_name = candidates(model)
    frozen = frozen or stored is not None
    skips = {} if frozen else _default_skips(model, config, by_name)
    if not frozen:
        _check_globs(model, config, by_name)
    draft = Draft()
    if stored is not None:
        draft.schemes |= stored
        draft.left |= {name: "in floating point in the checkpoint" for name in by_name if name not in stored}
    else:
        for name, candidate in by_name.items():
            _decide(name, candidate, config, skips.get(name), draft, frozen)
    if not frozen:
        leave_convolutions(config, by_name, draft)
    tied = _tie(model, by_name, draft)
    if not frozen and leave_padded(config, by_name, draft):
        tied = _tie(model, by_name, draft)
    if not draft.schemes and not frozen:
        raise PlanError(
            f"nothing to quantize in {type(model).__name__}: "
            + "; ".join(sorted({*draft.left.values(), *others(model, by_name).values()}))
        )
    decision = Decision.of(config.method, draft.schemes.values(), config.epochs)
    if decision.calibrated and not frozen:
        _refuse_tables(by_name, draft)
    chosen, reason = format_of(config.format, by_name, draft)
    params, params_quantized, bytes_float, bytes_quantized = _sizes(model, by_name, draft, tied)
    beside = others(model, by_name)
    return Plan(
        draft.schemes, draft.left, draft.regrouped, tied,
        params, params_quantized, bytes_float, bytes_quantized, chosen, reason,
        decision, beside,
        {name: 0 if _is_tied(model, name) else _numel(model, name) for name in draft.left | beside},
        [name for name in draft.schemes if _kind(by_name, name) == "patches"],
    )  # fmt: skip


def _refuse_tables(by_name: dict[str, Candidate], draft: Draft) -> None:
    """Refuse a table of embeddings, or an output head that is tied to one, where the method is calibrated."""
    table = next((name for name in draft.schemes if by_name[name].kind == "embedding"), None)
    if table is not None:
        raise PlanError(f"{table}: calibrated methods leave embeddings in floating point; rtn and hqq quantize them")


def _decide(
    name: str, candidate: Candidate, config: HfQuantConfig, skip: str | None, draft: Draft, frozen: bool
) -> None:
    named = next((glob for glob in config.overrides if fnmatchcase(name, glob)), None)
    slug = config.scheme if named is None else config.overrides[named]
    matches = fnmatchcase if frozen else _matches  # a stored config has full names
    if slug is None or any(matches(name, pattern) for pattern in config.modules_to_not_convert):
        draft.left[name] = "as asked"
    elif named is None and candidate.kind == "embedding" and not config.quantize_embeddings:
        draft.left[name] = "input embeddings; --embeddings (quantize_embeddings=True) quantizes them"
    elif named is None and skip is not None:
        draft.left[name] = skip
    elif candidate.refusal is not None:
        draft.left[name] = candidate.refusal
    else:
        scheme = QuantScheme.parse(slug)
        spared = named is None and not frozen and _spared(name, scheme, config)
        if spared:
            draft.regrouped[name] = "activations in floating point, where INT8 costs most; an override asks for INT8"
        _fit(name, candidate, scheme.weights if spared or candidate.kind == "embedding" else scheme, draft, frozen)


def _spared(name: str, scheme: QuantScheme, config: HfQuantConfig) -> bool:
    """Whether the best choice leaves the inputs of this layer in floating point; ``"threshold"`` does so by itself."""
    rounds = scheme.activations not in (None, "threshold")
    return rounds and config.method in ("calibrated", "learned") and name.rpartition(".")[2] == GATED


def _fit(name: str, candidate: Candidate, asked: QuantScheme, draft: Draft, frozen: bool) -> None:
    k = candidate.in_features
    try:
        if frozen:
            asked.groups(k)
        fitted = asked.fitted(k)
        if frozen and (candidate.kind == "experts" or not asked.padding) and fitted.padding:
            raise SchemeError(f"in_features {k} is not a multiple of {MULTIPLE}")
        if asked.padding not in (0, fitted.padding):
            raise SchemeError(f"{asked}: in_features {k} takes a padding of {fitted.padding}, which need not be given")
    except SchemeError as error:
        if frozen:
            raise CheckpointError(f"quantization_config: {name}: {error}") from None
        simple = str(QuantScheme(8, 32)) if asked.blocks else str(asked.stored)
        raise PlanError(
            f"{name}: {error}; give this layer another scheme, overrides={{{name!r}: {simple!r}}}"
        ) from None
    if fitted.padding and not frozen and (reason := _why_not_padded(candidate, fitted)) is not None:
        draft.left[name] = f"in_features {k} is not a multiple of {MULTIPLE}, and {reason}"
        return
    draft.schemes[name] = fitted
    if asked.foreign and not frozen:
        raise PlanError(f"{name}: {asked.foreign}")
    changes = [f"in_features {k} padded to {fitted.columns(k)} by zeros"] if fitted.padding else []
    if fitted.group_size != asked.group_size:
        changes.append(f"group size {fitted.group_size}, since {asked.group_size} does not divide in_features")
    if changes:
        draft.regrouped[name] = ", ".join(changes)


def _why_not_padded(candidate: Candidate, scheme: QuantScheme) -> str | None:
    """Why a layer is not padded, whatever the format; None if it may be."""
    if candidate.kind == "experts":
        return "stacks of experts are not padded"
    if bytes_of(candidate.shape, scheme, torch.bfloat16) >= 2 * math.prod(candidate.shape):
        return "padded codes would take no less memory"
    return None


def freeze(config: HfQuantConfig, plan: Plan) -> None:
    """Write the resolved plan into ``config``, so that loading the result decides nothing again."""
    config.overrides = {name: str(s) for name, s in plan.schemes.items() if str(s) != config.scheme}
    config.modules_to_not_convert = sorted(plan.left)
    config.format = plan.format
    config.convolutions = plan.convolutions
    config.quantize_embeddings = config.quantize_embeddings or plan.tied
    config.share_quantized = round(plan.share, 4)


def _matches(name: str, pattern: str) -> bool:
    """Whether a glob, a name, or trailing parts of a name match a module or a parent of it."""
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


def _check_globs(model: Any, config: HfQuantConfig, by_name: dict[str, Candidate]) -> None:
    for glob in config.overrides:
        if not any(fnmatchcase(name, glob) for name in by_name):
            close = difflib.get_close_matches(glob.strip("*."), by_name, 1, 0.3)
            raise PlanError(f"override {glob!r} matches no layer" + (f"; one is called {close[0]!r}" if close else ""))
    modules = [name for name, _ in model.named_modules()] + list(by_name)
    for pattern in config.modules_to_not_convert:
        if not any(_matches(name, pattern) for name in modules):
            expression = pattern.startswith("re:")
            hint = f"; it takes globs: {pattern[3:].replace('.*', '*')!r}" if expression else ""
            raise PlanError(f"modules_to_not_convert: {pattern!r} matches no module{hint}")


def _default_skips(model: Any, config: HfQuantConfig, by_name: dict[str, Candidate]) -> dict[str, str]:
    """Modules that are quantized only if they are named."""
    skips: dict[str, str] = {}
    names = {id(module): name for name, module in model.named_modules()}
    heads = _heads(model, names, by_name)
    inside = _quantized_part(model, names)
    keep = modules_in_float32(model)
    has_experts = any(candidate.kind == "experts" for candidate in by_name.values())
    for name, candidate in by_name.items():
        leaf = name.rpartition(".")[2]
        if name in heads:
            if not config.quantize_lm_head and not (config.quantize_embeddings and _is_tied(model, name)):
                skips[name] = "output head; --lm-head (quantize_lm_head=True) quantizes it"
        elif candidate.kind != "embedding" and not f"{name}.".startswith(inside):
            skips[name] = f"outside {inside.rstrip('.')}: a task head, or another modality"
        elif keep & set(name.split(".")):
            skips[name] = "the model keeps it in float32"
        elif has_experts and leaf in ROUTERS:
            skips[name] = "a router: small, and an error here sends tokens to the wrong experts"
        elif leaf in READ_DIRECTLY:
            skips[name] = "its weight is read without calling the module"
        elif getattr(model.config, "rescale_every", 0) and name.endswith(RESCALED):
            skips[name] = "the model rescales it in place"
    return skips


def _heads(model: Any, names: dict[int, str], by_name: dict[str, Candidate]) -> set[str]:
    """The output head that the model names, and linear layers that are tied to embeddings: not every model names its head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = {names[id(head)]} if id(head) in names else set()
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        layer, table = target.removesuffix(".weight"), source.removesuffix(".weight")
        if _kind(by_name, layer) == "linear" and _kind(by_name, table) == "embedding":
            heads.add(layer)
    return heads


def _kind(by_name: dict[str, Candidate], name: str) -> str | None:
    return by_name[name].kind if name in by_name else None


def _quantized_part(model: Any, names: dict[int, str]) -> str:
    """Prefix of the part quantized by default: the text decoder of a multimodal model, else the base model."""
    config = model.config
    if getattr(config, "text_config", None) is not None and any(
        getattr(config, f"{other}_config", None) is not None for other in ("vision", "audio")
    ):
        part = model.get_decoder()
    else:
        part = model.base_model
    name = names.get(id(part), "")
    return f"{name}." if name else ""


def _is_tied(model: Any, name: str) -> bool:
    return name in tied_to_others(model)


def tied_to_others(model: Any) -> list[str]:
    """Modules whose weight is that of another one, such as an output head that is tied to the embeddings."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    return [name.removesuffix(".weight") for name in ties if name.endswith(".weight")]


def _tie(model: Any, by_name: dict[str, Candidate], draft: Draft) -> bool:
    """Where the output head is tied to the embeddings, give all modules of that table one scheme, or none."""
    groups: dict[str, list[str]] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target.endswith(".weight"):
            groups.setdefault(source, [source.removesuffix(".weight")]).append(target.removesuffix(".weight"))
    tied = False
    for names in groups.values():
        scheme = next((draft.schemes[name] for name in reversed(names) if name in draft.schemes), None)
        if scheme is None:
            continue
        strange = next((name for name in names if name not in by_name), None)
        refusal = f"tied to {strange}, which cannot be quantized" if strange is not None else None
        if refusal is None and by_name[names[0]].kind != "embedding":
            refusal = f"{', '.join(names)} are one weight"
        refusal = refusal or next((reason for name in names if (reason := by_name[name].refusal)), None)
        for name in [name for name in names if name in by_name]:
            if refusal is not None:
                draft.schemes.pop(name, None)
                draft.left[name] = refusal
            else:
                draft.schemes[name] = scheme
                draft.left.pop(name, None)
        tied = tied or refusal is None
    return tied


def _numel(model: Any, name: str) -> int:
    """Parameters of a weight, by the name of its module or its own."""
    path, _, leaf = name.rpartition(".")
    parameter = model.get_submodule(path)._parameters.get(leaf)
    return int((model.get_parameter(f"{name}.weight") if parameter is None else parameter).numel())


def _sizes(model: Any, by_name: dict[str, Candidate], draft: Draft, tied: bool) -> tuple[int, int, int, int]:
    """Number of parameters, number of quantized ones, bytes before and after; tied parameters count once."""
    before = {id(p): p for p in model.parameters()}
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in ties.items():  # while loading, tied parameters are still separate objects
        if model.get_parameter(target) is not model.get_parameter(source):
            before.pop(id(model.get_parameter(target)), None)
    bytes_float = sum(p.numel() * p.element_size() for p in before.values())
    bytes_quantized, params_quantized = bytes_float, 0
    for name, scheme in draft.schemes.items():
        if tied and f"{name}.weight" in ties:
            continue
        weight = model.get_parameter(name if by_name[name].kind == "experts" else f"{name}.weight")
        bytes_quantized += bytes_of(by_name[name].shape, scheme, weight.dtype) - weight.numel() * weight.element_size()
        params_quantized += weight.numel()
    return sum(p.numel() for p in before.values()), params_quantized, bytes_float, bytes_quantized
