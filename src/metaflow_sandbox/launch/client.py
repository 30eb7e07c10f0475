"""Stands for one attempt under Metaflow's scheduler: `client.py WORKSPACE PYTHON FLOW …`.

What follows WORKSPACE is the command that Metaflow would have run for the task. This
hands it, its own output and its own life to the run's supervisor (`supervisor.py`),
which it starts if there is none, and ends with the attempt's exit code. If this is
ended, the supervisor ends the attempt. Standard library only, and little of it: there
is one of these for each attempt that runs.
"""

from __future__ import annotations

import os
import sys

# What the module `socket` is made of: that would cost each client as much as Python itself.
from _socket import AF_UNIX, SCM_RIGHTS, SOCK_STREAM, SOL_SOCKET, socket

SOCKET = "supervisor"  # in the workspace; relative, since such paths may have 107 bytes
HEADER = 8
_TRIES = 3
_COMMAND = ["sandbox", "step"]


def say(message: str) -> None:
    os.write(2, f"[sandbox] {message}\n".encode())


def connect(workspace: str = ".") -> socket:
    line = socket(AF_UNIX, SOCK_STREAM)
    try:
        line.connect(f"{workspace}/{SOCKET}")
    except OSError:
        line.close()
        raise
    return line


def supervisor_command(command: list[str], with_specs: list[str]) -> list[str]:
    """The command that starts a supervisor: like the task's, for all steps.

    Metaflow names to each task the decorators that `--with` gave to its step; the
    supervisor has to know those of all.
    """
    top = command[: place_of_step(command)]
    kept: list[str] = []
    words = iter(top)
    for word in words:
        if word == "--with":
            next(words, None)
        else:
            kept.append(word)
    for spec in with_specs:
        kept += ["--with", spec]
    return [*kept, "sandbox", "supervise"]


def place_of_step(command: list[str]) -> int:
    """Where `sandbox step` stands in a command."""
    for i in range(len(command) - 1):
        if command[i : i + 2] == _COMMAND:
            return i
    raise SystemExit("client.py is started by Metaflow's scheduler alone")


def connect_or_start(command: list[str], directory: str) -> socket | None:
    """A line to the supervisor; None, and a message, if none could be started."""
    try:
        return connect()
    except OSError:
        pass
    import fcntl
    import subprocess

    with open("supervisor.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return connect()  # another client was quicker
        except OSError:
            pass
        with open("supervisor.options") as file:
            scheduler, *with_specs = file.read().split("\0")
        ready, inside = os.pipe()
        with open("supervisor.log", "wb") as log:
            options = ["--workspace", os.getcwd(), "--scheduler", scheduler, "--ready", str(inside)]
            process = subprocess.Popen(
                [*supervisor_command(command, with_specs), *options],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[inside],
                start_new_session=True,
            )
        os.close(inside)
        if os.read(ready, 1):
            return connect()
        say(f"the run's supervisor could not be started (exit code {process.wait()}):")
        with open("supervisor.log", "rb") as log:
            os.write(2, log.read()[-4000:])
        return None


def end(workspace: str, seconds: float) -> str:
    """Tells a run's supervisor, if there is one, to end, and waits until it has.

    Returns:
        What it says is left.
    """
    said = b""
    directory = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY)
    try:
        short = f"/proc/self/fd/{directory}" if os.path.exists("/proc/self/fd") else workspace
        line = connect(short)
        line.settimeout(seconds)
        line.sendall(bytes(HEADER))
        while piece := line.recv(4096):
            said += piece
        line.close()
    except OSError:
        pass
    finally:
        os.close(directory)
    return said.decode(errors="replace")


def ask(line: socket, command: list[str]) -> bytes:
    """Has the supervisor run an attempt. Returns its exit code, in digits; b"": it ended first."""
    words = command[place_of_step(command) + len(_COMMAND) :]
    message = "\0".join(words).encode()
    output = b"".join(fd.to_bytes(4, sys.byteorder) for fd in (1, 2))
    header = len(message).to_bytes(HEADER, "big")
    line.sendmsg([header], [(SOL_SOCKET, SCM_RIGHTS, output)])
    line.sendall(message)
    answer = b""
    while piece := line.recv(64):
        answer += piece
    return answer


def main(argv: list[str]) -> int:
    workspace, command = argv[0], argv[1:]
    directory = os.getcwd()
    for tries in range(_TRIES, 0, -1):
        try:
            os.chdir(workspace)
            line = connect_or_start(command, directory)
            if line is None:
                return 1
            answer = ask(line, command)
            break
        except OSError as e:
            # Closed before it had read what it was asked, so that nothing has begun: one that
            # was about to end. The next is another.
            ending = isinstance(e, (ConnectionResetError, BrokenPipeError))
            if not ending or tries == 1:
                say(f"the run's supervisor can't be reached: {e.strerror or e}")
                return 1
    if not answer.isdigit():
        say(
            "the run's supervisor ended before this attempt did, so the attempt has failed. "
            "Its sandbox is gone; a next attempt starts another supervisor."
        )
        return 1
    return int(answer)


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:  # what it means is the supervisor's to see
        code = 130
    os._exit(code)
