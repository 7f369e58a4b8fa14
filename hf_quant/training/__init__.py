"""Quantization-aware training: float weights whose rounded values the forward pass uses."""

from hf_quant.training.distillation import Distillation as Distillation
from hf_quant.training.experts import FakeQuantExperts as FakeQuantExperts
from hf_quant.training.modules import FakeQuantEmbedding as FakeQuantEmbedding
from hf_quant.training.modules import FakeQuantLinear as FakeQuantLinear
from hf_quant.training.modules import FakeQuantMatrix as FakeQuantMatrix
from hf_quant.training.modules import FakeQuantPatches as FakeQuantPatches
from hf_quant.training.modules import why_not as why_not
