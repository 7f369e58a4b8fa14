"""Down the precision ladder to the smallest model inside a quality budget, or to the best one inside a size.

INT8, INT4, INT3, INT2, each measured; where a rung is out of bounds, bits are mixed layer by layer: what each fused group
costs alone is measured, an exact knapsack chooses, and the mixed model is measured like the others. Costs of groups add up
only roughly, so the choice is made again with what was learned from measuring it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hf_quant.bench.speed import Speed, compare
from hf_quant.core.layout import bytes_of
from hf_quant.core.scheme import QuantScheme, fixed_zero
from hf_quant.evaluation.gate import Budget, unfavourable
from hf_quant.evaluation.knapsack import Frontier, frontier
from hf_quant.evaluation.measure import means
from hf_quant.evaluation.reference import Load, Progress, Reference
from hf_quant.evaluation.results import Quality
from hf_quant.evaluation.sensitivity import groups, sensitivities
from hf_quant.hf import HfQuantConfig
from hf_quant.hf.auto import hub_options, positions_of
from hf_quant.hf.candidates import candidates
from hf_quant.hf.loading import plan_of
from hf_quant.jobs.compress import Job
from hf_quant.jobs.options import dtype_of

LADDER = (8, 4, 3, 2)
MIXED = "mixed"
TRIES = 4  # mixed plans to measure, at most
PROMPT, NEW = 128, 16  # tokens that speed is measured with; fewer where the model has fewer positions
CLOSE = 0.97  # of the budget used: near enough


def rungs(group_size: int, asym: bool | None, int8_activations: bool) -> list[QuantScheme]:
    """From many bits to few; with INT8 activations where kernels multiply them, beside 8 and 4 bits."""
    plain = [QuantScheme(bits, group_size, fixed_zero(bits, asym)) for bits in LADDER]
    if not int8_activations:
        return plain
    return [QuantScheme(8, -1, activations="token"), replace(plain[1], activations="token"), *plain[2:]]


@dataclass(frozen=True)
class Rung:
    """One model on the ladder.

    Attributes:
        name: The scheme's slug, `MIXED`, or what the base is.
        config: How to make it; None for the base.
        bytes: Of all weights.
        bits_per_weight: Of the whole model.
        speed: At batch 1; models are measured one after the other, not in turns.
        quality: Beside the base; None for the base itself.
        misses: Why it is out of bounds; empty if it is not.
    """

    name: str
    config: HfQuantConfig | None
    bytes: int
    bits_per_weight: float
    speed: Speed
    quality: Quality | None = None
    misses: list[str] = field(default_factory=list)

    @property
    def kl(self) -> float:
        """Nats per token."""
        return self.quality.metrics["kl"].value if self.quality else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name, "bytes": self.bytes, "bits_per_weight": self.bits_per_weight,
            "speed": self.speed.to_dict(), "quality": self.quality and self.quality.to_dict(), "misses": self.misses,
            "scheme": self.config and self.config.scheme, "overrides": self.config.overrides if self.config else {},
        }  # fmt: skip


@dataclass
class Walk:
    """What was found.

    Attributes:
        rungs: In the order they were measured; the base first.
        chosen: The best one inside the limits; None if there is none.
        bits: Widths that sensitivities were measured at.
        sensitivity: Fused group to the KL it causes alone at each of ``bits``, nats per token.
    """

    rungs: list[Rung] = field(default_factory=list)
    chosen: Rung | None = None
    bits: list[int] = field(default_factory=list)
    sensitivity: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rungs": [rung.to_dict() for rung in self.rungs], "chosen": self.chosen and self.chosen.name,
            "sensitivity": {"bits": self.bits, "kl": self.sensitivity},
        }  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What the chosen model must keep.

    Attributes:
        budget: Of quality. If there is one, the smallest model inside it is wanted; if not, the best inside ``max_size``.
        max_size: Bytes of all weights.
        margin: How many times the distance from a value to the end of its interval is judged. 2 where the chosen model is
            measured again on other documents: that number scatters too, and shall be inside with all of its interval.
    """

    budget: Budget
    max_size: int | None = None
    margin: float = 1.0

    def fits(self, size: int) -> bool:
        """Whether ``size`` is small enough."""
        return self.max_size is None or size <= self.max_size

    def misses(self, size: int, quality: Quality) -> list[str]:
        """A sentence for everything out of bounds."""
        too_large = f"{size / 1e6:.1f} MB is over the {(self.max_size or 0) / 1e6:.1f} MB allowed"
        return [*self.budget.misses(quality, self.margin), *([] if self.fits(size) else [too_large])]


@dataclass(frozen=True)
class Ladder:
    """What walking needs.

    Attributes:
        job: The model, and how to measure it.
        limits: What to keep.
        schemes: The rungs, from many bits to few.
        options: For every `HfQuantConfig`: method, modules_to_not_convert, quantize_lm_head, ...
        load_base: The base in a dtype.
        trial: Computes the base's outputs on the text for sensitivities.
        progress: Wraps lists of trials.
    """

    job: Job
    limits: Limits
    schemes: Sequence[QuantScheme]
    options: dict[str, Any]
    load_base: Load
    trial: Callable[[], Reference]
    progress: Progress = iter

    def walk(self) -> Walk:
        """Measure rung after rung as far as it makes sense, then mix."""
        walk = Walk([self._base()])
        for scheme in self.schemes:
            rung = self._rung(str(scheme), HfQuantConfig(str(scheme), **self.options))
            self._add(walk, rung)
            if self._last(rung):
                break
        if rung.misses and self.limits.budget:
            self._down_to_budget(walk, rung)
        elif not self.limits.budget:
            self._up_to_size(walk)
        return walk

    def _last(self, rung: Rung) -> bool:
        """Whether lower rungs can only be worse: over the quality budget, or small enough where only size counts."""
        assert rung.quality is not None
        if self.limits.budget:
            return bool(self.limits.budget.misses(rung.quality, self.limits.margin))
        return self.limits.fits(rung.bytes)

    def _add(self, walk: Walk, rung: Rung) -> None:
        walk.rungs.append(rung)
        self.job.say(f"{rung.name}: {rung.bytes / 1e6:.1f} MB, KL {rung.kl:.5f}")
        if not rung.misses:
            best = (lambda r: r.bytes) if self.limits.budget else (lambda r: r.kl)
            walk.chosen = min((r for r in (walk.chosen, rung) if r is not None), key=best)

    def _base(self) -> Rung:
        model = self.load_base(torch.bfloat16)
        parameters = list(model.parameters())
        size = sum(p.numel() * p.element_size() for p in parameters)
        return Rung("base in bf16", None, size, 8 * size / sum(p.numel() for p in parameters), _speed(model))

    def _rung(self, name: str, config: HfQuantConfig) -> Rung:
        assert self.job.measure is not None
        model = self.job.quantized(config)
        plan, quality = model.hf_quantizer.plan, self.job.measure(model)
        size = plan.bytes_quantized
        return Rung(
            name, config, size, plan.bits_per_weight, _speed(model), quality, self.limits.misses(size, quality)
        )

    def _down_to_budget(self, walk: Walk, missed: Rung) -> None:
        """Mix so that the budget is used up: aim, measure, aim again."""
        assert missed.config is not None
        bits = missed.config.bits
        table = self._table(walk, [s for s in self.schemes if bits - 1 <= s.bits < 8 or s.bits == 4 or s.activations])
        aim = table.uniform(bits)
        rung, before = missed, None
        for _ in range(TRIES):
            aim /= self._used(rung)
            picks = table.frontier.smallest(aim)
            if picks is None or picks == before:
                return
            before, rung = picks, self._rung(MIXED, table.config(picks))
            self._add(walk, rung)
            if CLOSE <= self._used(rung) <= 1:
                return

    def _up_to_size(self, walk: Walk) -> None:
        """Mix so that the size is used up."""
        assert self.limits.max_size is not None
        if walk.chosen is not None and walk.chosen is walk.rungs[1]:
            return  # the first rung fits, and nothing is better
        table = self._table(walk, [s for s in self.schemes if s.bits < 8 or s.activations])
        picks = table.frontier.cheapest(self.limits.max_size - table.rest)
        if picks is not None:
            self._add(walk, self._rung(MIXED, table.config(picks)))

    def _used(self, rung: Rung) -> float:
        """How much of the budget a model takes, 1 being all, in proportion to KL (disagreement grows like its root)."""
        assert rung.quality is not None
        of, budget, margin = rung.quality.metrics, self.limits.budget, self.limits.margin
        shares = [0.0]
        for value, limit, power in (
            (unfavourable(of["kl"], 1, margin), budget.max_kl, 1),
            (unfavourable(of["perplexity_ratio"], 1, margin) - 1, budget.max_ppl_increase, 1),
            (1 - unfavourable(of["top1"], -1, margin), None if budget.min_top1 is None else 1 - budget.min_top1, 2),
        ):
            if limit is not None:
                shares.append((max(value, 0) / limit) ** power if limit > 0 else math.inf)
        return max(*shares, 0.01)  # 0 would aim at infinity

    def _table(self, walk: Walk, tried: Sequence[QuantScheme]) -> _Table:
        """Measure what each group costs alone, and put it beside what it weighs."""
        config = HfQuantConfig(str(self.schemes[0]), **self.options)
        skeleton, plan = plan_of(self.job.model, config, dtype=dtype_of(self.job.load), **hub_options(self.job.load))
        tied = {name.removesuffix(".weight") for pair in skeleton.all_tied_weights_keys.items() for name in pair}
        layers = groups(name for name in plan.schemes if name not in tied)
        trial, model = self.trial(), self.load_base(torch.float32)
        walk.bits = [scheme.bits for scheme in tried]
        walk.sensitivity = sensitivities(
            model,
            layers,
            tried,
            plan.decision.without_data(),  # calibrating for every group would take days, and only their order counts
            lambda m: means(m, trial)["kl"],
            self.progress,
        )
        choices = [*(s for s in self.schemes if s.bits == 8 and s not in tried), *tried]
        shapes = {name: candidate.shape for name, candidate in candidates(skeleton).items()}
        sizes = [
            [
                sum(bytes_of(shapes[name], s.fitted(shapes[name][-1]), skeleton.dtype) for name in names)
                for s in choices
            ]
            for names in layers.values()
        ]
        costs = [self._costs(walk, group, choices) for group in layers]
        rest = plan.bytes_quantized - sum(size_of_group[0] for size_of_group in sizes)
        return _Table(layers, choices, costs, frontier(sizes, costs), rest, self.options)

    def _costs(self, walk: Walk, group: str, choices: Sequence[QuantScheme]) -> list[float]:
        """Of each choice; 8 bits are taken to cost 1/256 of 4 bits (error power falls by four a bit)."""
        measured = dict(zip(walk.bits, walk.sensitivity[group], strict=True))
        return [measured[s.bits] if s.bits in measured else measured[4] / 256 for s in choices]


@dataclass(frozen=True)
class _Table:
    """Groups, choices, and the plans worth considering; ``rest`` is the bytes of all that is not in a group."""

    layers: dict[str, list[str]]
    choices: Sequence[QuantScheme]
    costs: list[list[float]]
    frontier: Frontier
    rest: int
    options: dict[str, Any]

    def uniform(self, bits: int) -> float:
        """What all groups together cost at ``bits``, by the sum of what each costs alone."""
        at = [scheme.bits for scheme in self.choices].index(bits)
        return sum(costs_of_group[at] for costs_of_group in self.costs)

    def config(self, picks: Sequence[int]) -> HfQuantConfig:
        """The plan of these choices."""
        chosen = {
            name: str(self.choices[pick])
            for names, pick in zip(self.layers.values(), picks, strict=True)
            for name in names
        }
        return HfQuantConfig(str(self.choices[0]), overrides=chosen, **self.options)


def _speed(model: Any) -> Speed:
    most = positions_of(model) or PROMPT + NEW
    new = max(2, min(NEW, most // 2))
    return compare({"": model}, [1], prompt=max(1, min(PROMPT, most - new)), new=new, repeats=5)[""][0]
