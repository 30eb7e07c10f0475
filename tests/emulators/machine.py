"""One machine of an emulated cloud: a root, users and processes of its own, by bubblewrap.

The root is a directory on this machine's disk. It has this machine's /usr, read-only, so
that /usr/bin/python3 is there; everything else in it is the machine's own and can be
written. There is no network. `first.py` runs in it as the first process and does what is
asked here; when this process ends, however it ends, all of the machine's do.

As root the machine has two users, root and an ordinary one. As anybody else all of its users
are one to the kernel, who owns every file in it.
"""

import array
import asyncio
import contextlib
import errno
import json
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

#: The first process's own interpreter inside, whatever the machine's programs lack.
_PYTHON = "/run/python3"
PIECE = 32 << 10
MESSAGE = 1 << 20
UID = 1000
_FIRST = Path(__file__).with_name("first.py")
#: In a root: what was below the directory that is in memory, when `save` was called.
_SAVED = "/var/saved"
_LINKS = ("bin", "sbin", "lib", "lib64", "lib32", "libx32")
_ETC = ("ld.so.cache", "localtime", "nsswitch.conf", "mime.types", "profile", "debian_version")
_CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SYS_PTRACE",
)  # fmt: skip


def lay_out(root, home):
    """Makes a new machine's root directory. `home` is that of its user: /home/user, say."""
    user = os.path.basename(home)
    directories = ("etc", "opt", "proc", "dev", "root", "run", "srv", "usr", "var/tmp", "tmp")
    for name in (*directories, home.lstrip("/")):
        (root / name).mkdir(parents=True, exist_ok=True)
    for path in (root, *root.rglob("*")):
        path.chmod(0o755)
    for name in ("tmp", "var/tmp"):
        (root / name).chmod(0o1777)
    for name in _LINKS:
        if Path("/", name).is_symlink():
            (root / name).symlink_to(os.readlink(f"/{name}").lstrip("/"))
    for name in _ETC:
        if Path("/etc", name).exists():
            shutil.copyfile(f"/etc/{name}", root / "etc" / name)
    for name in ("ssl/certs", "alternatives"):
        (root / "etc" / name).mkdir(parents=True)
    text = {
        "passwd": f"root:x:0:0:root:/root:/bin/bash\n{user}:x:{UID}:{UID}::{home}:/bin/bash\n",
        "group": f"root:x:0:\n{user}:x:{UID}:\n",
        "hosts": "127.0.0.1 localhost\n",
        "resolv.conf": "",
    }
    for name, content in text.items():
        (root / "etc" / name).write_text(content)
    if os.getuid() == 0:
        os.chown(root / home.lstrip("/"), UID, UID)


def copy_root(source, target):
    """Another machine's root as the beginning of a new one's, owners and all."""
    subprocess.run(["cp", "-a", "--reflink=auto", f"{source}/.", str(target)], check=True)


def remove_root(root):
    """Removes a root directory, whatever modes its files have."""
    for folder, names, _ in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                with contextlib.suppress(OSError):
                    os.chmod(path, 0o700)
    shutil.rmtree(root, ignore_errors=True)


@dataclass
class Process:
    """A process of a machine.

    `read` gives what it writes; whoever starts one reads both streams, or it stops when
    their pipes are full. `wait` returns its status as `os.waitpid` has it.
    """

    machine: "Machine"
    pid: int
    stdin: int
    outputs: dict
    line: socket.socket
    _status: asyncio.Future = field(default=None)

    async def read(self, name):
        """Pieces of "stdout" or "stderr" until whoever holds it has closed it."""
        fd = self.outputs[name]
        try:
            while piece := await _when_readable(fd, lambda: os.read(fd, PIECE)):
                yield piece
        finally:
            os.close(fd)

    async def write(self, data):
        """Writes to its input; raises BrokenPipeError if it reads no more."""
        view = memoryview(data)
        while view:
            view = view[await _when_writable(self.stdin, lambda: os.write(self.stdin, view)) :]

    def close_stdin(self):
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    async def wait(self):
        return await asyncio.shield(self._status)

    async def signal(self, number):
        """Sends a signal to this process alone; quiet if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            if not self._status.done():
                await self.machine.ask("signal", pid=self.pid, number=number)

    async def _watch(self):
        try:
            facts, _ = await _receive(self.line)
            self._status.set_result(facts["status"])
        except (OSError, EOFError):
            self._status.set_result(9)  # with its machine
        finally:
            self.line.close()


class Machine:
    """A running machine: `await Machine.start(…)`, then `destroy`."""

    def __init__(self, root, home, bwrap, control):
        self.root, self.home, self.user = root, home, os.path.basename(home)
        self._bwrap, self._control = bwrap, control
        self._tasks = set()
        self.ended = False

    @classmethod
    async def start(
        cls, root, home, *, memory=None, cpus=None, disk=None, below="/tmp", hidden=(),
        counter="/proc/vmstat",
    ):  # fmt: skip
        """Starts a machine on a root that `lay_out` or `copy_root` made.

        Args:
            memory: MB; the largest process is ended when all together have more.
            cpus: how many of this machine's processors it has.
            disk: MB that can be written below a directory, which has what `save` saved of it
                in this root, or nothing; None: what there is.
            below: that directory.
            counter: the file in which it tells how often its memory ran out.
            hidden: programs of /usr/bin that it does not have.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MESSAGE)
        config = json.dumps({"memory": memory and memory << 20, "cpus": cpus})
        options = _options(Path(root), disk, below, hidden, counter)
        command = ["bwrap", *options, _PYTHON, "-S", "-s", "/run/first.py", str(theirs.fileno())]
        bwrap = subprocess.Popen(
            [*command, config], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        ours.setblocking(False)
        machine = cls(Path(root), home, bwrap, ours)
        machine._below = below if disk else None
        try:
            if await _when_readable(ours.fileno(), lambda: ours.recv(64)) != b"ready":
                raise RuntimeError("bubblewrap could not make a machine; see its message above")
            if disk and Path(root, _SAVED.lstrip("/")).exists():
                await machine._as_root(f"cp -a {_SAVED}/. {below}")
        except BaseException:
            await machine.destroy()
            raise
        return machine

    async def save(self):
        """Copies into its root what is below the directory that is in memory."""
        if self._below:
            await self._as_root(f"rm -rf {_SAVED} && cp -a {self._below} {_SAVED}")

    async def _as_root(self, command):
        process = await self.spawn(["/bin/sh", "-c", command], user="root", cwd="/")

        async def said(name):
            return b"".join([piece async for piece in process.read(name)])

        _, why, status = await asyncio.gather(said("stdout"), said("stderr"), process.wait())
        if status:
            raise RuntimeError(f"{command}: {why.decode(errors='replace')}")

    async def spawn(self, argv, *, env=None, cwd=None, user=None, stdin=False, terminal=False):
        """Starts a program, which goes on until it ends, is signalled, or its machine ends.

        Raises:
            OSError: it can't be started: no such program or directory.
        """
        user = user or self.user
        home = "/root" if user == "root" else self.home
        environment = {"HOME": home, "USER": user, "LOGNAME": user, "PATH": _PATH, **(env or {})}
        given, kept, process = [], [], None
        try:
            if terminal:
                primary, secondary = os.openpty()
                given, kept = [secondary] * 3, [primary, os.dup(primary), -1]
            else:
                source, sink = os.pipe() if stdin else (os.open(os.devnull, os.O_RDONLY), -1)
                (out, out_w), (err, err_w) = os.pipe(), os.pipe()
                given, kept = [source, out_w, err_w], [sink, out, err]
            for fd in kept:
                if fd >= 0:
                    os.set_blocking(fd, False)
            request = {
                "argv": list(argv), "env": environment, "cwd": cwd or home, "user": user,
                "terminal": terminal,
            }  # fmt: skip
            line = self._send("spawn", request, given)
            try:
                facts, _ = await _receive(line)
                if "errno" in facts:
                    raise OSError(facts["errno"], os.strerror(facts["errno"]))
            except BaseException:
                line.close()
                raise
            outputs = {"stdout": kept[1], "stderr": kept[2]}
            process = Process(self, facts["pid"], kept[0], outputs, line)
            process._status = asyncio.get_running_loop().create_future()
            self.keep(process._watch())
        finally:
            for fd in {*given, *(kept if process is None else ())}:
                if fd >= 0:
                    os.close(fd)
        return process

    async def open(self, path, *, write=False, user="root", owner=None):
        """Opens a file inside, as a user: (descriptor that the caller closes, size).

        With `write` it is emptied, or made with the directories above it, all the owner's.
        """
        facts, (fd,) = await self._ask("open", path=path, write=write, user=user, owner=owner)
        return fd, facts["size"]

    async def ask(self, op, *, user="root", **what):
        """One of first.py's operations: stat, list, mkdir, move, remove, chmod, chown, signal.

        Raises:
            OSError: with the number that it has inside.
        """
        facts, _ = await self._ask(op, user=user, **what)
        return facts["result"]

    async def write_file(self, path, pieces, *, user="root", owner=None):
        """Fills a file from an asynchronous iterator. Returns its size."""
        fd, _ = await self.open(path, write=True, user=user, owner=owner)
        size = 0
        try:
            async for piece in pieces:
                size += len(piece)
                await asyncio.to_thread(_write_all, fd, piece)
        finally:
            os.close(fd)
        return size

    async def read_file(self, path, *, user="root", piece=1 << 18):
        """The pieces of a file."""
        fd, _ = await self.open(path, user=user)
        async for data in pieces_of(fd, piece):
            yield data

    async def pause(self):
        """Stops every process where it is."""
        with contextlib.suppress(ProcessLookupError):  # there is none
            await self.ask("signal-all", number=19)

    async def resume(self):
        with contextlib.suppress(ProcessLookupError):
            await self.ask("signal-all", number=18)

    async def destroy(self, keep_root=False):
        """Ends every process at once, and removes the root. May be called twice."""
        if self.ended:
            return
        self.ended = True
        self._control.close()
        self._bwrap.kill()
        await asyncio.shield(asyncio.to_thread(self._bwrap.wait))
        if self._tasks:  # those that watch processes end by themselves
            _, left = await asyncio.wait(self._tasks, timeout=0.5)
            for task in left:
                task.cancel()
        if not keep_root:
            await asyncio.shield(asyncio.to_thread(remove_root, self.root))

    def keep(self, coroutine):
        """Runs something in the background of this machine."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _ask(self, op, **what):
        with self._send(op, what, []) as line:
            facts, fds = await _receive(line)
        if "errno" in facts:
            raise OSError(facts["errno"], os.strerror(facts["errno"]))
        return facts, fds

    def _send(self, op, what, fds):
        """Sends a request. Returns the line on which it is answered."""
        if self.ended:
            raise OSError(errno.ESRCH, "the machine has ended")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            message = json.dumps({"op": op, **what}).encode()
            rights = array.array("i", [theirs.fileno(), *fds])
            self._control.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        return ours


_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _options(root, disk, below, hidden, counter):
    options = [
        "--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-net", "--die-with-parent",
        "--as-pid-1", "--hostname", "machine", "--clearenv", "--cap-drop", "ALL",
    ]  # fmt: skip
    if os.getuid() == 0:
        for name in _CAPABILITIES:
            options += ["--cap-add", f"CAP_{name}"]
    else:
        options += ["--unshare-user", "--uid", str(UID), "--gid", str(UID)]
    options += ["--bind", str(root), "/", "--ro-bind", "/usr", "/usr"]
    for name in _LINKS:
        if Path("/", name).is_dir() and not Path("/", name).is_symlink():
            options += ["--ro-bind", f"/{name}", f"/{name}"]
    for name in ("/etc/ssl/certs", "/etc/alternatives"):
        if Path(name).is_dir():
            options += ["--ro-bind", name, name]
    for pattern in hidden:
        for path in Path("/usr/bin").glob(pattern):
            if not path.is_symlink():
                options += ["--ro-bind", "/dev/null", str(path)]
    options += ["--proc", "/proc", "--dev", "/dev", "--ro-bind", str(_FIRST), "/run/first.py"]
    options += ["--ro-bind", os.path.realpath("/usr/bin/python3"), _PYTHON]
    options += ["--setenv", "PYTHONHOME", "/usr"]
    # Always: this machine's own counts what others on it use up.
    count = root / "run" / "vmstat"
    count.write_text("oom_kill 0\n")
    options += ["--ro-bind", str(count), counter]
    if disk:
        options += ["--perms", "1777", "--size", str(disk << 20), "--tmpfs", below]
    if os.getuid() == 0:
        options += ["--ro-bind", "/proc/sys", "/proc/sys"]
    return [*options, "--remount-ro", "/dev"]


async def pieces_of(fd, size=1 << 18):
    """The content of a descriptor, which is closed at the end."""
    try:
        while data := await asyncio.to_thread(os.read, fd, size):
            yield data
    finally:
        os.close(fd)


def _write_all(fd, data):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


async def _receive(line):
    """An answer: its JSON object and descriptors."""

    def read():
        return socket.recv_fds(line, MESSAGE, 4)

    data, fds, _, _ = await _when_readable(line.fileno(), read)
    if not data:
        raise EOFError
    return json.loads(data), fds


async def _when_readable(fd, read):
    loop = asyncio.get_running_loop()
    while True:
        try:
            return read()
        except BlockingIOError:
            pass
        except OSError as e:
            if e.errno == errno.EIO:  # a terminal that nobody has open any more
                return b""
            raise
        ready = loop.create_future()
        loop.add_reader(fd, lambda: ready.done() or ready.set_result(None))
        try:
            await ready
        finally:
            loop.remove_reader(fd)


async def _when_writable(fd, write):
    loop = asyncio.get_running_loop()
    while True:
        try:
            return write()
        except BlockingIOError:
            ready = loop.create_future()
            loop.add_writer(fd, lambda: ready.done() or ready.set_result(None))
            try:
                await ready
            finally:
                loop.remove_writer(fd)
