"""A real browser and a static file server, for tests of pages that sample."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEPS_VARIABLE = "EDGEQDM_WEB_DEPS"
# A name that is no localhost: browsers hold such an address for insecure.
PLAIN_HOST = "plain.test"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    f"--host-resolver-rules=MAP {PLAIN_HOST} 127.0.0.1",
    "--window-size=900,1000",
)
START_SECONDS = 20
SAMPLE_SECONDS = 20


class Browser:
    """A headless Chromium, driven over W3C WebDriver with nothing but the standard library."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._url = f"http://127.0.0.1:{port}"
        chrome = {
            "binary": shutil.which("chromium"),
            "args": [*FLAGS, f"--user-data-dir={folder}"],
        }
        capabilities = {
            "goog:chromeOptions": chrome,
            "goog:loggingPrefs": {"browser": "ALL"},
            "timeouts": {"script": SAMPLE_SECONDS * 1000},
        }
        try:
            self._wait_for_driver()
            wanted = {"capabilities": {"alwaysMatch": capabilities}}
            self._url += f"/session/{self._call('/session', wanted)['sessionId']}"
        except BaseException:
            self._driver.kill()
            self._driver.wait()
            raise

    def _wait_for_driver(self) -> None:
        give_up = time.monotonic() + START_SECONDS
        while True:
            try:
                if self._call("/status")["ready"]:
                    return
            except OSError:
                if time.monotonic() > give_up or self._driver.poll() is not None:
                    raise
            time.sleep(0.05)

    def _call(self, path: str, body: Any = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}{path}", data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=2 * SAMPLE_SECONDS) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as problem:
            raise AssertionError(json.load(problem)["value"]["message"]) from None

    def open(self, url: str) -> None:
        self._call("/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What an async function with this body returns."""
        wrapped = (
            "const done = arguments[arguments.length - 1];"
            f"(async (...given) => {{ {script} }})(...arguments)"
            ".then(done, (error) => done({failed: String(error?.message ?? error)}));"
        )
        return self._call("/execute/async", {"script": wrapped, "args": arguments})

    def click(self, element: str) -> None:
        found = self._call("/element", {"using": "css selector", "value": f"#{element}"})
        (identity,) = found.values()
        self._call(f"/element/{identity}/click", {})

    def type(self, element: str, text: str) -> None:
        found = self._call("/element", {"using": "css selector", "value": f"#{element}"})
        (identity,) = found.values()
        self._call(f"/element/{identity}/value", {"text": text})

    def text(self, element: str) -> str:
        found: str = self.run(f"return document.getElementById('{element}').textContent;")
        return found

    def wait_for(self, element: str, part: str) -> str:
        """Text of an element once it holds `part`."""
        give_up = time.monotonic() + SAMPLE_SECONDS
        while part not in (text := self.text(element)):
            assert time.monotonic() < give_up, (text, self.text("error"))
            time.sleep(0.05)
        return text

    def screenshot(self) -> bytes:
        return base64.b64decode(self._call("/screenshot"))

    def log(self) -> list[Any]:
        """What the console has shown since the last call."""
        found: list[Any] = self._call("/se/log", {"type": "browser"})
        return found

    def close(self) -> None:
        try:
            self._call("", method="DELETE")
        finally:
            self._driver.terminate()
            self._driver.wait()


class Site:
    """A static file server; `origin` is by address, which browsers hold for secure."""

    def __init__(self, root: Path, *, isolated: bool = False) -> None:
        self.root = root

        class Handler(SimpleHTTPRequestHandler):
            def end_headers(self) -> None:
                self.send_header("Access-Control-Allow-Origin", "*")
                if isolated:
                    self.send_header("Cross-Origin-Opener-Policy", "same-origin")
                    self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
                super().end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root)))
        self.port = self._server.server_port
        self.origin = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def page(self, package: str, query: str = "ort=/ort") -> str:
        return f"{self.origin}/{package}/runtime/web/?{query}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


DRAW = """
const { latents, shape, picture } = await edgeqdm.sample(given[0]);
const text = (bytes) => btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
return { latents: text(new Uint8Array(latents.buffer)), shape, picture: text(picture.data) };
"""


@dataclass(frozen=True)
class Drawn:
    latents: NDArray[np.float32]
    picture: NDArray[np.uint8]
    """RGBA, as bytes."""


def draw(browser: Browser, **options: Any) -> Drawn:
    """What the page that is open samples with these options: label, count, seed."""
    found = browser.run(DRAW, options)
    assert "failed" not in found, found
    latents = np.frombuffer(base64.b64decode(found["latents"]), "<f4").reshape(found["shape"])
    return Drawn(latents, np.frombuffer(base64.b64decode(found["picture"]), np.uint8))
