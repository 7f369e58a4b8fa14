"""Probability that the model ends a thought where the text goes on."""

from __future__ import annotations

from hf_quant.evaluation.metrics import Metric
from hf_quant.evaluation.metrics._endings import THOUGHT

METRIC = Metric("ends a thought where the text goes on", THOUGHT.of_model, most=1, least=0, where=THOUGHT.elsewhere)
