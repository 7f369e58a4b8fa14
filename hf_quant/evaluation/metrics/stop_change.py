"""By how much the model ends an answer or a document more likely than its base where the text does; negative: less likely."""

from __future__ import annotations

from hf_quant.evaluation.metrics import Metric
from hf_quant.evaluation.metrics._endings import ANSWER

METRIC = Metric(
    "ends an answer or a document where the text does, minus the base",
    ANSWER.change,
    ideal=0,
    most=1,
    least=-1,
    where=ANSWER.comes,
)
