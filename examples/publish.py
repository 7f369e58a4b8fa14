"""Quantize the model that ships with the repository, measure it, and publish it with a card of what was measured.

python examples/publish.py OWNER/NAME [FOLDER [OPTIONS OF hf-quant quantize]]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

repo_id, source = sys.argv[1], Path(__file__).parent / "ref-llama-16m"
out = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp()) / "int4"

quantize = [sys.executable, "-m", "hf_quant.cli", "quantize", source, "-o", out, "--scheme", "W4A16-g128"]
subprocess.run([*quantize, "--max-kl", "0.05", *sys.argv[3:]], check=True)  # a miss ends here, with exit code 3

model = AutoModelForCausalLM.from_pretrained(out)
print(model.push_to_hub(repo_id, private=True))  # checks, writes the card, uploads, verifies
