"""Users for sandboxes: no two living ones share one."""

import os

import pytest

from metaflow_sandbox.backends.bubblewrap.userns import Uids, owner_of
from metaflow_sandbox.errors import SandboxError


def test_every_living_sandbox_has_a_user_of_its_own():
    uids = Uids()
    taken = [uids.take() for _ in range(512)]
    assert len(set(taken)) == 512
    with pytest.raises(SandboxError, match="--max-workers"):
        uids.take()
    uids.give_back(taken[100])
    assert uids.take() == taken[100]


def test_users_of_two_processes_are_apart_and_in_range(monkeypatch):
    mine = {Uids().take()}
    monkeypatch.setattr(os, "getpid", lambda: 4194304)  # the last that the kernel gives
    others = Uids()
    assert mine.isdisjoint({others.take() for _ in range(512)})
    assert max(others._taken) < (1 << 32) - 2


def test_a_namespace_of_our_own_has_no_other_owner():
    fd = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        assert owner_of(fd) is None
    finally:
        os.close(fd)
