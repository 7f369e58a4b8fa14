"""``hf-quant train``: what it writes, what it refuses, and that it can be stopped at any time."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaConfig, Qwen2Config

from hf_quant import HfQuantConfig, load
from hf_quant import train as train_model
from hf_quant.cli import main
from hf_quant.disk import journal
from hf_quant.errors import OptionError
from hf_quant.jobs.outputs import work_folder
from hf_quant.publish.card import facts, render
from hf_quant.training import loop
from tests.yardsticks import make

FEW = (
    "--steps",
    "6",
    "--batch",
    "2",
    "--train-context",
    "32",
    "--max-tokens",
    "256",
    "--checkpoint-minutes",
    "0",
    "--lr",
    "1e-3",
)
W2 = ("--scheme", "W2A16-g32-asym")


@pytest.fixture(scope="module")
def peaked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("peaked", tmp_path_factory.mktemp("train") / "peaked")


def train(model: Path, out: Path, *args: Any, data: Path | None = None, code: int = 0) -> Result:
    data = data or model / "calibration.txt"
    result = CliRunner().invoke(main, ["train", str(model), "-o", str(out), "--data", str(data), *map(str, args)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def unreadable(folder: Path) -> Path:
    """A text that is refused when it is read."""
    file = folder / "unreadable.txt"
    file.write_bytes(b"\xff\xfe")
    return file


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["peaked", "outliers"])
def test_training_loses_less_than_rounding(kind: str, peaked: Path, tmp_path: Path) -> None:
    model = peaked if kind == "peaked" else make(kind, tmp_path.parent / "outliers")
    scheme = ("--scheme", "W2A16-g64-asym", "--max-tokens", "1024", "--json")
    rounded = CliRunner().invoke(
        main, ["quantize", str(model), "-o", str(tmp_path / "rtn"), *scheme, "--max-kl", "99"]
    )
    before = json.loads(rounded.stdout)["results"][0]
    steps = ("--steps", "40", "--batch", "4", "--train-context", "64", "--lr", "2e-3")
    after = json.loads(train(model, tmp_path / "trained", *scheme, *steps).stdout)["results"][0]
    assert after["bytes"] == before["bytes"]
    assert after["quality"]["metrics"]["kl"]["value"] < 0.7 * before["quality"]["metrics"]["kl"]["value"]
    recipe = json.loads((tmp_path / "trained" / "recipe.json").read_text())["training"]
    assert recipe["loss"] == "KL divergence to the teacher" and recipe["tokens"] == 40 * 4 * 64
    assert recipe["losses"]["last"] < recipe["losses"]["first"] and recipe["text"]["name"] == "calibration.txt"
    card = render(*facts(tmp_path / "trained"))
    assert "trained with the rounded weights for 40 steps on 10,240 tokens of calibration.txt" in card
    assert "hidden" not in card
    assert "hf-quant train" in card and "--data calibration.txt" in card and "--teacher" not in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rtn", "trained"]  # no checkpoint is left


def test_hidden_states_are_learned_too(peaked: Path, tmp_path: Path) -> None:
    options = (*W2, *FEW, "--hidden-weight", "3")
    train(peaked, tmp_path / "out", *options, "--max-kl", "99")
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())["training"]
    train(peaked, tmp_path / "plain", *W2, *FEW, "--max-kl", "99")
    plain = json.loads((tmp_path / "plain" / "recipe.json").read_text())["training"]
    assert recipe["kept"]["before"] == plain["kept"]["before"]  # of windows held out, the divergence alone is measured
    assert recipe["losses"]["first"] > 1.2 * plain["losses"]["first"]
    assert weights(tmp_path / "out") != weights(tmp_path / "plain")
    card = render(*facts(tmp_path / "out"))
    assert "and 3 times the relative error of its hidden states" in card and "--hidden-weight 3" in card


def test_training_in_float32_keeps_the_dtypes_of_the_result(peaked: Path, tmp_path: Path) -> None:
    options = (*W2, *FEW, "--dtype", "bfloat16", "--learn", "all", "--embeddings", "--max-kl", "99")
    train(peaked, tmp_path / "plain", *options)
    train(peaked, tmp_path / "out", *options, "--float32")
    plain, exact = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    assert {name: tensor.dtype for name, tensor in exact.items()} == {
        name: tensor.dtype for name, tensor in plain.items()
    }
    assert plain["model.norm.weight"].dtype == torch.bfloat16 and weights(tmp_path / "out") != weights(
        tmp_path / "plain"
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    card = render(*facts(tmp_path / "out"))
    assert "trained in float32 with the rounded weights" in card and "--float32" in card


def test_training_begins_from_a_checkpoint(peaked: Path, tmp_path: Path) -> None:
    """With its codes and with what else was trained; the loss on the windows held out goes on where it ended."""
    first, second, again = (tmp_path / name for name in ("first", "second", "again"))
    train(peaked, first, *W2, *FEW, "--learn", "all", "--max-kl", "99")
    train(peaked, second, *W2, *FEW, "--learn", "all", "--max-kl", "99", "--start", first)
    train(peaked, again, *W2, *FEW, "--learn", "all", "--max-kl", "99", "--start", first)
    assert weights(again) == weights(second) != weights(first)
    ended, begun = (json.loads((out / "recipe.json").read_text())["training"] for out in (first, second))
    assert begun["kept"]["before"] == pytest.approx(ended["kept"]["after"], rel=1e-5)
    assert begun["kept"]["after"] < begun["kept"]["before"] < ended["kept"]["before"]
    card = render(*facts(second))
    assert "beginning from the codes of `first`" in card and "--start first" in card


def test_checkpoints_that_training_cannot_begin_from(peaked: Path, tmp_path: Path) -> None:
    quantized, other = tmp_path / "quantized", make("outliers", tmp_path / "other")
    w8, all_but_one = ("--scheme", "W8A16-g32"), ("--ignore", "*.1.*")  # whose codes have the shape of the weight

    def rounded(*args: str) -> bytes:
        command = ["quantize", str(peaked), "-o", str(quantized), *w8, *args, "--no-eval", "--overwrite"]
        assert CliRunner().invoke(main, command).exit_code == 0
        return weights(quantized)

    def refused(says: str, *args: Any) -> None:
        assert says in train(peaked, tmp_path / "out", *FEW, *args, "--start", quantized, code=2).output

    rounded()
    refused(
        "the checkpoint that training begins from has W8A16-g32, and the model that is trained keeps",
        *w8,
        *all_but_one,
    )
    before = rounded(*all_but_one)
    refused(
        "q_proj: the checkpoint that training begins from has W8A16-g32, and the scheme asks for W2A16-g32-asym", *W2
    )
    refused("the checkpoint that training begins from does not quantize it", *w8)
    refused("both say what training begins from", *W2, "--method", "calibrated")
    assert "is not quantized" in train(peaked, tmp_path / "out", *W2, *FEW, "--start", other, code=1).output
    train(peaked, tmp_path / "out", *FEW, *w8, *all_but_one, "--start", quantized)  # nothing is left in its way
    train(peaked, quantized, *FEW, *w8, *all_but_one, "--start", quantized, "--overwrite", code=1)
    assert weights(quantized) == before


def test_checkpoints_of_another_model_are_refused(peaked: Path, tmp_path: Path) -> None:
    """Before any text is read, whatever differs: what is computed, or the shape of a tensor."""
    unread = unreadable(tmp_path)
    config = LlamaConfig.from_pretrained(peaked)
    sizes = {
        name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    for says, other in (
        ("num_hidden_layers is 3", LlamaConfig(**sizes | heads | {"num_hidden_layers": 3})),
        ("num_attention_heads is 4", LlamaConfig(**sizes | heads | {"num_attention_heads": 4, "head_dim": 16})),
        ("intermediate_size is 128", LlamaConfig(**sizes | heads | {"intermediate_size": 128})),
        ("rope_parameters.rope_theta is 500000", LlamaConfig(**sizes | heads, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})),
        ("model_type is 'qwen2', that of", Qwen2Config(**sizes | heads)),
    ):  # fmt: skip
        start = tmp_path / type(other).__name__
        shutil.rmtree(start, ignore_errors=True)
        scheme = HfQuantConfig("W4A16-g32")
        AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path / "base")
        load(str(tmp_path / "base"), quantization_config=scheme).save_pretrained(start)
        options = ("--scheme", "W4A16-g32", *FEW, "--start", start)
        said = train(peaked, tmp_path / "out", *options, data=unread, code=2).stderr
        assert f"--start {start}: {says}" in said and "must be the same model but for their weights" in said


def test_what_the_plan_refuses_is_said_first(peaked: Path, tmp_path: Path) -> None:
    """From config.json and headers: before a text is read or the base is run."""
    unread = unreadable(tmp_path)

    def refused(says: str, *args: Any, model: Path = peaked) -> None:
        said = train(model, tmp_path / "out", *FEW, *args, data=unread, code=2).stderr
        assert says in said and not work_folder(tmp_path / "out").exists()

    refused("matches no module", *W2, "--ignore", "nothing*")
    refused("format compressed_tensors cannot hold this plan", *W2, "--embeddings", "--format", "compressed-tensors")
    refused("calibrated methods leave embeddings in floating point", *W2, "--embeddings", "--method", "calibrated")
    moe = make("moe", tmp_path / "moe")
    coded = tmp_path / "coded"
    load(str(moe), quantization_config=HfQuantConfig("W2A16-g32-asym")).save_pretrained(coded)
    for options in (("--method", "calibrated"), ("--start", coded)):
        refused("stacked experts begin from plain rounding", *W2, *options, model=moe)


def test_a_batch_that_is_larger_than_the_text(peaked: Path, tmp_path: Path) -> None:
    """Refused before the base is run, with a batch that works."""
    options = (*W2, *FEW[:2], *FEW[4:], "--method", "learned")
    said = train(peaked, tmp_path / "out", *options, "--batch", "5000", code=2).stderr
    assert "--batch 5000: calibration.txt has " in said and "begins" not in said
    assert not work_folder(tmp_path / "out").exists()
    (works,) = re.findall(r"--batch (\d+) works", said)
    train(peaked, tmp_path / "out", *W2, *FEW, "--steps", "1", "--batch", works)
    train(peaked, tmp_path / "more", *W2, *FEW, "--batch", str(int(works) + 1), code=2)


def test_a_learning_rate_is_chosen(peaked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It depends on the codes and on the number of steps, and a training that goes on has the same."""
    options = (*W2, *FEW[:-2])
    said = train(peaked, tmp_path / "whole", *options)
    rate = json.loads((tmp_path / "whole" / "recipe.json").read_text())["training"]["learning_rates"][0][1]
    assert f"learning rate {rate:g}, chosen by the distance between codes" in said.stderr
    assert f"--lr {rate:g}" in render(*facts(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_update", _stopping(loop._update, at=4))
        with pytest.raises(Stopped):
            train(peaked, tmp_path / "out", *options)
    train(peaked, tmp_path / "out", *options)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    train(peaked, tmp_path / "named", *options, "--lr", f"{rate:g}")
    assert weights(tmp_path / "named") == weights(tmp_path / "whole")


def test_everything_is_trained(peaked: Path, tmp_path: Path) -> None:
    """Embeddings and norms in 16 bits too, each update of which is less than 16 bits can hold; the saved model is that of the last look."""
    options = ("--scheme", "W2A16-g64-asym", "--max-tokens", "1024", "--json", "--dtype", "bfloat16", "--lr", "2e-4")
    options += ("--steps", "40", "--batch", "4", "--train-context", "64")
    results = {
        learn: json.loads(train(peaked, tmp_path / learn, *options, "--learn", learn).stdout)["results"][0]
        for learn in ("weights", "all")
    }
    assert results["all"]["training"]["after"] < 0.95 * results["weights"]["training"]["after"]
    assert (
        results["all"]["quality"]["metrics"]["kl"]["value"] < results["weights"]["quality"]["metrics"]["kl"]["value"]
    )
    assert results["all"]["bytes"] == results["weights"]["bytes"]
    base, weights_alone, everything = (
        load_file(folder / "model.safetensors") for folder in (peaked, tmp_path / "weights", tmp_path / "all")
    )
    rest = [name for name in base if name in everything]
    assert any("embed" in name for name in rest) and any("norm" in name for name in rest)
    moved = [name for name in rest if not torch.equal(everything[name], weights_alone[name])]
    assert len(moved) > 1 and any("embed" in name for name in moved)  # large norms move by less than 16 bits show
    for name in rest:
        assert everything[name].dtype is torch.bfloat16
        assert torch.equal(weights_alone[name], base[name].bfloat16())
    card = render(*facts(tmp_path / "all"))
    assert "trained with the rounded weights and everything else of the model for 40 steps" in card
    assert "--learn all" in card and "--learn" not in render(*facts(tmp_path / "weights"))


def test_trained_embeddings_are_saved_in_the_dtype_of_the_model(peaked: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(peaked, half)
    AutoModelForCausalLM.from_pretrained(peaked, dtype=torch.bfloat16).save_pretrained(half)
    train(half, tmp_path / "out", *W2, *FEW, "--embeddings", "--lm-head")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    floats = {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values() if t.is_floating_point()}
    assert floats == {torch.bfloat16}


def test_a_gate_that_is_missed(peaked: Path, tmp_path: Path) -> None:
    said = train(peaked, tmp_path / "out", *W2, *FEW, "--teacher", "none", "--max-kl", "1e-9", code=3)
    assert "gate missed" in said.stderr and not (tmp_path / "out").exists()
    recipe = json.loads((tmp_path / "out-failed" / "recipe.json").read_text())
    assert recipe["training"]["teacher"] is None and recipe["training"]["loss"] == "cross-entropy with the text"


def test_training_that_makes_the_model_worse_keeps_the_initial_model(peaked: Path, tmp_path: Path) -> None:
    rounded = CliRunner().invoke(
        main, ["quantize", str(peaked), "-o", str(tmp_path / "rtn"), *W2, "--max-tokens", "256", "--max-kl", "99"]
    )
    assert rounded.exit_code == 0, rounded.output
    said = train(peaked, tmp_path / "out", *W2, *FEW, "--lr", "10")
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())["training"]
    assert recipe["kept"]["step"] == 0 and recipe["kept"]["after"] == recipe["kept"]["before"]
    assert recipe["losses"]["last"] > recipe["losses"]["first"]  # it did become worse
    assert "kept step 0 of 6; held-out loss" in said.stderr and "no step was better" in said.stderr
    assert weights(tmp_path / "out") == weights(tmp_path / "rtn")


def test_a_resumed_training_knows_the_best_state_so_far(
    peaked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It becomes worse after step 2, and is killed after step 4: what is written is step 2, as without the kill."""

    def worse(*held: float) -> None:
        left = iter(held)
        monkeypatch.setattr(loop, "_held_out_loss", lambda *_: next(left))

    worse(5.0, 4.0, 3.0, 4.0, 5.0, 6.0, 7.0)
    train(peaked, tmp_path / "whole", *W2, *FEW)
    worse(5.0, 4.0, 3.0, 4.0, 5.0)  # the sixth look does not come
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_update", _stopping(loop._update, at=4))
        with pytest.raises(Stopped):
            train(peaked, tmp_path / "out", *W2, *FEW)
    worse(6.0, 7.0)
    done = train(peaked, tmp_path / "out", *W2, *FEW, "--json")
    kept = json.loads(done.stdout)["results"][0]["training"]
    assert kept == {"step": 2, "before": 5.0, "after": 3.0, "steps": 6}
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def _stopping(original: Any, at: int) -> Any:
    def update(*args: Any) -> float:
        if args[-1] == at:
            raise Stopped
        value: float = original(*args)
        return value

    return update


class Stopped(BaseException):
    """A kill, as far as one process can feel it."""


@pytest.mark.parametrize(
    "more",
    [("--dtype", "bfloat16", "--float32"), ("--learn", "all", "--dtype", "bfloat16")],
    ids=["weights", "all"],
)
def test_a_training_that_is_killed_ends_with_the_same_bytes(
    more: tuple[str, ...], peaked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*W2, *FEW, *more)
    train(peaked, tmp_path / "whole", *options)
    expected, left = weights(tmp_path / "whole"), iter((1, 2, 3, 1))

    def stopping(original: Any, after: int) -> Any:
        calls = iter(range(after))

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls, None) is None:
                raise Stopped
            return original(*args, **kwargs)

        return call

    out, steps = tmp_path / "out", []
    for place, name in ((loop, "_update"), (journal, "put"), (journal, "put"), (loop, "_write")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stopping(getattr(place, name), next(left)))
            with pytest.raises(Stopped):
                train(peaked, out, *options)
        assert not out.exists()
        steps.append(max((part["step"] for part in journal.recorded(work_folder(out))), default=0))
    assert steps == sorted(steps) and 0 < steps[-1] < 6
    said = train(peaked, out, *options, "--batch", "3", code=1)
    assert "begun with other settings (settings)" in said.stderr
    train(peaked, out, *options)
    assert weights(out) == expected and not work_folder(out).exists()


def test_it_appeared_but_its_checkpoints_were_not_removed(
    peaked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_quant.jobs import training as job

    with monkeypatch.context() as patch:
        patch.setattr(job, "discard", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            train(peaked, tmp_path / "out", *W2, *FEW)
    expected = weights(tmp_path / "out")
    train(peaked, tmp_path / "out", *W2, *FEW)
    assert weights(tmp_path / "out") == expected and not work_folder(tmp_path / "out").exists()


def test_losses_that_are_not_finite(peaked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step is skipped; several in a row end the training, and a lower learning rate goes on from the last good state."""
    original = loop._update

    def broken(*steps: int) -> Any:
        def update(model: Any, rows: Any, loss: Any, *args: Any) -> float:
            wrong = args[-1] in steps
            return original(model, rows, (lambda *given: loss(*given) * torch.nan) if wrong else loss, *args)

        return update

    monkeypatch.setattr(loop, "_update", broken(1))
    said = train(peaked, tmp_path / "one", *W2, *FEW)
    assert "step 2: the loss or its gradient is not finite, so the step is skipped" in said.stderr
    assert json.loads((tmp_path / "one" / "recipe.json").read_text())["training"]["skipped"] == 1
    monkeypatch.setattr(loop, "_update", broken(2, 3, 4))
    said = train(peaked, tmp_path / "many", *W2, *FEW, code=1)
    assert "not finite in 3 steps in a row, up to step 5" in said.stderr and "lower learning rate" in said.stderr
    assert journal.recorded(work_folder(tmp_path / "many"))[0]["step"] == 2
    monkeypatch.setattr(loop, "_update", original)
    train(peaked, tmp_path / "many", *W2, *FEW, "--lr", "1e-4")
    recipe = json.loads((tmp_path / "many" / "recipe.json").read_text())["training"]
    assert recipe["learning_rates"] == [[0, 1e-3], [2, 1e-4]] and recipe["skipped"] == 0


def test_what_cannot_be_trained_is_refused(peaked: Path, tmp_path: Path) -> None:
    def refused(message: str, *args: Any, model: Path = peaked, data: Path | None = None, code: int = 1) -> None:
        said = train(model, tmp_path / "out", *args, data=data, code=code)
        assert message in " ".join(said.stderr.split()), said.stderr
        assert not (tmp_path / "out").exists()

    (tmp_path / "short.txt").write_text("three words only")
    long = [" ".join(f"word-{i}-{j}" for j in range(40)) for i in range(9)]
    (tmp_path / "long.txt").write_text("\n\n".join(long))
    (tmp_path / "part.txt").write_text("\n\n".join(long[3:]))
    refused("6 of 9 paragraphs", *W2, *FEW, "--text", tmp_path / "long.txt", data=tmp_path / "part.txt")
    refused("is the text that is measured on", *W2, *FEW, data=peaked / "heldout.txt")
    (tmp_path / "reflowed.txt").write_text((peaked / "heldout.txt").read_text().replace("\n", "  \n\n"))
    refused("is the text that is measured on", *W2, *FEW, data=tmp_path / "reflowed.txt")
    ids = torch.arange(40 * 32).reshape(40, 32) % 500
    save_file(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}, tmp_path / "x.safetensors"
    )
    refused(
        "x.safetensors holds attention_mask, labels beside input_ids: a", *W2, *FEW, data=tmp_path / "x.safetensors"
    )
    refused("fewer than one window of 32", *W2, *FEW, data=tmp_path / "short.txt")
    windows = ("--train-context", "256", "--steps", "1", "--batch", "1")
    refused("windows of 256 tokens are longer than the 128 positions", *W2, *windows)
    masked = tmp_path / "masked"
    shutil.copytree(peaked, masked)
    config = BertConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(masked)
    refused("masked is no causal language model", *W2, *FEW, model=masked, data=peaked / "calibration.txt")
    refused("masked is no causal language model", *W2, *FEW, "--teacher", masked)
    refused("W4A16-g32 can", "--scheme", "W4A16-g32-o1%", *FEW, code=2)
    refused("one training has one scheme", *W2, "--scheme", "W4A16-g32", *FEW, code=2)
    refused("--steps and --epochs", *W2, *FEW, "--epochs", "1", code=2)
    for option in ("--checkpoint-minutes", "--hidden-weight"):
        refused("'nan' is not a number from 0", *W2, *FEW, option, "nan", code=2)
    with pytest.raises(OptionError, match="--checkpoint-minutes nan: must be 0 or a number above 0"):
        train_model(peaked, tmp_path / "out", data=peaked / "calibration.txt", checkpoint_minutes=float("nan"))
    other = tmp_path / "other"
    shutil.copytree(peaked, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    refused("a vocabulary of 1000 tokens, and the model has one of 512", *W2, *FEW, "--teacher", other, code=2)
    refused("--teacher none has none", *W2, *FEW, "--teacher", "none", "--hidden-weight", "1", code=2)
    deeper = config | {"num_hidden_layers": config["num_hidden_layers"] + 1}
    (other / "config.json").write_text(json.dumps(deeper))
    refused("teacher has a num_hidden_layers of", *W2, *FEW, "--teacher", other, "--hidden-weight", "1", code=2)
    train(peaked, tmp_path / "coded", *W2, *FEW, data=tmp_path / "long.txt")
    refused("quantized already", *W2, *FEW, model=tmp_path / "coded", data=peaked / "calibration.txt", code=2)
    said = CliRunner().invoke(
        main, ["eval", str(tmp_path / "coded"), "--base", str(peaked), "--text", str(tmp_path / "long.txt")]
    )
    assert said.exit_code == 1 and "9 of 9 paragraphs" in said.stderr
