"""What must be true of a calibrated ``hf-quant quantize`` on a disk that fails: the real command, on a tiny model.

Whatever happens, OUT is what it was or the finished model; the same command then finishes byte for byte what an undisturbed
run makes, repeats no block that was finished, and leaves nothing else behind.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers as tf
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hf_quant.cli import main
from hf_quant.disk import atomic, folders, journal, locks
from hf_quant.errors import HfQuantError
from hf_quant.jobs import compress as job
from hf_quant.jobs.outputs import work_folder

from .faulty_disk import Disk, Killed, Op, restore, states

Contents = dict[str, Any]
TINY = ("--scheme", "W4A16-g32", "--calibration-tokens", "256", "--no-eval")
SCHEMES = {
    "W8A8": ("--scheme", "W8A8", "--method", "calibrated"),
    "W8A8-static": ("--scheme", "W8A8-static", "--method", "calibrated"),
    "W8A8, gptq": ("--scheme", "W8A8"),
    "W8A8, native": ("--scheme", "W8A8", "--format", "native"),
    "W8A8 with outlier columns": ("--scheme", "W8A8-o5%-columns"),
    "W4A16 with W8A8": ("--scheme", "W4A16-g32", "--override", "*.o_proj=W8A8", "--method", "calibrated"),
    "W8A16 with W4A16": ("--scheme", "W8A16-g32", "--override", "*.mlp.*=W4A16-g32", "--method", "calibrated"),
    "W3A16 with outliers, native": ("--scheme", "W3A16-g32-o2%"),
    "W4A16-asym": ("--scheme", "W4A16-g32-asym", "--method", "awq"),
    "W4A16, rotated": ("--scheme", "W4A16-g32", "--method", "hadamard+drift+gptq"),
}  # every kind of tensor that a block can be stored in
FEW = ("--calibration-tokens", "256", "--no-eval")
OLD: Contents = {
    "config.json": b"{}", "model.safetensors": b"old", "recipe.json": b'{"versions": {"hf-quant": "0"}}',
}  # fmt: skip
ADD, PUT = journal.Journal.add, atomic.put


def make_model(folder: Path, blocks: int = 3, width: int = 32) -> Path:
    """A Llama that takes a fifth of a second, with a tokenizer of bytes and a text to calibrate on."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=blocks, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    (folder / "calibration.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    return folder


@dataclass
class Run:
    """One process: what it was told to do with what came of it.

    Attributes:
        code: Exit status; None if it was killed.
        said: On stderr.
        began: Files of the blocks that it worked on.
        finished: Those that it finished, which nobody may lose from then on.
    """

    code: int | None = None
    said: str = ""
    began: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)


def quantize(model: Path, out: Path, *options: str, on: Disk | None = None, wait: bool = False) -> Run:
    """The command, in this process; it waits for the real disk only if asked to."""
    made = Run()
    inner = journal.Journal.add  # a mutant's, perhaps

    def add(self: journal.Journal, name: str, *args: Any) -> None:
        made.began.append(name)
        inner(self, name, *args)
        made.finished.append(name)
        if on is not None:
            on.log.append(Op("finished", name))

    call = ["quantize", str(model), "-o", str(out), "--method", "gptq", "-q", *options]
    sync = os.fsync if wait else lambda _: None
    watched = mock.patch.object(os, "fsync", sync) if on is None else on.active()
    with mock.patch.object(journal.Journal, "add", add), watched:
        try:
            result = CliRunner().invoke(main, call)
        except Killed:
            return made
    made.code, made.said = result.exit_code, result.stderr
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        made.said += f"Traceback: {result.exception!r}"
    if on is not None and made.code == 0:
        on.log.append(Op("published"))
    return made


def contents(out: Path) -> Contents | None:
    """Everything that has to be the same, byte for byte; None if there is nothing. Only times and dates may differ."""
    if not out.is_dir():
        return None
    made: Contents = {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()
    }
    with suppress(KeyError, ValueError):
        made["results.json"] = {
            k: v for k, v in json.loads(made["results.json"]).items() if k not in ("seconds", "date")
        }
    return made


@dataclass(frozen=True)
class Case:
    """A model, and what quantizing it makes if nothing disturbs."""

    model: Path
    whole: Contents
    options: tuple[str, ...] = TINY
    old: Contents | None = None

    @classmethod
    def of(cls, model: Path, out: Path, *options: str) -> Case:
        """Find out what it makes."""
        run = quantize(model, out, *options)
        assert run.code == 0, run.said
        return cls(model, contents(out) or {}, options)

    def overwriting(self) -> Case:
        """The same where OUT is already there."""
        return Case(self.model, self.whole, (*self.options, "--overwrite"), OLD)

    def prepare(self, root: Path) -> Path:
        """An empty ``root``, or one with an old model in it; gives OUT."""
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        if self.old is None:
            return root / "new" / "q"
        (root / "q").mkdir()
        for name, data in self.old.items():
            (root / "q" / name).write_bytes(data)
        return root / "q"

    def wrong_now(self, out: Path, finished: set[str]) -> list[str]:
        """What is wrong before anybody has gone on, in words.

        Args:
            out: OUT.
            finished: Blocks that nobody may have lost.
        """
        seen, sound, wrong = contents(out), set(), []
        with suppress(HfQuantError):  # a damaged journal shows when the command goes on
            for part in journal.recorded(work_folder(out)):
                file = work_folder(out) / part["file"]
                if file.is_file() and journal.digest(file) == part["sha256"]:
                    sound.add(part["file"])
                else:
                    wrong.append("a line stands for a block that is not there")
        if seen not in (self.old, self.whole):
            wrong.append("OUT is gone" if seen is None else "OUT is not whole")
        if seen != self.whole and finished - sound:
            wrong.append("finished blocks are lost")
        return wrong

    def wrong_then(self, out: Path, finished: set[str]) -> list[str]:
        """What is wrong after the same command was given once more."""
        before = contents(out)
        run = quantize(self.model, out, *self.options)
        wrong = []
        if before != self.whole and finished & set(run.began):
            wrong.append("finished blocks were done again")
        complete = run.code == 0 or (before == self.whole and "exists and is not empty" in run.said)
        if not complete:
            wrong.append(f"the same command does not go on: {run.said.strip()}")
        if contents(out) != self.whole:
            wrong.append("the files differ from those of an undisturbed run")
        left = sorted(path.name for path in out.parent.iterdir())
        if complete and left != [out.name]:
            wrong.append(f"left behind: {left}")
        return wrong


# -- one fault ----------------------------------------------------------------------------------------------------


def fault(case: Case, root: Path, at: int, kind: str) -> tuple[Run, Disk, list[str]]:
    """Let operation ``at`` fail, then give the same command again; what is wrong, in words."""
    out = case.prepare(root)
    on = Disk(root, at, kind)
    run = quantize(case.model, out, *case.options, on=on)
    wrong = [f"{path} was synced again after that had failed" for path in on.retried]
    if run.code == 0 and contents(out) != case.whole:
        wrong.append("exit status 0, but OUT is not whole")
    if run.code and not (f"{root}" in run.said and run.said.count("Error: ") == 1):
        wrong.append(f"the message names no file: {run.said}")
    if run.code and kind == "ENOSPC" and "the disk is full" not in run.said:
        wrong.append(f"the message does not say that the disk is full: {run.said}")
    finished = set(run.finished)
    return run, on, wrong + case.wrong_now(out, finished) + case.wrong_then(out, finished)


# -- SIGKILL ------------------------------------------------------------------------------------------------------


@dataclass
class Kills:
    """What came of killing.

    Attributes:
        kills: Processes that were killed.
        outputs: Models that were finished in spite of it.
        blocks: Finished blocks at each kill.
        wrong: In words.
    """

    kills: int = 0
    outputs: int = 0
    blocks: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def killed(case: Case, root: Path, kills: int, seconds: float, draw: random.Random) -> Kills:
    """Start the command again and again, and kill it at random moments until it gets through; until there were enough.

    Args:
        case: What is made.
        root: A folder to work in.
        kills: At least that many.
        seconds: That an undisturbed run takes.
        draw: Of the moments: half of them in the first third, where blocks are worked on.
    """
    made = Kills()
    while made.kills < kills:
        out, finished = case.prepare(root / "disk"), set[str]()
        for _ in range(1000):
            child = start(case, out, root / "began")
            time.sleep(draw.choice((0.3, 1.3)) * seconds * draw.random())
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            again = finished & set((root / "began").read_text().split())
            made.wrong += [f"done again: {name}" for name in sorted(again)]
            if code == 0:
                break
            if code != -signal.SIGKILL:
                made.wrong.append(f"exit status {code}")
            made.kills += code == -signal.SIGKILL
            if contents(out) == case.whole:
                break
            made.wrong += case.wrong_now(out, finished)
            with suppress(HfQuantError):
                finished |= {part["file"] for part in journal.recorded(work_folder(out))}
            made.blocks.append(len(finished))
        made.wrong += case.wrong_then(out, finished) if code else []
        made.wrong += [] if contents(out) == case.whole else ["the files differ from those of an undisturbed run"]
        made.outputs += 1
    return made


def start(case: Case, out: Path, began: Path) -> int:
    """A child with the command in it; blocks that it works on are listed in ``began``."""
    began.write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads: torch has but one, see above
        child = os.fork()
    if child:
        return child
    code = 70
    try:
        inner = journal.Journal.add

        def add(self: journal.Journal, name: str, *args: Any) -> None:
            with began.open("a") as file:
                file.write(f"{name}\n")
            inner(self, name, *args)

        with mock.patch.object(journal.Journal, "add", add):
            code = quantize(case.model, out, *case.options, wait=True).code or 0
    finally:
        os._exit(code)


# -- power --------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Of states after a loss of power: how many there were, in how many the command was given again, what was wrong."""

    states: int = 0
    repeated: int = 0
    wrong: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Scenario:
    """How it comes to the log that power is lost in.

    Attributes:
        first: The operation at which a first process ends, and how; None if there is but one.
        old: Whether there is a model already that is overwritten.
    """

    first: tuple[tuple[str, int], str] | None = None
    old: bool = False


SCENARIOS = {
    "begun and finished": Scenario(),
    "killed while a line was written, and gone on": Scenario((("write new/q.work/journal.jsonl", 3), "torn")),
    "killed before folders were synced, and gone on": Scenario((("sync new", 1), "kill")),
    "a line could not be synced, and gone on": Scenario((("sync new/q.work/journal.jsonl", 2), "EIO")),
    "an old model overwritten": Scenario(old=True),
}


def record(case: Case, root: Path, scenario: Scenario, deaf: Callable[[str, bool], bool]) -> Disk:
    """What the real command does to its disk."""
    out = case.prepare(root)
    on = Disk(root, deaf=deaf)
    if scenario.first is not None:
        on.at, on.kind = scenario.first
        ended = quantize(case.model, out, *case.options, on=on)
        assert ended.code != 0, f"{scenario.first} did not happen"
        on.again()
    run = quantize(case.model, out, *case.options, on=on)
    assert run.code == 0, run.said
    return on


def power(case: Case, root: Path, scenario: Scenario, draws: int, *, seed: int = 0, every: int = 1,
          deaf: Callable[[str, bool], bool] = lambda path, folder: False) -> Tally:  # fmt: skip
    """Lose power at every moment of a scenario, in several ways, and let the same command go on.

    Args:
        case: What is made.
        root: A folder to work in.
        scenario: What led there.
        draws: Ways for each moment.
        seed: Of the choice of ways.
        every: Look at all states, but give the command again only in every so many; 0 for none.
        deaf: Syncs that a mutant forgets.
    """
    case = case.overwriting() if scenario.old else case
    on = record(case, root / "first", scenario, deaf)
    out = case.prepare(root / "then")
    tally = Tally()
    for number, (moment, found) in enumerate(states(on, draws, seed)):
        past = on.log[:moment]
        shutil.rmtree(root / "then", ignore_errors=True)
        restore(found, root / "then")
        tally.states += 1
        finished = {op.path for op in past if op.kind == "finished"}
        wrong = case.wrong_now(out, finished)
        if any(op.kind == "published" for op in past) and contents(out) != case.whole:
            wrong.append("OUT was there, and is lost")
        if every and number % every == 0:
            tally.repeated += 1
            wrong += case.wrong_then(out, finished)
        for each in wrong[:1]:
            tally.wrong[each] = tally.wrong.get(each, 0) + 1
    return tally


# -- protocols that are wrong -------------------------------------------------------------------------------------


def _line_first(self: journal.Journal, name: str, write: Any, record: Any) -> None:
    path = self.folder / name
    draft = path.with_suffix(".early")
    write(draft)
    entry = journal._plain(dict(record) | {"file": name, "sha256": journal.digest(draft)})
    draft.unlink()
    self._append(entry)
    atomic.put(path, write)
    self.parts.append(entry)


def _in_place(path: Path, write: Any) -> None:
    write(path)
    atomic.fsync(path)
    atomic.fsync(path.parent)


def _kept(path: Path, write: Any) -> None:
    """The journal that is there stays."""
    if path.name != journal.NAME or not path.exists():
        PUT(path, write)


@contextmanager
def _straight(out: Path, inputs: object = (), *, overwrite: bool = False) -> Iterator[Path]:
    out.mkdir(parents=True, exist_ok=True)
    yield out
    for path in out.iterdir():
        atomic.fsync(path)
    atomic.fsync(out)
    atomic.fsync(out.parent)


def _two_renames(*_: Path) -> bool:
    return False


def _made(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


def _trusted(folder: Path) -> None:
    if not folder.is_dir():
        _trusted(folder.parent)
        folder.mkdir()
        atomic.fsync(folder.parent)


@dataclass(frozen=True)
class Wrong:
    """A protocol with one mistake, and the scenario that shows it.

    Attributes:
        scenario: Name.
        deaf: The sync that is left out.
        patch: Or what is done otherwise: name and replacement of something in `disk` and `jobs.compress`, or of `Journal`.
    """

    scenario: str = "begun and finished"
    deaf: Callable[[str, bool], bool] = lambda path, folder: False
    patch: tuple[str, Any] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """While the mistake is made."""
        with ExitStack() as stack:
            for place in (atomic, folders, locks, journal, job, journal.Journal) if self.patch else ():
                if hasattr(place, self.patch[0]):
                    stack.enter_context(mock.patch.object(place, *self.patch))
            yield


def _stage(path: str) -> bool:
    return "/.q.stage-" in path


WRONG = {
    "a part is not synced": Wrong(deaf=lambda path, folder: "/.block-" in path),
    "the folder of parts is not synced": Wrong(deaf=lambda path, folder: path.endswith(".work")),
    "the journal is not synced": Wrong(deaf=lambda path, folder: path.endswith("/journal.jsonl")),
    "the files of the stage are not synced": Wrong(deaf=lambda path, folder: _stage(path) and not folder),
    "the stage itself is not synced": Wrong(deaf=lambda path, folder: _stage(path) and folder),
    "the folder above is not synced": Wrong(deaf=lambda path, folder: path == "new"),
    "folders that are made are not synced": Wrong(patch=("make_folder", _made)),
    "a folder that is there is taken to be synced": Wrong(
        "killed before folders were synced, and gone on", patch=("make_folder", _trusted)
    ),
    "the line comes before the part": Wrong(patch=("add", _line_first)),
    "files are written in place": Wrong("killed while a line was written, and gone on", patch=("put", _in_place)),
    "the journal is not copied": Wrong("a line could not be synced, and gone on", patch=("put", _kept)),
    "OUT is written without a stage": Wrong(patch=("output", _straight)),
    "OUT is moved away before the new one comes": Wrong("an old model overwritten", patch=("_exchange", _two_renames)),
}
