"""Faults in an attempt's life in a cloud's sandbox, and what is left of it, here and there.

A cloud is an emulator with `environment`, `fault`, `drop`, `living`, `evict`, `advance` and
`wait_until_none_lives`. A commit runs a part of its tests, `make faults` all.
"""

import itertools
import os
import re
import signal
import time
from pathlib import Path

import points
from test_faults import possible, wait_for

SIGNALS = {
    "client": ("SIGINT", "SIGTERM", "SIGKILL"),
    "supervisor": ("SIGINT", "SIGTERM", "SIGKILL"),
    "scheduler": ("SIGINT", "SIGTERM", "SIGKILL"),
    "provider": ("eviction", "drop"),
}
MARKS = {"client": b"launch/client.py\0", "supervisor": b"\0sandbox\0supervise\0"}
PROMISED_SECONDS = 20
_HAS_SANDBOX = ("created", "starting", "running", "exited", "collecting")


def matrix(signals):
    """(point, who, name) of each fault that there can be."""
    return [
        (point, who, name)
        for point, (who, names) in itertools.product(points.POINTS, signals.items())
        for name in names
        if (point in _HAS_SANDBOX if name == "eviction" else possible(point, who))
    ]


MATRIX = matrix(SIGNALS)
FLOW = """
    import time
    from metaflow import FlowSpec, current, retry, sandbox, step

    class Faulty(FlowSpec):
        @step
        def start(self):
            self.next(self.work)

        @retry(times=1, minutes_between_retries=0)
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


def prepare(project, cloud, backend, flow=FLOW):
    """A project whose flow runs in that cloud, and can be stopped at a point."""
    project.environment.update(cloud.environment)
    project.environment["PYTHONPATH"] += f":{project.directory}:{Path(__file__).parent}"
    project.write("sitecustomize.py", "import points; points.install()")
    project.write("flow.py", flow % backend)
    return project


def holders(project, who):
    mark = str(project.temporary.parent).encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if mark in command and MARKS[who] in command:
            found.append(int(path.name))
    return found


def whole(project):
    """The sizes of the results that were recorded."""
    return project.client(
        """
        steps = [s.id for s in Flow("Faulty").latest_run]
        tasks = list(Flow("Faulty").latest_run["work"]) if "work" in steps else []
        answer = [len(t.data.after) for t in tasks if t.successful]
        """
    )


def effects(output):
    """The attempts in which the step's code ran, each of them once."""
    found = re.findall(r"SIDE EFFECT \d+", output)
    assert len(found) == len(set(found)), output
    return found


def strike(project, cloud, backend, point, who, name):
    """A run that meets a fault at a point. Gives its exit code, and its output to the end."""
    environment = {"FAULT_POINT": point, "FAULT_BACKEND": backend}
    process = project.start("flow.py", "run", env=environment)
    reached = project.directory / points.REACHED
    wait_for(lambda: reached.exists() or process.poll() is not None, 120)
    assert process.poll() is None, process.communicate()[0].decode()
    if name == "eviction":
        for sandbox in cloud.living():
            cloud.evict(sandbox)
    elif name == "drop":
        cloud.drop()
    elif who == "scheduler" and name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C on a terminal does
    else:
        victims = [process.pid] if who == "scheduler" else holders(project, who)
        assert victims, f"no {who}"
        for pid in victims:
            os.kill(pid, signal.Signals[name])
    time.sleep(0.1)
    (project.directory / points.GO).touch()
    output = process.communicate(timeout=180)[0].decode()
    return process.returncode, output


def meet(project, cloud, backend, point, who, name):
    """A fault at a point: nothing is left, no code runs twice, and the retry is the right one."""
    code, output = strike(project, cloud, backend, point, who, name)
    project.assert_nothing_left(PROMISED_SECONDS)
    if (who, name) == ("supervisor", "SIGKILL"):  # nobody could end its sandbox
        cloud.advance(minutes=61)
    assert cloud.wait_until_none_lives(PROMISED_SECONDS)
    ran = effects(output)
    if who == "scheduler":
        assert code != 0
        assert whole(project) in ([], [1000])
        return
    # Whoever else is hit: Metaflow makes one more attempt, if any, and its result is recorded.
    assert code == 0, output
    assert whole(project) == [1000]
    if name == "drop":
        assert ran == ["SIDE EFFECT 0"], output


def connect(project, cloud, match, fault):
    """A bad connection: the step ends well in its first attempt."""
    cloud.fault(match, **fault)  # the launch itself makes no sandbox: it's the step's own
    done = project.run("flow.py", "run").ok()
    assert cloud.wait_until_none_lives(PROMISED_SECONDS)
    assert "Traceback" not in done.output, done.output
    return effects(done.output)
