"""Presets: the transforms and the method that a user's ``method`` stands for, for each width, and what is learned after.

A `Decision` is made once for a whole model and passed on; the recipe records it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hf_quant import _plugins
from hf_quant.core.scheme import BITS, QuantScheme
from hf_quant.errors import PlanError, suggestion

if TYPE_CHECKING:  # names can be checked before torch is imported
    from hf_quant.methods import Method
    from hf_quant.transforms import Transform


EPOCHS = 6
ELSEWHERE = {  # what others call them, without hyphens
    "autoround": "learned", "gptqmodel": "gptq", "autogptq": "gptq", "autoawq": "awq", "gptaq": "drift+gptq",
    "quarot": "hadamard+gptq", "imatrix": "calibrated", "best": "calibrated", "minmax": "rtn", "nearest": "rtn", "none": "rtn",
    "bnb": "rtn", "qat": "the command hf-quant train",
}  # fmt: skip


@dataclass(frozen=True)
class Learning:
    """How codes and scales of a block are learned, after a method has chosen them (`hf_quant.solve.learning`).

    Attributes:
        epochs: Passes over the calibration text.
        codes: Learning rate of the codes, in steps of the grid.
        scales: Learning rate of the scales, relative to what they start from; half of it while codes are learned.
        seed: Of the order of the text.
    """

    epochs: int = EPOCHS
    codes: float = 0.01
    scales: float = 0.002
    seed: int = 0

    @property
    def together(self) -> tuple[float, float]:
        """Learning rates of codes and scales while both are learned."""
        return self.codes, self.scales / 2


@dataclass(frozen=True)
class Preset:
    """One way to quantize.

    Attributes:
        method: Name of a file in ``hf_quant/methods``.
        transforms: Names of files in ``hf_quant/transforms``, in the order they are applied.
        options: Hyperparameters of the method that are not its defaults.
        learning: How codes are trained after the method has chosen them; None if they are not.
    """

    method: str
    transforms: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    learning: Learning | None = None

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration data; known without torch, which methods import."""
        if self.transforms:
            return True
        declared = _plugins.constants("methods", self.method).get("calibrated")
        return bool(self.solver().calibrated if declared is None else declared)

    def solver(self) -> Method:
        """The method with its hyperparameters."""
        from hf_quant.methods import method

        return method(self.method, **self.options)


SCALED = Preset("rtn", ("awq",))  # enough for 8 bits, and needed there where a model has outlier channels
BEST = Preset("gptq", ("awq", "drift"), {"sweeps": 2})
INT8 = Preset("gptq", ("smoothquant",))  # for weights that are multiplied by INT8 activations
PRESETS: dict[str, dict[int, Preset]] = {
    "awq": dict.fromkeys(BITS, SCALED),
    "calibrated": {8: SCALED, 4: BEST, 3: BEST, 2: BEST},
    "learned": {8: SCALED, 4: BEST, 3: BEST, 2: BEST},
}
LEARNED = "learned"  # the step, in recipes
LEARNED_BITS = 4  # wider codes lose nothing that learning could win back


def preset(name: str, scheme: QuantScheme, epochs: int = EPOCHS) -> Preset:
    """The preset of a scheme for ``name``: a preset, a method, or a chain such as ``"awq+drift+gptq"``.

    Args:
        name: As the user gives it.
        scheme: Of the layers.
        epochs: Passes over the calibration text, where something is learned.

    Raises:
        PlanError: Nothing has that name.
    """
    if not isinstance(name, str):
        raise PlanError(f"method must be a name, got {name!r}")
    if name in PRESETS:
        bits = min(scheme.bits, 4) if scheme.blocks else scheme.bits  # K-quants of 5 and 6 bits are held in 8
        if scheme.blocks and name == LEARNED:
            raise PlanError(
                f"{scheme}: {name} moves scales that have to stay whole multiples; calibrated, gptq and rtn make K-quants"
            )
        chosen = PRESETS[name][bits] if name == "awq" or not scheme.activations else INT8
        learns = name == "learned" and scheme.bits <= LEARNED_BITS
        return replace(chosen, learning=Learning(epochs)) if learns else chosen
    *transforms, last = name.split("+")
    methods, known = _plugins.names("methods"), _plugins.names("transforms")
    wrong = next((t for t in transforms if t not in known), None if last in methods else last)
    if wrong is not None:
        raise PlanError(f"method {name!r}: {_instead(name, wrong, [*PRESETS, *methods], known)}")
    if scheme.blocks and not _plugins.constants("methods", last).get("two_levels"):
        raise PlanError(f"{scheme}: {last} does not make K-quants; calibrated, gptq and rtn do")
    return Preset(last, tuple(transforms))


def _instead(name: str, wrong: str, methods: Sequence[str], transforms: Sequence[str]) -> str:
    """What to write in place of a method that there is not, because of the part that is ``wrong``."""
    if wrong in transforms:
        return f"{wrong} comes before a method: {name}+gptq, for example"
    if wrong in PRESETS:
        return f"{wrong} chooses its steps itself, so none stands before it: {wrong} alone, or {name.rpartition('+')[0]}+gptq"
    if "," in name:
        return f"steps are joined by +: {name.replace(',', '+')}"
    if (known := ELSEWHERE.get(wrong.lower().translate({ord("-"): None, ord("_"): None}))) is not None:
        return f"did you mean {known}?"
    return (
        f"no {wrong!r}; there is {', '.join(methods)}, and before a method, joined by +, {', '.join(transforms)}"
        f"{suggestion(wrong, [*methods, *transforms])}"
    )


@dataclass(frozen=True)
class Decision:
    """What a method means for the layers of one model, decided once after the plan.

    Attributes:
        method: The name that the user gave.
        presets: For each scheme of the plan, the transforms and the method.
    """

    method: str
    presets: Mapping[QuantScheme, Preset]

    @classmethod
    def of(cls, method: str, schemes: Iterable[QuantScheme], epochs: int = EPOCHS) -> Decision:
        """The decision for all of ``schemes``; ``epochs`` as in `preset`.

        Raises:
            PlanError: There is no method of that name.
        """
        return cls(method, {scheme: preset(method, scheme, epochs) for scheme in dict.fromkeys(schemes)})

    @property
    def calibrated(self) -> bool:
        """Whether any layer needs calibration data."""
        return any(preset.calibrated for preset in self.presets.values())

    @property
    def rewrites_weights(self) -> bool:
        """Whether a transform changes weights before they are rounded, in any layer."""
        return any(chosen.transforms for chosen in self.presets.values())

    @property
    def learns(self) -> bool:
        """Whether something is learned in any layer, so that some of the text has to be kept from everything before."""
        return any(chosen.learning for chosen in self.presets.values())

    def without_data(self) -> Method:
        """The method that chooses codes where no calibration data is at hand: its own, or plain rounding if it needs data."""
        from hf_quant.methods import method

        return method("rtn") if self.calibrated else next(iter(self.presets.values())).solver()

    def needs_twin(self, schemes: Iterable[QuantScheme]) -> bool:
        """Whether layers of these schemes need the hidden states of the float model."""
        schemes = list(schemes)
        return self.drifts(schemes) or any(self.learning(scheme) for scheme in schemes)

    def drifts(self, schemes: Iterable[QuantScheme]) -> bool:
        """Whether a transform of layers of these schemes needs the inputs of the float model's own layers."""
        return any(_transform(name).needs_twin for scheme in schemes for name in self.presets[scheme].transforms)

    def learning(self, scheme: QuantScheme) -> Learning | None:
        """How the codes of a layer are learned; None where they stay as the method chose them."""
        return self.presets[scheme].learning

    def staged(self, schemes: Iterable[QuantScheme]) -> bool:
        """Whether layers of these schemes are calibrated on the outputs of quantized ones; plain methods need a single pass."""
        return any(self.presets[scheme].transforms for scheme in schemes)

    def solver(self, scheme: QuantScheme) -> Method:
        """The method that chooses the codes of a layer."""
        return self.presets[scheme].solver()

    def transforms(self, layers: Mapping[str, QuantScheme]) -> list[tuple[str, Transform, dict[str, QuantScheme]]]:
        """The transforms of layers that share an input.

        A transform that scales the shared columns changes all of these layers, and weighs each by its own scheme. Where the
        presets of the layers differ, only one of them scales: that of the layers with INT8 activations if there are some, since it
        weighs both sides of the product.

        Args:
            layers: Name to scheme.

        Returns:
            Name of each transform, the transform, and the layers that it may change.
        """
        chosen: dict[str, dict[str, QuantScheme]] = {}
        scaling: Preset | None = None
        for name, scheme in sorted(layers.items(), key=lambda item: item[1].activations is None):
            preset = self.presets[scheme]
            shared = [step for step in preset.transforms if _transform(step).shared]
            scaling = scaling or (preset if shared else None)
            for step in preset.transforms:
                if step not in shared:
                    chosen.setdefault(step, {})[name] = scheme
                elif preset == scaling:
                    chosen.setdefault(step, dict(layers))
        return [
            (step, _transform(step), {n: s for n, s in layers.items() if n in group}) for step, group in chosen.items()
        ]

    def asked(self) -> dict[str, list[dict[str, Any]]]:
        """The planned steps for each kind of scheme, in order, with all hyperparameters."""
        return {
            kind(scheme): [
                *({"name": name, **_fields(_transform(name))} for name in preset.transforms),
                {"name": preset.method, **_fields(preset.solver())},
                *([{"name": LEARNED, **_fields(preset.learning)}] if preset.learning else []),
            ]
            for scheme, preset in self.presets.items()
        }

    def steps(
        self, layers: Mapping[str, QuantScheme], done: Mapping[str, Sequence[str]]
    ) -> dict[str, list[dict[str, Any]]]:
        """The steps that were done, for the recipe.

        Args:
            layers: All quantized layers and their schemes.
            done: Layer to the names of the steps that changed it, in order; layers that are not in it were only rounded.

        Returns:
            For each kind of scheme, its steps in order, each with name, hyperparameters and number of layers.
        """
        counts: dict[str, Counter[str]] = {}
        for layer, scheme in sorted(layers.items(), key=lambda item: str(item[1])):
            counts.setdefault(kind(scheme), Counter()).update([*done.get(layer, []), self.presets[scheme].method])
        by_kind = {}
        for scheme, preset in self.presets.items():
            count = counts.get(kind(scheme), Counter())
            names = dict.fromkeys(name for other in self.presets.values() for name in other.transforms if count[name])
            transforms = [{"name": name, **_fields(_transform(name)), "layers": count[name]} for name in names]
            last = {"name": preset.method, **_fields(preset.solver()), "layers": count[preset.method]}
            by_kind[kind(scheme)] = [*transforms, last]
            if preset.learning and count[LEARNED]:
                by_kind[kind(scheme)].append({"name": LEARNED, **_fields(preset.learning), "layers": count[LEARNED]})
        return {name: by_kind[name] for name in counts}

    def skipped(self, layers: Mapping[str, QuantScheme], done: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """For each kind of scheme, the planned transforms that changed none of its layers."""
        planned: dict[str, dict[str, None]] = {}
        changed: dict[str, set[str]] = {}
        for layer, scheme in sorted(layers.items(), key=lambda item: str(item[1])):
            planned.setdefault(kind(scheme), {}).update(dict.fromkeys(self.presets[scheme].transforms))
            changed.setdefault(kind(scheme), set()).update(done.get(layer, []))
        missing = {name: [step for step in steps if step not in changed[name]] for name, steps in planned.items()}
        return {name: steps for name, steps in missing.items() if steps}


def kind(scheme: QuantScheme) -> str:
    """The kind of a scheme in a recipe: ``"4 bits"``, ``"Q4_K"``."""
    return scheme.blocks or f"{scheme.bits} bits" + (", INT8 activations" if scheme.activations else "")


@lru_cache
def _transform(name: str) -> Transform:
    from hf_quant.transforms import transform

    return transform(name)


def _fields(component: Any) -> dict[str, Any]:
    return asdict(component)
