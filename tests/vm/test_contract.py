"""boxlite keeps the contract, on real guests: in the machine of `make test-vm`, or with KVM.

VM_IMAGE      an OCI layout or an image's name, instead of the backend's own
VM_SECONDS    after so many no further test begins; each that didn't is named
VM_SHARED     set where a guest is slow: tests that ask for any sandbox share one
"""

import os
import time

import pytest

from metaflow_sandbox.backends.boxlite import Boxlite
from metaflow_sandbox.testing import BackendContract

pytestmark = pytest.mark.integration
STARTED = time.monotonic()
# The largest promises, in this order; the others follow as they are written.
FIRST = """
test_a_killed_owner_takes_its_microvm_along
test_the_deadline_ends_the_whole_tree[setsid sleep 61 & wait]
test_sandboxes_are_found_by_their_labels_and_destroyed_by_their_id
test_a_sandbox_ends_with_its_lifetime
test_streams_are_apart_and_carry_any_byte
test_an_exit_code_is_a_result[7]
test_there_is_no_network_where_none_was_asked
test_mounts_are_delivered
test_inputs_are_read_only
test_files_go_in_and_come_out[65536]
test_the_kernel_is_not_the_hosts
test_two_sandboxes_see_nothing_of_each_other
test_a_creation_that_is_cancelled_leaves_nothing[100]
test_memory_of_many_processes_is_limited_together
test_cancelling_ends_the_whole_tree
test_setup_is_kept_and_run_once
test_a_host_that_is_not_listed_is_refused
test_this_machine_is_never_part_of_the_network[True]
test_a_sandbox_that_is_destroyed_while_it_works_is_gone
test_a_destroyed_sandbox_says_that_it_is_gone
test_errors_of_files_are_the_built_in_ones
test_a_daemon_does_not_hold_a_command_up
test_output_comes_while_the_command_runs
""".split("\n")


class OfThisMachine(Boxlite):
    """Made from the image that the environment names; other processes load it too."""

    default_image = os.environ.get("VM_IMAGE") or Boxlite.default_image


class TestBoxlite(BackendContract):
    @pytest.fixture(scope="class")
    def anyio_backend(self):
        return "asyncio"

    @pytest.fixture
    def backend(self):
        return OfThisMachine()

    @pytest.fixture(scope="class")
    async def common(self):
        async with self.made(OfThisMachine()) as sandbox:
            yield sandbox

    @pytest.fixture
    async def sandbox(self, request, backend):
        if os.environ.get("VM_SHARED"):
            yield request.getfixturevalue("common")
        else:
            async with self.made(backend) as sandbox:
                yield sandbox
