"""Docker and Podman keep the contract: where they see this machine's files, and where they don't.

The second and the third class run a sample; `make test-containers` runs all of them.
"""

import os
from dataclasses import replace

import pytest

from metaflow_sandbox.backends.docker import Docker
from metaflow_sandbox.testing import BackendContract

ALL = os.environ.get("CONTAINERS") == "all"
SAMPLE = {
    "test_sandboxes_are_found_by_their_labels_and_destroyed_by_their_id",
    "test_a_sandbox_ends_with_its_lifetime",
    "test_a_creation_that_is_cancelled_leaves_nothing",
    "test_streams_are_apart_and_carry_any_byte",
    "test_cancelling_ends_the_whole_tree",
    "test_errors_of_files_are_the_built_in_ones",
    "test_mounts_are_delivered",
    "test_a_mount_may_be_an_archive_where_it_is_not_bound",
    "test_memory_of_many_processes_is_limited_together",
    "test_disk_is_limited_where_that_is_declared",
    "test_this_machine_is_never_part_of_the_network",
}


class TestDocker(BackendContract):
    @pytest.fixture
    def backend(self, docker):
        return Docker()


class Sampled(BackendContract):
    @pytest.fixture(autouse=True)
    def chosen(self, request):
        if not ALL and request.node.originalname not in SAMPLE:
            pytest.skip("NOT CHECKED here: make test-containers does")


class TestDockerElsewhere(Sampled):
    """An engine on another machine, or in one beside this: inputs are copied."""

    @pytest.fixture
    def backend(self, docker):
        backend = Docker()
        backend.__dict__["engine"] = replace(backend.engine, local=False)
        return backend


class TestPodman(Sampled):
    @pytest.fixture
    def backend(self, podman):
        return Docker()
