"""Runs real flows in directories of their own and looks at what they left, as a user would."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import engines
import pytest
from metaflow import metaflow_config

import sampling

THIRD_PARTY = Path(__file__).parent / "third_party"
FLOW_SECONDS = 240
_ENDED_BY = (signal.SIGINT, signal.SIGHUP)


def pytest_collection_modifyitems(config, items):
    kept, left = sampling.take_part(items)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(sampling.said())


@dataclass
class Finished:
    """A flow's process that ended."""

    code: int
    output: str

    def ok(self):
        assert self.code == 0, self.output
        return self


class Project:
    """A user's directory with flows in it, a home and a temporary directory of its own."""

    def __init__(self, root):
        self.seconds = FLOW_SECONDS
        self.directory = root / "project"
        self.temporary = root / "tmp"
        for path in (self.directory, self.temporary, root / "home"):
            path.mkdir()
        kept = {k: os.environ[k] for k in ("PATH", "LANG") if k in os.environ}
        self.environment = {
            **kept,
            "HOME": str(root / "home"),
            "TMPDIR": str(self.temporary),
            "METAFLOW_USER": "tester",
            "METAFLOW_CLIENT_CACHE_PATH": str(root / "cache"),
            "PYTHONPATH": str(THIRD_PARTY),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def write(self, name, source):
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        return path

    def start(self, name, *arguments, env=None):
        """Starts a flow and gives its process, for tests that end it."""
        return subprocess.Popen(
            [sys.executable, name, "--no-pylint", *arguments],
            cwd=self.directory,
            env={**self.environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell that starts tests in the background has the one ignored, nohup the other.
            preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in _ENDED_BY],
        )

    def run(self, name, *arguments, env=None):
        """Runs a flow to its end."""
        process = self.start(name, *arguments, env=env)
        try:
            output, _ = process.communicate(timeout=self.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail("the flow hangs:\n" + output.decode(errors="replace")[-5000:])
        return Finished(process.returncode, output.decode(errors="replace"))

    def stopped(self, decorator):
        """Runs a flow whose second step has this decorator, which stops it before any step."""
        self.write(
            "flow.py",
            f"""
            from metaflow import FlowSpec, bubblewrap, step

            class Stopped(FlowSpec):
                @step
                def start(self):
                    self.next(self.inside)

                {decorator}
                @step
                def inside(self):
                    self.next(self.end)

                @step
                def end(self):
                    pass

            if __name__ == "__main__":
                Stopped()
            """,
        )
        done = self.run("flow.py", "run")
        assert done.code != 0
        assert "Task is starting" not in done.output
        return done.output

    def client(self, source, env=None):
        """Runs a script with Metaflow's client; it leaves its answer in `answer`."""
        script = (
            "import json\nfrom metaflow import *\nnamespace(None)\n"
            + textwrap.dedent(source)
            + "\nprint('ANSWER' + json.dumps(answer))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=self.directory,
            env={**self.environment, **(env or {})},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.rpartition("ANSWER")[2])

    # --- what must not be left

    def leases(self):
        base = self.temporary / f"metaflow-sandbox-{os.getuid()}"
        there = sorted(p.name for p in base.iterdir()) if base.exists() else []
        # Its name, and empty lock files, which stay.
        return [n for n in there if n != "identity" and not n.startswith("places-")]

    def processes(self):
        """Processes on this machine that belong to this project: by their variables or files."""
        mark = str(self.temporary.parent).encode()
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                about = (path / "environ").read_bytes() + (path / "cmdline").read_bytes()
            except OSError:
                continue
            if mark in about and int(path.name) != os.getpid():
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def ended_while_it_asks(self, silent, *arguments, env=None):
        """Starts the flow, and asks it alone to end once it waits for an answer of this server."""
        silent.settimeout(120)
        process = self.start("flow.py", *arguments, env=env)
        connection, _ = silent.accept()
        process.send_signal(signal.SIGTERM)
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            connection.close()
            process.kill()
        assert process.returncode == 128 + signal.SIGTERM, output.decode()
        self.assert_nothing_left()

    def groups(self):
        return [str(p) for p in Path("/sys/fs/cgroup").glob("**/metaflow-sandbox-*")]

    def assert_nothing_left(self, seconds=10.0):
        """No sandbox, process, control group or temporary file is there any more."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            left = self.leases() + self.processes()
            if not left:
                break
            time.sleep(0.1)
        assert left == []


@pytest.fixture
def silent():
    """A server that takes connections and never answers; its address is loopback's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture(scope="session")
def daytona_server(tmp_path_factory):
    """A Daytona on loopback, one for all tests of a process."""
    from tests.emulators.daytona import Emulator, wire

    if not wire.SPECIFICATIONS.exists():
        warnings.warn(
            "NOT CHECKED: Daytona's published specification is not here (PROVIDER_SPECS), so that "
            "answers of its emulator are held to the installed SDK's models alone.",
            stacklevel=1,
        )
    running = Emulator(tmp_path_factory.mktemp("daytona"))
    yield running
    running.close()


@pytest.fixture
def daytona(daytona_server):
    """It, as at first; what it answers is what the SDK's models know."""
    daytona_server.reset()
    yield daytona_server
    found = daytona_server.state()
    assert found["flaws"] == []


@pytest.fixture
def project(tmp_path):
    made = Project(tmp_path)
    yield made
    made.assert_nothing_left()


#: What an ordinary user checks of Docker: the engine is the same one, and that it is reached.
DOCKER_AS_USER = {
    "test_a_foreach_and_its_join_run_in_containers",
    "test_mounts_are_delivered",
    "test_files_go_in_and_come_out",
    "test_two_processes_make_sandboxes_at_once",
}


@pytest.fixture(scope="session")
def e2b_service():
    """An emulated E2B, in a process of its own."""
    if sys.version_info < (3, 11):
        pytest.skip("NOT RUN: E2B's SDK needs Python 3.11")
    from emulators.e2b.server import running

    with running() as server:
        yield server


@pytest.fixture
def e2b(e2b_service, project):
    """The same, as new, where the project's flows find it; nothing is left there after a test."""
    e2b_service.reset()
    project.environment |= e2b_service.environment
    yield e2b_service
    assert e2b_service.wait_until_none_lives()


@pytest.fixture(scope="session")
def dockerd(tmp_path_factory):
    """A Docker engine that the test processes of this run share.

    Only root can start one. TEST_DOCKERD is the directory of one that is there already, to
    whose socket this user gets by its group: `tests/contract/engines.py` runs a command beside one.
    """
    if there := os.environ.get("TEST_DOCKERD"):
        yield engines.Dockerd(Path(there))
        return
    if os.getuid() != 0:
        pytest.skip("NOT CHECKED: Docker as an ordinary user, since TEST_DOCKERD names no engine")
    if missing := engines.missing():
        pytest.fail(f"there is no {', '.join(missing)}: {engines.INSTALL}")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    engine = engines.Dockerd(shared / "dockerd").join()
    yield engine
    engine.leave()


@pytest.fixture
def docker(request, dockerd, monkeypatch):
    """Has everything in this process talk to that engine; the default image is there."""
    sampled = os.getuid() != 0 and not sampling.whole()
    if sampled and request.node.originalname not in DOCKER_AS_USER:
        pytest.skip("NOT CHECKED as an ordinary user: make test-containers-unprivileged does")
    monkeypatch.setenv("DOCKER_HOST", dockerd.host)
    monkeypatch.delenv("DOCKER_CONTEXT", raising=False)
    dockerd.docker("tag", engines.IMAGE, engines.DEFAULT)
    return dockerd


@pytest.fixture(scope="session")
def podman_there():
    with engines.Podman.there() as engine:
        yield engine


@pytest.fixture
def podman(podman_there, monkeypatch):
    """Has everything in this process talk to Podman; the default image is there."""
    # Both the module and the variable, for tests that start a process.
    monkeypatch.setattr(metaflow_config, "SANDBOX_DOCKER", str(podman_there.program))
    monkeypatch.setenv("METAFLOW_SANDBOX_DOCKER", str(podman_there.program))
    return podman_there
