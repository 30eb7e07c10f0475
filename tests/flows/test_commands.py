"""The commands that look after sandboxes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import anyio
import pytest
from click.testing import CliRunner

from metaflow_sandbox import cli, manage
from metaflow_sandbox.backends.base import SandboxInfo, SandboxSpec
from metaflow_sandbox.backends.bubblewrap import Bubblewrap
from metaflow_sandbox.errors import SandboxError
from metaflow_sandbox.leases import Lease, living
from metaflow_sandbox.manage import Found

pytestmark = pytest.mark.sample(0.7)

COMMAND = [sys.executable, "-m", "metaflow_sandbox.cli"]
FLOW = """
    import time
    from metaflow import FlowSpec, bubblewrap, step

    class Managed(FlowSpec):
        @bubblewrap(network=False)
        @step
        def start(self):
            time.sleep(1000)
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Managed()
"""


@pytest.fixture
def command(project):
    def run(*arguments, env=None):
        return subprocess.run(
            [*COMMAND, *arguments],
            # Another backend of these tests is bubblewrap underneath, and lists the same.
            env={**project.environment, "PYTHONPATH": "", **(env or {})},
            capture_output=True,
            text=True,
        )

    return run


def listed(command):
    done = command("list", "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def running(project, command):
    """A flow whose step sleeps in its sandbox, and that sandbox as `list` shows it."""
    project.write("flow.py", FLOW)
    process = project.start("flow.py", "run")
    deadline = time.monotonic() + 60
    while not (found := [f for f in listed(command) if "Managed" in f["step"]]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield process, found[0]
    process.kill()
    process.communicate()


def test_what_runs_is_listed_with_its_step_and_killed_by_its_id(project, command, running):
    process, sandbox = running
    assert sandbox["backend"] == "bubblewrap"
    assert sandbox["step"].startswith("Managed/") and sandbox["step"].endswith("/start/1/0")
    lines = command("list").stdout.splitlines()
    assert lines[0].split() == ["BACKEND", "ID", "AGE", "STEP"]
    assert lines[1].split()[1] == sandbox["id"]

    of_flow = project.run("flow.py", "sandbox", "list", env={"PYTHONPATH": ""}).ok().output
    assert sandbox["id"] in of_flow

    # Somebody wants it.
    assert command("gc").stdout == ""

    done = command("kill", sandbox["id"])
    assert (done.returncode, done.stdout.split()[:3]) == (0, ["ended", "bubblewrap", sandbox["id"]])
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"the sandbox has ended" in output
    assert listed(command) == []


def test_what_nobody_wants_is_collected(project, command, monkeypatch):
    """Its run is gone, while its owner lives: as a cloud's sandbox would be left."""
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tempfile.tempdir", str(project.temporary))
    from metaflow_sandbox.manage import ownership

    async def leave_and_collect():
        gone = ownership(project.temporary / "run-gone", 3600)
        late = {**gone, "metaflow-host": "another", "metaflow-expires": "1000"}
        foreign = {**gone, "metaflow-host": "another"}
        made = [
            await Bubblewrap().create(SandboxSpec(labels=labels, network=False))
            for labels in (gone, late, foreign, {"purpose": "not a step's"})
        ]
        try:
            ids = [sandbox.id for sandbox in made]
            dry = await anyio.to_thread.run_sync(command, "gc", "--dry-run")
            assert sorted(line.split()[3] for line in dry.stdout.splitlines()) == sorted(ids[:2])
            assert (await made[0].run(["true"])).exit_code == 0
            done = await anyio.to_thread.run_sync(command, "gc")
            assert sorted(line.split()[2] for line in done.stdout.splitlines()) == sorted(ids[:2])
            left = {info.id for info in await Bubblewrap().list({})}
            assert left == set(ids[2:])
        finally:
            for sandbox in made:
                await sandbox.destroy()

    anyio.run(leave_and_collect)


def test_only_where_the_leases_of_a_run_are_is_its_sandbox_an_orphan(tmp_path, monkeypatch):
    """Others may see it too, with the same account or engine: another user, or TMPDIR."""

    def temporary(name):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / name))
        return {path.name for path in living("run")}

    temporary("mine")
    run = Lease("run")
    found = Found("cloud", SandboxInfo("id", manage.ownership(run.path, 3600), None))
    assert not manage.is_orphan(found, temporary("another"))
    assert not manage.is_orphan(found, temporary("mine"))
    run.release()
    assert not manage.is_orphan(found, temporary("another"))
    assert manage.is_orphan(found, temporary("mine"))


def test_one_that_can_not_be_ended_keeps_no_other_alive(monkeypatch):
    found = [Found("cloud", SandboxInfo(name, {}, None)) for name in ("first", "stuck", "last")]
    ended = []

    async def orphans(*_):
        return found, {}

    async def destroy(item):
        if item.info.id == "stuck":
            raise SandboxError("not now", op="destroy")
        ended.append(item.info.id)

    monkeypatch.setattr(manage, "orphans", orphans)
    monkeypatch.setattr(manage, "destroy", destroy)
    done = CliRunner().invoke(cli.main, ["gc"])
    assert done.exit_code == 1
    assert ended == ["first", "last"]
    assert "stuck" in done.output and "lives on: not now" in done.output


def test_an_id_that_is_not_there_is_said(command):
    done = command("kill", "nothing")
    assert done.returncode == 1
    assert "there is no sandbox nothing" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kill", "nothing"], "there is no sandbox nothing"),
        (["shell", "1/start/1"], "there is no terminal for a shell"),
        (["shell", "1/start/1", "true"], "1/start/1"),
        (["shell", "--backend", "none", "1/start/1", "true"], "'none'"),
        (["gc"], "is not a private directory of yours"),
    ],
)
def test_a_flow_says_what_is_wrong_in_one_line(project, arguments, said):
    project.write("flow.py", FLOW)
    elsewhere = project.directory / "elsewhere"
    (elsewhere / f"metaflow-sandbox-{os.getuid()}").mkdir(parents=True, mode=0o755)
    done = project.run("flow.py", "sandbox", *arguments, env={"TMPDIR": str(elsewhere)})
    assert done.code == 1
    assert said in done.output
    assert "Traceback" not in done.output


def test_all_that_went_wrong_is_said_and_keeps_nothing_from_its_work(monkeypatch):
    found = [Found("cloud", SandboxInfo("stuck", {}, None))]
    bounded = []

    async def find(*_):
        return found, {"far": SandboxError("no answer", op="list")}

    async def destroy(_):
        raise SandboxError("not now", op="destroy")

    monkeypatch.setattr(manage, "find", find)
    monkeypatch.setattr(manage, "orphans", find)
    monkeypatch.setattr(manage, "destroy", destroy)
    monkeypatch.setattr("metaflow_sandbox.cache.bound", lambda: bounded.append(1) or [])
    for argv in (["kill", "stuck", "other", "--backend", "far"], ["gc", "--backend", "far"]):
        done = CliRunner().invoke(cli.main, argv)
        assert done.exit_code == 1
        assert "far could not be asked: no answer" in done.output
        assert "stuck" in done.output and "lives on: not now" in done.output
        assert ("there is no sandbox other" in done.output) == (argv[0] == "kill")
    assert bounded == [1]


def test_doctor_says_what_works_and_what_would_help(command):
    done = command("doctor")
    assert done.returncode == 0, done.stdout
    assert "bubblewrap: works" in done.stdout
    assert "enforced here:" in done.stdout and "memory" in done.stdout
    assert "export DAYTONA_API_KEY=" in done.stdout
    assert "export E2B_API_KEY=" in done.stdout or "metaflow-sandbox[e2b]" in done.stdout


def test_doctor_fails_for_a_named_backend_that_does_not_work(command):
    assert command("doctor", "bubblewrap").returncode == 0
    done = command("doctor", "bubblewrap", "daytona")
    assert done.returncode == 1
    assert "daytona: no" in done.stdout


def test_a_foreach_keeps_to_what_an_account_may_have(project):
    project.write(
        "flow.py",
        """
        import time
        from metaflow import FlowSpec, sandbox, step

        class Many(FlowSpec):
            @step
            def start(self):
                self.items = list(range(6))
                self.next(self.work, foreach="items")

            @sandbox(network=False)
            @step
            def work(self):
                self.began = time.monotonic()
                time.sleep(1.5)  # so that the last waits for longer than goes unsaid
                self.ended = time.monotonic()
                self.next(self.join)

            @step
            def join(self, inputs):
                times = [(i.began, 1) for i in inputs] + [(i.ended, -1) for i in inputs]
                now = self.most = 0
                for _, change in sorted(times):
                    now += change
                    self.most = max(self.most, now)
                self.next(self.end)

            @step
            def end(self):
                print("at most", self.most)

        if __name__ == "__main__":
            Many()
        """,
    )
    limit = {"METAFLOW_SANDBOX_CONCURRENT": "bubblewrap=2"}
    output = project.run("flow.py", "run", env=limit).ok().output
    assert "at most 2" in output
    assert "waiting for a sandbox: bubblewrap is limited to 2 at once here" in output
    assert "at most 2" not in project.run("flow.py", "run").ok().output


def test_a_wrong_limit_is_refused_before_anything_runs(project):
    project.write("flow.py", FLOW)
    done = project.run("flow.py", "run", env={"METAFLOW_SANDBOX_CONCURRENT": "many"})
    assert done.code != 0
    assert "give numbers above 0" in done.output


def test_a_trace_of_an_attempt_tells_what_it_did_and_no_secret(project):
    project.write(
        "flow.py",
        """
        from metaflow import FlowSpec, sandbox, step

        class Traced(FlowSpec):
            @sandbox(env=["TOKEN"], network=False)
            @step
            def start(self):
                import os
                print("printed " + os.environ["TOKEN"])
                self.kept = os.environ["TOKEN"]
                self.next(self.end)

            @step
            def end(self):
                pass

        if __name__ == "__main__":
            Traced()
        """,
    )
    settings = {"METAFLOW_SANDBOX_DEBUG": 1, "METAFLOW_SANDBOX_TIMINGS": True}
    home = Path(project.environment["HOME"])
    (home / ".metaflowconfig").mkdir()
    (home / ".metaflowconfig/config.json").write_text(json.dumps(settings))
    output = project.run("flow.py", "run", env={"TOKEN": "canary-0451"}).ok().output
    assert '"create": ' in output
    (directory,) = (home / ".local/state/metaflow-sandbox/debug").iterdir()
    assert str(directory) in output
    assert directory.stat().st_mode & 0o077 == 0
    text = (directory / "events.jsonl").read_text()
    assert "canary-0451" not in text
    events = [json.loads(line) for line in text.splitlines()]
    names = [event["event"] for event in events]
    assert list(dict.fromkeys(names)) == [
        "attempt", "create", "created", "frame", "exit", "destroy", "end",
    ]  # fmt: skip
    assert events[0]["variables"] == ["TOKEN"]
    assert {"o", "x"} <= {event["kind"] for event in events if event["event"] == "frame"}
    assert {"create", "run", "record"} <= events[-1]["timings"].keys()


NO_SDKS = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("daytona", "daytona_api_client_async", "e2b", "boxlite"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def test_nothing_is_said_of_backends_that_nobody_set_up(project, command):
    """Without keys, and without docker or podman on the PATH."""
    bare = {"PATH": str(project.directory)}
    blocked = project.directory / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(NO_SDKS)
    for env in (bare, {**bare, "PYTHONPATH": str(blocked)}):
        done = command("list", env=env)
        assert (done.returncode, done.stderr) == (0, "")
    half = {"METAFLOW_SANDBOX_DOCKER": "mine", "DAYTONA_JWT_TOKEN": "of no organization"}
    done = command("list", env={**bare, **half})
    assert "docker could not be asked: there is no mine on the PATH" in done.stderr
    assert "DAYTONA_ORGANIZATION_ID is required" in done.stderr


def test_a_backend_whose_sdk_is_not_installed_keeps_nobody_from_the_others(project, command):
    """As after `pip install metaflow-sandbox[local]`, which is what most people have."""
    blocked = project.directory / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(NO_SDKS)
    env = {"PYTHONPATH": str(blocked), "DAYTONA_API_KEY": "k", "E2B_API_KEY": "k"}
    for argv in (["list"], ["gc"], ["gc", "--dry-run"]):
        assert command(*argv, env=env).returncode == 0
    examined = command("doctor", env=env)
    assert examined.returncode == 0, examined.stderr
    assert "bubblewrap: works" in examined.stdout
    for name in ("daytona", "e2b", "boxlite"):
        assert f'pip install "metaflow-sandbox[{name}]"' in examined.stdout
    for argv in (["list"], ["gc"], ["kill", "some-id"]):
        named = command(*argv, "--backend", "daytona", env=env)
        assert named.returncode == 1
        assert "daytona could not be asked" in named.stderr
