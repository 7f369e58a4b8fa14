"""The commands as functions: plan, quantize, measure, convert and check a model, in a program or a notebook.

python examples/python_api.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import hf_quant as hq

source = Path(__file__).parent / "ref-llama-16m"
out = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())

print(hq.plan(source, scheme=["W8A16-g128", "W4A16-g128"]))  # from config.json and headers alone

small = hq.quantize(source, out / "int4", scheme="W4A16-g128", max_kl=0.1, max_tokens=2048)
print(small)  # in a notebook the name alone shows a table
assert small.passed, "the model in out/int4-failed lost more than the gate allows"

quality = hq.evaluate(small.folder, base=source, max_tokens=2048).quality
print(f"KL divergence {quality.metrics['kl']} nats per token")

gptq = hq.convert(small.folder, out / "gptq", to="gptq")  # the same codes for engines that read GPTQ
print(hq.verify(gptq.folder))

model = hq.load(str(small.folder))
print(f"{type(model).__name__} in {model.get_memory_footprint() / 1e6:.1f} MB")
