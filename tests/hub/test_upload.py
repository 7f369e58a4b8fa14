"""Uploads end complete and verified, or with an error and in a state from which the same call goes on."""

from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from hf_quant.disk.digests import MANIFEST, digest, digests
from hf_quant.errors import PushError
from hf_quant.publish.manifest import manifest_of
from hf_quant.publish.upload import Target, upload

from .conftest import BOB, READ_TOKEN
from .fakehub import FakeHub
from .scenarios import REPO, Scenario, make_folder, play, scenarios

EVERY = [str(each) for each in scenarios()]
CHOSEN = [  # all 554 are in benchmarks/push_faults.py
    "xet-main-commit-lost_response", "xet-main-commit-lost_response_twice", "xet-main-commit-412", "xet-main-commit-stall",
    "xet-main-preupload-503_Retry-After", "xet-main-xet-token-401_expired", "xet-main-xet-token-reset",
    "xet-main-tree-500_for_ever", "xet-main-settings-lost_response", "xet-main-tag-lost_response", "xet-main-create-lost_response",
    "xet-pr-open-pr-lost_response", "xet-pr-commit-500_for_ever", "lfs-main-whoami-502_not_JSON",
    "lfs-main-validate-yaml-502_not_JSON", "lfs-main-lfs-batch-429", "lfs-main-lfs-put-403_read-only", "lfs-main-lfs-put-reset",
    "lfs-main-lfs-verify-404", "lfs-main-commit-lost_response", "lfs-main-commit-403_read-only", "lfs-main-commit-409",
    "lfs-main-create-reset_twice", "lfs-pr-commit-lost_response", "lfs-pr-find-pr-401_expired", "lfs-pr-lfs-put-stall",
]  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_faults(name: str, online: None) -> None:
    scenario = next(each for each in scenarios() if str(each) == name)
    outcome = play(scenario)
    assert outcome.wrong == [] and outcome.ending in ("complete", "refused"), outcome
    assert outcome.ending == ("refused" if name.endswith(("for_ever", "expired", "read-only")) else "complete")


def test_every_step_and_fault_is_among_the_scenarios() -> None:
    assert len(EVERY) == len(set(EVERY)) >= 66 and set(CHOSEN) <= set(EVERY)


def test_the_client_alone_doubles_a_commit(hub: FakeHub, api: HfApi, tmp_path: Path) -> None:
    """Why a parent is named: without it, a lost answer is a second commit, and `play` would see it."""
    make_folder(tmp_path / "m")
    api.create_repo(REPO)
    hub.fault("/commit/", action="lost_response")
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "m")
    assert len(hub.history(REPO)) == 3
    assert Scenario("xet", "main", "commit", "lost response") in scenarios()


def send(hub: FakeHub, folder: Path, target: Target, token: str = "", said: list[str] | None = None) -> str:
    api = HfApi(endpoint=hub.url, token=token or next(iter(hub.tokens)))
    files = digests(folder, [path.name for path in folder.iterdir()])
    return upload(api, folder, files, target, say=(said if said is not None else []).append).commit


def test_somebody_else_commits_meanwhile(hub: FakeHub, api: HfApi, tmp_path: Path, way: str) -> None:
    make_folder(tmp_path / "m")
    api.create_repo(REPO)
    hub.fault("/commit/main", action="stall", meanwhile=lambda: hub.put(REPO, {"notes.txt": b"mine"}))
    said: list[str] = []
    send(hub, tmp_path / "m", Target(REPO), said=said)
    tree = hub.files(REPO)
    assert {"notes.txt", "model-00001-of-00002.safetensors"} <= tree.keys() and len(hub.history(REPO)) == 3
    assert any("412" in line for line in said)


def test_fewer_shards_than_before(hub: FakeHub, tmp_path: Path, way: str) -> None:
    files = make_folder(tmp_path / "m")
    (tmp_path / "m" / MANIFEST).write_bytes(manifest_of(files))
    send(hub, tmp_path / "m", Target(REPO))
    for path in (tmp_path / "m").glob("*.safetensors"):
        path.unlink()
    (tmp_path / "m" / "model.safetensors").write_bytes(b"other weights")
    (tmp_path / "m" / MANIFEST).write_bytes(
        manifest_of({"model.safetensors": digest(tmp_path / "m" / "model.safetensors")})
    )
    commit = send(hub, tmp_path / "m", Target(REPO))
    assert sorted(hub.files(REPO)) == [
        ".gitattributes",
        "README.md",
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    assert send(hub, tmp_path / "m", Target(REPO)) == commit and len(hub.history(REPO)) == 3


def test_only_what_is_missing_is_sent_again(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    files = make_folder(tmp_path / "m")
    big = files["model-00002-of-00002.safetensors"].sha256
    hub.fault(f"/_up/{big}/basic", action="reset_mid_body", after=1000, times=10**6)
    with pytest.raises(PushError, match=r"0 of 4 files are at alice/tiny-W4A16\. The same command goes on"):
        send(hub, tmp_path / "m", Target(REPO))
    hub.faults.clear()
    before = len(hub.calls("PUT", "/basic"))
    send(hub, tmp_path / "m", Target(REPO))
    assert len(hub.calls("PUT", "/basic")) == before + 1


def test_branch_and_tag(hub: FakeHub, tmp_path: Path) -> None:
    make_folder(tmp_path / "m")
    commit = send(hub, tmp_path / "m", Target(REPO, revision="int4", tag="v1"))
    repo = hub.repo(REPO)
    assert repo.refs["int4"] == commit == repo.tags["v1"] and "config.json" not in hub.files(REPO)
    assert send(hub, tmp_path / "m", Target(REPO, revision="int4", tag="v1")) == commit
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(PushError, match=r"tag v1 is at .* already; the upload itself is complete"):
        send(hub, tmp_path / "m", Target(REPO, revision="int4", tag="v1"))


def test_settings(hub: FakeHub, tmp_path: Path) -> None:
    make_folder(tmp_path / "m")
    send(hub, tmp_path / "m", Target(REPO))
    assert hub.repo(REPO).private, "a new one, and nobody said"
    send(hub, tmp_path / "m", Target(REPO, private=False, gated="manual"))
    repo = hub.repo(REPO)
    assert (repo.private, repo.gated) == (False, "manual") and len(hub.calls("PUT", "/settings")) == 1, "in one call"
    send(hub, tmp_path / "m", Target(REPO))
    assert (repo.private, repo.gated) == (False, "manual") and len(hub.calls("PUT", "/settings")) == 1
    (tmp_path / "m" / "config.json").write_text("{}")
    hub.fault("/commit/", status=403, times=9)
    with pytest.raises(PushError):
        send(hub, tmp_path / "m", Target(REPO, private=True))
    assert repo.private, "before anything of it could be seen"


def order(hub: FakeHub) -> list[str]:
    """The requests that change settings or send something, one word each."""
    words = {"/settings": "settings", "/preupload/": "send", "/commit/": "commit"}
    return [word for each in hub.log for part, word in words.items() if part in each["path"]]


def test_closed_before_the_first_byte(hub: FakeHub, tmp_path: Path) -> None:
    """In a repository that is open already, weights that readers have to ask for are never free to read."""
    make_folder(tmp_path / "m")
    for target, state in (
        (Target(REPO, gated="manual"), (False, "manual")), (Target(REPO, private=True), (True, False)),
        (Target(REPO, private=True, gated="auto"), (True, "auto")),
    ):  # fmt: skip
        hub.create_repo(REPO, private=False)
        hub.log.clear()
        send(hub, tmp_path / "m", target)
        assert order(hub)[0] == "settings" and order(hub).count("settings") == 1, order(hub)
        assert (hub.repo(REPO).private, hub.repo(REPO).gated) == state
        hub.repos.clear()
    hub.create_repo(REPO, private=False)
    hub.repo(REPO).gated = "manual"
    hub.log.clear()
    send(hub, tmp_path / "m", Target(REPO, gated=False))
    assert order(hub)[-1] == "settings", "what is opened is opened last"
    hub.repo(REPO).gated = False
    with pytest.raises(PushError, match="anybody could read a pull request of alice/tiny-W4A16"):
        send(hub, tmp_path / "m", Target(REPO, create_pr=True, gated="manual"))
    assert not hub.repo(REPO).prs


def test_somebody_elses_pull_request(hub: FakeHub, tmp_path: Path) -> None:
    """Its settings are not ours to change."""
    make_folder(tmp_path / "m")
    hub.create_repo("bob/x", private=False)
    HfApi(endpoint=hub.url, token=next(iter(hub.tokens))).create_pull_request("bob/x", title="mine")
    hub.log.clear()
    assert send(hub, tmp_path / "m", Target("bob/x", revision="refs/pr/1", private=True))
    assert "settings" not in order(hub)


def test_the_wait_that_is_announced_is_waited(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "m")
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    hub.fault("whoami", status=429, headers={"RateLimit": '"api";r=0;t=250'})
    hub.fault("whoami", status=503, headers={"Retry-After": "4000"})
    said: list[str] = []
    send(hub, tmp_path / "m", Target(REPO), said=said)
    announced = [float(line.rpartition("again in ")[2].removesuffix(" s")) for line in said]
    assert announced == [251.0, 310.0] and set(announced) <= set(slept)


def test_clear_refusals(hub: FakeHub, tmp_path: Path) -> None:
    make_folder(tmp_path / "m")
    for token, target, words in (
        (READ_TOKEN, Target(REPO), "the token may only read"),
        ("hf_unknown", Target(REPO), "hf auth login"),
        (BOB, Target(REPO), r"may not write to alice/tiny-W4A16 \(403"),
        (BOB, Target(REPO, create_pr=True), "no such repository, or the token may not see it"),
        ("", Target(REPO, revision="refs/pr/9"), "no such repository"),
    ):
        with pytest.raises(PushError, match=words):
            send(hub, tmp_path / "m", target, token)
    assert not hub.repos
    hub.create_repo(REPO)
    with pytest.raises(PushError, match="has no revision refs/pr/9"):
        send(hub, tmp_path / "m", Target(REPO, revision="refs/pr/9"))
    HfApi(endpoint=hub.url, token=BOB).create_commit(
        REPO, [CommitOperationAdd("x.txt", b"1")], commit_message="Upload with hf-quant", create_pr=True
    )
    send(hub, tmp_path / "m", Target(REPO, create_pr=True))
    assert sorted(hub.repo(REPO).prs) == [1, 2], "another's pull request is left alone"
