"""Probability that the model ends a thought where the text does."""

from __future__ import annotations

from hf_quant.evaluation.metrics import Metric
from hf_quant.evaluation.metrics._endings import THOUGHT

METRIC = Metric("ends a thought where the text does", THOUGHT.of_model, most=1, least=0, where=THOUGHT.comes)
