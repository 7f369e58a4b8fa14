"""Quantization-aware training: whatever trains a transformers model trains one, and what is saved is what was trained."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from click.testing import CliRunner
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_quant import HfQuantConfig, load, verify
from hf_quant.cli import main
from hf_quant.errors import PlanError
from hf_quant.hf._compat import recompute_activations
from hf_quant.hf.trainable import begin_from
from hf_quant.nn import QuantLinear
from hf_quant.training import FakeQuantLinear
from hf_quant.training.modules import FakeQuant, compute_wide
from tests.processes import together

from .conftest import IDS

# in a process that imports transformers alone
AGAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    expected, ids = torch.load(f"{folder}.pt")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected), folder
assert "hf_quant.hf" in sys.modules
"""
SHIPPED = Path(__file__).parents[2] / "examples" / "ref-llama-16m"
ROWS = torch.arange(8 * 16).view(8, 16) * 7 % 251 + 1


def trainable(folder: Path, scheme: str = "W4A16-g32", **how: Any) -> Any:
    options = {"dtype": how.pop("dtype")} if "dtype" in how else {}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=HfQuantConfig(scheme, training=True, **how), **options
    )


def trainer(model: Any, out: Path, steps: int, **how: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "learning_rate": 2e-3, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return Trainer(model, TrainingArguments(str(out), max_steps=steps, **settings | how), train_dataset=rows)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = model.eval()(IDS).logits
    return made


@pytest.mark.parametrize(("arch", "scheme", "how", "format"), [
    ("llama", "W4A16-g32", {}, "compressed_tensors"),
    ("llama", "W2A16-g32-asym", {}, "compressed_tensors"),
    ("llama", "W4A8-g32", {"dtype": torch.float32}, "compressed_tensors"),
    ("llama-tied", "W8A8", {"quantize_embeddings": True, "modules_to_not_convert": ["down_proj"]}, "native"),
    ("gpt2", "W3A16-g64-asym", {}, "native"),
    ("qwen3-moe", "W4A16-g32-asym", {}, "native"),
])  # fmt: skip
def test_what_is_saved_is_what_was_trained(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, scheme: str, how: dict[str, Any], format: str
) -> None:
    model = trainable(zoo(arch)[1], scheme, **how)
    before = logits(model)
    run = trainer(model, tmp_path / "run", 12)
    run.train()
    assert losses(run)[-1] < 0.95 * losses(run)[0]
    run.save_model(str(tmp_path / "saved"))
    monkeypatch.setenv("HF_QUANT_BACKEND", "reference")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.hf_quantizer.plan.format == format and not again.hf_quantizer.is_qat_trainable
    assert any(isinstance(module, QuantLinear) for module in again.modules())
    assert again.dtype == how.get("dtype", torch.bfloat16)
    expected = logits(model)
    assert torch.equal(logits(again), expected) and not torch.equal(before, expected)


MAMBA = tf.MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=1)
VIT = tf.ViTConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)


@pytest.mark.parametrize(
    ("kind", "config", "given"),
    [
        (tf.MambaForCausalLM, MAMBA, {"input_ids": IDS}),
        (tf.ViTForImageClassification, VIT, {"pixel_values": torch.randn(2, 3, 28, 28)}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_models_that_cast_to_the_dtype_of_a_weight(
    kind: Any,
    config: Any,
    given: dict[str, Tensor],
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While they train, that is float32, and what follows was computed in it too, or refused to."""
    monkeypatch.setenv("HF_QUANT_BACKEND", "reference")
    kind(config).save_pretrained(tmp_path / "base")
    asked = HfQuantConfig("W4A16-g32", training=True, quantize_lm_head=True, quantize_embeddings=True)
    model = kind.from_pretrained(tmp_path / "base", dtype=dtype, quantization_config=asked).eval()
    assert any(isinstance(module, FakeQuant) for module in model.modules())
    out = model(**given).logits
    out.float().sum().backward()
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(kind.from_pretrained(tmp_path / "saved").eval()(**given).logits, out)


def test_a_new_process_computes_the_same(zoo: Any, tmp_path: Path) -> None:
    """Of the shipped model after 50 steps, and of a small one in the other format."""
    folders = []
    for base, scheme, steps in ((SHIPPED, "W4A16-g32", 50), (zoo("llama")[1], "W2A16-g32-asym", 2)):
        model = trainable(base, scheme)
        if steps > 2:  # to save time: gradients of the other layers are those of the tests above
            model.requires_grad_(False)
            model.model.layers[-2:].requires_grad_(True)
        run = trainer(model, tmp_path / "run", steps, per_device_train_batch_size=2, learning_rate=2e-4)
        run.train()
        assert losses(run)[-1] < losses(run)[0]
        folders.append(str(tmp_path / scheme))
        model.save_pretrained(folders[-1])
        torch.save((logits(model), IDS), f"{folders[-1]}.pt")
    environment = os.environ | {"HF_QUANT_BACKEND": "reference", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AGAIN, *folders],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_run_that_is_resumed_ends_like_one_that_was_not(zoo: Any, tmp_path: Path) -> None:
    """In bf16 by autocast, with activations computed again; and a checkpoint is a model of its own."""
    how = {"bf16": True, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}

    def run(name: str, steps: int, **resume: Any) -> Any:
        model = trainable(zoo("llama")[1], "W2A16-g32-asym")
        recompute_activations(model)
        trainer(model, tmp_path / name, steps, **how).train(**resume)
        return model

    whole = run("one", 6)
    run("two", 3)
    rest = run("two", 6, resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-3"))
    for name, expected in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], expected), name
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "checkpoint-6")
    assert third.hf_quantizer.is_qat_trainable and third.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert torch.equal(logits(third), logits(whole))
    for number, model in enumerate((whole, rest, third)):
        model.save_pretrained(tmp_path / f"saved-{number}")
    assert len({(tmp_path / f"saved-{number}" / "model.safetensors").read_bytes() for number in range(3)}) == 1


def test_training_begins_from_the_codes_of_a_calibrated_method(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_QUANT_BACKEND", "reference")
    made = [
        AutoModelForCausalLM.from_pretrained(
            zoo("gpt2")[1],
            quantization_config=HfQuantConfig("W3A16-g32-asym", method="gptq", calibration=ROWS, training=each),
        )
        for each in (True, False)
    ]
    trained, coded = (model.transformer.h[1].mlp.c_fc for model in made)
    assert torch.equal(trained.quantized("weight").qweight, coded.quantized_weight().qweight)
    assert torch.equal(logits(made[0]), logits(made[1]))
    made[0](input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in made[0].parameters())


@pytest.mark.parametrize("tables", [False, True], ids=["linear", "tables"])
def test_a_model_in_sixteen_bits_trains_in_float32(zoo: Any, tmp_path: Path, tables: bool) -> None:
    """Its logits and gradients have more than 16 bits; codes and scales stay those that are stored in 16."""
    whole = {"quantize_embeddings": True, "quantize_lm_head": True} if tables else {}
    models = [trainable(zoo("llama-tied")[1], dtype=torch.bfloat16, **whole) for _ in range(2)]
    compute_wide(models[1])
    narrow, wide = (model(input_ids=IDS).logits for model in models)
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert not torch.equal(wide, wide.bfloat16().float()) and torch.allclose(wide, narrow.float(), rtol=0.1, atol=0.05)
    wide.square().mean().backward()
    assert {parameter.grad.dtype for parameter in models[1].parameters() if parameter.grad is not None} == {
        torch.float32
    }
    for name, model in zip(("narrow", "wide"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    saved = [load(tmp_path / name, dtype=torch.bfloat16).state_dict() for name in ("narrow", "wide")]
    assert all(
        tensor.dtype == saved[0][name].dtype and torch.equal(tensor, saved[0][name])
        for name, tensor in saved[1].items()
    )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own compiler does it
def test_compiled(zoo: Any) -> None:
    one, other = trainable(zoo("llama")[1], "W4A8-g32"), trainable(zoo("llama")[1], "W4A8-g32")
    compiled = torch.compile(other, backend="aot_eager")
    for model in (one, compiled):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(theirs.grad, mine.grad, rtol=2e-2, atol=1e-3)


def test_two_processes_train_like_one(zoo: Any, tmp_path: Path) -> None:
    """DDP and FSDP2, each process with half of the rows."""
    folder = zoo("llama")[1]

    def step(model: Any, rows: Tensor) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(2):
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def work(ranks: Any) -> list[dict[str, Tensor]]:
        from torch.distributed.fsdp import fully_shard

        rows, made = ROWS.chunk(2)[ranks.rank], []
        model = trainable(folder, "W2A16-g32-asym", dtype=torch.float32)
        step(torch.nn.parallel.DistributedDataParallel(model), rows)
        made.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        model = trainable(folder, "W2A16-g32-asym", dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        step(model, rows)
        model.save_pretrained(tmp_path / f"sharded-{ranks.rank}")
        made.append(
            {name: getattr(tensor, "full_tensor", lambda t=tensor: t)() for name, tensor in model.state_dict().items()}
        )
        dist.barrier()
        return made

    results = together(work, tmp_path, world=2)
    assert not any(isinstance(result, str) for result in results), results
    alone = trainable(folder, "W2A16-g32-asym", dtype=torch.float32)
    step(alone, ROWS)
    for result in results:
        for state in result:
            for name, expected in alone.state_dict().items():
                torch.testing.assert_close(state[name], expected, rtol=1e-4, atol=1e-5)
    sharded = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded-0")
    torch.testing.assert_close(logits(sharded), logits(alone), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "how", [{"bits": 4}, {"bits": 3, "format": "native", "quantize_embeddings": True}], ids=["ct", "native"]
)
def test_what_is_in_floating_point_can_be_trained(zoo: Any, tmp_path: Path, how: dict[str, Any]) -> None:
    """Norms of a checkpoint of any format, and every layer once it is dequantized."""
    config = HfQuantConfig(group_size=32, **how)
    AutoModelForCausalLM.from_pretrained(zoo("llama")[1], quantization_config=config).save_pretrained(tmp_path / "q")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, _ in model.named_parameters() if "norm" in name} <= trained
    assert all(parameter.requires_grad for parameter in model.dequantize().parameters())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_cannot_be_trained_is_refused(zoo: Any, tmp_path: Path) -> None:
    folder = zoo("llama")[1]
    with pytest.raises(PlanError, match=r"W4A16-g32-o1%.*W4A16-g32 can"):
        trainable(folder, "W4A16-g32-o1%")
    with pytest.raises(PlanError, match="save it, load what was saved, and dequantize that"):
        trainable(folder).dequantize()
    coded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=HfQuantConfig("W4A16-g32"))
    assert not any(isinstance(module, FakeQuantLinear) for module in coded.modules())
    with pytest.raises(ValueError, match="fine-tuning on purely quantized"):
        trainer(coded, tmp_path, 1)
    coded.save_pretrained(tmp_path / "coded")
    with pytest.raises(PlanError, match="the checkpoint is quantized already"):
        trainable(tmp_path / "coded")


def test_what_a_checkpoint_has_besides_is_refused(zoo: Any) -> None:
    """A training that begins from a checkpoint takes all of it, or says what it has no place for."""
    folder = zoo("llama")[1]
    coded = load(str(folder), quantization_config=HfQuantConfig("W4A16-g32"), dtype=torch.float32)
    model = trainable(folder, dtype=torch.float32)
    begin_from(model, coded)
    assert torch.allclose(logits(model), logits(coded), atol=1e-4)
    layer = coded.model.layers[0]
    layer.mlp.register_parameter("stretch", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(
        PlanError, match=r"layers\.0\.mlp\.stretch: .* has 3 numbers there, and the model has no such tensor"
    ):
        begin_from(model, coded)
    layer.mlp.up_proj = copy.deepcopy(layer.self_attn.q_proj)
    with pytest.raises(
        PlanError, match=r"layers\.0\.mlp\.up_proj: .* has 64x64 numbers there, and the model has 96x64"
    ):
        begin_from(model, coded)


def test_a_training_that_can_go_on_is_no_quantized_model(zoo: Any, tmp_path: Path) -> None:
    """Whatever opens quantized checkpoints says what it is, and how it becomes one."""
    folder, start, out = zoo("llama")[1], tmp_path / "checkpoint-4", tmp_path / "out"
    unread = tmp_path / "unread.txt"
    unread.write_bytes(b"\xff")
    trainable(folder).save_pretrained(start)
    for command in (
        ["inspect", start], ["verify", start], ["convert", start, "--to", "native", "-o", out], ["repair", start, "-o", out, "--base", folder],
        ["quantize", start, "-o", out, "--no-eval"], ["train", folder, "-o", out, "--data", unread, "--scheme", "W4A16-g32", "--start", start],
    ):  # fmt: skip
        result = CliRunner().invoke(main, list(map(str, command)))
        assert result.exit_code == 1, result.output
        assert "holds a training that can go on" in result.stderr and "save_pretrained into a folder" in result.stderr
    AutoModelForCausalLM.from_pretrained(start).save_pretrained(out)
    assert verify(str(out)).to_dict()


@pytest.mark.parametrize("arch", ["llama", "llama-tied"])
def test_rounded_embeddings_are_not_resized(zoo: Any, arch: str) -> None:
    """Their scales would stay as they were; in floating point they are resized as ever."""
    for whole in ({"quantize_embeddings": True}, {"quantize_embeddings": True, "quantize_lm_head": True}):
        model = trainable(zoo(arch)[1], **whole)
        before, rows = logits(model), model.config.vocab_size
        for part in (model, model.model):
            with pytest.raises(
                PlanError, match=r"embed_tokens trains with its weight rounded.*floating point, save it"
            ):
                part.resize_token_embeddings(rows + 8)
            assert part.resize_token_embeddings(rows) is part.resize_token_embeddings() is model.get_input_embeddings()
        assert torch.equal(logits(model), before)
    model = trainable(zoo(arch)[1])
    model.resize_token_embeddings(rows + 8)
    assert logits(model).shape[-1] == rows + 8


def test_trainable_experts_are_copied_and_pickled(zoo: Any) -> None:
    model = trainable(zoo("qwen3-moe")[1], dtype=torch.float32)
    expected = logits(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), expected)
        again(input_ids=IDS, labels=IDS).loss.backward()
        assert all(parameter.grad is not None for parameter in again.parameters() if parameter.requires_grad)
    assert all(parameter.grad is None for parameter in model.parameters())
