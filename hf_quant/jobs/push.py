"""Publish a folder on the Hub, if what was measured allows it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_quant.errors import OptionError
from hf_quant.jobs.base import recalled, remember
from hf_quant.jobs.options import budget, no_folder
from hf_quant.jobs.progress import Bar, Say, reporting
from hf_quant.jobs.results import Result, Row

if TYPE_CHECKING:
    from hf_quant.publish.push import Gated, Publication


@dataclass(frozen=True, repr=False)
class PushResult(Result):
    """What `push` published, or would publish.

    Attributes:
        repo_id: ``owner/name``.
        private: Whether it is; None: if it is new.
        gated: Whether readers have to ask; None: as it is.
        create_pr: As a pull request.
        revision: Branch; None: the main one.
        tag: Put on the commit.
        base: The model it was made from.
        license: Of the base.
        files: Names of all files but manifest.json.
        bytes: Of all of them.
        url: Where it is to be seen; None if nothing was sent.
        commit: Of the upload; None if nothing was sent.
    """

    repo_id: str
    private: bool | None
    gated: str | bool | None
    create_pr: bool
    revision: str | None
    tag: str | None
    base: str
    license: str | None
    files: Sequence[str]
    bytes: int
    url: str | None = None
    commit: str | None = None

    @classmethod
    def of(cls, ready: Publication) -> PushResult:
        """What would be published."""
        source, to = ready.source, ready.target
        return cls(
            to.repo_id, to.private, to.gated, to.create_pr, to.revision, to.tag, source["model"], source["license"],
            ready.names, ready.bytes,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        record = asdict(self)
        if self.url is None:
            del record["url"], record["commit"]
        return record

    def title(self) -> str:
        if self.url is not None:
            return f"complete and verified: {self.url}"
        seen = {True: "private", False: "public", None: "private if it is new"}[self.private]
        where = "as a pull request" if self.create_pr else f"on {self.revision or 'main'}, {seen}"
        return f"{self.repo_id}, {where}" + (f", gated ({self.gated})" if self.gated else "")

    def head(self) -> Row:
        return ("file",)

    def rows(self) -> Iterator[Row]:
        return ((name,) for name in self.files)

    def footnotes(self) -> Iterator[str]:
        yield f"base {self.base}, licence {self.license}"
        yield f"{len(self.files)} files and manifest.json, {self.bytes / 1e6:.1f} MB"


def push(
    folder: str | os.PathLike[str], repo_id: str, *, private: bool | None = None, gated: Gated = "inherit", create_pr: bool = False,
    revision: str | None = None, tag: str | None = None, base_model: str | None = None, license: str | None = None,
    allow_failed_gate: bool = False, max_kl: float | None = None, max_ppl_increase: float | None = None,
    min_top1: float | None = None, min_cosine: float | None = None, dry_run: bool = False, confirm: Callable[[PushResult], bool] | None = None,
    progress: bool | Bar = False, say: Say | None = None,
) -> PushResult:  # fmt: skip
    """Publish a folder with a card of what was measured, if that is inside its budget; ``hf-quant push``.

    Args:
        folder: Made by `quantize` or `ladder`.
        repo_id: ``owner/name``.
        private: None: a new repository becomes private, an old one stays as it is.
        gated: Whether readers have to ask: ``"inherit"`` (as for the base), ``"auto"``, ``"manual"`` or ``"off"``.
        create_pr: As a pull request.
        revision: Branch, or ``refs/pr/N``.
        tag: Put on the commit.
        base_model: Hub id of the base, where the model was made from a folder.
        license: Of the base, where its card names none.
        allow_failed_gate: Publish although the gate was missed; the card begins with it.
        max_kl: Gate: KL divergence to the base, nats per token.
        max_ppl_increase: Gate: perplexity over the base's minus one.
        min_top1: Gate: share of predictions whose likeliest token is the base's.
        min_cosine: Gate: cosine similarity of an encoder's embeddings to the base's.
        dry_run: Check, say what would go, and stop.
        confirm: Is shown what would go before anything is sent; nothing is, if it returns False.
        progress: True for the bars of the Hub's client.
        say: As for `quantize`.

    Raises:
        OptionError: Options contradict each other.
        GateError: The quality forbids it, or nobody measured it.
        PushError: Something else forbids it, or the upload did not end.
    """
    from hf_quant.publish.target import Target

    target = Target(repo_id, private, create_pr=create_pr, revision=revision, tag=tag)
    if (refusal := target.contradiction(gated)) is not None:
        raise OptionError(refusal)
    limits = budget(max_kl, max_ppl_increase, min_top1, min_cosine)
    if not Path(folder).is_dir():
        raise OptionError(f"{folder}: {no_folder(Path(folder), 'name the folder of a quantized model')}")

    from huggingface_hub import HfApi

    from hf_quant.publish.push import prepare, publish
    from hf_quant.publish.secrets import library

    api, base = HfApi(), recalled(Path(folder))
    with reporting(progress, say) as report:
        with report.stage("hashing and checking the files"):
            ready = prepare(
                Path(folder), target, api, gated=gated, budget=limits, allow_failed_gate=allow_failed_gate, base_model=base_model,
                license=license, say=report.say,
            )  # fmt: skip
        planned = PushResult.of(ready)
        if dry_run:
            return planned
        if (more := library()) is not None:
            report.say(more)
        if confirm is not None and not confirm(planned):
            return planned
        with report.stage("uploading and comparing"):
            sent = publish(ready, api, say=report.say)
        if base is not None:  # recipe.json was written again
            remember(Path(folder), str(base))
    return replace(planned, url=sent.url, revision=sent.revision, commit=sent.commit)
