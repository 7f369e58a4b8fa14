"""``hf-quant push`` and ``model.push_to_hub``: what is refused, what is sent, and what comes back."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from click.testing import Result
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

import hf_quant
from hf_quant import HfQuantConfig, load
from hf_quant.errors import CheckpointError, GateError, OptionError, PushError
from hf_quant.evaluation.gate import Budget
from hf_quant.hf import integrity
from hf_quant.hf.loading import sample_logits
from hf_quant.jobs.base import recalled, remember
from hf_quant.jobs.headers import opened
from hf_quant.publish import push as publishing
from hf_quant.publish.replay import replay
from hf_quant.publish.source import copy_notices, describe, metadata
from tests.yardsticks import make

from .conftest import BOB, REPO, run
from .fakehub import FakeHub
from .scenarios import TOKEN
from .scenarios import way as uploading

Push = Callable[..., Result]
TO = "alice/tiny-W4A16"


def change(path: Path, **what: Any) -> None:
    """Set fields of a file; None removes one."""
    changed = json.loads(path.read_text()) | what
    path.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))


def held(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_push(hub: FakeHub, push: Push, folder: Path) -> None:
    before = held(folder)
    plan = json.loads(run("push", folder, TO, "--dry-run", "--json").stdout)
    planned, asked = hf_quant.push(folder, TO, dry_run=True), []
    assert planned.to_dict() == plan and planned.url is None and "private if it is new" in repr(planned)
    assert hf_quant.push(folder, TO, confirm=lambda result: bool(asked.append(result))) == planned == asked[0]
    assert held(folder) == before and not hub.repos, "a dry run leaves everything as it is"
    made = json.loads(push("--public", "--tag", "v1", "--json").stdout)
    repo, tree = hub.repo(TO), hub.files(TO)
    assert set(tree) == {*plan["files"], "manifest.json", ".gitattributes"} and "LICENSE" in tree
    assert (repo.private, repo.gated, repo.tags["v1"]) == (False, False, made["commit"])
    assert plan["bytes"] == sum((folder / name).stat().st_size for name in plan["files"])
    assert made["url"] == f"{hub.url}/{TO}/commit/{made['commit']}"
    card = (tree["README.md"].data or b"").decode()
    assert f'from_pretrained("{TO}")' in card and metadata(card)["license"] == "apache-2.0"
    listed = json.loads(tree["manifest.json"].data or b"")["files"]
    assert set(listed) == set(plan["files"]) - {"README.md"}
    assert listed["model.safetensors"]["sha256"] == tree["model.safetensors"].sha256
    settings = json.loads(tree["tokenizer_config.json"].data or b"")
    assert not {"is_local", "local_files_only"} & settings.keys()
    assert run("card", "validate", folder).exit_code == 0
    schema = json.loads((Path(hf_quant.__file__).parent / "publish" / "schemas" / "results.schema.json").read_text())
    jsonschema.validate(json.loads(tree["results.json"].data or b""), schema)
    push("--public", "--tag", "v1")
    assert len(hub.history(TO)) == 2, "the same once more is no new commit"
    push("--revision", "int4")
    assert hub.repo(TO).refs["int4"] == made["commit"]


@pytest.mark.parametrize(
    ("spoil", "words", "code"),
    [
        (lambda f: change(f / "results.json", quality=None), "its quality was not measured", 3),
        (lambda f: (f / "results.json").unlink(), "its quality was not measured", 3),
        (lambda f: change(f / "results.json", gate=None), "held against no budget", 3),
        (lambda f: change(f / "results.json", gate={"budget": {"max_kl": 1e-9}, "passed": True, "misses": []}), "is over the 1e-09 allowed", 3),
        (lambda f: (f / "recipe.json").unlink(), "no recipe.json", 1),
        (lambda f: change(f / "recipe.json", schemes={}), "recipe.json lists other layers", 1),
        (lambda f: change(f / "recipe.json", source={"model": "tiny"}), "the licence of tiny is not known", 1),
        (lambda f: change(f / "recipe.json", source={"model": "tiny", "license": "cc-by-nc-nd-4.0"}), "forbids derivatives", 1),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b"\x80\x02"), "pytorch_model.bin: a pickle", 1),
        (lambda f: (f / "data.txt").write_bytes(b"PK\x03\x04"), "data.txt: a zip archive", 1),
        (lambda f: (f / "data").write_text("x"), "data: not of a kind that can be published", 1),
        (lambda f: (f / "modeling.py").write_text("1"), "modeling.py: a program", 1),
        (lambda f: (f / "notes.txt").symlink_to("/etc/hostname"), "notes.txt: not a regular file", 1),
        (lambda f: (f / "a[b].txt").write_text("x"), "odd characters", 1),
        (lambda f: (f / "notes.txt").write_text(f"my token is {TOKEN}"), "notes.txt: holds a Hugging Face token", 1),
        (lambda f: (f / "notes.txt").write_text("C:\\\\Users\\\\someone"), "notes.txt: holds somebody's home directory", 1),
        (lambda f: (f / "notes.txt").write_text(f"see {f.parent}/other"), "notes.txt: holds the name of a folder", 1),
        (lambda f: change(f / "recipe.json", note="sk-" + "a" * 30), "recipe.json: holds an API key", 1),
    ],
)  # fmt: skip
def test_what_is_refused(hub: FakeHub, push: Push, folder: Path, spoil: Any, words: str, code: int) -> None:
    spoil(folder)
    error = push(code=code).stderr
    assert words in error and TOKEN not in error
    assert not hub.repos, "nothing was sent"


def test_weights_that_were_not_measured(hub: FakeHub, push: Push, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "results.json was not measured on these weights" in push(code=1).stderr
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    assert "truncated" in push(code=1).stderr


def test_a_config_that_was_not_measured(hub: FakeHub, push: Push, folder: Path) -> None:
    change(folder / "config.json", rms_norm_eps=5.0)
    assert "not measured on these weights and this config.json" in push(code=1).stderr
    first = [
        file for file in json.loads((folder / "results.json").read_text())["files"] if file["name"] != "config.json"
    ]
    change(folder / "results.json", files=first)  # as the first versions wrote it
    push()


def test_pictures_of_a_ladder_stay(hub: FakeHub, push: Push, folder: Path) -> None:
    for name in ("size_and_kl-dark.png", "sensitivity-light.png", "report.html"):
        (folder / name).write_bytes(b"\x89PNG")
    push()
    assert not {name for name in hub.files(TO) if name.endswith((".png", ".html"))} - {"assets/layers.png"}


def test_what_others_put_there_is_kept(hub: FakeHub, push: Push, folder: Path) -> None:
    hub.create_repo("bob/full")
    hub.put("bob/full", {"model-00001-of-00002.safetensors": b"x", "README.md": b"---\nlicense: mit\n---\n"})
    assert "bob/full holds model-00001-of-00002.safetensors, which hf-quant" in push(to="bob/full", code=1).stderr
    push("--create-pr", "--allow-failed-gate", to="bob/full", code=1)
    hub.create_repo(TO)
    hub.put(TO, {"README.md": b"---\nlicense: mit\n---\n", "extra/adapter_model.safetensors": b"x"})
    push()
    written = hub.files(TO)["README.md"].data or b""
    assert "extra/adapter_model.safetensors" in hub.files(TO)
    hub.put(TO, {"README.md": written + b"\n## Notes\n"})
    assert f"README.md of {TO} was changed by hand" in push(code=1).stderr
    assert (hub.files(TO)["README.md"].data or b"").endswith(b"## Notes\n")
    push("--create-pr")
    hub.put(TO, {"README.md": written})
    push()


def test_the_base_of_its_own_repository(hub: FakeHub, push: Push, folder: Path) -> None:
    hub.create_repo("Alice/Base")
    hub.put("Alice/Base", {"config.json": b'{"model_type": "llama"}', "README.md": b"---\nlicense: mit\n---\n"})
    refused = push("--base-model", "Alice/Base", to="alice/base", code=1).stderr
    assert "alice/base is the model that" in refused and "push to another repository" in refused


@pytest.mark.parametrize("stated", ["unknown", ["mit", "apache-2.0"]])
def test_a_licence_that_is_none_can_be_named(hub: FakeHub, push: Push, folder: Path, stated: Any) -> None:
    change(folder / "recipe.json", source={"model": "tiny", "license": stated})
    assert "name it with --license" in push(code=1).stderr
    push("--license", "mit")


def test_a_base_that_is_a_folder_is_still_known(hub: FakeHub, push: Push, folder: Path, base: Path) -> None:
    remember(folder, str(base))
    push()
    assert recalled(folder) == base.resolve()


def test_a_secret_in_the_weights(hub: FakeHub, push: Push, folder: Path) -> None:
    from hf_quant.disk.digests import measured_files

    save_file(
        load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt", "by": TOKEN}
    )
    change(folder / "results.json", files=measured_files(folder))
    assert "model.safetensors: holds a Hugging Face token" in push(code=1).stderr


def test_kernels_that_compute_something_else(
    hub: FakeHub, push: Push, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_quant.nn import QuantLinear

    right = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: right(self, x) * 1.2)
    assert "gives 20.0% else than its weights dequantized" in push(code=1).stderr and not hub.repos


@pytest.mark.parametrize(("kind", "slug"), [("outliers", "W8A8"), ("moe", "W8A8"), ("moe", "W4A16-g32")])
def test_sound_kernels_are_told_from_rounding(kind: str, slug: str, tmp_path: Path) -> None:
    """INT8 activations with strong channels are far from the weights alone, and no kernel is to blame for that."""
    make(kind, tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=HfQuantConfig(slug)).eval()
    compared = replay(model)
    logits, errors = compared.logits, compared.errors
    assert logits is not None and compared.reached == len(errors) and "random" not in str(compared)
    assert torch.equal(logits, sample_logits(model)), "the kernels are chosen again"
    assert len(errors) == len(model.hf_quantizer.plan.schemes) - (kind == "moe") * 2, (
        "a stack of experts has two weights"
    )
    assert max(errors.values()) < publishing.CLOSE / 4
    if kind == "outliers":
        plain = sample_logits(model.dequantize())
        assert (logits - plain).norm() / plain.norm() > 0.1


def test_a_failed_gate_may_be_shown(hub: FakeHub, push: Push, folder: Path, base: Path, tmp_path: Path) -> None:
    assert push("--max-kl", 1e-6, code=3).stderr.startswith("Error: ")
    push("--max-kl", 1e-6, "--allow-failed-gate")
    text = (hub.files(TO)["README.md"].data or b"").decode()
    assert "**This model missed its quality gate and was published all the same: KL" in text
    push(code=3)
    assert "is over the 1e-06 allowed" in push(code=3).stderr, "it stays failed"
    run("quantize", base, "-o", tmp_path / "two", "--scheme", "W2A16-g32", "--max-kl", 1e-6, "-q", code=3)
    failed = run("push", tmp_path / "two-failed", TO, "--yes", "--allow-failed-gate", code=3)
    assert "with 2 bits the gate has to be passed" in failed.stderr


def test_no_budget_was_set(hub: FakeHub, push: Push, folder: Path) -> None:
    change(folder / "results.json", gate=None)
    assert "say what it may cost: for example --max-kl 0.02" in push(code=3).stderr
    assert "which is not measured" in push("--min-cosine", "99%", code=1).stderr
    with pytest.raises(OptionError, match="nosuch: no such folder"):
        hf_quant.push("nosuch", TO)
    push("--min-top1", "0%")
    assert json.loads((folder / "results.json").read_text())["gate"] == {
        "budget": {"min_top1": 0.0}, "passed": True, "misses": [],
    }  # fmt: skip


def test_a_base_on_the_hub(hub: FakeHub, push: Push, folder: Path, base: Path) -> None:
    """Its own spelling, its licence, its notices, its gate; and it has to be what the model was made from."""
    head = {
        "license": "other",
        "license_name": "gemma-x",
        "license_link": "https://example.org",
        "extra_gated_prompt": "Ask.",
    }
    hub.create_repo("Org/Tiny").gated = "manual"
    hub.repo("Org/Tiny").allowed.add("alice")
    hub.put("Org/Tiny", {
        "README.md": f"---\n{yaml.safe_dump(head)}---\n".encode(), "config.json": b'{"model_type": "llama"}',
        "NOTICE.txt": b"Keep this.", "notices/x": b"not this",
    })  # fmt: skip
    (folder / "LICENSE").unlink()
    change(folder / "recipe.json", source={"model": "Org/Tiny", "revision": hub.repo("Org/Tiny").refs["main"]})
    push("--public")
    repo, tree = hub.repo(TO), hub.files(TO)
    assert (repo.private, repo.gated) == (False, "manual") and len(hub.calls("PUT", "/settings")) == 1
    data = metadata((tree["README.md"].data or b"").decode())
    assert (
        data["base_model"] == "Org/Tiny"
        and data["license_link"] == "https://example.org"
        and data["extra_gated_prompt"]
    )
    assert tree["NOTICE.txt"].data == b"Keep this." and b"Gemma Terms" in (tree["NOTICE"].data or b"")
    tags = HfApi(endpoint=hub.url, token=TOKEN).model_info(TO).tags or []
    assert "base_model:quantized:Org/Tiny" in tags
    with pytest.raises(OSError, match="403"):
        HfApi(endpoint=hub.url, token=BOB).hf_hub_download(TO, "config.json")
    push("--gated", "off")
    assert repo.gated is False and "extra_gated_prompt" not in (hub.files(TO)["README.md"].data or b"").decode()
    assert "not apache-2.0" in push("--license", "apache-2.0", code=1).stderr
    hub.put("Org/Tiny", {"config.json": b'{"model_type": "qwen3"}'})
    change(folder / "recipe.json", source={"model": "tiny"})
    assert "was not made from that" in push("--base-model", "Org/Tiny", code=1).stderr
    hub.put("Org/Tiny", {"config.json": b'{"model_type": "llama"}'})
    push("--base-model", "Org/Tiny")
    source = json.loads((folder / "recipe.json").read_text())["source"]
    assert (source["model"], source["revision"], source["gated"]) == ("Org/Tiny", None, "manual")
    assert "is not on the Hub" in push("--base-model", "Org/Nothing", code=1).stderr


def test_what_a_base_plants_as_notices(hub: FakeHub, push: Push, folder: Path) -> None:
    """Only texts that are sound are carried on; a notice of the base stands beside the line that its licence asks for."""
    hub.create_repo("eve/base")
    hub.put("eve/base", {
        "README.md": b"---\nlicense: gemma\n---\n", "config.json": b'{"model_type": "llama"}', "LICENSE.py": b"import os",
        "license.bin": b"\x80\x04x", "NOTICE.safetensors": b"junk", "notice.html": b"<script>", "LICENSE.env": b"x",
        "license_a.txt": b"cos\nsystem\n(S'id'\ntR.", "COPYING": b"Copy this.", "NOTICE": b"Keep this.",
    })  # fmt: skip
    said = push("--base-model", "eve/base").stderr
    tree = hub.files(TO)
    assert {n for n in tree if n.lower().startswith(("lic", "not", "cop"))} == {"LICENSE", "COPYING", "NOTICE"}
    assert tree["NOTICE"].data == (
        b"Keep this.\nGemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
    )
    assert "license_a.txt of eve/base: a pickle, which runs code when it is loaded, so it is not copied" in said
    push("--base-model", "eve/base")
    assert len(hub.history(TO)) == 2, "the same once more is no new commit"
    hub.put("eve/base", {"COPYING.txt": f"by {TOKEN}".encode()})
    assert "COPYING.txt: holds a Hugging Face token" in push("--base-model", "eve/base", code=1).stderr
    assert "COPYING.txt" not in hub.files(TO)


def test_what_was_looked_through_is_what_goes(
    hub: FakeHub, push: Push, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that changes before the upload ends it; one that changes during it goes as it was looked through."""
    right = publishing.check_runs

    def slow(*args: Any) -> None:
        right(*args)
        change(folder / "generation_config.json", note=TOKEN)

    monkeypatch.setattr(publishing, "check_runs", slow)
    assert "generation_config.json was changed while it was being published" in push(code=1).stderr and not hub.repos
    change(folder / "generation_config.json", note="")
    monkeypatch.setattr(publishing, "check_runs", lambda *_: None)
    hub.fault("preupload", action="stall", seconds=0.1, method="POST", meanwhile=lambda: (
        (folder / "README.md").write_text(f"SECRET {TOKEN}"), (folder / "evil.py").write_text("x"),
        change(folder / "tokenizer_config.json", note=TOKEN),
    ))  # fmt: skip
    push("--public")
    tree = hub.files(TO)
    assert TOKEN.encode() not in b"".join(entry.data or b"" for entry in tree.values()) and "evil.py" not in tree


def test_links_of_a_local_base(tmp_path: Path, measured: Path) -> None:
    """What a link outside of the folder points to is not read; links as the client's cache makes them are."""
    (tmp_path / "secret").write_text("machine corp login alice password hunter2")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "LICENSE").symlink_to(tmp_path / "secret")
    (tmp_path / "base" / "README.md").symlink_to(tmp_path / "secret")
    (tmp_path / "base" / "NOTICE").symlink_to("texts.dat")
    (tmp_path / "base" / "texts.dat").write_text("Keep this.")
    said: list[str] = []
    (tmp_path / "out").mkdir()
    assert copy_notices(str(tmp_path / "base"), None, tmp_path / "out", said.append) == ["NOTICE"]
    assert held(tmp_path / "out") == {"NOTICE": b"Keep this."} and not (tmp_path / "out" / "NOTICE").is_symlink()
    assert said == ["LICENSE: a link that leaves the folder of the model, so it is not copied"]
    assert describe(str(tmp_path / "base")) == {"model": "base", "revision": None}
    store = tmp_path / "models--a--b"
    (store / "blobs").mkdir(parents=True)
    (store / "blobs" / "abc").write_text("Cached.")
    (store / "snapshots" / "1").mkdir(parents=True)
    (store / "snapshots" / "1" / "LICENSE").symlink_to("../../blobs/abc")
    assert copy_notices(str(store / "snapshots" / "1"), None, tmp_path / "out", said.append) == ["LICENSE"]


def test_a_model_made_from_the_hub(hub: FakeHub, api: HfApi, base: Path, tmp_path: Path) -> None:
    """The recipe knows commit and licence, the folder has the notices, and publishing needs nothing said."""
    api.create_repo("alice/base")
    api.upload_folder(repo_id="alice/base", folder_path=base)
    commit = hub.repo("alice/base").refs["main"]
    hub.put("alice/base", {"README.md": b"---\nlicense: mit\n---\n"})  # afterwards, and not what was quantized
    few = ["--text", base / "heldout.txt", "--max-kl", 9, "-q"]
    run("quantize", "alice/base", "--revision", commit, "-o", tmp_path / "q", "--scheme", "W4A16-g32", *few)
    source = json.loads((tmp_path / "q" / "recipe.json").read_text())["source"]
    assert source == {
        "model": "alice/base", "revision": commit, "license": "apache-2.0", "language": "en", "pipeline_tag": "text-generation",
    }  # fmt: skip
    assert (tmp_path / "q" / "LICENSE").read_text() == "Apache License\n"
    run("push", tmp_path / "q", "alice/base-W4A16", "--yes", "-q")
    data = metadata((hub.files("alice/base-W4A16")["README.md"].data or b"").decode())
    assert (data["base_model"], data["license"]) == ("alice/base", "apache-2.0")


def test_usage(hub: FakeHub, push: Push, folder: Path) -> None:
    assert "nobody is there to ask" in run("push", folder, TO, code=2).stderr
    assert "goes alone" in push("--create-pr", "--tag", "v1", code=2).stderr
    assert "changes no settings" in push("--revision", "refs/pr/1", "--private", code=2).stderr
    (folder / "tokenizer_config.json").write_text("{oops")
    assert "tokenizer_config.json: not JSON" in push(code=1).stderr
    assert "'tiny' names no owner" in push(to="tiny", code=2).stderr


def test_pull_request(hub: FakeHub, push: Push) -> None:
    hub.create_repo("bob/tiny")
    url = push("--create-pr", "-q", to="bob/tiny").stdout.strip()
    assert url == f"{hub.url}/bob/tiny/discussions/1" and "config.json" not in hub.files("bob/tiny")
    assert "model.safetensors" in hub.files("bob/tiny", "refs/pr/1") and not hub.repo("bob/tiny").private
    assert push("--create-pr", "-q", to="bob/tiny").stdout.strip() == url, "the same goes to the same"


def test_push_to_hub(hub: FakeHub, folder: Path, base: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    said: list[str] = []
    assert model.push_to_hub(TO, private=False, say=said.append).startswith(f"{hub.url}/{TO}/commit/")
    assert not hub.repo(TO).private and "manifest.json" in hub.files(TO)
    with pytest.raises(GateError, match="is over the 1e-06 allowed"):
        model.push_to_hub(TO, budget=Budget(max_kl=1e-6))
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    with pytest.raises(PushError, match=r"model\.norm\.weight of the model in memory is not what"):
        model.push_to_hub(TO, say=said.append)
    fresh: Any = AutoModelForCausalLM.from_pretrained(base, quantization_config=HfQuantConfig("W4A16-g32"))
    with pytest.raises(PushError, match="nobody measured what this model lost"):
        fresh.push_to_hub("alice/other")
    with pytest.raises(PushError, match="--create-pr goes alone"):
        model.push_to_hub(TO, create_pr=True, tag="v1")
    with pytest.raises(PushError, match="takes no max_shard_size for a quantized model"):
        fresh.push_to_hub("alice/other", max_shard_size="1GB")
    change(folder / "recipe.json", source={"model": "tiny"})
    with torch.no_grad():
        model.model.norm.weight.div_(2)
    with pytest.raises(PushError, match=r"in Python: license="):
        model.push_to_hub("alice/licensed", say=said.append)
    assert model.push_to_hub("alice/licensed", license="mit", say=said.append)
    assert ("model", "alice/other") not in hub.repos


def test_other_ways_of_publishing(hub: FakeHub, base: Path, tmp_path: Path) -> None:
    """What transformers can do besides goes through the gate or ends; adapters are no quantized model."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, quantization_config=HfQuantConfig("W4A16-g32"))
    for way in (
        lambda: model.save_pretrained(tmp_path / "a", push_to_hub=True, repo_id="alice/a"),
        lambda: model.save_pretrained(tmp_path / "a", True, None, True, repo_id="alice/a"),
        lambda: copy.deepcopy(model).save_pretrained(tmp_path / "a", push_to_hub=True, repo_id="alice/a"),
    ):
        with pytest.raises(PushError, match=r"would publish a quantized model unmeasured: publish it with"):
            way()
    assert not hub.repos and not (tmp_path / "a").exists(), "refused before anything is made"
    words = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(base))
    with pytest.raises(PushError, match=r"TextGenerationPipeline.push_to_hub would publish"):
        words.push_to_hub("alice/pipe")
    assert "model.safetensors" not in hub.files("alice/pipe")
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, TrainingArguments(output_dir=str(tmp_path / "t"), push_to_hub=True, report_to=[]))
    model.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "model.safetensors").is_file()
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).push_to_hub("alice/adapter")
    assert set(hub.files("alice/adapter")) >= {"adapter_model.safetensors"}
    assert "model.safetensors" not in hub.files("alice/adapter")
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=HfQuantConfig("W4A16-g32")).dequantize()
    assert not {"push_to_hub", "save_pretrained"} & plain.__dict__.keys(), (
        "what it is then is transformers' own affair"
    )
    plain.push_to_hub("alice/plain")
    assert "model.safetensors" in hub.files("alice/plain")


PULL = """
import sys, torch
torch.set_num_threads(int(sys.argv[2]))
from transformers import AutoModelForCausalLM
models = {name: AutoModelForCausalLM.from_pretrained(name) for name in sys.argv[3:]}
from hf_quant.hf import integrity
from hf_quant.hf.loading import sample_logits
from hf_quant.jobs.base import recalled, remember
from hf_quant.jobs.headers import opened
for name, model in models.items():
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "QuantLinear"
    torch.save(sample_logits(model), f"{sys.argv[1]}/{name.rpartition('/')[2]}.pt")
"""


def environment(hub: FakeHub, home: Path, **more: str) -> dict[str, str]:
    """Of a process that knows nothing but the Hub: no cache, no login but the token."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return mine | {
        "HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_PROGRESS_BARS": "1"
    } | more  # fmt: skip


def test_there_and_back_in_another_process(hub: FakeHub, tmp_path: Path) -> None:
    """The example: the shipped model in 4 bits, pushed both ways, pulled into an empty cache, bit for bit the same."""
    example, made = REPO / "examples" / "publish.py", tmp_path / "int4"
    if not example.is_file():
        pytest.skip("no examples beside the tests")
    few = ["--context", "64", "--max-tokens", "256", "--max-kl", "0.1"]
    call = [sys.executable, str(example), "alice/int4-xet", str(tmp_path), *few]
    done = subprocess.run(call, env=environment(hub, tmp_path / "a"), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"{hub.url}/alice/int4-xet/commit/" in done.stdout, done.stderr
    with uploading("lfs"):
        run("push", made, "alice/int4-lfs", "--yes", "-q")
    for way in ("lfs", "xet"):
        stored = hub.files(f"alice/int4-{way}")["model.safetensors"]
        assert hub.repo(f"alice/int4-{way}").private and (stored.xet_hash is not None) == (way == "xet")
    call = [
        sys.executable,
        "-c",
        PULL,
        str(tmp_path),
        str(torch.get_num_threads()),
        "alice/int4-lfs",
        "alice/int4-xet",
    ]
    done = subprocess.run(call, env=environment(hub, tmp_path / "home"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = sample_logits(load(str(made)))
    assert all(torch.equal(torch.load(tmp_path / f"int4-{way}.pt"), expected) for way in ("lfs", "xet"))
    assert len(hub.calls("GET", "resolve/.*manifest.json")) == 2, "the weights were checked against it"


def test_the_token_is_found_nowhere(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    """Not in what is said at debug level, in tracebacks, in files here, or in what the Hub has."""
    loud = {"HF_DEBUG": "1", "HF_QUANT_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "TRANSFORMERS_VERBOSITY": "debug"}
    push = [sys.executable, "-X", "dev", "-W", "ignore", "-m", "hf_quant.cli", "push", str(folder), TO, "--yes"]
    hub.fault("/settings", status=403, times=99)  # after everything else went well
    done = subprocess.run(
        [*push, "--public"],
        env=environment(hub, tmp_path / "home", **loud),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr[-3000:]
    heard = done.stdout + done.stderr
    assert "PushError" in heard and "Traceback" in heard and "authenticated: True" in heard
    places = {"heard": heard.encode()} | held(folder) | held(hub.root) | held(tmp_path / "home")
    places |= {f"hub {path}": entry.data for path, entry in hub.files(TO).items() if entry.data}
    assert [name for name, data in places.items() if TOKEN.encode() in data] == []
    assert not [each for each in hub.log if each.get("leaked")]


def test_errors_hold_no_request(hub: FakeHub, folder: Path) -> None:
    """The client's exceptions carry the request, and that the token: ours let go of them."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    hub.fault("/commit/", status=403, times=99)
    for how in ({}, {"create_pr": True}, {"revision": "refs/pr/7"}):
        with pytest.raises(PushError) as error:
            model.push_to_hub(TO if not how else "alice/nothing", say=lambda _: None, **how)
        assert error.value.__cause__ is None and error.value.__context__ is None, error.value


def test_of_a_model_on_the_hub_headers_are_enough(
    hub: FakeHub, push: Push, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push()
    bars: list[bool] = []
    monkeypatch.setattr("hf_quant.jobs.headers.their_bars", lambda *, shown: bars.append(shown) or nullcontext())
    seen = json.loads(run("inspect", TO, "--json").stdout)
    assert seen == json.loads(run("inspect", folder, "--json").stdout) and seen["layers_quantized"] == 14
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "no weights were downloaded"
    assert bars == [False], "the client's bars are hidden while a few small files are fetched"
    with opened(TO) as checkpoint:
        name = next(name for name in checkpoint.tensors if name.endswith("norm.weight"))
        assert torch.equal(checkpoint.read(name), load_file(folder / "model.safetensors")[name])
    run("convert", TO, "--to", "dense", "-o", tmp_path / "dense")
    assert not json.loads(run("inspect", tmp_path / "dense", "--json").stdout)["layers_quantized"]
    assert "the Hub gives no model of that name" in run("inspect", "alice/nothing", code=1).stderr


def test_what_was_pulled_is_checked(hub: FakeHub, push: Push, folder: Path, tmp_path: Path) -> None:
    push()
    assert json.loads(run("verify", TO, "--json").stdout)["files"] == len(
        json.loads((folder / "manifest.json").read_text())["files"]
    )
    assert run("verify", folder, "-q").stdout.strip() == run("verify", TO, "-q").stdout.strip()
    assert AutoModelForCausalLM.from_pretrained(TO)
    (blob,) = {path.resolve() for path in (tmp_path / "cache").rglob("model.safetensors")}
    data = bytearray(blob.read_bytes())
    data[-100] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    assert "model.safetensors has sha256" in run("verify", TO, code=1).stderr
    with pytest.raises(CheckpointError, match=r"model\.safetensors has sha256 .* The download is damaged"):
        AutoModelForCausalLM.from_pretrained(TO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_QUANT_VERIFY", "0")
        assert AutoModelForCausalLM.from_pretrained(TO)
    shutil.copyfile(blob, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has sha256"):
        load(str(folder))
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in run("verify", folder, code=1).stderr


def test_repositories_without_a_manifest(
    hub: FakeHub, api: HfApi, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(integrity.logger, "warning", said.append)
    for to in ("alice/plain", "alice/down", "alice/away"):  # transformers remembers which commit a name stood for
        api.create_repo(to)
        api.upload_folder(repo_id=to, folder_path=measured)
    for _ in range(2):
        assert AutoModelForCausalLM.from_pretrained("alice/plain")
    assert len(hub.calls("*", "resolve/.*manifest.json")) == 1 and not said, "it is known then that there is none"
    assert "was not published by hf-quant push" in run("verify", "alice/plain", code=1).stderr
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "is no folder here, and the Hub cannot be reached" in run("verify", "alice/plain", code=1).stderr
    hub.fault("resolve/.*manifest.json", status=403, times=99)
    assert AutoModelForCausalLM.from_pretrained("alice/down")
    assert said == ["alice/down: manifest.json cannot be read now, so its weights were not checked"]
    hub.fault("resolve/.*manifest.json", action="reset", times=99)
    hub.faults.pop(0)
    assert AutoModelForCausalLM.from_pretrained("alice/away") and said[1].startswith(
        "alice/away: manifest.json cannot be"
    )


def test_options_of_the_hub_reach_the_check(
    hub: FakeHub, api: HfApi, push: Push, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A private repository, in a folder of its own and another cache, read with a token that only the call knows."""
    said: list[str] = []
    monkeypatch.setattr(integrity.logger, "warning", said.append)
    push("--private")
    files = [*folder.glob("*.json"), folder / "model.safetensors"]
    for file in files:
        api.upload_file(path_or_fileobj=file, path_in_repo=f"sub/{file.name}", repo_id=TO)
    api.upload_file(
        path_or_fileobj=api.hf_hub_download(TO, "manifest.json"), path_in_repo="sub/manifest.json", repo_id=TO
    )
    monkeypatch.delenv("HF_TOKEN")
    for number, where in enumerate(({}, {"subfolder": "sub"}, {"revision": "main"})):
        options: dict[str, Any] = {"cache_dir": tmp_path / f"cache{number}", **where}
        assert AutoModelForCausalLM.from_pretrained(TO, token=TOKEN, **options) and not said, said
        assert any((tmp_path / f"cache{number}").rglob("manifest.json")), "it was fetched, so the weights were checked"
        before = len(hub.log)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
            assert AutoModelForCausalLM.from_pretrained(TO, local_files_only=True, **options)
        assert len(hub.log) == before and not said
    (blob,) = {path.resolve() for path in (tmp_path / "cache1").rglob("model.safetensors")}
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x00")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has sha256"):
        AutoModelForCausalLM.from_pretrained(TO, subfolder="sub", cache_dir=tmp_path / "cache1", local_files_only=True)


def test_what_others_published_is_loaded_offline(
    hub: FakeHub, api: HfApi, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(integrity.logger, "warning", said.append)
    api.create_repo("alice/other")
    api.upload_folder(repo_id="alice/other", folder_path=measured)
    api.snapshot_download("alice/other")  # by the client, which notes nothing of a manifest
    before = len(hub.log)
    for options in ({"local_files_only": True}, {}):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", not options)
        assert AutoModelForCausalLM.from_pretrained("alice/other", **options)
    asked = [each["path"] for each in hub.log[before:] if "adapter_config.json" not in each["path"]]
    assert not asked and not said, "transformers itself asks for an adapter, and nothing else"


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"files": {}}', '{"files": []}', '{"files": {"a": {"bytes": "1", "sha256": "x"}}}', "{" * 10**5,
             '{"files": {"../a": {"bytes": 1, "sha256": "' + "0" * 64 + '"}}}'],
)  # fmt: skip
def test_a_damaged_manifest(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load(str(folder))
