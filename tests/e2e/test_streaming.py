"""Calibrated quantization, block by block from the shards."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

from hf_quant import HfQuantConfig, load
from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.data.calibration import Calibration
from hf_quant.errors import HfQuantError
from hf_quant.hf.blocks import refuse_other_kinds
from hf_quant.hf.calibrate_shards import Settings, quantize_streaming

SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
CONFIGS = {
    "llama": tf.LlamaConfig(**SMALL),
    "llama-tied": tf.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen3": tf.Qwen3Config(**SMALL, head_dim=32),
    "gemma3": tf.Gemma3TextConfig(**SMALL, head_dim=32, sliding_window=8),
    "gpt2": tf.GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=3, n_head=2, initializer_range=0.1),
}
IDS = torch.randint(0, 256, (12, 48), generator=torch.Generator().manual_seed(0))


def make(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16, shard: str = "100KB") -> Path:
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def stream(
    source: Path, out: Path, scheme: str = "W3A16-g32", ids: Tensor = IDS, **options: Any
) -> list[dict[str, Any]]:
    shutil.rmtree(out, ignore_errors=True)  # a stage is always new
    out.mkdir()
    config = HfQuantConfig(scheme, **({"method": "gptq"} | options))
    data, quiet = Calibration(ids, "ids", []), Settings(lambda _: None)
    _, blocks = quantize_streaming(source, config, data, out.with_suffix(".work"), out, quiet)
    return blocks


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS[:4]).logits.float()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_it_loses_less_than_rounding(name: str, tmp_path: Path) -> None:
    source = make(tmp_path / "base", name)
    blocks = stream(source, tmp_path / "out", "W4A16-g32")
    base = logits(load(str(source)))
    model = load(str(tmp_path / "out"))
    rounded = load(str(source), quantization_config=HfQuantConfig("W4A16-g32"))

    def lost(each: Any) -> float:
        return ((logits(each) - base).norm() / base.norm()).item()

    assert lost(model) < 0.85 * lost(rounded)
    assert [block["block"] for block in blocks] == [f"{blocks[0]['block'][:-1]}{i}" for i in range(3)]
    assert all(0 < b["error"] < 0.5 and b["sqnr_db"] > 3 and b["layers"] for b in blocks)
    stored, made = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    scales = {made.tensors[n].dtype for n in made.tensors if n.endswith("_scale")}
    assert scales == {"BF16"}
    kept = [n for n in stored.tensors if n in made.tensors and not made.tensors[n].dtype.startswith("U")]
    assert kept and all(torch.equal(stored.read(n), made.read(n)) for n in kept)


@pytest.mark.parametrize(
    ("scheme", "fmt"), [("W4A16-g32-asym", "auto"), ("W8A16-g32", "native"), ("W2A16-g16", "auto")]
)
def test_formats(scheme: str, fmt: str, tmp_path: Path) -> None:
    source = make(tmp_path / "base", "llama")
    stream(source, tmp_path / "out", scheme, format=fmt, overrides={"*.down_proj": "W8A16-g32"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == ("hf_quant" if fmt == "native" else "compressed-tensors")
    model = load(str(tmp_path / "out"))
    assert str(model.model.layers[0].mlp.down_proj.scheme) == "W8A16-g32"
    assert str(model.model.layers[0].mlp.up_proj.scheme) == scheme and torch.isfinite(logits(model)).all()


def test_memory_holds_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a block is solved, the others are on the meta device."""
    from hf_quant.hf import calibrate_shards

    seen = []
    solve = calibrate_shards.solve

    def watched(block: Any, *args: Any) -> Any:
        made = solve(block, *args)
        seen.append(block.module)
        real = [m for m in seen if any(p.device.type != "meta" for p in m.parameters())]
        assert real == [block.module]
        return made

    monkeypatch.setattr(calibrate_shards, "solve", watched)
    stream(make(tmp_path / "base", "llama"), tmp_path / "out")
    assert len(seen) == 3


def test_refusals(tmp_path: Path) -> None:
    source = make(tmp_path / "base", "llama")
    with pytest.raises(HfQuantError, match="calibrated methods leave"):
        stream(source, tmp_path / "out", quantize_embeddings=True)
    with pytest.raises(HfQuantError, match="calibrates on text, and ViTModel reads pixel_values"):
        refuse_other_kinds(tf.ViTModel, "gptq")
    stream(source, tmp_path / "out")
    with pytest.raises(HfQuantError, match=r"other settings \(calibration\)"):
        stream(source, tmp_path / "out", ids=IDS.flip(0))
    with pytest.raises(HfQuantError, match="no tokenizer beside the model, pass token ids"):
        load(str(source), quantization_config=HfQuantConfig("W4A16-g32", method="gptq"))
    broken = make(tmp_path / "nan", "llama", torch.float32, "1GB")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    from safetensors.torch import save_file

    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HfQuantError, match="NaN or infinite"):
        stream(broken, tmp_path / "bad")


@pytest.mark.parametrize("method", ["calibrated", "awq", "hadamard+gptq", "smoothquant+hqq", "drift+rtn"])
def test_every_kind_of_recipe_loses_less_than_rounding(method: str, tmp_path: Path) -> None:
    source = make(tmp_path / "base", "llama")
    torch.manual_seed(1)
    model = load(str(source))
    for block in model.model.layers:  # some channels carry far more than others
        block.input_layernorm.weight.data[:4] *= 16
        for layer in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            layer.weight.data[:, :4] /= 16
    model.save_pretrained(tmp_path / "skewed", max_shard_size="100KB")
    blocks = stream(tmp_path / "skewed", tmp_path / "out", "W3A16-g32-asym", method=method)
    base, made = logits(load(str(source))), logits(load(str(tmp_path / "out")))
    rounded = load(str(tmp_path / "skewed"), quantization_config=HfQuantConfig("W3A16-g32-asym"))
    assert (made - base).norm() < 0.9 * (logits(rounded) - base).norm()
    assert all(0 < b["error"] < 0.5 for b in blocks)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_experts(name: str, tmp_path: Path, zoo: Any) -> None:
    """Each expert on its own tokens, read from whatever the checkpoint calls them; the starved are rounded and named."""
    source = zoo(name)[1]
    ids = IDS[:2, :24]
    blocks = stream(source, tmp_path / "out", "W4A16-g32", ids)
    model = load(str(tmp_path / "out"))
    seen = [counts for block in blocks for counts in block["experts"].values()]
    assert len(seen) == 4 and all(sum(counts) == 48 * 2 for counts in seen)
    starved = [note for block in blocks for notes in block["notes"].values() for note in notes if "rounded" in note]
    assert len(starved) == sum(count < 32 for counts in seen for count in counts) > 0
    assert starved[0].startswith("expert ") and "tokens: rounded to nearest" in starved[0]
    base = logits(load(str(source)))
    assert (logits(model) - base).norm() < 0.5 * base.norm() and model.hf_quantizer.plan.share > 0.4
    experts = next(m for m in model.modules() if type(m).__name__.startswith("Quant") and hasattr(m, "schemes"))
    assert set(map(str, experts.schemes.values())) == {"W4A16-g32"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-moe"])
@pytest.mark.parametrize("method", ["gptq", "learned"])
def test_from_pretrained_does_the_same(name: str, method: str, tmp_path: Path, zoo: Any) -> None:
    source = zoo(name)[1] if name == "qwen3-moe" else make(tmp_path / "base", name)
    ids = IDS[:, :32]
    stream(source, tmp_path / "out", "W3A16-g32", ids, method=method)
    config = HfQuantConfig("W3A16-g32", method=method, calibration=ids)
    model = load(str(source), quantization_config=config)
    assert torch.equal(logits(model), logits(load(str(tmp_path / "out"))))
    assert len(model.hf_quantizer.blocks) == len(model.model.layers if name != "gpt2" else model.transformer.h)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(str(tmp_path / "saved"))), logits(model))
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert "calibration" not in stored and "calibration_tokens" not in stored


def test_the_recipe_says_what_was_done(tmp_path: Path) -> None:
    """The card prints these steps: none that was not done, and none of the default scheme's alone."""
    from .crashes import FEW, make_model, quantize

    mixed = ("--scheme", "W8A16-g32", "--override", "*.mlp.*=W4A16-g32", "--method", "calibrated")
    assert quantize(make_model(tmp_path / "model", 2), tmp_path / "q", *mixed, *FEW).code == 0
    recipe = json.loads((tmp_path / "q" / "recipe.json").read_text())
    done = [(recipe["schemes"][name], steps) for block in recipe["blocks"] for name, steps in block["steps"].items()]
    four = [steps for scheme, steps in done if scheme == "W4A16-g32"]
    eight = [steps for scheme, steps in done if scheme == "W8A16-g32"]
    assert four and not [steps for steps in eight if "drift" in steps]
    wanted = {name: sum(name in steps for steps in four) for name in ("awq", "drift")}
    scaled = sum("awq" in steps for steps in eight)
    said = {kind: {step["name"]: step["layers"] for step in steps} for kind, steps in recipe["steps"].items()}
    assert said == {
        "4 bits": {n: count for n, count in wanted.items() if count} | {"gptq": 6},
        "8 bits": ({"awq": scaled} if scaled else {}) | {"rtn": 8},
    }
    skipped = {"4 bits": [n for n, count in wanted.items() if not count], "8 bits": [] if scaled else ["awq"]}
    assert recipe["skipped"] == {kind: names for kind, names in skipped.items() if names}


MIXED = {"*.mlp.*": "W3A16-g32", "*.k_proj": "W3A16-g32"}  # k_proj is given what q_proj and v_proj are given


def test_each_layer_is_calibrated_as_its_own_scheme_asks(tmp_path: Path) -> None:
    """Three bits among eight: as well as where all have three bits, from shards and in memory alike, and so recorded."""
    source = make(tmp_path / "base", "llama")
    blocks = stream(source, tmp_path / "out", "W8A16-g32", method="calibrated", overrides=MIXED)
    done = {layer: steps for block in blocks for layer, steps in block["steps"].items()}
    drifted = {layer for layer, steps in done.items() if "drift" in steps}
    assert drifted and all("mlp" in layer or "k_proj" in layer for layer in drifted)
    scaled = [layer for layer, steps in done.items() if "awq" in steps and "self_attn.q_proj" in layer]
    assert all("awq" in done[layer.replace("q_proj", "k_proj")] for layer in scaled)
    model = load(
        str(source),
        quantization_config=HfQuantConfig("W8A16-g32", method="calibrated", overrides=MIXED, calibration=IDS),
    )
    assert torch.equal(logits(model), logits(load(str(tmp_path / "out"))))
    assert [block["steps"] for block in model.hf_quantizer.blocks] == [block["steps"] for block in blocks]
    rounded, base = (
        load(str(source), quantization_config=HfQuantConfig("W8A16-g32", overrides=MIXED)),
        logits(load(str(source))),
    )
    assert (logits(model) - base).norm() < 0.9 * (logits(rounded) - base).norm()


def test_activations_on_disk_and_little_memory_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_quant.solve.block import Block

    source, said = make(tmp_path / "base", "llama"), []
    stream(source, tmp_path / "whole", method="calibrated")
    run, failed = Block._run, []

    def scarce(self: Any, batch: Any, *args: Any) -> Tensor:
        if len(batch.states) > 1:
            failed.append(len(batch.states))
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return run(self, batch, *args)

    monkeypatch.setattr(Block, "_run", scarce)
    (tmp_path / "out").mkdir()
    config = HfQuantConfig("W3A16-g32", method="calibrated")
    settings = Settings(said.append, max_memory=0)
    quantize_streaming(source, config, Calibration(IDS, "ids", []), tmp_path / "work", tmp_path / "out", settings)
    assert failed and any("activations go to disk" in line for line in said)
    assert [p.name for p in (tmp_path / "work").glob("activations-*")] == []
    one, two = logits(load(str(tmp_path / "out"))), logits(load(str(tmp_path / "whole")))
    assert (one - two).norm() < 0.02 * two.norm()  # products of other shapes are summed in another order


class StopError(Exception):
    pass


def stopped(source: Path, out: Path, blocks: int, ids: Tensor, config: HfQuantConfig) -> None:
    """Leave the work on a model after so many blocks."""

    def first(names: Any) -> Any:
        for i, name in enumerate(names):
            if i == blocks:
                raise StopError
            yield name

    out.mkdir(exist_ok=True)
    with pytest.raises(StopError):
        settings = Settings(lambda _: None, first)
        quantize_streaming(source, config, Calibration(ids, "ids", []), out.with_suffix(".work"), out, settings)


def test_a_float32_model_in_memory_does_the_same(tmp_path: Path, biased: Path) -> None:
    """Its parameters are changed where they are, and the float model is followed all the same."""
    load(str(biased), dtype=torch.float32).save_pretrained(tmp_path / "base")
    options, ids = {"method": "hadamard+drift+gptq"}, IDS[:4, :16]
    stream(tmp_path / "base", tmp_path / "out", "W2A16-g16", ids, **options)
    model = load(str(tmp_path / "base"), quantization_config=HfQuantConfig("W2A16-g16", calibration=ids, **options))
    assert torch.equal(logits(model), logits(load(str(tmp_path / "out"))))


INTERRUPTED = {
    "transforms": ("W2A16-g32-asym", {"method": "awq+drift+gptq"}),
    "rotated biases": ("W4A16-g32", {"method": "hadamard+gptq"}),
    "a rotated layer in floating point": (
        "W4A16-g32",
        {"method": "hadamard+drift+rtn", "overrides": {"*.o_proj": None}},
    ),
    "W8A8": ("W8A8", {"method": "calibrated"}),
    "W8A8-static": ("W8A8-static", {"method": "calibrated"}),
    "W8A8 in the native format": ("W8A8", {"format": "native"}),
    "W8A8 with outlier columns": ("W8A8-o5%-columns", {}),
    "one layer of W8A8 among four bits": ("W4A16-g32", {"method": "calibrated", "overrides": {"*.o_proj": "W8A8"}}),
    "outliers": ("W3A16-g32-o2%", {}),
    "learned, with outliers and INT8 activations": (
        "W2A16-g32-asym-o2%",
        {"method": "learned", "overrides": {"*.o_proj": "W4A8-g32", "*.up_proj": "W8A16-g32"}, "epochs": 3},
    ),
}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks with biases everywhere."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(**SMALL | {"num_hidden_layers": 2, "hidden_size": 32}, attention_bias=True, mlp_bias=True)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder := tmp_path_factory.mktemp("biased"))
    return folder


@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interruption_changes_no_byte(name: str, tmp_path: Path, biased: Path) -> None:
    """Whatever the format: what was stored of a block is what both the run that goes on and the undisturbed one go on with."""
    (scheme, options), ids = INTERRUPTED[name], IDS[:4, :16]
    stream(biased, tmp_path / "whole", scheme, ids, **options)
    stopped(biased, tmp_path / "out", 1, ids, HfQuantConfig(scheme, **({"method": "gptq"} | options)))
    stream(biased, tmp_path / "out", scheme, ids, **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
def test_going_on_after_the_config_changed_is_refused(field: str, tmp_path: Path, biased: Path) -> None:
    source, config = shutil.copytree(biased, tmp_path / "base"), HfQuantConfig("W4A16-g32", method="gptq")
    stopped(source, tmp_path / "out", 1, IDS[:4, :16], config)
    stored = json.loads((source / "config.json").read_text())
    place = stored if field in stored else stored["rope_parameters"]
    place[field] *= 10
    (source / "config.json").write_text(json.dumps(stored))
    with pytest.raises(HfQuantError, match=r"other settings \(config\.json\)"):
        stream(source, tmp_path / "out", "W4A16-g32", IDS[:4, :16])


def test_far_blocks_and_starved_experts_are_reported() -> None:
    from hf_quant.hf.calibrate_shards import report

    said: list[str] = []
    parts = [{"block": f"layers.{i}", "error": 0.01 * (50 if i == 3 else 1), "starved": {}} for i in range(6)]
    parts[4] |= {
        "notes": {"layers.4.up": ["no usable Hessian: rounded to nearest"]},
        "experts": {"layers.4.down": [99, 3]},
        "starved": {"layers.4.down": [1]},
    }
    report(parts, said.append)
    assert said == [
        "layers.3: its output error 50.00% is far from the usual 1.00%",
        "layers.4.down expert 1 saw 3 tokens: rounded to nearest",
    ]


TOGETHER = """
import sys, torch
from pathlib import Path
from hf_quant import HfQuantConfig
from hf_quant.data.calibration import Calibration
from hf_quant.hf.blocks import refuse_other_kinds
from hf_quant.hf.calibrate_shards import Settings, quantize_streaming
from hf_quant.solve.ranks import Ranks
source, out, method = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
ids = torch.randint(0, 256, (12, 48), generator=torch.Generator().manual_seed(0))
ranks = Ranks.of_process_group()
assert ranks.world == 2
if ranks.first:
    out.mkdir()
quantize_streaming(source, HfQuantConfig("W3A16-g32", method=method), Calibration(ids, "ids", []), out.with_suffix(".work"),
                   out, Settings(print, ranks=ranks))
"""


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    """Statistics are summed over both and layers divided between them: the result is that of one, up to float sums."""
    source, method = make(tmp_path / "base", "llama"), "calibrated"
    (tmp_path / "together.py").write_text(TOGETHER)
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0", tmp_path / "together.py", source, tmp_path / "two", method]  # fmt: skip
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, "\n".join(x for x in done.stderr.splitlines() if "rank0]" in x)[-3000:]
    stream(source, tmp_path / "one", method=method)
    one, two = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "two")
    assert one.tensors.keys() == two.tensors.keys()
    base, single, both = (logits(load(str(p))) for p in (source, tmp_path / "one", tmp_path / "two"))
    assert (both - single).norm() < 0.2 * (single - base).norm()
    names = [n for n in one.tensors if n.endswith("weight_packed")]
    same = [(one.read(n) == two.read(n)).double().mean().item() for n in names]
    assert min(same) > 0.9


RUN = """
import sys, torch
from pathlib import Path
from tests_streaming import stream
stream(Path(sys.argv[1]), Path(sys.argv[2]))
print("finished")
"""


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL until it gets through: every file is byte for byte that of a run that nobody disturbed."""
    source = make(tmp_path / "base", "llama")
    stream(source, tmp_path / "whole")
    (tmp_path / "tests_streaming.py").write_text(Path(__file__).read_text())
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-c", RUN, str(source), str(tmp_path / "out")]
    draw, kills, seen = random.Random(0), 0, set()
    journal = tmp_path / "out.work" / "journal.jsonl"
    for _ in range(40):
        with subprocess.Popen(call, stdout=subprocess.PIPE, env=environment) as process:
            lines = len(journal.read_bytes().splitlines()) if journal.exists() else 0
            while process.poll() is None and not (journal.exists() and len(journal.read_bytes().splitlines()) > lines):
                time.sleep(0.005)
            time.sleep(draw.random() * 0.01)
            process.send_signal(signal.SIGKILL)
            assert process.stdout is not None
            if b"finished" in process.stdout.read():
                break
            kills += 1
            seen.add(lines)
    assert kills >= 3 and len(seen) >= 3
    assert stream(source, tmp_path / "out") and digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_command(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from hf_quant.cli import main

    model = Path(__file__).parents[2] / "examples" / "ref-llama-16m"
    if not model.is_dir():
        pytest.skip("no examples beside the tests")
    call = [
        "quantize",
        model,
        "-o",
        tmp_path / "q",
        "--method",
        "gptq",
        "--scheme",
        "W4A16-g128",
        "--dtype",
        "float32",
    ]
    few = ["--calibration-tokens", 8192, "--max-tokens", 4096, "--json"]
    text = ["--calibration", model / "heldout.txt"]
    result = CliRunner().invoke(main, [str(a) for a in (*call, *few, *text)])
    assert result.exit_code == 1 and "also occur in the calibration or training data" in result.stderr
    result = CliRunner().invoke(main, [str(a) for a in (*call, *few, "--device", "gpu", "--no-eval")])
    assert result.exit_code == 2 and "'gpu'" in result.stderr
    result = CliRunner().invoke(main, [str(a) for a in (*call, *few, "--max-kl", "0.02")])
    assert result.exit_code == 0, result.output
    assert [p.name for p in tmp_path.iterdir()] == ["q"], "the work folder is gone"
    recipe = json.loads((tmp_path / "q" / "recipe.json").read_text())
    assert recipe["calibration"]["name"] == "calibration.txt" and recipe["calibration"]["context"] == 512
    assert len(recipe["blocks"]) == 8 and recipe["method"] == "gptq"
    assert json.loads(result.stdout)["results"][0]["quality"]["metrics"]["kl"]["value"] < 0.015
