"""Many cases, in processes that may die: a crash is a line of the report like any other fault."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import click
import torch

from hf_quant import _plugins
from tests.fuzz import operations, records
from tests.fuzz.entrances import ENTRANCES, faults
from tests.fuzz.mutate import spoil
from tests.fuzz.originals import make_own, names, original

BATCH = 100  # cases in one process, so that what they leave behind in memory goes
CHUNK = 500  # cases between two signs of life
OPERATIONS = 2  # the number of a case of operations, modulo 5
SILENCE = 300  # seconds without a case done, after which a process is taken for hung


def one(case: int, home: Path) -> Iterator[str]:
    """The faults of one case; ``home`` as for `make_own`.

    Each tenth is one of records, each fifth one of operations, the others are of checkpoints.
    """
    chance = Random(case)
    if case % 5 == OPERATIONS:
        yield from operations.faults(chance)
        return
    good = chance.choice(names(home))
    folder = Path(tempfile.mkdtemp(dir=home))
    try:
        if case % 10 == 9:
            named = records.spoil_records(chance, folder)
            for fault in records.faults(folder):
                yield f"{named}: {fault}"
            return
        kind = spoil(chance, original(good), folder)
        for fault in faults(folder):
            yield f"{good.name} ({kind}): {fault}"
    finally:
        shutil.rmtree(folder)


def many(cases: Sequence[int], home: Path) -> Iterator[tuple[int, str]]:
    """Case and fault, for all faults of the cases."""
    done = 0
    while done < len(cases):
        done += yield from _batch(cases[done : done + BATCH], home)


def _batch(cases: Sequence[int], home: Path) -> Iterator[tuple[int, str]]:
    """Run cases in one forked process; returns how many of them are over."""
    fork = multiprocessing.get_context("fork")
    reports, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_work, args=(cases, home, sender))
    process.start()
    sender.close()
    done, case = False, cases[0]
    try:
        while not done and reports.poll(SILENCE):
            done, case, fault = reports.recv()
            if fault:
                yield case, fault
    except EOFError:
        pass
    if not done:
        process.kill()
    process.join()
    if done:
        return len(cases)
    yield case, f"the process died, with exit code {process.exitcode}"
    return cases.index(case) + 1


def _work(cases: Sequence[int], home: Path, sender: multiprocessing.connection.Connection) -> None:
    """In the forked process: say which case begins, and what is wrong with it."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stderr.fileno())
    torch.set_num_threads(1)  # the threads of a pool do not come along into a fork, and would be waited for
    for case in cases:
        sender.send((False, case, ""))
        for fault in one(case, home):
            sender.send((False, case, fault))
    sender.send((True, case, ""))
    os._exit(0)  # nothing that a case left behind may run


def prepared(home: Path) -> Path:
    """The folder of the originals, made if it is not there; and all that an entrance imports when it is first used."""
    import transformers

    import hf_quant.jobs.verify
    import hf_quant.publish.manifest  # noqa: F401

    for name in [*ENTRANCES, "card", "report"]:
        if name in _plugins.names("cli"):
            _plugins.load("cli", name)
    transformers.logging.set_verbosity(50)
    if not home.is_dir() or not any(home.iterdir()):
        make_own(home)
    return home


def report(first: int, last: int, out: Path | None) -> int:
    """Run cases and write one JSON line for each fault; the number of faults."""
    shared, start = Path("/dev/shm"), time.monotonic()
    found = 0
    with tempfile.TemporaryDirectory(prefix="hf-quant-fuzz-", dir=shared if shared.is_dir() else None) as home:
        prepared(Path(home))
        for chunk in range(first, last, CHUNK):
            for case, fault in many(range(chunk, min(chunk + CHUNK, last)), Path(home)):
                found += 1
                line = json.dumps({"case": case, "fault": fault})
                click.echo(line)
                if out is not None:
                    with out.open("a") as file:
                        file.write(line + "\n")
            click.echo(f"up to {min(chunk + CHUNK, last)}: {found} faults", err=True)
    took = time.monotonic() - start
    click.echo(f"{last - first} cases: {found} faults, {took:.0f} s")
    return found
