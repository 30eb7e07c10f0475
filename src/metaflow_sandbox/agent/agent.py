"""The one program that is sent into a sandbox: runs a step there and reports what became of it.

    agent.py run ATTEMPT CODE WORK            frames on stdout, until the step ended
    agent.py start ATTEMPT CODE WORK SPOOL    the same, detached; frames go to SPOOL, and from
                                              there to stdout. It is begun once, however often
                                              this is called
    agent.py follow SPOOL SEQ                 frames after SEQ from SPOOL, on stdout

ATTEMPT holds `job.json`, `input-paths` and `datastore/` (what the step may read);
CODE is the unpacked code package; WORK is writable and empty. All of them come
from the launcher. The agent shares the step's user, so the launcher trusts
nothing that it says: deadlines, memory and death are judged from outside.

Standard library only, Python 3.8 and later, Linux: it runs on whatever the image has.

Frames are ASCII lines, since some providers' streams carry only text or whole lines:

    mfs1 SEQ KIND PAYLOAD CRC

SEQ counts from 1 (hex), KIND is `o` or `e` (output of the step, base64) or `x`
(the end: base64 of a JSON object), CRC is crc32 over the line before it (hex).
Whatever the step prints is payload, so it can't be mistaken for a frame.

A spool is a directory of numbered segments of whole frames. The reader writes the
SEQ that it has safely received into the file `ack`; segments that lie wholly
before it are deleted, and the step's output is not read on while more than
SPOOL_BYTES wait, so that a lost connection loses nothing and fills no disk.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import ctypes
import json
import os
import resource
import selectors
import shutil
import signal
import sys
import time

TYPE_CHECKING = False  # as type checkers know it, without the milliseconds of importing `typing`
if TYPE_CHECKING:
    from typing import Any, BinaryIO

MAGIC = b"mfs1"
CHUNK = 32 * 1024  # bytes of output a frame
SEGMENT_BYTES = 1 << 20
SPOOL_BYTES = 16 << 20
PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36
SUPERSEDED = 75  # the exit code of a follower whose place another took: ask again
KILL_SECONDS = 5.0  # how long leftovers are hunted before the agent reports


def encode_frame(seq: int, kind: bytes, payload: bytes) -> bytes:
    """One frame as a line of bytes; `payload` is raw bytes of any kind."""
    body = b"%s %x %s %s" % (MAGIC, seq, kind, base64.b64encode(payload))
    return b"%s %08x\n" % (body, binascii.crc32(body))


# --- where frames go ---------------------------------------------------------


class PipeSink:
    """Frames on a pipe that somebody reads all the time: back-pressure is the pipe's."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def write(self, seq: int, line: bytes) -> None:
        view = memoryview(line)
        while view:
            view = view[os.write(self.fd, view) :]

    def close(self) -> None:
        pass


class SpoolSink:
    """Frames in segments on disk, deleted as they are acknowledged."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        os.makedirs(directory, exist_ok=True)
        self.segments: list[list[Any]] = []  # [path, bytes, last seq], oldest first
        self.count = 0
        self.file: BinaryIO | None = None

    def write(self, seq: int, line: bytes) -> None:
        file = self.file
        if file is None or self.segments[-1][1] + len(line) > SEGMENT_BYTES:
            file = self._roll()
        file.write(line)
        file.flush()
        self.segments[-1][1] += len(line)
        self.segments[-1][2] = seq
        while sum(s[1] for s in self.segments) > SPOOL_BYTES and not self._drop_acknowledged():
            time.sleep(0.05)

    def _roll(self) -> BinaryIO:
        if self.file is not None:
            self.file.close()
            self._drop_acknowledged()
        self.count += 1
        path = os.path.join(self.directory, f"{self.count:016d}")
        self.file = open(path, "wb")  # noqa: SIM115 - open until the next one
        self.segments.append([path, 0, 0])
        return self.file

    def _drop_acknowledged(self) -> bool:
        try:
            with open(os.path.join(self.directory, "ack")) as f:
                acknowledged = int(f.read() or 0)
        except (OSError, ValueError):
            return False
        dropped = False
        while len(self.segments) > 1 and self.segments[0][2] <= acknowledged:
            os.unlink(self.segments.pop(0)[0])
            dropped = True
        return dropped

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        with open(os.path.join(self.directory, "end"), "w"):
            pass


def alive(directory: str) -> bool:
    """Whether the agent that fills a spool still runs; it may be killed by its step."""
    try:
        with open(os.path.join(directory, "pid")) as f, open(f"/proc/{int(f.read())}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"  # it may not be reaped
    except (OSError, ValueError):
        return False


def follow(directory: str, seq: int) -> bool:
    """Copies frames with a number above `seq` to stdout, until the spool has ended.

    Returns:
        False if another follower began meanwhile, as the line of this one dropped: a provider
        that keeps what commands print would keep all of it again for each.
    """
    me, reader = str(os.getpid()), os.path.join(directory, "reader")
    with open(reader, "w") as f:
        f.write(me)
    out = PipeSink(1)
    position = 0  # in the current segment
    current = ""
    while True:
        with contextlib.suppress(OSError), open(reader) as f:
            if f.read() != me:
                return False
        ended = os.path.exists(os.path.join(directory, "end")) or not alive(directory)
        progressed = False
        for name in sorted(n for n in os.listdir(directory) if n.isdigit()):
            if name < current:
                continue
            if name > current:
                current, position = name, 0
            try:
                with open(os.path.join(directory, name), "rb") as f:
                    f.seek(position)
                    data = f.read()
            except FileNotFoundError:  # acknowledged and deleted meanwhile
                continue
            data = data[: data.rfind(b"\n") + 1]  # whole frames only
            position += len(data)
            progressed = progressed or bool(data)
            for line in data.splitlines(True):
                if int(line.split(b" ", 2)[1], 16) > seq:
                    out.write(0, line)
        if ended and not progressed:
            return True
        if not progressed:
            time.sleep(0.02)


# --- the step ----------------------------------------------------------------


def link_tree(source: str, target: str) -> None:
    """Mirrors a read-only tree as a writable one whose files are links into it."""
    for folder, _, files in os.walk(source):
        mirrored = os.path.join(target, os.path.relpath(folder, source))
        os.makedirs(mirrored, exist_ok=True)
        for name in files:
            os.symlink(os.path.join(folder, name), os.path.join(mirrored, name))


def prepare(attempt: str, code: str, work: str) -> None:
    """Lays out WORK: a datastore, the user's files as the working directory, home and tmp."""
    for name in ("home", "tmp"):
        os.makedirs(os.path.join(work, name), exist_ok=True)
    link_tree(os.path.join(attempt, "datastore"), os.path.join(work, "datastore", ".metaflow"))
    # The step may write beside its own files, so these are copied; Metaflow
    # itself (.mf_code) is large and stays where it is.
    shutil.copytree(code, os.path.join(work, "flow"), ignore=shutil.ignore_patterns(".mf_code"))


def descendants(root: int) -> list[int]:
    """Process ids below `root`, by /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as f:
                    fields = f.read().rpartition(b")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(name))
    found, queue = [], [root]
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


def kill_descendants() -> None:
    """Ends whatever the step left behind, daemons that called setsid included."""
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        left = descendants(os.getpid())
        if not left:
            return
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
        reap()


def spawn(job: dict[str, Any], work: str) -> tuple[int, int, int]:
    """Starts the step: (pid, its stdout, its stderr)."""
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(out_write, 1)
            os.dup2(err_write, 2)
            os.closerange(3, 256)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            processes = job["limits"]["processes"]
            resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.chdir(os.path.join(work, "flow"))
            environment = {**os.environ, **job["env"]}
            os.execvpe(job["argv"][0], job["argv"], environment)
        except BaseException as e:
            os.write(2, f"the step could not be started: {e}\n".encode())
        finally:
            os._exit(127)
    os.close(out_write)
    os.close(err_write)
    return pid, out_read, err_read


class Reporter:
    """Numbers frames, and stops passing on output past the attempt's limit."""

    def __init__(self, sink: PipeSink | SpoolSink, output_bytes: int) -> None:
        self.sink = sink
        self.seq = 0
        self.left = output_bytes
        self.dropped = 0

    def frame(self, kind: bytes, payload: bytes) -> None:
        self.seq += 1
        self.sink.write(self.seq, encode_frame(self.seq, kind, payload))

    def output(self, kind: bytes, data: bytes) -> None:
        kept, lost = data[: self.left], len(data[self.left :])
        self.left -= len(kept)
        self.dropped += lost
        if kept:
            self.frame(kind, kept)


def run_step(job: dict[str, Any], work: str, reporter: Reporter) -> int:
    """Runs the step to its end and passes its output on. Returns its wait status."""
    woken, wake = os.pipe()
    for fd in (woken, wake):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    pid, out, err = spawn(job, work)
    selector = selectors.DefaultSelector()
    selector.register(out, selectors.EVENT_READ, b"o")
    selector.register(err, selectors.EVENT_READ, b"e")
    selector.register(woken, selectors.EVENT_READ, None)
    status: int | None = None
    quiet_at = None  # when the pipes are given up after the end
    while status is None or len(selector.get_map()) > 1:
        timeout = None if quiet_at is None else quiet_at - time.monotonic()
        if timeout is not None and timeout <= 0:
            break  # something survived and holds the pipes; it ends with the sandbox
        events = selector.select(timeout)
        for key, _ in events:
            if key.data is None:
                os.read(woken, 4096)
                continue
            data = os.read(key.fd, CHUNK)
            if data:
                reporter.output(key.data, data)
            else:
                selector.unregister(key.fd)
        if status is None:
            status = reap().get(pid)
            if status is not None:
                kill_descendants()  # else a daemon could hold the pipes open for ever
                quiet_at = time.monotonic() + 2.0
        else:
            reap()
    signal.set_wakeup_fd(-1)
    return status


# --- results -----------------------------------------------------------------


def collect(job: dict[str, Any], work: str) -> int:
    """Packs what the task recorded into WORK/outbox and returns its size in bytes.

    The archive is a sequence of entries: a line of JSON with `name` and `size`,
    then as many bytes. `data.json` comes first, then a `blob` for each key that
    was not among the inputs (with `sha` and `raw`), then each `card` (with `file`).
    A blob is deleted as soon as it is packed, so that no more space is needed
    than for the largest one.
    """
    task = job["task"]
    root = os.path.join(work, "datastore", ".metaflow")
    folder = os.path.join(root, task["flow"], task["run"], task["step"], task["task"])
    prefix = os.path.join(folder, f"{task['attempt']}.")
    # What the step may have put there is not followed, and a FIFO would block.
    outbox = os.open(
        os.path.join(work, "outbox"), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600
    )
    with os.fdopen(outbox, "wb") as archive:

        def add(path: str, **header: Any) -> None:
            with open(path, "rb") as f:
                header["size"] = os.fstat(f.fileno()).st_size
                archive.write(json.dumps(header).encode() + b"\n")
                shutil.copyfileobj(f, archive, 1 << 20)

        if os.path.exists(prefix + "DONE.lock"):
            add(prefix + "data.json", name="data.json")
            with open(prefix + "data.json", "rb") as f:
                keys = set(json.load(f)["objects"].values())
            for sha in sorted(keys - set(job["known"])):
                path = os.path.join(root, task["flow"], "data", sha[:2], sha)
                if os.path.exists(path):
                    with open(path + "_meta") as meta:
                        raw = bool(json.load(meta).get("cas_raw"))
                    add(path, name="blob", sha=sha, raw=raw)
                    os.unlink(path)
        # Metaflow keeps cards below the root that it is given, or else below their own.
        parts = (task["flow"], "runs", task["run"], "steps", task["step"], "tasks", task["task"])
        for base in (root, os.path.join(root, "mf.cards")):
            cards = os.path.join(base, *parts, "cards")
            for name in sorted(os.listdir(cards)) if os.path.isdir(cards) else ():
                if name.endswith(".html"):
                    add(os.path.join(cards, name), name="card", file=name)
        return archive.tell()


def run(attempt: str, code: str, work: str, sink: PipeSink | SpoolSink) -> None:
    """The whole life of an attempt inside the sandbox."""
    with open(os.path.join(attempt, "job.json")) as f:
        job = json.load(f)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    reporter = Reporter(sink, job["limits"]["output"])
    started = time.monotonic()
    end: dict[str, Any] = {"rc": 1, "signal": None, "size": 0, "inline": None, "problem": None}
    try:
        prepare(attempt, code, work)
        prepared = time.monotonic()
        status = run_step(job, work, reporter)
        ran = time.monotonic()
        if os.WIFSIGNALED(status):
            end["signal"] = os.WTERMSIG(status)
            end["rc"] = 128 + end["signal"]
        else:
            end["rc"] = os.WEXITSTATUS(status)
        end["size"] = collect(job, work)
        if end["size"] <= job["limits"]["inline"]:
            with open(os.path.join(work, "outbox"), "rb") as f:
                end["inline"] = base64.b64encode(f.read()).decode()
        end["seconds"] = {
            "prepare": prepared - started,
            "step": ran - prepared,
            "collect": time.monotonic() - ran,
        }
    except Exception as e:  # reported, so that the user sees why, then judged by the host
        end["problem"] = f"{type(e).__name__}: {e}"
        end["rc"] = end["rc"] or 1
    end["dropped"] = reporter.dropped
    reporter.frame(b"x", json.dumps(end).encode())
    sink.close()


def detach(pid_file: str) -> bool:
    """Goes on in a process without the caller's session and descriptors, whose end is not ours.

    Returns:
        True there; False in the caller, when the process id is written, so that nobody looks
        for it too early.
    """
    written, write = os.pipe()
    if child := os.fork():
        os.close(write)
        os.read(written, 1)
        os.close(written)
        os.waitpid(child, 0)
        return False
    os.setsid()
    if os.fork():
        os._exit(0)
    with open(pid_file, "w") as f:
        f.write(str(os.getpid()))
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3, 256)  # what the caller waits for, and what it holds
    return True


def start(attempt: str, code: str, work: str, spool: str) -> bool:
    """Runs an attempt in the background, if nobody began it before, and follows it."""
    os.makedirs(work, exist_ok=True)
    try:
        os.mkdir(spool)
    except FileExistsError:
        begun = False  # by a call whose connection dropped
    else:
        begun = detach(os.path.join(spool, "pid"))
    if begun:
        run(attempt, code, work, SpoolSink(spool))
        return True
    os.closerange(3, 256)  # the lock that orders calls
    return follow(spool, 0)


def main(argv: list[str]) -> None:
    # The step can't look into this process, nor write where it writes, whatever it does.
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if argv[0] == "run":
        run(argv[1], argv[2], argv[3], PipeSink(os.dup(1)))
    elif argv[0] == "start":
        sys.exit(0 if start(argv[1], argv[2], argv[3], argv[4]) else SUPERSEDED)
    elif argv[0] == "follow":
        sys.exit(0 if follow(argv[1], int(argv[2])) else SUPERSEDED)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
