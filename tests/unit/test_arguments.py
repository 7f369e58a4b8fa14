"""What is wrong with the arguments is said at once, before torch is imported, in a sentence that names what works."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from click.testing import CliRunner
from hf_quant.cli import main
for args in json.loads(sys.stdin.read()):
    result = CliRunner().invoke(main, args)
    print(json.dumps([result.exit_code, result.stderr, "torch" in sys.modules or "transformers" in sys.modules]))
"""
CASES = [  # command and options, exit code, what is said
    ("quantize M -o Q --scheme W4A16-g32 --bits 4", 2, "give one of them"),
    ("quantize M -o Q --scheme W4A16-g32 --asym", 2, "--asym"),
    ("quantize M -o Q --scheme W4A16-g32 --scheme W4A16-g32", 2, "twice"),
    ("quantize M -o Q --scheme W4", 2, "not a scheme"),
    ("quantize M -o Q --bits 5", 2, "bits must be one of"),
    ("quantize M -o Q --method magic", 2, "there is awq, calibrated"),
    ("quantize M -o Q --dtype int4", 2, "auto, float32, bfloat16, float16"),
    ("quantize M -o Q --override lm_head", 2, "GLOB=SCHEME"),
    ("quantize M -o Q --override lm_head=W9", 2, "not a scheme"),
    ("quantize M -o Q --bits 2", 2, "need a gate"),
    ("quantize M -o Q --max-kl 1 --no-eval", 2, "cannot go with --no-eval"),
    ("quantize M -o Q --dataset c4 --no-eval", 2, "cannot go with --no-eval"),
    ("quantize M -o Q --text /nowhere.txt", 1, "no such file"),
    ("quantize M -o Q --calibration /nowhere.txt --method gptq", 1, "no such file"),
    ("quantize M -o Q --calibration-tokens 0 --method gptq", 2, "0 is not in the range"),
    ("quantize M -o Q --min-top1 95", 2, "write it with a percent sign"),
    ("quantize M -o Q --min-top1 101%", 2, "more than 100%"),
    ("quantize M -o Q --max-ppl-increase 1", 2, "write it with a percent sign"),
    ("quantize M -o Q --max-ppl-increase -1%", 2, "not a share"),
    ("quantize M -o Q --max-kl nan", 2, "not a number"),
    ("quantize M -o Q --max-memory 4K --max-shard-size big", 2, "'big' is not a size"),
    ("quantize M -o Q --context 1", 2, "range"),
    ("quantize M -o Q --context 64 --stride 65", 2, "more than --context"),
    ("quantize M -o Q --text a --dataset b", 2, "give one of them"),
    ("ladder M -o Q --max-size 4X", 2, "4GB"),
    ("ladder M -o Q --max-kl 0.1 --method magic", 2, "there is awq, calibrated"),
    ("plan M --scheme W4A16-g32 --group-size 64", 2, "--group-size"),
    ("plan model.gguf", 1, "GGUF"),
    ("plan model.safetensors", 1, "name the folder that holds it"),
    ("plan adapter", 1, "merge_and_unload"),
    ("plan diffusers", 1, "text_encoder"),
    ("plan ggufs", 1, "GGUF"),
    ("plan empty", 1, "no config.json"),
    ("plan ./nowhere/at/all", 1, "no such folder"),
    ("inspect adapter", 1, "adapter"),
    ("eval M --base adapter", 1, "adapter"),
    ("bench M --dtype double", 2, "float32"),
    (
        "quantize M -o Q --format gguf",
        2,
        "auto, native, compressed_tensors",
    ),  # last: formats say themselves which are saved, and need torch
]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Things that are no models, and one that might be."""
    for name in (
        "M/config.json",
        "adapter/adapter_config.json",
        "diffusers/model_index.json",
        "diffusers/text_encoder/config.json",
        "ggufs/model.gguf",
        "model.gguf",
        "model.safetensors",
        "empty/x",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")  # fmt: skip
    return tmp_path


def test_arguments_are_checked_before_torch_is_imported(folders: Path) -> None:
    calls = json.dumps([call.split() for call, _, _ in CASES])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=calls, cwd=folders, capture_output=True, text=True, check=True
    )
    for (call, code, said), line in zip(CASES, done.stdout.splitlines(), strict=True):
        exit_code, message, imported = json.loads(line)
        assert exit_code == code and said in message and "Traceback" not in message, (call, exit_code, message)
        assert not imported or "--format" in call, call  # formats say themselves whether they can be saved


@pytest.mark.parametrize(
    ("value", "bytes_"),
    [("4GB", 4_000_000_000), ("2GiB", 2**31), ("4G", 4_000_000_000), ("4k", 4000), ("1.5 MB", 1_500_000), ("17", 17)],
)
def test_sizes(value: str, bytes_: int) -> None:
    from hf_quant.cli._types import Size

    assert Size().convert(value, None, None) == bytes_


@pytest.mark.parametrize(("value", "share"), [("1%", 0.01), ("0.01", 0.01), ("100%", 1.0), ("150%", 1.5)])
def test_shares(value: str, share: float) -> None:
    from hf_quant.cli._types import Share

    assert Share().convert(value, None, None) == pytest.approx(share)


@pytest.mark.parametrize(
    ("value", "name"), [("fp16", "float16"), ("bf16", "bfloat16"), ("compressed-tensors", "compressed_tensors")]
)
def test_names_may_be_spelled_in_more_than_one_way(value: str, name: str) -> None:
    from hf_quant.cli._types import DTYPE, Format

    assert (Format() if "tensors" in value else DTYPE).convert(value, None, None) == name
