"""Daytona keeps the contract: the real SDK against a server on loopback."""

import pytest

from metaflow_sandbox.backends.daytona import Daytona
from metaflow_sandbox.testing import BackendContract


@pytest.mark.sample(0.5)
class TestDaytona(BackendContract):
    # The smallest that there is.
    cpu, memory, disk = 1, 1024, 1024

    @pytest.fixture
    def backend(self, daytona, monkeypatch):
        daytona.set(speed=20.0)  # so that a minute, the shortest lifetime, is three seconds
        for name, value in daytona.environment.items():
            monkeypatch.setenv(name, value)
        return Daytona()
