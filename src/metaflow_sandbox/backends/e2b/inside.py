"""Runs one command in a sandbox for a caller that gets text alone, and says that it lives.

    python -c PROGRAM JSON        {"argv": [...], "env": {...}, "cwd": path, "made": path}

E2B's SDK decodes output as UTF-8, and reports the end of a command only when everything
that it started has closed its output. So what the command writes becomes ASCII lines here:

    o BASE64      of its standard output
    e BASE64      of its standard error
    m NUMBER      how many processes the kernel has ended for want of memory
    f             the disk is full now that the command has ended
    .             nothing, so that silence means that the connection is lost

The exit code is the command's, 128 + n if signal n ended it. What it leaves running goes on.
Standard library only, Python 3.8 and later.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import selectors
import signal
import sys
import time

TYPE_CHECKING = False  # as type checkers know it, without the milliseconds of importing `typing`
if TYPE_CHECKING:
    from typing import Any

CHUNK = 24 * 1024
HEARTBEAT_SECONDS = 20.0
PR_SET_DUMPABLE = 4


def say(kind: bytes, data: bytes = b"") -> None:
    line = kind + b" " + base64.b64encode(data) + b"\n"
    while line:
        line = line[os.write(1, line) :]


def memory() -> int:
    """How many processes were ended for want of memory since this machine began."""
    try:
        with open("/proc/vmstat") as file:
            return next((int(x.split()[1]) for x in file if x.startswith("oom_kill ")), 0)
    except (OSError, ValueError, IndexError):
        return 0


def full(path: str) -> bool:
    try:
        return os.statvfs(path).f_bavail == 0
    except OSError:
        return False


def start(request: dict[str, Any], out: int, err: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 126
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for number, fd in enumerate((null, out, err)):
            os.dup2(fd, number)
        os.closerange(3, 64)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.makedirs(request["made"], exist_ok=True)
        os.chdir(request["cwd"])
        environment = dict(os.environ, **request["env"])
        os.execvpe(request["argv"][0], request["argv"], environment)
    except OSError as e:
        code = 127 if isinstance(e, FileNotFoundError) else 126
        os.write(2, f"{request['argv'][0]}: {e.strerror}\n".encode())
    finally:
        os._exit(code)


def main() -> None:
    # No command can look into this process, nor write where it writes.
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    request = json.loads(sys.argv[1])
    woken, wake = os.pipe()
    for fd in (woken, wake):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    out, out_write = os.pipe()
    err, err_write = os.pipe()
    ended = memory()
    say(b"m", b"%d" % ended)
    pid = start(request, out_write, err_write)
    os.close(out_write)
    os.close(err_write)
    selector = selectors.DefaultSelector()
    for fd, kind in ((out, b"o"), (err, b"e"), (woken, b"")):
        os.set_blocking(fd, False)
        selector.register(fd, selectors.EVENT_READ, kind)
    status = None
    said = time.monotonic()
    while True:
        events = selector.select(0 if status is not None else HEARTBEAT_SECONDS)
        progress = False
        for key, _ in events:
            if not key.data:
                os.read(woken, 4096)
                continue
            try:
                data = os.read(key.fd, CHUNK)
            except BlockingIOError:
                continue
            if data:
                say(key.data, data)
                said, progress = time.monotonic(), True
            else:
                selector.unregister(key.fd)
        if status is not None and not progress:
            break  # what is left holds the outputs, and is not waited for
        if status is None:
            found, value = os.waitpid(pid, os.WNOHANG)
            status = value if found else None
        if status is None and time.monotonic() - said >= HEARTBEAT_SECONDS:
            say(b".")
            said = time.monotonic()
    if memory() != ended:
        say(b"m", b"%d" % memory())
    if full(request["made"]):
        say(b"f")
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


main()
