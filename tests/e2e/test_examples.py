"""The scripts in examples/ that no other test runs, on tiny models."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import build

REPO = Path(__file__).parents[2]
SHIPPED = REPO / "examples" / "ref-llama-16m"
pytestmark = pytest.mark.skipif(not (REPO / "examples").is_dir(), reason="no examples beside the tests")
PINNED = pytest.mark.filterwarnings("ignore:.*pin_memory")  # of Trainer's loader, where there is no accelerator


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        runpy.run_path(str(REPO / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def saved(model_type: str, class_name: str, folder: Path) -> Path:
    build(model_type, class_name).save_pretrained(folder)
    return folder


def with_tokenizer(folder: Path) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=alphabet[0]).save_pretrained(folder)
    return folder


def test_sentence_encoder(run: Any, tmp_path: Path) -> None:
    said = run("sentence_encoder.py", with_tokenizer(saved("bert", "BertModel", tmp_path / "bert")))
    assert "cosine to the vectors of the base: 0.99" in said or "cosine to the vectors of the base: 1.0" in said


def test_vision_and_language(run: Any, tmp_path: Path) -> None:
    said = run(
        "vlm.py",
        saved("qwen2_vl", "Qwen2VLForConditionalGeneration", tmp_path / "vlm"),
        tmp_path / "small",
        "W4A16-g32",
    )
    assert "layers quantized" in said and "visual" in said


def test_batch_convert_goes_on(run: Any, tmp_path: Path) -> None:
    fixtures = REPO / "tests" / "golden" / "fixtures"
    for name in ("gptq-4bit", "awq-gemm"):
        shutil.copytree(fixtures / name, tmp_path / "models" / name)
    (tmp_path / "models" / "awq-gemm" / "model.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        run("batch_convert.py", tmp_path / "models", tmp_path / "out")
    assert ended.value.code is True and (tmp_path / "out" / "gptq-4bit").is_dir()


@PINNED
def test_adapters_on_four_bits(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    assert "PeftModelForCausalLM loaded again" in run("qlora.py", SHIPPED, tmp_path, 1)


@PINNED
def test_training(run: Any, tmp_path: Path) -> None:
    assert " MB in " in run("train.py", SHIPPED, tmp_path, 1)
    assert (tmp_path / "w2" / "model.safetensors").is_file()
