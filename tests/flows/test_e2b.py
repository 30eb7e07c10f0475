"""Flows in E2B's sandboxes, by the real SDK against an emulated service."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emulators.tls_proxy import Proxy

#: They take a while; in a few commits each has run.
pytestmark = pytest.mark.sample(0.3)

START = "/process.Process/Start"


def calls(e2b):
    """(method, path without ids) of all that the service was asked, in order."""
    return [
        (e["method"], re.sub(r"/i[a-z0-9]{19}", "/*", e["path"]))
        for e in e2b.journal()
        if not e["path"].startswith("/_test")
    ]


def creations(e2b):
    """The status of each answer to a creation."""
    wanted = ("POST", "/v2/sandboxes")
    return [e["status"] for e in e2b.journal() if (e["method"], e["path"]) == wanted]


SMALL = """
    from metaflow import FlowSpec, e2b, step

    class Small(FlowSpec):
        @step
        def start(self):
            self.items = list(range(%(items)d))
            self.next(self.work, foreach="items")

        @e2b%(parameters)s
        @step
        def work(self):
            import os
            self.result = self.input * 10
            self.seen = dict(os.environ)
            print("OUT", self.input)
            self.next(self.join)

        @step
        def join(self, inputs):
            self.results = [i.result for i in inputs]
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Small()
"""


def small(items=2, parameters=""):
    return SMALL % {"items": items, "parameters": parameters}


def test_a_small_step_costs_three_serial_round_trips(project, e2b):
    project.write("flow.py", small(items=1))
    output = project.run("flow.py", "run").ok().output
    assert "OUT 0" in output
    assert calls(e2b) == [
        ("GET", "/v2/sandboxes"),  # whether the key is right, at launch
        ("POST", "/v2/sandboxes"),
        ("POST", "/files"),
        ("POST", START),
        ("DELETE", "/sandboxes/*"),  # after the scheduler was told
    ]


EVERYTHING = """
    import os
    from metaflow import FlowSpec, catch, current, e2b, retry, step

    class Everything(FlowSpec):
        @step
        def start(self):
            self.big = os.urandom(3 << 20)
            self.next(self.large, self.again, self.caught)

        @e2b(network=["api.example.com"])
        @step
        def large(self):
            self.copy = self.big[::-1]
            self.next(self.join)

        @retry(times=1, minutes_between_retries=0)
        @e2b(network=False)
        @step
        def again(self):
            print("TRY", current.retry_count)
            assert current.retry_count == 1, "the first fails"
            self.next(self.join)

        @catch(var="failure")
        @e2b
        @step
        def caught(self):
            if self.big:
                raise ValueError("as it must")
            self.next(self.join)

        @step
        def join(self, inputs):
            self.merge_artifacts(inputs, include=["big"])
            self.same = inputs.large.copy == self.big[::-1]
            self.failed = bool(inputs.caught.failure)
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Everything()
"""


def test_large_artifacts_retries_catch_and_networks(project, e2b):
    project.write("flow.py", EVERYTHING)
    output = project.run("flow.py", "run").ok().output
    assert "TRY 0" in output and "TRY 1" in output
    assert "Step large: with a list of hosts E2B lets everything through to 8.8.8.8" in output
    answer = project.client('d = Flow("Everything").latest_run.data; answer = [d.same, d.failed]')
    assert answer == [True, True]


def test_every_fault_on_the_way_is_survived_and_the_step_runs_once(project, e2b):
    """One attempt that meets them all."""
    project.write(
        "flow.py",
        """
        import os, time
        from metaflow import FlowSpec, e2b, step

        class Faulty(FlowSpec):
            @e2b
            @step
            def start(self):
                print("SIDE EFFECT", flush=True)
                for i in range(200):
                    print("line", i, "x" * 500)
                    if i % 50 == 0: time.sleep(0.3)
                self.big = os.urandom(2 << 20)
                self.next(self.end)

            @step
            def end(self):
                print("BIG", len(self.big))

        if __name__ == "__main__":
            Faulty()
        """,
    )
    for status, message in ((503, "busy"), (429, "the maximum of concurrent sandboxes")):
        body = {"code": status, "message": message}
        e2b.fault("POST /v2/sandboxes", status=status, body=body, times=5)
    e2b.fault("POST /v2/sandboxes", lose=True)
    e2b.fault("POST /files", reset_upload=100_000)
    e2b.fault("POST /files", status=502, body={"code": 502, "message": "the port is not open"})
    e2b.fault(START, lose=True)
    e2b.fault(START, reset_download=20_000)
    e2b.fault(START, cut_download=60_000)
    e2b.fault("GET /files", reset_download=500_000)
    e2b.fault("DELETE /sandboxes", reset_upload=0)
    output = project.run("flow.py", "run").ok().output
    assert output.count("SIDE EFFECT") == 1
    assert [f"line {i} " in output for i in range(200)] == [True] * 200
    assert output.count("line 77 ") == 1
    assert f"BIG {2 << 20}" in output
    assert {*creations(e2b)} >= {503, 429, 201}
    assert [f["match"] for f in e2b.ask("GET", "faults") if f["times"]] == []  # all were met


def test_an_evicted_sandbox_fails_the_attempt_and_the_next_one_runs(project, e2b):
    project.write(
        "flow.py",
        """
        import time
        from metaflow import FlowSpec, current, e2b, retry, step

        class Evicted(FlowSpec):
            @retry(times=1, minutes_between_retries=0)
            @e2b
            @step
            def start(self):
                print("RUNNING", current.retry_count, flush=True)
                if current.retry_count == 0: time.sleep(600)
                self.next(self.end)

            @step
            def end(self):
                pass

        if __name__ == "__main__":
            Evicted()
        """,
    )
    process = project.start("flow.py", "run")
    seen = b""
    while b"RUNNING 0" not in seen:
        line = process.stdout.readline()
        assert line, seen.decode()
        seen += line
    e2b.evict()
    output = seen + process.communicate(timeout=200)[0]
    assert process.returncode == 0, output.decode()
    assert b"sandbox has ended" in output or b"is gone" in output
    assert b"RUNNING 1" in output


def test_a_template_is_built_once_and_found_again(project, e2b):
    parameters = (
        '(image="python:3.12-slim", cpu=1, memory=511, setup=["echo made > /opt/made", "id -un"])'
    )
    source = small(items=1, parameters=parameters).replace(
        "import os\n", 'import os\n            print(open("/opt/made").read(), os.cpu_count())\n'
    )
    project.write("flow.py", source)
    others = set(e2b.cloud()["templates"])
    output = project.run("flow.py", "run").ok().output
    assert "builds a template of E2B's from python:3.12-slim, once" in output
    assert re.search(r"Step work: root$", output, re.M)  # the log of the build
    assert re.search(r"\] made$", output, re.M)
    again = project.run("flow.py", "run").ok().output
    assert "builds a template" not in again
    builds = [c for c in calls(e2b) if c == ("POST", "/v3/templates")]
    assert len(builds) == 1
    (names,) = [names for id_, names in e2b.cloud()["templates"].items() if id_ not in others]
    assert re.fullmatch("metaflow-sandbox-[0-9a-f]{40}", names[0])

    # It can be named as one's own, too.
    project.write("own.py", small(items=1, parameters=f'(template="{names[0]}")'))
    project.run("own.py", "run").ok()


BAD = [
    ("", {"E2B_API_KEY": ""}, "export E2B_API_KEY=…"),
    ("", {"E2B_API_KEY": "e2b_wrong"}, "E2B refused the API key"),
    ("", {"E2B_API_URL": "http://127.0.0.1:9"}, "E2B can't be reached"),
    (
        "",
        {"E2B_API_URL": "http://x.invalid", "HTTP_PROXY": "http://127.0.0.1:9"},
        "Check the network, HTTPS_PROXY and NO_PROXY",
    ),
    ('(template="nobodys")', {}, "E2B has no such template that is ready"),
    ('(image="busybox:1")', {}, "it has no python3, 3.8 or later"),
    ('(image="python:3.11", executable="/opt/python")', {}, "it has no /opt/python, 3.8 or later"),
    ('(image="python")', {}, "name a version or a digest"),
    ('(network=["93.184.216.34"])', {}, "Name the host instead"),
    ("(cache=False)", {}, "cache=False can't be had from e2b"),
    ('(image="no/such:image")', {}, "Check the image's name"),
    ('(setup=["echo why it failed; exit 3"])', {}, "why it failed"),
    ('(image="python:3.12-slim", template="mine")', {}, "Leave one out"),
    ("(cpu=0.5)", {}, "cpu=0.5: E2B gives whole CPUs. Give cpu=1."),
    ("(cpu=64)", {}, "between 1 and 8"),
    ("(memory=999999)", {}, "between 128 and 8192"),
    ("(disk=100)", {}, "disk=100 can't be enforced by e2b"),
    ("(timeout=7200)", {}, "export METAFLOW_SANDBOX_E2B_HOURS=24"),
    ("", {"METAFLOW_SANDBOX_E2B_HOURS": "a day"}, "give a number of hours, from 0.1 to 8760"),
]


@pytest.mark.parametrize(("parameters", "variables", "said"), BAD, ids=[s for *_, s in BAD])
def test_bad_input_is_refused_at_launch_with_its_remedy(project, e2b, parameters, variables, said):
    project.write("flow.py", small(parameters=parameters))
    done = project.run("flow.py", "run", env=variables)
    assert done.code != 0
    assert said in done.output, done.output
    assert "Traceback" not in done.output
    assert "Task is starting" not in done.output


@pytest.mark.parametrize(
    ("tasks", "at_once"), [(8, 3), pytest.param(100, 20, marks=pytest.mark.large)]
)
def test_a_foreach_keeps_to_the_accounts_limits(project, e2b, tasks, at_once):
    """A foreach over an account's limits, with 50 ms of latency; nothing is refused."""
    project.write("flow.py", small(items=tasks))
    e2b.cloud(concurrent=at_once, per_second=2, boot=0.1)
    e2b.settings(latency=0.05)
    limits = {"METAFLOW_SANDBOX_CONCURRENT": f"e2b={at_once}",
              "METAFLOW_SANDBOX_PER_SECOND": "e2b=1.9"}  # fmt: skip
    began = time.monotonic()
    output = project.run(
        "flow.py", "run", "--max-workers", "100", "--max-num-splits", "200", env=limits
    ).ok().output  # fmt: skip
    print(f"{tasks} tasks, {at_once} at once: {time.monotonic() - began:.0f} s")
    assert "Task failed" not in output
    assert creations(e2b).count(201) == tasks
    assert project.client('answer = len(Flow("Small").latest_run.data.results)') == tasks


def test_a_run_behind_a_proxy_that_opens_up_tls(project, e2b, tmp_path):
    """With E2B's own layout of hosts, and large files both ways."""
    settings = {k: v for k, v in e2b.environment.items() if k == "E2B_API_KEY"}
    for name in set(e2b.environment) - set(settings):
        del project.environment[name]
    project.environment |= {**settings, "E2B_DOMAIN": "e2b.test"}
    source = small(items=1).replace("self.result = ", "self.big = os.urandom(1 << 20); "
                                    "self.result = ")  # fmt: skip
    project.write("flow.py", source)
    with Proxy(tmp_path, e2b.port, ["*.e2b.test"]) as proxy:
        output = project.run("flow.py", "run", env=proxy.environment).ok().output
    assert "OUT 0" in output
    assert ("GET", "/files") in calls(e2b)
    hosts = {re.sub("-i[a-z0-9]{19}", "-*", host) for host in proxy.hosts}
    assert hosts == {"api.e2b.test:443", "49983-*.e2b.test:443"}


SLOW = """
    import time
    from metaflow import FlowSpec, e2b, step

    class Slow(FlowSpec):
        @e2b
        @step
        def start(self):
            print("RUNNING", flush=True)
            time.sleep(600)
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Slow()
"""


def running(project):
    """A flow whose step runs, and what it has printed."""
    project.write("flow.py", SLOW)
    process = project.start("flow.py", "run")
    seen = b""
    while b"RUNNING" not in seen:
        line = process.stdout.readline()
        assert line, seen.decode()
        seen += line
    return process


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_run_that_is_ended_leaves_no_sandbox(project, e2b, name):
    process = running(project)
    assert len(e2b.cloud()["sandboxes"]) == 1
    os.killpg(process.pid, signal.Signals[name])
    process.communicate(timeout=200)
    # The fixtures see that nothing is left, here and there.


def test_ctrl_c_while_the_launch_makes_a_sandbox_leaves_none(project, e2b):
    e2b.cloud(boot=3)
    project.write("flow.py", small(parameters='(template="base")'))
    process = project.start("flow.py", "run")
    while ("POST", "/v2/sandboxes") not in calls(e2b):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=100)
    assert process.returncode != 0
    time.sleep(4)  # it would be there by now
    assert e2b.living() == []


def test_what_a_killed_run_leaves_is_found_and_ended_by_gc(project, e2b):
    process = running(project)
    os.killpg(process.pid, signal.SIGKILL)
    for pid, command in processes(project):
        if "supervise" in command:
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=200)
    (left,) = e2b.cloud()["sandboxes"]
    command = [sys.executable, "-m", "metaflow_sandbox.cli", "gc", "--backend", "e2b"]
    done = subprocess.run(
        command, env=project.environment, cwd=project.directory, capture_output=True, text=True
    )
    assert f"ended e2b {left} (Slow/" in done.stdout, done.stderr
    assert e2b.cloud()["sandboxes"] == {}


def processes(project):
    """(process id, command) of this project's processes."""
    mark = str(project.temporary.parent).encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_bytes()
            if mark in command + (path / "environ").read_bytes() and int(path.name) != os.getpid():
                yield int(path.name), command.decode(errors="replace")
