"""Quantize a model to 2 bits, serve it with `transformers serve`, and ask it one thing.

pip install "transformers[serving]"
python examples/serve.py [FOLDER OF A QUANTIZED MODEL]
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import hf_quant as hq

SOURCE = Path(__file__).parent / "ref-llama-16m"


def two_bits() -> str:
    """2 bits need calibration, and a budget; more calibration tokens (the default is 65,536) lose less."""
    made = hq.quantize(
        SOURCE, Path(tempfile.mkdtemp()) / "w2", scheme="W2A16-g64-asym", method="calibrated", calibration_tokens=2048,
        max_kl=0.5, max_tokens=1024,
    )  # fmt: skip
    print(made)
    return str(made.folder)


def ask(url: str, body: dict[str, object]) -> str:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)["choices"][0]["text"]


def is_up(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


model = sys.argv[1] if len(sys.argv) > 1 else two_bits()
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
serve = [sys.executable, "-m", "transformers.cli.transformers", "serve", model]
server = subprocess.Popen([*serve, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"])
try:
    while not is_up(port):
        if server.poll() is not None:
            sys.exit("the server ended; what it needs is in its last lines above")
        time.sleep(1)
    prompt = "The following functions are"
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    print(prompt + ask(f"http://127.0.0.1:{port}/v1/completions", body))
finally:
    server.terminate()
    server.wait(60)
