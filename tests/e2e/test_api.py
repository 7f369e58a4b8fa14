"""The Python API: the same results as the commands, in a form that a notebook can use."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import hf_quant as hq
from hf_quant import _plugins
from hf_quant.cli import main
from hf_quant.errors import OptionError
from hf_quant.jobs.results import Result

FUNCTIONS = {"quantize": "quantize", "evaluate": "eval", "ladder": "ladder", "convert": "convert", "verify": "verify",
             "push": "push", "plan": "plan", "train": "train", "repair": "repair",
             "generate": "generate"}  # fmt: skip
TERMINAL = {"as_json", "quiet", "yes"}  # options of commands that are about a terminal
PYTHON = {"progress", "say", "confirm"}
SCHEME = "W4A16-g32"


def printed(*args: Any) -> Any:
    """What a command prints with ``--json``."""
    result = CliRunner().invoke(main, [*map(str, args), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def timeless(record: Any, *names: str) -> Any:
    """A record without what differs from run to run."""
    if isinstance(record, dict):
        return {k: timeless(v, *names) for k, v in record.items() if k not in ("seconds", "speed", "date", *names)}
    return [timeless(item, *names) for item in record] if isinstance(record, list) else record


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> hq.QuantizeResult:
    """The tiny model in 4 bits, by the function."""
    return hq.quantize(tiny, tmp_path_factory.mktemp("api") / "q", scheme=SCHEME, prompt="some")


def test_quantize(tiny: Path, made: hq.QuantizeResult, tmp_path: Path) -> None:
    record = printed("quantize", tiny, "-o", tmp_path / "q", "--scheme", SCHEME, "--prompt", "some")
    assert timeless(made.to_dict()) == timeless(record)
    (model,) = made.results
    assert model.folder == made.folder and (made.folder / "model.safetensors").stat().st_size == model.bytes
    assert model.quality is not None and model.quality.metrics["kl"].value > 0 and made.passed
    assert hq.load(str(made.folder)).can_generate()


def test_evaluate(tiny: Path, made: hq.QuantizeResult) -> None:
    done = hq.evaluate(made.folder, base=tiny, context=64, max_kl=99)
    assert done.to_dict() == printed("eval", made.folder, "--base", tiny, "--context", 64, "--max-kl", 99)
    assert done.passed and done.main == done.quality.metrics["kl"] and len(done.layers) == 14


def test_plan(tiny: Path) -> None:
    asked = hq.plan(tiny, scheme=SCHEME, target="mlx").plans[0].served
    assert asked is not None and asked.to == "mlx" and not asked.verdict.refused
    done = hq.plan(tiny, scheme=["W8A16-g32", SCHEME], override={"*.mlp.*": "float"})
    assert done.to_dict() == printed(
        "plan", tiny, "--scheme", "W8A16-g32", "--scheme", SCHEME, "--override", "*.mlp.*=float"
    )
    assert done.plans[0].bytes_after > done.plans[1].bytes_after


def test_convert_and_verify(made: hq.QuantizeResult, tmp_path: Path) -> None:
    done = hq.convert(made.folder, tmp_path / "a", to="native")
    record = printed("convert", made.folder, "--to", "native", "-o", tmp_path / "b")
    assert timeless(done.to_dict(), "folder") == timeless(record, "folder")
    checked = hq.verify(done.folder)
    assert checked.to_dict() == printed("verify", done.folder) and checked.layers_quantized == 14


def test_ladder(tiny: Path, tmp_path: Path) -> None:
    limits = {"max_size": "1MB", "group_size": 32, "max_tokens": 256}
    done = hq.ladder(tiny, tmp_path / "a" / "q", **limits)
    options = [text for name, value in limits.items() for text in (f"--{name.replace('_', '-')}", value)]
    assert timeless(done.to_dict()) == timeless(printed("ladder", tiny, "-o", tmp_path / "b" / "q", *options))
    assert done.passed and done.chosen == "W8A16-g32" and done.folder == tmp_path / "a" / "q"
    assert [rung.name for rung in done.rungs] == ["base in bf16", "W8A16-g32"]


def test_a_missed_gate_is_a_result(tiny: Path, tmp_path: Path) -> None:
    done = hq.quantize(tiny, tmp_path / "q", scheme=SCHEME, max_kl=1e-9)
    assert not done.passed and done.folder == tmp_path / "q-failed" and not (tmp_path / "q").exists()
    assert "gate missed: KL" in repr(done)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, o: hq.quantize(m, o, scheme=SCHEME, bits=4), "give one of them"),
        (lambda m, o: hq.quantize(m, o, bits=2), "need a gate"),
        (lambda m, o: hq.quantize(m, o, dtype="int4"), "float32"),
        (lambda m, o: hq.quantize(m, o, max_shard_size="big"), "not a size"),
        (lambda m, o: hq.quantize(m, o, max_kl=-1.0), "max_kl"),
        (lambda m, o: hq.quantize(m, o, calibration="x.jsonl"), "no such file"),
        (lambda m, o: hq.evaluate(m, kv_cache="int2"), "int8, int4"),
        (lambda m, o: hq.evaluate(m, context=8, stride=9), "more than"),
        (lambda m, o: hq.evaluate(m, max_tokens=0), "max-tokens 0: must be at least 1"),
        (lambda m, o: hq.evaluate(m, device="cudaa"), "did you mean cuda"),
        (lambda m, o: hq.evaluate(m, base_dtype="int8"), "float32, bfloat16, float16"),
        (lambda m, o: hq.evaluate(m, base_dtype="bf16"), "does not say what it was made from"),
        (lambda m, o: hq.ladder(m, o), "what to keep"),
        (lambda m, o: hq.ladder(m, o, max_kl=1, trial_tokens=0), "trial-tokens 0: must be at least 1"),
        (lambda m, o: hq.convert(m, o, to="ggml"), "native"),
        (lambda m, o: hq.push(m, "a/b", create_pr=True, tag="v1"), "goes alone"),
        (lambda m, o: hq.plan(m / "nowhere" / "at" / "all"), "no such folder"),
    ],
)
def test_wrong_options_are_errors(call: Any, said: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(hq.HfQuantError, match=said):
        call(tiny, tmp_path / "q")
    assert not list(tmp_path.iterdir())


def test_nothing_is_printed(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    steps, lines = [], []

    def bar(items: Iterable[Any], step: str) -> Iterable[Any]:
        steps.append(step)
        return items

    hq.quantize(tiny, tmp_path / "a", scheme=SCHEME, max_tokens=64)
    hq.quantize(tiny, tmp_path / "b", scheme=SCHEME, max_tokens=64, progress=bar, say=lines.append)
    assert capfd.readouterr() == ("", "")
    assert set(steps) == {"measuring"} and any("in floating point: lm_head" in line for line in lines)


def test_results_are_readable(made: hq.QuantizeResult, tiny: Path) -> None:
    planned = hq.plan(tiny, scheme=SCHEME)
    for done in (made, *made.results, planned, hq.verify(made.folder)):
        text, html = repr(done), done._repr_html_()
        assert len(text) < 2000 and "{" not in text and all(map(str.isprintable, text.split("\n"))), text
        assert html.count("<td>") >= 2 and "<script" not in html
        with pytest.raises(dataclasses.FrozenInstanceError):
            done.model = "other"  # type: ignore[misc, union-attr]
    assert "MB" in repr(made) and SCHEME in repr(made) and "held-out tokens of heldout.txt" in repr(made)
    hostile = dataclasses.replace(planned, model="<script>\x1b[31m")
    assert "<script" not in hostile._repr_html_() and "\x1b" not in repr(hostile)


def test_all_is_the_public_surface() -> None:
    assert hq.__all__ == sorted(name for names in hq._HOMES.values() for name in names)
    assert set(dir(hq)) == {*hq.__all__, "__version__"}
    tree = ast.parse(Path(hq.__file__).read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = {
        (node.module, alias.name) for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imports == {(f"hf_quant.{home}", name) for home, names in hq._HOMES.items() for name in names}
    for name in hq.__all__:
        public = getattr(hq, name)
        assert inspect.getdoc(public), name
        if inspect.isclass(public) and issubclass(public, Result):
            described = inspect.getdoc(public).partition("Attributes:")[2]  # type: ignore[union-attr]
            assert all(f"{field.name}: " in described for field in dataclasses.fields(public)), name  # type: ignore[arg-type]
        elif not inspect.isclass(public):
            described = inspect.getdoc(public).partition("Args:")[2]  # type: ignore[union-attr]
            for parameter in inspect.signature(public).parameters:
                assert f"{parameter}: " in described or name == "prepare_for_training", (name, parameter)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_keywords_are_the_options_of_the_command(name: str) -> None:
    command = _plugins.load("cli", FUNCTIONS[name]).COMMAND
    options = {param.name: param.to_info_dict().get("default") for param in command.params}
    keywords = {key: value.default for key, value in inspect.signature(getattr(hq, name)).parameters.items()}
    assert options.keys() - TERMINAL == keywords.keys() - PYTHON
    for option in options.keys() - TERMINAL:
        if keywords[option] is not inspect.Parameter.empty:
            assert (options[option] or None) == (keywords[option] or None), option


def test_types_have_many_names(tiny: Path, tmp_path: Path) -> None:
    assert hq.quantize(tiny, tmp_path / "q", scheme=SCHEME, dtype=torch.bfloat16, eval=False).folder.is_dir()
    with pytest.raises(OptionError, match="bfloat16"):
        hq.quantize(tiny, tmp_path / "q", dtype=torch.int8)


def test_functions_are_found_without_torch() -> None:
    code = (
        "import sys, hf_quant as hq\n"
        "hq.quantize, hq.evaluate, hq.ladder, hq.push, hq.plan, hq.QuantizeResult\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("name", "hint"), [("eval", "evaluate"), ("report", "python -m hf_quant.cli report")])
def test_a_command_without_a_function_says_where_it_is(name: str, hint: str) -> None:
    with pytest.raises(AttributeError, match=hint):
        getattr(hq, name)
