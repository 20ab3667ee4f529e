"""A hub on this machine: a real HTTP server that keeps repositories in memory and speaks the endpoints that
huggingface_hub calls to create, upload, look up and download a model."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".png")
"""Endings of files that are stored apart and uploaded with PUT, as on the real hub."""
LICENSES = {"apache-2.0", "mit", "creativeml-openrail-m", "other"}


@dataclass
class Repo:
    """A model repository: commits (hash -> path -> bytes) and branches (name -> hash)."""

    private: bool
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Put a new commit on a branch."""
        digest = hashlib.sha1(f"{len(self.commits)}{branch}{sorted(files)}".encode()).hexdigest()
        self.commits[digest] = files
        self.branches[branch] = digest
        return digest

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


@dataclass
class LocalHub:
    """What the server holds and did. cut: endings of files whose download breaks off half way; cut_uploads: the
    connection breaks when a large file comes; requests: method, path and token of each."""

    repos: dict[str, Repo] = field(default_factory=dict)
    users: dict[str, str] = field(default_factory=lambda: {"hf_write": "me", "hf_other": "other"})
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    cut: tuple[str, ...] = ()
    cut_uploads: bool = False
    url: str = ""
    store: str = ""

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False) -> Repo:
        """A repository that somebody made before."""
        repo = self.repos[name] = Repo(private, gated)
        repo.commit("main", files)
        return repo

    def start(self) -> ThreadingHTTPServer:
        hub = self

        class Bound(Handler):
            state = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}"
        self.store = f"http://localhost:{server.server_port}"  # another host, as the real hub's large files have
        Thread(target=server.serve_forever, daemon=True).start()
        return server


class RefusedError(Exception):
    """An answer that is an error: status, X-Error-Code, message."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        self.status, self.code, self.message, self.headers = status, code, message, headers


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def etag(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if is_large(path) else hashlib.sha1(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: LocalHub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def answer(self) -> None:
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        self.body = self.read_body()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.state.requests.append((self.command, self.path, token))
        self.state.headers.append(str(self.headers))
        try:
            if token is not None and token not in self.state.users:
                raise RefusedError(401, message="Invalid credentials in Authorization header")
            self.user = self.state.users.get(token or "")
            for method, pattern, handle in ROUTES:
                found = re.fullmatch(pattern, split.path)
                if found and self.command in method:
                    handle(self, *map(unquote, found.groups()))
                    return
            raise RefusedError(404, message=f"no route for {self.command} {self.path}")
        except RefusedError as refusal:
            extra = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message, **refusal.headers}
            headers = {name: value for name, value in extra.items() if value}
            self.send(json.dumps({"error": refusal.message}).encode(), refusal.status, headers)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, data: Any, status: int = 200) -> None:
        self.send(json.dumps(data).encode(), status, {"Content-Type": "application/json"})

    def repo(self, name: str, *, write: bool = False) -> Repo:
        repo = self.state.repos.get(name)
        owner = name.split("/")[0]
        if repo is None or (repo.private and self.user != owner):
            raise RefusedError(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if repo.gated and self.user != owner:
            raise RefusedError(403 if self.user else 401, "GatedRepo", f"Access to model {name} is restricted")
        if write and self.user != owner:
            raise RefusedError(403, message="You don't have the rights to write")
        return repo

    def at(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        digest = repo.branches.get(revision, revision)
        if digest not in repo.commits:
            raise RefusedError(404, "RevisionNotFound", "Invalid rev id")
        return digest, repo.commits[digest]

    def create(self) -> None:
        if self.user is None:
            raise RefusedError(401, message="Invalid username or password.")
        data = json.loads(self.body)
        owner = data.get("organization") or self.user
        if owner != self.user:
            raise RefusedError(403, message=f"No rights to create a model under {owner!r}")
        name = f"{owner}/{data['name']}"
        told = {"url": f"{self.state.url}/{name}", "name": name}
        if name in self.state.repos:
            self.send_json({**told, "error": "You already created this model repo"}, 409)
            return
        self.state.add(
            name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=data.get("visibility") == "private"
        )
        self.send_json(told)

    def branch(self, name: str, branch: str) -> None:
        repo = self.repo(name, write=True)
        if branch in repo.branches:
            raise RefusedError(409, message="Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        self.send_json({})

    def validate_yaml(self) -> None:
        front = json.loads(self.body)["content"].split("---\n")[1]
        data, errors = yaml.safe_load(front), []
        if data.get("license", "mit") not in LICENSES:
            errors.append({"message": f'"license" must be one of {sorted(LICENSES)}'})
        self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, name: str, revision: str) -> None:
        self.at(self.repo(name, write=True), revision)
        files = [entry["path"] for entry in json.loads(self.body)["files"]]
        modes = [{"path": p, "uploadMode": "lfs" if is_large(p) else "regular", "shouldIgnore": False} for p in files]
        self.send_json({"files": modes})

    def batch(self, name: str) -> None:
        self.repo(name, write=True)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            href = f"{self.state.store}/upload/{entry['oid']}"
            objects.append({**entry, "actions": {"upload": {"href": href}}})
        self.send_json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if self.state.cut_uploads:
            self.close_connection = True
            return
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, message="hash mismatch")
        self.state.large[oid] = self.body
        self.send(b"")

    def commit(self, name: str, revision: str) -> None:
        repo = self.repo(name, write=True)
        files = dict(self.at(repo, revision)[1])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        pull = "create_pr" in self.query
        digest = repo.commit("refs/pr/1" if pull else revision, files)
        told = {"commitUrl": f"{self.state.url}/{name}/commit/{digest}", "commitOid": digest}
        self.send_json({**told, "pullRequestUrl": f"{self.state.url}/{name}/discussions/1"})

    def info(self, name: str, revision: str = "main") -> None:
        repo = self.repo(name)
        digest, files = self.at(repo, revision)
        siblings = [{"rfilename": path} for path in files]
        self.send_json({"id": name, "sha": digest, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, name: str, revision: str) -> None:
        entries = []
        for path, data in self.at(self.repo(name), revision)[1].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": etag(path, data)}
            if is_large(path):
                entry["lfs"] = {"oid": etag(path, data), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self.send_json(entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        digest, files = self.at(self.repo(name), revision)
        if path not in files:
            raise RefusedError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": digest})
        data = files[path]
        headers = {"X-Repo-Commit": digest, "ETag": f'"{etag(path, data)}"'}
        if is_large(path):
            self.state.large[etag(path, data)] = data
            linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
            self.send(
                b"", 302, {**headers, **linked, "Location": f"{self.state.store}/large/{etag(path, data)}/{path}"}
            )
        else:
            self.send(data, 200, headers)

    def download(self, oid: str, path: str) -> None:
        data, asked = self.state.large[oid], self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if path.endswith(self.state.cut or "\0"):
            self.break_off(data if not asked else b"", len(data) - start)
            return
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if asked else {}
        self.send(data[start:], 206 if asked else 200, headers)

    def break_off(self, data: bytes, promised: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(promised))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.close_connection = True


NAME = r"([^/]+/[^/]+)"
ROUTES: tuple[tuple[tuple[str, ...], str, Callable[..., None]], ...] = (
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate_yaml),
    (("POST",), f"/api/models/{NAME}/branch/(.+)", Handler.branch),
    (("POST",), f"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (("POST",), f"/api/models/{NAME}/commit/(.+)", Handler.commit),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), "/upload/(.+)", Handler.upload),
    (("GET", "HEAD"), f"/api/models/{NAME}", Handler.info),
    (("GET", "HEAD"), f"/api/models/{NAME}/revision/(.+)", Handler.info),
    (("GET", "HEAD"), f"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    (("GET", "HEAD"), f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    (("GET", "HEAD"), "/large/([^/]+)/(.+)", Handler.download),
)
