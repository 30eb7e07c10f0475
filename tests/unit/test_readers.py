"""One warm process makes the readers of all attempts: each alone, limited, and gone afterwards."""

import contextlib
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import anyio
import pytest

from metaflow_sandbox.admission import readers
from metaflow_sandbox.admission.internals import Delivered
from metaflow_sandbox.admission.reader import MEMORY, SECONDS
from metaflow_sandbox.admission.readers import AT_ONCE, Readers
from metaflow_sandbox.errors import Rejected

PATIENCE = 60.0  # seconds until a test gives up; nothing is measured by it
# An empty set takes a byte here and 216 in memory.
FILLS_THE_MEMORY = b"\x80\x04" + b"\x8f" * (MEMORY // 200)


def with_readers(check):
    """Runs an async function of some readers, which leave no process and no descriptor."""

    async def run():
        with anyio.fail_after(PATIENCE):
            async with contextlib.aclosing(Readers()) as made:
                await check(made)
            assert zygotes() == []

    before = descriptors("self")
    anyio.run(run)
    assert descriptors("self") == before


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def children(pid, word=b""):
    """The living children of a process whose command has a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z" and word in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


def zygotes():
    return children(os.getpid(), b"zygote")


def hanging():
    """The readers that there are."""
    return [child for zygote in zygotes() for child in children(zygote)]


async def until(condition):
    """Waits for it, and returns it."""
    while not (found := condition()):
        await anyio.sleep(0.01)
    return found


def item(directory, content, name="_success"):
    path = directory / f"{name}-{hashlib.sha1(content).hexdigest()}"
    path.write_bytes(content)
    sha = hashlib.sha1(content).hexdigest()
    form = Delivered.FORMS[name]
    return {"name": name, "form": form, "file": str(path), "raw": True, "sha": sha}


@pytest.fixture
def endless(tmp_path):
    """A request that is never done: its file is a pipe into which nobody writes."""
    path = tmp_path / "endless"
    os.mkfifo(path)
    return {**item(tmp_path, b""), "file": str(path)}


def test_each_of_many_requests_gets_its_own_answer(tmp_path):
    async def check(pool):
        found = {}

        async def ask(number):
            content = pickle.dumps(number)
            found[number] = await pool.read([item(tmp_path, content, "_foreach_num_splits")])

        async with anyio.create_task_group() as tasks:
            for number in range(100):
                tasks.start_soon(ask, number)
        assert found == {n: {"_foreach_num_splits": {"value": n}} for n in range(100)}
        assert len(zygotes()) == 1
        await until(lambda: not hanging())
        idle = descriptors(zygotes()[0])
        await pool.read([])
        await until(lambda: descriptors(zygotes()[0]) == idle)

    with_readers(check)


def test_a_long_request_and_a_long_answer_come_whole(tmp_path):
    text = "\x1b[31m" * 150_000
    values = {"exception": text, "type": text, "stacktrace": None}
    content = (
        b"\x80\x04cmetaflow.exception\nMetaflowExceptionWrapper\nN\x85R"
        + pickle.dumps(values, 4)[2:-1]
        + b"b."
    )

    async def check(pool):
        one = item(tmp_path, content, "_exception")
        items = [{**one, "name": f"{n}{'x' * 20_000}"} for n in range(10)]
        found = await pool.read(items)
        assert len(found) == 10
        assert {json.dumps(f) for f in found.values()} == {
            json.dumps({"value": {k: v and v.replace("\x1b", "\u241b") for k, v in values.items()}})
        }

    with_readers(check)


def test_what_fills_the_memory_ends_its_own_reader_alone(tmp_path):
    bomb = item(tmp_path, FILLS_THE_MEMORY)
    good = item(tmp_path, pickle.dumps(True), "_task_ok")

    async def check(pool):
        assert await pool.read([good]) == {"_task_ok": {"value": True}}
        zygote = zygotes()
        ended = anyio.Event()

        async def explode():
            with pytest.raises(Rejected, match="takes too long or too much to read"):
                await pool.read([bomb, good])
            ended.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(explode)
            while not ended.is_set():
                assert await pool.read([good]) == {"_task_ok": {"value": True}}
        assert await pool.read([good]) == {"_task_ok": {"value": True}}
        assert zygotes() == zygote

    with_readers(check)


def test_what_takes_too_long_is_ended(tmp_path, endless, monkeypatch):
    good = item(tmp_path, pickle.dumps(True), "_task_ok")

    async def check(pool):
        with monkeypatch.context() as patch:
            patch.setattr(readers, "_WALL_SECONDS", 0.1)
            with pytest.raises(Rejected, match="takes too long or too much to read"):
                await pool.read([endless])
        await until(lambda: not hanging())
        assert await pool.read([good]) == {"_task_ok": {"value": True}}

    with_readers(check)


def test_a_request_that_is_cancelled_leaves_no_reader(endless):
    async def check(pool):
        for _ in range(3):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pool.read, [endless])
                await until(hanging)
                tasks.cancel_scope.cancel()
            await until(lambda: not hanging())

    with_readers(check)


def test_a_request_that_is_cancelled_at_once_leaves_the_others_served(tmp_path):
    good = item(tmp_path, pickle.dumps(True), "_task_ok")

    async def check(pool):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pool.read, [good])
            tasks.cancel_scope.cancel()
        assert await pool.read([good]) == {"_task_ok": {"value": True}}

    with_readers(check)


def test_closing_ends_what_still_reads(endless):
    left = []

    async def check(pool):
        async with anyio.create_task_group() as tasks:

            async def ask():
                with pytest.raises(Rejected):
                    await pool.read([endless])

            tasks.start_soon(ask)
            left.extend(await until(hanging))
            await pool.aclose()
        await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left))

    with_readers(check)


def test_no_more_than_so_many_read_at_once(endless):
    async def check(pool):
        async with anyio.create_task_group() as tasks:
            for _ in range(AT_ONCE * 3):
                tasks.start_soon(pool.read, [endless])
            await until(lambda: len(hanging()) >= AT_ONCE)
            for _ in range(20):
                await anyio.sleep(0.01)
                assert len(hanging()) == AT_ONCE
            tasks.cancel_scope.cancel()

    with_readers(check)


def test_a_reader_has_limits_and_no_way_to_another(endless):
    async def check(pool):
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(pool.read, [endless])
            for pid in await until(lambda: len(hanging()) == 2 and hanging()):
                limits = await until(
                    lambda pid=pid: (
                        (text := Path(f"/proc/{pid}/limits").read_text())
                        and str(MEMORY) in text
                        and text
                    )
                )
                words = {line[:18].strip(): line.split()[-3:-1] for line in limits.splitlines()}
                assert words["Max address space"] == [str(MEMORY)] * 2
                assert words["Max cpu time"] == [str(SECONDS)] * 2
                assert words["Max core file size"] == ["0", "0"]
                files = [
                    os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")
                ]
                assert len(files) <= 4  # the request, the answer, nothing, and the file
                assert not any(name.startswith("socket:") for name in files)
            tasks.cancel_scope.cancel()

    with_readers(check)


def test_when_what_makes_readers_was_killed_another_one_does(tmp_path):
    good = item(tmp_path, pickle.dumps(True), "_task_ok")

    async def check(pool):
        for _ in range(2):
            assert await pool.read([good]) == {"_task_ok": {"value": True}}
            os.kill(zygotes()[0], signal.SIGKILL)
            await until(lambda: not zygotes())

    with_readers(check)


def test_a_process_that_is_killed_leaves_no_reader(endless):
    source = (
        f"import anyio; from {readers.__name__} import Readers; "
        f"anyio.run(Readers().read, [{endless!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", source])
    try:
        deadline = time.monotonic() + PATIENCE
        zygote = reader = []
        while not reader and time.monotonic() < deadline:
            zygote = children(process.pid, b"zygote")
            reader = [pid for z in zygote for pid in children(z)]
    finally:
        process.kill()
        process.wait()
    assert reader
    while any(Path(f"/proc/{pid}").exists() for pid in zygote + reader):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- records and blobs ------------------------------------------------------------------


def blob_item(directory, content, sha=None):
    path = directory / f"blob-{hashlib.sha1(content).hexdigest()}"
    path.write_bytes(content)
    return {"sha": sha or hashlib.sha1(content).hexdigest(), "file": str(path), "raw": True}


async def contents_of(pool, items, limit=64 << 20):
    async with pool.contents(items, limit) as contents:
        return await anyio.to_thread.run_sync(list, contents)


def test_blobs_come_out_of_a_reader_in_order_and_it_is_gone(tmp_path):
    parts = [b"", b"x", os.urandom(5 << 20), bytes(3 << 20)]
    items = [blob_item(tmp_path, part) for part in parts]

    async def check(pool):
        found = await contents_of(pool, items)
        assert [data for _, data in found] == parts
        assert [sha for sha, _ in found] == [item["sha"] for item in items]
        assert await contents_of(pool, []) == []
        await until(lambda: not hanging())

    with_readers(check)


def test_a_blob_that_is_another_is_rejected_and_its_reader_is_gone(tmp_path):
    items = [blob_item(tmp_path, b"x"), blob_item(tmp_path, b"y", sha="0" * 40)]

    async def check(pool):
        with pytest.raises(Rejected, match="something else"):
            await contents_of(pool, items)
        await until(lambda: not hanging())

    with_readers(check)


def test_a_reader_of_blobs_that_is_killed_is_an_error_and_not_a_shorter_blob(tmp_path, endless):
    async def check(pool):
        async with pool.contents([endless], 1 << 20) as contents:
            (reader,) = await until(hanging)
            os.kill(reader, signal.SIGKILL)
            with pytest.raises(Rejected, match="too long or too much"):
                await anyio.to_thread.run_sync(list, contents)

    with_readers(check)


def test_a_record_that_fills_the_memory_ends_its_reader_alone(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_text(json.dumps({"objects": {"x": "0" * 40}, "info": {"x": {"type": "t"}}}))
    large.write_bytes(b'{"objects": {}, "info": {"x": [' + b"[]," * (100 << 20) + b"[]]}}")

    async def check(pool):
        with pytest.raises(Rejected):
            await pool.claims(large)
        expected = {"objects": {"x": "0" * 40}, "info": {"x": {"type": "t"}}}
        assert await pool.claims(small) == expected

    with_readers(check)


LIMITED = """
import json, os, socket, sys
sys.path.insert(0, sys.argv[1])
from metaflow_sandbox.admission import claims, reader
def attack(path):
    def tried(function):
        try:
            function()
        except Exception as e:
            return None
        return "done"
    def write():
        with open(sys.argv[2], "w") as f:
            f.write("x")
    def open_many():
        global kept
        kept = [open("/dev/null") for _ in range(100)]
    if sys.argv[3] == "bare":
        print(json.dumps([tried(write), tried(open_many)])); sys.exit()
    return {"objects": {}, "info": {}, "found": [tried(write), tried(open_many)]}
claims.read = attack
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
attack("") if sys.argv[3] == "bare" else reader.main()
"""


@pytest.mark.parametrize("how", ["bare", "limited"])
def test_a_reader_that_was_taken_over_writes_no_file_and_opens_few(tmp_path, how):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, readers._PACKAGES, str(tmp_path / "planted"), how],
        input=b'{"record": "/dev/null"}',
        capture_output=True,
        check=True,
    )
    found = json.loads(done.stdout)
    found = found if how == "bare" else found["found"]
    assert found == (["done", "done"] if how == "bare" else [None, None])
    assert how == "bare" or (tmp_path / "planted").stat().st_size == 0
