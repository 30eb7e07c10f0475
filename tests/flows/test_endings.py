"""Every way in which a step can end gives the right result or a clear error, and leaves nothing."""

import os
import signal
import time
from pathlib import Path

import pytest

FLOW = """
    import os, subprocess, sys, time
    from metaflow import FlowSpec, sandbox, step

    class Ending(FlowSpec):
        @step
        def start(self):
            self.before = "kept"
            self.next(self.work)

        @sandbox(%s)
        @step
        def work(self):
            %s
            self.after = "done"
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Ending()
"""
BEFORE = """
    run = Flow("Ending").latest_run
    answer = [run["start"].task.data.before, run["work"].task.successful, run.successful]
"""

FAILING = [
    ("os._exit(7)", "exit code 7"),
    ("os._exit(0)", "exit code 0 before Metaflow could record"),
    ("sys.exit(0)", "exit code 0 before Metaflow could record"),
    ("sys.exit(202)", "exit code 202"),
    ("os.kill(os.getpid(), 9)", "signal 9 (SIGKILL)"),
    ("os.abort()", "signal 6 (SIGABRT)"),
    ("import ctypes; ctypes.string_at(0)", "signal 11 (SIGSEGV)"),
    ("raise ValueError('a plain failure')", "a plain failure"),
    ("os.execvp('false', ['false'])", "exit code 1"),
    ("import no_such_package", "neither has this environment"),
    ("self.bad = (lambda: 0, 1)", "pickle"),
    ("os.kill(-1, 9)", "ended"),
]


@pytest.mark.parametrize(("code", "message"), FAILING, ids=[c for c, _ in FAILING])
def test_a_failing_step_says_how_it_ended_and_earlier_results_stay(project, code, message):
    project.write("flow.py", FLOW % ("", code))
    done = project.run("flow.py", "run")
    assert done.code != 0
    assert message in done.output
    assert "Traceback" not in done.output.partition("Workflow starting")[0]
    assert project.client(BEFORE) == ["kept", False, False]


SUCCEEDING = [
    "os.close(1); os.close(2)",
    "sys.stdout.close(); sys.stderr.close(); sys.stdout = sys.stderr = open(os.devnull, 'w')",
    "subprocess.Popen(['sleep', '1000'])",
    "subprocess.Popen(['sleep', '1000'], start_new_session=True)",
    "[subprocess.Popen(['sleep', '1000'], start_new_session=True) for _ in range(50)]",
    "print('no newline', end='')",
    "os.write(1, bytes(range(256)) * 3)",
    "print('x' * 1_000_000)",
    "[print(i) for i in range(20_000)]",
    "open('mine', 'w').write('beside the flow'); os.listdir('.')",
    "self.before = 'changed'; del self.before; self.before = 'kept'",
]


@pytest.mark.parametrize("code", SUCCEEDING)
def test_an_odd_step_that_succeeds_is_a_success(project, code):
    project.write("flow.py", FLOW % ("", code))
    project.run("flow.py", "run").ok()
    assert project.client(BEFORE) == ["kept", True, True]


def test_output_is_shown_live_once_and_stored(project):
    project.write(
        "flow.py", FLOW % ("", "print('first', flush=True); time.sleep(4); print('last')")
    )
    process = project.start("flow.py", "run")
    seen = {}
    for line in process.stdout:
        for word in (b"first", b"last"):
            if word in line:
                assert word not in seen
                seen[word] = time.monotonic()
    assert process.wait() == 0
    assert seen[b"last"] - seen[b"first"] > 3
    logs = project.client('answer = Flow("Ending").latest_run["work"].task.stdout')
    assert logs == "first\nlast\n"


def test_too_much_output_is_dropped_and_said(project):
    code = "[sys.stdout.write('x' * 1023 + chr(10)) for _ in range(4096)]"
    project.write("flow.py", FLOW % ("", code))
    done = project.run("flow.py", "run", env={"METAFLOW_SANDBOX_MAX_OUTPUT": "1"}).ok()
    assert "bytes of output were dropped: a step may print 1 MB" in done.output
    assert len(done.output) < 2 << 20


@pytest.mark.parametrize(
    "code",
    ["time.sleep(1000)", "os.system('setsid sleep 1000 & sleep 1000')",
     "import signal; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]; time.sleep(1000)"],
)  # fmt: skip
def test_the_timeout_ends_a_step(project, code):
    project.write("flow.py", FLOW % ("timeout=3", code))
    done = project.run("flow.py", "run")
    assert done.code != 0
    assert "ended after 3 s" in done.output


def test_metaflows_timeout_fires_inside_first(project):
    source = FLOW.replace("@sandbox(%s)", "@timeout(seconds=2)\n        @sandbox(%s)")
    project.write("flow.py", source.replace("sandbox, step", "sandbox, step, timeout") % (
        "", "time.sleep(1000)"))  # fmt: skip
    done = project.run("flow.py", "run")
    assert done.code != 0
    exception = project.client('answer = str(Flow("Ending").latest_run["work"].task.exception)')
    assert "timed out after 0 hours, 0 minutes, 2 seconds" in exception


def test_running_out_of_memory_is_said(project):
    project.write("flow.py", FLOW % ("memory=300", "x = bytearray(600 << 20)"))
    done = project.run("flow.py", "run")
    assert done.code != 0
    assert "give it more with memory=… (MB)" in done.output


def running(project):
    """Waits until a started flow's launcher has a sandbox, and gives its process id."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                command = (path / "cmdline").read_bytes()
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                launcher = Path(f"/proc/{parent}")
                if (
                    b"bwrap\0--args" in command
                    and b"sandbox\0step\0" in (launcher / "cmdline").read_bytes()
                    and str(project.temporary).encode() in (launcher / "environ").read_bytes()
                ):
                    return parent
            except OSError:
                continue
        time.sleep(0.05)
    raise AssertionError("the step never started")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_scheduler_that_is_ended_leaves_nothing(project, number):
    project.write("flow.py", FLOW % ("", "time.sleep(1000)"))
    process = project.start("flow.py", "run")
    running(project)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as Ctrl-C on a terminal does
    else:
        process.send_signal(number)
    process.communicate(timeout=60)
    if number in (signal.SIGKILL, signal.SIGHUP, signal.SIGTERM):
        # Nobody could tidy up the run's directory: the next run does.
        deadline = time.monotonic() + 15
        while project.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert project.processes() == []
        project.write("flow.py", FLOW % ("", "pass"))
        project.run("flow.py", "run").ok()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_is_ended_leaves_nothing_and_fails_its_task(project, number):
    project.write("flow.py", FLOW % ("", "time.sleep(1000)"))
    process = project.start("flow.py", "run")
    os.kill(running(project), number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0, output.decode()
    assert b"Task failed" in output
