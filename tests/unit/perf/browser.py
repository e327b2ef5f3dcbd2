"""A headless Chromium for tests of pages: spoken to over a pipe, so there is no port to choose and no driver to install.

`with Chromium() as browser: browser.open(path, width=390, theme="dark"); browser.evaluate("document.title")`. The width is the one that
the page sees (a window cannot be narrower than about 500 pixels; this is not the window), and so is the theme. What the console said and
what was asked for is kept. The profile is new and empty; each wait has a timeout.
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT_S = 60
MISSING = f"no headless browser: none of {', '.join(NAMES)} is on PATH; `apt-get install chromium`, or any Chromium on PATH, runs this test"

_FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"]
_FLAGS += ["--disable-sync", "--disable-component-update", "--disable-extensions", "--hide-scrollbars", "--remote-debugging-pipe"]
# Chromium reads commands from 3 and writes to 4; both ends come in numbers above, so that neither overwrites the other
_EXEC = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"


def find():
    """The browser's program, or None."""
    return next((place for name in NAMES if (place := shutil.which(name))), None)


class Chromium:
    """One browser with one page."""

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error):
        self._stack.close()

    def _start(self):
        profile = self._stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        (commands, self._write), (self._read, answers) = self._pipe(), self._pipe()
        start = [sys.executable, "-I", "-S", "-c", _EXEC, str(commands), str(answers)]
        process = subprocess.Popen(
            [*start, find(), *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._stack.callback(self._stop, process)
        os.close(commands)
        os.close(answers)
        self._buffer, self._number, self._session = b"", 0, None
        self.console, self.requests, self._loaded = [], [], False
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next((one["targetId"] for one in targets if one["type"] == "page"), None)
        page = page or self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def _pipe(self):
        """(read, write), with numbers of at least ten."""
        ends = []
        for end in os.pipe():
            ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10))
            os.close(end)
        return ends

    def _stop(self, process):
        os.close(self._write)  # Chromium ends when its commands do
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(self._read)

    def send(self, method, **params):
        """The answer to a command of the DevTools protocol."""
        self._number += 1
        number = self._number
        command = {"id": number, "method": method, "params": params} | ({"sessionId": self._session} if self._session else {})
        os.write(self._write, json.dumps(command).encode() + b"\0")
        while (message := self._message(method)).get("id") != number:
            self._event(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def _message(self, awaited):
        end = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {TIMEOUT_S} s; awaited: {awaited}")
            if not (part := os.read(self._read, 1 << 20)):
                raise RuntimeError(f"the browser has ended; awaited: {awaited}")
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _event(self, message):
        method, params = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Log.entryAdded":
            self.console.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(one.get("value")) for one in params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.console.append(params["exceptionDetails"]["text"])

    def open(self, path, *, width, theme, height=900):
        """Loads a file as a screen of `width` CSS pixels with the theme `light` or `dark` shows it."""
        self.console, self.requests, self._loaded = [], [], False
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._event(self._message("the page is loaded"))

    def evaluate(self, expression):
        """The value of a JavaScript expression in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"])
        return result["result"].get("value")

    def screenshot(self, path):
        """Writes the whole page as PNG."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))
