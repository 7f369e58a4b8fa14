"""Every test is offline, seeded and on its own: caches live in a folder that ends with the session."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_HOME = tempfile.TemporaryDirectory(prefix="hf-quant-tests-")
os.environ |= {"HF_HOME": _HOME.name, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # read on import
os.environ["PYTHONSAFEPATH"] = (
    "1"  # other processes too test what is installed, and not what lies in the current folder
)

import pytest
import torch

import hf_quant

torch.set_num_threads(
    int(os.environ.get("OMP_NUM_THREADS", "2"))
)  # threads that wait for each other on a busy machine wait long


def pytest_configure() -> None:
    if os.environ.get("HF_QUANT_TEST_INSTALLED") == "1":
        assert "site-packages" in Path(hf_quant.__file__).parts, f"not the installed wheel: {hf_quant.__file__}"


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32, "a test changed the default dtype"
