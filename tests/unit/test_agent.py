"""The agent runs a step, passes its output on, and reports how it ended: as a real process."""

import base64
import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field

import anyio
import pytest

from metaflow_sandbox.admission import claims, results
from metaflow_sandbox.agent import AGENT
from metaflow_sandbox.agent.agent import SEGMENT_BYTES, SPOOL_BYTES, SUPERSEDED, encode_frame
from metaflow_sandbox.agent.frames import FrameDecoder

SECONDS = 20  # far more than anything here takes
OLDEST = "/root/.pyenv/versions/3.8.18/bin/python"
#: A setrlimit that changes nothing, so that other processes of this user don't count.
PROCESSES = resource.getrlimit(resource.RLIMIT_NPROC)[1]
PYTHONS = {"this python": sys.executable}
if os.path.exists(OLDEST):
    PYTHONS["python 3.8"] = OLDEST


@pytest.fixture(params=PYTHONS.values(), ids=PYTHONS)
def python(request):
    return request.param


@dataclass
class Ended:
    """What the host learns of an attempt."""

    out: bytearray = field(default_factory=bytearray)
    err: bytearray = field(default_factory=bytearray)
    end: dict = field(default_factory=dict)
    seconds: float = 0.0

    def take(self, frame):
        assert not self.end, "nothing comes after the exit frame"
        if frame.kind == "x":
            self.end = json.loads(frame.payload)
        elif frame.kind == "o":
            self.out += frame.payload
        else:
            self.err += frame.payload


class Box:
    """An attempt's three directories, and the agent on them."""

    def __init__(self, root, python):
        self.python = python
        self.attempt, self.code, self.work = root / "attempt", root / "code", root / "work"
        self.spool = self.work / ".spool"
        for path in (self.attempt / "datastore", self.code, self.work):
            path.mkdir(parents=True)
        self.env = {"PATH": os.defpath}
        self.known = []
        self.limits = {"processes": PROCESSES, "output": 1 << 26, "inline": 1 << 18}

    def job(self, *argv):
        task = {"flow": "F", "run": "1", "step": "s", "task": "2", "attempt": 0}
        job = {"argv": argv, "env": self.env, "limits": self.limits, "known": self.known}
        (self.attempt / "job.json").write_text(json.dumps({**job, "task": task}))

    def command(self, *arguments):
        return [self.python, "-I", "-S", str(AGENT), *map(str, arguments)]

    def run(self, script, *args):
        return self.run_argv(sys.executable, "-I", "-S", "-c", script, *args)

    def run_argv(self, *argv):
        self.job(*argv)
        started = time.monotonic()
        command = self.command("run", self.attempt, self.code, self.work)
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        ended = Ended(seconds=time.monotonic() - started)
        for frame in FrameDecoder().feed(done.stdout):
            ended.take(frame)
        assert ended.end, "there is an exit frame"
        return ended

    def start(self, script, *args):
        self.job(sys.executable, "-I", "-S", "-c", script, *args)
        command = self.command("start", self.attempt, self.code, self.work, self.spool)
        with subprocess.Popen(command, stdout=subprocess.PIPE) as caller:
            until(self.begun)
            caller.kill()  # it follows the spool; what it began goes on

    def begun(self):
        with contextlib.suppress(FileNotFoundError):
            return (self.spool / "pid").read_text() != ""
        return False

    @contextlib.contextmanager
    def follow(self, seq=0):
        command = self.command("follow", self.spool, seq)
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    def acknowledge(self, seq):
        (self.spool / "ack").write_bytes(b"%d" % seq)

    def spooled(self):
        """Bytes in the spool, without those that vanish while we look."""
        total = 0
        for path in self.spool.iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def processes(self):
        """The processes that name this box on their command line."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as f:
                if str(self.work).encode() in f.read():
                    found.append(int(name))
        return found


@pytest.fixture
def box(tmp_path, python):
    box = Box(tmp_path, python)
    yield box
    for pid in box.processes():  # detached agents, if a test failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def here(tmp_path):
    """A box for what doesn't depend on the interpreter's version."""
    return Box(tmp_path, sys.executable)


def until(condition, seconds=SECONDS):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


def alive(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as f:
        return f.read().rpartition(b")")[2].split()[0] != b"Z"
    return False


def test_the_agent_is_held_against_python_3_8():
    if "python 3.8" not in PYTHONS:
        warnings.warn(
            f"{OLDEST} is not there: NOTHING here proves that the agent runs on Python 3.8",
            stacklevel=1,
        )
        return
    version = subprocess.run([OLDEST, "-V"], capture_output=True, check=True).stdout
    assert version.startswith(b"Python 3.8")


# --- how a step ends ------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 3, 255])
def test_the_exit_code_is_the_steps_own(box, code):
    ended = box.run(f"import sys; sys.exit({code})")
    assert (ended.end["rc"], ended.end["signal"], ended.end["problem"]) == (code, None, None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_a_signal_gives_128_and_its_number(box, number):
    ended = box.run(f"import os; os.kill(os.getpid(), {int(number)})")
    assert (ended.end["rc"], ended.end["signal"]) == (128 + number, number)


def test_a_command_that_is_not_there_is_said_and_gives_127(here):
    ended = here.run_argv("/no/such/python", "-c", "pass")
    assert ended.end["rc"] == 127
    assert b"could not be started" in ended.err and b"/no/such/python" in ended.err


def test_what_the_agent_fails_at_is_reported_and_is_no_success(here):
    here.code.rmdir()
    ended = here.run("print('not run')")
    assert ended.out == b""
    assert ended.end["rc"] != 0
    assert str(here.code) in ended.end["problem"]


# --- what a step gets -----------------------------------------------------------


def test_the_step_gets_the_sandboxs_environment_and_the_jobs_over_it(here, monkeypatch):
    monkeypatch.setenv("OF_THE_SANDBOX", "1")
    monkeypatch.setenv("NAME", "another value")
    here.env = {"NAME": "a value", "EMPTY": ""}
    script = "import os; print([os.environ[n] for n in ('NAME', 'EMPTY', 'OF_THE_SANDBOX')])"
    assert here.run(script).out == b"['a value', '', '1']\n"


def test_the_step_gets_three_descriptors_and_an_empty_stdin(here):
    script = "import os, sys; print(sorted(os.listdir('/proc/self/fd'))[:-1], sys.stdin.read())"
    assert here.run(script).out == b"['0', '1', '2'] \n"


def test_the_step_works_on_copies_of_its_files_and_on_links_to_its_inputs(here):
    (here.code / ".mf_code").mkdir()
    (here.code / "flow.py").write_text("original")
    blob = here.attempt / "datastore" / "F" / "data" / "aa"
    blob.mkdir(parents=True)
    (blob / "aa11").write_text("input")
    ended = here.run(
        "import os; print(os.listdir('.'));"
        "open('flow.py', 'w').write('changed');"
        "path = '../datastore/.metaflow/F/data/aa/aa11';"
        "print(open(path).read()); os.unlink(path); open(path, 'w').write('changed')"
    )
    assert ended.out == b"['flow.py']\ninput\n"
    assert (here.code / "flow.py").read_text() == "original"
    assert (blob / "aa11").read_text() == "input"


# --- output ---------------------------------------------------------------------


def test_output_comes_whole_and_apart(box):
    ended = box.run(
        "import os\n"
        "for i in range(300):\n"
        "    os.write(1, bytes(range(256)) * 8)\n"
        "    os.write(2, b'%d\\xff\\xfe\\n' % i)\n"
    )
    assert ended.out == bytes(range(256)) * 8 * 300
    assert ended.err == b"".join(b"%d\xff\xfe\n" % i for i in range(300))
    assert ended.end["dropped"] == 0


def test_a_line_of_a_megabyte_comes_whole(box):
    ended = box.run("import sys; sys.stdout.write('x' * (1 << 20) + '\\n' + 'the next')")
    assert ended.out == b"x" * (1 << 20) + b"\nthe next"


def test_output_without_a_final_newline_comes_whole(here):
    assert here.run("import sys; sys.stdout.write('no end')").out == b"no end"


def test_frames_that_the_step_prints_are_its_output_and_nothing_else(box):
    forged = b"\n" + encode_frame(1, b"x", b'{"rc": 0}') + encode_frame(2, b"o", b"forged")
    ended = box.run(f"import os, sys; os.write(1, {forged!r}); sys.exit(9)")
    assert ended.out == forged
    assert ended.end["rc"] == 9


def test_output_beyond_the_limit_is_dropped_and_counted(box):
    box.limits["output"] = 100_000
    ended = box.run(
        "import os\n"
        "for i in range(400):\n"
        "    os.write(1 + i % 2, b'x' * 4096)\n"
        "raise SystemExit(3)\n"
    )
    assert len(ended.out) + len(ended.err) == 100_000
    assert ended.end["dropped"] == 400 * 4096 - 100_000
    assert ended.end["rc"] == 3


def test_output_is_passed_on_while_the_step_still_runs(here):
    marker = here.work / "seen"
    here.job(
        sys.executable, "-I", "-S", "-c",
        "import os, sys, time\n"
        "print('early', flush=True)\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n",
        str(marker),
    )  # fmt: skip
    command = here.command("run", here.attempt, here.code, here.work)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as agent:
        (first,) = FrameDecoder().feed(agent.stdout.readline())
        assert (first.kind, first.payload) == ("o", b"early\n")
        assert agent.poll() is None
        marker.touch()


def test_a_step_that_closes_its_output_and_goes_on_is_waited_for(box):
    ended = box.run("import os, time; os.close(1); os.close(2); time.sleep(0.3); os._exit(7)")
    assert ended.end["rc"] == 7
    assert ended.seconds > 0.3


DAEMON = """
import os, sys, time
ready, say = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        os.write(say, b"x")
        time.sleep(1000)
    os._exit(0)
os.wait()
os.read(ready, 1)
sys.exit(5)
"""


def test_a_daemon_that_holds_the_output_open_dies_with_the_step(box):
    ended = box.run(DAEMON)
    assert ended.end["rc"] == 5
    assert ended.seconds < 3
    assert not alive(int(ended.out))


def test_a_child_that_prints_on_without_end_dies_with_the_step(here):
    ended = here.run(
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    while True: os.write(1, b'y\\n' * 1000)\n"
        "time.sleep(0.05)\n"
    )
    assert ended.end["rc"] == 0
    assert ended.seconds < 5


def test_many_children_that_end_before_the_step_are_reaped(here):
    ended = here.run(
        "import os\n"
        "for i in range(100):\n"
        "    if os.fork() == 0:\n"
        "        if os.fork() == 0: os._exit(3)\n"  # an orphan, which the agent adopts
        "        os._exit(2)\n"
        "    os.wait()\n"
        "raise SystemExit(4)\n"
    )
    assert ended.end["rc"] == 4


# --- results --------------------------------------------------------------------

RECORD = """
import hashlib, json, os, sys
size = int(sys.argv[1])
root = "../datastore/.metaflow/F"
def blob(data, raw):
    sha = hashlib.sha1(data).hexdigest()
    folder = f"{root}/data/{sha[:2]}"
    os.makedirs(folder, exist_ok=True)
    open(f"{folder}/{sha}", "wb").write(data)
    json.dump({"cas_raw": raw, "cas_version": 1}, open(f"{folder}/{sha}_meta", "w"))
    return sha
objects = {"x": blob(b"x" * size, True), "y": blob(b"y", False), "old": sys.argv[2]}
task = f"{root}/1/s/2"
os.makedirs(task)
json.dump({"objects": objects, "info": {k: {"type": "t"} for k in objects}},
          open(f"{task}/0.data.json", "w"))
open(f"{task}/0.DONE.lock", "w")
cards = "../datastore/.metaflow/mf.cards/F/runs/1/steps/s/tasks/2/cards"
os.makedirs(cards)
open(f"{cards}/default-abc.html", "w").write("<html>")
open(f"{cards}/notes.txt", "w").write("no card")
"""
OLD = hashlib.sha1(b"old").hexdigest()


async def once(data):
    yield data


def received(archive, directory):
    directory.mkdir()
    got = anyio.run(results.receive, once(archive), directory, 1 << 30)
    claimed = claims.read(got.record)
    got.objects, got.info = claimed["objects"], claimed["info"]
    return got


@pytest.mark.parametrize("size", [10, 1 << 20], ids=["in the exit frame", "in a file"])
def test_what_the_agent_packs_is_what_admission_reads(box, tmp_path, size):
    box.known = [OLD]
    ended = box.run(RECORD, str(size), OLD)
    assert (ended.end["rc"], ended.end["problem"]) == (0, None)
    archive = (box.work / "outbox").read_bytes()
    assert ended.end["size"] == len(archive)
    inline = ended.end["inline"]
    assert (inline is None) if size > 1000 else base64.b64decode(inline) == archive
    got = received(archive, tmp_path / "received")
    x, y = got.objects["x"], got.objects["y"]
    assert set(got.objects) == {"x", "y", "old"} and got.objects["old"] == OLD
    assert set(got.blobs) == {x, y}, "inputs are not sent back"
    assert (got.blobs[x][1], got.blobs[y][1]) == (True, False)
    assert got.blobs[x][0].read_bytes() == b"x" * size
    assert {name: path.read_bytes() for name, path in got.cards.items()} == {
        "default-abc.html": b"<html>"
    }


def test_a_step_that_recorded_nothing_delivers_nothing(here):
    ended = here.run("raise SystemExit(1)")
    assert (ended.end["size"], ended.end["inline"]) == (0, "")


# --- the spool ------------------------------------------------------------------


def test_a_detached_step_is_followed_to_its_end(box):
    box.start("import sys; print('out'); print('err', file=sys.stderr); sys.exit(6)")
    decoder, ended = FrameDecoder(), Ended()
    with box.follow() as follower:
        for frame in decoder.feed(follower.stdout.read()):
            ended.take(frame)
        assert follower.wait(SECONDS) == 0
    assert (ended.out, ended.err, ended.end["rc"]) == (b"out\n", b"err\n", 6)
    until(lambda: not box.processes(), 5)


def test_whoever_starts_the_agent_gets_its_frames_and_the_step_outlives_it(here):
    here.start("import time; time.sleep(0.5)")
    assert not (here.spool / "end").exists()
    until((here.spool / "end").exists)


def test_starting_again_starts_nothing_and_gives_all_frames_again(here):
    here.job(sys.executable, "-I", "-S", "-c", "import os; print(os.getsid(0), flush=True)")
    command = here.command("start", here.attempt, here.code, here.work, here.spool)
    calls = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    outputs = [call.communicate(timeout=SECONDS)[0] for call in calls]
    outputs.append(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    # The session is the step's own, and there was one.
    assert outputs[-1].count(b"\n") == 2
    # Who comes before the first has said who it is finds nothing, and asks again; so does
    # whoever another one took the place of.
    assert all(outputs[-1].startswith(output) for output in outputs)


def test_a_follower_ends_when_another_has_taken_its_place(here):
    """Where a line drops the old one isn't killed, and what it prints may be kept somewhere."""
    go = here.work / "go"
    here.start(
        "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)", str(go)
    )
    with here.follow() as old:
        reader = here.spool / "reader"
        until(lambda: reader.exists() and reader.read_text() == str(old.pid))
        with here.follow() as new:
            assert old.wait(SECONDS) == SUPERSEDED
            go.touch()
            assert new.wait(SECONDS) == 0


def test_a_follower_killed_anywhere_is_resumed_without_loss_or_repetition(box):
    box.start(
        "import os, time\n"
        "for i in range(400):\n"
        "    os.write(1, b'%d ' % i + b'x' * (i * 7 % 3000) + b'\\n')\n"
        "    if i % 4 == 0: time.sleep(0.002)\n"
    )
    decoder, ended, connections = FrameDecoder(), Ended(), 0
    while not ended.end:
        connections += 1
        decoder.reconnect()
        with box.follow(decoder.seq) as follower:
            # Killed when it has carried a little more each time, in the middle of a line.
            left = 40_000 * connections + 13
            while left > 0 and (data := os.read(follower.stdout.fileno(), min(left, 5000))):
                left -= len(data)
                for frame in decoder.feed(data):
                    ended.take(frame)
            follower.kill()
    assert connections > 2
    assert ended.out == b"".join(b"%d " % i + b"x" * (i * 7 % 3000) + b"\n" for i in range(400))
    assert ended.end["rc"] == 0


FLOOD = """
import os
for i in range(24 * 16):
    os.write(1, (b"%08d" % i) * 8192)
"""


def test_a_lost_reader_stops_the_step_before_it_fills_the_disk_and_then_loses_nothing(box):
    box.start(FLOOD)
    until(lambda: box.spooled() > SPOOL_BYTES)
    before = -1
    while before != (before := box.spooled()):  # until it stands still
        assert before <= SPOOL_BYTES + SEGMENT_BYTES
        time.sleep(0.3)
    assert not (box.spool / "end").exists()

    decoder, ended, largest = FrameDecoder(), Ended(), 0
    digest, size = hashlib.sha1(), 0
    with box.follow() as follower:
        while data := os.read(follower.stdout.fileno(), 1 << 18):
            for frame in decoder.feed(data):
                ended.take(frame)
            digest.update(ended.out)
            size += len(ended.out)
            ended.out.clear()
            box.acknowledge(decoder.seq)
            largest = max(largest, box.spooled())
    expected = hashlib.sha1()
    for i in range(24 * 16):
        expected.update((b"%08d" % i) * 8192)
    assert (size, digest.digest()) == (24 << 20, expected.digest())
    assert (ended.end["rc"], ended.end["dropped"]) == (0, 0)
    assert largest <= SPOOL_BYTES + SEGMENT_BYTES
    assert box.spooled() < SPOOL_BYTES, "what was acknowledged is deleted"


def test_acknowledged_segments_are_deleted_and_the_rest_is_kept(here):
    go = here.work / "go"
    here.start(
        "import os, sys, time\n"
        "def write(): [os.write(1, b'x' * 65536) for _ in range(64)]\n"  # 4 MB
        "write()\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "write()\n",
        str(go),
    )
    decoder, size = FrameDecoder(), 0
    with here.follow() as follower:
        while size < 2 << 20:
            size += sum(len(f.payload) for f in decoder.feed(follower.stdout.read1(1 << 16)))
    here.acknowledge(decoder.seq)
    go.touch()
    until((here.spool / "end").exists)
    kept = FrameDecoder()
    kept.seq = decoder.seq
    decoder.reconnect()
    with here.follow(decoder.seq) as follower:
        frames = list(decoder.feed(follower.stdout.read()))
    assert size + sum(len(f.payload) for f in frames if f.kind == "o") == 8 << 20
    # 8 MB are 10.7 MB as frames; what was acknowledged is gone but for one segment.
    first = min(path for path in here.spool.iterdir() if path.name.isdigit())
    (oldest, *_) = first.read_bytes().split(b"\n", 1)
    assert 1 < int(oldest.split()[1], 16) <= kept.seq + 1


@pytest.mark.parametrize("content", [b"", b"no number", b"-5", b"\xff\xfe"])
def test_an_acknowledgement_that_is_cut_or_broken_deletes_nothing(here, content):
    go = here.work / "go"
    here.start(
        "import os, sys, time\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "for _ in range(40): os.write(1, b'x' * 65536)\n",
        str(go),
    )
    (here.spool / "ack").write_bytes(content)
    go.touch()
    decoder = FrameDecoder()
    until((here.spool / "end").exists)
    with here.follow() as follower:
        frames = list(decoder.feed(follower.stdout.read()))
    assert sum(len(f.payload) for f in frames if f.kind == "o") == 40 * 65536
    assert json.loads(frames[-1].payload)["rc"] == 0


def test_a_follower_ends_when_the_step_has_killed_the_agent(here):
    here.start("import os, signal; os.kill(os.getppid(), signal.SIGKILL)")
    until(lambda: not any("start" in _words(pid) for pid in here.processes()))
    with here.follow() as follower:
        follower.wait(SECONDS)


def test_a_follower_ends_when_the_agent_could_not_begin(here):
    command = here.command("start", here.attempt, here.code, here.work, here.spool)
    assert not (here.attempt / "job.json").exists()
    assert subprocess.run(command, timeout=SECONDS, check=False).returncode == 0
    with here.follow() as follower:
        follower.wait(SECONDS)


def _words(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as f:
        return f.read().split("\0")
    return []
