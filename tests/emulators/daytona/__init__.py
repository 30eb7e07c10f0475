"""A Daytona on loopback, for the real SDK: `Emulator` starts one in a process of its own.

    cloud.py      organisation, quotas, sandboxes and their intervals by an accelerated clock
    snapshots.py  builds Dockerfiles, and captures sandboxes, into root directories
    api.py        the control plane's HTTP, and its events by Socket.IO
    toolbox.py    the daemon in each sandbox: sessions, logs by websocket, files
    wire.py       holds every answer to the installed SDK's models and to the specification
    server.py     the process

What it takes from the real one (read in its source up to 0.190, and in the SDK) is what is unkind:
log lines appear whole and a log closes about a second late, a log is replayed from its first byte,
a command is sourced by the session's shell, a stopped sandbox answers 400.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[3]
KEY = "dtn_emulated_key_0123456789abcdef"


class Emulator:
    """A running server, until `close`.

    Args:
        directory: for the roots of its sandboxes; it can be written by nobody else.
        settings: as `cloud.Settings` has them.
    """

    key = KEY

    def __init__(self, directory, **settings):
        self.directory = Path(directory)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.emulators.daytona.server", str(directory)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the emulator did not start; see its message above")
        self.port = int(line)
        self.base = f"http://127.0.0.1:{self.port}"
        self.settings = settings
        self.reset()

    @property
    def url(self):
        return f"{self.base}/api"

    @property
    def environment(self):
        """What a user exports, and what keeps proxies of this machine out of the way."""
        return {
            "DAYTONA_API_KEY": self.key, "DAYTONA_API_URL": self.url,
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip

    def close(self):
        self.process.stdin.close()  # which ends it, as our own end does
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    # --- what a test asks of it

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.base}/_test/{path}", data, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def call(self, method, path, body=None):
        """A request of the API itself."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", data, headers, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def reset(self):
        """As it was at first: no fault, no journal, the first settings."""
        self.ask("DELETE", "faults")
        self.ask("DELETE", "journal")
        self.ask("PUT", "settings", {"latency": 0.0, "bodies": None})
        self.ask("PUT", "cloud", {"reset": True, **self.settings})

    def set(self, **settings):
        self.ask("PUT", "cloud", settings)

    def advance(self, minutes):
        """Lets time pass there, at once."""
        self.set(advance=minutes * 60.0)

    def living(self):
        """Identities of the sandboxes that there are."""
        ending = ("destroying", "destroyed")
        return [i for i, state in self.state()["sandboxes"].items() if state not in ending]

    def wait_until_none_lives(self, seconds=30):
        """Whether every sandbox is gone in time: their ends are asked for, and come after."""
        deadline = time.monotonic() + seconds
        while self.living() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.living()

    def drop_logs(self, *drops):
        """The next log followers are dropped after (bytes, by the close code)."""
        self.ask("PUT", "drops", drops)

    def fault(self, match, **what):
        self.ask("POST", "faults", {"match": match, **what})

    def journal(self):
        """What the SDK sent: requests, and the logs that it followed as "WS"."""
        return [e for e in self.ask("GET", "journal") if not e["path"].startswith("/_test/")]

    def state(self):
        """{"sandboxes": {id: state}, "snapshots": {name: state}, "flaws": […], …}"""
        return self.ask("GET", "cloud")

    def evict(self, sandbox_id):
        self.ask("POST", f"evict/{sandbox_id}")
