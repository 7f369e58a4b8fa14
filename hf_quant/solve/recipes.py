"""What the names a user gives as ``method`` stand for: transforms, then a method, for each width.

`Decision` answers this once for a whole model. Everybody else is handed the answer, and the recipe records what came of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hf_quant import _plugins
from hf_quant.core.scheme import BITS, QuantScheme
from hf_quant.errors import PlanError

if TYPE_CHECKING:  # a name can be checked before torch is imported
    from hf_quant.methods import Method
    from hf_quant.transforms import Transform


@dataclass(frozen=True)
class Preset:
    """One way to quantize.

    Attributes:
        method: Name of a file in ``hf_quant/methods``.
        transforms: Names of files in ``hf_quant/transforms``, in the order they are applied.
        options: Hyperparameters of the method that differ from its defaults.
    """

    method: str
    transforms: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def calibrated(self) -> bool:
        """Whether calibration data is needed."""
        return bool(self.transforms) or self.solver().calibrated

    def solver(self) -> Method:
        """The method with its hyperparameters."""
        from hf_quant.methods import method

        return method(self.method, **self.options)


SCALED = Preset("rtn", ("awq",))  # all that 8 bits need, and that much they do where a model has outlier channels
BEST = Preset("gptq", ("awq", "drift"), {"sweeps": 2})
INT8 = Preset("gptq", ("smoothquant",))  # of weights that meet INT8 activations
PRESETS: dict[str, dict[int, Preset]] = {
    "awq": dict.fromkeys(BITS, SCALED),
    "calibrated": {8: SCALED, 4: BEST, 3: BEST, 2: BEST},
}


def preset(name: str, scheme: QuantScheme) -> Preset:
    """What ``name`` means for ``scheme``: a preset, a method, or a chain such as ``"awq+drift+gptq"``.

    Raises:
        PlanError: There is nothing of that name.
    """
    if not isinstance(name, str):
        raise PlanError(f"method must be a name, got {name!r}")
    if name in PRESETS:
        return INT8 if name == "calibrated" and scheme.activations else PRESETS[name][scheme.bits]
    *transforms, last = name.split("+")
    methods, known = _plugins.names("methods"), _plugins.names("transforms")
    wrong = next((t for t in transforms if t not in known), None if last in methods else last)
    if wrong is not None:
        raise PlanError(
            f"method {name!r}: no {wrong!r}; there is {', '.join([*PRESETS, *methods])}, and before a method, joined by +, "
            + ", ".join(known)
        )
    return Preset(last, tuple(transforms))


@dataclass(frozen=True)
class Decision:
    """What a method means for the layers of one model: made once, after the plan.

    Attributes:
        method: As the user named it.
        presets: What it means for each scheme of the plan.
    """

    method: str
    presets: Mapping[QuantScheme, Preset]

    @classmethod
    def of(cls, method: str, schemes: Iterable[QuantScheme]) -> Decision:
        """Decide for every one of ``schemes``.

        Raises:
            PlanError: There is no method of that name.
        """
        return cls(method, {scheme: preset(method, scheme) for scheme in dict.fromkeys(schemes)})

    @property
    def calibrated(self) -> bool:
        """Whether calibration data is needed for any layer."""
        return any(each.calibrated for each in self.presets.values())

    def needs_twin(self, schemes: Iterable[QuantScheme]) -> bool:
        """Whether the activations of the float model are needed for layers of these schemes."""
        return any(_transform(name).needs_twin for scheme in schemes for name in self.presets[scheme].transforms)

    def staged(self, schemes: Iterable[QuantScheme]) -> bool:
        """Whether layers of these schemes see what quantizing those before them did; plain methods need one pass for all."""
        return any(self.presets[scheme].transforms for scheme in schemes)

    def solver(self, scheme: QuantScheme) -> Method:
        """The method that chooses the codes of a layer."""
        return self.presets[scheme].solver()

    def transforms(self, layers: Mapping[str, QuantScheme]) -> list[tuple[str, Transform, dict[str, QuantScheme]]]:
        """What is done to layers that are given the same tensor.

        A transform that scales the columns they share needs all of them, and weighs each by its own scheme. Where presets
        differ, only those of one preset scale: of the layers with INT8 activations if there are any, since what they ask
        for weighs both sides of the product.

        Args:
            layers: Name to scheme.

        Returns:
            Name of each transform, the transform, and the layers that it may change.
        """
        chosen: dict[str, dict[str, QuantScheme]] = {}
        scaling: Preset | None = None
        for name, scheme in sorted(layers.items(), key=lambda item: item[1].activations is None):
            asked = self.presets[scheme]
            shared = [step for step in asked.transforms if _transform(step).shared]
            scaling = scaling or (asked if shared else None)
            for step in asked.transforms:
                if step not in shared:
                    chosen.setdefault(step, {})[name] = scheme
                elif asked == scaling:
                    chosen.setdefault(step, dict(layers))
        return [
            (step, _transform(step), {n: s for n, s in layers.items() if n in own}) for step, own in chosen.items()
        ]

    def asked(self) -> dict[str, list[dict[str, Any]]]:
        """What shall be done to layers of each kind of scheme, in order, with all hyperparameters."""
        return {
            kind(scheme): [
                *({"name": name, **_fields(_transform(name))} for name in each.transforms),
                {"name": each.method, **_fields(each.solver())},
            ]
            for scheme, each in self.presets.items()
        }

    def steps(
        self, layers: Mapping[str, QuantScheme], done: Mapping[str, Sequence[str]]
    ) -> dict[str, list[dict[str, Any]]]:
        """What was done, for the recipe.

        Args:
            layers: Every quantized layer to its scheme.
            done: Layers to the names of the steps that changed them, in order; all others were only rounded.

        Returns:
            For each kind of scheme: the steps in order, each with its name, all hyperparameters and the number of layers.
        """
        counts: dict[str, Counter[str]] = {}
        for layer, scheme in sorted(layers.items(), key=lambda item: str(item[1])):
            counts.setdefault(kind(scheme), Counter()).update([*done.get(layer, []), self.presets[scheme].method])
        made = {}
        for scheme, own in self.presets.items():
            count = counts.get(kind(scheme), Counter())
            names = dict.fromkeys(name for each in self.presets.values() for name in each.transforms if count[name])
            transforms = [{"name": name, **_fields(_transform(name)), "layers": count[name]} for name in names]
            last = {"name": own.method, **_fields(own.solver()), "layers": count[own.method]}
            made[kind(scheme)] = [*transforms, last]
        return {name: made[name] for name in counts}

    def skipped(self, layers: Mapping[str, QuantScheme], done: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """For each kind of scheme, the transforms that should have changed its layers and changed none, if there are any."""
        asked: dict[str, dict[str, None]] = {}
        changed: dict[str, set[str]] = {}
        for layer, scheme in sorted(layers.items(), key=lambda item: str(item[1])):
            asked.setdefault(kind(scheme), {}).update(dict.fromkeys(self.presets[scheme].transforms))
            changed.setdefault(kind(scheme), set()).update(done.get(layer, []))
        missing = {name: [step for step in steps if step not in changed[name]] for name, steps in asked.items()}
        return {name: steps for name, steps in missing.items() if steps}


def kind(scheme: QuantScheme) -> str:
    """What layers of a scheme are called in a recipe: ``"4 bits"``."""
    return f"{scheme.bits} bits" + (", INT8 activations" if scheme.activations else "")


@lru_cache
def _transform(name: str) -> Transform:
    from hf_quant.transforms import transform

    return transform(name)


def _fields(each: Any) -> dict[str, Any]:
    return asdict(each)
