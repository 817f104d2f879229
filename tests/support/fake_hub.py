"""A local web server that stands in for the Hugging Face hub and for any server of files.

Of the hub it has the routes that the client's ``snapshot_download`` uses: the information of a model at a revision, the
listing of a commit, and the files, with ETag, X-Repo-Commit and ranges. It can cut connections and refuse access.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


def commit_of(files: dict[str, bytes]) -> str:
    content = b"".join(name.encode() + data for name, data in sorted(files.items()))
    return hashlib.sha1(content).hexdigest()


@dataclass
class Repo:
    """revisions: branch or tag -> files. A commit is known by its hash."""

    revisions: dict[str, dict[str, bytes]]
    gated: bool = False

    def at(self, revision: str) -> dict[str, bytes] | None:
        commits = {commit_of(files): files for files in self.revisions.values()}
        return self.revisions.get(revision) or commits.get(revision)


@dataclass
class FakeHub:
    """What is served, what goes wrong, and what was asked for.

    Attributes:
        files: path -> content, served to everybody who asks with the right query.
        cuts: path -> bytes sent before the connection is closed, one per request, until the list is used up.
        statuses: path -> statuses answered instead, one per request; the last one stays.
        ranges: whether Range is honoured.
        etags: whether files have an ETag.
        query: what a request for a file must bring, if set.
        redirect: where a request for a file is sent, if set: the directory of that name on another server.
        requests: (method, path, Range or None) in order of arrival.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    ranges: bool = True
    etags: bool = True
    query: str | None = None
    redirect: str | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    authorization: set[str] = field(default_factory=set)
    sent: int = 0

    def asked(self, method: str, ending: str) -> list[str | None]:
        """The ranges of the requests for paths that end so."""
        return [r for m, path, r in list(self.requests) if m == method and path.endswith(ending)]

    def take(self, table: dict[str, list[int]], path: str) -> int | None:
        left = next((values for ending, values in table.items() if path.endswith(ending)), [])
        if not left:
            return None
        return left[0] if table is self.statuses and len(left) == 1 else left.pop(0)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.hub.requests.append((self.command, parts.path, self.headers.get("Range")))
        if token := self.headers.get("Authorization"):
            self.hub.authorization.add(token)
        status = self.hub.take(self.hub.statuses, parts.path)
        if status is not None and status != 200:
            self._send(status, b"no")
        elif match := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", parts.path
        ):
            self._api(*match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", parts.path):
            self._resolve(*match.groups())
        elif self.hub.redirect and parts.path in self.hub.files:
            name = parts.path.rpartition("/")[2]
            self._send(302, b"", {"Location": f"{self.hub.redirect}/{name}"})
        elif parts.path in self.hub.files and self.hub.query in (None, parts.query):
            self._file(parts.path, self.hub.files[parts.path], {})
        else:
            self._send(404, b"no such file")

    def _find(self, repo: str, revision: str) -> tuple[Repo, dict[str, bytes]] | None:
        found = self.hub.repos.get(repo)
        if found is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        files = found.at(revision)
        if files is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None
        return found, files

    def _api(self, name: str, kind: str, revision: str) -> None:
        found = self._find(name, revision)
        if found is None:
            return
        repo, files = found
        if repo.gated and kind == "tree":
            self._gated(name)
            return
        if kind == "revision":
            siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
            body: object = {"id": name, "sha": commit_of(files), "siblings": siblings}
        else:
            body = [
                {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for p, d in files.items()
            ]
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _gated(self, name: str) -> None:
        message = f"Access to model {name} is restricted."
        self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": message})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self._find(name, revision)
        if found is None:
            return
        repo, files = found
        commit = {"X-Repo-Commit": commit_of(files)}
        if repo.gated:
            self._gated(name)
        elif path not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", **commit})
        else:
            self._file(self.path, files[path], commit)

    def _file(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        if self.hub.etags:
            headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        wanted = self.headers.get("Range")
        if wanted is None or not self.hub.ranges:
            self._send(200, data, headers, path)
            return
        headers["Accept-Ranges"] = "bytes"
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
        assert match
        start = int(match[1])
        end = min(int(match[2]) if match[2] else len(data) - 1, len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        self._send(206, data[start : end + 1], headers, path)

    def _send(
        self, status: int, data: bytes, headers: dict[str, str] | None = None, path: str = ""
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.take(self.hub.cuts, path) if path else None
        if cut is not None and cut < len(data):
            data = data[:cut]
            self.close_connection = True
        self.hub.sent += len(data)
        try:
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):  # a client that has read enough
            self.close_connection = True


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve on a free port of this machine while the context lasts."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
