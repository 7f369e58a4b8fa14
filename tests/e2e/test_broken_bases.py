"""Bases that lack tensors, have changed, are quantized themselves or have an adapter beside them; and ids that no table holds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import hf_quant as hq
from hf_quant import HfQuantConfig
from hf_quant.cli import main
from hf_quant.errors import CheckpointError, HfQuantError, OptionError
from hf_quant.evaluation.endings import Endings
from hf_quant.jobs.options import check_device, size_in_bytes
from hf_quant.jobs.outputs import claimed
from hf_quant.jobs.verify import verify

SHIPPED = Path(__file__).parents[2] / "examples" / "ref-llama-16m"
TEXT = "The first words of a text that is long enough to be measured on. " * 40


def tiny(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Two layers of a width of 64, with the tokenizer that ships."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = tf.AutoTokenizer.from_pretrained(SHIPPED)
    config = tf.LlamaConfig(
        **(
            shape
            | {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "tie_word_embeddings": False}
            | changes
        )
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def command(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def evaluated(*arguments: object, text: Path) -> Any:
    done = command("eval", *arguments, "--text", text, "--context", 32, "--max-tokens", 200, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("gone", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_base_without_one_of_its_tensors_is_refused_everywhere(
    gone: str, base: Path, text: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(base, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors[gone]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    why = f"tensor {gone} is missing from the checkpoint"
    for refused in (verify, lambda folder: hq.load(str(folder))):
        with pytest.raises(CheckpointError, match=why):
            refused(broken)
    with pytest.raises(CheckpointError, match=why):
        hq.load(str(broken), quantization_config=HfQuantConfig("W4A16-g32"))
    done = command("quantize", broken, "-o", tmp_path / "q", "--scheme", "W4A16-g32", "--no-eval")
    assert done.exit_code == 1 and why in done.output and not (tmp_path / "q").exists()
    done = command("eval", base, "--base", broken, "--text", text, "--context", 32)
    assert done.exit_code == 1 and why in done.output


def test_what_only_training_reads_may_be_missing(tmp_path: Path) -> None:
    """As in checkpoints of Wav2Vec2 on the Hub, whose convolution has older names besides."""
    config = tf.Wav2Vec2Config(
        vocab_size=32, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96, conv_dim=(32,),
        conv_stride=(5,), conv_kernel=(10,), num_feat_extract_layers=1, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    tf.Wav2Vec2ForCTC(config).save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    older = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    for new, old in older.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    tensors.pop("wav2vec2.masked_spec_embed", None)
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    assert verify(tmp_path / "m").layers_quantized == 0
    hq.load(str(tmp_path / "m"))
    hq.load(str(tmp_path / "m"), quantization_config=HfQuantConfig("W4A16-g32"))


def test_a_base_that_has_changed_is_named_again(base: Path, text: Path, tmp_path: Path) -> None:
    mine, out = shutil.copytree(base, tmp_path / "mine"), tmp_path / "q"
    assert command("quantize", mine, "-o", out, "--scheme", "W8A16-g32", "--no-eval").exit_code == 0
    first = evaluated(out, text=text)["quality"]["metrics"]["kl"]
    weights = mine / "model.safetensors"
    save_file({name: tensor * 1.1 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    done = command("eval", out, "--text", text, "--context", 32)
    assert (
        done.exit_code == 1
        and "'mine', which is not known to be as it was: say where it is with --base" in done.output
    )
    assert evaluated(out, "--base", base, text=text)["quality"]["metrics"]["kl"] == first


@pytest.mark.parametrize("other", ["W8A8", "W4A16-g32", "wider"])
def test_layers_are_compared_with_weights_alone(other: str, base: Path, text: Path, tmp_path: Path) -> None:
    command("quantize", base, "-o", tmp_path / "q", "--scheme", "W8A16-g64", "--no-eval")
    if other == "wider":
        yardstick = tiny(tmp_path / "other", intermediate_size=256)
    else:
        yardstick = tmp_path / "other"
        command(
            "quantize",
            base,
            "-o",
            yardstick,
            "--scheme",
            other,
            "--no-eval",
            "--format",
            "native" if "W4" in other else "auto",
        )
    done = evaluated(tmp_path / "q", "--base", yardstick, text=text)
    assert done["quality"]["metrics"]["kl"]["value"] > 0
    assert "up_proj" not in json.dumps(done["layers"])


def test_an_adapter_beside_a_model_is_not_passed_over(base: Path, tmp_path: Path) -> None:
    both = shutil.copytree(base, tmp_path / "both")
    (both / "adapter_config.json").write_text("{}")
    for name in ("quantize", "eval", "plan", "ladder", "bench"):
        options = {"quantize": ["-o", tmp_path / "q"], "ladder": ["-o", tmp_path / "q", "--max-kl", 1]}.get(name, [])
        done = command(name, both, *options)
        assert done.exit_code == 1 and r"the adapter beside this model (adapter_config.json): merge it" in done.output


def test_ids_and_lengths_that_a_base_has_no_place_for(base: Path, text: Path, tmp_path: Path) -> None:
    small, other = tiny(tmp_path / "small", vocab_size=300), tiny(tmp_path / "other", seed=1)
    done = command("eval", base, "--base", small, "--text", text, "--context", 32)
    assert done.exit_code == 1 and "the tokenizer gives token id" in done.output and "has 300" in done.output
    save_file({"input_ids": torch.randint(0, 300, (2, 300))}, tmp_path / "long.safetensors")
    done = command("eval", base, "--base", other, "--inputs", tmp_path / "long.safetensors")
    assert done.exit_code == 1 and "longer than the 256 positions" in done.output


def test_inputs_of_other_types_and_shapes(base: Path, tmp_path: Path) -> None:
    ids, other = torch.randint(0, 100, (2, 64)), tiny(tmp_path / "other", seed=1)
    save_file({"input_ids": ids.to(torch.int16)}, tmp_path / "short.safetensors")
    assert command("eval", base, "--base", other, "--inputs", tmp_path / "short.safetensors").exit_code == 0
    wrong = {"input_ids": ids, "attention_mask": torch.ones(2, 32, dtype=torch.int64)}
    save_file(wrong, tmp_path / "mask.safetensors")
    done = command("eval", base, "--base", other, "--inputs", tmp_path / "mask.safetensors")
    assert done.exit_code == 1 and "attention_mask [1, 32] and input_ids [1, 64] differ in shape" in done.output


def test_files_that_are_broken_are_named(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "m")
    for wrong in ("[]", '{"max_new_tokens": "x"}', '{"watermarking_config": 5}'):
        (folder / "generation_config.json").write_text(wrong)
        with pytest.raises(CheckpointError, match=r"generation_config\.json: "):
            Endings.of(str(folder), None)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": None}))
    assert verify(folder).layers_quantized == 0
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "x"}))
    with pytest.raises(HfQuantError, match=r"config\.json: .*hidden_size.*x"):
        from hf_quant.hf.auto import tokenizer_of

        tokenizer_of(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a pointer of Git LFS stands in place of the file"):
        hq.load(str(folder))


def test_sizes_of_too_many_digits() -> None:
    with pytest.raises(OptionError, match="is not a size"):
        size_in_bytes("9" * 400)


def test_a_device_of_macs_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(OptionError, match="--device mps: only Macs have it"):
        check_device("mps")


def test_generated_files_can_be_read_by_others(base: Path, text: Path, tmp_path: Path) -> None:
    umask = os.umask(0o022)
    os.umask(umask)
    made = command(
        "generate", base, "-o", tmp_path / "own.safetensors", "--calibration", text, "--calibration-tokens", 1024,
        "--tokens", 256,
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert (tmp_path / "own.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_ladder_counts_sizes_in_the_dtype_that_it_writes(base: Path, text: Path, tmp_path: Path) -> None:
    """In 16 bits, embeddings and head take half of what config.json says."""
    options = ("--scheme", "W2A16-g32-asym", "--no-eval", "--dtype", "bfloat16")
    assert command("quantize", base, "-o", tmp_path / "q", *options, "--method", "hqq", "--max-kl", 9).exit_code in (
        0,
        2,
        3,
    )
    size = sum(
        tensor.numel() * 2 for name, tensor in load_file(base / "model.safetensors").items() if "proj" not in name
    )
    ladder = (
        "ladder",
        base,
        "-o",
        tmp_path / "l",
        "--method",
        "rtn",
        "--group-size",
        32,
        "--max-size",
        int(size * 1.5),
    )
    measuring = ("--text", text, "--context", 32, "--max-tokens", 200, "--trial-tokens", 100)
    refused = command(*ladder, "--dtype", "float32", *measuring)
    assert refused.exit_code == 2 and "the smallest model" in refused.output
    assert "the smallest model" not in command(*ladder, "--dtype", "bfloat16", *measuring).output


def test_the_ladder_says_at_once_that_its_output_is_taken(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any) -> None:
        raise AssertionError("it began to measure")

    monkeypatch.setattr("hf_quant.jobs.walk.Ladder.walk", measured)
    with claimed(tmp_path / "l"):
        done = command("ladder", base, "-o", tmp_path / "l", "--max-kl", 1, "--method", "rtn")
    assert done.exit_code == 1 and "another process" in done.output
