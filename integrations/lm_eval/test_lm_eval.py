"""The command ``lm_eval --model hf`` on every format that is written here: the same numbers, from our layers."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from integrations.conftest import REFERENCE, Saved, cell, of_ours, record

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: integrations/try lm_eval")
FORMATS = ["native", "compressed-tensors", "gptq", "awq"]
TASK = """
task: heldout
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: brier_score}}]
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which of four endings belongs to the start of a document; of documents that the model never saw."""
    folder = tmp_path_factory.mktemp("task")
    texts = [text.strip() for text in (REFERENCE / "heldout.txt").read_text().split("<|endoftext|>")]
    texts = [text for text in texts if len(text) > 400][:24]
    with (folder / "heldout.jsonl").open("w") as file:
        for at, text in enumerate(texts):
            endings = [texts[(at + step) % len(texts)][200:300] for step in range(4)]
            file.write(json.dumps({"start": text[:200], "endings": endings, "label": 0}) + "\n")
    (folder / "heldout.yaml").write_text(TASK.format(file=folder / "heldout.jsonl"))
    return folder


def evaluated(model: Path, task: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, float], Any]:
    """What the command finds, and the model that it made."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.models.huggingface import HFLM

    made: list[Any] = []
    create = HFLM._create_model

    def keeping(self: Any, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        made.append(self._model)

    arguments = (
        f"lm_eval --model hf --model_args pretrained={model} --tasks heldout --include_path {task} --device cpu "
    )
    monkeypatch.setattr(HFLM, "_create_model", keeping)
    monkeypatch.setattr(sys, "argv", [*arguments.split(), "--batch_size", "8", "--output_path", str(out)])
    cli_evaluate()
    (file,) = out.rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["heldout"]
    return {name: value for name, value in found.items() if isinstance(value, float)}, made[0]


@pytest.fixture(scope="module")
def native(saved: Saved, task: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch:
        return evaluated(saved("W4A16-g32-asym"), task, tmp_path_factory.mktemp("native"), patch)[0]


@pytest.mark.parametrize("to", FORMATS)
def test_the_same_numbers_from_our_layers(
    saved: Saved, task: Path, tmp_path: Path, native: dict[str, float], to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, model = evaluated(saved("W4A16-g32-asym", to), task, tmp_path, monkeypatch)
    assert of_ours(model) == 8 * 7
    assert numbers == native
    assert numbers["acc,none"] > 0.5, "it has learnt something"
    seen = f"accuracy {numbers['acc,none']:.3f}, Brier score {numbers['brier_score,none']:.4f}"
    cell("W4A16-g32-asym", to, f"{seen}, from {of_ours(model)} layers of ours")
    record(to, **numbers)


def test_the_example(
    saved: Saved,
    task: Path,
    native: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["evaluate.py", saved("W4A16-g32-asym"), REFERENCE, task / "heldout.yaml"]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "evaluate.py"))
    quantized, base = capsys.readouterr().out.strip().splitlines()[-2:]
    assert f"acc {native['acc,none']:.4f}" in quantized and str(REFERENCE) in base
