"""The Hub that the other tests stand on does with the real client what the Hub does."""

import hashlib
import os
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, get_session
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from .conftest import BOB, READ_TOKEN, VALIDATES
from .fakehub import FakeHub, complaints
from .scenarios import CARD


@pytest.fixture
def files(tmp_path: Path) -> Path:
    out = tmp_path / "files"
    (out / "plots").mkdir(parents=True)
    (out / "README.md").write_bytes(CARD)
    (out / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    (out / "model.safetensors").write_bytes(os.urandom(300_000))
    (out / "plots" / "a.png").write_bytes(b"\x89PNG\0" + os.urandom(3000))
    return out


def same(a: Path, b: Path) -> bool:
    def held(root: Path) -> dict[str, str]:
        found = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file() and ".cache" not in p.parts}
        return {k: hashlib.sha256(p.read_bytes()).hexdigest() for k, p in found.items() if k != ".gitattributes"}

    return held(a) == held(b)


def status(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def test_there_and_back(hub: FakeHub, api: HfApi, files: Path, tmp_path: Path, way: str) -> None:
    assert api.create_repo("alice/q", private=True).repo_id == "alice/q"
    commit = api.upload_folder(repo_id="alice/q", folder_path=files)
    tree = hub.files("alice/q")
    assert tree["model.safetensors"].sha256 and tree["plots/a.png"].sha256 and tree["config.json"].data
    assert (tree["model.safetensors"].xet_hash is not None) == (way == "xet")
    assert same(files, Path(api.snapshot_download("alice/q", cache_dir=tmp_path / "c")))
    info = api.model_info("alice/q")
    assert info.private and info.sha == commit.oid and {"gptq", "license:apache-2.0"} <= set(info.tags or [])
    api.upload_folder(repo_id="alice/q", folder_path=files)
    assert len(hub.history("alice/q")) == 2, "nothing changed, so there is no new commit"
    assert not [r for r in hub.log if r.get("leaked")]


def test_read_without_xet_and_in_parts(
    hub: FakeHub, api: HfApi, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.create_repo("alice/q")
    api.upload_folder(repo_id="alice/q", folder_path=files)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert same(files, Path(api.snapshot_download("alice/q", cache_dir=tmp_path / "c"))) and hub.calls("GET", "/_cdn/")
    hub.fault("/_cdn/", action="truncate", after=1000)
    with pytest.raises(Exception, match="reset by peer"):
        api.hf_hub_download("alice/q", "model.safetensors", cache_dir=tmp_path / "d")
    url = f"{hub.url}/alice/q/resolve/main/config.json"
    part = get_session().get(url, headers={"Range": "bytes=1-20", "Authorization": f"Bearer {api.token}"})
    assert (part.status_code, part.text) == (206, '"quantization_config')
    hub.multipart, hub.part_size = 100_000, 120_000
    (files / "model.safetensors").write_bytes(os.urandom(300_000))
    api.upload_folder(repo_id="alice/q", folder_path=files)
    assert len(hub.calls("PUT", "/part/")) == 3 and len(hub.calls("POST", "/complete")) == 1


def test_who_may_what(hub: FakeHub, api: HfApi, files: Path, tmp_path: Path) -> None:
    api.create_repo("alice/q", private=True)
    api.upload_folder(repo_id="alice/q", folder_path=files)

    def get(token: str | bool, name: str = "config.json") -> str:
        return HfApi(endpoint=hub.url, token=token).hf_hub_download("alice/q", name, cache_dir=tmp_path / f"c{token}")

    assert get(READ_TOKEN)
    with pytest.raises(RepositoryNotFoundError) as error:
        get(False)
    assert status(error) == 401
    with pytest.raises(RepositoryNotFoundError) as error:
        get(BOB)
    assert status(error) == 404
    with pytest.raises(HfHubHTTPError) as wrong:
        get("hf_wrong")
    assert status(wrong) == 401 and not isinstance(wrong.value, RepositoryNotFoundError)
    with pytest.raises(EntryNotFoundError):
        get(READ_TOKEN, "nothing.json")
    with pytest.raises(HfHubHTTPError) as wrong:
        HfApi(endpoint=hub.url, token=READ_TOKEN).upload_folder(repo_id="alice/q", folder_path=files)
    assert status(wrong) == 403
    with pytest.raises(HfHubHTTPError) as wrong:
        api.create_repo("alice/q")
    assert status(wrong) == 409
    hub.create_repo("meta/gated").gated = "manual"
    with pytest.raises(GatedRepoError):
        api.hf_hub_download("meta/gated", ".gitattributes", cache_dir=tmp_path / "c")
    assert api.model_info("meta/gated").gated == "manual"


def test_branches_tags_and_parents(hub: FakeHub, api: HfApi) -> None:
    hub.page_size = 3
    api.create_repo("alice/q")
    first = api.model_info("alice/q").sha
    api.create_branch("alice/q", branch="int4")
    api.create_commit(
        "alice/q", [CommitOperationAdd(f"d/{i}.txt", b"1") for i in range(7)], commit_message="a", revision="int4"
    )
    api.create_tag("alice/q", tag="v1", revision="int4")
    refs = api.list_repo_refs("alice/q")
    assert {b.name for b in refs.branches} == {"main", "int4"} and [t.name for t in refs.tags] == ["v1"]
    assert len(list(api.list_repo_tree("alice/q", recursive=True, revision="v1"))) == 9, "page after page"
    api.create_commit("alice/q", [CommitOperationAdd("b.txt", b"1")], commit_message="b")
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit("alice/q", [CommitOperationAdd("c.txt", b"1")], commit_message="c", parent_commit=first)
    assert status(error) == 412


def test_cards(hub: FakeHub, api: HfApi, files: Path) -> None:
    api.create_repo("alice/q")
    if VALIDATES:
        ModelCard(CARD.decode()).validate()
    for bad in (b"license: something", b"base_model_relation: smaller", b"tags: [1]"):
        text = f"---\n{bad.decode()}\n---\n"
        assert bad.split(b":")[0].decode() in complaints(text)[0][0]
        if VALIDATES:
            with pytest.raises(ValueError, match=bad.split(b":")[0].decode()):
                ModelCard(text).validate()
    assert "model-index" in complaints("---\nmodel-index: [{name: a, results: [{}]}]\n---\n")[0][0]
    (files / "README.md").write_bytes(CARD.replace(b"apache-2.0", b"something"))
    with pytest.raises(ValueError, match="license"):
        api.upload_folder(repo_id="alice/q", folder_path=files)
    assert len(hub.history("alice/q")) == 1
