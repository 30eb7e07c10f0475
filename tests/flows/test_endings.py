"""Every way in which a step can end gives the right result or a clear error, and leaves nothing."""

import os
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.sample(0.7)

FLOW = """
    import os, subprocess, sys, time
    from metaflow import FlowSpec, current, sandbox, step

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


def processes(project, *words):
    """The project's processes whose command line has these words."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
            if all(word in command for word in words) and (
                str(project.temporary).encode() in command + (path / "environ").read_bytes()
            ):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def running(project):
    """Waits until a started flow's step runs: {"client": pid, "supervisor": pid}."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        supervisors = processes(project, b"\0sandbox\0supervise\0")
        clients = processes(project, b"launch/client.py\0", b"\0sandbox\0step\0")
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent in supervisors and b"bwrap\0--args" in (path / "cmdline").read_bytes():
                    return {"client": clients[0], "supervisor": parent}
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
    project.assert_nothing_left(15)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_while_it_makes_ready_leaves_nothing(project, tmp_path, number):
    began = tmp_path / "began"
    project.write("flow.py", FLOW % ('backend="preparing"', "pass"))
    process = project.start("flow.py", "run", env={"PREPARING": str(began)})
    while not began.exists():
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.05)
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    project.assert_nothing_left(15)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("who", ["client", "supervisor"])
def test_what_runs_an_attempt_is_ended_and_the_task_fails_and_nothing_is_left(project, who, number):
    project.write("flow.py", FLOW % ("", "time.sleep(1000)"))
    process = project.start("flow.py", "run")
    os.kill(running(project)[who], number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0, output.decode()
    assert b"Task failed" in output
    if who == "supervisor":
        assert b"supervisor ended before this attempt did" in output


def test_after_a_supervisor_that_was_killed_the_next_attempt_starts_another(project):
    project.write("flow.py", FLOW % ("", "if current.retry_count == 0: time.sleep(1000)"))
    process = project.start("flow.py", "run", "--with", "retry:times=1,minutes_between_retries=0")
    os.kill(running(project)["supervisor"], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()


def test_steps_that_get_their_decorators_by_with_have_them_in_one_supervisor(project):
    """The first sandboxed task is of a step that has its decorator in the flow."""
    project.write(
        "flow.py",
        """
        from metaflow import FlowSpec, sandbox, step

        class Mixed(FlowSpec):
            @sandbox(memory=500)
            @step
            def start(self):
                self.next(self.work)

            @step
            def work(self):
                import os
                self.inside = os.path.exists("/sandbox")
                self.next(self.end)

            @sandbox
            @step
            def end(self):
                assert self.inside

        if __name__ == "__main__":
            Mixed()
        """,
    )
    project.run("flow.py", "run", "--with", "sandbox:disk=300").ok()


def test_a_lifetime_is_short_and_renewed_from_the_first_whatever_becomes_of_a_renewal(
    project, tmp_path
):
    noted = tmp_path / "noted"
    project.write("flow.py", FLOW % ('backend="leased"', "time.sleep(7)"))
    project.run("flow.py", "run", env={"RENEWALS": str(noted)}).ok()
    uploading, running = noted.read_text().split("uploaded")
    # The preflight asks for what it likes; then it is 3 s, again and again.
    assert uploading.count("3.0\n") >= 3
    assert running.count("3.0\n") >= 4
