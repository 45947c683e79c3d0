"""A hub on loopback: folders as model repositories, in the protocol that huggingface_hub 2.4 speaks (file_download.py).

    GET      /api/models/{repo}/revision/{revision}     its commit, and its files with sizes and checksums
    HEAD GET /{repo}/resolve/{revision}/{file}          a small file, or 302 to the "CDN" for one kept in LFS
    GET      /cdn/{sha256}/{file}                       as a whole or from Range on; on the host name localhost

Used by processes of their own, started with `LocalHub.environment`: huggingface_hub reads its settings at import.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LFS = (".safetensors", ".pt", ".bin")
GRANTED = "hf_granted"  # the token of an account that accepted every licence


@dataclass
class Repo:
    folder: Path
    commit: str
    gated: bool = False

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())


@dataclass
class LocalHub:
    """Repositories, what goes wrong with them, and every request so far as (method, path, headers).

    `faults` maps a pattern of "METHOD /path" to what its answers suffer from, one after the other:
        "503" | "slow" | "cut" (the connection ends half-way) | "short" (half of the file) | "wrong" (one bit of it)
    """

    url: str
    repos: dict[str, Repo] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def add(self, name: str, folder: Path, revision: str = "main", gated: bool = False) -> Repo:
        commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else hashlib.sha1(name.encode()).hexdigest()
        self.repos[name] = Repo(folder, commit, gated)
        return self.repos[name]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """For a process whose hub is this one and whose cache is below `home`."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost"}
        return inherited | ours | more

    def downloads(self) -> list[str]:
        """Paths within their repositories of the files whose content was asked for, once per request."""
        paths = [path for method, path, _ in self.requests if method == "GET"]
        found = (re.fullmatch(r"/cdn/[^/]+/(.+)|/[^/]+/[^/]+/resolve/[^/]+/(.+)", path) for path in paths)
        return [match[1] or match[2] for match in found if match]


def checksum(content: bytes, name: str) -> str:
    """What the hub calls a file: its sha256 in LFS, git's sha1 of others."""
    if name.endswith(LFS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.hub.requests.append((self.command, path, dict(self.headers)))
        fault = ""
        for pattern, faults in self.hub.faults.items():
            if faults and re.search(pattern, f"{self.command} {path}"):
                fault = faults.pop(0)
        if fault == "503":
            self.answer(503)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self.listing(*match.groups())
        elif match := re.fullmatch(r"/cdn/([0-9a-f]{64})/.+", path):
            self.content(self.blob(match[1]), {"ETag": '"of-the-cdn"'}, fault)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*match.groups(), fault)
        else:
            self.answer(404)

    def listing(self, name: str, revision: str) -> None:
        if not (repo := self.found(name, revision)):
            return
        siblings = []
        for file in repo.files():
            content = (repo.folder / file).read_bytes()
            entry = {"rfilename": file, "size": len(content), "blobId": checksum(content, "")}
            if file.endswith(LFS):
                entry["lfs"] = {"sha256": checksum(content, file), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        about = {"id": name, "sha": repo.commit, "private": False, "gated": repo.gated, "siblings": siblings}
        self.content(json.dumps(about).encode(), {"Content-Type": "application/json"})

    def resolve(self, name: str, revision: str, file: str, fault: str) -> None:
        if not (repo := self.found(name, revision)):
            return
        commit = {"X-Repo-Commit": repo.commit}
        authorization = self.headers.get("Authorization")
        if repo.gated and authorization != f"Bearer {GRANTED}":
            self.answer(403 if authorization else 401, {**commit, "X-Error-Code": "GatedRepo"})
        elif file not in repo.files():
            self.answer(404, {**commit, "X-Error-Code": "EntryNotFound"})
        elif file.endswith(LFS):
            content = (repo.folder / file).read_bytes()
            sha256 = checksum(content, file)
            linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            port = self.server.server_address[1]
            self.answer(302, {**commit, **linked, "Location": f"http://localhost:{port}/cdn/{sha256}/{file}"})
        else:
            content = (repo.folder / file).read_bytes()
            self.content(content, {**commit, "ETag": f'"{checksum(content, file)}"'}, fault)

    def found(self, name: str, revision: str) -> Repo | None:
        """The repository, or None after the error was sent; to strangers the hub does not tell missing from private."""
        repo = self.hub.repos.get(name)
        if repo is None:
            self.answer(404 if self.headers.get("Authorization") else 401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", repo.commit):
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repo

    def blob(self, sha256: str) -> bytes:
        for repo in self.hub.repos.values():
            for file in filter(lambda file: file.endswith(LFS), repo.files()):
                if checksum(content := (repo.folder / file).read_bytes(), file) == sha256:
                    return content
        raise KeyError(sha256)

    def content(self, content: bytes, headers: dict[str, str], fault: str = "") -> None:
        total, start = len(content), 0
        if fault == "wrong":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "short":
            content = content[: total // 2]
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        content = content[start:]
        self.answer(206 if start else 200, {"Accept-Ranges": "bytes", **headers}, len(content))
        if self.command == "HEAD":
            return
        if fault == "cut":
            content, self.close_connection = content[: len(content) // 2], True
        for part in (content[i : i + 1 + len(content) // 8] for i in range(0, len(content), 1 + len(content) // 8)):
            self.wfile.write(part)
            if fault == "slow":
                time.sleep(0.2)

    def answer(self, status: int, headers: dict[str, str] | None = None, length: int = 0) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serve() -> Iterator[LocalHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("LocalHandler", (Handler,), {}))
    server.daemon_threads = True
    hub = LocalHub(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass.hub = hub
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
