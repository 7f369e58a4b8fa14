"""Every fault at every step of an upload, both ways of uploading, onto a branch and into a pull request.

python benchmarks/push_faults.py [PART OF A NAME]

Plays the scenarios of tests/hub/scenarios.py with the real client against the Hub of tests/hub/fakehub.py and writes
benchmarks/results/push_faults.{json,md}. Exits with 1 if a promise was broken.
"""

import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path

from _results import write

os.environ |= {"HF_HOME": tempfile.mkdtemp(), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "critical"}
sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.simplefilter("ignore")

from tests.hub.scenarios import FAULTS, STEPS, Outcome, play, scenarios  # noqa: E402


def table(outcomes: list[Outcome]) -> str:
    """Steps by faults: how many ended complete, and how many refused."""
    cells: dict[tuple[str, str], Counter[str]] = {}
    for each in outcomes:
        cells.setdefault((each.scenario.step, each.scenario.fault), Counter())[each.ending] += 1
    lines = ["| step | " + " | ".join(FAULTS) + " |", "|---" * (len(FAULTS) + 1) + "|"]
    for step in STEPS:
        row = []
        for fault in FAULTS:
            counts = cells.get((step, fault), Counter())
            row.append(" ".join(f"{n} {ending}" for ending, n in sorted(counts.items())) or "-")
        lines.append(f"| {step} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def summary(outcomes: list[Outcome]) -> dict[str, object]:
    return {
        "date": str(date.today()), "huggingface_hub": version("huggingface_hub"), "hf_xet": version("hf_xet"),
        "scenarios": len(outcomes), "endings": dict(Counter(each.ending for each in outcomes)),
        "by_way": dict(Counter(each.scenario.way for each in outcomes)),
        "broken_promises": sum(map(bool, (each.wrong for each in outcomes))),
        "doubled_commits": sum(each.commits > 1 for each in outcomes), "doubled_prs": sum(each.prs > 1 for each in outcomes),
        "seconds": round(sum(each.seconds for each in outcomes), 1),
    }  # fmt: skip


if __name__ == "__main__":
    chosen = [each for each in scenarios() if not sys.argv[1:] or sys.argv[1] in str(each)]
    outcomes = []
    for scenario in chosen:
        outcomes.append(play(scenario))
        if outcomes[-1].wrong:
            print(scenario, outcomes[-1].wrong, flush=True)
    made = summary(outcomes)
    print(json.dumps(made, indent=2))
    if len(chosen) == len(scenarios()):
        each = [
            {
                "scenario": str(o.scenario), "ending": o.ending, "faults": o.hits, "commits": o.commits,
                "pull_requests": o.prs, "error": o.error.replace(o.error[o.error.find("/_up/") :][:69], "/_up/..."),
            }
            for o in outcomes
        ]  # fmt: skip
        text = (
            f"# Faults while uploading\n\n{made['scenarios']} scenarios, huggingface_hub {made['huggingface_hub']}, "
            f"{made['date']}: {made['endings']}, broken promises {made['broken_promises']}. Complete: everything is there and "
            "verified by sha256. Refused: an error that says why, and the same call without the fault is complete. In every one "
            "of them there is exactly one commit, and one pull request where one was asked for. In a field: both ways of "
            "uploading (xet, LFS), onto a branch and into a pull request, as far as they have the step.\n\n"
        )
        write("push_faults", made | {"each": each}, f"{text}{table(outcomes)}")
    sys.exit(any(each.wrong for each in outcomes))
