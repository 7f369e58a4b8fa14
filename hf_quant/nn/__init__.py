"""Quantized modules in place of those of ``torch.nn``, and of stacked experts."""

from hf_quant.nn.embedding import QuantEmbedding as QuantEmbedding
from hf_quant.nn.experts import QuantExperts as QuantExperts
from hf_quant.nn.experts import as_quant_experts as as_quant_experts
from hf_quant.nn.linear import QuantLinear as QuantLinear
from hf_quant.nn.matrix import QuantMatrix as QuantMatrix
from hf_quant.nn.patches import QuantPatches as QuantPatches
