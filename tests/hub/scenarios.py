"""What can go wrong while uploading: step by fault, for both ways of uploading, onto a branch and into a pull request.

A scenario ends in one of two ways. ``complete``: everything is there and verified. ``refused``: a `PushError`, and the same
call without the fault is then complete. In both, commits and pull requests are never doubled, and a new repository was
never public before it was complete.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants

from hf_quant.disk.digests import Digest, digests
from hf_quant.errors import PushError
from hf_quant.publish.upload import Target, upload

from .fakehub import FakeHub

TOKEN, REPO = "hf_" + "plantedtokenplantedtoken", "alice/tiny-W4A16"
CARD = b"---\nlicense: apache-2.0\n---\n# tiny\n"
TIMEOUT, LONG = 0.5, 60.0  # of the client, where something stalls for longer, and where nothing does
HTML = b"<html>Bad gateway</html>"
EXPIRED = {"X-Error-Message": "Invalid credentials in Authorization header"}
READ_ONLY = {"X-Error-Message": "Forbidden: this token is read-only"}

# what a request at a step looks like; {kind} of upload that has it, and whether it is part of opening a pull request
STEPS: dict[str, tuple[str, str, str]] = {  # name: path, ways, modes
    "whoami": ("whoami-v2", "xet lfs", "main pr"),
    "create": ("repos/create", "xet lfs", "main"),
    "info": (r"GET /api/models/alice/tiny-W4A16(/revision|$)", "xet lfs", "main pr"),
    "validate-yaml": ("validate-yaml", "lfs", "main pr"),
    "preupload": ("/preupload/", "xet lfs", "main pr"),
    "xet-token": ("/xet-write-token/", "xet", "main pr"),
    "lfs-batch": ("/objects/batch", "lfs", "main pr"),
    "lfs-put": ("/basic/", "lfs", "main pr"),
    "lfs-verify": (r"/_up/.*/verify", "lfs", "main pr"),
    "commit": ("/commit/", "xet lfs", "main pr"),
    "tree": ("/tree/", "xet lfs", "main pr"),
    "verification": ("/tree/", "xet lfs", "main pr"),  # the last of them
    "find-pr": (r"GET .*/discussions", "xet lfs", "pr"),
    "open-pr": (r"POST .*/discussions", "xet lfs", "pr"),
    "settings": ("/settings", "xet lfs", "main"),
    "refs": ("/refs", "xet lfs", "main"),
    "tag": ("/tag/", "xet lfs", "main"),
}
FAULTS: dict[str, dict[str, Any]] = {
    "500": {"status": 500},
    "500 for ever": {"status": 500, "times": 10**6},
    "502 not JSON": {"status": 502, "body": HTML},
    "503 Retry-After": {"status": 503, "headers": {"Retry-After": "1"}},
    "429": {"status": 429, "headers": {"RateLimit": '"api";r=0;t=1'}},
    "reset": {"action": "reset"},
    "reset twice": {"action": "reset", "times": 2},
    "stall": {"action": "stall", "seconds": 4 * TIMEOUT},
    "lost response": {"action": "lost_response"},
    "lost response twice": {"action": "lost_response", "times": 2},
    "401 expired": {"status": 401, "headers": EXPIRED, "times": 10**6},
    "403 read-only": {"status": 403, "headers": READ_ONLY, "times": 10**6},
    "404": {"status": 404},
    "409": {"status": 409},
    "412": {"status": 412},
}
SKIP = {"verification": 2}  # before the upload: what is there, and what of it goes
ONLY = {"409": ("commit", "tag", "settings"), "412": ("commit",)}
NOT = {
    "xet-token": ("500 for ever", "stall")
}  # hf_xet waits five minutes before it gives up, and cannot be told otherwise


@dataclass(frozen=True)
class Scenario:
    """A fault at a step."""

    way: str  # "xet" or "lfs"
    mode: str  # "main" or "pr"
    step: str
    fault: str

    def __str__(self) -> str:
        return f"{self.way}-{self.mode}-{self.step}-{self.fault}".replace(" ", "_")


@dataclass
class Outcome:
    """How it went."""

    scenario: Scenario
    ending: str = ""
    error: str = ""
    hits: int = 0
    commits: int = 0
    prs: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)  # promises that were broken


def scenarios() -> list[Scenario]:
    """All that make sense."""
    return [
        Scenario(way, mode, step, fault)
        for step, (_, ways, modes) in STEPS.items() for way in ways.split() for mode in modes.split() for fault in FAULTS
        if step in ONLY.get(fault, (step,)) and fault not in NOT.get(step, ())
    ]  # fmt: skip


def make_folder(folder: Path) -> dict[str, Digest]:
    """Two shards and some small files, of fixed content."""
    folder.mkdir(parents=True)
    (folder / "README.md").write_bytes(CARD)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for n in (1, 2):
        (folder / f"model-{n:05d}-of-00002.safetensors").write_bytes(bytes(range(256)) * (40 * n))
    return digests(folder, [path.name for path in folder.iterdir()])


@contextmanager
def way(name: str) -> Iterator[None]:
    """Let the client upload by xet or by plain LFS."""
    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = name == "lfs"
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


@contextmanager
def hurried() -> Iterator[None]:
    """Nobody sleeps longer than a moment."""
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.005))
    try:
        yield
    finally:
        time.sleep = sleep


def play(scenario: Scenario) -> Outcome:
    """Upload with the fault; where that is refused, once more without."""
    root, start = Path(tempfile.mkdtemp()), time.perf_counter()
    outcome = Outcome(scenario)
    try:
        with way(scenario.way), hurried(), FakeHub(root / "hub") as hub:
            hub.add_token(TOKEN, "alice")
            files = make_folder(root / "model")
            _play(scenario, hub, root / "model", files, outcome)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _play(scenario: Scenario, hub: FakeHub, folder: Path, files: dict[str, Digest], outcome: Outcome) -> None:
    pr = scenario.mode == "pr"
    target = Target(REPO, private=None if pr else False, create_pr=pr, tag=None if pr else "v1", message="INT4")
    if pr:
        hub.create_repo(REPO)
    method, _, path = STEPS[scenario.step][0].rpartition(" ")
    fault = hub.fault(path, method=method or "*", skip=SKIP.get(scenario.step, 0), **FAULTS[scenario.fault])
    api, timeout = HfApi(endpoint=hub.url, token=TOKEN), TIMEOUT if fault.action == "stall" else LONG

    def once() -> str:
        made = upload(api, folder, files, target, say=lambda _: None, timeout=timeout)
        _check(hub, made.revision, files, outcome)
        return made.revision

    try:
        once()
        outcome.ending = "complete"
    except PushError as error:
        outcome.ending, outcome.error = "refused", str(error)
        if not pr and hub.repos and hub.repo(REPO).was_public and _missing(hub, "main", files):
            outcome.wrong.append("public before it was complete")
        if TOKEN in str(error):
            outcome.wrong.append("the token is in the error")
        hub.faults.clear()
        once()
    outcome.hits = fault.hits
    outcome.prs = len(hub.repo(REPO).prs)
    outcome.commits = len(hub.history(REPO, "refs/pr/1" if pr else "main")) - 1
    if outcome.commits != 1:
        outcome.wrong.append(f"{outcome.commits} commits")
    if outcome.prs != int(pr):
        outcome.wrong.append(f"{outcome.prs} pull requests")
    if not outcome.hits:
        outcome.wrong.append("the fault never happened")
    if any(each.get("leaked") for each in hub.log):
        outcome.wrong.append("the token went to the storage")


def _missing(hub: FakeHub, revision: str, files: dict[str, Digest]) -> list[str]:
    tree = hub.files(REPO, revision)
    return [
        path for path, want in files.items()
        if path not in tree or (tree[path].sha256 != want.sha256 if tree[path].sha256 else tree[path].oid != want.git)
    ]  # fmt: skip


def _check(hub: FakeHub, revision: str, files: dict[str, Digest], outcome: Outcome) -> None:
    if missing := _missing(hub, revision, files):
        outcome.wrong.append(f"said to be complete without {missing}")
    if outcome.scenario.mode == "main" and (hub.repo(REPO).private or hub.repo(REPO).tags.keys() != {"v1"}):
        outcome.wrong.append("settings or tag are not as asked")
