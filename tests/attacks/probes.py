"""Attacks on the host, each a small piece of code that is run outside a sandbox and in one.

    python probes.py NAME ARGUMENT…     runs one, prints what came of it
    python probes.py --batch FILE       runs many: {title: [NAME, ARGUMENT…]} to {title: result}

A result is one line:

    reached …     the attack succeeded
    blocked ERROR the kernel refused it
    killed SIGNAL the kernel ended it
    broken …      the probe itself is wrong, which proves nothing

`ATTACKS` says for each one how it is shown to work without the sandbox (its control).
Standard library only, since it is run by whatever Python there is on the inside.
Secrets are looked for by their reversed text, so that a probe never finds its own arguments.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import pty
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import tty
from dataclasses import dataclass, field
from glob import glob

SECONDS = 30
PROBES = {}

#: {call: (number on x86_64, number on aarch64)}; None where the machine has no such call.
CALLS = {
    "acct": (163, 89), "add_key": (248, 217), "bpf": (321, 280), "chroot": (161, 51),
    "clock_settime": (227, 112), "clone": (56, 220), "clone3": (435, 435),
    "fanotify_init": (300, 262), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fsopen": (430, 430), "fspick": (433, 433), "get_mempolicy": (239, 236), "getpid": (39, 172),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "ioctl": (16, 29), "iopl": (172, None), "kcmp": (312, 272), "kexec_load": (246, 104),
    "keyctl": (250, 219), "modify_ldt": (154, None), "mount": (165, 40),
    "mount_setattr": (442, 442), "move_mount": (429, 429), "move_pages": (279, 239),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "open_tree": (428, 428),
    "perf_event_open": (298, 241), "personality": (135, 92), "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "ptrace": (101, 117), "reboot": (169, 142), "request_key": (249, 218),
    "sethostname": (170, 161), "setns": (308, 268), "settimeofday": (164, 170),
    "swapon": (167, 224), "syslog": (103, 116), "umount2": (166, 39), "unshare": (272, 97),
    "userfaultfd": (323, 282),
}  # fmt: skip
COLUMN = {"x86_64": 0, "aarch64": 1}
NEW_USER = 0x10000000
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
USER_KEYRING = -4


def probe(function):
    PROBES[function.__name__] = function
    return function


def refused(number, text=""):
    return OSError(number, text or os.strerror(number))


def call(name, *arguments):
    """A system call by its number, past what the C library knows of it."""
    column = COLUMN.get(platform.machine())
    number = CALLS[name][column] if column is not None else None
    if number is None:
        raise refused(errno.ENOSYS)
    return call_number(number, *arguments)


def call_number(number, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    passed = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *passed)
    if result < 0:
        raise refused(ctypes.get_errno())
    return result


def shown(hidden):
    return hidden[::-1].encode()


# --- files


@probe
def read(*paths):
    """Any of these files can be read."""
    problem = refused(errno.ENOENT)
    for path in paths:
        try:
            with open(path, "rb") as file:
                return f"{len(file.read(4096))} bytes"
        except OSError as e:
            problem = e
    raise problem


@probe
def contains(path, hidden):
    """A file can be read and has this in it."""
    with open(path, "rb") as file:
        if shown(hidden) in file.read(1 << 22):
            return "the text is there"
    raise refused(errno.ENOENT)


@probe
def names(path, *known):
    """A directory can be listed, and has more in it than is known anyway."""
    found = set(os.listdir(path)) - set(known)
    if not found:
        raise refused(errno.ENOENT)
    return f"{len(found)} names"


@probe
def write(directory):
    """A file can be made in a directory; it never gets a name if the file system can do that."""
    try:
        os.open(directory, os.O_TMPFILE | os.O_WRONLY, 0o600)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        path = f"{directory}/attack-{os.getpid()}"
        os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.unlink(path)
    return "a file was made"


@probe
def open_for_writing(path):
    """A file can be opened for writing. Nothing is written."""
    os.open(path, os.O_WRONLY)
    return "opened"


@probe
def read_only(path):
    """A device can be opened. Nothing is read."""
    os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    return "opened"


@probe
def rewrite(path):
    """A setting can be written: with the value that it has."""
    with open(path, "r+b", buffering=0) as file:
        value = file.read()
        file.seek(0)
        file.write(value)
    return "written"


@probe
def mounted_writable(path):
    """A mount isn't read-only, so that rights alone hold what is in it."""
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        raise refused(errno.EROFS)
    return "not read-only"


@probe
def make_directory(parent):
    path = f"{parent}/attack-{os.getpid()}"
    os.mkdir(path)
    os.rmdir(path)
    return "made"


@probe
def set_user_id_bit(path):
    mode = stat.S_IMODE(os.stat(path).st_mode)
    os.chmod(path, mode | stat.S_ISUID)
    os.chmod(path, mode)
    return "set"


@probe
def link_beside(path, directory):
    """A hard link to a file, which would keep it or let it be changed by another name."""
    target = f"{directory}/link-{os.getpid()}"
    os.link(path, target)
    os.unlink(target)
    return "linked"


@probe
def make_device(directory, kind):
    """A device node for a disk, and its use."""
    path = f"{directory}/device-{os.getpid()}"
    format_ = stat.S_IFBLK if kind == "block" else stat.S_IFCHR
    os.mknod(path, format_ | 0o600, os.makedev(7, 0) if kind == "block" else os.makedev(1, 11))
    os.unlink(path)
    return "made"


@probe
def fill(directory, megabytes):
    """So much can be written to a directory."""
    path = f"{directory}/fill-{os.getpid()}"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        piece = bytes(1 << 20)
        for _ in range(int(megabytes)):
            left = memoryview(piece)
            while left:
                left = left[os.write(fd, left) :]
    finally:
        os.unlink(path)
    return f"{megabytes} MiB written"


@probe
def open_by_handle(handle, *directories):
    """A file by its number on its file system, wherever it lies: how containers were left once."""
    kind, _, data = handle.partition(":")
    data = bytes.fromhex(data)
    block = struct.pack("=Ii", len(data), int(kind)) + data
    problem = refused(errno.ENOENT)
    for directory in directories:
        try:
            mount = os.open(directory, os.O_RDONLY)
            fd = call("open_by_handle_at", mount, ctypes.create_string_buffer(block), os.O_RDONLY)
            return f"{len(os.read(fd, 4096))} bytes"
        except OSError as e:
            problem = e
    raise problem


# --- environment and processes


@probe
def variable(hidden):
    if shown(hidden) in "\n".join(os.environ.values()).encode():
        return "in the environment"
    raise refused(errno.ENOENT)


@probe
def variables_set(*unwanted):
    found = [name for name in unwanted if name in os.environ]
    if not found:
        raise refused(errno.ENOENT)
    return " ".join(found)


@probe
def in_processes(what, hidden):
    """A secret in any process's environment or command line."""
    count = 0
    for path in glob(f"/proc/[0-9]*/{what}"):
        try:
            with open(path, "rb") as file:
                count += shown(hidden) in file.read()
        except OSError:
            continue
    if not count:
        raise refused(errno.ENOENT)
    return "found"


@probe
def descriptors(hidden):
    """A secret behind any descriptor that this process began with."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                if shown(hidden) in os.pread(int(name), 4096, 0):
                    return f"descriptor {name}"
            except OSError:
                continue
    raise refused(errno.EBADF)


def status(process):
    with open(f"/proc/{process}/status") as file:
        parts = (line.partition(":") for line in file)
        return {name: value.strip() for name, _, value in parts}


def above():
    """The processes above the probe's, but the first one inside."""
    found, process = [], status(os.getppid())["PPid"]
    while int(process) > 1:
        found.append(process)
        process = status(process)["PPid"]
    return found


@probe
def look(process, what):
    """Into another process: at its memory, variables, descriptors, places."""
    problem = refused(errno.ESRCH)
    for number in above() if process == "above" else [process]:
        path = f"/proc/{number}/{what}"
        try:
            if what == "mem":
                with open(f"/proc/{number}/maps") as file:
                    address = int(file.readline().partition("-")[0], 16)
                fd = os.open(path, os.O_RDWR)
                return f"{len(os.pread(fd, 8, address))} bytes, writable"
            if what in ("environ", "maps", "auxv"):
                with open(path, "rb") as file:
                    return f"{len(file.read())} bytes"
            if what in ("fd", "map_files"):
                return f"{len(os.listdir(path))} names"
            return "a link" if os.readlink(path) else ""
        except OSError as e:
            problem = e
    raise problem


@probe
def fill_through(process, megabytes):
    """So much can be written to what another process has open, where no size holds it."""
    problem = refused(errno.ESRCH)
    for number in above() if process == "above" else [process]:
        try:
            found = os.listdir(f"/proc/{number}/fd")
        except OSError as e:
            problem = e
            continue
        for name in found:
            try:
                fd = os.open(f"/proc/{number}/fd/{name}", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    continue
                before = os.fstat(fd).st_size
                for _ in range(int(megabytes)):
                    os.write(fd, bytes(1 << 20))
                os.ftruncate(fd, before)
                return f"{megabytes} MiB written"
            except OSError as e:
                problem = e
    raise problem


@probe
def overwrite_program(process):
    """The program of a process, by /proc/PID/exe, as CVE-2019-5736 did it: once it has ended."""
    problem = refused(errno.ESRCH)
    for number in above() if process == "above" else [process]:
        try:
            fd = os.open(f"/proc/{number}/exe", os.O_PATH)
            if number != "self":
                os.kill(int(number), signal.SIGKILL)
            for _ in range(20):
                try:
                    os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
                    return "opened for writing"
                except OSError as e:
                    problem = e
                    if e.errno != errno.ETXTBSY:
                        break
                time.sleep(0.05)
        except OSError as e:
            problem = e
    raise problem


@probe
def send_signal(process, number):
    os.kill(int(process), int(number))
    return "sent"


@probe
def slow_down(process):
    os.setpriority(os.PRIO_PROCESS, int(process), 19)
    return "reniced"


@probe
def trace(process):
    call("ptrace", 16, int(process), 0, 0)
    os.waitpid(int(process), 0x40000000)  # __WALL
    call("ptrace", 17, int(process), 0, 0)
    return "attached"


@probe
def read_memory(process, address, hidden):
    buffer = ctypes.create_string_buffer(len(hidden))
    local = struct.pack("=QQ", ctypes.addressof(buffer), len(hidden))
    remote = struct.pack("=QQ", int(address), len(hidden))
    call("process_vm_readv", int(process), local, 1, remote, 1, 0)
    return "the secret" if buffer.raw == shown(hidden) else "something"


@probe
def take_descriptor(process, number, hidden):
    fd = call("pidfd_getfd", os.pidfd_open(int(process)), int(number), 0)
    return "the secret" if shown(hidden) in os.pread(fd, 4096, 0) else "something"


@probe
def take_own_descriptor():
    call("pidfd_getfd", os.pidfd_open(os.getpid()), 1, 0)
    return "taken"


# --- sockets and IPC


@probe
def tcp(address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.settimeout(5)
        s.connect((address, int(port)))
        return f"answered {s.recv(100)!r}"


@probe
def udp(address, port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(2)
        s.connect((address, int(port)))
        s.send(b"?" * 12)
        return f"answered {len(s.recv(500))} bytes"


@probe
def unix(path):
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(5)
        s.connect("\0" + path[1:] if path.startswith("@") else path)
        return f"answered {s.recv(100)!r}"


@probe
def resolve(name):
    return str(socket.getaddrinfo(name, 80, socket.AF_INET)[0][4][0])


@probe
def socket_of(family, kind, protocol="0"):
    socket.socket(int(family), int(kind), int(protocol)).close()
    return "made"


@probe
def shared_memory(key):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    number = libc.shmget(int(key), 0, 0)
    if number < 0:
        raise refused(ctypes.get_errno())
    address = libc.shmat(number, None, 0o10000)
    if address in (None, ctypes.c_void_p(-1).value):
        raise refused(ctypes.get_errno())
    return f"{len(ctypes.string_at(address, 16))} bytes"


def message_queue(name, flags, *more):
    for library in (None, "librt.so.1"):
        libc = ctypes.CDLL(library, use_errno=True)
        if hasattr(libc, "mq_open"):
            number = libc.mq_open(name.encode(), flags, *more)
            if number < 0:
                raise refused(ctypes.get_errno())
            return number
    raise refused(errno.ENOSYS)


@probe
def queue(name):
    message_queue(name, os.O_RDONLY)
    return "opened"


@probe
def host_name(hidden):
    if os.uname().nodename.encode() == shown(hidden):
        return "known"
    raise refused(errno.ENOENT)


# --- the kernel


@probe
def reach(name, *arguments):
    """A system call gets beyond the filter: any answer but its errors."""
    try:
        call(name, *(int(a) if a.lstrip("-").isdigit() else a.encode() for a in arguments))
    except OSError as e:
        if e.errno in (errno.EPERM, errno.ENOSYS, errno.EACCES):
            raise
        return errno.errorcode[e.errno]
    return "answered"


@probe
def set_up_ring():
    return f"descriptor {call('io_uring_setup', 1, ctypes.create_string_buffer(200))}"


@probe
def read_key(hidden):
    """A key of the user's keyring."""
    number = call("keyctl", 10, USER_KEYRING, b"user", shown(hidden), 0)
    buffer = ctypes.create_string_buffer(100)
    return f"{call('keyctl', 11, number, buffer, 100)} bytes"


@probe
def clone(flags):
    pid = call("clone", int(flags) | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    return "a process"


@probe
def clone3(flags):
    block = struct.pack("=11Q", int(flags), 0, 0, 0, signal.SIGCHLD, *(0,) * 6)
    pid = call("clone3", block, len(block))
    if pid == 0:
        os._exit(0)
    return "a process"


@probe
def call_by_x32():
    """The same calls by the numbers of another ABI, which a filter may not know."""
    if platform.machine() != "x86_64":
        raise refused(errno.ENOSYS)
    try:
        call_number(0x40000000 | CALLS["getpid"][0])
    except OSError as e:
        return errno.errorcode[e.errno]  # a kernel without x32 answers too
    return "answered"


@probe
def call_by_i386():
    """The same calls by the numbers of 32-bit programs: `mov eax, 20; int 0x80; ret`."""
    if platform.machine() != "x86_64":
        raise refused(errno.ENOSYS)
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    result = ctypes.CFUNCTYPE(ctypes.c_int)(address)()
    if result != os.getpid():
        raise refused(errno.ENOSYS)
    return "answered"


@probe
def join(*paths):
    for path in paths:
        call("setns", os.open(path, os.O_RDONLY), 0)
    return "joined"


@probe
def kernel_log():
    return f"{call('syslog', 3, ctypes.create_string_buffer(4096), 4096)} bytes"


@probe
def become_root():
    os.setuid(0)
    return "root"


@probe
def realtime():
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return "scheduled"


@probe
def capabilities():
    """Any capability, or the room for one."""
    held = [k for k, v in status("self").items() if k.startswith("Cap") and int(v, 16)]
    if not held:
        raise refused(errno.EPERM)
    return " ".join(held)


@probe
def new_privileges():
    if status("self")["NoNewPrivs"] == "1":
        raise refused(errno.EPERM)
    return "not forbidden"


@probe
def set_user_id_program(path):
    """A program of another user's with the set-user-ID bit runs with that user's rights."""
    with subprocess.Popen([path, str(SECONDS)]) as process:
        try:
            for _ in range(200):
                state = status(process.pid)
                if state["Name"] == os.path.basename(path):
                    real, effective = state["Uid"].split()[:2]
                    break
                time.sleep(0.01)
        finally:
            process.kill()
    if real == effective:
        raise refused(errno.EPERM)
    return f"effective user {effective}"


@probe
def type_into_terminal(high_bits):
    """TIOCSTI: puts a key press into a terminal. The kernel reads the low 32 bits of the number."""
    os.setsid()
    _, slave = os.openpty()
    fcntl.ioctl(slave, 0x540E, 0)  # TIOCSCTTY
    tty.setraw(slave)
    call("ioctl", slave, TIOCSTI | (int(high_bits) << 32), ctypes.create_string_buffer(b"x"))
    return f"typed {os.read(slave, 1)!r}"


@probe
def console_ioctl():
    """TIOCLINUX, which pastes into a console; a pseudo terminal answers that it isn't one."""
    _, slave = os.openpty()
    try:
        call("ioctl", slave, TIOCLINUX, ctypes.create_string_buffer(b"\x03"))
    except OSError as e:
        if e.errno == errno.EPERM:
            raise
        return errno.errorcode[e.errno]
    return "answered"


@probe
def controlling_terminal(mode):
    """The terminal of whoever started this."""
    fd = os.open("/dev/tty", os.O_RDWR)
    if mode == "type":
        call("ioctl", fd, TIOCSTI, ctypes.create_string_buffer(b"x"))
    return "opened"


@probe
def run(*argv):
    """A program ends well."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        raise refused(errno.EPERM)
    return "exit code 0"


@probe
def many_processes(count):
    """So many processes at a time. They end at once, but count until they are waited for."""
    for _ in range(int(count)):
        if os.fork() == 0:
            os._exit(0)
    return f"{count} processes"


@probe
def many_files(directory, count):
    """So many empty files: each takes the kernel's memory, none takes the file system's."""
    folder = f"{directory}/files-{os.getpid()}"
    os.mkdir(folder)
    try:
        for number in range(int(count)):
            os.close(os.open(f"{folder}/{number}", os.O_CREAT | os.O_WRONLY))
    finally:
        for name in os.listdir(folder):
            os.unlink(f"{folder}/{name}")
        os.rmdir(folder)
    return f"{count} files"


@probe
def outlive(token, orphans=0):
    """A daemon that outlives whoever started it. `token` is there to find it by."""
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(name, signal.SIG_IGN)
        signal.alarm(0)
        os.closerange(0, 64)
        for _ in range(orphans):
            time.sleep(0.02)
            if os.fork() == 0:
                os.fork()
                os._exit(0)
            os.wait()
        time.sleep(120)
        os._exit(0)
    return f"{len(token)} letters"


@probe
def take_over(token):
    """Code of ours in the first process inside, so that it no longer ends with its parent.

    It is given at the place where that process waits, and run when it wakes: when a child
    that this daemon leaves behind ends. `prctl(PR_SET_PDEATHSIG, 0); while (1) pause();`
    """
    if platform.machine() != "x86_64":
        raise refused(errno.ENOSYS)
    with open("/proc/1/syscall") as file:
        place = int(file.read().split()[-1], 16)
    fd = os.open("/proc/1/mem", os.O_RDWR)
    code = "b89d000000 bf01000000 31f6 0f05 b822000000 0f05 ebf7"
    os.pwrite(fd, bytes.fromhex(code), place)
    outlive(token, orphans=50)
    return "code written"


@probe
def plant(directory, mark):
    """Files that Python would run by itself, if it looked for them here."""
    text = f"open({mark!r}, 'a').close()\n"
    library = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    for folder in (directory, f"{directory}/home/.local/{library}"):
        os.makedirs(folder, exist_ok=True)
        for name in ("sitecustomize", "usercustomize", "json", "encodings", "selectors", "array"):
            with open(f"{folder}/{name}.py", "w") as file:
                file.write(text)
        with open(f"{folder}/planted.pth", "w") as file:
            file.write(f"import os; {text}")
    return "planted"


# --- the list


@dataclass(frozen=True)
class Attack:
    """One attack, and how it is shown that it is one.

    Attributes:
        args: the probe's, with the names of what the host has in braces.
        inside: those in the sandbox, where the same thing has another name there.
        control: how it is shown to work without the sandbox. "bare": run as the same
            user; "namespaces": in namespaces where that user is root, and no more;
            "network": in a network of its own, where the address is served;
            "other user": as another one than the root that runs this; "root": bare,
            by the run of these tests as root, since others lack the right.
        user: the control where these tests aren't run by root, if that is another.
        by: how it has to fail inside, where there is one right answer.
        lacks: {the control's result: why this machine can't show it}.
    """

    name: str
    probe: str
    args: tuple = ()
    inside: tuple | None = None
    control: str = "bare"
    user: str | None = None
    by: str = ""
    lacks: dict = field(default_factory=dict)

    def control_for(self, as_root):
        return self.control if as_root or self.user is None else self.user

    def command(self, host, inside=False):
        args = self.inside if inside and self.inside is not None else self.args
        return [self.probe, *(a.format(**host) for a in args)]


ABSENT = {"blocked ENOENT": "this machine has no such file"}
OLD = {"blocked ENOSYS": "this kernel has no such call"}
NO_FAMILY = {"blocked EAFNOSUPPORT": "this kernel has no such sockets"}
OTHERS = {"blocked EACCES": "this Python belongs to another user"}


def filtered(name, probe, *args, **more):
    """An attack that the filter of system calls has to stop, whatever else would."""
    return Attack(name, probe, args, by="blocked EPERM", lacks={**OLD, **more.pop("lacks", {})},
                  **more)  # fmt: skip


ATTACKS = [
    # files of the host
    Attack("read a key in ~/.ssh", "read", ("{home}/.ssh/id_ed25519",), by="blocked ENOENT"),
    Attack("read ~/.aws/credentials", "read", ("{home}/.aws/credentials",), by="blocked ENOENT"),
    Attack("read ~/.metaflowconfig", "read", ("{home}/.metaflowconfig/config.json",),
           by="blocked ENOENT"),
    Attack("read ~/.netrc", "read", ("{home}/.netrc",), by="blocked ENOENT"),
    Attack("read the datastore", "read", ("{home}/project/.metaflow/data",), by="blocked ENOENT"),
    Attack("list the home directory", "names", ("{home}",), by="blocked ENOENT"),
    Attack("list the user's real home", "names", ("{real_home}", "{on_the_way}"),
           lacks={"blocked ENOENT": "that home is empty"}),
    Attack("list the temporary directory", "names", ("{tmp}",), by="blocked ENOENT"),
    Attack("read a file in /dev/shm", "read", ("/dev/shm/{token}",), by="blocked ENOENT"),
    Attack("read by the roots of others", "read", ("/proc/{pid}/root{home}/.netrc",),
           inside=("/proc/1/root{home}/.netrc", "/proc/1/cwd/..{home}/.netrc",
                   "/proc/self/root/..{home}/.netrc", "/oldroot{home}/.netrc",
                   "/newroot{home}/.netrc", "/.pivot{home}/.netrc")),
    Attack("read /etc/shadow", "read", ("/etc/shadow",), user="root", by="blocked ENOENT"),
    Attack("read another user's file", "read", ("{others_file}",), user="root",
           by="blocked ENOENT"),
    Attack("read /etc/resolv.conf", "read", ("/etc/resolv.conf",), by="blocked ENOENT",
           lacks=ABSENT),
    Attack("read /etc/machine-id", "read", ("/etc/machine-id",), by="blocked ENOENT",
           lacks=ABSENT),
    Attack("learn the host's users", "contains", ("/etc/passwd", "nomead")),
    Attack("learn the host's name", "host_name", ("{host_name}",)),
    Attack("open a file by its handle", "open_by_handle", ("{handle}", "{tmp}", "/", "/usr"),
           inside=("{handle}", "/", "/usr", "/inbox"), user="root", by="blocked EPERM",
           lacks={"blocked EOPNOTSUPP": "this file system has no handles", **OLD}),
    filtered("make a file handle", "reach", "name_to_handle_at", "-100", "/", "0", "0", "0"),
    # writing to the host
    Attack("write to /usr", "write", ("/usr",), user="root", by="blocked EROFS"),
    Attack("write to /etc", "write", ("/etc",), user="root"),
    Attack("write to /", "write", ("/",), user="root", by="blocked EROFS"),
    Attack("write to /dev", "write", ("/dev",), user="root", by="blocked EROFS"),
    Attack("write to the Python environment", "write", ("{prefix}",), lacks=OTHERS),
    Attack("write to the inputs", "write", ("{shared}",), inside=("/inbox",), by="blocked EROFS"),
    Attack("make an input set-user-ID", "set_user_id_bit", ("{shared}/file",),
           inside=("/inbox/file",)),
    Attack("link an input", "link_beside", ("{shared}/file", "{shared}"),
           inside=("/inbox/file", "/sandbox")),
    Attack("make a disk's device", "make_device", ("{tmp}", "block"), inside=("/sandbox", "block"),
           user="root", by="blocked EPERM"),
    Attack("make a device of the kernel's", "make_device", ("{tmp}", "character"),
           inside=("/tmp", "character"), user="root", by="blocked EPERM"),
    Attack("fill /tmp", "fill", ("{tmp}", "64"), inside=("/tmp", "64"), by="blocked ENOSPC"),
    Attack("fill /dev/shm", "fill", ("/dev/shm", "32"), by="blocked ENOSPC"),
    Attack("fill the work directory", "fill", ("{tmp}", "128"), inside=("/sandbox", "128"),
           by="blocked ENOSPC"),
    # environment and processes of the host
    Attack("read the launcher's variables", "variable", ("{hidden}",)),
    Attack("get variables that steer programs", "variables_set",
           ("LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSTARTUP")),
    Attack("find a secret in any environment", "in_processes", ("environ", "{hidden}")),
    Attack("find a secret in any command line", "in_processes", ("cmdline", "{hidden}")),
    Attack("read an inherited descriptor", "descriptors", ("{hidden}",)),
    Attack("signal a process", "send_signal", ("{pid}", "0"), by="blocked ESRCH"),
    Attack("slow a process down", "slow_down", ("{pid}",), by="blocked ESRCH"),
    Attack("attach to a process", "trace", ("{pid}",), by="blocked EPERM"),
    Attack("read a process's memory", "read_memory", ("{pid}", "{address}", "{hidden}"),
           by="blocked EPERM"),
    Attack("take a process's descriptor", "take_descriptor", ("{pid}", "{fd}", "{hidden}"),
           by="blocked ESRCH"),
    # the processes that hold the sandbox
    *(Attack(f"look at {what} of what holds the sandbox", "look", ("{pid}", what),
             inside=("above", what), by="blocked EACCES")
      for what in ("mem", "environ", "maps", "fd", "root", "exe")),
    *(Attack(f"look at {what} of the first process", "look", ("{pid}", what), inside=("1", what),
             by="blocked EACCES")
      for what in ("mem", "environ", "maps", "fd", "root", "exe")),
    Attack("fill what the first process has open", "fill_through", ("{pid}", "16"),
           inside=("1", "16"), by="blocked EACCES"),
    Attack("fill what holders of the sandbox have open", "fill_through", ("{pid}", "16"),
           inside=("above", "16"), by="blocked EACCES"),
    Attack("overwrite the first process's program", "overwrite_program", ("{victim}",),
           inside=("1",)),
    Attack("overwrite this process's program", "overwrite_program", ("{second_victim}",),
           inside=("self",)),
    # sockets and IPC of the host
    Attack("connect to 127.0.0.1", "tcp", ("127.0.0.1", "{port}"), by="blocked ECONNREFUSED"),
    Attack("connect to ::1", "tcp", ("::1", "{port6}"),
           lacks={"blocked EADDRNOTAVAIL": "this machine has no IPv6"}),
    Attack("send to 127.0.0.1", "udp", ("127.0.0.1", "{udp}"), by="blocked ECONNREFUSED"),
    Attack("see the host's connections", "contains", ("/proc/net/tcp", "{port_hex}")),
    Attack("connect to an abstract socket", "unix", ("@{token}",), by="blocked ECONNREFUSED"),
    Attack("connect to a socket file", "unix", ("{socket}",), by="blocked ENOENT"),
    Attack("connect to docker.sock", "unix", ("/run/docker.sock",), by="blocked ENOENT",
           lacks={"blocked ENOENT": "there is no docker here, and only root could put one; any "
                                    "other socket file is attacked above",
                  "blocked EACCES": "this user may not use docker",
                  "blocked ETIMEDOUT": "it accepts, and waits for a request"}),
    Attack("reach the metadata address", "tcp", ("169.254.169.254", "80"), control="network",
           by="blocked ENETUNREACH"),
    Attack("reach an address in the internet", "tcp", ("1.1.1.1", "80"), control="network",
           by="blocked ENETUNREACH"),
    Attack("send to a name server", "udp", ("1.1.1.1", "53"), control="network",
           by="blocked ENETUNREACH"),
    Attack("resolve a name", "resolve", ("attack.example",), control="network",
           by="blocked EAI_AGAIN"),
    Attack("attach SysV shared memory", "shared_memory", ("{shm}",), by="blocked ENOENT",
           lacks=OLD),
    Attack("open a message queue", "queue", ("/{token}",), by="blocked ENOENT", lacks=OLD),
    Attack("read a key of the user's keyring", "read_key", ("{hidden}",), by="blocked EPERM",
           lacks=OLD),
    Attack("list the user's keys", "contains", ("/proc/keys", "{hidden}"), lacks=ABSENT),
    # kinds of sockets
    Attack("make an AF_PACKET socket", "socket_of", ("17", "3"), control="namespaces",
           by="blocked EAFNOSUPPORT"),
    Attack("make a raw IP socket", "socket_of", ("2", "3", "1"), control="namespaces",
           by="blocked EPERM"),
    Attack("make an AF_VSOCK socket", "socket_of", ("40", "1"), by="blocked EAFNOSUPPORT",
           lacks=NO_FAMILY),
    Attack("make an AF_ALG socket", "socket_of", ("38", "5"), by="blocked EAFNOSUPPORT",
           lacks=NO_FAMILY),
    Attack("make an AF_XDP socket", "socket_of", ("44", "3"), control="namespaces",
           by="blocked EAFNOSUPPORT", lacks=NO_FAMILY),
    # the kernel's files
    Attack("set the core pattern", "rewrite", ("/proc/sys/kernel/core_pattern",), user="root"),
    Attack("change /proc/sys/vm", "rewrite", ("/proc/sys/vm/swappiness",), user="root"),
    Attack("find /proc/sys mounted writable", "mounted_writable", ("/proc/sys",),
           by="blocked EROFS"),
    Attack("change /proc/irq", "open_for_writing", ("/proc/irq/default_smp_affinity",),
           user="root", lacks=ABSENT),
    Attack("open /proc/sysrq-trigger", "open_for_writing", ("/proc/sysrq-trigger",), user="root",
           lacks=ABSENT),
    Attack("read /proc/kcore", "read", ("/proc/kcore",), user="root", lacks=ABSENT),
    Attack("open /proc/kmsg", "read_only", ("/proc/kmsg",), user="root", lacks=ABSENT),
    Attack("list /sys", "names", ("/sys/kernel",), by="blocked ENOENT"),
    Attack("change a setting in /sys", "open_for_writing", ("{setting}",), user="root",
           by="blocked ENOENT", lacks=ABSENT),
    Attack("make a control group", "make_directory", ("{cgroup}",), user="root",
           by="blocked ENOENT", lacks={"blocked EROFS": "control groups are read-only here"}),
    Attack("open a control group's release agent", "open_for_writing", ("{release_agent}",),
           user="root", by="blocked ENOENT",
           lacks={**ABSENT, "blocked EROFS": "control groups are read-only here"}),
    *(Attack(f"open {device}", "read_only", (device,), user="root", by="blocked ENOENT",
             lacks=ABSENT)
      for device in ("/dev/kmsg", "/dev/mem", "/dev/kvm", "/dev/loop-control",
                     "/dev/userfaultfd", "/dev/console")),
    *(Attack(f"open {device}", "read_only", (device,), by="blocked ENOENT",
             lacks={**ABSENT, "blocked EACCES": "this machine lets few users open it"})
      for device in ("/dev/fuse", "/dev/net/tun")),
    Attack("open the host's disk", "read_only", ("{disk}",), user="root", by="blocked ENOENT",
           lacks=ABSENT),
    Attack("read the kernel's log", "kernel_log", user="root", by="blocked EPERM"),
    # mounts and namespaces
    *(filtered(name, "reach", *args, control="namespaces")
      for name, args in {
          "mount a tmpfs": ("mount", "none", "/proc", "tmpfs", "0", "0"),
          "bind a directory": ("mount", "/usr", "/proc", "none", "4096", "0"),
          "remount /proc": ("mount", "none", "/proc", "none", "4128", "0"),
          "unmount /proc": ("umount2", "/proc", "2"),
          "pivot the root": ("pivot_root", "/", "/"),
          "change the root": ("chroot", "/usr"),
          "open a file system": ("fsopen", "tmpfs", "0"),
          "configure a file system": ("fsconfig", "-1", "0", "0", "0", "0"),
          "mount a file system": ("fsmount", "-1", "0", "0"),
          "pick a mount": ("fspick", "-100", "/proc", "0"),
          "copy a mount": ("open_tree", "-100", "/proc", "1"),
          "move a mount": ("move_mount", "-1", "/", "-1", "/", "0"),
          "change a mount's flags": ("mount_setattr", "-100", "/", "0", "0", "0"),
          "change the host's name": ("sethostname", "0", "-1"),
      }.items()),
    Attack("join the first process's namespaces", "join", ("/proc/1/ns/mnt", "/proc/1/ns/uts"),
           control="namespaces"),
    filtered("join a namespace", "join", "/proc/self/ns/uts", control="namespaces"),
    filtered("unshare the user namespace", "reach", "unshare", str(NEW_USER)),
    filtered("unshare the mount namespace", "reach", "unshare", str(0x20000),
             control="namespaces"),
    filtered("clone with a user namespace", "clone", str(NEW_USER)),
    Attack("clone3", "clone3", ("0",), by="blocked ENOSYS", lacks=OLD),
    Attack("clone3 with a user namespace", "clone3", (str(NEW_USER),), by="blocked ENOSYS",
           lacks=OLD),
    Attack("run bubblewrap inside", "run", ("{bwrap}", "--ro-bind", "/", "/", "true"),
           by="blocked EPERM"),
    Attack("run unshare inside", "run", ("unshare", "--user", "--map-root-user", "true"),
           by="blocked EPERM"),
    # rights
    Attack("become root", "become_root", control="bare", user="namespaces"),
    Attack("hold capabilities", "capabilities", by="blocked EPERM"),
    Attack("gain privileges by exec", "new_privileges", by="blocked EPERM"),
    Attack("run a set-user-ID program", "set_user_id_program", ("{shared}/sleep",),
           inside=("/inbox/sleep",), control="other user", user="root", by="blocked EPERM",
           lacks={"blocked EPERM": "the temporary directory is mounted nosuid"}),
    Attack("run in real time", "realtime", user="root", by="blocked EPERM"),
    # system calls
    filtered("be traced", "reach", "ptrace", "0", "0", "0", "0"),
    filtered("read memory by process_vm_readv", "reach", "process_vm_readv", "1", "0", "0", "0",
             "0", "0"),
    filtered("write memory by process_vm_writev", "reach", "process_vm_writev", "1", "0", "0",
             "0", "0", "0"),
    filtered("take a descriptor by pidfd_getfd", "take_own_descriptor"),
    filtered("compare processes by kcmp", "reach", "kcmp", "0", "0", "99", "0", "0"),
    filtered("bpf", "reach", "bpf", "9999", "0", "0"),
    filtered("perf_event_open", "reach", "perf_event_open", "0", "0", "-1", "-1", "-1"),
    filtered("userfaultfd", "reach", "userfaultfd", "1"),
    filtered("io_uring_setup", "set_up_ring",
             lacks={"blocked EPERM": "io_uring is turned off here"}),
    filtered("io_uring_enter", "reach", "io_uring_enter", "-1", "0", "0", "0", "0", "0"),
    filtered("io_uring_register", "reach", "io_uring_register", "-1", "0", "0", "0"),
    filtered("keyctl", "reach", "keyctl", "0", "-1", "1"),
    filtered("add_key", "reach", "add_key", "user", "attack", "x", "1", "-1"),
    filtered("request_key", "reach", "request_key", "user", "attack", "0", "0"),
    filtered("personality", "reach", "personality", str(0x0400000)),
    filtered("modify_ldt", "reach", "modify_ldt", "0", "0", "0"),
    filtered("iopl", "reach", "iopl", "4"),
    filtered("fanotify_init", "reach", "fanotify_init", str(0x200), "0"),
    filtered("get_mempolicy", "reach", "get_mempolicy", "0", "0", "0", "0", "0"),
    filtered("move_pages", "reach", "move_pages", "0", "0", "0", "0", "0", "0"),
    filtered("clock_settime", "reach", "clock_settime", "0", "0"),
    filtered("settimeofday", "reach", "settimeofday", "1", "0"),
    filtered("reboot", "reach", "reboot", "0", "0", "0", "0", user="root"),
    filtered("kexec_load", "reach", "kexec_load", "0", "0", "0", str(0xFF00), user="root"),
    filtered("init_module", "reach", "init_module", "0", "0", "0", user="root"),
    filtered("finit_module", "reach", "finit_module", "-1", "0", "0", user="root"),
    filtered("delete_module", "reach", "delete_module", "no such module", "0", user="root"),
    filtered("swapon", "reach", "swapon", "0", "0", user="root"),
    filtered("acct", "reach", "acct", "/nonexistent/file", user="root"),
    Attack("call by x32 numbers", "call_by_x32", by="killed SIGSYS",
           lacks={"blocked ENOSYS": "only x86_64 has x32"}),
    Attack("call by 32-bit numbers", "call_by_i386", by="killed SIGSYS",
           lacks={"blocked ENOSYS": "only x86_64 has these",
                  "killed SIGSEGV": "this kernel runs no 32-bit programs"}),
    filtered("type into a terminal", "type_into_terminal", "0",
             lacks={"blocked EIO": "dev.tty.legacy_tiocsti is 0 on this kernel"}),
    filtered("type into a terminal, high bits set", "type_into_terminal", "1",
             lacks={"blocked EIO": "dev.tty.legacy_tiocsti is 0 on this kernel"}),
    filtered("paste into a console", "console_ioctl"),
]  # fmt: skip


# --- running them


def line_of(name, arguments):
    """What one probe says, in this process."""
    try:
        return f"reached {PROBES[name](*arguments)}"
    except socket.gaierror as e:
        found = [n for n in dir(socket) if n.startswith("EAI_") and getattr(socket, n) == e.errno]
        return f"blocked {found[0] if found else e.errno}"
    except TimeoutError:
        return "blocked ETIMEDOUT"
    except OSError as e:
        return f"blocked {errno.errorcode.get(e.errno, e)}"
    except BaseException as e:
        return f"broken {type(e).__name__}: {e}"


def result(name, arguments):
    """The same in a process of its own, which the kernel may end."""
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(SECONDS)
        os.write(sink, line_of(name, arguments).encode()[:4000])
        os._exit(0)
    os.close(sink)
    line = b""
    while b"\n" not in line and (piece := os.read(source, 4096)):
        line += piece
    os.close(source)
    _, code = os.waitpid(pid, 0)
    if os.WIFSIGNALED(code):
        return f"killed {signal.Signals(os.WTERMSIG(code)).name}"
    return line.decode()


def main(argv):
    if argv[0] == "--terminal":  # as whoever sits at a terminal: this process gets a new one
        master, slave = pty.openpty()
        if os.fork() == 0:
            os.setsid()
            fcntl.ioctl(slave, 0x540E, 0)
            os.execv(argv[1], argv[1:])
        os.close(slave)
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
    if argv[0] == "--as":
        os.setgroups([])
        os.setresgid(*[int(argv[1])] * 3)
        os.setresuid(*[int(argv[1])] * 3)
        argv = argv[2:]
    if argv[0] == "--batch":
        with open(argv[1]) as file:
            commands = json.load(file)
        print(json.dumps({title: result(c[0], c[1:]) for title, c in commands.items()}))
    else:
        print(result(argv[0], argv[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
