"""Uploads a folder: the result is complete and verified, or an error says what has arrived and how to continue.

The Hub's client retries only some steps, waits forever if the Hub does not answer, and repeats a commit whose answer was
lost. Here every step is repeated after a temporary failure, every attempt first checks what the Hub has, a commit names its
parent, and a pull request is opened before anything is sent to it.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile, set_client_factory
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_quant.disk.digests import MANIFEST, Digest, read_manifest
from hf_quant.errors import CheckpointError, PushError
from hf_quant.hf._hooks import client_factory
from hf_quant.publish.target import Target

T = TypeVar("T")
ATTEMPTS = 6
TIMEOUT = 120.0  # seconds without a byte; the Hub may take that long to process a large commit
LONGEST_WAIT = 310.0  # seconds; the Hub counts requests in windows of 300
WEIGHTS = (".safetensors", ".safetensors.index.json")
PASSING = {404, 408, 409, 412, 425, 429}  # 404: a repository that was created a moment ago may be unknown elsewhere
TOKEN = "there is no token, or the Hub does not accept it; log in with: hf auth login"


@dataclass(frozen=True)
class Uploaded:
    """The result of an upload: ``commit`` at ``revision``, with its ``url``."""

    url: str
    revision: str
    commit: str


def upload(
    api: HfApi, folder: Path, files: Mapping[str, Digest], target: Target, *, held: Mapping[str, bytes] = MappingProxyType({}),
    kept: Mapping[str, Callable[[bytes], str | None]] = MappingProxyType({}), say: Callable[[str], None], attempts: int = ATTEMPTS, timeout: float = TIMEOUT,
) -> Uploaded:  # fmt: skip
    """Upload ``files`` of ``folder`` and verify them; a repeated call resumes an interrupted upload.

    A new repository is private until everything is verified. Weights of an earlier upload that are not in ``files`` are deleted;
    a repository with other weights is refused.

    Args:
        api: The client, with its token and endpoint.
        folder: The folder.
        files: Path in the folder and in the repository, to the digest of the file.
        target: Where to upload.
        held: Path to content of the files that are sent from memory and not from ``folder``.
        kept: Path to a function that says why the content of that file on the Hub must not be replaced, except in a pull request.
        say: Receives a message about every failure that is retried.
        attempts: Number of attempts for each step.
        timeout: Seconds to wait for an answer of the Hub.

    Raises:
        PushError: The upload failed; the message says why, what has arrived, and how to continue.
    """
    with _timeouts(timeout):
        return _Upload(api, Path(folder), files, held, kept, target, say, attempts).run()


class _IncompleteError(Exception):
    """The client reports success, but the Hub has other files."""


@dataclass(frozen=True)
class _Upload:
    api: HfApi
    folder: Path
    files: Mapping[str, Digest]
    held: Mapping[str, bytes]
    kept: Mapping[str, Callable[[bytes], str | None]]
    target: Target
    say: Callable[[str], None]
    attempts: int

    def run(self) -> Uploaded:
        to = self.target
        user = self._patiently("asking who the token belongs to", self._user)
        self._patiently(f"looking for {to.repo_id}", self._repository)
        revision = to.revision or "main"
        if to.create_pr:
            revision = self._patiently("opening a pull request", lambda: self._pull_request(user))
        elif to.revision and not to.revision.startswith("refs/"):
            self._patiently(
                f"making branch {revision}", lambda: self.api.create_branch(to.repo_id, branch=revision, exist_ok=True)
            )
        commit = self._patiently("uploading", lambda: self._send(revision))
        if not to.is_pull_request:
            self._patiently("changing settings", self._settings)
        if to.tag is not None:
            self._patiently(f"putting tag {to.tag}", lambda: self._tag(commit))
        shown = f"discussions/{revision.removeprefix('refs/pr/')}" if "refs/pr/" in revision else f"commit/{commit}"
        return Uploaded(f"{self.api.endpoint}/{to.repo_id}/{shown}", revision, commit)

    # -- steps, which may be repeated -----------------------------------------------------------------------------

    def _user(self) -> str:
        me = self.api.whoami()
        if (me.get("auth", {}).get("accessToken") or {}).get("role") == "read":
            raise PushError("the token may only read; pushing needs one that may write")
        return str(me["name"])

    def _repository(self) -> None:
        """Create the repository, and restrict access to it, before the first byte is sent."""
        to = self.target
        try:
            info = self.api.model_info(to.repo_id)
        except RepositoryNotFoundError:
            if to.is_pull_request:
                raise PushError(f"{to.repo_id}: no such repository, or the token may not see it") from None
            self.api.create_repo(to.repo_id, private=True, exist_ok=True)
            info = self.api.model_info(to.repo_id)
        if to.is_pull_request:
            if to.gated and not info.private and not info.gated:
                raise PushError(
                    f"readers of the base have to ask for it ({to.gated}), and anybody could read a pull request of "
                    f"{to.repo_id}: push to a repository that is gated or private"
                )
        elif not info.private and (closing := {key: value for key, value in self._changes(info).items() if value}):
            self.api.update_repo_settings(to.repo_id, **closing)

    def _pull_request(self, user: str) -> str:
        """The pull request for this content, which an earlier attempt may have opened."""
        title = f"{self.target.message} ({_name(self.files)})"
        for discussion in self.api.get_repo_discussions(self.target.repo_id, discussion_type="pull_request"):
            if discussion.title == title and discussion.author == user and discussion.status in ("open", "draft"):
                return f"refs/pr/{discussion.num}"
        return f"refs/pr/{self.api.create_pull_request(self.target.repo_id, title=title).num}"

    def _send(self, revision: str) -> str:
        head = self._head(revision)
        if not self._differing(head):
            return head  # nothing to do, or the answer to an earlier attempt was lost
        tree = self._tree(head)
        self._refuse_losses(tree, head)
        added = [CommitOperationAdd(path, self.held.get(path, self.folder / path)) for path in sorted(self.files)]
        gone = [CommitOperationDelete(path, is_folder=False) for path in self._stale(tree, head)]
        self.api.create_commit(
            self.target.repo_id, [*gone, *added], commit_message=self.target.message, revision=revision, parent_commit=head
        )  # fmt: skip
        head = self._head(revision)
        if wrong := self._differing(head):
            raise _IncompleteError(f"{len(wrong)} files differ from what was sent, {wrong[0]} first")
        return head

    def _settings(self) -> None:
        """Open access to the repository, in one call."""
        if changed := self._changes(self.api.model_info(self.target.repo_id)):
            self.api.update_repo_settings(self.target.repo_id, **changed)

    def _changes(self, info: Any) -> dict[str, Any]:
        """Settings that differ from the target."""
        settings = {"private": self.target.private, "gated": self.target.gated}
        return {name: value for name, value in settings.items() if value is not None and value != getattr(info, name)}

    def _tag(self, commit: str) -> None:
        tag, tags = self.target.tag, self.api.list_repo_refs(self.target.repo_id).tags
        at = {tag_info.name: tag_info.target_commit for tag_info in tags}.get(str(tag))
        if at is None:
            self.api.create_tag(self.target.repo_id, tag=str(tag), revision=commit)
        elif at != commit:
            raise PushError(f"tag {tag} is at {at[:12]} already; the upload itself is complete, at {commit[:12]}")

    # -- content of the repository --------------------------------------------------------------------------------

    def _head(self, revision: str) -> str:
        try:
            return str(self.api.model_info(self.target.repo_id, revision=revision).sha)
        except RevisionNotFoundError:
            if revision.startswith("refs/") and not self.target.create_pr:
                raise PushError(f"{self.target.repo_id} has no revision {revision}") from None
            raise

    def _tree(self, commit: str) -> dict[str, RepoFile]:
        tree = self.api.list_repo_tree(self.target.repo_id, recursive=True, revision=commit)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def _stale(self, tree: Mapping[str, RepoFile], commit: str) -> list[str]:
        """Weights of an earlier upload that are to be deleted."""
        return sorted(path for path in self._listed(tree, commit) if path in tree and path not in self.files)

    def _listed(self, tree: Mapping[str, RepoFile], commit: str) -> list[str]:
        """Weights in the manifest of an earlier upload; none if there was no such upload."""
        if MANIFEST not in tree or (MANIFEST in self.files and _same(tree[MANIFEST], self.files[MANIFEST])):
            return [path for path in self.files if MANIFEST in tree and path.endswith(WEIGHTS)]
        try:
            listed = read_manifest(self._downloaded(MANIFEST, commit))
        except CheckpointError:
            return []
        return [path for path in listed if path.endswith(WEIGHTS)]

    def _downloaded(self, path: str, commit: str) -> Path:
        return Path(self.api.hf_hub_download(self.target.repo_id, path, revision=commit))

    def _refuse_losses(self, tree: Mapping[str, RepoFile], commit: str) -> None:
        """Refuse to replace what this package did not write."""
        repo = self.target.repo_id
        for path in () if self.target.is_pull_request else self.kept.keys() & tree.keys():
            if (reason := self.kept[path](self._downloaded(path, commit).read_bytes())) is not None:
                raise PushError(
                    f"{path} of {repo} {reason}: copy it, delete it there and push again, or push with --create-pr"
                )
        listed = self._listed(tree, commit)
        for path, entry in sorted(tree.items()):
            foreign = "/" not in path and path.endswith(WEIGHTS) and path not in listed
            if foreign and not (path in self.files and _same(entry, self.files[path])):
                raise PushError(
                    f"{repo} holds {path}, which hf-quant push did not put there: push to another repository, or delete it there"
                )

    def _differing(self, commit: str) -> list[str]:
        """Paths that differ from the target, including weights that are to be deleted."""
        tree = self._tree(commit)
        differing = [path for path, digest in self.files.items() if not _same(tree.get(path), digest)]
        return differing + self._stale(tree, commit)

    # -- retries --------------------------------------------------------------------------------------------------

    def _patiently(self, what: str, step: Callable[[], T]) -> T:
        wait, reason = 1.0, ""
        for attempt in range(1, self.attempts + 1):
            try:
                return step()
            except PushError as refusal:
                refusal.__context__ = None  # the client's error contains the request with the token
                raise
            except Exception as error:  # raised below, without the request
                reason = self._reason(error)
                passing, pause = self._passes(error), min(max(_retry_after(error), wait), LONGEST_WAIT)
            if not passing:
                break
            if attempt < self.attempts:
                self.say(f"{what}: {reason}; again in {pause:.0f} s")
                time.sleep(pause)
                wait *= 2
        raise PushError(f"{what}: {reason.rstrip('.')}. {self._state()}")

    def _passes(self, error: BaseException) -> bool:
        """Whether the failure may be temporary."""
        response, status = _answer(error)
        if status is not None:
            elsewhere = response is not None and not str(response.request.url).startswith(self.api.endpoint)
            return status >= 500 or status in PASSING or (status in (400, 403) and elsewhere)  # an expired link
        lost = (_IncompleteError, json.JSONDecodeError, ConnectionError, TimeoutError, RuntimeError)
        return (isinstance(error, lost) or _transport(error)) and not isinstance(error, OfflineModeIsEnabled)

    def _reason(self, error: BaseException) -> str:
        response, status = _answer(error)
        detail = (getattr(error, "server_message", None) or "").split("\n")[0]
        if status == 401 or isinstance(error, LocalTokenNotFoundError):
            return TOKEN
        if status == 403:
            return f"the token may not write to {self.target.repo_id} (403{f': {detail}' if detail else ''})"
        if status == 429:
            return "too many requests (429)"
        if status is not None:
            where = "" if response is None else f" to {response.request.method} {response.request.url.path}"
            return f"the Hub answered {status}{where}{f': {detail}' if detail else ''}"
        if isinstance(error, json.JSONDecodeError):
            return "the Hub's answer is not JSON"
        if _transport(error):
            return f"the connection failed ({type(error).__name__})"
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

    def _state(self) -> str:
        """What an interrupted upload has left, as far as the Hub answers."""
        again = "The same command goes on from there"
        if self.target.create_pr:
            return f"{self.target.repo_id} itself is unchanged. {again}."
        try:
            left = self._differing(self._head(self.target.revision or "main"))
        except Exception:
            return f"What is at {self.target.repo_id} is not known. {again}."
        done = len(self.files) - len([path for path in left if path in self.files])
        return f"{done} of {len(self.files)} files are at {self.target.repo_id}. {again}."


def _same(entry: RepoFile | None, digest: Digest) -> bool:
    if entry is None or entry.size != digest.bytes:
        return False
    return entry.lfs.sha256 == digest.sha256 if entry.lfs is not None else entry.blob_id == digest.git


def _name(files: Mapping[str, Digest]) -> str:
    """A short name that identifies the content."""
    listed = json.dumps(sorted((path, digest.sha256) for path, digest in files.items()))
    return hashlib.sha256(listed.encode()).hexdigest()[:12]


# -- errors of the client ---------------------------------------------------------------------------------------------


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _answer(error: BaseException) -> tuple[Any, int | None]:
    """The response and its status in an error of the client; hf_xet gives only the status, as text."""
    for cause in _chain(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response, cause.response.status_code
        if isinstance(cause, ConnectionError) and (
            match := re.search(r"status (?:client|server) error \((\d{3})", str(cause))
        ):
            return None, int(match[1])
    return None, None


def _transport(error: BaseException) -> bool:
    """Whether it is an error of the transport, which is httpx or httpx2, depending on the version of the client."""
    return any(kind.__name__ == "TransportError" for cause in _chain(error) for kind in type(cause).__mro__)


def _retry_after(error: BaseException) -> float:
    """Seconds that the Hub asks to wait; 0 if it does not."""
    response, _ = _answer(error)
    if response is None:
        return 0.0
    limit = re.search(r"\br=0;\s*t=(\d+)", response.headers.get("RateLimit", ""))
    after = response.headers.get("Retry-After", "")
    return float(limit[1]) + 1 if limit else float(after) + 1 if after.isdigit() else 0.0


@contextmanager
def _timeouts(seconds: float) -> Iterator[None]:
    """Give the client, which waits forever by default, a timeout for reads and writes."""
    before = client_factory()

    def factory() -> Any:
        client = before()
        client.timeout = seconds
        return client

    set_client_factory(factory)
    try:
        yield
    finally:
        set_client_factory(before)
