"""The cache of environments: complete or not there, private, bounded, and built once."""

import os
import stat
import subprocess
import sys
import textwrap

import anyio
import pytest
from metaflow import metaflow_config

from metaflow_sandbox import cache
from metaflow_sandbox.errors import SandboxError

KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield cache.directory()
    for target in list(cache._in_use):
        os.close(cache._in_use.pop(target))


def files(**contents):
    """A build that writes these files."""

    async def build(new):
        (new / "root").mkdir()
        for name, content in contents.items():
            (new / "root" / name).write_text(content)
        return ", ".join(contents)

    return build


def get(key, build, said=None):
    async def say(line):
        if said is not None:
            said.append(line)

    return anyio.run(cache.get, key, build, say)


def forget(path):
    """As when the process that uses it has ended."""
    os.close(cache._in_use.pop(path))


def fails(new):
    raise AssertionError("it was there already")


def test_what_was_built_is_not_built_again(directory):
    path = get(KEY, files(a="1"))
    forget(path)
    assert get(KEY, fails) == path == directory / KEY
    assert (path / "root/a").read_text() == "1"
    assert [e.description for e in cache.entries()] == ["a"]


def test_a_build_that_fails_leaves_nothing(directory):
    async def build(new):
        (new / "root").mkdir()
        (new / "root/half").write_text("…")
        raise SandboxError("no")

    with pytest.raises(SandboxError):
        get(KEY, build)
    assert [p.name for p in directory.iterdir() if not p.name.startswith(".lock-")] == []


PROCESS = """
import sys, time, anyio, pathlib
from metaflow_sandbox import cache

async def build(new):
    (new / "root").mkdir()
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    print("building", flush=True)
    {middle}
    (new / "root/a").write_text("1")
    return "a"

async def say(line):
    print(line, flush=True)

path = anyio.run(cache.get, "0123456789abcdef", build, say)
print((path / "root/a").read_text(), flush=True)
sys.stdin.read()
"""


def process(log, middle="await anyio.sleep(0.5)"):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROCESS).replace("{middle}", middle), str(log)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_that_want_the_same_at_once_build_it_once(tmp_path):
    log = tmp_path / "log"
    running = [process(log) for _ in range(4)]
    said = [p.communicate("")[0] for p in running]
    assert log.read_text() == "built\n", said
    assert all(text.endswith("1\n") for text in said)
    assert sum("another run builds its environment" in text for text in said) == 3


def test_one_that_was_killed_while_it_built_is_followed_by_the_next(directory, tmp_path):
    log = tmp_path / "log"
    killed = process(log, "await anyio.sleep_forever()")
    assert killed.stdout.readline() == "building\n"
    killed.kill()
    killed.communicate()
    assert cache.entries() == []
    assert get(KEY, files(a="2")) == directory / KEY


def test_what_a_process_uses_is_not_removed_until_it_has_ended(tmp_path):
    user = process(tmp_path / "log", "pass")
    while user.stdout.readline() != "1\n":
        assert user.poll() is None
    removed, kept = cache.clear()
    assert (removed, [e.key for e in kept]) == ([], [KEY])
    user.communicate("")
    removed, kept = cache.clear()
    assert ([e.key for e in removed], kept) == ([KEY], [])
    assert not list(cache.directory().iterdir())


def test_what_was_not_used_for_longest_goes_first(monkeypatch):
    keys = [f"{n}" * 16 for n in range(3)]
    monkeypatch.setattr(metaflow_config, "SANDBOX_CACHE", 100)
    for number, key in enumerate(keys):
        path = get(key, files(large="x" * (1 << 20)))
        forget(path)
        os.utime(path / "record.json", (1000 + number, 1000 + number))
    forget(get(keys[0], fails))  # which is the newest by that
    monkeypatch.setattr(metaflow_config, "SANDBOX_CACHE", 2)
    assert [e.key for e in cache.bound()] == [keys[1]]
    assert [e.key for e in cache.entries()] == [keys[0], keys[2]]


def test_what_is_larger_than_all_may_be_is_refused(directory, monkeypatch):
    monkeypatch.setattr(metaflow_config, "SANDBOX_CACHE", 1)
    with pytest.raises(SandboxError, match="METAFLOW_SANDBOX_CACHE"):
        get(KEY, files(large="x" * (2 << 20)))
    assert cache.entries() == []


@pytest.mark.parametrize("loss", ["a file", "the record"])
def test_what_lost_something_is_built_anew(loss):
    path = get(KEY, files(a="1", b="2"))
    forget(path)
    (path / "root/a" if loss == "a file" else path / "record.json").unlink()
    said = []
    assert (get(KEY, files(a="3", b="2"), said) / "root/a").read_text() == "3"
    assert "lost files" in said[0]


def test_what_a_builder_left_is_harmless(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    outside.chmod(0o600)

    async def build(new):
        root = new / "root"
        (root / "closed/in").mkdir(parents=True)
        (root / "closed/in/file").write_text("x")
        (root / "link").symlink_to(outside)
        (root / "up").symlink_to(tmp_path)
        os.mkfifo(root / "pipe")
        (root / "program").write_text("#!/bin/sh")
        (root / "program").chmod(0o6777)
        (root / "closed/in").chmod(0)
        (root / "closed").chmod(0)
        return "hostile"

    root = get(KEY, build) / "root"
    assert stat.S_IMODE((root / "program").stat().st_mode) == 0o755
    assert not (root / "pipe").exists()
    assert (root / "closed/in/file").read_text() == "x"
    assert stat.S_IMODE(outside.stat().st_mode) == 0o600
    assert outside.read_text() == "mine"
    cache.discard(root)
    assert not root.exists() and outside.exists()


def test_a_directory_of_somebody_elses_making_is_not_used(directory):
    directory.chmod(0o777)
    with pytest.raises(SandboxError, match="somebody else"):
        get(KEY, files(a="1"))


def test_what_a_killed_build_left_is_tidied_up_and_what_is_being_built_is_not(directory, tmp_path):
    old = directory / ".new-abandoned"
    (old / "root").mkdir(parents=True)
    (old / "root").chmod(0)
    builds = process(tmp_path / "log", "await anyio.sleep_forever()")
    assert builds.stdout.readline() == "building\n"
    cache.clear()
    (new,) = directory.glob(".new-*")
    assert new != old
    builds.kill()
    builds.communicate()
    cache.clear()
    assert not list(directory.glob(".new-*"))


def test_what_is_built_anew_takes_the_place_of_what_was_there_once(directory):
    forget(get(KEY, files(a="1")))

    async def say(_):
        pass

    for build in (files(a="2"), fails):  # steps of a run share it
        path = anyio.run(cache.get, KEY, build, say, True)
        assert path == directory / KEY
        assert (path / "root/a").read_text() == "2"
    forget(path)
    assert get(KEY, fails) == path


def test_what_lost_files_while_another_run_uses_it_is_not_waited_for(directory, tmp_path):
    user = process(tmp_path / "log", "pass")
    while user.stdout.readline() != "1\n":
        assert user.poll() is None
    (directory / KEY / "root/a").unlink()
    with pytest.raises(SandboxError, match="lost files, and another run or a shell uses it"):
        get(KEY, fails)
    user.communicate("")
    assert get(KEY, files(a="2")) == directory / KEY
