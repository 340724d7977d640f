"""A Hugging Face hub on 127.0.0.1 that serves data sets: revisions, file lists, files, and the hub's own refusals.

    with LoopbackHub() as hub:
        commit = hub.commit("someone/rows", {"README.md": b"…", "train.jsonl": b"…"})
        hub.commit("someone/rows", {"train.jsonl": b"…"}, branch="v2")
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": "…"}

The layout is that of https://huggingface.co/docs/hub/api: GET /api/datasets/<id>/revision/<rev> lists the files, and
/datasets/<id>/resolve/<rev>/<file> has the content, its commit and its ETag. Refusals carry X-Error-Code, which the
hub's library turns into its exceptions.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit


class LoopbackHub:
    """Data sets by id; each has branches, and a branch has commits."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        """Method and path of each request."""
        self.gated: set[str] = set()
        """Ids of data sets whose terms the user has not accepted."""
        self._files: dict[str, dict[str, Mapping[str, bytes]]] = {}
        """Id → commit → path → content."""
        self._branches: dict[str, dict[str, str]] = {}
        """Id → branch → commit."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self)

            def do_HEAD(self) -> None:
                hub._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def commit(self, repo: str, files: Mapping[str, bytes], *, branch: str = "main") -> str:
        """Add a commit with these files and no others to a branch, and return its 40 hex characters."""
        digest = hashlib.sha1(repr((repo, branch, sorted(files.items()))).encode()).hexdigest()
        self._files.setdefault(repo, {})[digest] = dict(files)
        self._branches.setdefault(repo, {})[branch] = digest
        return digest

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"{request.command} {path}")
        parts = path.strip("/").split("/")
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        repo = "/".join(parts[1:3])
        rest = parts[3:] or ["revision", "main"]
        if parts[0] != "datasets" or repo not in self._files:
            self._refuse(request, 404, "RepoNotFound")
        elif rest[0] == "refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                for name, commit in self._branches[repo].items()
            ]
            self._send(request, json.dumps({"branches": branches, "tags": [], "converts": []}).encode())
        elif (commit := self._branches[repo].get(rest[1], rest[1])) not in self._files[repo]:
            self._refuse(request, 404, "RevisionNotFound")
        elif is_api and rest[0] == "revision":
            siblings = [{"rfilename": name} for name in self._files[repo][commit]]
            gated = "manual" if repo in self.gated else False
            about = {"id": repo, "sha": commit, "siblings": siblings, "private": False, "gated": gated, "tags": []}
            self._send(request, json.dumps(about).encode())
        elif is_api and rest[0] == "tree":
            is_deep = "recursive=true" in urlsplit(request.path).query.lower()
            tree = _tree(self._files[repo][commit], "/".join(rest[2:]), is_deep=is_deep)
            if tree:
                self._send(request, json.dumps(tree).encode())
            else:
                self._refuse(request, 404, "EntryNotFound")
        elif not is_api and repo in self.gated:
            self._refuse(request, 403, "GatedRepo")
        elif not is_api and rest[0] == "resolve" and "/".join(rest[2:]) in self._files[repo][commit]:
            content = self._files[repo][commit]["/".join(rest[2:])]
            self._send(request, content, {"X-Repo-Commit": commit, "ETag": f'"{_oid(content)}"'})
        else:
            self._refuse(request, 404, "EntryNotFound")

    def _send(self, request: BaseHTTPRequestHandler, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        request.send_response(200 if part is None else 206)
        if part is not None:
            content = content[int(part[1]) : int(part[2]) + 1 if part[2] else None]
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content)

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", code)
        request.send_header("Content-Length", "0")
        request.end_headers()


def _tree(files: Mapping[str, bytes], folder: str, *, is_deep: bool) -> list[dict[str, Any]]:
    """The files and folders in a folder, or with `is_deep` everything below it."""
    start = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, data in files.items():
        if not name.startswith(start):
            continue
        parts = name.removeprefix(start).split("/")
        for depth in range(1, len(parts) if is_deep else min(2, len(parts))):
            path = start + "/".join(parts[:depth])
            entries[path] = {"type": "directory", "path": path, "oid": _oid(path.encode())}
        if is_deep or len(parts) == 1:
            entries[name] = {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
    return list(entries.values())


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
