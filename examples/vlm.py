"""Quantize the text decoder of a vision-language model; its tower for images stays as it is, and the plan says so.

python examples/vlm.py MODEL FOLDER [SCHEME]      # for example: ... Qwen/Qwen2.5-VL-3B-Instruct out/vlm W4A16-g128
"""

import sys

from transformers import AutoModelForImageTextToText

import hf_quant as hq

if len(sys.argv) < 3:
    sys.exit(__doc__)
name, out, scheme = sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "W4A16-g128"
print(hq.plan(name, scheme=[scheme]))

model = AutoModelForImageTextToText.from_pretrained(name, quantization_config=hq.HfQuantConfig(scheme))
model.save_pretrained(out)
small = AutoModelForImageTextToText.from_pretrained(out)
layers = [path for path, module in small.named_modules() if isinstance(module, hq.QuantLinear)]
print(f"{len(layers)} layers quantized, {small.get_memory_footprint() / 1e6:.1f} MB: {layers[0]} ... {layers[-1]}")
