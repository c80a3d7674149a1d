"""A headless Chromium, driven by chromedriver over its protocol, which needs no package."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"),
    "--disable-background-networking",
)


def missing() -> str | None:
    """Why no browser can run here."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"needs {' and '.join(lacking)} (Debian: chromium, chromium-driver)" if lacking else None


class Browser:
    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.driver = subprocess.Popen(
            ["chromedriver", f"--port={self.port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.session = ""
        try:
            self._wait()
            options = {"binary": shutil.which("chromium"), "args": FLAGS}
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            self.session = self._post("/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        try:
            if self.session:
                self._call("DELETE", f"/session/{self.session}")
        finally:
            self.driver.terminate()
            self.driver.wait()

    def open(self, page: Path, width: int, dark: bool = False) -> None:
        """Opens a file in a window of that many CSS pixels, as on a phone if it is narrow."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", features=[scheme])
        self._devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self._logs("browser")
        self._logs("performance")
        self._post(f"/session/{self.session}/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *args: Any) -> Any:
        """What a function body returns in the page."""
        return self._post(f"/session/{self.session}/execute/sync", {"script": script, "args": list(args)})

    def complaints(self) -> list[str]:
        """What the console has shown since the page was opened."""
        return [entry["message"] for entry in self._logs("browser")]

    def requests(self) -> list[str]:
        """The addresses that were asked for since then."""
        found = [json.loads(entry["message"])["message"] for entry in self._logs("performance")]
        return [each["params"]["request"]["url"] for each in found if each["method"] == "Network.requestWillBeSent"]

    def pixels(self) -> Any:
        """A picture of the whole page, [height, width, 3] from 0 to 1."""
        from matplotlib import image

        width, height = self.run("const e = document.documentElement; return [e.scrollWidth, e.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self._devtools("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return image.imread(io.BytesIO(base64.b64decode(shot["data"])))[..., :3]

    def _logs(self, kind: str) -> list[dict[str, Any]]:
        return self._post(f"/session/{self.session}/se/log", {"type": kind})  # type: ignore[no-any-return]

    def _devtools(self, command: str, **parameters: Any) -> Any:
        return self._post(f"/session/{self.session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _wait(self) -> None:
        for _ in range(150):
            try:
                if self._call("GET", "/status")["ready"]:
                    return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError("chromedriver did not start")

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._call("POST", path, body)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, method=method)
        with self.opener.open(request, timeout=120) as answer:
            return json.load(answer)["value"]
