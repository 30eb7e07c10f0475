"""Starts the emulator as a process of its own, and talks to its test API."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

KEY = "e2b_0123456789abcdef0123456789abcdef01234567"
_TESTS = Path(__file__).parents[2]


class Server:
    """A running emulator.

    Attributes:
        environment: the variables that lead the SDK to it.
    """

    def __init__(self, process, port):
        self._process, self.port = process, port
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {
            "E2B_API_URL": self.url, "E2B_SANDBOX_URL": self.url, "E2B_API_KEY": KEY,
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/_test/{path}", data, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as response:
            return json.load(response)

    def fault(self, match, **what):
        self.ask("POST", "faults", {"match": match, **what})

    def settings(self, **settings):
        self.ask("PUT", "settings", settings)

    def cloud(self, **settings):
        """Changes the account's settings. Returns its sandboxes and templates."""
        return self.ask("PUT", "cloud", settings)

    def living(self):
        """Identities of the sandboxes that there are."""
        return list(self.cloud()["sandboxes"])

    def wait_until_none_lives(self, seconds=10):
        """Whether every sandbox is gone in time."""
        deadline = time.monotonic() + seconds
        while self.living() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.living()

    def evict(self, *sandboxes):
        """Ends these, or all, as the provider might."""
        self.ask("POST", "evict", sandboxes)

    def advance(self, minutes):
        """Takes time from what all sandboxes have left."""
        self.ask("POST", "advance", minutes * 60)

    def drop(self):
        """Resets every connection that there is."""
        self.ask("DELETE", "connections")

    def journal(self):
        return self.ask("GET", "journal")

    def reset(self):
        """As it was at first, but for templates."""
        self.ask("DELETE", "faults")
        self.settings(latency=0, bodies=None)
        self.cloud(concurrent=1000, per_second=0, hours=24, boot=0, build=0, disk=0)
        self.evict()
        self.ask("DELETE", "journal")

    def close(self):
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def running():
    """An emulator for as long as the context lasts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "emulators.e2b", KEY],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(_TESTS)},
    )  # fmt: skip
    server = Server(process, int(process.stdout.readline() or 0))
    try:
        server.reset()
        yield server
    finally:
        server.close()
