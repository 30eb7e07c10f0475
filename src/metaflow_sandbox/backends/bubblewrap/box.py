"""Runs inside a bubblewrap sandbox as its first process, and starts what the host asks for.

    box.py CONTROL_FD CONFIG

The host sends one message an operation over a private socket, with the file
descriptors that the operation works on. So output goes straight from the
command's pipe to the host: nothing is copied or framed on the way. The first
descriptor is always the operation's own line to the host: the exit code is
written to it, and the operation ends when the host closes it. When the control
socket closes, or when its lifetime is over, this process ends, and the kernel ends
everything in the sandbox.

CONFIG is a JSON object:

    lifetime    seconds
    processes   how many processes and threads there may be
    uid         the user to become, or null. Until then this runs with the right to
                change its user; nothing of the step's runs before
    memory      bytes that processes and files may use, or null where control groups
                limit that: looked at ten times a second
    inodes      how many files there may be, looked at with `memory`
    proxy       a port on the loopback device, or null: listened at here, since this
                is the sandbox's network, and answered by the host

Standard library only, and `operations.py`, which comes along; it trusts the host and nobody
trusts it.
"""

from __future__ import annotations

import array
import ctypes
import json
import os
import resource
import select
import signal
import socket
import sys

from metaflow_sandbox.backends.operations import (
    OPERATIONS,
    PR_CAP_AMBIENT,
    PR_CAPBSET_DROP,
    PR_SET_DUMPABLE,
    children_of,
    prctl,
    reap,
)

TYPE_CHECKING = False  # as type checkers know it, without the milliseconds of importing `typing`
if TYPE_CHECKING:
    from typing import Any

PR_CAP_AMBIENT_CLEAR_ALL = 4
CAPABILITY_VERSION_3 = 0x20080522
MESSAGE = 60_000
MAX_ALARM = (1 << 31) - 1
LAST_CAPABILITY = 63
WATCH_SECONDS = 0.1
SCRATCH = ("/sandbox", "/tmp", "/dev/shm")


def drop_privileges(uid: int) -> None:
    """Becomes `uid` for good, with no capability left to come back by."""
    for capability in range(LAST_CAPABILITY + 1):
        prctl(PR_CAPBSET_DROP, capability)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)())
    with open("/proc/self/status") as f:
        status = dict(line.split(":", 1) for line in f if ":" in line)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        if int(status[name], 16) != 0:
            raise SystemExit(f"capabilities are left: {name}")


def receive(control: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """One request: its JSON object and its descriptors, the operation's line first."""
    fds = array.array("i")
    data, ancillary, _, _ = control.recvmsg(MESSAGE, socket.CMSG_SPACE(8 * fds.itemsize))
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return json.loads(data) if data else None, list(fds)


def resident(pid: int, exact: bool) -> int:
    """Bytes of memory of a process; `exact` shares out what several have in common."""
    try:
        if exact:
            with open(f"/proc/{pid}/smaps_rollup", "rb") as f:
                for line in f:
                    if line.startswith(b"Pss:"):
                        return int(line.split()[1]) << 10
        with open(f"/proc/{pid}/statm", "rb") as f:
            return int(f.read().split()[1]) * resource.getpagesize()
    except PermissionError:  # it hides its memory: count all of it as its own
        return resident(pid, exact=False)
    except (OSError, ValueError, IndexError):
        return 0


def overrun(memory: int, inodes: int) -> bytes | None:
    """Which of the limits the sandbox has passed, if any."""
    stored = files = 0
    for path in SCRATCH:
        usage = os.statvfs(path)
        stored += (usage.f_blocks - usage.f_bfree) * usage.f_frsize
        files += usage.f_files - usage.f_ffree
    if files > inodes:
        return b"inodes"
    pids = children_of(os.getpid())
    # The sum of what is resident is quick, and too high where processes share memory.
    for exact in (False, True):
        if stored + sum(resident(pid, exact) for pid in pids) <= memory:
            return None
    return b"memory"


def attend(control: socket.socket) -> bool:
    """Carries out one request in a child. False: the host has hung up."""
    request, fds = receive(control)
    if request is None:
        return False
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.alarm(0)
        control.close()
        line = socket.socket(fileno=fds[0])
        try:
            code = OPERATIONS[request["op"]](request, line, *fds[1:])
        except OSError as e:
            code = e.errno or 255
        try:
            line.send(b"%d" % code)
        finally:
            os._exit(0)
    for fd in fds:
        os.close(fd)
    return True


def main(argv: list[str]) -> None:
    control = socket.socket(fileno=int(argv[0]))
    config = json.loads(argv[1])
    # For the first process no signal has an effect unless it is handled.
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
    signal.signal(signal.SIGCHLD, reap)
    signal.alarm(min(int(config["lifetime"]), MAX_ALARM))
    ready = [socket.create_server(("127.0.0.1", config["proxy"]))] if config["proxy"] else []
    if config["uid"] is not None:
        drop_privileges(config["uid"])
    resource.setrlimit(resource.RLIMIT_NPROC, (config["processes"], config["processes"]))
    prctl(PR_SET_DUMPABLE, 0)  # no process of the step can look into this one
    os.umask(0o022)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [r.fileno()])) for r in ready]
    control.sendmsg([b"ready"], rights)
    for listener in ready:
        listener.close()
    watched = config["memory"] is not None
    while True:
        if not watched or select.select([control], [], [], WATCH_SECONDS)[0]:
            if not attend(control):
                return
        elif passed := overrun(config["memory"], config["inodes"]):
            control.send(passed)
            return  # and with this process all others end


main(sys.argv[1:])
