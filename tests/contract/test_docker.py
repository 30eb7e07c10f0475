"""Docker keeps the contract: where it sees this machine's files, and where it doesn't."""

import pytest

from metaflow_sandbox.backends.docker import Docker
from metaflow_sandbox.testing import BackendContract


class TestDocker(BackendContract):
    @pytest.fixture
    def backend(self, docker):
        return Docker()


class TestDockerElsewhere(BackendContract):
    """An engine on another machine, or in one beside this: inputs are copied."""

    @pytest.fixture
    def backend(self, docker):
        backend = Docker()
        backend.__dict__["engine"] = __import__("dataclasses").replace(backend.engine, local=False)
        return backend
