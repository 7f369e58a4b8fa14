"""How PyTorch's threads wait is asked for before PyTorch is imported, and a user's own choice stands."""

import os
import subprocess
import sys

import pytest

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def spins(code: str, **environment: str) -> str:
    given = {name: value for name, value in os.environ.items() if name not in NAMES} | environment
    code += "; import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    return subprocess.run([sys.executable, "-c", code], env=given, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("code", ["import hf_quant", "import hf_quant.cli", "import hf_quant, torch"])
def test_threads_spin_briefly(code: str) -> None:
    assert spins(code) == "10000\n"


def test_a_users_choice_stands() -> None:
    assert spins("import hf_quant", GOMP_SPINCOUNT="7") == "7\n"
    assert spins("import hf_quant", OMP_WAIT_POLICY="ACTIVE") == "None\n"


def test_too_late_after_the_import_of_torch() -> None:
    assert spins("import torch, hf_quant") == "None\n"
