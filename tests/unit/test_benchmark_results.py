"""Results that another processor gave are not overwritten."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from hf_quant.bench.machine import cpu_name

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "_results.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="no benchmarks beside the tests")


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_results", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_a_table_of_another_processor_stays(results: ModuleType, tmp_path: Path) -> None:
    theirs = {"about": [{"cpu": "Some(R) Other Processor @ 1.00GHz"}], "cells": [1]}
    (tmp_path / "speed.json").write_text(json.dumps(theirs))
    results.write("speed", {"about": {"cpu": cpu_name()}, "cells": [2]}, "page")
    assert json.loads((tmp_path / "speed.json").read_text()) == theirs
    beside = tmp_path / f"speed.{results.slug(cpu_name())}.json"
    assert json.loads(beside.read_text())["cells"] == [2]


def test_a_table_of_this_processor_or_of_none_is_replaced(results: ModuleType, tmp_path: Path) -> None:
    for about in ({"cpu": cpu_name()}, {}):
        (tmp_path / "speed.json").write_text(json.dumps({"about": about}))
        results.write("speed", {"about": {}, "cells": [3]}, "page")
        assert json.loads((tmp_path / "speed.json").read_text())["cells"] == [3]
        assert (tmp_path / "speed.md").read_text() == "page\n"


def test_names_of_processors_become_names_of_files(results: ModuleType) -> None:
    assert results.slug("Intel(R) Xeon(R) Processor @ 2.80GHz") == "intel-xeon"
    assert results.slug("AMD EPYC") == "amd-epyc"
