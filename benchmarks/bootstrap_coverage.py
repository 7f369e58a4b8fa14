"""How often do the 95 % intervals hold the truth? Simulated, against a truth that is known.

    python benchmarks/bootstrap_coverage.py [--runs 1000]

Each run draws documents, makes an interval from them with `hf_quant.evaluation.bootstrap.interval`, and asks whether the mean
over all documents there could be lies inside. Difficulty: log-normal with sigma 1 (mean exp(1/2): a tenth of the documents is
worth half of the sum); log-normal with sigma 1/2 and next to nothing in a tenth or half of the documents, as with a cache that
keeps short documents as they are; or normal and on both sides of zero, as the logarithms of perplexity ratios are. Lengths: all alike;
uniform from 200 to 2,000 tokens; log-normal with sigma 1. A share of 0.95 of 1,000 runs is known to +-0.014.
"""

import argparse
import sys
import zlib
from collections.abc import Callable
from datetime import date
from importlib.metadata import version

import torch
from _results import write
from torch import Tensor

from hf_quant.evaluation.bootstrap import interval

Draw = Callable[[int, torch.Generator], Tensor]
DOCUMENTS = (10, 20, 60, 200)
JUDGED = (20, 60, 200)  # which have to cover 93 to 97 of 100 times


def normal(documents: int, draw: torch.Generator) -> Tensor:
    return torch.randn(documents, generator=draw, dtype=torch.float64)


LENGTHS = {
    "all alike": lambda n, draw: torch.full((n,), 1000.0, dtype=torch.float64),
    "uniform, 200 to 2,000": lambda n, draw: torch.randint(200, 2001, (n,), generator=draw).double(),
    "log-normal, sigma 1": lambda n, draw: (1000 * normal(n, draw).exp()).ceil(),
}


def sometimes(share: float) -> tuple[Draw, float]:
    """Documents of which ``share`` have hardly any difficulty, and their mean."""

    def means(n: int, draw: torch.Generator) -> Tensor:
        free = torch.rand(n, generator=draw) < share
        return (normal(n, draw) / 2).exp() * torch.where(free, 1e-9, 1.0)

    return means, (1 - share) * torch.tensor(1 / 8).double().exp().item()


DIFFICULTY = {  # of documents, and the mean over all there could be
    "log-normal, sigma 1": (lambda n, draw: normal(n, draw).exp(), torch.tensor(0.5).double().exp().item()),
    "next to nothing in a tenth": sometimes(0.1),
    "next to nothing in half": sometimes(0.5),
    "normal, around zero": (normal, 0.0),
}


def covered(difficulty: str, length: str, documents: int, runs: int) -> float:
    draw = torch.Generator().manual_seed(zlib.crc32(f"{difficulty} {length} {documents}".encode()))
    means, truth = DIFFICULTY[difficulty]
    inside = 0
    for run in range(runs):
        count = LENGTHS[length](documents, draw)
        found = interval(means(documents, draw) * count, count, seed=run)
        inside += found is not None and found[0] <= truth <= found[1]
    return inside / runs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=1000)
    runs = parser.parse_args().runs
    rows, lines = [], ["| documents | " + " | ".join(map(str, DOCUMENTS)) + " |", "|---|" + "---:|" * len(DOCUMENTS)]
    for difficulty in DIFFICULTY:
        for length in LENGTHS:
            shares = {n: covered(difficulty, length, n, runs) for n in DOCUMENTS}
            rows.append({"difficulty": difficulty, "length": length, "covered": shares})
            lines.append(
                f"| {difficulty}; length {length} | " + " | ".join(f"{s:.1%}" for s in shares.values()) + " |"
            )
            print(lines[-1], flush=True)
    about = {"runs": runs, "level": 0.95, "date": str(date.today()), "torch": version("torch")}
    title = f"# How often 95 % intervals hold a truth that is known\n\n{runs} runs each, {about['date']}, torch {about['torch']}.\n"
    write("bootstrap_coverage", {"about": about, "rows": rows}, "\n".join([title, *lines]))
    good = all(0.93 <= row["covered"][n] <= 0.97 for row in rows for n in JUDGED)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
