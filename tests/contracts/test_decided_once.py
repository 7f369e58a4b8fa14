"""What a method means is decided in `Decision.of` alone; everybody else is handed the decision."""

import ast
from pathlib import Path

import hf_quant

ROOT = Path(hf_quant.__file__).parent
DECIDES = {  # file: why it asks before there is a plan
    "hf/plan.py": "the decision of the plan",
    "hf/config.py": "refuses schemes that the method cannot serve, when the configuration is made",
    "jobs/texts.py": "refuses --calibration that nothing would look at, before the model is opened",
    "cli/_types.py": "refuses a method that is not there, before torch is imported",
}


def calls(source: str) -> set[str]:
    """``preset`` if a module calls that, ``Decision.of`` if it calls that."""
    found = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
    return found & {"preset", "recipes.preset", "Decision.of", "recipes.Decision.of"}


def test_nobody_asks_again() -> None:
    asks = {file.relative_to(ROOT).as_posix(): calls(file.read_text(encoding="utf-8")) for file in ROOT.rglob("*.py")}
    asks.pop("solve/recipes.py")
    assert {place: how for place, how in asks.items() if how} == {key: {"Decision.of"} for key in DECIDES}


def test_the_search_finds_a_question() -> None:
    assert calls("if recipes.preset(name, scheme).calibrated: Decision.of(name, [])") == {
        "recipes.preset",
        "Decision.of",
    }
