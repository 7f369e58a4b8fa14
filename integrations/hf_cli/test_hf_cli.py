"""``hf quant ...`` by the real client, with the installed command registered as `hf extensions install` does it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from integrations.conftest import REFERENCE, Saved, cell

pytest.importorskip("huggingface_hub.cli.extensions", reason="this client has no extensions: integrations/try hf_cli")
COMMAND = shutil.which("hf-quant", path=str(Path(sys.executable).parent))


@pytest.fixture
def hf(tmp_path: Path) -> Any:
    """Runs the client in a home with the extension."""
    if COMMAND is None:
        pytest.skip("hf-quant is not installed beside this Python")
    folder = tmp_path / ".local/share/hf/extensions/hf-quant"
    folder.mkdir(parents=True)
    manifest = {
        "owner": "someone", "repo": "hf-quant", "repo_id": "someone/hf-quant", "short_name": "quant",
        "executable_path": COMMAND, "type": "python", "installed_at": "2026-11-27T00:00:00+00:00",
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    environment = os.environ | {"HOME": str(tmp_path)}

    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "huggingface_hub.cli.hf", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def test_it_is_listed_and_runs(hf: Any) -> None:
    assert "someone/hf-quant" in hf("--help").stdout
    assert "someone/hf-quant" in hf("extensions", "list").stdout
    done = hf("quant", "inspect", REFERENCE, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] > 30e6


@pytest.mark.parametrize("to", ["native", "compressed-tensors"])
def test_it_writes_what_hf_quant_writes(hf: Any, saved: Saved, tmp_path: Path, to: str) -> None:
    options = ["--scheme", "W4A16-g128", "--format", to, "--no-eval"]
    done = hf("quant", "quantize", REFERENCE, "-o", tmp_path / "q", *options)
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "q" / name).read_bytes() == (saved("W4A16-g128", to) / name).read_bytes()
    cell("W4A16-g128", to, "`hf quant` writes the same bytes")


def test_it_keeps_the_exit_status(hf: Any, tmp_path: Path) -> None:
    done = hf("quant", "quantize", REFERENCE, "-o", tmp_path / "q", "--scheme", "W5A16")
    assert done.returncode == 2 and "W5A16" in done.stderr
