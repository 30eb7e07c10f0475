"""What a whole hostile step sees of the host and of other steps, and what it is told.

The probe runs in a sandboxed step and reports what it got; the same probe outside
is the positive control. `test_isolation.py` has the attacks on the sandbox itself.
"""

import json
import os
import shutil
import socket
import tempfile
import threading
from pathlib import Path

import pytest

PROBE = """
    import glob, os, socket

    def attempt(function):
        try:
            return repr(function())[:200] or True
        except BaseException as e:
            return None

    def connect(family, address):
        with socket.socket(family, socket.SOCK_STREAM) as s:
            s.settimeout(3)
            s.connect(address)
            return True

    def everything(host):
        environ = "".join(
            str(attempt(lambda p=p: host["canary"].encode() in open(p, "rb").read()))
            for p in glob.glob("/proc/[0-9]*/environ"))
        return {
            "host secret file": attempt(lambda: open(host["secret"]).read()),
            "datastore of the run": attempt(lambda: os.listdir(host["datastore"])),
            "home directory": attempt(lambda: os.listdir(host["home"])),
            "temporary directory": attempt(lambda: os.listdir(host["tmp"])),
            "secret in any environment": "True" in environ or None,
            "TCP service of the host": attempt(
                lambda: connect(socket.AF_INET, ("127.0.0.1", host["port"]))),
            "abstract socket of the host": attempt(
                lambda: connect(socket.AF_UNIX, "\\0" + host["abstract"])),
            "socket file of the host": attempt(lambda: connect(socket.AF_UNIX, host["socket"])),
            "a process of the host": attempt(lambda: os.kill(host["pid"], 0)),
        }
"""
FLOW = """
    import json
    from metaflow import FlowSpec, sandbox, step
    from probe import everything

    class Probe(FlowSpec):
        @sandbox(env=["WANTED"])
        @step
        def start(self):
            import os
            self.found = everything(%r)
            self.variables = dict(os.environ)
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Probe()
"""
CANARY = "canary-3f9c1b"


@pytest.fixture
def host(project, tmp_path):
    """Secrets and services on this machine that a step must not reach."""
    home = tmp_path / "home"
    (home / "secret").write_text(CANARY)
    server = socket.create_server(("127.0.0.1", 0))
    abstract, path = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0{CANARY}-{os.getpid()}")
    # Socket paths may have 107 bytes, which a test's own directory can exceed.
    short = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    path.bind(str(short / "socket"))
    for listening in (server, abstract, path):
        listening.listen()
        threading.Thread(target=lambda s=listening: [s.accept() for _ in "12"], daemon=True).start()
    project.write("probe.py", PROBE)
    yield {
        "secret": str(home / "secret"), "home": str(home), "tmp": str(project.temporary),
        "datastore": str(project.directory / ".metaflow"), "canary": CANARY,
        "port": server.getsockname()[1], "abstract": f"{CANARY}-{os.getpid()}",
        "socket": str(short / "socket"), "pid": os.getpid(),
    }  # fmt: skip
    shutil.rmtree(short)


def test_a_step_reaches_nothing_of_the_host(project, host):
    project.write("flow.py", FLOW % host)
    variables = {"SECRET": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY, "WANTED": "passed on"}
    project.run("flow.py", "run", env=variables).ok()
    found, seen = project.client(
        't = Flow("Probe").latest_run["start"].task; answer = [t.data.found, t.data.variables]'
    )
    assert {k: v for k, v in found.items() if v is not None} == {}
    assert seen["WANTED"] == "passed on"
    assert seen["HOME"].startswith("/sandbox") and seen["TMPDIR"].startswith("/sandbox")
    assert "SECRET" not in seen
    assert CANARY not in json.dumps(seen)

    # The positive control: the same probe outside finds them all.
    script = f"from probe import everything; answer = everything({host!r})"
    outside = project.client(script, env={**variables, "PYTHONPATH": str(project.directory)})
    assert {k for k, v in outside.items() if v is None} == set()


def test_what_a_step_gets_to_know_of_others_is_scrubbed(project):
    project.write(
        "flow.py",
        """
        import os
        from metaflow import FlowSpec, environment, sandbox, step

        SECRET = os.environ.get("PLANTED", "")

        class Scrub(FlowSpec):
            @environment(vars={"TOKEN": SECRET})
            @step
            def start(self):
                self.next(self.look)

            @sandbox
            @environment(vars={"MINE": "mine", "LD_PRELOAD": "/nonexistent.so"})
            @step
            def look(self):
                hits = []
                for root in ("/inbox", "/sandbox"):
                    for folder, _, files in os.walk(root):
                        for name in files:
                            try:
                                data = open(os.path.join(folder, name), "rb").read()
                            except OSError:
                                continue
                            if data[:2] == b"\\x1f\\x8b":
                                import gzip
                                data = gzip.decompress(data)
                            if b"canary" + b"-77" in data:
                                hits.append(os.path.join(folder, name))
                self.hits, self.mine = hits, os.environ.get("MINE")
                self.preload = os.environ.get("LD_PRELOAD")
                self.steps = sorted(self._graph_info["steps"])
                self.next(self.end)

            @step
            def end(self):
                assert self._graph_info["steps"]["start"]["decorators"][0]["attributes"]

        if __name__ == "__main__":
            Scrub()
        """,
    )
    import subprocess

    remote = "https://user:canary-77@example.invalid/repo.git"
    for command in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *command], cwd=project.directory, check=True)
    project.run("flow.py", "run", env={"PLANTED": "canary-77"}).ok()
    answer = project.client(
        'd = Flow("Scrub").latest_run["look"].task.data; '
        "answer = [d.hits, d.mine, d.preload, d.steps]"
    )
    assert answer == [[], "mine", "/nonexistent.so", ["end", "look", "start"]]
