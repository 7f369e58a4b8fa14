"""The commands on models that are certain, wide, full of outliers, or more than a decoder of one kind of layer."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hf_quant.cli import main
from tests import yardsticks

MEASURED = ("--context", "64", "--max-tokens", "1000", "-q")
FEW = (*MEASURED, "--calibration-tokens", "1024")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``folders(kind)``: a yardstick, made once."""
    root = tmp_path_factory.mktemp("yardsticks")
    return lambda kind: root / kind if (root / kind).exists() else yardsticks.make(kind, root / kind)


def run(*args: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.mark.parametrize("method", ["rtn", "calibrated"])
@pytest.mark.parametrize("kind", ["peaked", "outliers", "moe"])
def test_fewer_bits_cost_more_and_little_at_eight(folders: Any, tmp_path: Path, kind: str, method: str) -> None:
    schemes = ("--scheme", "W8A16-g32", "--scheme", "W4A16-g32")
    run(
        "quantize",
        folders(kind),
        "-o",
        tmp_path / "out",
        *schemes,
        "--method",
        method,
        *(MEASURED if method == "rtn" else FEW),
    )
    costs = []
    for scheme in schemes[1::2]:
        out = tmp_path / "out" / scheme
        results = json.loads((out / "results.json").read_text())
        costs.append(results["quality"]["metrics"]["kl"]["value"])
        run("verify", out, "-q")
    assert 0 <= costs[0] < (0.05 if method == "rtn" else 0.001) and costs[0] < costs[1] < 5


def test_learned_codes_lose_less_than_calibrated_ones(folders: Any, tmp_path: Path) -> None:
    """On another text: on the one that was calibrated on, `calibrated` has seen the windows that `learned` holds out."""
    costs = {}
    for method in ("calibrated", "learned"):
        args = ("--method", method, *(("--epochs", 8, "--no-tune") if method == "learned" else ()))
        run(
            "quantize",
            folders("peaked"),
            "-o",
            tmp_path / method,
            "--scheme",
            "W3A16-g32-asym",
            *args,
            *FEW,
            "--calibration-tokens",
            4096,
        )
        results = json.loads((tmp_path / method / "results.json").read_text())
        costs[method] = results["quality"]["metrics"]["kl"]["value"]
    assert costs["learned"] < 0.7 * costs["calibrated"]


@pytest.mark.parametrize("kind", ["outliers", "wide"])
def test_int8_activations_are_calibrated_at_every_width(folders: Any, tmp_path: Path, kind: str) -> None:
    args = ("quantize", folders(kind), "-o", tmp_path / "q", "--scheme", "W8A8", "--method", "calibrated", *FEW)
    run(*args)
    results = json.loads((tmp_path / "q" / "results.json").read_text())
    assert results["quality"]["metrics"]["kl"]["value"] < 0.1


@pytest.mark.parametrize("method", ["rtn", "calibrated"])
def test_an_encoder_decoder(method: str, folders: Any, tmp_path: Path) -> None:
    args = (
        "quantize",
        folders("seq2seq"),
        "-o",
        tmp_path / "q",
        "--scheme",
        "W4A16-g32",
        "--eval",
        "--max-tokens",
        512,
        "-q",
    )
    run(*args, "--method", method, *(("--calibration-tokens", 1024) if method == "calibrated" else ()))
    run("verify", tmp_path / "q", "-q")
    quality = json.loads((tmp_path / "q" / "results.json").read_text())["quality"]
    assert quality["kind"] == "seq2seq" and 0 < quality["metrics"]["kl"]["value"] < 1
    run("card", "build", tmp_path / "q")
    assert "AutoModelForSeq2SeqLM" in (tmp_path / "q" / "README.md").read_text()
