"""The largest promises first, and an end in time: what wasn't begun is named, and no pass."""

import os
import time

import pytest

STARTED = time.monotonic()
FIRST = """
test_the_kernel_is_not_the_hosts
test_streams_are_apart_and_carry_any_byte
test_an_exit_code_is_a_result[7]
test_the_deadline_ends_the_whole_tree[setsid sleep 61 & wait]
test_errors_of_files_are_the_built_in_ones
test_files_go_in_and_come_out[65536]
test_a_daemon_does_not_hold_a_command_up
test_output_comes_while_the_command_runs
test_cancelling_ends_the_whole_tree
test_a_killed_owner_takes_its_microvm_along
test_inputs_are_read_only
test_sandboxes_are_found_by_their_labels_and_destroyed_by_their_id
test_a_sandbox_ends_with_its_lifetime
test_there_is_no_network_where_none_was_asked
test_a_host_that_is_not_listed_is_refused
test_setup_is_kept_and_run_once
test_memory_of_many_processes_is_limited_together
test_two_sandboxes_see_nothing_of_each_other
test_a_creation_that_is_cancelled_leaves_nothing[100]
test_a_sandbox_that_is_destroyed_while_it_works_is_gone
test_a_destroyed_sandbox_says_that_it_is_gone
test_this_machine_is_never_part_of_the_network[True]
test_root_inside_may_do_what_packages_need
test_mounts_are_delivered
test_memory_is_limited_where_that_is_declared
test_disk_is_limited_where_that_is_declared
test_cpu_is_limited_where_that_is_declared
test_preflight_names_the_provider
""".split("\n")
# Then those that share a guest, which are quick, and last those that make more of them.
LAST = ("BIG", "33554432", "much_output", "both_streams", "slow_reader")


def pytest_collection_modifyitems(items):
    def place(item):
        if item.name in FIRST:
            return 0, FIRST.index(item.name)
        if any(word in item.name for word in LAST):
            return 3, 0
        return (1 if "sandbox" in item.fixturenames else 2), 0

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _in_time():
    limit = os.environ.get("VM_SECONDS")
    if limit and time.monotonic() - STARTED > float(limit):
        pytest.skip("not checked: the time was over")


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    for report in skipped:
        terminalreporter.write_line(f"NOT CHECKED: {report.nodeid.rpartition('::')[2]}")
