"""A hub on this machine: enough of the real one's interface for the real client to download."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

MODEL = "someone/some-model"


class FakeHub:
    """One model with commits; `main` stands for the first, until it has been asked for."""

    def __init__(self, commits: dict[str, Path]) -> None:
        self.commits = commits
        self.asked: list[str] = []

    def main(self) -> str:
        """The commit of the moving revision: it has moved by the second question."""
        times = sum(path.endswith("/revision/main") for path in self.asked)
        names = list(self.commits)
        return names[min(times - 1, len(names) - 1)]

    def tree(self, commit: str) -> list[dict[str, object]]:
        """The files of a commit; weights are large files, known by their sha256."""
        found: list[dict[str, object]] = []
        for path in sorted(self.commits[commit].iterdir()):
            content = path.read_bytes()
            entry: dict[str, object] = {
                "type": "file", "path": path.name, "size": len(content),
                "oid": hashlib.sha1(content).hexdigest(),
            }  # fmt: skip
            if path.suffix == ".safetensors":
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
            found.append(entry)
        return found


@contextmanager
def serve(hub: FakeHub) -> Iterator[str]:
    """Serve a hub and yield its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def answer(self, *, with_body: bool) -> None:
            path = urlsplit(self.path).path
            hub.asked.append(path)
            headers = {"Content-Type": "application/json"}
            parts = path.strip("/").split("/")
            if path.startswith(f"/api/models/{MODEL}/revision/"):
                body = json.dumps({"id": MODEL, "sha": hub.main(), "siblings": []}).encode()
            elif path.startswith(f"/api/models/{MODEL}/tree/"):
                body = json.dumps(hub.tree(parts[5])).encode()
            elif path.startswith(f"/{MODEL}/resolve/") and parts[3] in hub.commits:
                body = (hub.commits[parts[3]] / parts[4]).read_bytes()
                large = parts[4].endswith(".safetensors")
                digest = (hashlib.sha256 if large else hashlib.sha1)(body).hexdigest()
                headers = {"X-Repo-Commit": parts[3], "ETag": f'"{digest}"'}
            else:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
