"""Runs inside a microVM and does one thing that the host asks for: a command, or a file.

    inside.py

boxlite carries text, joins what it carries, and ends the process that it started alone. So
each operation is a process of this program, which talks ASCII and ends the whole tree.

From the host, on the standard input: a line with a JSON object, then a byte `+` for each frame
that was taken in. When the input ends, so does the operation. What is written comes by the
volume that the host shares, since the standard input of boxlite is slow.

To the host, on the standard output, which is no faster: frames of a letter, what zlib and
base64 make of the data, and `;`. Newlines between them mean nothing.

    o, e    what the command printed
    d       a piece of the file
    k       a piece was written
    x       the end: an exit code, or an error's number for files

Standard library only; the host trusts nothing that comes from here.
"""

import array
import base64
import contextlib
import ctypes
import errno
import json
import os
import select
import selectors
import shutil
import signal
import socket
import stat
import zlib

PR_SET_CHILD_SUBREAPER = 36
#: Frames on their way at once: what the host need hold for a reader that is slow.
WINDOW = 32
PIECE = 64 << 10
#: The frames that the window counts.
COUNTED = ("o", "e", "d", "c")

TYPE_CHECKING = False  # as type checkers know it, without the milliseconds of importing `typing`
if TYPE_CHECKING:
    from typing import Any


#: Where `connect` finds `listen`: a name that exists in the guest's network alone.
MEETING = "\0metaflow-sandbox-proxy-%d"


class HungUp(Exception):
    """The host is gone, or wants no more."""


class Line:
    """The way to the host, with a window on what it has not taken in yet."""

    def __init__(self) -> None:
        self._waiting = 0

    @property
    def full(self) -> bool:
        return self._waiting >= WINDOW

    def send(self, kind: str, data: bytes) -> None:
        packed = base64.b64encode(zlib.compress(data, 1))
        frame = memoryview(kind.encode() + packed + b";\n")
        while frame:
            frame = frame[os.write(1, frame) :]
        self._waiting += kind in COUNTED

    def acknowledged(self, number: int) -> None:
        self._waiting -= number

    def heard(self) -> None:
        """Takes in acknowledgements.

        Raises:
            HungUp
        """
        data = os.read(0, 4096)
        if not data:
            raise HungUp
        self.acknowledged(data.count(b"+"))

    def wait(self) -> None:
        """Returns when there is room for a frame."""
        while self.full:
            self.heard()

    def request(self) -> "dict[str, Any]":
        text = b""
        while not text.endswith(b"\n"):  # nothing follows until the first frame was sent
            piece = os.read(0, 65536)
            if not piece:
                raise HungUp
            text += piece
        found = json.loads(text)  # type: Any
        return dict(found)


def children_of(root: int) -> "set[int]":
    """Process ids below `root`, by /proc."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as f:
                    parents[int(name)] = int(f.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue
    found = {root}
    while True:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        if not more:
            return found - {root}
        found |= more


def end_tree() -> None:
    """Ends every process below this one. Daemons too: it is their subreaper."""
    while True:
        left = children_of(os.getpid())
        if not left:
            return
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def start(request: "dict[str, Any]", out: int, err: int) -> int:
    """Starts a command without input. Returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 126
    try:
        os.setsid()
        for number in (signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        for target, fd in enumerate((os.open(os.devnull, os.O_RDONLY), out, err)):
            os.dup2(fd, target)
        os.closerange(3, 256)
        os.chdir(request["cwd"])
        os.execvpe(request["argv"][0], request["argv"], {**os.environ, **request["env"]})
    except OSError as e:
        code = 127 if isinstance(e, FileNotFoundError) else 126
        os.write(2, f"{request['argv'][0]}: {e.strerror}\n".encode())
    finally:
        os._exit(code)


def run_command(request: "dict[str, Any]", line: Line) -> int:
    """Runs a command to its end, or until the host hangs up. Returns its exit code."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    woken, wake = os.pipe()
    streams = {}
    for kind in "oe":
        streams[kind] = os.pipe()
    for fd in (woken, wake, *(ends[0] for ends in streams.values())):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    child = start(request, streams["o"][1], streams["e"][1])
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        open_streams = {}
        for kind, (outside, inside) in streams.items():
            os.close(inside)
            open_streams[outside] = kind
        code = None
        while code is None:
            wanted = {} if line.full else open_streams
            for fd in open_streams:
                if (fd in wanted) != (fd in selector.get_map()):
                    if fd in wanted:
                        selector.register(fd, selectors.EVENT_READ)
                    else:
                        selector.unregister(fd)
            for key, _ in selector.select():
                if key.fd == 0:
                    line.heard()
                elif key.fd == woken:
                    os.read(woken, 4096)
                    code = reap(child)
                elif not pump(key.fd, open_streams[key.fd], line):
                    selector.unregister(key.fd)
                    del open_streams[key.fd]
        # A daemon may hold a stream open; what was written before is read.
        for fd, kind in open_streams.items():
            while select.select([fd], [], [], 0)[0]:
                line.wait()
                if not pump(fd, kind, line):
                    break
    return code


def pump(fd: int, kind: str, line: Line) -> bool:
    """Hands on a piece of output. False: there is no more."""
    try:
        data = os.read(fd, PIECE)
    except BlockingIOError:
        return True
    if data:
        line.send(kind, data)
    return bool(data)


def reap(child: int) -> "int | None":
    """The exit code of the command, if it has ended. Buries all others that have."""
    with contextlib.suppress(ChildProcessError):
        while True:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended == child:
                if os.WIFSIGNALED(status):
                    return 128 + os.WTERMSIG(status)
                return os.WEXITSTATUS(status)
            if ended == 0:
                return None
    return None


def read_file(request: "dict[str, Any]", line: Line) -> int:
    fd = os.open(request["path"], os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would block
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        return errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    while True:
        line.wait()
        data = os.read(fd, PIECE)
        if not data:
            return 0
        line.send("d", data)


def write_file(request: "dict[str, Any]", _line: Line) -> int:
    path = request["path"]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    with open(request["source"], "rb") as source, os.fdopen(fd, "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    return 0


def listen(request: "dict[str, Any]", line: Line) -> int:
    """Says of each connection to the proxy's port, and hands it to who asks for its number."""
    listener = socket.create_server(("127.0.0.1", request["port"]), backlog=128)
    meeting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    meeting.bind(MEETING % request["port"])
    meeting.listen(128)
    line.send("c", b"0")  # it listens now
    waiting, number = {}, 0
    with selectors.DefaultSelector() as selector:
        for source in (0, listener, meeting):
            selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd == 0:
                    line.heard()
                elif key.fileobj is listener:
                    number += 1
                    waiting[number] = listener.accept()[0]
                    line.wait()
                    line.send("c", b"%d" % number)
                else:
                    with meeting.accept()[0] as asking, contextlib.suppress(OSError, ValueError):
                        asking.settimeout(5)
                        with waiting.pop(int(asking.recv(16)), socket.socket()) as found:
                            rights = array.array("i", [found.fileno()]).tobytes()
                            asking.sendmsg([b"+"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


def connect(request: "dict[str, Any]", line: Line) -> int:
    """Carries one connection to the host and back."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.connect(MEETING % request["port"])
        asking.send(b"%d" % request["number"])
        _, rights, _, _ = asking.recvmsg(1, socket.CMSG_SPACE(4))
    program = socket.socket(fileno=array.array("i", rights[0][2])[0])
    received = b""
    here, there = True, True  # whether each end may still say something
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while here or there:
            listening = program in selector.get_map()
            if listening != (here and not line.full):
                if listening:
                    selector.unregister(program)
                else:
                    selector.register(program, selectors.EVENT_READ)
            for key, _ in selector.select():
                if key.fileobj is program:
                    data = program.recv(PIECE)
                    here = bool(data)
                    line.send("d" if data else "f", data)
                    continue
                piece = os.read(0, PIECE)
                if not piece:
                    raise HungUp
                received += piece
                while received:
                    if received[:1] == b"+":
                        line.acknowledged(1)
                        received = received[1:]
                    elif received[:1] == b"f":
                        there, received = False, received[1:]
                        with contextlib.suppress(OSError):
                            program.shutdown(socket.SHUT_WR)
                    else:
                        end = 5 + int.from_bytes(received[1:5], "big")
                        if len(received) < max(5, end):
                            break
                        program.sendall(received[5:end])
                        received = received[end:]
                        line.send("k", b"")
    return 0


OPERATIONS = {
    "exec": run_command,
    "read": read_file,
    "write": write_file,
    "listen": listen,
    "connect": connect,
}


def main() -> None:
    line = Line()
    try:
        request = line.request()
        code = OPERATIONS[request["op"]](request, line)
    except HungUp:
        end_tree()
        return
    except OSError as e:
        code = e.errno or 255
    line.send("x", b"%d" % code)


if __name__ == "__main__":
    main()
