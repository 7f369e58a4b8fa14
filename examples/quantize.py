"""Quantize the model that ships with the repository, save it, load it again and let it write.

python examples/quantize.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_quant import HfQuantConfig

source = Path(__file__).parent / "ref-llama-16m"
out = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()

model = AutoModelForCausalLM.from_pretrained(source, quantization_config=HfQuantConfig("W4A16-g128"))
model.save_pretrained(out)
small = AutoModelForCausalLM.from_pretrained(out)  # in any other program too, with no import of hf_quant

tokenizer = AutoTokenizer.from_pretrained(source)
ids = tokenizer("The following functions are", return_tensors="pt").input_ids
print(tokenizer.decode(small.generate(ids, max_new_tokens=20, do_sample=False)[0]))
