"""A Hub on this machine, for the real client: everything goes over HTTP, and every request can be made to fail.

    with FakeHub(folder) as hub:
        hub.add_token("hf_a", "alice")
        api = HfApi(endpoint=hub.url, token="hf_a")

One port has two names: 127.0.0.1 is the Hub, localhost the storage behind it, so that a token sent there is seen. Both ways
of uploading work: plain LFS, and xet, whose content store is a local folder that hf_xet itself reads and writes.

Left out: quotas, scans, spaces, resource groups, scopes of tokens, and all but a few of the checks of a card's metadata.
"""

from __future__ import annotations

import base64
import datetime
import fnmatch
import hashlib
import json
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

LFS_PATTERNS = [
    f"*.{kind}"
    for kind in [
        "bin",
        "ckpt",
        "gz",
        "h5",
        "npy",
        "npz",
        "onnx",
        "parquet",
        "pb",
        "pickle",
        "pkl",
        "pt",
        "pth",
        "safetensors",
        "tar",
        "zip",
    ]
]
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
LFS_SIZE = 10 * 2**20
KINDS = {"models": "model", "datasets": "dataset"}
LICENSES = {
    *[
        "apache-2.0",
        "mit",
        "openrail",
        "bsd-3-clause",
        "cc-by-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-nd-4.0",
        "gpl-3.0",
        "llama3.1",
        "gemma",
        "other",
    ]
}


@dataclass
class Fault:
    """One thing going wrong: the first ``times`` requests that match, after ``skip`` others that do.

    Attributes:
        path: Regular expression, searched in the raw path with its query.
        action: ``status`` (answer with it, do nothing), ``reset`` (the connection drops before anything is read),
            ``reset_mid_body`` (after ``after`` bytes were read), ``lost_response`` (the request is carried out, and the
            connection drops), ``truncate`` (so many bytes of the answer, then the connection drops), ``stall`` (nothing
            happens for ``seconds``, then ``meanwhile``, then the request is carried out).
        method: Of HTTP; ``*`` is any.
    """

    path: str
    action: str = "status"
    method: str = "*"
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    after: int = 0
    seconds: float = 0.0
    meanwhile: Callable[[], None] = lambda: None
    skip: int = 0
    times: int = 1
    hits: int = 0


class HubError(Exception):
    """An answer that is not 200. The client reads the headers, not only the status."""

    def __init__(
        self, status: int, message: str, code: str | None = None, *,
        headers: dict[str, str] | None = None, body: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message.replace("\n", " ")} | (headers or {})
        self.body = body or {"error": message}
        if code is not None:
            self.headers["X-Error-Code"] = code


@dataclass
class Entry:
    """A file of a tree: ``data`` where it lies in git, ``sha256`` where it lies in LFS or xet."""

    oid: str
    size: int
    data: bytes | None = None
    sha256: str | None = None
    xet_hash: str | None = None

    @classmethod
    def regular(cls, data: bytes) -> Entry:
        return cls(git_oid(data), len(data), data)

    def described(self, path: str) -> dict[str, Any]:
        made: dict[str, Any] = {"type": "file", "oid": self.oid, "size": self.size, "path": path}
        if self.sha256:
            made["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return made | ({"xetHash": self.xet_hash} if self.xet_hash else {})


@dataclass
class Commit:
    sha: str
    parent: str | None
    tree: dict[str, Entry]
    title: str
    author: str
    date: str


@dataclass
class Repo:
    kind: str
    id: str
    private: bool = False
    gated: str | bool = False
    allowed: set[str] = field(default_factory=set)  # who may read it though it is gated
    refs: dict[str, str] = field(default_factory=dict)  # branches, and refs/pr/N
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    prs: dict[int, dict[str, Any]] = field(default_factory=dict)
    was_public: bool = False  # at any time

    def resolve(self, revision: str) -> str:
        for known in (self.refs, self.tags):
            if revision in known:
                return known[revision]
        for sha in self.commits:
            if len(revision) >= 7 and sha.startswith(revision):
                return sha
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def tree(self, revision: str) -> dict[str, Entry]:
        return self.commits[self.resolve(revision)].tree


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class FakeHub:
    """The server, and what tests ask of it.

    Attributes:
        log: Every request: method, path, host, whether it had a token, status.
        faults: What goes wrong; see `fault`.
        page_size: Entries of a tree in one answer.
        multipart: Bytes from which on an LFS file goes up in parts.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        for folder in ("lfs", "parts", "cas"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        self.page_size, self.multipart, self.part_size = 1000, 0, 5_000_000
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens: dict[str, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        self.log: list[dict[str, Any]] = []
        self.lock, self.closing, self._commits = threading.RLock(), threading.Event(), 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.url, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    # -- for tests ------------------------------------------------------------------------------------------------

    def add_token(self, token: str, user: str, role: str = "write", orgs: tuple[str, ...] = ()) -> None:
        self.tokens[token] = {"user": user, "role": role, "orgs": list(orgs)}

    def fault(self, path: str, **what: Any) -> Fault:
        made = Fault(path, **what)
        self.faults.append(made)
        return made

    def calls(self, method: str = "*", path: str = "") -> list[dict[str, Any]]:
        return [r for r in self.log if method in ("*", r["method"]) and re.search(path, r["path"])]

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        return self.repos[kind, repo_id]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, Entry]:
        return self.repo(repo_id).tree(revision)

    def history(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Newest first; the last one is the empty first commit."""
        repo, made = self.repo(repo_id), []
        sha: str | None = repo.resolve(revision)
        while sha is not None:
            made.append(repo.commits[sha])
            sha = repo.commits[sha].parent
        return made

    def create_repo(self, repo_id: str, kind: str = "model", *, private: bool = False, author: str = "system") -> Repo:
        repo = Repo(kind, repo_id, private, was_public=not private)
        repo.refs["main"] = self.commit(
            repo, None, {".gitattributes": Entry.regular(GITATTRIBUTES)}, "initial", author
        )
        self.repos[kind, repo_id] = repo
        return repo

    def put(self, repo_id: str, files: dict[str, bytes]) -> None:
        """Commit small files as if somebody had pushed them."""
        repo = self.repo(repo_id)
        tree = repo.tree("main") | {path: Entry.regular(data) for path, data in files.items()}
        repo.refs["main"] = self.commit(repo, repo.refs["main"], tree, "put", "system")

    # -- storage --------------------------------------------------------------------------------------------------

    def commit(self, repo: Repo, parent: str | None, tree: dict[str, Entry], title: str, author: str) -> str:
        self._commits += 1
        seed = json.dumps([repo.id, parent, title, self._commits, sorted((k, v.oid) for k, v in tree.items())])
        sha = hashlib.sha1(seed.encode()).hexdigest()
        repo.commits[sha] = Commit(sha, parent, tree, title, author, now())
        return sha

    def blob(self, sha256: str) -> Path:
        return self.root / "lfs" / sha256

    @property
    def cas_url(self) -> str:
        return f"local://{(self.root / 'cas').resolve()}"

    def xet_hash(self, sha256: str) -> str | None:
        """From the shards that hf_xet left in its store: records of 48 bytes, a header and one for each segment."""

        def shown(raw: bytes) -> str:
            return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))

        for file in (self.root / "cas").glob("xet/xorbs/shards/*.mdb"):
            raw, at = file.read_bytes(), 48
            while at + 48 <= len(raw) and raw[at : at + 32] != b"\xff" * 32:
                flags, segments = struct.unpack("<II", raw[at + 32 : at + 40])
                follow = segments * (2 if flags >> 31 else 1) + (flags >> 30 & 1)
                extension = at + 48 * follow
                if flags >> 30 & 1 and shown(raw[extension : extension + 32]) == sha256:
                    return shown(raw[at : at + 32])
                at += 48 * (1 + follow)
        return None

    def content(self, entry: Entry) -> bytes:
        """Of a file in LFS or xet; what came by xet is put together by hf_xet once."""
        assert entry.sha256 is not None
        path = self.blob(entry.sha256)
        if not path.exists() and entry.xet_hash:
            import hf_xet

            with hf_xet.XetSession().new_file_download_group(endpoint=self.cas_url) as group:
                group.start_download_file(hf_xet.XetFileInfo(entry.xet_hash, entry.size), str(path))
        if not path.exists():
            raise HubError(404, "NoSuchKey")
        return path.read_bytes()

    def entry_of(self, sha256: str) -> Entry:
        for repo in self.repos.values():
            for commit in repo.commits.values():
                for entry in commit.tree.values():
                    if entry.sha256 == sha256:
                        return entry
        raise HubError(404, "NoSuchKey")


# -- what the Hub makes of a card -------------------------------------------------------------------------------------


def metadata(content: str) -> Any:
    """YAML at the head of a card; None if there is none.

    Raises:
        yaml.YAMLError: It is not YAML.
    """
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def complaints(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card's metadata, a few of those that the Hub has."""
    try:
        found = metadata(content)
    except yaml.YAMLError as error:
        return [f"YAML error: {error}"], []
    if found is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(found, dict):
        return ["metadata must be a mapping"], []
    errors = []
    if "license" in found and found["license"] not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    for key in ("tags", "datasets", "language", "base_model"):
        if not all(isinstance(each, str) for each in _list(found.get(key))):
            errors.append(f'"{key}" must be a string or an array of strings')
    if found.get("base_model_relation", "quantized") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of adapter, merge, quantized, finetune')
    return errors + _index_complaints(found.get("model-index", [])), []


def _index_complaints(index: Any) -> list[str]:
    try:
        for model in index:
            for result in model["results"]:
                _ = model["name"], result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]
                _ = [(metric["type"], metric["value"]) for metric in result["metrics"]]
    except (TypeError, KeyError) as error:
        return [f'"model-index" is invalid: missing {error}']
    return []


def tags_of(tree: dict[str, Entry]) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """Metadata, tags derived from it, and config.json."""
    card, config = (tree[name].data or b"" if name in tree else b"" for name in ("README.md", "config.json"))
    found = metadata(card.decode("utf-8", "replace")) or {}
    settings = json.loads(config) if config else {}
    tags = [*_list(found.get("tags")), *(["safetensors"] if any(p.endswith(".safetensors") for p in tree) else [])]
    for base in _list(found.get("base_model")):
        tags += [f"base_model:{base}", f"base_model:{found.get('base_model_relation', 'finetune')}:{base}"]
    if found.get("license"):
        tags.append(f"license:{found['license']}")
    method = (settings.get("quantization_config") or {}).get("quant_method")
    return found, tags + ([method] if method else []), settings


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


# -- HTTP -------------------------------------------------------------------------------------------------------------


class _Dropped(Exception):
    """The connection is gone."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub
    query: dict[str, str]
    record: dict[str, Any]
    ailing: Fault | None
    _body: bytes | None

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        path, _, query = self.path.partition("?")
        self._body, self.ailing, self.query = None, None, dict(urllib.parse.parse_qsl(query))
        self.record = {
            "method": self.command, "path": self.path, "host": self.headers.get("Host", ""), "status": None,
            "token": bool(self.headers.get("Authorization")),
        }  # fmt: skip
        try:
            with self.hub.lock:
                self.hub.log.append(self.record)
                self.ailing = self._fault()
            if self._fails():
                return
            try:
                self._route([urllib.parse.unquote(part) for part in path.strip("/").split("/")])
            except HubError as error:
                self.body()
                self.send(error.status, error.body, error.headers)
        except (_Dropped, OSError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    # -- faults

    def _fault(self) -> Fault | None:
        for fault in self.hub.faults:
            if fault.method in ("*", self.command) and re.search(fault.path, self.path):
                if fault.skip > 0:
                    fault.skip -= 1
                elif fault.hits < fault.times:
                    fault.hits += 1
                    return fault
        return None

    def _fails(self) -> bool:
        """Whether the request was dealt with by a fault that is not to be carried out."""
        fault = self.ailing
        if fault is None:
            return False
        if fault.action in ("reset", "reset_mid_body"):
            if fault.action == "reset_mid_body":
                self.rfile.read(min(fault.after, int(self.headers.get("Content-Length") or 0)))
            self._drop()
        if fault.action == "stall":
            self.hub.closing.wait(fault.seconds)
            fault.meanwhile()
        if fault.action == "status":
            self.body()
            self.ailing = None
            self.send(fault.status, fault.body, fault.headers, kind="text/html")
        return fault.action == "status"

    def _drop(self) -> None:
        """Reset, not an orderly end: what a lost connection looks like."""
        self.record["status"] = "dropped"
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise _Dropped

    # -- reading and answering

    def body(self) -> bytes:
        if self._body is None:
            self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return self._body

    def json(self) -> Any:
        return json.loads(self.body() or b"{}")

    def send(
        self, status: int, body: Any = b"", headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        fault, self.record["status"] = self.ailing, status
        if fault is not None and fault.action == "lost_response":
            self._drop()
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.action == "truncate":
            self.wfile.write(data[: fault.after])
            self.wfile.flush()
            time.sleep(0.05)
            self._drop()
        self.wfile.write(data)

    def send_bytes(self, data: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        kind = "application/octet-stream"
        if self.command == "HEAD":
            self.send(200, b"", headers | {"Content-Length": str(len(data))}, kind)
        elif match is None:
            self.send(200, data, headers, kind)
        else:
            part = data[int(match[1]) : int(match[2]) + 1 if match[2] else None]
            end = int(match[1]) + len(part) - 1
            self.send(206, part, headers | {"Content-Range": f"bytes {match[1]}-{end}/{len(data)}"}, kind)

    # -- who may do what

    def who(self) -> dict[str, Any] | None:
        given = self.headers.get("Authorization")
        if not given:
            return None
        if (found := self.hub.tokens.get(given.removeprefix("Bearer "))) is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return found

    def user(self) -> dict[str, Any]:
        if (me := self.who()) is None:
            raise HubError(401, "Invalid username or password.")
        return me

    def repo(self, kind: str, repo_id: str, *, write: bool = False, content: bool = False) -> Repo:
        me, repo = self.who(), self.hub.repos.get((kind, repo_id))
        owner = repo_id.split("/")[0]
        member = me is not None and owner in [me["user"], *me["orgs"]]
        if repo is None or (repo.private and not member):
            raise HubError(404 if me else 401, "Repository not found", "RepoNotFound")
        if content and repo.gated and not member and (me is None or me["user"] not in repo.allowed):
            raise HubError(403 if me else 401, f"Access to {kind} {repo_id} is restricted.", "GatedRepo")
        if write:
            self.check_write(owner)
        return repo

    def check_write(self, owner: str) -> dict[str, Any]:
        me = self.user()
        if me["role"] != "write":
            raise HubError(403, "Forbidden: this token is read-only, a token with write role is needed")
        if owner not in [me["user"], *me["orgs"]]:
            raise HubError(403, f"Forbidden: you don't have the rights to write under {owner}")
        return me

    # -- routes

    def _route(self, parts: list[str]) -> None:
        if parts[0] == "_cdn":
            self.record["leaked"] = self.record["token"]
            self.send_bytes(self.hub.content(self.hub.entry_of(parts[1])), {"ETag": f'"{parts[1]}"'})
        elif parts[0] == "_up":
            self.storage(parts[1], parts[2], parts[3:])
        elif parts[0] == "api":
            self.api(parts[1:])
        else:
            kind = KINDS.get(parts[0], "model")
            parts = parts[1:] if parts[0] in KINDS else parts
            if parts[2:] == ["info", "lfs", "objects", "batch"]:
                self.lfs_batch(kind, f"{parts[0]}/{parts[1].removesuffix('.git')}")
            elif parts[2:3] == ["resolve"] and len(parts) > 4:
                self.resolve(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                raise HubError(404, "not found")

    def api(self, parts: list[str]) -> None:
        fixed: dict[str, Callable[[], None]] = {
            "whoami-v2": self.whoami, "validate-yaml": self.validate_yaml, "repos/create": self.create,
            "agent-harnesses": lambda: self.send(200, {"standardEnvVars": [], "harnesses": {}}),
        }  # fmt: skip
        if (found := fixed.get("/".join(parts))) is not None:
            return found()
        if parts[0] not in KINDS:
            raise HubError(404, "Sorry, we can't find the page you are looking for.")
        kind, repo_id, rest = KINDS[parts[0]], "/".join(parts[1:3]), parts[3:]
        if not rest or rest[0] == "revision":
            return self.info(kind, repo_id, rest[1] if rest else "main")
        of_repo: dict[str, Callable[[str, str, list[str]], None]] = {
            "tree": self.tree, "refs": self.refs, "branch": self.branch, "tag": self.tag,
            "settings": self.settings, "preupload": self.preupload, "commit": self.commit, "discussions": self.discussions,
            "xet-write-token": self.xet_token, "xet-read-token": self.xet_token,
        }  # fmt: skip
        if rest[0] not in of_repo:
            raise HubError(404, "not found")
        return of_repo[rest[0]](kind, repo_id, rest[1:])

    # -- account and cards

    def whoami(self) -> None:
        me = self.user()
        orgs = [{"name": org, "roleInOrg": "write"} for org in me["orgs"]]
        token = {"type": "access_token", "accessToken": {"displayName": "t", "role": me["role"]}}
        self.send(200, {"type": "user", "id": me["user"], "name": me["user"], "orgs": orgs, "auth": token})

    def validate_yaml(self) -> None:
        errors, warnings = complaints(self.json()["content"])
        if errors and "text/plain" in self.headers.get("Accept", ""):
            return self.send(400, "\n".join(f"- Error: {e}" for e in errors).encode(), kind="text/plain")
        record = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return self.send(400 if errors else 200, record)

    # -- repositories

    def create(self) -> None:
        given, me = self.json(), self.user()
        kind, owner = given.get("type") or "model", given.get("organization") or me["user"]
        repo_id = f"{owner}/{given['name']}"
        url = f"{self.hub.url}/{'' if kind == 'model' else f'{kind}s/'}{repo_id}"
        self.check_write(owner)
        private = given.get("visibility") == "private" or bool(given.get("private"))
        with self.hub.lock:
            if (kind, repo_id) in self.hub.repos:
                raise HubError(409, f"You already created this {kind} repo", body={"error": "exists", "url": url})
            self.hub.create_repo(repo_id, kind, private=private, author=me["user"])
        self.send(200, {"url": url, "name": repo_id, "id": repo_id})

    def info(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self.repo(kind, repo_id)
        sha = repo.resolve(revision)
        tree = repo.commits[sha].tree
        found, tags, config = tags_of(tree)
        shown = {key: config[key] for key in ("architectures", "model_type", "quantization_config") if key in config}
        self.send(200, {
            "_id": repo_id, "id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": sha,
            "private": repo.private, "gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0, "tags": tags,
            "lastModified": repo.commits[sha].date, "createdAt": repo.commits[sha].date, "cardData": found, "config": shown,
            "pipeline_tag": found.get("pipeline_tag"), "library_name": found.get("library_name"),
            "siblings": [{"rfilename": path} for path in sorted(tree)],
        })  # fmt: skip

    def tree(self, kind: str, repo_id: str, rest: list[str]) -> None:
        tree, prefix = self.repo(kind, repo_id).tree(rest[0]), "".join(f"{part}/" for part in rest[1:])
        inside = {path: entry for path, entry in tree.items() if path.startswith(prefix)}
        folders = {"/".join(path.split("/")[:n]) for path in inside for n in range(1, path.count("/") + 1)}
        found = [entry.described(path) for path, entry in inside.items()]
        found += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders]
        if self.query.get("recursive", "").lower() != "true":
            found = [each for each in found if "/" not in each["path"].removeprefix(prefix)]
        found.sort(key=lambda each: str(each["path"]))
        at = int(self.query.get("cursor", 0))
        headers, following = {}, at + self.hub.page_size
        if following < len(found):
            query = urllib.parse.urlencode(self.query | {"cursor": str(following)})
            headers["Link"] = f'<{self.hub.url}{self.path.partition("?")[0]}?{query}>; rel="next"'
        self.send(200, found[at:following], headers)

    def refs(self, kind: str, repo_id: str, _rest: list[str]) -> None:
        repo = self.repo(kind, repo_id)

        def shown(name: str, ref: str, sha: str) -> dict[str, str]:
            return {"name": name, "ref": ref, "targetCommit": sha}

        branches = [shown(n, f"refs/heads/{n}", sha) for n, sha in repo.refs.items() if not n.startswith("refs/")]
        tags = [shown(n, f"refs/tags/{n}", sha) for n, sha in repo.tags.items()]
        prs = [shown(n.split("/")[-1], n, sha) for n, sha in repo.refs.items() if n.startswith("refs/pr/")]
        self.send(200, {"branches": branches, "converts": [], "tags": tags, "pullRequests": prs})

    def branch(self, kind: str, repo_id: str, rest: list[str]) -> None:
        repo, start = self.repo(kind, repo_id, write=True), self.json().get("startingPoint") or "main"
        if rest[0] in repo.refs:
            raise HubError(409, f"Reference already exists: {rest[0]}")
        repo.refs[rest[0]] = repo.resolve(start)
        self.send(200, {})

    def tag(self, kind: str, repo_id: str, rest: list[str]) -> None:
        repo, name = self.repo(kind, repo_id, write=True), self.json()["tag"]
        if name in repo.tags:
            raise HubError(409, "Tag already exists")
        repo.tags[name] = repo.resolve(rest[0])
        self.send(200, {})

    def settings(self, kind: str, repo_id: str, _rest: list[str]) -> None:
        repo, given = self.repo(kind, repo_id, write=True), self.json()
        if "visibility" in given or "private" in given:
            repo.private = given.get("visibility") == "private" or bool(given.get("private"))
            repo.was_public |= not repo.private
        repo.gated = given.get("gated", repo.gated)
        self.send(200, {"private": repo.private})

    # -- uploading

    def preupload(self, kind: str, repo_id: str, rest: list[str]) -> None:
        into_pr = bool(self.query.get("create_pr")) or rest[0].startswith("refs/pr/")
        tree, made = self.repo(kind, repo_id, write=not into_pr).tree(rest[0]), []
        self.user()
        for file in self.json()["files"]:
            sample, path = base64.b64decode(file["sample"]), file["path"]
            by_name = any(fnmatch.fnmatch(path.split("/")[-1], pattern) for pattern in LFS_PATTERNS)
            large = file["size"] >= LFS_SIZE or b"\0" in sample or by_name
            old = {"oid": tree[path].sha256 or tree[path].oid} if path in tree else {}
            made.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False} | old)
        self.send(200, {"files": made})

    def xet_token(self, kind: str, repo_id: str, rest: list[str]) -> None:
        writing = "xet-write-token" in self.path
        into_pr = bool(self.query.get("create_pr")) or rest[0].startswith("refs/pr/")
        self.repo(kind, repo_id, write=writing and not into_pr, content=not writing)
        token, until = "xet-token", int(time.time()) + 3600
        headers = {
            "X-Xet-Cas-Url": self.hub.cas_url,
            "X-Xet-Access-Token": token,
            "X-Xet-Token-Expiration": str(until),
        }
        self.send(200, {"accessToken": token, "exp": until, "casUrl": self.hub.cas_url}, headers)

    def lfs_batch(self, kind: str, repo_id: str) -> None:
        given, made = self.json(), []
        self.user()
        ref = (given.get("ref") or {}).get("name", "")
        self.repo(kind, repo_id, write=bool(ref) and not ref.startswith("refs/pr/"))
        for each in given["objects"]:
            oid, size = each["oid"], each["size"]
            made.append({"oid": oid, "size": size, "authenticated": True})
            if not self.hub.blob(oid).exists():
                parts = -(-size // self.hub.part_size) if self.hub.multipart and size > self.hub.multipart else 0
                href, header = f"{self.hub.storage}/_up/{oid}/basic/{size}?X-Amz-Signature=s", {}
                if parts:
                    href, header = f"{self.hub.url}/_up/{oid}/complete", {"chunk_size": str(self.hub.part_size)}
                    for n in range(1, parts + 1):
                        header[f"{n:05d}"] = f"{self.hub.storage}/_up/{oid}/part/{n}?X-Amz-Signature=s"
                verify = {"href": f"{self.hub.url}/_up/{oid}/verify", "header": {}}
                made[-1]["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
        self.send(200, {"transfer": "basic", "objects": made}, kind="application/vnd.git-lfs+json")

    def storage(self, oid: str, step: str, rest: list[str]) -> None:
        """The store behind the Hub: whole files, parts, and what puts parts together."""
        if step in ("basic", "part"):
            self.record["leaked"] = self.record["token"]
            data = self.body()
            tag = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}
            if step == "part":
                (self.hub.root / "parts" / f"{oid}.{int(rest[0])}").write_bytes(data)
                return self.send(200, b"", tag)
            self._keep(oid, data)
            return self.send(200, b"", tag)
        given = self.json()
        if step == "complete":
            parts = [(self.hub.root / "parts" / f"{oid}.{part['partNumber']}") for part in given["parts"]]
            self._keep(oid, b"".join(part.read_bytes() for part in parts))
        elif not self.hub.blob(oid).exists() or self.hub.blob(oid).stat().st_size != given["size"]:
            raise HubError(404, "LFS object missing")
        return self.send(200, {})

    def _keep(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise HubError(400, "BadDigest")
        draft = self.hub.root / f"draft-{threading.get_ident()}"
        draft.write_bytes(data)
        draft.rename(self.hub.blob(oid))

    def commit(self, kind: str, repo_id: str, rest: list[str]) -> None:
        revision, new_pr = rest[0], bool(self.query.get("create_pr"))
        repo = self.repo(kind, repo_id, write=not new_pr and not revision.startswith("refs/pr/"))
        me, lines = self.user(), [json.loads(line) for line in self.body().splitlines() if line.strip()]
        head = lines[0]["value"]
        with self.hub.lock:
            parent = repo.resolve(revision)
            if not new_pr and head.get("parentCommit") and not parent.startswith(head["parentCommit"]):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(repo.commits[parent].tree)
            for line in lines[1:]:
                self._apply(tree, line["key"], line["value"])
            sha = self.hub.commit(repo, parent, tree, head["summary"], me["user"])
            made = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}
            if new_pr:
                number = self._open_pr(repo, head["summary"], me["user"], sha)
                made["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
            else:
                repo.refs[revision] = sha
        self.send(200, made)

    def _apply(self, tree: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if path.startswith("/") or {"..", ".git"} & set(path.split("/")):
            raise HubError(400, f"Invalid path: {path}")
        if key == "file":
            data = base64.b64decode(value["content"])
            if path == "README.md" and (errors := complaints(data.decode("utf-8", "replace"))[0]):
                raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
            tree[path] = Entry.regular(data)
        elif key == "lfsFile":
            tree[path] = self._large(path, value["oid"], value.get("size"))
        elif key == "deletedFile":
            if tree.pop(path, None) is None:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise HubError(400, f"unknown operation {key}")

    def _large(self, path: str, oid: str, size: int | None) -> Entry:
        xet_hash = None
        if not self.hub.blob(oid).exists() and (xet_hash := self.hub.xet_hash(oid)) is None:
            raise HubError(400, f"LFS object {oid} of {path} was not uploaded")
        size = self.hub.blob(oid).stat().st_size if size is None else size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()
        return Entry(git_oid(pointer), size, sha256=oid, xet_hash=xet_hash)

    # -- pull requests

    def _open_pr(self, repo: Repo, title: str, author: str, sha: str) -> int:
        number = len(repo.prs) + 1
        repo.prs[number] = {
            "num": number, "title": title, "status": "draft", "author": {"name": author}, "createdAt": now(),
            "isPullRequest": True, "repo": {"name": repo.id, "type": repo.kind}, "events": [], "filesWithConflicts": [],
            "changes": {"base": "refs/heads/main"}, "diff": "",
        }  # fmt: skip
        repo.refs[f"refs/pr/{number}"] = sha
        return number

    def discussions(self, kind: str, repo_id: str, rest: list[str]) -> None:
        repo = self.repo(kind, repo_id)
        if self.command == "GET" and not rest:
            found = list(repo.prs.values())
            return self.send(200, {"discussions": found, "count": len(found), "start": 0})
        if rest and int(rest[0]) not in repo.prs:
            raise HubError(404, "discussion not found")
        if self.command == "GET":
            return self.send(200, repo.prs[int(rest[0])])
        me, given = self.user(), self.json()
        if not rest:
            number = self._open_pr(repo, given["title"], me["user"], repo.refs["main"])
            return self.send(200, {"num": number, "url": f"{self.hub.url}/{repo_id}/discussions/{number}"})
        raise HubError(404, "not found")

    # -- downloading

    def resolve(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        repo = self.repo(kind, repo_id, content=True)
        sha = repo.resolve(revision)
        entry, headers = repo.commits[sha].tree.get(path), {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers=headers)
        headers["ETag"] = f'"{entry.oid}"'
        if entry.sha256 is None:
            return self.send_bytes(entry.data or b"", headers)
        headers["X-Linked-Etag"], headers["X-Linked-Size"] = f'"{entry.sha256}"', str(entry.size)
        headers["Location"] = f"{self.hub.storage}/_cdn/{entry.sha256}?X-Amz-Signature=s"
        if entry.xet_hash:
            headers["X-Xet-Hash"] = entry.xet_hash
            headers["Link"] = f'<{self.hub.url}/api/{kind}s/{repo_id}/xet-read-token/{sha}>; rel="xet-auth"'
        return self.send(302, b"", headers, kind="text/plain")
