"""A small chat model that thinks, through the commands: messages are measured and calibrated on, and its endings are seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import hf_quant
import hf_quant.publish
from hf_quant.cli import main
from hf_quant.hf import HfQuantConfig
from hf_quant.hf.calibrate_loaded import data_for
from tests import yardsticks

SILENT = ("--chat-template-kwargs", "enable_thinking=false")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return yardsticks.make("chat", tmp_path_factory.mktemp("chat"), torch.float32)


@pytest.fixture(scope="module")
def broken(chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with the row of the output head that ends a thought at half its strength."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(chat, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][262] *= 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def run(*args: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def evaluated(model: Path, chat: Path, *args: Any) -> dict[str, Any]:
    record = json.loads(
        run("eval", model, "--base", chat, "--text", chat / "heldout.jsonl", "--context", 64, *args, "--json").stdout
    )
    metrics: dict[str, Any] = record["quality"]["metrics"]
    return metrics


def test_a_model_that_does_not_stop_thinking(broken: Path, chat: Path) -> None:
    metrics = evaluated(broken, chat)
    change = metrics["end_of_thought_change"]
    assert change["value"] < -0.1 and change["high"] < 0 and change["positions"] == 59
    assert metrics["end_of_thought"]["value"] < metrics["end_of_thought_base"]["value"] - 0.1
    assert abs(metrics["stop_change"]["value"]) < 0.05 and metrics["stop"]["positions"] > 100
    stored = json.loads((broken / "results.json").read_text())
    schema = Path(hf_quant.publish.__file__).parent / "schemas" / "results.schema.json"
    jsonschema.validate(stored, json.loads(schema.read_text()))
    assert stored["quality"]["metrics"] == metrics
    shown = run("eval", broken, "--base", chat, "--text", chat / "heldout.jsonl", "--context", 64).stdout
    assert "end_of_thought_change (59 tokens)" in " ".join(shown.split())


def test_arguments_of_the_template_decide_what_is_measured(broken: Path, chat: Path) -> None:
    silent = evaluated(broken, chat, *SILENT)
    assert "end_of_thought" not in silent and silent["stop"]["positions"] > 100
    done = hf_quant.evaluate(
        broken,
        base=chat,
        text=str(chat / "heldout.jsonl"),
        context=64,
        chat_template_kwargs={"enable_thinking": False},
    )
    assert done.quality.metrics["stop"].value == pytest.approx(silent["stop"]["value"])


def test_calibrated_on_messages(chat: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    given = ("--scheme", "W4A16-g32", "--method", "gptq", "--calibration", chat / "calibration.jsonl", "--context", 64)
    record = json.loads(
        run(
            "quantize",
            chat,
            "-o",
            out,
            *given,
            "--text",
            chat / "heldout.jsonl",
            *SILENT,
            "--prompt",
            "3 fir?",
            "--json",
        ).stdout
    )
    recipe = json.loads((out / "recipe.json").read_text())
    schema = Path(hf_quant.publish.__file__).parent / "schemas" / "recipe.schema.json"
    jsonschema.validate(recipe, json.loads(schema.read_text()))
    assert recipe["calibration"]["chat_template_kwargs"] == {"enable_thinking": False}
    answer = record["generated"].removeprefix("user\n3 fir?\nassistant\n<think></think>")
    assert answer != record["generated"] and len(answer) < 10, "it was asked, answered and stopped"
    assert "--chat-template-kwargs '{\"enable_thinking\": false}'" in run("card", "show", out).stdout
    config = HfQuantConfig(
        "W4A16-g32",
        method="gptq",
        calibration=str(chat / "calibration.jsonl"),
        chat_template_kwargs={"enable_thinking": False},
    )
    model = hf_quant.load(str(chat), quantization_config=config)
    assert data_for(config, model).to_dict()["sha256"] == recipe["calibration"]["sha256"], "in memory as from shards"
    said = " ".join(
        run("quantize", chat, "-o", tmp_path / "p", *given, "--text", chat / "heldout.jsonl").stderr.split()
    )
    of = json.loads((tmp_path / "p" / "results.json").read_text())["quality"]["metrics"]
    shares = [f"{of[name]['value']:.1%}" for name in ("end_of_thought", "end_of_thought_base")]
    assert (
        f"where the text ends a thought (59 tokens), the model does with {shares[0]}, its base with {shares[1]}"
        in said
    )
    other = json.loads((tmp_path / "p" / "recipe.json").read_text())["calibration"]
    assert "chat_template_kwargs" not in other and other["sha256"] != recipe["calibration"]["sha256"]


def test_messages_that_were_calibrated_on_are_not_measured_on(chat: Path, tmp_path: Path) -> None:
    words = ("quantize", chat, "-o", tmp_path / "q", "--method", "gptq", "--calibration", chat / "calibration.jsonl")
    result = run(*words, "--text", chat / "calibration.jsonl", code=1)
    assert "60 of 60 paragraphs of the evaluation text also occur in the calibration or training data" in result.stderr
    run(*words, "--text", chat / "calibration.jsonl", "--allow-overlap", "--context", 64)
    result = run("eval", tmp_path / "q", "--base", chat, "--text", chat / "calibration.jsonl", code=1)
    assert "60 of 60 paragraphs" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--text", "heldout.jsonl", "--chat-template-kwargs", "enable_thinkin=false"),
            "did you mean enable_thinking?",
        ),
        (("--text", "heldout.jsonl", *SILENT, *SILENT), "enable_thinking is given twice"),
        (("--text", "plain.txt", *SILENT), "nothing here applies a chat template"),
        (SILENT, "nothing here applies a chat template"),
        (("--text", "plain.jsonl", *SILENT), "none of the texts holds messages"),
    ],
)
def test_refused_at_once(words: tuple[str, ...], said: str, chat: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text(yardsticks.text(0, 30))
    (tmp_path / "plain.jsonl").write_text(json.dumps({"text": yardsticks.text(0, 30)}))
    shutil.copy(chat / "heldout.jsonl", tmp_path)
    files = [str(tmp_path / word) if word.endswith(("txt", "jsonl")) else word for word in words]
    result = CliRunner().invoke(main, ["quantize", str(chat), "-o", str(tmp_path / "q"), *files])
    assert result.exit_code in (1, 2) and said in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "q").exists()


def test_other_commands(chat: Path, broken: Path, tmp_path: Path) -> None:
    """Trained, repaired, walked down the ladder and reported on, all by messages."""
    of = ("--context", 64, *SILENT)
    trained = (
        "train",
        chat,
        "-o",
        tmp_path / "t",
        "--data",
        chat / "calibration.jsonl",
        "--steps",
        1,
        "--train-context",
        64,
    )
    run(*trained, "--text", chat / "heldout.jsonl", *of)
    text = json.loads((tmp_path / "t" / "recipe.json").read_text())["training"]["text"]
    assert text["chat_template_kwargs"] == {"enable_thinking": False}
    assert "--chat-template-kwargs" in run("card", "show", tmp_path / "t").stdout
    result = run(*trained, "--overwrite", "--text", chat / "calibration.jsonl", *of, code=1)
    assert "is the text that is measured on" in result.stderr
    run(
        "repair",
        tmp_path / "t",
        "-o",
        tmp_path / "r",
        "--base",
        chat,
        "--calibration",
        chat / "calibration.jsonl",
        *SILENT,
    )
    noted = json.loads((tmp_path / "r" / "conversion.json").read_text())["calibration"]
    assert noted["chat_template_kwargs"] == {"enable_thinking": False}
    walked = ("ladder", chat, "-o", tmp_path / "l", "--max-kl", 5, "--text", chat / "heldout.jsonl", *of)
    record = json.loads(run(*walked, "--trial-text", chat / "calibration.jsonl", "--json").stdout)
    assert "end_of_thought" not in record["rungs"][1]["quality"]["metrics"]
    page = tmp_path / "page.html"
    run("report", tmp_path / "t", "-o", page, "--base", chat, "--prompt", "3 fir?", *SILENT)
    assert "3." in page.read_text()
    result = run("report", tmp_path / "t", "-o", page, *SILENT, code=2)
    assert "--samples and --prompt do" in result.stderr
