"""E2B's backend keeps the contract, by the real SDK against an emulated service."""

import sys

import pytest

if sys.version_info < (3, 11):
    pytest.skip("NOT RUN: E2B's SDK needs Python 3.11", allow_module_level=True)

from emulators.e2b.server import running
from metaflow_sandbox.backends.e2b import E2B
from metaflow_sandbox.testing import BackendContract


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


@pytest.fixture(autouse=True)
def account(server, monkeypatch):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.reset()
    return server


class TestE2B(BackendContract):
    cpu = 1  # it gives whole ones

    @pytest.fixture
    def backend(self):
        return E2B()
