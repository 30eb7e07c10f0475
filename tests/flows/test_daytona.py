"""Flows in Daytona's sandboxes: the real SDK against a server on loopback."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import anyio
import metaflow  # noqa: F401 - before what extends it
import pytest
from metaflow.metaflow_environment import MetaflowEnvironment
from tests.emulators.proxy import Proxy

from metaflow_extensions.sandbox.plugins.decorators import DaytonaDecorator
from metaflow_sandbox.backends import daytona as backends
from metaflow_sandbox.backends.base import Recipe, SandboxSpec
from metaflow_sandbox.errors import ConnectionLost, SandboxError, SandboxGone
from metaflow_sandbox.launch.request import Request
from metaflow_sandbox.launch.session import Session

#: They take a while; in a few commits each has run.
pytestmark = pytest.mark.sample(0.3)

FLOW = """
    import os, sys
    from metaflow import FlowSpec, Parameter, catch, daytona, retry, current, step

    class Cloudy(FlowSpec):
        number = Parameter("number", default=3)

        @step
        def start(self):
            self.items = [1, 2]
            self.next(self.work, foreach="items")

        @daytona(env=["NAMED_TOKEN"])
        @step
        def work(self):
            self.result = self.input * self.number
            self.big = os.urandom(3_000_000)
            self.seen = sorted(k for k in os.environ if "KEY" in k or "SECRET" in k or "TOKEN" in k)
            print("in the sandbox", self.input)
            print("and aside", file=sys.stderr)
            self.next(self.join)

        @daytona
        @step
        def join(self, inputs):
            self.results = sorted(i.result for i in inputs)
            self.sizes = [len(i.big) for i in inputs]
            self.seen = [i.seen for i in inputs]
            self.next(self.shaky)

        @retry(times=1, minutes_between_retries=0)
        @daytona
        @step
        def shaky(self):
            if current.retry_count == 0:
                raise ValueError("the first attempt fails")
            self.next(self.caught)

        @catch(var="failure", print_exception=False)
        @daytona
        @step
        def caught(self):
            raise KeyError("caught")
            self.next(self.end)

        @step
        def end(self):
            print("results", self.results)

    if __name__ == "__main__":
        Cloudy()
"""
SMALL = """
    from metaflow import FlowSpec, daytona, step

    class Small(FlowSpec):
        %s
        @step
        def start(self):
            %s
            self.next(self.end)

        @step
        def end(self):
            print("done", self.x)

    if __name__ == "__main__":
        Small()
"""


def small(project, decorator="@daytona", body="self.x = 1"):
    project.write("flow.py", SMALL % (decorator, body))


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def cloud(project, daytona):
    """A project whose user has a key, and the server that it is for."""
    project.environment.update(daytona.environment)
    return daytona


@pytest.fixture
def user(project, cloud):
    yield project
    assert cloud.wait_until_none_lives()


@pytest.fixture
def backend(cloud, monkeypatch):
    for variable, value in cloud.environment.items():
        monkeypatch.setenv(variable, value)
    return backends.Daytona()


def test_a_flow_runs_from_end_to_end_and_only_what_is_named_goes_in(user, cloud, tmp_path):
    bodies = tmp_path / "bodies"
    bodies.mkdir()
    cloud.ask("PUT", "settings", {"latency": 0.0, "bodies": str(bodies)})
    secrets = {"AWS_SECRET_ACCESS_KEY": "canary-aws", "OPENAI_API_KEY": "canary-openai"}
    user.write("flow.py", FLOW)
    done = user.run("flow.py", "run", env={**secrets, "NAMED_TOKEN": "canary-named"}).ok()
    assert re.search(r"in the sandbox 1", done.output)
    answer = user.client(
        """
        run = Flow("Cloudy").latest_run
        d = run["join"].task.data
        answer = [d.results, d.sizes, d.seen, sorted(t.stdout for t in run["work"]),
                  run["shaky"].task.current_attempt, str(run["caught"].task.data.failure),
                  run["work"].task.metadata_dict["sandbox-provider"]]
        """
    )
    assert answer[:4] == [
        [3, 6], [3_000_000, 3_000_000], [["NAMED_TOKEN"]] * 2,
        ["in the sandbox 1\n", "in the sandbox 2\n"],
    ]  # fmt: skip
    assert answer[4] == 1
    assert "caught" in answer[5]
    assert answer[6].startswith("Daytona (us), sandbox ")

    # Everything that the cloud was ever sent.
    journal = cloud.journal()
    sent = {path: path.read_bytes() for path in bodies.iterdir()}
    assert len(sent) > 20
    for path, body in sent.items():
        assert b"canary-aws" not in body and b"canary-openai" not in body
        assert cloud.key.encode() not in body
        if b"canary-named" in body:
            number = int(path.name.rpartition("-")[2])
            entry = next(e for e in journal if e["number"] == number)
            assert entry["path"].endswith("/files/bulk-upload")
    for entry in journal:
        headers = dict(entry["headers"])
        assert headers.pop("authorization") == f"Bearer {cloud.key}"
        said = json.dumps([headers, entry["path"], entry["query"]])
        assert "canary" not in said and cloud.key not in said
    assert "canary" not in json.dumps(cloud.state()["requests"])


def test_every_sandbox_ends_by_itself_and_says_whose_it_is(user, cloud):
    small(user)
    before = cloud.state()["requests"].keys()
    user.run("flow.py", "run").ok()
    (request,) = [r for i, r in cloud.state()["requests"].items() if i not in before]
    assert request["autoStopInterval"] == 0
    assert request["autoDeleteInterval"] == 0
    assert request["ttlMinutes"] == 60
    assert not request.get("env")
    assert request["labels"]["metaflow-flow"] == "Small"
    assert request["labels"]["metaflow-step"] == "start"
    assert set(request["labels"]) == {
        "metaflow-flow", "metaflow-run", "metaflow-step", "metaflow-task", "metaflow-attempt",
        "metaflow-owner", "metaflow-host", "metaflow-expires",
    }  # fmt: skip


def round_trips(cloud):
    """What one step sent, in the order of its beginning, without what comes beside it."""
    journal = [e for e in cloud.journal() if e["began"] > 0]
    first = next(
        i for i, e in enumerate(journal) if (e["method"], e["path"]) == ("POST", "/api/sandbox")
    )
    found, over = [], 0.0
    for entry in journal[first:]:
        # One that begins while another goes on is beside it.
        if entry["began"] >= over or entry["method"] == "WS":
            found.append(f"{entry['method']} {entry['path'].rpartition('/')[2][:20]}")
        over = max(over, entry["ended"] or entry["began"])
    return found


@pytest.mark.parametrize("events", [True, False])
def test_a_small_step_takes_at_most_seven_round_trips_one_after_the_other(user, cloud, events):
    cloud.set(events=events, start_delay=0.3)
    # So that requests that are made together can be told from those that wait for each other.
    cloud.ask("PUT", "settings", {"latency": 0.05, "bodies": None})
    small(user)
    user.run("flow.py", "run").ok()
    found = round_trips(cloud)
    print("round trips:", found)
    assert found[-1].startswith("DELETE")
    critical = found[:-1]  # the step's end is told before its sandbox is destroyed
    looked = {f"/api/sandbox/{identity}" for identity in cloud.state()["sandboxes"]}
    if not events:
        # Whoever is not told looks: again and again while it starts, often, but not too often.
        looks = [
            e["began"] for e in cloud.journal() if e["method"] == "GET" and e["path"] in looked
        ]
        assert len(looks) <= 2 + 8 * (looks[-1] - looks[0])
        critical = [f for f in critical if not f.startswith("GET")] + ["GET, until it has started"]
    assert len(critical) <= 7


def test_a_step_that_is_silent_for_twenty_minutes_is_not_stopped(user, cloud):
    cloud.set(open_renews=False, speed=1.0)
    small(user, body="""import time, os
            while not os.path.exists("/tmp/go"): time.sleep(0.05)
            self.x = 2""")  # fmt: skip
    process = user.start("flow.py", "run")
    while not any(e["method"] == "WS" for e in cloud.journal()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    (sandbox,) = cloud.living()
    cloud.advance(minutes=20)
    time.sleep(0.5)  # for what keeps the time there to see it
    assert cloud.state()["sandboxes"][sandbox] == "started"
    cloud.ask("POST", f"write/{sandbox}", {"path": "/tmp/go", "content": ""})
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()


@pytest.mark.anyio
async def test_a_lifetime_is_kept_and_can_be_renewed(cloud, monkeypatch):
    for variable, value in cloud.environment.items():
        monkeypatch.setenv(variable, value)
    cloud.set(speed=1.0)
    sandbox = await backends.Daytona().create(SandboxSpec(lifetime=600.0))
    try:
        cloud.advance(minutes=9)
        await sandbox.renew(600.0)
        cloud.advance(minutes=9)
        assert (await sandbox.run(["true"])).exit_code == 0
        cloud.advance(minutes=2)
        assert cloud.wait_until_none_lives()
        with pytest.raises(SandboxGone):
            await sandbox.run(["true"])
    finally:
        await sandbox.destroy()


def test_a_sandbox_that_is_left_alone_is_stopped_and_goes_away(cloud):
    """The control of the one above: the intervals there do what they say."""
    cloud.set(speed=1.0)
    request = {"autoDeleteInterval": 0}  # and 15 minutes until it is stopped, by default
    identity = cloud.call("POST", "sandbox", request)["id"]
    while cloud.state()["sandboxes"][identity] != "started":
        time.sleep(0.05)
    cloud.advance(minutes=20)
    while cloud.living():
        time.sleep(0.05)


def test_a_failing_step_fails_and_says_why(user, cloud):
    small(user, body="import sys; print('about to fail'); sys.exit(17)")
    done = user.run("flow.py", "run")
    assert done.code != 0
    assert "about to fail" in done.output
    assert "Traceback" not in done.output


def test_an_evicted_sandbox_fails_the_attempt_and_says_so(user, cloud):
    small(user, body="import time; print('here', flush=True); time.sleep(600); self.x = 1")
    process = user.start("flow.py", "run")
    while not any(e["method"] == "WS" for e in cloud.journal()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    (sandbox,) = cloud.living()
    cloud.evict(sandbox)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode != 0
    assert "is gone" in output
    assert "evicted" in output


def test_no_line_is_lost_or_shown_twice_when_logs_drop(user, cloud):
    cloud.drop_logs([0, 1011], [300, 1011], [4000, 1012], [9000, 1011])
    small(user, body="""import time
            for i in range(40):
                print("line", i, "x" * 200, flush=True)
                time.sleep(0.01)
            self.x = 1""")  # fmt: skip
    user.run("flow.py", "run").ok()
    lines = user.client('answer = Flow("Small").latest_run["start"].task.stdout.splitlines()')
    assert lines == [f"line {i} {'x' * 200}" for i in range(40)]


MUCH = """import sys
            for i in range(%d):
                sys.stdout.write("%%08d " %% i + "x" * 990 + "\\n")
            self.x = 1"""


LINE = re.compile(rb"\] (\d{8} x{990})$", re.M)


def prints_much(user, cloud, megabytes, settings):
    """A step prints over a line that drops anywhere, again and again, to a slow reader.

    What is shown is looked at, since Metaflow itself stores 10 MB of it.
    """
    cloud.set(**settings)
    small(user, body=MUCH % (megabytes * 1000))
    process = user.start("flow.py", "run", env={"METAFLOW_SANDBOX_MAX_OUTPUT": "200"})
    lines, rest, tail = [], b"", b""
    while piece := process.stdout.read1(1 << 20):
        whole, _, rest = (rest + piece).rpartition(b"\n")
        lines += [int(line[:8]) for line in LINE.findall(whole)]
        tail = tail[-10_000:] + piece
        time.sleep(0.02)
    assert process.wait() == 0, tail.decode(errors="replace")
    assert lines == list(range(megabytes * 1000))
    followed = [e for e in cloud.journal() if e["method"] == "WS"]
    print(f"{len(followed)} connections for {megabytes} MB")
    assert len(followed) > megabytes / 3


def test_no_line_of_much_output_is_lost_though_its_line_drops_anywhere(user, cloud):
    prints_much(user, cloud, 6, {"drop_between": [60_000, 1_500_000]})


@pytest.mark.large
def test_no_line_of_a_hundred_megabytes_is_lost_over_a_slow_line_that_drops(user, cloud):
    prints_much(user, cloud, 100, {"drop_between": [60_000, 6_000_000], "log_rate": 4e6})


# --- what a user can do wrong

BAD = {
    "no key": ({}, {}, {"DAYTONA_API_KEY": ""}, "export DAYTONA_API_KEY="),
    "a wrong key": ({}, {}, {"DAYTONA_API_KEY": "dtn_wrong"}, "refuses the key"),
    "no network": ({}, {}, {"DAYTONA_API_URL": "http://127.0.0.1:9/api"}, "Check the network"),
    "no such snapshot": ({"snapshot": "nope"}, {}, {}, "there is no such snapshot"),
    "a snapshot and a size": ({"snapshot": "nope", "cpu": 1}, {}, {}, "Leave one out"),
    "no such image": ({"image": "no/such:1"}, {}, {}, "could not make a snapshot"),
    "an image without a version": ({"image": "python"}, {}, {}, "name a version"),
    "an image without Python": ({"image": "no-python:1"}, {}, {}, "needs a python3"),
    "a setup that fails": ({"setup": ["echo oops; exit 3"]}, {}, {}, "oops"),
    "too large": ({"cpu": 5}, {}, {}, "4 CPUs at most"),
    "no such region": ({}, {}, {"DAYTONA_TARGET": "moon"}, "is no region"),
    "a suspended organisation": ({}, {"suspended": True}, {}, "suspended"),
    "a tier without it": ({"network": ["example.com"]}, {"restricted": True}, {}, "can't be had"),
    "a long list": (
        {"network": [f"93.184.216.{i}" for i in range(11)]}, {}, {}, "10 addresses",
    ),
    "hosts and addresses": (
        {"network": ["example.com", "93.184.216.34"]}, {}, {}, "not to both",
    ),
    "a key that may not": ({"memory": 2048}, {"may": []}, {}, "permission"),
    "another server": ({}, {}, {"DAYTONA_API_URL": "{base}"}, "with its /api"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_at_the_launch_with_what_to_do(cloud, monkeypatch, name):
    asked, settings, environment, said = BAD[name]
    cloud.set(**settings)
    monkeypatch.setattr(backends, "_TIERS", {})
    for variable, value in {**cloud.environment, **environment}.items():
        monkeypatch.setenv(variable, value.replace("{base}", cloud.base))
    deco = DaytonaDecorator(attributes=asked, statically_defined=True)
    deco.init()
    request = Request.from_decorator(deco, [deco])
    lines = []
    session = Session("Flow", [])
    try:
        with pytest.raises(SandboxError) as refused:
            plain = MetaflowEnvironment(None)
            session.admit("start", request, plain, lambda line, **_: lines.append(line))
    finally:
        session.close()
    assert said in f"{refused.value}" + "\n".join(lines)
    assert cloud.key not in f"{refused.value}"


def test_what_is_wrong_is_said_before_any_step_runs(user):
    small(user, "@daytona(snapshot='nope')", "print('start has run'); self.x = 1")
    done = user.run("flow.py", "run")
    assert done.code != 0
    assert "there is no such snapshot" in done.output
    assert "Traceback" not in done.output
    assert "start has run" not in done.output


#: What only the creation finds out, as the key may not look before: settings, variables, the
#: network, and what is said.
LATE = {
    "no such region": (
        {},
        {"DAYTONA_TARGET": "moon"},
        None,
        "region_unavailable",
        "DAYTONA_TARGET",
    ),
    "a suspended organisation": ({"suspended": True}, {}, None, "suspended", "has suspended"),
    "a key that may not": ({"may": []}, {}, None, "forbidden", "Give it the permission"),
    "a tier without it": ({"restricted": True}, {}, False, "not_enforceable", "Leave it out"),
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", LATE)
async def test_what_the_launch_may_not_see_is_said_by_the_creation(
    cloud, backend, monkeypatch, name
):
    settings, environment, network, code, said = LATE[name]
    monkeypatch.setattr(backends, "_TIERS", {})
    cloud.set(sees_organization=False, **settings)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SandboxError, match=said) as refused:
        await backend.create(SandboxSpec(network=network))
    assert (refused.value.code, refused.value.retryable) == (code, False)
    assert cloud.wait_until_none_lives()


@pytest.mark.anyio
async def test_a_snapshot_without_python_is_told_from_a_step_that_fails(cloud, backend):
    cloud.call("POST", "snapshots", {"name": "bare", "imageName": "no-python:1"})
    await backend.prepare(Recipe(options={"snapshot": "bare"}))
    sandbox = await backend.create(SandboxSpec(options={"snapshot": "bare"}))
    try:
        with pytest.raises(SandboxError, match="has no python3, .*: give an image") as refused:
            await sandbox.run(["python3", "-c", ""])
        assert (refused.value.code, refused.value.retryable) == ("no_python", False)
    finally:
        await sandbox.destroy()


@pytest.mark.anyio
async def test_a_quota_that_is_used_up_is_told_from_a_bad_request(cloud, backend):
    """So that the first is waited for, and the second is not tried again."""
    cloud.set(total_cpu=0)
    with pytest.raises(SandboxError, match="quota at Daytona is used up: .*Total CPU") as quota:
        await backend.create(SandboxSpec())
    assert (quota.value.code, quota.value.retryable) == ("no_place", True)
    cloud.reset()
    cloud.fault("POST /api/sandbox", status=400, body={"message": "labels must be an object"})
    with pytest.raises(SandboxError, match="labels must be an object") as bad:
        await backend.create(SandboxSpec())
    assert bad.value.retryable is False


@pytest.mark.anyio
async def test_a_sandbox_that_does_not_start_is_removed_and_may_be_tried_again(cloud, backend):
    cloud.set(fails_to_start=1)
    with pytest.raises(SandboxError, match="could not start .*the runner has no place") as failed:
        await backend.create(SandboxSpec())
    assert (failed.value.code, failed.value.retryable) == ("start_failed", True)
    assert cloud.wait_until_none_lives()


@pytest.mark.anyio
async def test_a_creation_can_be_cancelled_while_a_rate_limit_is_waited_out(cloud, backend):
    cloud.fault("POST /api/sandbox$", status=429, headers={"Retry-After-sandbox-create": "100"})
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(backend.create, SandboxSpec())
            while not any(e["status"] == 429 for e in cloud.journal()):
                await anyio.sleep(0.05)
            tasks.cancel_scope.cancel()
    assert not cloud.living()


@pytest.mark.anyio
async def test_what_is_made_while_its_creation_is_cancelled_is_removed(cloud, backend):
    before = cloud.state()["requests"].keys()  # another test's may be on its way out
    cloud.fault("POST /api/sandbox$", delay=1.0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(backend.create, SandboxSpec())
        while not any(e["path"] == "/api/sandbox" for e in cloud.journal()):
            await anyio.sleep(0.02)
        tasks.cancel_scope.cancel()
    assert len(cloud.state()["requests"].keys() - before) == 1  # it was made all the same
    assert cloud.wait_until_none_lives()


@pytest.mark.anyio
async def test_a_deletion_that_fails_is_tried_on_and_can_be_asked_for_again(
    cloud, backend, monkeypatch
):
    unavailable = {"status": 503, "body": {"message": "upstream"}}
    sandbox = await backend.create(SandboxSpec())
    cloud.fault("DELETE /api/sandbox/", **unavailable, times=9)
    await sandbox.destroy()
    assert cloud.wait_until_none_lives()
    sandbox = await backend.create(SandboxSpec())
    monkeypatch.setattr(backends, "_DESTROY_SECONDS", 0.0)
    cloud.fault("DELETE /api/sandbox/", **unavailable, times=4)
    with pytest.raises(SandboxError, match="upstream"):
        await sandbox.destroy()
    await sandbox.destroy()
    assert cloud.wait_until_none_lives()


def test_a_sandbox_that_can_not_be_ended_is_named_at_the_end_of_the_run(user, cloud):
    cloud.fault("DELETE /api/sandbox/", status=503, body={"message": "upstream"}, times=-1)
    small(user)
    output = user.run("flow.py", "run").ok().output
    (left,) = cloud.living()
    assert f"daytona, {left}, could not be ended, and may live for 60 minutes" in output
    assert f"metaflow-sandbox kill {left}" in output
    cloud.ask("DELETE", "faults")  # the run's supervisor goes on trying
    assert cloud.wait_until_none_lives(60)
    user.assert_nothing_left(60)


#: What a creation meets that is made a while after its sender was told, or has given up.
LATE_CREATIONS = {"no answer": {"lose": True}, "a gateway's": {"status": 504, "body": "<html>"}}


@pytest.mark.anyio
@pytest.mark.parametrize("name", LATE_CREATIONS)
async def test_a_creation_that_comes_after_its_answer_was_lost_is_ended(cloud, backend, name):
    cloud.fault("POST /api/sandbox$", **LATE_CREATIONS[name], after=3.0)
    with pytest.raises(SandboxError) as raised:
        await backend.create(SandboxSpec())
    assert raised.value.retryable is True
    assert cloud.wait_until_none_lives()
    ended = [(e["method"], e["status"]) for e in cloud.journal()]
    assert ("DELETE", 404) in ended and ("DELETE", 200) in ended  # it had to be waited for


async def pieces(number):
    for i in range(number):
        yield b"%07d\n" % i * (1 << 17)


@pytest.mark.anyio
async def test_a_rate_limit_in_the_middle_of_files_loses_nothing_of_them(cloud, backend):
    limit = {"status": 429, "headers": {"Retry-After-toolbox": "0.1"}}
    sandbox = await backend.create(SandboxSpec())
    try:
        path, whole = f"{backend.work}/file", b"".join([piece async for piece in pieces(8)])
        cloud.fault("POST .*/bulk-upload", **limit)
        with pytest.raises(ConnectionLost):  # what was sent of it isn't there again
            await sandbox.write(path, pieces(8))
        await sandbox.write(path, pieces(8))
        cloud.fault("GET .*/files/download", **limit)
        assert b"".join([piece async for piece in sandbox.read(path)]) == whole
        cloud.fault("GET .*/files/download", reset_download=3_000_000)
        with pytest.raises(ConnectionLost):
            [_ async for _ in sandbox.read(path)]
    finally:
        await sandbox.destroy()


@pytest.mark.anyio
async def test_everything_goes_by_the_proxy_that_is_set(cloud, backend, monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "ws_proxy"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("DAYTONA_API_URL", f"http://daytona.invalid:{cloud.port}/api")
    cloud.set(toolbox_host="daytona.invalid")
    with Proxy(cloud.port) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        sandbox = await backend.create(SandboxSpec())
        try:
            with anyio.fail_after(60):
                assert (await sandbox.run(["echo", "through"])).stdout == b"through\n"
        finally:
            await sandbox.destroy()
        assert proxy.upgrades


def test_a_tier_that_is_found_out_late_leaves_nothing(user, cloud):
    cloud.set(restricted=True, sees_organization=False)
    small(user, "@daytona(network=False)")
    done = user.run("flow.py", "run")
    assert done.code != 0
    assert "your tier does not have it" in done.output


def test_a_step_has_what_it_asks_for_in_whole_units_and_setup_is_done_once(user, cloud):
    small(
        user, "@daytona(cpu=1.5, memory=1500, setup=['echo prepared > /opt/note'])",
        "self.x = open('/opt/note').read()",
    )  # fmt: skip
    first = user.run("flow.py", "run").ok()
    assert "cpu=1.5 is 2, memory=1500 MB is 2 GB" in first.output
    assert "making a snapshot of python:" in first.output
    builds = cloud.state()["builds"]
    second = user.run("flow.py", "run").ok()
    assert "making a snapshot" not in second.output
    assert cloud.state()["builds"] == builds
    sizes = user.client('answer = Flow("Small").latest_run["start"].task.metadata_dict')
    assert sizes["sandbox-limits"].startswith("2 CPUs, 2 GB of memory")


@pytest.mark.anyio
async def test_an_installation_is_done_once_and_found_by_launchers_that_come_together(
    cloud, monkeypatch, tmp_path
):
    for variable, value in cloud.environment.items():
        monkeypatch.setenv(variable, value)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a").write_text("a wheel")
    (tmp_path / "script").write_text("mkdir -p /env && cp -r /in/wheels /env && echo installed")
    recipe = Recipe(
        "python:3.12-slim", ("echo base > /opt/base",),
        {"/in/wheels": tmp_path / "wheels", "/in/script": tmp_path / "script"},
        ("sh", "/in/script"), "/env",
    )  # fmt: skip
    lines, prepared = [], []

    async def say(line):
        lines.append(line)

    async def prepare():
        prepared.append(await backends.Daytona().prepare(recipe, say))

    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            tasks.start_soon(prepare)
    assert prepared[0] == prepared[1]
    assert lines.count("installed") == 1
    assert any("waiting for" in line for line in lines)
    backend = backends.Daytona()
    sandbox = await backend.create(SandboxSpec(image=prepared[0].image))
    try:
        script = "cat /env/wheels/a /opt/base; ls -d /in/wheels /in/script; ls $PWD"
        done = await sandbox.run(["sh", "-c", script])
        assert done.stdout == b"a wheelbase\n"
    finally:
        await sandbox.destroy()


@pytest.mark.anyio
async def test_other_packages_are_installed_on_the_same_snapshot(cloud, backend, tmp_path):
    (tmp_path / "script").write_text("true")
    where = f"{backend.work}/in"
    plain = Recipe(setup=(f"echo {tmp_path.name}",))
    lock = replace(plain, files={where: tmp_path}, install=("sh", f"{where}/script"), prefix="/env")
    before = cloud.state()["builds"]
    recipes = (plain, replace(lock, contents="one lock"), replace(lock, contents="another"))
    names = {(await backend.prepare(recipe)).image for recipe in recipes}
    assert (len(names), cloud.state()["builds"] - before) == (3, 1)


@pytest.mark.anyio
async def test_an_installation_needs_no_more_than_a_restricted_tier_has(
    cloud, backend, monkeypatch, tmp_path
):
    monkeypatch.setattr(backends, "_TIERS", {})
    cloud.set(restricted=True, sees_organization=False)
    (tmp_path / "script").write_text("true")
    where = f"{backend.work}/in"
    recipe = Recipe(files={where: tmp_path}, install=("sh", f"{where}/script"), prefix="/env")
    assert (await backend.prepare(recipe)).image
    assert cloud.wait_until_none_lives()


@pytest.mark.anyio
async def test_who_waits_for_a_build_is_told_where_it_is_and_for_how_long_it_may_be(
    cloud, backend, tmp_path
):
    (tmp_path / "script").write_text(f"sleep 5; echo {tmp_path.name}")
    where = f"{backend.work}/in"
    recipe = Recipe(files={where: tmp_path}, install=("sh", f"{where}/script"), prefix="/env")
    lines = []

    async def say(line):
        lines.append(line)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(backend.prepare, recipe)
        while not cloud.living():
            await anyio.sleep(0.05)
        (builder,) = cloud.living()
        assert cloud.state()["requests"][builder]["ttlMinutes"] == 15  # and it is renewed
        with anyio.move_on_after(2):
            await backends.Daytona().prepare(recipe, say)
    (line,) = lines
    assert f"metaflow-sandbox kill {builder}" in line


def test_a_foreach_meets_a_rate_limit_and_latency_without_an_error(user, cloud):
    foreach(user, cloud, 8)


@pytest.mark.large
def test_a_foreach_of_a_hundred_meets_a_rate_limit_and_latency_without_an_error(user, cloud):
    foreach(user, cloud, 100)


def foreach(user, cloud, width):
    user.seconds = max(user.seconds, width * 30)
    cloud.set(create_rate=2, rate_window=1.0)
    cloud.ask("PUT", "settings", {"latency": 0.05, "bodies": None})
    user.write("flow.py", FOREACH)
    settings = {
        "METAFLOW_SANDBOX_PER_SECOND": "daytona=50",
        "METAFLOW_SANDBOX_CONCURRENT": "daytona=8",
    }
    run = ["run", "--max-workers", "8", "--max-num-splits", "1000", "--width", str(width)]
    done = user.run("flow.py", *run, env=settings).ok()
    assert f"SUM {sum(range(width))}" in done.output
    refused = [e for e in cloud.journal() if e["status"] == 429]
    assert refused, "the rate limit was never met"
    created = [e for e in cloud.journal() if (e["method"], e["path"]) == ("POST", "/api/sandbox")]
    assert len(created) - len(refused) == width


TRANSFER = """
import hashlib, resource, sys
import anyio
from metaflow_sandbox.backends.base import SandboxSpec
from metaflow_sandbox.backends.daytona import Daytona

PIECE = bytes(range(256)) * 4096

async def main(megabytes):
    sandbox = await Daytona().create(SandboxSpec())
    try:
        path = sandbox.backend.work + "/big"
        await sandbox.write_bytes(path, PIECE)  # everything is loaded
        [_ async for _ in sandbox.read(path)]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        async def pieces():
            for _ in range(megabytes):
                yield PIECE

        await sandbox.write(path, pieces())
        digest, size = hashlib.sha256(), 0
        async for piece in sandbox.read(path):
            digest.update(piece)
            size += len(piece)
        expected = hashlib.sha256()
        for _ in range(megabytes):
            expected.update(PIECE)
        assert (size, digest.digest()) == (megabytes << 20, expected.digest())
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    finally:
        await sandbox.destroy()

anyio.run(main, int(sys.argv[1]))
"""


def transfer(cloud, megabytes):
    """Up and down again. Returns by how many KB the memory of the process grew."""
    done = subprocess.run(
        [sys.executable, "-c", TRANSFER, str(megabytes)],
        env={**os.environ, **cloud.environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_large_file_goes_up_and_down_with_flat_memory(cloud):
    assert transfer(cloud, 128) < 32 << 10


@pytest.mark.large
def test_a_gigabyte_goes_up_and_down_with_flat_memory(cloud):
    grown = transfer(cloud, 1024)
    print(f"the peak of memory grew by {grown} KB")
    assert grown < 32 << 10


FOREACH = """
    from metaflow import FlowSpec, Parameter, daytona, step

    class Wide(FlowSpec):
        width = Parameter("width", type=int)

        @step
        def start(self):
            self.items = list(range(self.width))
            self.next(self.work, foreach="items")

        @daytona
        @step
        def work(self):
            self.y = self.input
            self.next(self.join)

        @step
        def join(self, inputs):
            print("SUM", sum(i.y for i in inputs))
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Wide()
"""
