"""A real browser, driven through the WebDriver protocol that chromedriver speaks (w3.org/TR/webdriver2)."""

import base64
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key of a reference to an element
ARGUMENTS = (
    "--headless",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1000,700",
)


def missing() -> str | None:
    """Which program is not there, if one is not."""
    return next((name for name in ("chromium", "chromedriver") if shutil.which(name) is None), None)


class Browser:
    """One window. Elements are found by CSS."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.client.request(method, path, json=body if method == "POST" else None).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def open(self, url: str) -> None:
        self.ask("POST", "url", {"url": url})

    def find(self, css: str) -> list[str]:
        found = self.ask("POST", "elements", {"using": "css selector", "value": css})
        return [element[ELEMENT] for element in found]

    def texts(self, css: str) -> list[str]:
        """What a reader sees in each."""
        return [self.ask("GET", f"element/{element}/text") for element in self.find(css)]

    def type(self, css: str, text: str) -> None:
        (element,) = self.find(css)
        self.ask("POST", f"element/{element}/value", {"text": text})

    def click(self, css: str) -> None:
        (element,) = self.find(css)
        self.ask("POST", f"element/{element}/click", {})

    def wait(self, css: str, seen: Any, seconds: float = 60) -> list[str]:
        """The texts, once `seen` of them is true."""
        deadline = time.monotonic() + seconds
        while not seen(found := self.texts(css)):
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.ask("GET", "screenshot")))

    def complaints(self) -> list[str]:
        """What the page's console says is wrong."""
        entries = self.ask("POST", "se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]


@contextmanager
def browser() -> Iterator[Browser]:
    """A fresh one, gone after the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as profile:
        arguments = [*ARGUMENTS, f"--user-data-dir={profile}", *(["--no-sandbox"] if os.getuid() == 0 else [])]
        driver = subprocess.Popen(
            [str(shutil.which("chromedriver")), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        root = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    root.get("/status")
                    break
                except httpx.ConnectError:
                    assert time.monotonic() < deadline, "chromedriver does not answer"
                    time.sleep(0.1)
            wanted = {"goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"}}
            made = root.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
            assert "sessionId" in made, made
            session = httpx.Client(base_url=f"http://127.0.0.1:{port}/session/{made['sessionId']}/", timeout=120)
            try:
                yield Browser(session)
            finally:
                session.delete("")
        finally:
            driver.terminate()
            driver.wait()
