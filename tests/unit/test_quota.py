"""Waiting for a place: never more at once, nor faster, than an account may have."""

import contextlib
import subprocess
import sys
import tempfile
import time

import anyio
import pytest
from metaflow import metaflow_config

from metaflow_sandbox.backends.base import Backend, Quota
from metaflow_sandbox.errors import SandboxError
from metaflow_sandbox.launch.quota import Places, quota_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def backend_with(given, user="me"):
    class Limited(Backend):
        name = "limited"
        quota = given
        create = list = destroy = None

        def account(self):
            return user

    Limited.__abstractmethods__ = frozenset()
    return Limited()


async def hush(_):
    pass


async def most_at_once(places, tasks, seconds=0.01):
    now = most = 0

    async def one(place):
        nonlocal now, most
        async with place.one(hush):
            now += 1
            most = max(most, now)
            await anyio.sleep(seconds)
            now -= 1

    async with anyio.create_task_group() as group:
        for i in range(tasks):
            group.start_soon(one, places[i % len(places)])
    return most


async def test_without_limits_nobody_waits():
    assert await most_at_once([Places(backend_with(Quota()))], 50) == 50


async def test_never_more_at_once_than_there_are_places():
    assert await most_at_once([Places(backend_with(Quota(concurrent=3)))], 20) == 3


async def test_processes_share_the_places():
    """Two objects stand for two processes: locks on files are per opening."""
    places = [Places(backend_with(Quota(concurrent=2))) for _ in range(2)]
    assert await most_at_once(places, 8) == 2


async def test_accounts_do_not_share_them():
    places = [Places(backend_with(Quota(concurrent=1), user)) for user in ("a", "b")]
    assert await most_at_once(places, 4, 0.3) == 2


async def test_a_place_is_free_again_whatever_happens():
    places = Places(backend_with(Quota(concurrent=1)))
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            async with places.one(hush):
                1 / 0
        with anyio.move_on_after(0.01):
            async with places.one(hush):
                await anyio.sleep(10)


async def test_who_gives_up_waiting_takes_no_place():
    places = Places(backend_with(Quota(concurrent=1)))
    async with places.one(hush):
        with anyio.move_on_after(0.3) as scope:
            async with places.one(hush):
                pytest.fail("there is no place")
        assert scope.cancelled_caught
    with anyio.fail_after(5):
        async with places.one(hush):
            pass


async def test_a_killed_process_leaves_its_place():
    places = Places(backend_with(Quota(concurrent=1)))
    async with places.one(hush):
        pass
    script = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'r+'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    path = str(places._directory / "0")
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with anyio.move_on_after(0.5) as scope:
            async with places.one(hush):
                pass
        assert scope.cancelled_caught
        other.kill()
    with anyio.fail_after(5):
        async with places.one(hush):
            pass


async def test_creations_are_spread_over_time():
    places = Places(backend_with(Quota(per_second=20)))
    start = time.monotonic()
    await most_at_once([places], 11, 0)
    assert time.monotonic() - start >= 10 / 20 * 0.95


async def test_a_clock_that_was_set_back_stops_nobody_for_long():
    places = Places(backend_with(Quota(per_second=1000)))
    async with places.one(hush):
        pass
    (places._directory / "next").write_text(repr(time.time() + 1e9))
    assert places._reserve(1000) <= 60


async def test_waiting_is_said(monkeypatch):
    monkeypatch.setattr("metaflow_sandbox.launch.quota._SAY_AFTER", 0.05)
    places = Places(backend_with(Quota(concurrent=1, per_second=5)))
    said = []

    async def say(message):
        said.append(message)

    async with places.one(say):
        with anyio.move_on_after(0.5):
            async with places.one(say):
                pass
    assert len(said) == 1
    assert "limited is limited to 1 at once and 5 a second" in said[0]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, Quota(5, 1)),
        ("limited=20", Quota(20, 1)),
        ("e2b=7, limited = 3", Quota(3, 1)),
        ("e2b=7", Quota(5, 1)),
    ],
)
def test_the_users_setting_wins(monkeypatch, setting, expected):
    monkeypatch.setattr(metaflow_config, "SANDBOX_CONCURRENT", setting)
    assert quota_of(backend_with(Quota(5, 1))) == expected


@pytest.mark.parametrize("setting", ["20", "limited=", "limited=0", "limited=-1", "limited=many"])
def test_a_setting_that_can_not_be_meant_is_refused(monkeypatch, setting):
    monkeypatch.setattr(metaflow_config, "SANDBOX_CONCURRENT", setting)
    with pytest.raises(SandboxError, match="give numbers above 0"):
        quota_of(backend_with(Quota()))


def test_a_limit_of_a_backend_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(metaflow_config, "SANDBOX_CONCURRENT", "limited=3,e2d=20")
    with pytest.raises(SandboxError, match="no backend 'e2d'"):
        quota_of(backend_with(Quota()))


async def test_an_exception_is_what_it_was():
    places = Places(backend_with(Quota(concurrent=1)))
    with contextlib.suppress(KeyError):
        async with places.one(hush):
            raise KeyError("as it is")
