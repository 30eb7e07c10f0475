"""What the first process of a sandbox does for the host: commands, and files in and out.

It travels into sandboxes with the program that listens to the host, `box.py` of a backend
(`boxed.py` joins the two). Each operation runs in a process of its own, which has the
descriptors that it works on and a line to whoever asked: it ends the operation when the
line is closed. What it returns is an exit code, or the number of an error for files.

Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import selectors
import shutil
import signal
import socket
import stat

TYPE_CHECKING = False  # as type checkers know it, without the milliseconds of importing `typing`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_CAP_AMBIENT = 4, 24, 36, 47
TIOCSCTTY = 0x540E


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def children_of(root: int) -> set[int]:
    """Process ids below `root`, by /proc."""
    parents: dict[int, int] = {}
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


def reap(*_: object) -> None:
    """Every process whose parent has ended is the first process's child."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def end_tree() -> None:
    """Ends every process below this one. Daemons too: it is their subreaper."""
    while True:
        left = children_of(os.getpid())
        if not left:
            return
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        reap()


def run_command(request: dict[str, Any], line: socket.socket, out: int, err: int) -> int:
    """Runs a command without input to its end, or until the host hangs up."""
    null = os.open(os.devnull, os.O_RDONLY)
    return run(request, line, (null, out, err))


def run_terminal(request: dict[str, Any], line: socket.socket, terminal: int) -> int:
    """Runs a command at a terminal of the host's."""
    return run(request, line, (terminal, terminal, terminal), TIOCSCTTY)


def run(
    request: dict[str, Any],
    line: socket.socket,
    streams: tuple[int, int, int],
    control: int | None = None,
) -> int:
    """Runs a command with these descriptors as 0, 1 and 2. Returns its exit code."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    woken, wake = os.pipe()
    for fd in (woken, wake):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    pid = os.fork()
    if pid == 0:
        code = 126
        try:
            os.setsid()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            for number, fd in enumerate(streams):
                os.dup2(fd, number)
            if control is not None:
                fcntl.ioctl(0, control, 0)
            for name in os.listdir("/proc/self/fd"):
                if int(name) > 2:
                    with contextlib.suppress(OSError):  # the one that listed them
                        os.close(int(name))
            os.chdir(request["cwd"])
            os.execvpe(request["argv"][0], request["argv"], {**os.environ, **request["env"]})
        except OSError as e:
            code = 127 if isinstance(e, FileNotFoundError) else 126
            os.write(2, f"{request['argv'][0]}: {e.strerror}\n".encode())
        finally:
            os._exit(code)
    for fd in set(streams):
        os.close(fd)
    selector = selectors.DefaultSelector()
    selector.register(line, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is line:  # the host has hung up
                end_tree()
                return 0
            os.read(woken, 4096)
        try:
            while True:
                ended, status = os.waitpid(-1, os.WNOHANG)
                if ended == pid:
                    if os.WIFSIGNALED(status):
                        return 128 + os.WTERMSIG(status)
                    return os.WEXITSTATUS(status)
                if ended == 0:
                    break
        except ChildProcessError:
            return 255


def copy(source: int, target: int) -> int:
    with os.fdopen(source, "rb") as a, os.fdopen(target, "wb") as b:
        shutil.copyfileobj(a, b, 1 << 20)
    return 0


def read_file(request: dict[str, Any], _line: socket.socket, out: int) -> int:
    fd = os.open(request["path"], os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would block
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        return errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    return copy(fd, out)


def write_file(request: dict[str, Any], _line: socket.socket, source: int) -> int:
    path = request["path"]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return copy(source, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644))


OPERATIONS: dict[str, Callable[..., int]]
OPERATIONS = {
    "exec": run_command,
    "terminal": run_terminal,
    "read": read_file,
    "write": write_file,
}
