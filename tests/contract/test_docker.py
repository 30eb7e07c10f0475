"""Docker and Podman keep the contract, where they see the files of this machine and where not."""

from dataclasses import replace

import pytest

from metaflow_sandbox.backends.docker import Docker
from metaflow_sandbox.testing import BackendContract


@pytest.mark.sample(0.5)
class TestDocker(BackendContract):
    @pytest.fixture
    def backend(self, docker):
        return Docker()


@pytest.mark.sample(0.12)
class TestDockerElsewhere(BackendContract):
    """An engine on another machine, or in one beside this: inputs are copied."""

    @pytest.fixture
    def backend(self, docker):
        backend = Docker()
        backend.__dict__["engine"] = replace(backend.engine, local=False)
        return backend


@pytest.mark.sample(0.12)
class TestPodman(BackendContract):
    @pytest.fixture
    def backend(self, podman):
        return Docker()
