"""The commands, as a user calls them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import hf_quant
from hf_quant.cli import main

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a byte-level tokenizer and a held-out text beside it."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("cli") / "tiny"
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
    return out


def run(*args: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_quantize_one_scheme(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    result = run(
        "quantize", folder, "-o", out, "--bits", 4, "--group-size", 32, "--asym", "--prompt", "some", "--json"
    )
    record = json.loads(result.stdout)
    (row,) = record["results"]
    assert (
        row["scheme"] == "W4A16-g32-asym"
        and row["quality"]["metrics"]["kl"]["value"] > 0
        and record["generated"].startswith("some")
    )
    assert row["bytes"] == (out / "model.safetensors").stat().st_size
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["source"] == {"model": "tiny", "revision": None} and str(tmp_path) not in json.dumps(recipe)
    assert recipe["schemes"]["model.layers.0.mlp.up_proj"] == "W4A16-g32-asym" and "lm_head" in recipe["left"]
    assert json.loads((out / "results.json").read_text())["quality"] == row["quality"]
    assert "in floating point: lm_head" in result.stderr
    assert hf_quant.load(str(out)).can_generate()
    assert [p.name for p in tmp_path.iterdir()] == ["q"], "no stage is left"


def test_quantize_several_schemes(folder: Path, tmp_path: Path) -> None:
    schemes = [arg for bits in (8, 4, 3, 2) for arg in ("--scheme", f"W{bits}A16-g32")]
    record = json.loads(run("quantize", folder, "-o", tmp_path / "all", *schemes, "--max-kl", 99, "--json").stdout)
    sizes = [row["bits_per_weight"] for row in record["results"]]
    costs = [row["quality"]["metrics"]["kl"]["value"] for row in record["results"]]
    assert sizes == sorted(sizes, reverse=True) and costs == sorted(costs)
    assert {p.name for p in (tmp_path / "all").iterdir()} == {f"W{bits}A16-g32" for bits in (8, 4, 3, 2)}
    table = run("quantize", folder, "-o", tmp_path / "t", "--group-size", 32, "--no-eval").stdout
    assert table.splitlines()[0].startswith("scheme") and "W4A16-g32" in table
    assert run("quantize", folder, "-o", tmp_path / "u", "--group-size", 32, "-q").stdout == f"{tmp_path / 'u'}\n"


def test_eval_inspect_plan_doctor(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    run("quantize", folder, "-o", out, "--scheme", "W4A16-g32", "--format", "native", "--no-eval", "-q")
    assert "say where it is with --base" in run("eval", out, code=1).stderr
    record = json.loads(run("eval", out, "--base", folder, "--context", 64, "--json").stdout)
    quality = record["quality"]
    assert quality["metrics"]["kl"]["value"] > 0 and quality["context"] == 64
    assert json.loads((out / "results.json").read_text())["quality"] == quality
    seen = json.loads(run("inspect", out, "--json").stdout)
    assert seen["format"] == "hf_quant native" and seen["bits"] == 4 and seen["layers_quantized"] == 14
    plain = json.loads(run("inspect", folder, "--json").stdout)
    assert plain["format"] == "not quantized" and plain["layers_quantized"] == 0
    (plan,) = json.loads(run("plan", folder, "--scheme", "W2A16-g32", "--json").stdout)["plans"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert plan["parameters"] == model.num_parameters() and len(plan["advice"]) == 2
    assert plan["bytes_before"] == 4 * model.num_parameters()
    assert "loads_without_import" in run("doctor").stdout


def test_a_tied_model_is_counted_once(zoo: Any) -> None:
    _, path = zoo("llama-tied")
    (plan,) = json.loads(run("plan", path, "--group-size", 32, "--json").stdout)["plans"]
    assert plan["parameters"] == AutoModelForCausalLM.from_pretrained(path).num_parameters()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--bits", "5"], 2, "bits must be one of"),
        (["--scheme", "W4"], 2, "not a scheme"),
        (["--group-size", "48"], 2, "group_size"),
        (["--override", "nothing=W8A16-g32"], 2, "matches no layer"),
        (["--override", "lm_head"], 2, "GLOB=SCHEME"),
        (["--format", "gguf"], 2, "format"),
        (["--method", "magic"], 2, "method"),
        (["--text", "/nowhere.txt"], 1, "no such file"),
        (["--nonsense"], 2, "No such option"),
    ],
)
def test_nothing_is_left_after_an_error(folder: Path, tmp_path: Path, args: list[str], code: int, said: str) -> None:
    result = run("quantize", folder, "-o", tmp_path / "q", *args, code=code)
    assert said in result.stderr and not result.stdout and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert "overwrite" in run("quantize", folder, "-o", tmp_path, "--group-size", 32, "--no-eval", code=1).stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_damaged_source(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:-9] if file.suffix == ".safetensors" else content)
    for command in (["quantize", "-o", tmp_path / "q"], ["inspect"], ["plan"]):
        assert "model.safetensors" in run(command[0], broken, *command[1:], code=1).stderr
    assert not (tmp_path / "q").exists()


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from hf_quant.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("doctor", "eval", "inspect", "plan", "quantize"):
        assert command in done.stdout


@pytest.mark.skipif(not (REPO / "examples").is_dir(), reason="no examples beside the tests")
def test_the_example_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, REPO / "examples" / "quantize.py", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.startswith("The following functions are"), done.stderr
