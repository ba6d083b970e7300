"""A headless Chromium driven over chromedriver's HTTP interface, for looking at the report."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


class Chrome:
    """One browser with a profile of its own; ends with its context."""

    def __init__(self, scratch: Path) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self._base = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._session = ""
        self._scratch = scratch

    def __enter__(self) -> Chrome:
        options = {
            "binary": CHROMIUM,
            "args": [*FLAGS, f"--user-data-dir={self._scratch}"],
        }
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        deadline = time.monotonic() + 30
        while not self._session:
            try:
                made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
                self._session = f"/session/{made['sessionId']}"
            except urllib.error.URLError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        self._call("POST", f"{self._session}/url", {"url": "about:blank"})
        self.requests()  # those of the browser's own first page
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._session:
                self._call("DELETE", self._session)
        finally:
            self._process.terminate()
            self._process.wait(10)

    def open(self, page: Path, *, width: int, height: int = 1000) -> None:
        """Load a file at a viewport of this width in CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.cdp("Emulation.setDeviceMetricsOverride", metrics)
        self._call("POST", f"{self._session}/url", {"url": page.as_uri()})

    def js(self, script: str, *arguments: Any) -> Any:
        """The value that a function body returns in the page."""
        body = {"script": script, "args": list(arguments)}
        return self._call("POST", f"{self._session}/execute/sync", body)

    def cdp(self, command: str, parameters: dict[str, Any]) -> Any:
        """A DevTools command."""
        body = {"cmd": command, "params": parameters}
        return self._call("POST", f"{self._session}/goog/cdp/execute", body)

    def console(self) -> list[str]:
        """Errors and warnings of the console since the last call."""
        found = self._call("POST", f"{self._session}/se/log", {"type": "browser"})
        return [e["message"] for e in found if e["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """The addresses that the page asked for since the last call."""
        found = self._call("POST", f"{self._session}/se/log", {"type": "performance"})
        messages = [json.loads(e["message"])["message"] for e in found]
        return [
            m["params"]["request"]["url"]
            for m in messages
            if m["method"] == "Network.requestWillBeSent"
        ]

    def screenshot(self, target: Path) -> None:
        """The whole page as PNG."""
        size = self.cdp("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = {"captureBeyondViewport": True, "clip": clip}
        target.write_bytes(base64.b64decode(self.cdp("Page.captureScreenshot", shot)["data"]))

    def move_to(self, x: float, y: float) -> None:
        """Put the mouse at a point of the viewport."""
        self.cdp("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def press(self, key: str, *, code: int) -> None:
        """Press and release a key, by its name and its Windows key code."""
        stroke = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        for kind in ("rawKeyDown", "keyUp"):
            self.cdp("Input.dispatchKeyEvent", {"type": kind, **stroke})

    def pdf(self, target: Path) -> None:
        """The page as it prints."""
        made = self.cdp("Page.printToPDF", {"printBackground": True, "preferCSSPageSize": True})
        target.write_bytes(base64.b64decode(made["data"]))

    def _call(self, method: str, path: str, body: object = None) -> Any:
        request = urllib.request.Request(
            self._base + path,
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]
