"""Attacks from inside a container, as its root: those on bubblewrap's sandboxes, and its own.

That each of the first succeeds without a sandbox is shown by `test_isolation.py`.
"""

import ast
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio
import engines
import probes
import pytest
import test_isolation

from metaflow_sandbox.backends.base import Recipe, SandboxSpec
from metaflow_sandbox.backends.docker import Docker
from metaflow_sandbox.errors import SandboxGone

#: What succeeds in a container, and why that is no attack there. Any other success is one.
ITS_OWN = {
    "list the user's real home": "the image has a /root, too",
    "read /etc/shadow": "the image's",
    "learn the host's users": "the image's have the same names",
    "read /etc/resolv.conf": "a file that names no resolver",
    "write to /dev": "a tmpfs of the container's own, within its memory",
    "look at fd of what holds the sandbox": "their numbers; what they are is hidden",
    "look at fd of the first process": "their numbers; what they are is hidden",
    "list /sys": "read-only",
    "become root": "of the container, with what dpkg needs and no more",
    "hold capabilities": "those",
}
#: What takes longer than a container; the attacks by which one is looked at share it.
some = pytest.mark.sample(0.3)
CAPABILITIES = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 31


def attack_all():
    """{attack: what came of it} of all attacks, in one container of the engine in force."""
    surroundings = test_isolation.Surroundings()
    try:
        names = surroundings.names
        commands = {a.name: a.command(names, inside=True) for a in probes.ATTACKS}
        (names["shared"] / "inside.json").write_text(json.dumps(commands))

        async def attack():
            mounts = {"/inbox": names["shared"]}
            spec = SandboxSpec(
                mounts=mounts, disk=64, memory=512, network=False, image=engines.IMAGE
            )
            sandbox = await Docker().create(spec)
            try:
                script = ["python3", "-I", "-S", "/inbox/probes.py"]
                done = await sandbox.run([*script, "--batch", "/inbox/inside.json"], timeout=300)
                assert done.exit_code == 0, done
                return json.loads(done.stdout)
            finally:
                await sandbox.destroy()

        return anyio.run(attack)
    finally:
        surroundings.close()


@pytest.fixture(scope="module")
def outcomes(dockerd):
    if os.getuid() != 0:
        pytest.skip("NOT CHECKED as an ordinary user, only as root: the engine is the same")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", dockerd.host)
        return attack_all()


@pytest.mark.parametrize("attack", [pytest.param(a, id=a.name) for a in probes.ATTACKS])
def test_the_attack_fails_in_a_container(outcomes, attack):
    expected = ("reached",) if attack.name in ITS_OWN else ("blocked", "killed")
    assert outcomes[attack.name].startswith(expected)


@pytest.mark.sample(0.1)
@pytest.mark.skipif(os.getuid() != 0, reason="NOT CHECKED as an ordinary user: needs root's files")
def test_the_attacks_fail_in_a_container_of_podmans(podman):
    reached = {name for name, came in attack_all().items() if came.startswith("reached")}
    assert reached - set(ITS_OWN) == set()


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
async def sandbox(docker):
    spec = SandboxSpec(disk=64, memory=512, network=True, image=engines.IMAGE)
    sandbox = await Docker().create(spec)
    yield sandbox
    await sandbox.destroy()


async def python(sandbox, script):
    done = await sandbox.run(["python3", "-c", script], timeout=120)
    return done.stdout.decode().strip() or done


@pytest.mark.anyio
async def test_root_inside_has_the_capabilities_of_dpkg_and_no_new_privileges(sandbox):
    status = dict(
        line.split(":\t") for line in (await python(
            sandbox, "print(open('/proc/self/status').read())"
        )).splitlines() if ":\t" in line
    )  # fmt: skip
    assert {int(status[f"Cap{kind}"], 16) for kind in ("Prm", "Eff", "Bnd")} == {CAPABILITIES}
    assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert status["Seccomp_filters"] == "2"  # the engine's and ours


@pytest.mark.anyio
async def test_a_container_shares_no_namespace_but_of_users_and_has_no_network_device(sandbox):
    kinds = ("cgroup", "ipc", "mnt", "net", "pid", "uts")
    outside = [os.readlink(f"/proc/self/ns/{kind}") for kind in kinds]
    script = (
        f"import os; print([os.readlink('/proc/self/ns/' + k) for k in {kinds}])\n"
        "print(os.listdir('/sys/class/net'), {g.split(':')[2] for g in open('/proc/self/cgroup')})"
    )
    inside, rest = (await python(sandbox, script)).splitlines()
    assert not set(outside) & set(ast.literal_eval(inside))
    assert rest == "['lo'] {'/\\n'}"


@some
@pytest.mark.anyio
async def test_processes_are_counted_and_what_takes_them_all_ends_nothing_else(sandbox):
    script = """
import threading
threading.stack_size(1 << 16)
end, number = threading.Event(), 0
try:
    while number < 4000:
        threading.Thread(target=end.wait).start()
        number += 1
except RuntimeError:
    pass
end.set()
print(number)
"""
    assert 1500 < int(await python(sandbox, script)) < 2048
    assert (await sandbox.run(["echo", "well"])).stdout == b"well\n"


@pytest.mark.anyio
async def test_the_connection_of_the_first_process_can_not_be_used(sandbox):
    script = """
import os
for number in range(16):
    for flags in (os.O_RDONLY, os.O_WRONLY):
        try:
            fd = os.open(f"/proc/1/fd/{number}", flags | os.O_NONBLOCK)
        except OSError:
            continue
        print("opened", number)
for name in ("mem", "environ"):
    try:
        print(name, open(f"/proc/1/{name}", "rb+" if name == "mem" else "rb").read(1))
    except OSError:
        pass
print("done")
"""
    assert await python(sandbox, script) == "done"


@some
@pytest.mark.anyio
async def test_a_flood_of_connections_is_bounded_and_harms_nobody(sandbox):
    script = """
import socket
made = []
for _ in range(1500):
    s = socket.socket()
    s.setblocking(False)
    s.connect_ex(("127.0.0.1", 3128))
    made.append(s)
import time; time.sleep(2)
print(len(made))
"""
    before = len(os.listdir("/proc/self/fd"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(python, sandbox, script)
        await anyio.sleep(1.5)
        assert len(os.listdir("/proc/self/fd")) - before < 600
    assert (await sandbox.run(["echo", "well"])).stdout == b"well\n"


@some
@pytest.mark.anyio
async def test_what_stops_and_kills_all_it_can_ends_with_its_client(sandbox, docker):
    script = """
import os, signal, time
for number in (signal.SIGSTOP, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
    os.kill(1, number)
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
for _ in range(5):
    os.fork()
while True: time.sleep(1)
"""

    async def kill():
        await anyio.sleep(2)
        os.kill(sandbox._process.pid, signal.SIGKILL)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(kill)
        try:
            code = await sandbox.run(["python3", "-c", script])
        except SandboxGone:
            code = None
    assert code is None
    with anyio.fail_after(30):
        while docker.docker("ps", "--all", "--quiet", "--filter", f"name={sandbox.id}").stdout:
            await anyio.sleep(0.2)


@some
@pytest.mark.anyio
async def test_a_volume_of_an_image_is_no_way_to_the_engines_disk(docker):
    with_volume = "volume:1"
    docker.docker("run", "--name", "volume", "--network", "none", "debian-python:3.11", "true")
    docker.docker("commit", "--change", "VOLUME /data", "volume", with_volume)
    docker.docker("rm", "volume")
    said = []

    async def say(line):
        said.append(line)

    await Docker().prepare(Recipe(with_volume), say)
    assert said == [f"the volumes of the image {with_volume} begin empty in each step: /data"]
    sandbox = await Docker().create(SandboxSpec(disk=64, image=with_volume, network=False))
    try:
        said = await python(
            sandbox,
            "try: open('/data/big', 'wb').write(bytes(20 << 20))\n"
            "except OSError as e: print(e.strerror)",
        )
    finally:
        await sandbox.destroy()
        docker.docker("rmi", with_volume)
    assert said == "No space left on device"


@some
@pytest.mark.anyio
async def test_proxies_of_the_clients_configuration_stay_outside(docker, tmp_path, monkeypatch):
    url = "http://user:s3cret@proxy.corp.example:3128"
    proxies = {"default": {"httpProxy": url, "httpsProxy": url, "noProxy": "corp.example"}}
    (tmp_path / "config.json").write_text(json.dumps({"proxies": proxies}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    sandbox = await Docker().create(SandboxSpec(disk=64, network=False, image=engines.IMAGE))
    try:
        inspected = docker.docker("inspect", sandbox.id).stdout
        said = await python(sandbox, "import os; print(dict(os.environ))")
    finally:
        await sandbox.destroy()
    assert "s3cret" not in inspected + said
    assert "corp.example" not in inspected + said


@some
@pytest.mark.anyio
async def test_no_container_outlives_its_launcher_that_is_killed(docker):
    script = (
        "import anyio\nfrom metaflow_sandbox.backends.docker import Docker\n"
        "from metaflow_sandbox.backends.base import SandboxSpec\n"
        "async def main():\n"
        "    sandbox = await Docker().create(SandboxSpec(disk=64, image='debian-python:3.11'))\n"
        "    print(sandbox.id, flush=True)\n"
        "    await sandbox.run(['sleep', '600'])\n"
        "anyio.run(main)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    name = process.stdout.readline().strip()
    assert docker.docker("ps", "--quiet", "--filter", f"name={name}").stdout
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while docker.docker("ps", "--all", "--quiet", "--filter", f"name={name}").stdout:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.sample(0.05)  # of a minute and more
@pytest.mark.skipif(os.getuid() != 0, reason="NOT CHECKED as an ordinary user: needs an engine")
def test_no_container_outlives_its_engine_that_is_killed(monkeypatch):
    """An engine of its own, which is killed and started again."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # a short name, for sockets
        engine = engines.Dockerd(Path(directory) / "engine").join()
        monkeypatch.setenv("DOCKER_HOST", engine.host)
        try:
            anyio.run(_kill_an_engine, engine)
        finally:
            engine.leave()


async def _kill_an_engine(engine):
    spec = SandboxSpec(disk=64, image=engines.IMAGE, network=False)
    sandbox = await Docker().create(spec)
    pid = int(engine.docker("inspect", "--format", "{{.State.Pid}}", sandbox.id).stdout)
    assert Path(f"/proc/{pid}").exists()

    async def kill():
        await anyio.sleep(1)
        await anyio.to_thread.run_sync(engine.stop, signal.SIGKILL)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(kill)
        try:
            code = await sandbox.run(["sleep", "600"])
        except SandboxGone:
            code = None
    assert code is None
    with anyio.fail_after(150):  # it notices by the missing heartbeat
        while Path(f"/proc/{pid}").exists():
            await anyio.sleep(0.2)
    await anyio.to_thread.run_sync(engine.start)
    with anyio.fail_after(30):
        while engine.docker("ps", "--all", "--quiet").stdout:
            await anyio.sleep(0.2)
    await sandbox.destroy()
