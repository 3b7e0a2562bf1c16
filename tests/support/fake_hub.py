"""A Hugging Face Hub on loopback: the part of its HTTP API that huggingface_hub uses for files, repositories and commits."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_loopback"


class Repo:
    """A repository: each branch is a list of commits, each of which is files by path."""

    def __init__(self, private: bool = False):
        self.private = private
        self.branches: dict[str, list[dict[str, bytes]]] = {"main": [{}]}
        self.messages: list[str] = []

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit's id and files of a branch or a commit's id."""
        for commits in self.branches.values():
            for files in commits:
                if commit_id(files) == revision:
                    return revision, files
        if revision in self.branches:
            files = self.branches[revision][-1]
            return commit_id(files), files
        return None


def commit_id(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class FakeHub:
    """A context that serves ``repos``.

    Attributes:
        repos: by ``user/name``.
        log: (method, path, whether a token came with it) of each request.
        url: for ``HF_ENDPOINT``.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[tuple[str, str, bool]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = _chunks(self.rfile)
                token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                owner.log.append((self.command, unquote(self.path), token))
                status, headers, answer = owner.answer(self.command, unquote(self.path.partition("?")[0]), body, token)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(answer)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            def log_message(self, *args: object) -> None:
                """Say nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def put(self, repo: str, revision: str = "main", **files: bytes) -> str:
        """Add a commit; its id. The names' ``__`` is a dot."""
        branches = self.repos.setdefault(repo, Repo()).branches
        commits = branches.setdefault(revision, [dict(branches["main"][-1])])
        commits.append({**commits[-1], **{name.replace("__", "."): data for name, data in files.items()}})
        return commit_id(commits[-1])

    def answer(self, method: str, path: str, body: bytes, token: bool) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to one request."""
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path.startswith("/upload/"):
            self.blobs[path.removeprefix("/upload/")] = body
            return 200, {}, b""
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|branch|preupload|commit)/(.+))?", path)
        if found:
            return self._api(method, found[1], found[2], found[3] or "main", body, token)
        found = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
        if found:
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.url}/upload/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return _json({"transfer": "basic", "objects": objects})
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+?)/([^/]+)", path)
        if found:
            return self._resolve(found[1], found[2], found[3], token)
        return 404, {}, b""

    def _known(self, name: str, token: bool) -> Repo | None:
        repo = self.repos.get(name)
        return repo if repo is not None and (token or not repo.private) else None

    def _create(self, wanted: dict[str, Any], token: bool) -> tuple[int, dict[str, str], bytes]:
        if not token:
            return 401, {}, b'{"error": "Invalid username or password."}'
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        if name in self.repos:
            return (
                409,
                {},
                json.dumps({"error": "You already created this model repo", "url": f"{self.url}/{name}"}).encode(),
            )
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.repos[name] = Repo(private)
        return _json({"url": f"{self.url}/{name}", "name": name})

    def _api(
        self, method: str, name: str, what: str | None, revision: str, body: bytes, token: bool
    ) -> tuple[int, dict[str, str], bytes]:
        repo = self._known(name, token)
        if repo is None or (method == "POST" and not token):
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if what == "branch":
            if revision in repo.branches:
                return 409, {}, b'{"error": "Reference already exists"}'
            repo.branches[revision] = [dict(repo.branches["main"][-1])]
            return _json({})
        if repo.files(revision) is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return _json({"files": files})
        if what == "commit":
            return self._commit(repo, name, revision, body)
        commit, files = repo.files(revision)
        siblings = [{"rfilename": path} for path in files]
        return _json(
            {
                "_id": "1",
                "id": name,
                "modelId": name,
                "sha": commit,
                "private": repo.private,
                "siblings": siblings,
                "tags": [],
            }
        )

    def _commit(self, repo: Repo, name: str, revision: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        files = dict(repo.branches[revision][-1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
        repo.branches[revision].append(files)
        commit = commit_id(files)
        url = f"{self.url}/{name}/commit/{commit}"
        return _json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _resolve(self, name: str, revision: str, file: str, token: bool) -> tuple[int, dict[str, str], bytes]:
        repo = self._known(name, token)
        if repo is None:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        found = repo.files(revision)
        if found is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        commit, files = found
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        tag = hashlib.sha1(files[file]).hexdigest()
        return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}, files[file]


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _chunks(stream: Any) -> bytes:
    found = b""
    while size := int(stream.readline(), 16):
        found += stream.read(size)
        stream.readline()
    stream.readline()
    return found
