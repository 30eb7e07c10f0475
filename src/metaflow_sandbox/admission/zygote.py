"""Makes the processes that read (`reader.py`): one that has everything loaded, and forks for each.

A reader ends after one request, so nothing that it met is there for the next one. This
process touches no request and no answer: it gets descriptors of both over its standard
input, and hands them to a child.

    two pipes come     a child reads the request from one and answers into the other
    an answer's pipe has no reader any more        its child is killed
    standard input ends (the supervisor did)       all children are killed, and it ends

Runs on a bare interpreter, like `reader.py`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys

from . import reader

#: What starts this file as a program; the directory of the packages is its argument.
PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from metaflow_sandbox.admission.zygote import main; main()"
)
#: Comes last in an answer: without it, the reader was ended before it was done.
END = b"\n"
_FDS = 1 << 16


def _read(request: int, answer: int) -> None:
    """What a child does."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(request, 0)
        os.dup2(answer, 1)
        os.closerange(3, _FDS)  # the way to all other readers among them
        reader.main()
        sys.stdout.flush()
        sys.stdout.buffer.write(END)
        sys.stdout.buffer.flush()
        code = 0
    finally:
        os._exit(code)


def _start(request: int, answer: int, children: dict[int, int], poll: select.poll) -> None:
    """Forks a reader. If that can't be done, its answer ends before it began."""
    try:
        pid = os.fork()
    except OSError:
        os.close(answer)
    else:
        if pid == 0:
            _read(request, answer)
        children[answer] = pid
        poll.register(answer, 0)
    os.close(request)


def main() -> None:
    """Serves until its standard input ends."""
    control = socket.socket(fileno=0)
    woken, wake = os.pipe()
    for fd in (woken, wake):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    gc.freeze()  # or each child's collections would copy what they look at
    children: dict[int, int] = {}  # {its answer's pipe: process id}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(woken, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == woken:
                os.read(woken, 4096)
            elif fd in children:  # which are reported when their readers are gone
                os.kill(children[fd], signal.SIGKILL)
                poll.unregister(fd)
            elif fd == control.fileno():
                _, fds, _, _ = socket.recv_fds(control, 1, 2)
                if len(fds) != 2:
                    for pid in children.values():
                        os.kill(pid, signal.SIGKILL)
                    os._exit(0)
                _start(fds[0], fds[1], children, poll)
        _collect(children, poll)


def _collect(children: dict[int, int], poll: select.poll) -> None:
    """Closes the answers of those that have ended: only then can their ids be used again."""
    while children:
        pid, _ = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        for fd in [fd for fd, child in children.items() if child == pid]:
            del children[fd]
            with contextlib.suppress(KeyError):  # killed before
                poll.unregister(fd)
            os.close(fd)
