"""What the names a user gives as ``method`` stand for: transforms, then a method, for each width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hf_quant import _plugins
from hf_quant.errors import PlanError
from hf_quant.scheme import BITS, QuantScheme

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
        looks: Whether it looks at calibration data even where its method need not.
    """

    method: str
    transforms: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    looks: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether calibration data is needed."""
        return self.looks or bool(self.transforms) or self.solver().calibrated

    def steps(self) -> list[dict[str, object]]:
        """Everything done to a weight, in order, with all hyperparameters: for the recipe."""
        names = [*self.transforms, self.method]
        return [{"name": n} | _fields(each) for n, each in zip(names, [*self.rewriters(), self.solver()], strict=True)]

    def solver(self) -> Method:
        """The method with its hyperparameters."""
        from hf_quant.methods import method

        return method(self.method, **self.options)

    def rewriters(self) -> tuple[Transform, ...]:
        """The transforms."""
        from hf_quant.transforms import transform

        return tuple(map(transform, self.transforms))


def _fields(each: Any) -> dict[str, object]:
    return asdict(each)


BEST = Preset("gptq", ("awq", "drift"), {"sweeps": 2})
INT8 = Preset("gptq", ("smoothquant",))  # of weights that meet INT8 activations
PRESETS: dict[str, dict[int, Preset]] = {
    "awq": dict.fromkeys(BITS, Preset("rtn", ("awq",))),
    "calibrated": {8: Preset("rtn", looks=True), 4: BEST, 3: BEST, 2: BEST},
}


def preset(name: str, scheme: QuantScheme) -> Preset:
    """What ``name`` means for ``scheme``: a preset, a method, or a chain such as ``"awq+drift+gptq"``.

    Raises:
        PlanError: There is nothing of that name.
    """
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
