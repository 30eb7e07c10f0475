"""E2B's backend keeps the contract, by the real SDK against an emulated service."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import anyio
import pytest

if sys.version_info < (3, 11):
    pytest.skip("NOT RUN: E2B's SDK needs Python 3.11", allow_module_level=True)

import e2b

from emulators import flooded
from emulators.e2b.server import KEY
from emulators.e2b.specification import FILE, NEWER, Specification
from metaflow_sandbox.backends import e2b as backends
from metaflow_sandbox.backends.base import Recipe, SandboxSpec
from metaflow_sandbox.backends.e2b import E2B
from metaflow_sandbox.backends.e2b.sandbox import E2BSandbox
from metaflow_sandbox.errors import ConnectionLost, SandboxError, SandboxGone
from metaflow_sandbox.testing import BackendContract

START = "POST /process.Process/Start"


@pytest.fixture(autouse=True)
def account(e2b_service, monkeypatch):
    for name, value in e2b_service.environment.items():
        monkeypatch.setenv(name, value)
    e2b_service.reset()
    return e2b_service


@pytest.mark.sample(0.5)
class TestE2B(BackendContract):
    cpu = 1  # it gives whole ones

    @pytest.fixture
    def backend(self):
        return E2B()


#: Sends MB there and back, and prints the seconds of each and the peak of its own memory in MB.
TRANSFER = """
import hashlib, json, random, resource, sys, time
import anyio
from metaflow_sandbox.backends.base import SandboxSpec
from metaflow_sandbox.backends.e2b import E2B

PIECE = random.randbytes(1 << 20)

async def pieces():
    for _ in range(int(sys.argv[1])):
        yield PIECE

async def main():
    sandbox = await E2B().create(SandboxSpec(network=False))
    try:
        await sandbox.write_bytes("/home/user/big", PIECE)  # what it takes once
        async for data in sandbox.read("/home/user/big"):
            pass
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.monotonic()
        await sandbox.write("/home/user/big", pieces())
        up = time.monotonic()
        size, digest, expected = 0, hashlib.sha256(), hashlib.sha256()
        async for data in sandbox.read("/home/user/big"):
            size += len(data)
            digest.update(data)
        down = time.monotonic()
    finally:
        await sandbox.destroy()
    async for data in pieces():
        expected.update(data)
    assert (size, digest.digest()) == (int(sys.argv[1]) << 20, expected.digest())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([up - began, down - up, peak >> 10, (peak - before) >> 10]))

anyio.run(main)
"""


@pytest.mark.parametrize("megabytes", [96, pytest.param(1024, marks=pytest.mark.large)])
def test_files_of_any_size_stream_and_memory_stays_flat(account, megabytes):
    done = subprocess.run(
        [sys.executable, "-c", TRANSFER, str(megabytes)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    up, down, peak, grown = json.loads(done.stdout)
    print(f"{megabytes} MB up in {up:.1f} s, down in {down:.1f} s; peak {peak} MB, {grown} MB more")
    assert grown < 32


STREAM = {"content-type": "application/connect+json"}
FLOODS = {
    "a file's error": ("read", "GET /files", {"status": 500}, "ConnectionLost"),
    "what a file is": ("read", "Stat", {"headers": {"content-type": "application/json"}},
                       "SandboxError"),
    "an upload's answer": ("write", "POST /files", {}, "SandboxError"),
    "a piece of output": ("run", START, {"headers": STREAM}, "ProtocolError"),
    "a command's error": ("run", START, {"status": 500, "headers": STREAM}, "SandboxError"),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOODS)
def test_a_daemon_that_was_taken_over_can_not_fill_the_launchers_memory(account, name):
    action, match, fault, error = FLOODS[name]
    raised, grown = flooded.meet("e2b", action, lambda: account.fault(match, flood=200, **fault))
    assert raised == error
    assert grown < 50


#: What becomes of a fault on the way: (request, fault, what is done, error).
FAULTS = [
    (START, {"status": 429, "body": {"code": "resource_exhausted", "message": "slow"}}, "run",
     SandboxError),
    (START, {"status": 502, "body": {"code": 502, "message": "The sandbox was not found"}}, "run",
     SandboxGone),
    (START, {"status": 502, "body": {"code": 502, "message": "the port is not open"}}, "run",
     ConnectionLost),
    (START, {"lose": True}, "run", ConnectionLost),
    (START, {"reset_download": 30}, "run", ConnectionLost),
    (START, {"stall": 0}, "run", ConnectionLost),
    (START, {"stall": 120}, "run", ConnectionLost),
    ("POST /files", {"reset_upload": 1}, "write", ConnectionLost),
    ("POST /files", {"lose": True}, "write", ConnectionLost),
    ("POST /files", {"stall": 0}, "write", ConnectionLost),
    ("POST /files", {"status": 507, "body": {"code": 507, "message": "not enough disk space"}},
     "write", OSError),
    ("POST /files", {"status": 429, "body": {"code": 429, "message": "slow"}}, "write",
     SandboxError),
    ("GET /files", {"reset_download": 1000}, "read", ConnectionLost),
    ("GET /files", {"cut_download": 1000}, "read", ConnectionLost),
    ("GET /files", {"stall": 1000}, "read", ConnectionLost),
    ("POST /filesystem", {"lose": True}, "read", ConnectionLost),
    ("/timeout", {"status": 500, "body": {"code": 500, "message": "sorry"}}, "renew", SandboxError),
    ("/timeout", {"status": 500, "body": {"error": {"message": "a gateway's"}}}, "renew",
     SandboxError),
    ("/timeout", {"status": 404, "body": "<html>nothing is here</html>"}, "renew", SandboxError),
    ("/timeout", {"lose": True}, "renew", ConnectionLost),
]  # fmt: skip


@pytest.mark.parametrize(("match", "fault", "action", "error"), FAULTS)
def test_a_fault_is_an_error_of_its_class_and_the_sandbox_can_be_destroyed(
    account, monkeypatch, match, fault, action, error
):
    monkeypatch.setattr(E2BSandbox, "quiet_seconds", 3.0)
    monkeypatch.setattr(E2BSandbox, "idle_seconds", 3.0)

    async def meet():
        sandbox = await E2B().create(SandboxSpec())
        actions = {
            "run": lambda: sandbox.run(["sh", "-c", "echo out; sleep 1; echo more"]),
            "write": lambda: sandbox.write_bytes("/home/user/x", b"x" * 1000),
            "read": lambda: sandbox.read_bytes("/home/user/big", 1 << 20),
            "renew": lambda: sandbox.renew(60),
        }
        try:
            await sandbox.write_bytes("/home/user/big", b"x" * 100_000)
            account.fault(match, **fault)
            with anyio.fail_after(60), pytest.raises(error) as raised:
                await actions[action]()
            if isinstance(raised.value, SandboxError):
                assert raised.value.code and raised.value.op == action.replace("run", "exec")
            await actions[action]()  # it was the way that failed
        finally:
            await sandbox.destroy()
        assert account.ask("GET", "faults")[0]["times"] == 0

    anyio.run(meet)
    assert account.cloud()["sandboxes"] == {}


def test_a_reader_that_takes_its_time_loses_nothing(account, monkeypatch):
    monkeypatch.setattr(E2BSandbox, "quiet_seconds", 1.5)
    taken = []

    async def slowly(data):
        await anyio.sleep(0 if taken else 5)
        taken.append(data)

    async def follow():
        sandbox = await E2B().create(SandboxSpec())
        try:
            command = "for i in 1 2 3 4; do echo $i; sleep 0.3; done"
            assert await sandbox.exec(["sh", "-c", command], on_stdout=slowly) == 0
        finally:
            await sandbox.destroy()

    anyio.run(follow)
    assert b"".join(taken) == b"1\n2\n3\n4\n"


CREATION = [
    ({"status": 401, "body": {"code": 401, "message": "no"}}, "backend_unavailable", None),
    ({"status": 403, "body": {"code": 403, "message": "no"}}, "backend_unavailable", None),
    ({"status": 429, "body": {"code": 429, "message": "slow"}}, "no_place", True),
    ({"status": 429, "body": {"code": 429, "message": "concurrent"}}, "no_place", True),
    ({"status": 503, "body": {"code": 503, "message": "no room"}}, "busy", True),
    ({"status": 500, "body": {"code": 500, "message": "sorry"}}, "provider_failed", True),
    ({"status": 400, "body": {"code": 400, "message": "no"}}, "refused", False),
    ({"lose": True}, "create_failed", True),
    ({"instead": 504, "body": "<html>upstream request timeout</html>"}, "provider_failed", True),
    ({"instead": 504, "body": {"error": {"status": 504}}}, "provider_failed", True),
]


@pytest.mark.parametrize(("fault", "code", "retryable"), CREATION)
def test_a_creation_that_fails_leaves_nothing_and_says_whether_to_try_again(
    account, monkeypatch, fault, code, retryable
):
    monkeypatch.setattr(backends, "_LATE_SECONDS", 1.0)
    account.fault("POST /v2/sandboxes", times=-1, **fault)

    async def make():
        with pytest.raises(SandboxError) as raised:
            await E2B().create(SandboxSpec())
        assert (raised.value.code, raised.value.retryable) == (code, retryable)

    anyio.run(make)
    assert account.cloud()["sandboxes"] == {}


@pytest.mark.parametrize("fault", [{"lose": True}, {"instead": 504, "body": "<html></html>"}])
def test_an_answer_that_got_lost_is_asked_for_again_and_makes_one_sandbox(account, fault):
    account.fault("POST /v2/sandboxes", **fault)

    async def make():
        sandbox = await E2B().create(SandboxSpec())
        assert list(account.cloud()["sandboxes"]) == [sandbox.id]
        await sandbox.destroy()

    anyio.run(make)


def test_a_creation_whose_first_answer_got_lost_and_that_is_refused_then_leaves_nothing(account):
    account.fault("POST /v2/sandboxes", lose=True)
    account.fault("POST /v2/sandboxes", status=403, body={"code": 403, "message": "no more"})

    async def make():
        with pytest.raises(SandboxError, match="no more"):
            await E2B().create(SandboxSpec())

    anyio.run(make)
    assert account.living() == []


def test_a_creation_whose_answers_are_lost_and_that_comes_late_leaves_nothing(account, monkeypatch):
    account.cloud(boot=4)
    monkeypatch.setattr(backends, "_CREATIONS", 1)
    monkeypatch.setattr(backends, "_REQUEST_SECONDS", 1.0)

    async def make():
        with pytest.raises(SandboxError, match="Try again later"):
            await E2B().create(SandboxSpec())

    anyio.run(make)
    assert account.living() == []
    time.sleep(5)
    assert account.living() == []


def test_a_creation_that_is_cancelled_before_its_answer_leaves_nothing(account):
    account.fault("POST /v2/sandboxes", delay=1.5)

    async def make():
        with anyio.move_on_after(0.5) as scope:
            await E2B().create(SandboxSpec())
        assert scope.cancelled_caught

    anyio.run(make)
    assert ("POST", "/v2/sandboxes") in [(e["method"], e["path"]) for e in account.journal()]
    assert account.living() == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_sandbox_is_ended_though_the_first_answers_are_that_it_can_not_be(account, status):
    body = {"code": status, "message": "not now"}

    async def end():
        sandbox = await E2B().create(SandboxSpec())
        account.fault("DELETE /sandboxes", status=status, body=body, times=5)
        await sandbox.destroy()

    anyio.run(end)
    assert account.living() == []


def test_an_image_whose_python_has_another_name_can_be_used_by_it(account):
    recipe = Recipe("busybox:1", python="/run/python3")  # the emulator's own

    async def use():
        prepared = await E2B().prepare(recipe)
        sandbox = await E2B().create(SandboxSpec(image=prepared.image, python=recipe.python))
        try:
            return await sandbox.run(["echo", "well"])
        finally:
            await sandbox.destroy()

    assert anyio.run(use).stdout == b"well\n"
    with pytest.raises(SandboxError, match="it has no python3, 3.8 or later") as raised:
        anyio.run(E2B().prepare, Recipe("busybox:1"))
    assert raised.value.code == "no_python"


def test_a_launch_waits_for_a_place_when_others_have_all_of_them(account):
    said = []

    async def say(line):
        said.append(line)

    async def launch():
        account.cloud(concurrent=1)
        other = await E2B().create(SandboxSpec())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(E2B().prepare, Recipe(options={"template": "base"}), say)
            while not said:
                await anyio.sleep(0.1)
            await other.destroy()

    anyio.run(launch)
    (line,) = said
    assert "METAFLOW_SANDBOX_CONCURRENT=e2b=…" in line
    assert account.living() == []


def test_a_connection_that_drops_while_a_template_is_looked_at_is_not_taken_for_want_of_python(
    account,
):
    account.fault(START, lose=True)
    with pytest.raises(ConnectionLost):
        anyio.run(E2B().prepare, Recipe(options={"template": "base"}))
    assert account.living() == []


def test_a_sandbox_is_asked_for_with_its_network_and_without_variables(account):
    listed = {"allowOut": ["a.com", "*.b.com"], "denyOut": ["0.0.0.0/0"]}
    asked = {
        True: {},
        False: {"allow_internet_access": False},
        ("a.com", "*.b.com"): {"network": listed},
    }

    async def look(network):
        sandbox = await E2B().create(SandboxSpec(network=network, lifetime=77))
        request = account.cloud()["sandboxes"][sandbox.id]["request"]
        await sandbox.destroy()
        return request

    for network, expected in asked.items():
        request = anyio.run(look, network)
        assert (request["timeout"], request["envVars"]) == (77, {})
        found = {k: request[k] for k in ("network", "allow_internet_access") if k in request}
        assert found == expected


def test_a_renewal_lets_a_sandbox_live_longer(account):
    async def outlive():
        sandbox = await E2B().create(SandboxSpec(lifetime=3))
        await sandbox.renew(120)
        await anyio.sleep(4)
        assert (await sandbox.run(["true"])).exit_code == 0
        await sandbox.destroy()

    anyio.run(outlive)


def test_launchers_that_need_the_same_template_build_it_once(account):
    recipe = Recipe("python:3.11", ("echo once",), cpu=1.0)
    account.cloud(build=0.5)
    said = []

    async def say(line):
        said.append(line)

    async def both():
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(E2B().prepare, recipe, say)

    anyio.run(both)
    assert sum("builds a template" in line for line in said) == 1
    assert "once" in said


def test_a_build_that_failed_is_not_found_as_a_template(account):
    recipe = Recipe("python:3.11", ("exit 3",))
    for _ in range(2):
        with pytest.raises(SandboxError, match="exit status 3") as raised:
            anyio.run(E2B().prepare, recipe)
        assert raised.value.code == "build_failed"


def test_files_and_an_installation_are_baked_into_a_template(account, tmp_path):
    (tmp_path / "wheels/sub").mkdir(parents=True)
    (tmp_path / "wheels/sub/a.whl").write_text("a wheel")
    (tmp_path / "script").write_text("mkdir -p /opt/env; cp /in/wheels/sub/a.whl /opt/env/a")
    recipe = Recipe(
        files={"/in/wheels": tmp_path / "wheels", "/in/script": tmp_path / "script"},
        install=("sh", "/in/script"),
        prefix="/opt/env",
    )

    async def use():
        prepared = await E2B().prepare(recipe)
        sandbox = await E2B().create(SandboxSpec(image=prepared.image))
        try:
            return await sandbox.run(["sh", "-c", "cat /opt/env/a; ls -A /in"])
        finally:
            await sandbox.destroy()

    assert anyio.run(use).stdout == b"a wheel"


#: All that the adapter asks the service for. The installed SDK has these, and `Asked` holds the
#: emulator's answers to the specification. The daemon's RPC is on the SDK's own stubs.
REQUESTS = {
    ("GET", "/v2/sandboxes"), ("POST", "/v2/sandboxes"), ("DELETE", "/sandboxes/*"),
    ("POST", "/sandboxes/*/timeout"), ("GET", "/templates/aliases/*"), ("POST", "/v3/templates"),
    ("GET", "/templates/*/files/*"), ("POST", "/v2/templates/*/builds/*"),
    ("GET", "/templates/*/builds/*/status"),
}  # fmt: skip
OF_THE_DAEMON = {
    ("POST", "/files"), ("GET", "/files"), ("GET", "/health"), ("POST", "/process.Process/Start"),
    ("POST", "/filesystem.Filesystem/Stat"),
}  # fmt: skip
OF_ITS_STORAGE = {("PUT", "/_upload/*")}


def bare(path):
    """A path without what names one thing."""
    path = re.sub(r"/(i[a-z0-9]{19}|[0-9a-f]{64})(?=/|$)", "/*", path.partition("?")[0])
    return re.sub(r"(?<=/aliases/).*|(?<=/files/)\w+", "*", path)


def test_every_request_of_the_adapter_is_one_that_the_sdk_has_and_that_is_held(
    account, monkeypatch, tmp_path
):
    (tmp_path / "wheel").write_text("a wheel")
    monkeypatch.setattr(E2BSandbox, "quiet_seconds", 2.0)

    async def everything():
        backend = E2B()
        await backend.preflight()
        recipe = Recipe("python:3.11", ("true",), {"/in": tmp_path}, ("true",), "/opt/x", cpu=1.0)
        prepared = await backend.prepare(recipe)
        with pytest.raises(SandboxError):
            await backend.prepare(Recipe("python:3.11", ("false",)))
        sandbox = await backend.create(SandboxSpec({"a": "b"}, image=prepared.image))
        await sandbox.write_bytes("/home/user/x", b"x")
        assert await sandbox.read_bytes("/home/user/x", 1) == b"x"
        assert (await sandbox.run(["true"])).exit_code == 0
        with pytest.raises(TimeoutError):
            await sandbox.run(["sleep", "60"], timeout=0.5)
        account.fault(START, stall=120)
        with pytest.raises(ConnectionLost):  # which looks whether it lives
            await sandbox.run(["sleep", "60"])
        await sandbox.renew(100)
        assert [info.id for info in await backend.list({"a": "b"})] == [sandbox.id]
        await sandbox.destroy()

    anyio.run(everything)
    asked = {(e["method"], bare(e["path"])) for e in account.journal()}
    asked = {request for request in asked if not request[1].startswith("/_test")}
    assert asked == REQUESTS | OF_THE_DAEMON | OF_ITS_STORAGE
    assert REQUESTS <= routes_of_the_sdk()
    assert REQUESTS <= Asked(account).requests


def routes_of_the_sdk():
    found = set()
    for path in Path(e2b.__file__).parent.glob("api/client/api/**/*.py"):
        for method, url in re.findall(r'"method": "(\w+)",\s+"url": f?"([^"]+)"', path.read_text()):
            found.add((method.upper(), re.sub(r"\{\w+\}", "*", url)))
    return found


class Asked:
    """The emulator's answers to requests of every kind, held to the specification if it is here.

    Attributes:
        requests: what was asked.
        wrong: {request: what is wrong with its answer}.
        unspecified: what the specification hasn't.
    """

    def __init__(self, account):
        self.account = account
        self.specification = Specification() if FILE.exists() else None
        self.requests, self.wrong, self.unspecified = set(), {}, set()
        box = f"/sandboxes/{self.ask('POST', '/v2/sandboxes', {'templateID': 'base'})['sandboxID']}"
        self.ask("GET", "/v2/sandboxes")
        self.ask("GET", "/v2/sandboxes", key="wrong")
        self.ask("GET", box)
        self.ask("GET", "/sandboxes/inothing")
        self.ask("POST", f"{box}/timeout", {"timeout": 60})
        self.ask("POST", f"/v2{box}/connect", {"timeout": 60})
        self.ask("POST", f"{box}/connect", {"timeout": 60})
        self.ask("GET", f"{box}/metrics")
        self.ask("POST", f"{box}/pause", {})
        self.ask("POST", f"{box}/pause", {})
        self.ask("DELETE", box)
        self.ask("DELETE", box)
        self.ask("GET", "/templates/aliases/base")
        self.ask("GET", "/templates/aliases/nothing")
        size = {"cpuCount": 1, "memoryMB": 512}
        made = self.ask("POST", "/v3/templates", {"name": "specified", **size})
        self.ask("POST", "/v3/templates", {"name": "specified", "cpuCount": 99})
        build = f"/templates/{made['templateID']}/builds/{made['buildID']}"
        self.ask("GET", f"/templates/{made['templateID']}/files/abc")
        self.ask("POST", f"/v2{build}", {"fromImage": "debian:12", "steps": []})
        self.ask("GET", f"{build}/status")
        failing = self.ask("POST", "/v3/templates", {"name": "specified", **size})
        build = f"/templates/{failing['templateID']}/builds/{failing['buildID']}"
        self.ask("POST", f"/v2{build}", {"fromImage": "no/such", "steps": []})
        while self.ask("GET", f"{build}/status")["status"] == "building":
            pass
        self.ask("DELETE", f"/templates/{made['templateID']}")

    def ask(self, method, path, body=None, key=KEY):
        data = None if body is None else json.dumps(body).encode()
        headers = {"X-API-KEY": key, "Content-Type": "application/json"}
        request = urllib.request.Request(self.account.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request) as response:
                status, content = response.status, response.read()
        except urllib.error.HTTPError as e:
            status, content = e.code, e.read()
        answer = json.loads(content) if content else None
        self.requests.add((method, bare(path)))
        if self.specification is not None:
            found = self.specification.problems(method.lower(), path, status, answer)
            if found is None:
                kind = re.sub(r"/i[a-z0-9]{19}", "/{sandboxID}", path)
                self.unspecified.add((method.lower(), kind))
            elif found:
                self.wrong[method, path, status] = found
        return answer


def test_the_emulators_answers_are_those_of_the_specification(account):
    if not FILE.exists():
        pytest.skip("NOT CHECKED against E2B's specification: set PROVIDER_SPECS to its folder")
    asked = Asked(account)
    assert asked.wrong == {}
    assert asked.unspecified <= NEWER


PREPARING = """
import anyio
from metaflow_sandbox.backends.base import Recipe, SandboxSpec
from metaflow_sandbox.backends.e2b import E2B

async def main():
    backend = E2B()
    prepared = await backend.prepare(Recipe("python:3.11", ("true", "true", "true"), cpu=1.0))
    sandbox = await backend.create(SandboxSpec(image=prepared.image))
    await sandbox.destroy()

anyio.run(main)
"""


def test_a_build_that_is_given_up_takes_nothing_from_another_machines_of_the_same_name(
    account, tmp_path
):
    account.cloud(build=1.0)
    builds = []
    for name in ("one", "other"):  # nothing on this machine tells one of the other
        (tmp_path / name).mkdir()
        environment = {**os.environ, "TMPDIR": str(tmp_path / name)}
        builds.append(
            subprocess.Popen(
                [sys.executable, "-c", PREPARING], env=environment, stderr=subprocess.PIPE
            )
        )

    def requested():
        return sum((e["method"], e["path"]) == ("POST", "/v3/templates") for e in account.journal())

    while requested() < 2 and all(process.poll() is None for process in builds):
        time.sleep(0.1)
    builds[1].send_signal(signal.SIGINT)
    _, problem = builds[0].communicate(timeout=120)
    assert builds[0].returncode == 0, problem.decode()
    builds[1].communicate(timeout=120)
    assert account.wait_until_none_lives()
