"""Probability that the base ends an answer or a document where the text does."""

from __future__ import annotations

from hf_quant.evaluation.metrics import Metric
from hf_quant.evaluation.metrics._endings import ANSWER

METRIC = Metric(
    "the base ends an answer or a document where the text does", ANSWER.of_base, most=1, least=0, where=ANSWER.comes
)
