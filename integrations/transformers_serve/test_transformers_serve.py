"""``transformers serve``, ``transformers chat`` and ``pipeline`` on quantized checkpoints: neither is told anything of this package."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils.import_utils import is_serve_available

from integrations.conftest import Saved, cell, of_ours, run

CLI = [sys.executable, "-m", "transformers.cli.transformers"]
PROMPT = "The following functions are provided to"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"  # the reference model has none
KINDS = [("W4A16-g128", "native"), ("W3A16-g128-o0.1%", "native"), ("W4A16-g128", "gptq")]


def expected(folder: Path) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=16, do_sample=False, attention_mask=torch.ones_like(ids))
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


@pytest.fixture(params=KINDS, ids=lambda kind: " ".join(kind))
def folder(request: Any, saved: Saved, tmp_path: Path) -> Path:
    made = shutil.copytree(saved(*request.param), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(made)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[str]:
    if not is_serve_available():
        pytest.skip("pip install 'transformers[serving]': integrations/try transformers_serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (tmp_path / "log").open("w") as log:
        arguments = [*CLI, "serve", str(folder), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(600):
                time.sleep(1)
                assert process.poll() is None, (tmp_path / "log").read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                except OSError:
                    continue
                break
            yield f"http://127.0.0.1:{port}/v1/chat/completions"
        finally:
            process.terminate()
            process.wait(60)


def test_served(server: str, folder: Path, request: pytest.FixtureRequest) -> None:
    body = {
        "model": str(folder),
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 16,
        "temperature": 0,
    }
    answer = post(server, body)
    assert answer["choices"][0]["message"]["content"] == expected(folder)
    words = [folder, server.removesuffix("/chat/completions"), "max_new_tokens=16", "do_sample=False"]
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # or it calls no server
    run([*CLI, "chat", *words], env=online, input=f"{PROMPT}\nn\n!save\n!exit\n")  # n: it shall not continue
    (file,) = folder.glob("chat_*.json")
    assert json.loads(file.read_text())["chat_history"][1]["content"] == expected(folder)
    scheme, to = request.node.callspec.params["folder"]
    cell(scheme, to, "served, same text there and by `transformers chat`")


def test_pipeline(folder: Path, request: pytest.FixtureRequest) -> None:
    generator = pipeline("text-generation", model=str(folder))
    assert of_ours(generator.model) == 8 * 7
    made = generator(PROMPT, max_new_tokens=16, do_sample=False, return_full_text=False)
    assert made[0]["generated_text"] == expected(folder)
    scheme, to = request.node.callspec.params["folder"]
    cell(scheme, to, "pipeline, same text")


def test_the_example(saved: Saved) -> None:
    if not is_serve_available():
        pytest.skip("pip install 'transformers[serving]': integrations/try transformers_serve")
    example = Path(__file__).parents[2] / "examples" / "serve.py"
    call = [sys.executable, str(example), str(saved("W4A16-g128", "native"))]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0 and "The following functions are" in done.stdout, done.stderr
