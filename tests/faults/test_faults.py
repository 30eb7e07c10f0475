"""Each fault at each boundary of an attempt's life, and what is left of it.

A commit runs a part of it, SUITE=all the whole.
"""

import contextlib
import itertools
import os
import re
import signal
import time
from pathlib import Path

import points
import pytest

SIGNALS = {
    "client": ("SIGINT", "SIGTERM", "SIGKILL"),
    "supervisor": ("SIGINT", "SIGTERM", "SIGKILL"),
    "scheduler": ("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"),
    "sandbox": ("SIGKILL",),
    "agent": ("SIGKILL",),
    "step": ("SIGKILL",),
}
#: How each backend is asked for. A new one is one line.
BACKENDS = ("bubblewrap", "remote-like")
if os.getuid() == 0 or "TEST_DOCKERD" in os.environ:  # whoever can have an engine
    BACKENDS += ("docker",)
SAMPLE = 6  # of all cases at a commit, about
PROMISED_SECONDS = 15
#: Where there is a sandbox to kill, and an agent and a step in it.
_HAS_SANDBOX = ("creating", "created", "starting", "running", "exited", "collecting")
FLOW = """
    import time
    from metaflow import FlowSpec, current, sandbox, step

    class Faulty(FlowSpec):
        @step
        def start(self):
            self.before = "kept"
            self.next(self.work)

        @sandbox(backend="%s", network=False)
        @step
        def work(self):
            print("SIDE EFFECT", current.retry_count, flush=True)
            time.sleep(1)
            self.after = list(range(1000))
            self.next(self.end)

        @step
        def end(self):
            assert self.after[-1] == 999

    if __name__ == "__main__":
        Faulty()
"""


def possible(point, who):
    if who == "sandbox":
        return point in _HAS_SANDBOX
    if who == "client":
        return point != "destroying"  # it has its exit code, and has gone
    return who not in ("agent", "step") or point == "running"


MATRIX = [
    (backend, point, who, name)
    for backend, point in itertools.product(BACKENDS, points.POINTS)
    for who, names in SIGNALS.items()
    for name in names
    if possible(point, who)
]


@pytest.fixture
def faulty(project):
    project.environment["PYTHONPATH"] += f":{project.directory}:{Path(__file__).parent}"
    project.write("sitecustomize.py", "import points; points.install()")
    return project


def holders(project, scheduler):
    """{who: process ids} of all that could be killed."""
    found = {who: [] for who in SIGNALS}
    found["scheduler"] = [scheduler]
    mark = str(project.temporary.parent).encode()
    inside = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
            status = (path / "status").read_text()
            pid = int(path.name)
        except OSError:
            continue
        depth = len(re.search(r"NSpid:(.*)", status).group(1).split())
        own = len(re.search(r"NSpid:(.*)", Path("/proc/self/status").read_text()).group(1).split())
        if depth > own:
            inside.add(pid)
            if b"/agent.py\0" in command:
                found["agent"].append(pid)
            elif b"\0step\0work\0" in command:
                found["step"].append(pid)
            elif b"/run/box.py\0" in command or b'compile(program, "box"' in command:
                if not re.search(r"NSpid:.*\s1\n", status):
                    continue
                found["sandbox"].append(pid)
        elif mark in command and b"launch/client.py\0" in command:
            found["client"].append(pid)
        elif mark in command and b"\0sandbox\0supervise\0" in command:
            found["supervisor"].append(pid)
    return {who: ours(project, pids, who) for who, pids in found.items()}


def ours(project, pids, who):
    """Those in sandboxes of this project: below its supervisor, or with its files bound."""
    if who not in ("sandbox", "agent", "step"):
        return pids
    mark, kept = str(project.temporary.parent).encode(), []
    for pid in pids:
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{pid}/mountinfo").read_bytes():
                kept.append(pid)
                continue
        above = pid
        while above > 1:
            try:
                command = Path(f"/proc/{above}/cmdline").read_bytes()
                above = int(Path(f"/proc/{above}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                break
            if mark in command and b"\0sandbox\0supervise\0" in command:
                kept.append(pid)
                break
    return kept


def stopping_at(point, backend):
    return {"FAULT_POINT": point, "FAULT_BACKEND": backend}


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.sample(SAMPLE / len(MATRIX))
@pytest.mark.parametrize(("backend", "point", "who", "name"), MATRIX)
def test_after_a_fault_nothing_is_left_and_the_run_can_be_resumed(
    request, faulty, backend, point, who, name
):
    if backend == "docker":
        engine = request.getfixturevalue("docker")
        faulty.environment["DOCKER_HOST"] = engine.host
    faulty.write("flow.py", FLOW % backend)
    process = faulty.start("flow.py", "run", env=stopping_at(point, backend))
    reached = faulty.directory / points.REACHED
    wait_for(lambda: reached.exists() or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0].decode()
    if who in ("agent", "step"):
        wait_for(lambda: holders(faulty, process.pid)[who])
    victims = holders(faulty, process.pid)[who]
    assert victims, f"no {who}"
    number = signal.Signals[name]
    if who == "scheduler" and name == "SIGINT":
        os.killpg(process.pid, number)  # as Ctrl-C on a terminal does
    else:
        for pid in victims:
            os.kill(pid, number)
    time.sleep(0.1)
    (faulty.directory / points.GO).touch()
    output = process.communicate(timeout=120)[0].decode()

    # Nothing is left after the promised time.
    faulty.assert_nothing_left(PROMISED_SECONDS)

    if backend == "docker":
        wait_for(lambda: not engine.docker("ps", "--all", "--quiet").stdout, PROMISED_SECONDS)

    # The user's code ran at most once in an attempt.
    effects = re.findall(r"SIDE EFFECT \d+", output)
    assert len(effects) == len(set(effects)), output

    # The datastore has the whole attempt or none of it, and the run's end fits.
    whole, before = faulty.client(
        """
        tasks = list(Flow("Faulty").latest_run["work"]) if "work" in [
            s.id for s in Flow("Faulty").latest_run] else []
        done = [t for t in tasks if t.successful]
        answer = [[len(t.data.after) for t in done],
                  Flow("Faulty").latest_run["start"].task.data.before]
        """
    )
    assert before == "kept"
    assert whole in ([], [1000])
    if who == "scheduler":
        assert process.returncode != 0
    elif process.returncode == 0:
        # The fault came too late to matter, and then all of it is there.
        assert whole == [1000], output
    else:
        assert "Task failed" in output or "Workflow failed" in output
        assert "Traceback" not in output, output

    # What failed can be resumed.
    if process.returncode != 0:
        faulty.run("flow.py", "resume").ok()


@pytest.mark.parametrize("point", ["creating", "running", "recording"])
@pytest.mark.parametrize("days", [-30, 30])
def test_a_clock_that_jumps_ends_nothing(faulty, point, days):
    faulty.write("flow.py", FLOW % "remote-like")
    process = faulty.start("flow.py", "run", env=stopping_at(point, "remote-like"))
    reached = faulty.directory / points.REACHED
    wait_for(lambda: reached.exists() or process.poll() is not None)
    (faulty.directory / points.CLOCK).write_text(str(days * 86400))
    (faulty.directory / points.GO).touch()
    output = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 0, output
    assert len(re.findall(r"SIDE EFFECT \d+", output)) == 1
    faulty.assert_nothing_left(PROMISED_SECONDS)


def test_the_matrix_has_every_point_and_every_fault():
    assert {point for _, point, _, _ in MATRIX} == set(points.POINTS)
    assert {who for _, _, who, _ in MATRIX} == set(SIGNALS)
