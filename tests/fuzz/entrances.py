"""One spoilt checkpoint goes through every entrance, and what comes out is judged."""

from __future__ import annotations

import contextlib
import copy
import io
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from click.testing import CliRunner

import hf_quant
from hf_quant.cli import main
from hf_quant.errors import LONGEST, HfQuantError
from hf_quant.hf.loading import sample_logits

PATIENCE = 20  # seconds of processor time
MOST_MEMORY = 500_000_000  # bytes beside the files
LARGE = 1e4  # numbers in a file beyond which logits may overflow, although every one is finite


class Hang(BaseException):
    """Too much time was used."""


@dataclass
class Outcome:
    """What one entrance made of one checkpoint: ``"ok"``, ``"refused"`` or ``"fault"``."""

    state: str
    model: Any = None
    fault: str = ""


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Raise `Hang` after `PATIENCE` of processor time, so that a busy machine does not count."""

    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _peak() -> int:
    """Most memory that this process ever had, in bytes, since `_forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def _forget() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def ours(error: BaseException) -> str:
    """Where in the package an error was raised, or passed through last; empty if it never was there."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/hf_quant/" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def raised_by_us(error: BaseException) -> bool:
    """Whether the innermost frame is the package's own."""
    return "/hf_quant/" in traceback.extract_tb(error.__traceback__)[-1].filename


def wrong_message(text: str) -> str:
    if len(text) < 15:
        return f"message says too little: {text!r}"
    if len(text) > LONGEST + 200:
        return f"message of {len(text)} characters"
    return "" if text.replace("\n", "").isprintable() else f"message is not printable: {text[:200]!a}"


def command(words: list[str]) -> Outcome:
    """What a command makes of its arguments."""
    done = CliRunner().invoke(main, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    text = done.stderr if done.exit_code else done.stdout
    if done.exit_code not in (0, 1, 2):
        return Outcome("fault", fault=f"exit code {done.exit_code}: {done.stderr[-300:]}")
    if not text.replace("\n", "").isprintable() or (done.exit_code and (wrong := wrong_message(text))):
        return Outcome("fault", fault=f"{text[:300]!a}" if not done.exit_code else wrong)
    return Outcome("refused" if done.exit_code else "ok")


def _from_pretrained(folder: Path) -> Outcome:
    """transformers' own entrance, asked to use this package."""
    said = (folder / "config.json").read_text(errors="replace")
    auto = tf.AutoModel if '"BertModel"' in said else tf.AutoModelForCausalLM
    how = {} if '"quant_method": "hf_quant"' in said else {"quantization_config": hf_quant.HfQuantConfig()}
    return Outcome("ok", auto.from_pretrained(folder, **how))


ENTRANCES: dict[str, Callable[[Path], Outcome]] = {
    "inspect": lambda folder: command(["inspect", str(folder)]),
    "verify": lambda folder: command(["verify", str(folder)]),
    "plan": lambda folder: command(["plan", str(folder)]),
    "load": lambda folder: Outcome("ok", hf_quant.load(str(folder))),
    "from_pretrained": _from_pretrained,
}
OF_TRANSFORMERS = "from_pretrained"  # raises what it likes where it never called us


def enter(name: str, folder: Path, way: Callable[[], Outcome] | None = None) -> Outcome:
    """Go through one entrance, by default that of `ENTRANCES`, with limits of time and memory."""
    _forget()
    before, size = _peak(), sum(path.stat().st_size for path in folder.iterdir())
    start = time.process_time()
    try:
        with patience(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            outcome = way() if way is not None else ENTRANCES[name](folder)
    except Hang:
        return Outcome("fault", fault=f"no end after {PATIENCE} s")
    except HfQuantError as error:
        outcome = _judged(error)
    except Exception as error:
        foreign = name == OF_TRANSFORMERS and not raised_by_us(error)
        kind = f"{type(error).__name__} at {ours(error)}: {str(error)[:200]!a}"
        outcome = Outcome("refused") if foreign else Outcome("fault", fault=kind)
    if _peak() - before > MOST_MEMORY + size:
        return Outcome("fault", fault=f"{_peak() - before} bytes of memory for {size} bytes of files")
    if time.process_time() - start > PATIENCE / 2:
        return Outcome("fault", fault=f"{time.process_time() - start:.0f} s")
    return outcome


def _judged(error: HfQuantError) -> Outcome:
    cause = error.__cause__
    if cause is not None and not isinstance(cause, HfQuantError | OSError) and raised_by_us(cause):
        return Outcome("fault", fault=f"{type(cause).__name__} at {ours(cause)} hides behind {str(error)[:200]!a}")
    wrong = wrong_message(str(error))
    return Outcome("fault", fault=wrong) if wrong else Outcome("refused")


def run_model(model: Any) -> str:
    """What is wrong with the logits of a model that was loaded; empty if nothing is."""
    try:
        with patience():
            finite = bool(sample_logits(model).isfinite().all())
    except Hang:
        return "no end of a forward pass"
    except Exception as error:  # transformers cannot run every config that it builds
        return f"{type(error).__name__} at {ours(error)}: {str(error)[:200]!a}" if raised_by_us(error) else ""
    return "" if finite or _large(model) else "logits are not finite"


def _large(model: Any) -> bool:
    floats = [
        (n, p.detach().abs().max()) for n, p in model.named_parameters() if p.is_floating_point() and p.nelement()
    ]
    large = min(LARGE, torch.finfo(model.dtype).max ** 0.5)  # in float16, the product of two of them is infinite
    codes = {True: 128, False: 1}  # as large as a code can be
    return any(float(most) * codes["_scale" in name] > large for name, most in floats) or _config_alone(model)


def _config_alone(model: Any) -> bool:
    """Whether the same config makes logits that are not finite of ordinary weights too, for example with an eps of -1."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    return not bool(sample_logits(type(model)(config).eval()).isfinite().all())


def faults(folder: Path, entrances: tuple[str, ...] = tuple(ENTRANCES)) -> Iterator[str]:
    """Everything that goes wrong with one checkpoint, a line each."""
    outcomes: dict[str, Outcome] = {}
    with torch.random.fork_rng():
        for name in entrances:
            outcome = outcomes[name] = enter(name, folder)
            if outcome.fault:
                yield f"{name}: {outcome.fault}"
            if outcome.model is not None:
                wrong, outcome.model = run_model(outcome.model), None
                if wrong:
                    yield f"{name}: {wrong}"
    if (folder / "manifest.json").is_file():
        return  # the command also holds small files against it, which people may edit and still load
    verify, load = outcomes.get("verify"), outcomes.get("load")
    if verify is not None and load is not None and (verify.state == "ok") != (load.state == "ok"):
        yield f"verify: {verify.state}, load: {load.state}"
