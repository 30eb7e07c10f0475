"""The first process of an emulated machine: starts what `machine.py` asks for, as any of its users.

    first.py CONTROL_FD CONFIG

A request is one message on the control socket: a JSON object, with the descriptors that it
works on. The first of those is the request's own line back. Standard library only.
"""

import array
import contextlib
import ctypes
import grp
import json
import os
import pwd
import selectors
import shutil
import signal
import socket
import stat
import sys
import time

WATCH_SECONDS = 0.1
MESSAGE = 1 << 20


def become(name):
    """Takes a user's identity for good. Where only one user is mapped, all are that one."""
    if name == "root" or len(open("/proc/self/uid_map").read().splitlines()) == 1 and single():
        return
    user = pwd.getpwnam(name)
    os.setgroups([g.gr_gid for g in grp.getgrall() if name in g.gr_mem])
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)


def single():
    return int(open("/proc/self/uid_map").read().split()[2]) == 1


def receive(control):
    fds = array.array("i")
    data, ancillary, _, _ = control.recvmsg(MESSAGE, socket.CMSG_SPACE(8 * fds.itemsize))
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return json.loads(data) if data else None, list(fds)


def answer(line, fds=(), **facts):
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with contextlib.suppress(OSError):  # nobody listens any more
        line.sendmsg([json.dumps(facts).encode()], rights)


# --- processes


def spawn(request, streams):
    """Starts a program with these descriptors as 0, 1 and 2. Returns its process id."""
    failed, fail = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            for number, fd in enumerate(streams):
                os.dup2(fd, number)
            if request.get("terminal"):
                import fcntl
                import termios

                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            for name in os.listdir("/proc/self/fd"):
                if int(name) > 2 and int(name) != fail:
                    with contextlib.suppress(OSError):
                        os.set_inheritable(int(name), False)
            for number in (signal.SIGCHLD, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            become(request["user"])
            os.chdir(request["cwd"])
            os.execvpe(request["argv"][0], request["argv"], request["env"])
        except OSError as e:
            os.write(fail, b"%d" % (e.errno or 1))
        finally:
            os._exit(127)
    os.close(fail)
    with os.fdopen(failed, "rb") as pipe:
        error = pipe.read()
    if error:
        os.waitpid(pid, 0)
        raise OSError(int(error), os.strerror(int(error)))
    return pid


# --- files


def describe(path):
    found = os.lstat(path)
    target = os.path.realpath(path) if stat.S_ISLNK(found.st_mode) else None
    followed = os.stat(path) if target and os.path.exists(path) else found
    return {
        "path": path,
        "name": os.path.basename(path),
        "kind": "dir"
        if stat.S_ISDIR(followed.st_mode)
        else "file"
        if stat.S_ISREG(followed.st_mode)
        else "other",
        "size": followed.st_size,
        "mode": followed.st_mode & 0o7777,
        "text": stat.filemode(followed.st_mode),
        "owner": name_of(pwd.getpwuid, followed.st_uid),
        "group": name_of(grp.getgrgid, followed.st_gid),
        "modified": followed.st_mtime,
        "target": target,
    }


def name_of(look_up, number):
    with contextlib.suppress(KeyError):
        return look_up(number)[0]
    return str(number)


def walk(path, depth):
    found = []
    for name in sorted(os.listdir(path)):
        below = os.path.join(path, name)
        with contextlib.suppress(FileNotFoundError):
            found.append(describe(below))
        if depth > 1 and os.path.isdir(below) and not os.path.islink(below):
            found += walk(below, depth - 1)
    return found


def make_directories(path, owner):
    """Makes a directory and those above it, all of them the owner's."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        os.mkdir(directory, 0o755)
        give(directory, owner)


def give(path, owner):
    if owner and os.getuid() == 0 and not single():
        user = pwd.getpwnam(owner)
        os.chown(path, user.pw_uid, user.pw_gid)


def remove(path):
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.remove(path)


def file_operation(request, line):
    """One operation on files, in a process of its own: it may take another user's identity."""
    become(request["user"])
    path, owner = request.get("path"), request.get("owner")
    name = request["op"]
    if name == "open":
        if request["write"]:
            make_directories(os.path.dirname(path), owner)
            new = not os.path.exists(path)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            if new:
                give(path, owner)
        else:
            # As a daemon does it that opens what it is asked for: a FIFO makes it wait.
            fd = os.open(path, os.O_RDONLY)
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise IsADirectoryError(21, "is a directory")
        return answer(line, [fd], size=os.fstat(fd).st_size)
    if name == "stat":
        return answer(line, result=describe(path))
    if name == "list":
        return answer(line, result=walk(path, request.get("depth", 1)))
    if name == "mkdir":
        existed = os.path.isdir(path)
        if os.path.exists(path) and not existed:
            raise NotADirectoryError(20, "is not a directory")
        make_directories(path, owner)
        return answer(line, result=not existed)
    if name == "move":
        make_directories(os.path.dirname(request["target"]), owner)
        os.rename(path, request["target"])
    elif name == "remove":
        remove(path)
    elif name == "chmod":
        os.chmod(path, request["mode"])
    elif name == "chown":
        give(path, owner)
    else:
        raise ValueError(name)
    return answer(line, result=None)


# --- memory, as a machine of that size would have it


def processes():
    """{process id: bytes that are its own} of all but this one."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError, ValueError, StopIteration):
                with open(f"/proc/{name}/smaps_rollup") as file:
                    pss = next(x for x in file if x.startswith("Pss:"))
                found[int(name)] = int(pss.split()[1]) << 10
    return found


def ease(limit, killed):
    """Ends the largest process if all together have more than `limit`, as a kernel does."""
    found = processes()
    if sum(found.values()) <= limit:
        return killed
    # Bound over the counter; counted first and never empty, since who sees the end looks at once.
    count = os.open("/run/vmstat", os.O_WRONLY)
    os.write(count, b"oom_kill %d\n" % (killed + 1))
    os.close(count)
    os.kill(max(found, key=found.get), signal.SIGKILL)
    return killed + 1


def serve(control, config):
    woken, wake = os.pipe()
    for fd in (woken, wake):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    lines = {}  # {process id: whom its end is told}
    ended = {}  # statuses of those that ended before anybody asked
    killed, looked = 0, 0.0
    while True:
        events = selector.select(WATCH_SECONDS if config["memory"] else None)
        if config["memory"] and time.monotonic() - looked > WATCH_SECONDS:
            killed, looked = ease(config["memory"], killed), time.monotonic()
        for key, _ in events:
            if key.fileobj is control:
                request, fds = receive(control)
                if request is None:
                    return
                attend(request, fds, lines)
            else:
                os.read(woken, 4096)
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                ended[found[0]] = found[1]
        for pid in set(ended) & set(lines):
            line = lines.pop(pid)
            answer(line, status=ended.pop(pid))
            line.close()
        ended.clear()  # orphans


def attend(request, fds, lines):
    line = socket.socket(fileno=fds[0])
    try:
        if request["op"] == "spawn":
            pid = spawn(request, fds[1:4])
            answer(line, pid=pid)
            lines[pid] = line
            line = None
        elif request["op"] == "signal":
            os.kill(request["pid"], request["number"])
            answer(line, result=None)
        elif request["op"] == "signal-all":
            os.kill(-1, request["number"])  # all but this process
            answer(line, result=None)
        elif os.fork() == 0:
            try:
                file_operation(request, line)
            except OSError as e:
                answer(line, errno=e.errno or 5)
            except KeyError:
                answer(line, errno=22)
            finally:
                os._exit(0)
    except OSError as e:
        answer(line, errno=e.errno or 5)
    finally:
        for fd in fds[1:]:
            os.close(fd)
        if line is not None:
            line.close()


def main(argv):
    control = socket.socket(fileno=int(argv[0]))
    config = json.loads(argv[1])
    os.umask(0o022)
    if config["cpus"]:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: config["cpus"]])
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # nobody looks into this process
    control.send(b"ready")
    serve(control, config)


main(sys.argv[1:])
