"""Runs one command inside a Daytona sandbox, and says what it does in lines of ASCII.

    python3 -c <this file> '{"argv": […], "cwd": …, "env": {…}, "timeout": …}'

The logs of a session carry whole lines of text, and tell of a command's end a second
late, if the shell still lives. So each line here is one of

    SEQ ob|eb BASE64    output or error output, any bytes
    SEQ ol|el TEXT      the same, a line of plain letters, without its newline
    SEQ ot|et TEXT      the same, a piece of a line
    SEQ h               nothing happened for a while: the connection is alive
    SEQ x JSON          the end: {"code": 0 to 255, "oom": processes that ran out of memory}
    SEQ t               the end: the time was over, and the whole process tree is gone

SEQ counts from 1, so that a reader that lost its connection knows what it has seen.
Standard library only, Python 3.8 and later.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import selectors
import signal
import sys
import time

TYPE_CHECKING = False  # as type checkers know it, without importing `typing`
if TYPE_CHECKING:
    from typing import Any

CHUNK = 24 * 1024
PLAIN = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/= "
HEARTBEAT = 10.0  # seconds
PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36
NOT_FOUND, NOT_EXECUTABLE = 127, 126


class Lines:
    """What goes out, numbered."""

    def __init__(self) -> None:
        self.seq = 0

    def put(self, kind: str, payload: bytes = b"") -> None:
        self.seq += 1
        data = b"%x %s %s\n" % (self.seq, kind.encode(), payload)
        while data:
            data = data[os.write(1, data) :]

    def output(self, kind: str, data: bytes) -> None:
        """What no shell would change goes as it is: the agent's frames do."""
        while data:
            line, newline, data = data.partition(b"\n")
            if line.translate(None, PLAIN) or line[:1] == b" " or line[-1:] == b" ":
                whole = line + newline + data
                self.put(kind + "b", base64.b64encode(whole))
                return
            self.put(kind + ("l" if newline else "t"), line)


def descendants() -> list[int]:
    """Process ids below this one."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as f:
                    fields = f.read().rpartition(b")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(name))
    found, queue = [], [os.getpid()]
    while queue:
        for pid in children.get(queue.pop(), ()):
            found.append(pid)
            queue.append(pid)
    return found


def reap() -> dict[int, int]:
    """Collects every child that has ended: {pid: wait status}."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = status


def kill_all() -> None:
    """Ends everything below, what has called setsid included."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        left = descendants()
        if not left:
            return
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
        reap()


def ran_out_of_memory() -> int:
    """How many processes the kernel ended in this sandbox because memory ran out."""
    for path in ("memory.events", "memory/memory.oom_control"):
        try:
            with open("/sys/fs/cgroup/" + path) as f:
                for line in f:
                    name, _, value = line.partition(" ")
                    if name == "oom_kill":
                        return int(value)
        except (OSError, ValueError):
            pass
    return 0


def spawn(job: dict[str, Any]) -> tuple[int, int, int]:
    """Starts the command: (pid, its stdout, its stderr)."""
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = NOT_EXECUTABLE
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out_write, 1)
            os.dup2(err_write, 2)
            os.closerange(3, 256)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            if job["cwd"]:
                os.chdir(job["cwd"])
            os.execvpe(job["argv"][0], job["argv"], {**os.environ, **job["env"]})
        except FileNotFoundError as e:
            code = NOT_FOUND
            os.write(2, b"%s\n" % str(e).encode())
        except BaseException as e:
            os.write(2, b"%s\n" % str(e).encode())
        finally:
            os._exit(code)
    os.close(out_write)
    os.close(err_write)
    return pid, out_read, err_read


def stopped(*_: object) -> None:
    """The session was deleted."""
    kill_all()
    os._exit(143)


def main(job: dict[str, Any]) -> None:
    lines = Lines()
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # what it runs can't look into this process
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = ran_out_of_memory()
    woken, wake = os.pipe()
    for fd in (woken, wake):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, stopped)
    deadline = time.monotonic() + job["timeout"] if job["timeout"] else None
    pid, out, err = spawn(job)
    selector = selectors.DefaultSelector()
    for fd, kind in ((out, "o"), (err, "e"), (woken, None)):
        os.set_blocking(fd, False)
        selector.register(fd, selectors.EVENT_READ, kind)

    def drain(wait: float) -> bool:
        """Passes on what is there. Returns whether anything came."""
        came = False
        for key, _ in selector.select(wait):
            try:
                data = os.read(key.fd, CHUNK)
            except BlockingIOError:
                continue
            if key.data is None:
                continue
            came = True
            if data:
                lines.output(key.data, data)
            else:
                selector.unregister(key.fd)
        return came

    status: int | None = None
    spoke = time.monotonic()
    while status is None:
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            kill_all()
            lines.put("t")
            return
        if now - spoke >= HEARTBEAT:
            lines.put("h")
            spoke = now
        until = spoke + HEARTBEAT if deadline is None else min(spoke + HEARTBEAT, deadline)
        if drain(max(0.0, until - now)):
            spoke = time.monotonic()
        status = reap().get(pid)
    # What it wrote is in the pipes now; a daemon that holds them is not waited for.
    for _ in range(16):
        if not drain(0):
            break
    code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    end = {"code": code, "oom": ran_out_of_memory() - before}
    lines.put("x", json.dumps(end).encode())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
