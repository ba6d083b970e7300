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
DATASET = "someone/some-texts"


class FakeHub:
    """One model with commits; `main` stands for the first, until it has been asked for.

    Or one dataset: that of `kind` "datasets".
    """

    def __init__(self, commits: dict[str, Path], *, kind: str = "models") -> None:
        self.commits = commits
        self.asked: list[str] = []
        self.name = MODEL if kind == "models" else DATASET
        self.api = f"/api/{kind}/{self.name}"
        self.files = f"/{self.name}" if kind == "models" else f"/{kind}/{self.name}"

    def main(self) -> str:
        """The commit of the moving revision: it has moved by the second question."""
        times = sum(path.endswith("/revision/main") for path in self.asked)
        names = list(self.commits)
        return names[min(times - 1, len(names) - 1)]

    def tree(self, commit: str) -> list[dict[str, object]]:
        """The files of a commit; weights are large files, known by their sha256."""
        found: list[dict[str, object]] = []
        folder = self.commits[commit].resolve(strict=True)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            content = path.read_bytes()
            name = path.relative_to(folder).as_posix()
            entry: dict[str, object] = {
                "type": "file", "path": name, "size": len(content),
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
            asked, _, rest = path.removeprefix(hub.api).removeprefix(hub.files)[1:].partition("/")
            commit, _, file = rest.partition("/")
            if path.startswith(f"{hub.api}/revision/"):
                sha = rest if rest in hub.commits else hub.main()
                body = json.dumps({"id": hub.name, "sha": sha, "siblings": []}).encode()
            elif path.startswith(f"{hub.api}/tree/"):
                body = json.dumps(hub.tree(commit)).encode()
            elif asked == "resolve" and commit in hub.commits:
                body = (hub.commits[commit] / file).read_bytes()
                large = file.endswith(".safetensors")
                digest = (hashlib.sha256 if large else hashlib.sha1)(body).hexdigest()
                headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"'}
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
