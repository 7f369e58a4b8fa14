"""What a shell is offered, asked as bash asks."""

from __future__ import annotations

import pytest
from click.shell_completion import BashComplete

from hf_quant.cli import main


def offered(line: str) -> list[str]:
    words = line.split(" ")
    shell = BashComplete(main, {}, "hf-quant", "_HF_QUANT_COMPLETE")
    return [item.value if item.type == "plain" else item.type for item in shell.get_completions(words[:-1], words[-1])]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lad", "ladder"), ("quantize --sch", "--scheme"), ("quantize --scheme w2", "W2A16-g64-asym"), ("quantize --scheme q4", "Q4_K"),
        ("quantize --method cal", "calibrated"), ("quantize --format com", "compressed-tensors"),
        ("convert --to gp", "gptq"), ("quantize ex", "dir"), ("report o", "dir"), ("quantize --dtype bf", "bfloat16"),
    ],
)  # fmt: skip
def test_offered(line: str, expected: str) -> None:
    assert expected in offered(line)
    assert all(word in ("dir", "file") or word.lower().startswith(line.split()[-1].lower()) for word in offered(line))
