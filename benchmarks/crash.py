"""Calibrated quantization under SIGKILL, failing disks and loss of power.

    python benchmarks/crash.py [kills] [schemes] [learned] [train] [shipped] [faults] [power] [wrong] [ext4] [full]

Everything runs the real command, ``hf-quant quantize MODEL`` with a calibrated method or ``train``, in forked children or in this process. What has
to be true afterwards is said in ``tests/e2e/crashes.py``, and how a disk fails in ``tests/e2e/faulty_disk.py``. No section
named means all of them; the results of the others stay. The last two mount file systems, which takes root on Linux.

kills    at least 100 SIGKILLs at random moments on a tiny Llama of twelve blocks, again and again until it gets through
schemes  at least 20 SIGKILLs for each kind of tensor that blocks are stored in: W8A8, static, mixed, native, ... (200 in all)
learned  at least 20 while codes are learned block by block and scales are trained end to end, on a tiny model
train    at least 20 of hf-quant train with a checkpoint after each step, for --learn weights and for --learn all
shipped  at least 15 on the model in examples/, which is measured on held-out text too
faults   every durable operation, killed before it, torn in the midst of it, on a full disk, and with EIO
power    every moment of five runs, in several ways that unsynced data and entries may be lost
wrong    the same for protocols with one mistake each, which must be found out
ext4     a real ext4 whose image is copied while the command is held, mounted, and gone on with
full     a real tmpfs that is too small, and is made larger
"""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path

from _results import RESULTS, write

HERE = Path(__file__).resolve().parent
_HOME = tempfile.TemporaryDirectory(prefix="hf-quant-crash-")
os.environ |= {
    "HF_HOME": _HOME.name,
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",
}
sys.path.append(str(HERE.parent))

import torch  # noqa: E402

torch.set_num_threads(1)  # children have no others

from click.testing import CliRunner  # noqa: E402

from hf_quant.cli import main as main_command  # noqa: E402
from hf_quant.disk import journal  # noqa: E402
from hf_quant.jobs.outputs import work_folder  # noqa: E402
from tests import yardsticks  # noqa: E402
from tests.e2e import crashes  # noqa: E402
from tests.e2e.crashes import FEW, SCENARIOS, SCHEMES, TINY, WRONG, Case, quantize  # noqa: E402
from tests.e2e.faulty_disk import KINDS  # noqa: E402

LONG = ("--scheme", "W4A16-g32", "--calibration-tokens", "4096", "--no-eval")
LEARNED = (
    "--scheme",
    "W3A16-g32-asym",
    "--method",
    "learned",
    "--epochs",
    "2",
    "--calibration-tokens",
    "1024",
    "--no-eval",
)
TRAIN = (
    "--scheme", "W2A16-g32-asym", "--steps", "40", "--batch", "2", "--train-context", "64", "--max-tokens", "256",
    "--checkpoint-minutes", "0", "--lr", "1e-3", "--dtype", "bfloat16",
)  # fmt: skip
SHIPPED = ("--scheme", "W4A16-g128", "--calibration-tokens", "2048", "--max-tokens", "1024")


def kills(root: Path) -> dict[str, object]:
    return _kills(crashes.make_model(root / "model", 12, 64), root, LONG, 100)


def schemes(root: Path) -> dict[str, object]:
    model = crashes.make_model(root / "model", 4)
    rows = {
        name: _kills(model, root / name, (*options, *FEW), 200 // len(SCHEMES)) for name, options in SCHEMES.items()
    }
    return {"schemes": rows}


def learned(root: Path) -> dict[str, object]:
    return _kills(crashes.make_model(root / "model", 6), root, LEARNED, 20)


def train(root: Path) -> dict[str, object]:
    model = yardsticks.make("peaked", root / "model")
    return {"learn": {learn: _train(model, root / learn, (*TRAIN, "--learn", learn)) for learn in ("weights", "all")}}


def _train(model: Path, root: Path, options: tuple[str, ...]) -> dict[str, object]:
    """The command is killed at random moments until it gets through, again and again, until there were enough kills."""

    def started(out: Path) -> int:
        child = os.fork()
        if not child:
            data = str(model / "calibration.txt")
            os._exit(
                CliRunner()
                .invoke(main_command, ["train", str(model), "-o", str(out), "--data", data, *options])
                .exit_code
            )
        return child

    def ended(child: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    began = time.perf_counter()
    assert ended(started(root / "whole" / "q")) == 0
    seconds, whole = time.perf_counter() - began, crashes.contents(root / "whole" / "q")
    steps: list[int] = []
    wrong, draw, models = Counter[str](), random.Random(0), 0
    while len(steps) < 20:
        out, code, before = root / str(models) / "q", -1, 0
        while code:
            child = started(out)
            time.sleep(seconds * draw.random())
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            code = ended(child)
            if code == -signal.SIGKILL and crashes.contents(out) is None:
                steps.append(max((part["step"] for part in journal.recorded(work_folder(out))), default=0))
                wrong["steps were lost"] += steps[-1] < before
                before = steps[-1]
            elif code:
                wrong[f"exit status {code}"] += code != -signal.SIGKILL
                code = 0  # it had appeared
        wrong["the files differ from those of an undisturbed run"] += crashes.contents(out) != whole
        models += 1
    return {
        "kills": len(steps), "models": models, "undisturbed_seconds": round(seconds, 2),
        "finished_steps_at_a_kill": dict(sorted(Counter(steps).items())), "wrong": +wrong,
    }  # fmt: skip


def shipped(root: Path) -> dict[str, object]:
    return _kills(HERE.parent / "examples" / "ref-llama-16m", root, SHIPPED, 15)


def _kills(model: Path, root: Path, options: tuple[str, ...], count: int) -> dict[str, object]:
    case = Case.of(model, root / "whole" / "q", *options)
    began = time.perf_counter()
    quantize(model, root / "timed" / "q", *options, wait=True)
    seconds = time.perf_counter() - began
    made = crashes.killed(case, root, count, seconds, random.Random(0))
    return {
        "kills": made.kills, "models": made.outputs, "undisturbed_seconds": round(seconds, 2),
        "finished_blocks_at_a_kill": dict(sorted(Counter(made.blocks).items())), "wrong": Counter(made.wrong),
    }  # fmt: skip


def faults(root: Path) -> dict[str, object]:
    case = Case.of(crashes.make_model(root / "model"), root / "whole" / "q", *TINY)
    made: dict[str, object] = {}
    for name, each in (("new", case), ("overwriting", case.overwriting())):
        scenario = SCENARIOS["begun and finished" if each is case else "an old model overwritten"]
        count = len(crashes.record(each, root / "disk", scenario, lambda path, folder: False).trace)
        rows: dict[str, dict[str, int]] = {}
        wrong: Counter[str] = Counter()
        for kind in KINDS:
            ended: Counter[str] = Counter()
            for at in range(1, count + 1):
                run, _, found = crashes.fault(each, root / "disk", at, kind)
                ended["killed" if run.code is None else "error, named" if run.code else "finished all the same"] += 1
                wrong.update(found)
            rows[kind] = dict(ended)
        made[name] = {"operations": count, "ended": rows, "wrong": wrong}
    return made


def powerless(root: Path) -> dict[str, object]:
    case = Case.of(crashes.make_model(root / "model"), root / "whole" / "q", *TINY)
    return {name: vars(crashes.power(case, root / "disk", scenario, 3)) for name, scenario in SCENARIOS.items()}


def wrong(root: Path) -> dict[str, object]:
    case = Case.of(crashes.make_model(root / "model"), root / "whole" / "q", *TINY)
    made: dict[str, object] = {}
    for name, each in WRONG.items():
        with each.active():
            found = crashes.power(case, root / "disk", SCENARIOS[each.scenario], 3, every=0, deaf=each.deaf)
        made[name] = {"scenario": each.scenario, **vars(found)}
    return made


@contextmanager
def mounted(place: Path, *how: str) -> Iterator[None]:
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *how, str(place)], check=True)
    try:
        yield
    finally:
        gc.collect()  # models that were loaded from there map their files
        subprocess.run(["umount", str(place)], check=True)


def ext4(root: Path) -> dict[str, object]:
    """The kernel writes nothing in the milliseconds of the copy, since nobody asks it to: the command is stopped."""
    case = Case.of(crashes.make_model(root / "model", 12, 64), root / "whole" / "q", *LONG)
    image, copy, disk, found = (root / name for name in ("image", "copy", "disk", "found"))
    draw, blocks, wrong = random.Random(0), [], Counter[str]()
    began = time.perf_counter()
    quantize(case.model, root / "timed" / "q", *LONG, wait=True)
    seconds = time.perf_counter() - began
    for _ in range(30):
        with image.open("wb") as file:
            file.truncate(32 << 20)
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        with mounted(disk, "-o", "loop", str(image)):
            subprocess.run(["sync", "-f", str(disk)], check=True)
            child = crashes.start(case, disk / "new" / "q", root / "began")
            time.sleep(draw.uniform(0, 1.2 * seconds))
            os.kill(child, signal.SIGSTOP)
            finished = set((root / "began").read_text().split()[:-1])  # the last may not be finished
            published = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            shutil.copyfile(image, copy)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        with mounted(found, "-o", "loop", str(copy)):
            shutil.rmtree(found / "lost+found")
            out = found / "new" / "q"
            (found / "new").mkdir(exist_ok=True)
            if published and crashes.contents(out) != case.whole:
                wrong["OUT was there, and is lost"] += 1
            wrong.update(case.wrong_now(out, finished) + case.wrong_then(out, finished))
        blocks.append(len(finished))
    return {"losses": 30, "finished_blocks_at_a_loss": dict(sorted(Counter(blocks).items())), "wrong": wrong}


def full(root: Path) -> dict[str, object]:
    case = Case.of(crashes.make_model(root / "model", 6), root / "whole" / "q", *TINY)
    size = sum(path.stat().st_size for path in (root / "whole" / "q").iterdir())
    rows, wrong = [], Counter[str]()
    for share in range(5, 106, 5):
        small = size * share // 100 // 4096 * 4096
        with mounted(root / "disk", "-t", "tmpfs", "-o", f"size={small}", "tmpfs"):
            out = root / "disk" / "new" / "q"
            run = quantize(case.model, out, *TINY)
            rows.append({"share": share, "code": run.code, "blocks": len(run.finished), "said": run.said.strip()})
            if run.code and "the disk is full" not in run.said:
                wrong[f"no reason is given: {run.said}"] += 1
            (root / "disk" / "new").mkdir(exist_ok=True)
            subprocess.run(["mount", "-o", "remount,size=64M", str(root / "disk")], check=True)
            wrong.update(case.wrong_now(out, set(run.finished)) + case.wrong_then(out, set(run.finished)))
    return {"bytes": size, "disks": rows, "wrong": wrong}


SECTIONS: dict[str, Callable[[Path], dict[str, object]]] = {
    "kills": kills, "schemes": schemes, "learned": learned, "train": train, "shipped": shipped, "faults": faults, "power": powerless, "wrong": wrong, "ext4": ext4, "full": full,
}  # fmt: skip


def main() -> None:
    file = RESULTS / "crash.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    for name in sys.argv[1:] or SECTIONS:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="hf-quant-crash-") as root:
            made = SECTIONS[name](Path(root))
        about = {
            "date": str(date.today()), "machine": f"{os.uname().sysname} {os.uname().release} {os.uname().machine}",
            "python": sys.version.split()[0], **{each: version(each) for each in ("torch", "transformers", "safetensors")},
        }  # fmt: skip
        rows[name] = {"about": about, "seconds": round(time.perf_counter() - began)} | made
        print(name, json.dumps(rows[name], indent=1), flush=True)
        write("crash", rows, page(rows))


def page(rows: dict[str, dict]) -> str:
    made = ["# Calibrated quantization under SIGKILL, failing disks and loss of power", ""]
    made += [
        '`python benchmarks/crash.py`, the real command throughout; what each part does is said there. "Wrong" counts'
    ]
    made += [
        "outcomes in which OUT was not whole, a finished block was lost or done again, the same command did not go on, the"
    ]
    made += [
        "files differed by a byte from those of an undisturbed run, something was left behind, a failed fsync was repeated,"
    ]
    made += ["or a message named no file.", ""]
    for name, row in ((name, rows[name]) for name in SECTIONS if name in rows):
        made += [
            f"## {name}",
            "",
            *LINES[name](row),
            "",
            f"{row['seconds']} s; {', '.join(f'{k} {v}' for k, v in row['about'].items())}",
            "",
        ]
    return "\n".join(made)


def table(*lines: tuple[object, ...]) -> list[str]:
    head, *rest = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return [head, "|" + "---|" * len(lines[0]), *rest]


def amount(wrong: dict[str, int]) -> str:
    return "; ".join(f"{count} x {what}" for what, count in wrong.items()) or "0"


def of_kills(row: dict) -> list[str]:
    blocks = ", ".join(f"{count} x {name}" for name, count in row["finished_blocks_at_a_kill"].items())
    head = ("kills", "models finished in spite of them", "seconds of an undisturbed run", "wrong")
    line = (row["kills"], row["models"], row["undisturbed_seconds"], amount(row["wrong"]))
    return [*table(head, line), "", f"Kills by finished blocks: {blocks}."]


def of_training(row: dict) -> list[str]:
    lines = [
        (learn, each["kills"], each["models"], each["undisturbed_seconds"],
         ", ".join(f"{count} x {at}" for at, count in each["finished_steps_at_a_kill"].items()), amount(each["wrong"]))
        for learn, each in row["learn"].items()
    ]  # fmt: skip
    head = (
        "--learn",
        "kills",
        "models finished in spite of them",
        "seconds of an undisturbed run",
        "kills by finished steps of 40",
    )
    return table((*head, "wrong"), *lines)


def of_schemes(row: dict) -> list[str]:
    lines: list[tuple[object, ...]] = []
    for name, each in row["schemes"].items():
        blocks = ", ".join(f"{count} x {at}" for at, count in each["finished_blocks_at_a_kill"].items())
        lines.append((name, each["kills"], each["models"], blocks, amount(each["wrong"])))
    total = ("all", *(sum(line[i] for line in lines) for i in (1, 2)), "", sum(line[4] != "0" for line in lines))  # type: ignore[misc]
    head = ("scheme", "kills", "models finished in spite of them", "kills by finished blocks", "wrong")
    return table(head, *lines, total)


def of_faults(row: dict) -> list[str]:
    lines: list[tuple[object, ...]] = []
    for name in ("new", "overwriting"):
        for kind, ended in row[name]["ended"].items():
            how = ", ".join(f"{count} {what}" for what, count in sorted(ended.items()))
            lines.append((name, kind, row[name]["operations"], how, amount(row[name]["wrong"])))
    return table(("OUT", "fault", "operations", "how the run with the fault ended", "wrong, all four kinds"), *lines)


def of_power(row: dict) -> list[str]:
    each = [row[name] | {"name": name} for name in SCENARIOS]
    lines = [(r["name"], r["states"], r["repeated"], amount(r["wrong"])) for r in each]
    total = (
        "all",
        sum(r["states"] for r in each),
        sum(r["repeated"] for r in each),
        sum(sum(r["wrong"].values()) for r in each),
    )
    return table(("scenario", "states", "in which the command was given again", "wrong"), *lines, total)


def of_wrong(row: dict) -> list[str]:
    lines = [(name, row[name]["scenario"], row[name]["states"], amount(row[name]["wrong"])) for name in WRONG]
    return table(("mistake", "scenario", "states", "wrong"), *lines)


def of_ext4(row: dict) -> list[str]:
    blocks = ", ".join(f"{count} x {name}" for name, count in row["finished_blocks_at_a_loss"].items())
    return [
        *table(("losses", "wrong"), (row["losses"], amount(row["wrong"]))), "",
        f"Losses by finished blocks: {blocks}.",
    ]  # fmt: skip


def of_full(row: dict) -> list[str]:
    ended = Counter((disk["code"], disk["blocks"]) for disk in row["disks"])
    lines = [(code, blocks, count) for (code, blocks), count in sorted(ended.items())]
    return [
        f"Disks of {row['disks'][0]['share']} to {row['disks'][-1]['share']} % of the model's {row['bytes']:,} bytes; wrong: {amount(row['wrong'])}.",
        "", *table(("exit status", "finished blocks", "disks"), *lines), "", "For example:", "", "```",
        *(row["disks"][i]["said"].replace(str(Path(tempfile.gettempdir())), "") for i in (0, len(row["disks"]) // 2, -1)), "```",
    ]  # fmt: skip


LINES: dict[str, Callable[[dict], list[str]]] = {
    "kills": of_kills, "schemes": of_schemes, "learned": of_kills, "train": of_training, "shipped": of_kills, "faults": of_faults, "power": of_power, "wrong": of_wrong, "ext4": of_ext4,
    "full": of_full,
}  # fmt: skip


if __name__ == "__main__":
    main()
