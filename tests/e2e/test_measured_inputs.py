"""Models of images and sounds are measured on batches of their inputs: by the commands, in Python, and as a plain loop does it.

The models are those of ``benchmarks/calibrated_kinds.py``, trained here for seconds, so that their predictions are peaked.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

import hf_quant as hq
from hf_quant.cli import main
from hf_quant.data.text import windows
from hf_quant.errors import HfQuantError, OptionError
from hf_quant.hf.auto import tokenizer_of
from tests import yardsticks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from calibrated_kinds import IMAGE, KINDS, fit, held_out

SCHEME = "W3A16-g32"
LLAVA, WHISPER = "vision-language (LLaVA)", "audio encoder, text decoder (Whisper)"
VIT, AST, HEARD = "vision classifier (ViT)", "audio classifier (AST)", "audio-language (Qwen2-Audio)"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a trained model of a kind."""
    folders: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in folders:
            torch.manual_seed(0)
            model = KINDS[name][0]()
            assert fit(model, KINDS[name][1], 240 if name == WHISPER else 60) > 0.5
            folders[name] = tmp_path_factory.mktemp("trained") / "base"
            model.save_pretrained(folders[name])
        return folders[name]

    return of


def samples(name: str, count: int) -> dict[str, Tensor]:
    """Inputs with an answer of one to three tokens, padded to three; of classifiers, their inputs."""
    inputs, labels = held_out(KINDS[name][1])
    answers = torch.stack([labels, labels + 20, labels + 40], dim=1)
    padding = torch.arange(3) > (torch.arange(len(labels)) % 3)[:, None]
    if name == WHISPER:
        inputs = {"input_features": inputs["input_features"], "labels": answers.masked_fill(padding, -100)}
    elif "input_ids" in inputs:
        ids = torch.cat([inputs["input_ids"], answers.masked_fill(padding, 0)], dim=1)
        mask = torch.cat([torch.ones_like(inputs["input_ids"]), (~padding).long()], dim=1)
        inputs = inputs | {"input_ids": ids, "attention_mask": mask}
    return {key: tensor[:count].contiguous() for key, tensor in inputs.items()}


def one_by_one(inputs: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], Tensor, int]]:
    """Arguments of a model for each sample without its padding, the tokens to predict, and where the first prediction is."""
    for row in range(len(next(iter(inputs.values())))):
        sample = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        if "labels" in sample:
            labels = sample["labels"][sample["labels"] >= 0]
            given = torch.cat([torch.tensor([1]), labels[:-1]])[None]
            yield {"input_features": sample["input_features"], "decoder_input_ids": given}, labels, 0
        else:
            ids = sample["input_ids"][sample.pop("attention_mask") > 0]
            first = int((ids == IMAGE).sum())
            yield sample | {"input_ids": ids[None]}, ids[first:], first - 1


def by_a_loop(base: Any, model: Any, inputs: dict[str, Tensor]) -> dict[str, float]:
    """What is measured, from all logits in float64, sample by sample."""
    lost, likely, alike = [], [], []
    for given, target, first in one_by_one(inputs):
        with torch.no_grad():
            p, q = (one(**given).logits[0].double().log_softmax(-1)[first:][: len(target)] for one in (base, model))
        lost.append((p.exp() * (p - q)).sum(-1))
        likely.append(q.gather(-1, target[:, None])[:, 0])
        alike.append((p.argmax(-1) == q.argmax(-1)).double())
    return {
        "kl": torch.cat(lost).mean().item(), "perplexity": math.exp(-torch.cat(likely).mean().item()),
        "top1": torch.cat(alike).mean().item(), "tokens": len(torch.cat(lost)),
    }  # fmt: skip


def test_a_tokenizer_that_transformers_invents_is_none(trained: Any) -> None:
    assert tokenizer_of(str(trained(WHISPER))) is None


def run(*args: Any) -> Any:
    return CliRunner().invoke(main, [*map(str, args)])


@pytest.mark.parametrize(("name", "count"), [(LLAVA, 60), (WHISPER, 60), (HEARD, 2)])
def test_the_same_as_a_loop_over_samples(name: str, count: int, trained: Any, tmp_path: Path) -> None:
    base, inputs = trained(name), samples(name, count)
    batches = [{key: tensor[i : i + 7] for key, tensor in inputs.items()} for i in range(0, count, 7)]
    done = hq.quantize(base, tmp_path / "q", scheme="W2A16-g32", inputs=iter(batches), max_kl=100, min_top1=0)
    quality = done.results[0].quality
    assert quality is not None and done.passed and quality.inputs == sorted(inputs)
    expected = by_a_loop(hq.load(str(base)).eval(), hq.load(str(done.folder)).eval(), inputs)
    assert quality.tokens == expected.pop("tokens") and quality.documents == count
    assert expected["kl"] > 5e-4, "nothing is lost, so nothing is shown"
    for metric, value in expected.items():
        assert quality.metrics[metric].value == pytest.approx(value, rel=2e-3), metric
    assert quality.metrics["kl"].noise is not None and 0 < quality.metrics["kl"].noise < expected["kl"]
    assert (quality.resampled, quality.metrics["kl"].low is None) == (
        ("samples", False) if count > 20 else (None, True)
    )
    assert quality.kind == ("seq2seq" if name == WHISPER else "causal")
    ends = sum(int((target == 2).sum()) for _, target, _ in one_by_one(inputs))  # of these models the EOS token
    assert (quality.metrics["stop"].positions if ends else None) == (ends or None)


def test_padding_and_placeholders_do_not_count(trained: Any) -> None:
    base, inputs = trained(LLAVA), samples(LLAVA, 6)
    measured = hq.evaluate(base, base=base, inputs=[inputs]).quality
    words = int(inputs["attention_mask"].sum()) - 16 * 6
    assert measured.tokens == words
    padded = inputs | {"input_ids": inputs["input_ids"].where(inputs["attention_mask"] > 0, 99)}
    again = hq.evaluate(base, base=base, inputs=[padded]).quality
    assert again.metrics["perplexity"].value == pytest.approx(measured.metrics["perplexity"].value, rel=1e-5)


@pytest.mark.parametrize("name", [VIT, AST])
def test_classifiers_by_the_commands(name: str, trained: Any, tmp_path: Path) -> None:
    base, inputs = trained(name), samples(name, 60)
    (key,) = inputs
    save_file(inputs, tmp_path / "inputs.safetensors")
    given = ["--inputs", tmp_path / "inputs.safetensors"]
    quantized = run("quantize", base, "-o", tmp_path / "q", "--scheme", SCHEME, *given, "--min-top1", "50%", "--json")
    assert quantized.exit_code == 0, quantized.output
    quality = json.loads(quantized.stdout)["results"][0]["quality"]
    assert (quality["inputs"], quality["documents"], quality["tokens"], quality["kind"]) == ([key], 60, 60, "encoder")
    with torch.no_grad():
        p, q = (hq.load(str(folder)).eval()(**inputs).logits.double() for folder in (base, tmp_path / "q"))
    metrics = quality["metrics"]
    assert metrics["top1"]["value"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert metrics["logits_cosine"]["value"] == pytest.approx(torch.cosine_similarity(p, q).mean().item(), abs=1e-6)
    assert metrics["embedding_cosine"]["low"] < metrics["embedding_cosine"]["value"] < 1
    again = run("eval", tmp_path / "q", "--base", base, *given)
    assert again.exit_code == 0 and f"measured on 60 samples of {key} from inputs.safetensors" in again.output
    stored = json.loads((tmp_path / "q" / "results.json").read_text())["quality"]
    assert stored["metrics"]["top1"] == metrics["top1"]
    card = run("card", "build", tmp_path / "q")
    assert card.exit_code == 0, card.output
    text = (tmp_path / "q" / "README.md").read_text()
    assert (
        f"the same held-out inputs, 60 samples of {key.replace('_', chr(92) + '_')}" in text and "windows" not in text
    )
    assert run("report", tmp_path / "q").exit_code == 0
    save_file({key: torch.randn_like(inputs[key])}, tmp_path / "noise.safetensors")  # on the edge of several classes
    noise = ["--inputs", tmp_path / "noise.safetensors"]
    missed = run("quantize", base, "-o", tmp_path / "w", "--scheme", "W2A16-g32", *noise, "--min-top1", "100%")
    assert missed.exit_code == 3 and "top-1 agreement" in missed.output


def test_a_vision_language_model_by_the_commands(trained: Any, tmp_path: Path) -> None:
    base, inputs = trained(LLAVA), samples(LLAVA, 24)
    halves = {"calibration": slice(0, 12), "inputs": slice(12, 24)}
    for name, part in halves.items():
        save_file({key: tensor[part].contiguous() for key, tensor in inputs.items()}, tmp_path / f"{name}.safetensors")
    command = ["quantize", base, "--scheme", SCHEME, "--method", "calibrated"]
    command += ["--calibration", tmp_path / "calibration.safetensors"]
    overlap = run(*command, "-o", tmp_path / "o", "--inputs", tmp_path / "calibration.safetensors")
    assert (
        overlap.exit_code == 1
        and "12 of 12 samples of the inputs to measure on also occur in the calibration or training data"
        in overlap.output
    )
    given = ["--inputs", tmp_path / "inputs.safetensors"]
    done = run(*command, "-o", tmp_path / "q", *given, "--max-kl", "50")
    assert done.exit_code == 0, done.output
    assert "in 12 samples of attention_mask and input_ids and pixel_values" in done.output.replace("\n", " ")
    quality = json.loads((tmp_path / "q" / "results.json").read_text())["quality"]
    assert quality["kind"] == "causal" and {"kl", "perplexity", "top1"} <= set(quality["metrics"])
    card = run("card", "build", tmp_path / "q")
    assert card.exit_code == 0, card.output
    assert "3 batches of attention" in (tmp_path / "q" / "README.md").read_text()
    refused = run("eval", tmp_path / "q", "--base", base, "--inputs", tmp_path / "calibration.safetensors")
    assert refused.exit_code == 1 and "also occur in the calibration or training data" in refused.output
    allowed = run(
        "eval", tmp_path / "q", "--base", base, "--inputs", tmp_path / "calibration.safetensors", "--allow-overlap"
    )
    assert allowed.exit_code == 0, allowed.output


def test_token_ids_are_measured_like_the_text_they_are_of(tmp_path: Path) -> None:
    base = yardsticks.make("peaked", tmp_path / "base")
    text = (base / "heldout.txt").read_text()
    cut = windows(AutoTokenizer.from_pretrained(base), text, 32, 1024)
    save_file({"ids": cut.ids}, tmp_path / "ids.safetensors")
    given = ["--inputs", tmp_path / "ids.safetensors", "--max-kl", "99", "--json"]
    done = run("quantize", base, "-o", tmp_path / "q", "--scheme", "W3A16-g32", *given)
    assert done.exit_code == 0, done.output
    of_ids = json.loads(done.stdout)["results"][0]["quality"]["metrics"]
    of_text = hq.evaluate(tmp_path / "q", base=base, context=32, max_tokens=1024).quality
    assert of_text.tokens == len(cut.ids) * 31 and of_text.inputs == []
    for name in ("kl", "perplexity", "top1"):
        assert of_ids[name]["value"] == pytest.approx(of_text.metrics[name].value, rel=1e-5)
    train = ["train", base, "-o", tmp_path / "t", "--data", base / "calibration.txt", "--scheme", "W3A16-g32"]
    done = run(*train, "--steps", "2", "--batch", "2", "--train-context", "32", *given)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["results"][0]["quality"]["documents"] == len(cut.ids)


def test_what_cannot_be_measured_is_refused_before_anything_runs(trained: Any, tmp_path: Path) -> None:
    vit, llava = trained(VIT), trained(LLAVA)
    images, both = samples(VIT, 4), samples(LLAVA, 4)
    file = tmp_path / "inputs.safetensors"
    save_file(images, file)
    (tmp_path / "words.txt").write_text("words")
    out = ["-o", tmp_path / "q", "--scheme", SCHEME]
    for args, message in (
        (["quantize", vit, *out, "--inputs", tmp_path / "words.txt"], "words.txt: not a safetensors file of inputs"),
        (["quantize", vit, *out, "--inputs", tmp_path / "none.safetensors"], "no such file"),
        (["quantize", vit, *out, "--inputs", file, "--max-kl", "1"], "asks for KL, which is not measured for encoder"),
        (["quantize", vit, *out, "--eval"], "--inputs names a safetensors file"),
        (["quantize", vit, *out, "--no-eval"], "or on what --inputs names"),
        (["quantize", vit, *out, "--inputs", file, "--no-eval"], "--inputs say what to measure on"),
        (["quantize", vit, *out, "--inputs", file, "--text", file], "--inputs and --text both say"),
        (["quantize", vit, *out, "--inputs", file, "--context", "8"], "--context is about text"),
        (["quantize", llava, *out, "--inputs", file], "the batches have no input_ids"),
        (["eval", vit, "--base", vit, "--inputs", file, "--kv-cache", "int8"], "--kv-cache is measured on text alone"),
        (
            ["ladder", vit, *out[:2], "--max-kl", "1", "--inputs", file],
            "quantize and eval measure one scheme on inputs",
        ),
    ):
        result = run(*args)
        assert result.exit_code in (1, 2) and message in result.output.replace("\n", " "), (args, result.output)
    assert not (tmp_path / "q").exists()
    with pytest.raises(HfQuantError, match="token id 500 is outside of the vocabulary of 128"):
        hq.evaluate(llava, base=llava, inputs=[both | {"input_ids": both["input_ids"].clamp(min=500)}])
    for wrong, message in (
        ([], "inputs to measure on: there is no batch"),
        ([images | {"pixel_values": images["pixel_values"].tolist()}], "nothing"),
        ([{"pixel_values": "a.png"}], "batch 0: pixel_values is str, not a tensor"),
        ([{"pixel_values": images["pixel_values"][:0]}], "is empty"),
    ):
        if message == "nothing":
            assert hq.evaluate(vit, base=vit, inputs=wrong).quality.metrics["top1"].value == 1
            continue
        with pytest.raises(HfQuantError, match=message):
            hq.evaluate(vit, base=vit, inputs=wrong)
    with pytest.raises(HfQuantError, match="no token's prediction can be scored"):
        hq.evaluate(llava, base=llava, inputs=[both | {"attention_mask": both["attention_mask"] * 0}])
    with pytest.raises(OptionError, match="--inputs and --dataset both"):
        hq.evaluate(vit, base=vit, inputs=[images], dataset="x")
