"""What blocks on a program ends when its caller does."""

import subprocess
import time
from functools import partial

import anyio
import pytest

from metaflow_sandbox import concurrency
from metaflow_sandbox.concurrency import interruptible


async def cancelled(function, began):
    """Runs it until that file is there, and cancels it: whether it was cancelled."""
    async with anyio.create_task_group() as tasks:

        async def cancel():
            while not began.exists():
                await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()

        tasks.start_soon(cancel)
        await interruptible(function)
    return tasks.cancel_scope.cancelled_caught


@pytest.mark.parametrize(
    "script",
    ["exec sleep 1000", "sleep 1000 | cat", "trap '' TERM; while :; do sleep 1000; done"],
    ids=["one", "some", "one that won't"],
)
def test_programs_end_when_their_caller_is_cancelled(tmp_path, monkeypatch, script):
    monkeypatch.setattr(concurrency, "_TERMS", 3)
    began, tidied = tmp_path / "began", tmp_path / "tidied"

    def function():
        try:
            subprocess.run(["sh", "-c", f"touch {began}; {script}"], check=True)
        finally:
            tidied.touch()

    start = time.monotonic()
    assert anyio.run(partial(cancelled, function, began))
    assert time.monotonic() - start < 60
    assert tidied.exists()


def test_a_function_that_runs_one_program_after_another_ends(tmp_path):
    began, count = tmp_path / "began", 0

    def function():
        nonlocal count
        for count in range(1, 4):
            subprocess.run(["sh", "-c", f"touch {began}; exec sleep 1000"], check=False)

    assert anyio.run(partial(cancelled, function, began))
    assert count == 3


def test_programs_of_others_go_on(tmp_path):
    other = subprocess.Popen(["sleep", "1000"])
    began = tmp_path / "began"

    def function():
        subprocess.run(["sh", "-c", f"touch {began}; exec sleep 1000"], check=False)

    assert anyio.run(partial(cancelled, function, began))
    assert other.poll() is None
    other.kill()
    other.wait()


def test_what_is_not_cancelled_answers_or_fails_by_itself():
    assert anyio.run(interruptible, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        anyio.run(interruptible, lambda: 1 / 0)
