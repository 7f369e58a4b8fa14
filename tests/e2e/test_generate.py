"""``hf-quant generate``: text that a model writes itself, to calibrate and to train on."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

import hf_quant as hq
from hf_quant.cli import main
from hf_quant.errors import HfQuantError, OptionError
from hf_quant.jobs import generated
from hf_quant.jobs.outputs import work_folder

FEW: dict[str, Any] = {"tokens": 2000, "calibration_tokens": 1024, "prompt_tokens": 16, "batch": 2}


def ids_in(file: Path) -> Tensor:
    (ids,) = load_file(file).values()
    return ids


def test_what_is_in_the_file(tiny: Path, tmp_path: Path) -> None:
    """The windows of the text, then windows that begin as these do; the command and the function write the same bytes."""
    done = hq.generate(tiny, tmp_path / "a.safetensors", **FEW)
    ids, context = ids_in(done.file), done.context
    text = len(ids) - done.generated // (context - FEW["prompt_tokens"])
    prompts = ids[text:, : FEW["prompt_tokens"]]
    assert list(ids.shape) == [done.sequences, context] and FEW["tokens"] <= done.generated < FEW["tokens"] + context
    assert text * context >= FEW["calibration_tokens"] - context
    places = [window.unfold(0, FEW["prompt_tokens"], 1) for window in ids[:text]]
    assert all(any((place == prompt).all(-1).any() for place in places) for prompt in prompts)
    assert torch.equal(
        prompts[:text], ids[:text][: len(prompts), : FEW["prompt_tokens"]]
    )  # first how the windows begin
    options = [text for name, value in FEW.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    result = CliRunner().invoke(
        main, ["generate", str(tiny), "-o", str(tmp_path / "b.safetensors"), *options, "--json"]
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "b.safetensors").read_bytes() == done.file.read_bytes()
    assert not torch.equal(ids, ids_in(hq.generate(tiny, tmp_path / "c.safetensors", seed=1, **FEW).file))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.safetensors" for name in "abc"]


def test_a_stopped_run_goes_on(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes what is missing, and ends with the bytes of a run that was not stopped; another one is refused."""
    whole = hq.generate(tiny, tmp_path / "whole.safetensors", **FEW).file.read_bytes()
    out, really, calls = tmp_path / "out.safetensors", generated.continued, []
    torch.manual_seed(99)  # of the caller, whose draws are his own

    def stopped(*args: Any) -> Tensor:
        calls.append(args[-1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return really(*args)

    monkeypatch.setattr(generated, "continued", stopped)
    with pytest.raises(KeyboardInterrupt):
        hq.generate(tiny, out, **FEW)
    assert not out.exists() and work_folder(out).is_dir()
    with pytest.raises(HfQuantError, match="other settings"):
        hq.generate(tiny, out, **FEW | {"seed": 7})
    hq.generate(tiny, out, **FEW)
    assert len(set(calls)) == len(calls) - 1 and out.read_bytes() == whole and not work_folder(out).exists()


def test_a_run_that_was_stopped_at_its_end(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.safetensors"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generated, "discard", interrupted)
        hq.generate(tiny, out, **FEW)
    written = out.read_bytes()
    monkeypatch.setattr(generated, "continued", interrupted)  # nothing is left to be written
    assert hq.generate(tiny, out, **FEW).file.read_bytes() == written and [*tmp_path.iterdir()] == [out]


def test_no_file_is_replaced_where_a_run_was_stopped(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one that appeared meanwhile, and not one that is the text to go on from."""
    out = tmp_path / "out.safetensors"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generated, "continued", interrupted)
        hq.generate(tiny, out, **FEW)
    save_file({"ids": torch.arange(4096).view(8, 512) % 64}, out)
    before = out.read_bytes()
    for text in ({}, {"calibration": str(out)}):
        with pytest.raises(HfQuantError, match="exists"):
            hq.generate(tiny, out, **FEW | text)
    assert out.read_bytes() == before


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_tokens_are_drawn_from_the_whole_distribution(tiny: Path, temperature: float) -> None:
    """Whatever the model's own way to generate; and a text that ends is followed by another."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.4)  # a distribution with peaks
    prompt, draws = torch.arange(1, 9)[None], 20_000
    with torch.no_grad():
        expected = (model(prompt).logits[0, -1] / temperature).softmax(-1)
    end = int(expected.argmax())
    model.generation_config = GenerationConfig(top_k=1, eos_token_id=end)
    ids = generated.continued(model, prompt.expand(draws, -1), 10, temperature, 0)
    assert ids.shape == (draws, 10) and torch.equal(ids[:, :8], prompt.expand(draws, -1))
    counts = ids[:, 8].bincount(minlength=len(expected)) / draws
    rare = expected.argsort(descending=True)[50:]
    rest = expected[rare].sum()
    assert expected.max() > 0.05 and rest > 0.02
    assert (counts[rare].sum() - rest).abs() < 5 * (rest / draws).sqrt()
    assert ((counts - expected).abs() < 5 * (expected / draws).sqrt() + 2 / draws).all()
    assert len(ids[ids[:, 8] == end, 9].unique()) > 1


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
HEADS = {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
CACHES = {  # each keeps something else from one token to the next
    "states of attention": tf.LlamaConfig(**SMALL, **HEADS),
    "and experts": tf.MixtralConfig(**SMALL, **HEADS, num_local_experts=2),
    "of a sliding window": tf.Gemma3TextConfig(**SMALL, **HEADS, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "positions": tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3),
    "a recurrent state": tf.MambaConfig(**SMALL, state_size=4),
}  # fmt: skip


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_that_does_not_grow(kind: str) -> None:
    """It is used where the architecture has one, and what is written is the same as with one that grows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CACHES[kind], dtype=torch.float32).eval()
    prompts = torch.randint(0, 64, (3, 6))
    ids = generated.continued(model, prompts, 30, 1.0, 0)
    static = model.generation_config.cache_implementation == "static"
    assert static or kind != "states of attention"
    model.generation_config.cache_implementation = None
    torch.manual_seed(0)
    assert torch.equal(model.generate(prompts, attention_mask=torch.ones_like(prompts)), ids)


def test_codes_and_weights_are_learned_from_it(tiny: Path, tmp_path: Path) -> None:
    file = hq.generate(tiny, tmp_path / "more.safetensors", **FEW).file
    done = hq.quantize(tiny, tmp_path / "q", scheme="W4A16-g32", method="gptq", calibration=str(file), max_tokens=64)
    assert f'"name": "{file.name}"' in (done.folder / "recipe.json").read_text()
    options: dict[str, Any] = {"scheme": "W4A16-g32", "steps": 2, "batch": 2, "max_tokens": 64}
    trained = hq.train(tiny, tmp_path / "t", data=str(file), **options)
    assert trained.passed and file.name in (trained.folder / "recipe.json").read_text()
    with pytest.raises(OptionError, match="--train-context 8"):
        hq.train(tiny, tmp_path / "u", data=str(file), train_context=8, **options)
    inputs = tmp_path / "inputs.safetensors"
    save_file({name: torch.ones(4, 8, dtype=torch.int64) for name in ("input_ids", "attention_mask")}, inputs)
    with pytest.raises(HfQuantError, match=f"--data {inputs}"):
        hq.train(tiny, tmp_path / "u", data=str(inputs), **options)
    with pytest.raises(HfQuantError, match=f"--calibration {inputs}"):
        hq.generate(tiny, tmp_path / "u.safetensors", calibration=str(inputs))
    assert not (tmp_path / "u").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "--tokens 0"),
        ({"prompt_tokens": 512}, "--prompt-tokens 512: must be fewer than the 512"),
        ({"temperature": 0.0}, "--temperature 0.0"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"output": "text.jsonl"}, "call it text.jsonl.safetensors"),
        ({"output": "there.safetensors"}, "exists"),
        ({"calibration": "nowhere.txt"}, "no such file"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"something")
    out = tmp_path / options.pop("output", "out.safetensors")
    with pytest.raises(HfQuantError, match=message):
        hq.generate(tiny, out, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]
    assert (tmp_path / "there.safetensors").read_bytes() == b"something"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("bert-mlm", "is no causal"), ("t5", "is no causal"), ("llama", "has no tokenizer")],
)
def test_models_that_do_not_go_on_from_text(name: str, reason: str, zoo: Any, tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / name
    shutil.copytree(zoo(name)[1], model)
    if name != "llama":
        for file in tiny.glob("tokenizer*"):
            shutil.copy(file, model)
    with pytest.raises(HfQuantError, match=f"{reason}.*cannot go on from a text"):
        hq.generate(model, tmp_path / "out.safetensors")
