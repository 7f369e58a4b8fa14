"""A Hub for each test, and a tiny model that was quantized and measured once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from huggingface_hub import HfApi, constants, hf_api
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import hub as tf_hub

from hf_quant.cli import main

from .fakehub import FakeHub
from .scenarios import TOKEN, hurried

READ_TOKEN, BOB = "hf_" + "readonlyreadonlyreadonly", "hf_" + "bobbobbobbobbobbobbobbob"
REPO = Path(__file__).parents[2]
VALIDATES = (
    int(version("huggingface_hub").split(".")[0]) >= 2
)  # before, ModelCard.validate knew only huggingface.co itself


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: None) -> Iterator[FakeHub]:
    """The client is online, logged in as alice, with an empty cache, and knows no other Hub than this one."""
    with FakeHub(tmp_path / "hub") as found, hurried():
        found.add_token(TOKEN, "alice")
        found.add_token(READ_TOKEN, "alice", role="read")
        found.add_token(BOB, "bob")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name, value in {
            "ENDPOINT": found.url, "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HUGGINGFACE_CO_URL_TEMPLATE": found.url + "/{repo_id}/resolve/{revision}/{filename}",
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", found.url)  # of the functions that take no client
        monkeypatch.setattr(tf_hub, "_hf_api", None, raising=False)  # transformers keeps a client of its own
        yield found


@pytest.fixture
def api(hub: FakeHub) -> HfApi:
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture(params=["lfs", "xet"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways the client has of uploading."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return str(request.param)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, a text, a licence and a card."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("base") / "tiny"
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(out)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(out)
    (out / "heldout.txt").write_text("some words to measure on, again and again\n" * 40)
    (out / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: en\npipeline_tag: text-generation\n---\n# tiny\n"
    )
    (out / "LICENSE").write_text("Apache License\n")
    return out


@pytest.fixture(scope="session")
def measured(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``hf-quant quantize`` makes of it."""
    out = tmp_path_factory.mktemp("made") / "q"
    run("quantize", base, "-o", out, "--scheme", "W4A16-g32", "--max-kl", 9, "-q")
    return out


@pytest.fixture
def folder(measured: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(measured, tmp_path / "q")
    return tmp_path / "q"


def run(*args: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.fixture
def push(folder: Path, hub: FakeHub) -> Callable[..., Result]:
    """``hf-quant push`` of the folder."""

    def call(*args: Any, to: str = "alice/tiny-W4A16", code: int = 0) -> Result:
        return run("push", folder, to, "--yes", *args, code=code)

    return call
