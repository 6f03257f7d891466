"""A headless Chromium, driven by its DevTools protocol: pages are opened, keys pressed, pixels counted."""

from __future__ import annotations

import base64
import io
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WHY_NOT = "Chromium is not installed (Debian: apt-get install chromium)"
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--use-gl=angle", "--use-angle=swiftshader"),
    *("--enable-unsafe-swiftshader", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--force-prefers-reduced-motion", "--force-device-scale-factor=1", "--remote-debugging-port=0"),
)
PATIENCE = 90.0  # seconds; a busy machine draws slowly


class Page:
    """One page of a browser."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self.numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol, and its answer."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv(timeout=PATIENCE))
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def run(self, script: str) -> Any:
        """The value of an expression."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str) -> Any:
        """Wait until an expression is true."""
        end = time.monotonic() + PATIENCE
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"waited for {script}; {self.problems()}"
            time.sleep(0.1)
        return found

    def open(self, address: str, size: tuple[int, int]) -> None:
        """Load a page in a window of a size."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.resize(size)
        self.ask("Page.navigate", url=address)

    def resize(self, size: tuple[int, int]) -> None:
        """The window's width and height."""
        self.ask("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False)

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key goes down and up."""
        code = {"Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Home": 36}
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            more = text if kind == "keyDown" else {}
            virtual = code.get(key, ord(key[0].upper()))
            self.ask(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=virtual,
                modifiers=8 * shift,
                **more,
            )

    def click(self, x: float, y: float) -> None:
        """The left button goes down and up."""
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, keep: Path | None = None) -> np.ndarray:  # [H, W, 3]
        """What the window shows."""
        data = base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])
        if keep is not None:
            keep.write_bytes(data)
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)

    def problems(self) -> list[str]:
        """Errors that the page ran into, and what it asked of a network."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"].get("exception", {}).get("description")))
            if event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(params["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """Addresses that were asked for."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a new browser with an empty profile, which ends with the block."""
    from websockets.sync.client import connect

    assert CHROMIUM is not None
    log = (profile / "log").open("w")
    process = subprocess.Popen(
        [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", "about:blank"], stdout=log, stderr=log
    )
    try:
        port = _port(process, profile / "DevToolsActivePort")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            (address,) = (one["webSocketDebuggerUrl"] for one in json.load(answer) if one["type"] == "page")
        with connect(address, max_size=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)
        log.close()


def _port(process: subprocess.Popen[bytes], file: Path) -> str:
    end = time.monotonic() + PATIENCE
    while not file.exists() or "\n" not in file.read_text():
        assert process.poll() is None, file.with_name("log").read_text()
        assert time.monotonic() < end, "the browser does not start"
        time.sleep(0.1)
    return file.read_text().splitlines()[0]
