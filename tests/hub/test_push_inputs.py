"""Models of images and sounds are published like those of text: measured on inputs, checked layer by layer, loaded again."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BertModel, SamModel, ViTForImageClassification, ViTModel

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.evaluation.encoders import without_logits
from hf_quant.evaluation.yardstick import Base
from hf_quant.nn import QuantLinear
from hf_quant.publish import push as publishing
from hf_quant.publish import replay as replaying
from tests.yardsticks import make

from .conftest import run
from .fakehub import FakeHub

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from calibrated_kinds import KINDS, held_out

VIT, WHISPER = "vision classifier (ViT)", "audio encoder, text decoder (Whisper)"
LLAVA = "vision-language (LLaVA)"
TO = "alice/tiny"
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "fixtures" / "ct-w8a8-tensor"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder with a model of a kind, its inputs, and ``q``: what ``hf-quant quantize`` makes of it."""
    folders: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in folders:
            folder = folders[name] = tmp_path_factory.mktemp("kind")
            torch.manual_seed(0)
            KINDS[name][0]().save_pretrained(folder / "base")
            (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
            inputs, labels = held_out(KINDS[name][1])
            inputs |= {"labels": labels[:, None]} if name == WHISPER else {}
            save_file({key: tensor[:4].contiguous() for key, tensor in inputs.items()}, folder / "inputs.safetensors")
            made = ["quantize", folder / "base", "-o", folder / "q", "--scheme", "W8A16-g32", "--min-top1", "0%", "-q"]
            run(*made, "--inputs", folder / "inputs.safetensors")
        return folders[name]

    return of


@pytest.fixture
def copied(measured: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """The same, to be changed."""
    return lambda name: Path(shutil.copytree(measured(name), tmp_path / "kind"))


@pytest.mark.parametrize(
    ("name", "compared"),
    [
        (
            VIT,
            "19 layers give what plain products give: 19 on random inputs; the model reads pixel_values and was not run",
        ),
        (WHISPER, "32 on random inputs; the model reads input_features and was not run as a whole"),
        (LLAVA, "21 on what a few token ids give them"),
    ],
)
def test_published_and_loaded(name: str, compared: str, hub: FakeHub, copied: Callable[[str], Path]) -> None:
    folder = copied(name)
    quantized = folder / "q"
    run("verify", quantized)
    run("card", "build", quantized)
    run("push", quantized, TO, "--dry-run")
    assert not hub.repos
    said = run("push", quantized, TO, "--yes").stderr
    assert compared in said.replace("\n", " ")
    run("verify", TO)
    run("inspect", TO)
    here, arrived = (hf_quant.load(str(where)).state_dict() for where in (quantized, TO))
    assert here.keys() == arrived.keys() and all(torch.equal(tensor, arrived[key]) for key, tensor in here.items())
    assert run("card", "validate", quantized).exit_code == 0
    if name == VIT:
        assert "image-classification" in (hub.files(TO)["README.md"].data or b"").decode()
        model = hf_quant.load(str(quantized))
        assert model.push_to_hub("alice/again", say=lambda _line: None).startswith(hub.url)


def test_a_kernel_that_errs(hub: FakeHub, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    right = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: right(self, x) * 1.2)
    refused = run("push", copied(VIT) / "q", TO, "--yes", code=1)
    assert "gives 20.0% else than its weights dequantized" in refused.stderr and not hub.repos


@pytest.mark.parametrize(
    ("kind", "slug"), [("moe", "W4A16-g32"), ("moe", "W8A8"), ("outliers", "W8A8"), ("golden", "W8A8-static")]
)
def test_every_kind_of_layer_on_random_inputs(
    kind: str, slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "golden":
        model = hf_quant.load(str(GOLDEN)).eval()
        assert slug in map(str, model.hf_quantizer.plan.schemes.values())
    else:
        make(kind, tmp_path / "m")
        config = HfQuantConfig(slug, quantize_embeddings=True)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=config).eval()
    by_tokens = replaying.replay(model)
    monkeypatch.setattr(replaying, "other_inputs", lambda *_: "sounds")
    compared = replaying.replay(model)
    assert compared.logits is None and compared.reached == 0 and compared.errors.keys() == by_tokens.errors.keys()
    assert max(compared.errors.values()) < publishing.CLOSE / 4


def test_what_cannot_work_is_refused_at_once(
    measured: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = measured(VIT)
    inputs = ["--inputs", folder / "inputs.safetensors"]
    asked = run("eval", folder / "q", "--base", folder / "base", *inputs, "--tasks", "arc_easy", code=1).stderr
    assert "base has no tokenizer: leave --tasks out" in asked.replace("\n", " ") and "measuring" not in asked
    for name in (VIT, WHISPER):
        refused = run("bench", measured(name) / "base", "--alone", code=1).stderr.replace("\n", " ")
        assert "bench measures causal language models, not" in refused
    ViTModel.from_pretrained(folder / "base").save_pretrained(tmp_path / "headless")
    monkeypatch.setattr(Base, "load", lambda *_: pytest.fail("the base was run"))
    made = ["quantize", tmp_path / "headless", "-o", tmp_path / "q", "--scheme", "W8A16-g32", *inputs]
    refused = run(*made, "--min-top1", "5%", code=1).stderr.replace("\n", " ")
    assert "top-1 agreement, which is not measured for an encoder without a head" in refused
    assert [without_logits(kind) for kind in (SamModel, BertModel, ViTForImageClassification)] == [True, True, False]
