"""Publishes a folder: all checks come before anything is sent, and what has arrived is verified."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi, get_token

from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.core.scheme import QuantScheme
from hf_quant.disk.atomic import write_bytes
from hf_quant.disk.digests import MANIFEST, listed, same_files
from hf_quant.errors import GateError, PushError
from hf_quant.evaluation.gate import Budget
from hf_quant.evaluation.results import Quality
from hf_quant.hf import load
from hf_quant.publish import card, licence
from hf_quant.publish.manifest import manifest_of
from hf_quant.publish.replay import Replay, replay
from hf_quant.publish.scan import Snapshot, look_through, snapshot
from hf_quant.publish.source import describe, metadata, model_type, notices
from hf_quant.publish.target import Target
from hf_quant.publish.upload import Uploaded, upload

Gated = Literal["inherit", "auto", "manual", "off"]
CLOSE = 0.02  # relative error of a layer's output against the plain product: rounding to bfloat16 causes 0.003
NOTICE = "NOTICE"
LOCAL = (
    "is_local",
    "local_files_only",
)  # fields that transformers writes into tokenizer_config.json, which name its source
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Publication:
    """A folder that passed all checks.

    Attributes:
        folder: The folder.
        target: Where it is published.
        content: All files that are published, except the manifest.
        written: Names of the files that are written into the folder: card, pictures, recipe.json, results.json, notices.
        source: The base model, as recipe.json describes it.
    """

    folder: Path
    target: Target
    content: Snapshot
    written: frozenset[str]
    source: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """Names of all files."""
        return self.content.names

    @property
    def bytes(self) -> int:
        """Total size of all files."""
        return sum(digest.bytes for digest in self.content.files.values())


def prepare(
    folder: Path, target: Target, api: HfApi, *, gated: Gated = "inherit", budget: Budget | None = None,
    allow_failed_gate: bool = False, base_model: str | None = None, license: str | None = None,
    say: Callable[[str], None] = print,
) -> Publication:  # fmt: skip
    """Make all checks that need neither run the model nor write a file.

    Args:
        folder: From ``hf-quant quantize`` or ``ladder``.
        target: Where to publish it; its ``gated`` is decided here.
        api: The client, which is asked about the base.
        gated: Whether readers have to ask for access: as for the base, or a fixed choice.
        budget: Limits of quality loss, besides those of earlier checks.
        allow_failed_gate: Publish a model that failed its gate; the card begins with that.
        base_model: Hub id of the base, if the model was made from a folder.
        license: Licence of the base, if its card has none.
        say: Receives messages about notices of the base that are left out.

    Raises:
        PushError: The folder may not be published.
        GateError: Its quality is too low, or was not measured.
        CheckpointError: The checkpoint is damaged.
    """
    folder = Path(folder)
    if not _REPO_ID.fullmatch(target.repo_id):
        raise PushError(f"{target.repo_id!r} is not owner/name")
    recipe, results = card.facts(folder)
    snapshot_of_folder = snapshot(folder)
    card.check_replaceable(snapshot_of_folder.held.get(card.CARD))
    _check_measured(snapshot_of_folder, results)
    results = _gated(folder, recipe, results, budget or Budget(), allow_failed_gate)
    source = _source(folder, recipe["source"], api, base_model, license)
    if str(source["model"]).lower() == target.repo_id.lower():
        raise PushError(f"{target.repo_id} is the model that {folder} was made from: push to another repository")
    if (refusal := licence.why_not(source, target.repo_id)) is not None:
        raise PushError(refusal)
    gate: Any = source.get("gated", False) if gated == "inherit" else False if gated == "off" else gated
    target = replace(target, gated=gate or (None if gated == "inherit" else False))
    recipe = recipe | {"source": source, "repo_id": target.repo_id, "gated": gate}
    written = _written(snapshot_of_folder, recipe, results) | _notices(snapshot_of_folder, source, api, say)
    if problems := card.metadata_problems(metadata(written[card.CARD].decode())):
        raise PushError(f"{card.CARD}: {'; '.join(problems)}")
    content = snapshot_of_folder.plus(written)
    look_through(content, _tokens(api))
    return Publication(folder, target, content, frozenset(written), source)


def publish(
    ready: Publication, api: HfApi, *, model: Any = None, say: Callable[[str], None] = print, **patience: Any
) -> Uploaded:
    """Run the model loaded from its files, write the missing files, upload everything and verify it.

    Args:
        ready: From `prepare`.
        api: The client, with the token to push with.
        model: The model in memory that the push began with, if any: the folder must have the same weights.
        say: Receives messages about progress.
        patience: ``attempts`` and ``timeout`` of `upload`.

    Raises:
        PushError: The files do not give the model back, or the upload did not end.
    """
    say(f"loading {ready.folder} once more and comparing each kernel with plain products")
    say(str(check_runs(ready.folder, card.facts(ready.folder)[0], model)))
    ready.content.check_unchanged(ready.written)
    content = ready.content.plus({MANIFEST: manifest_of(ready.content.files)})
    for name in (*sorted(ready.written), MANIFEST):
        (ready.folder / name).parent.mkdir(exist_ok=True)
        write_bytes(ready.folder / name, content.held[name])
    look_through(
        content, _tokens(api), {**ready.content.held, **ready.content.headers}
    )  # the last step before the upload
    return upload(
        api,
        ready.folder,
        content.files,
        ready.target,
        held=content.held,
        kept={card.CARD: card.by_hand},
        say=say,
        **patience,
    )


def _tokens(api: HfApi) -> list[str]:
    """The token in use, which must not be published."""
    return [(api.token if isinstance(api.token, str) else get_token()) or ""]


def push_model(
    model: Any, repo_id: str, *, commit_message: str | None = None, private: bool | None = None,
    token: str | bool | None = None, revision: str | None = None, create_pr: bool = False, allow_failed_gate: bool = False,
    budget: Budget | None = None, gated: Gated = "inherit", tag: str | None = None, base_model: str | None = None,
    license: str | None = None, say: Callable[[str], None] = print, **unknown: Any,
) -> str:  # fmt: skip
    """``model.push_to_hub``: publish the folder that the model was loaded from, if the model is unchanged.

    Args:
        model: Loaded by ``from_pretrained`` from a folder that ``hf-quant quantize`` or ``ladder`` wrote.
        repo_id: ``owner/name``.
        commit_message: Message of the commit.
        private: None leaves an existing repository as it is, and makes a new one private.
        token: As for the Hub's client.
        revision: Branch.
        create_pr: Whether to open a pull request.
        allow_failed_gate: As in `prepare`.
        budget: As in `prepare`.
        gated: As in `prepare`.
        tag: Tag for the commit.
        base_model: As in `prepare`.
        license: As in `prepare`.
        say: Receives messages about progress.
        unknown: Further arguments of transformers' own method; refused, since files are published as measured.

    Returns:
        The URL of the commit.

    Raises:
        PushError: It may not be published, or the upload failed; the message says what has been sent.
    """
    if unknown:
        raise PushError(
            f"push_to_hub takes no {sorted(unknown)[0]} for a quantized model: files go as they were measured, with the card "
            "that hf-quant writes"
        )
    target = Target(repo_id, private, create_pr=create_pr, revision=revision, tag=tag)
    if (refusal := target.contradiction(gated)) is not None:
        raise PushError(refusal)
    folder, api = Path(model.name_or_path), HfApi(token=token)
    if not (folder / "recipe.json").is_file():
        raise PushError(
            "nobody measured what this model lost, so it is not published: make a folder with hf-quant quantize MODEL -o DIR "
            "--max-kl 0.02, and push that, or the model loaded from it"
        )
    target = replace(target, message=commit_message) if commit_message else target
    ready = prepare(
        folder, target, api, gated=gated, budget=budget, allow_failed_gate=allow_failed_gate, base_model=base_model,
        license=license, say=say,
    )  # fmt: skip
    return publish(ready, api, model=model, say=say).url


def check_runs(folder: Path, recipe: Mapping[str, Any], model: Any = None) -> Replay:
    """Load ``folder`` and run it, or layer by layer if it needs more than token ids: its layers must be those of ``recipe`` and ``model``, and its kernels must be correct.

    Raises:
        PushError: A layer differs, or a kernel differs from the product with dequantized weights.
    """
    again = load(str(folder)).eval()
    if {name: str(scheme) for name, scheme in again.hf_quantizer.plan.schemes.items()} != recipe["schemes"]:
        raise PushError(f"{folder}: recipe.json lists other layers or schemes than the checkpoint has")
    if model is not None and (name := _differs(model, again)) is not None:
        raise PushError(f"{name} of the model in memory is not what {folder} holds; save it, and measure that")
    compared = replay(again)
    if compared.logits is not None and not compared.logits.isfinite().all():
        raise PushError(f"{folder}: its logits are not finite")
    for name, error in compared.errors.items():
        if not error < CLOSE:
            raise PushError(f"{folder}: the kernel of {name} gives {error:.1%} else than its weights dequantized")
    return compared


def _differs(model: Any, again: Any) -> str | None:
    """The first tensor that differs, or None."""
    mine, stored = model.state_dict(), again.state_dict()
    for name in sorted(mine.keys() | stored.keys()):
        if name not in mine or name not in stored or not torch.equal(mine[name].cpu(), stored[name].cpu()):
            return str(name)
    return None


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_measured(checked: Snapshot, results: Mapping[str, Any]) -> None:
    """Check that the checkpoint is complete, and the one that was measured."""
    Checkpoint.open(checked.folder)
    if results and not same_files(results.get("files"), listed(checked.files)):
        raise PushError(
            f"{checked.folder}: results.json was not measured on these weights and this config.json; measure them with hf-quant "
            f"eval {checked.folder} --base MODEL --max-kl 0.02"
        )


def _budget_of(kind: str) -> str:
    """How a limit is set that can be measured of such a model."""
    option, argument = (
        ("--min-cosine 99%", "min_cosine=0.99") if kind == "encoder" else ("--max-kl 0.02", "max_kl=0.02")
    )
    return f"for example {option} (in Python: hf_quant.push(..., {argument}))"


def _gated(
    folder: Path, recipe: Mapping[str, Any], results: dict[str, Any], budget: Budget, allow: bool
) -> dict[str, Any]:
    """The results, with a new verdict of the gate on the measurements."""
    quality, known = results.get("quality"), (results.get("gate") or {}).get("budget") or {}
    reason = None
    if quality is None:
        reason = f"its quality was not measured; measure it with hf-quant eval {folder} --base MODEL --max-kl 0.02"
    elif not known and not budget:
        reason = f"it was held against no budget; say what it may cost: {_budget_of(quality['kind'])}"
    else:
        measured = Quality.from_dict(quality)
        misses = list(dict.fromkeys(Budget(**known).misses(measured) + budget.misses(measured)))
        stricter = known | budget.verdict(measured)["budget"]
        results = results | {"gate": {"budget": stricter, "passed": not misses, "misses": misses}}
        reason = "; ".join(misses) or None
    results = {key: value for key, value in results.items() if key != "allow_failed_gate"}
    if reason is None:
        return results
    if not allow:
        raise GateError(f"{folder} is not published: {reason}")
    if any(QuantScheme.parse(slug).bits <= 2 for slug in recipe["schemes"].values()):
        raise GateError(f"{folder} is not published: {reason}; with 2 bits the gate has to be passed")
    return results | {"allow_failed_gate": True}


def _is_id(source: Mapping[str, Any]) -> bool:
    return "/" in str(source["model"])


def _source(
    folder: Path, known: Mapping[str, Any], api: HfApi, base_model: str | None, license: str | None
) -> dict[str, Any]:
    """The facts about the base, asked again if it is on the Hub; ``license`` is used if its card has none."""
    source = dict(known)
    if base_model is not None:
        source |= describe(base_model, None, api) | {"revision": None}  # the commit was not recorded
        _check_base(folder, base_model, api)
    elif _is_id(source):
        source |= describe(str(source["model"]), source.get("revision"), api)
    if license is None:
        return source
    if not licence.is_stated(source):
        source["license"] = license
    if source["license"] != license:
        raise PushError(f"the licence of {source['model']} is {source['license']}, not {license}")
    return source


def _check_base(folder: Path, base: str, api: HfApi) -> None:
    stated = model_type(base, api)
    model_type_here = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if stated is not None and stated != model_type_here:
        raise PushError(
            f"{base} is a {stated} model and {folder} a {model_type_here} model: it was not made from that"
        )


def _written(checked: Snapshot, recipe: dict[str, Any], results: dict[str, Any]) -> dict[str, bytes]:
    """New files: the card, the facts that it is rendered from, and settings without traces of this machine."""
    drawn = card.pictures(results)
    written = {f"{card.ASSETS}/{name}": data for name, data in drawn.items()}
    written |= {"recipe.json": _json(recipe), card.CARD: card.render(recipe, results, drawn).encode()}
    if results:
        written["results.json"] = _json(results)
    if "tokenizer_config.json" in checked.held:
        settings = _read_json(checked, "tokenizer_config.json")
        if isinstance(settings, dict) and settings.keys() & set(LOCAL):
            written["tokenizer_config.json"] = _json({k: v for k, v in settings.items() if k not in LOCAL})
    return written


def _read_json(checked: Snapshot, name: str) -> Any:
    try:
        return json.loads(checked.held[name])
    except ValueError as error:
        raise PushError(f"{name}: not JSON: {error}") from None


def _notices(checked: Snapshot, source: Mapping[str, Any], api: HfApi, say: Callable[[str], None]) -> dict[str, bytes]:
    """Licence texts and notices of a base on the Hub that the folder lacks, and the line that its licence requires."""
    line = licence.notice(source)
    generated = f"{line}\n".encode() if line is not None else None
    theirs = notices(source["model"], source.get("revision"), api, say) if _is_id(source) else {}
    known = {name for name, data in checked.held.items() if name != NOTICE or data != generated}
    new = {name: data for name, data in theirs.items() if name not in known}
    if generated is not None and NOTICE not in known:
        before = new.get(NOTICE, b"")
        new[NOTICE] = before if generated.strip() in before else before + (b"\n" if before else b"") + generated
    return new


def _json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()
