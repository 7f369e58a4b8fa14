"""By how much the model ends a thought more likely than its base where the text does; negative: less likely."""

from __future__ import annotations

from hf_quant.evaluation.metrics import Metric
from hf_quant.evaluation.metrics._endings import THOUGHT

METRIC = Metric(
    "ends a thought where the text does, minus the base",
    THOUGHT.change,
    ideal=0,
    most=1,
    least=-1,
    where=THOUGHT.comes,
)
