"""Faults in an attempt's life in Daytona's sandboxes; see `clouds.py`.

A commit runs a part of it, SUITE=all the whole.
"""

import clouds
import points
import pytest
from test_faults import FLOW

SIGNALS = {
    "client": ("SIGTERM", "SIGKILL"),
    "supervisor": ("SIGTERM", "SIGKILL"),
    "scheduler": ("SIGINT", "SIGTERM", "SIGKILL"),
    "provider": ("eviction",),
}
SAMPLE = 3  # of all cases at a commit, about
# Much, as a supervisor that loads the SDK (2 s of work) is at it to the end: on a machine with a
# load of ten for each processor that was more than 20 s.
PROMISED_SECONDS = 90
MATRIX = clouds.matrix(SIGNALS)
#: What a connection does, and whether the step's attempt survives it.
CONNECTIONS = {
    "a creation is throttled": (("POST /api/sandbox$", {"status": 429, "headers": {
        "Retry-After-sandbox-create": "0.2"}, "times": 3}), True),
    "a creation fails once": (("POST /api/sandbox$", {"status": 502}), True),
    "the answer to a creation is lost": (("POST /api/sandbox$", {"lose": True}), True),
    "a sandbox can't be looked at": (("GET /api/sandbox/", {"status": 503, "times": 2}), True),
    "an upload fails": (("POST .*/bulk-upload", {"status": 502}), True),
    "an upload is reset": (("POST .*/bulk-upload", {"reset_upload": 1000}), True),
    "no session is made": (("POST .*/process/session$", {"status": 500}), None),
    "a command is not taken": (("POST .*/exec$", {"status": 502}), None),
    "the answer to a command is lost": (("POST .*/exec$", {"lose": True}), None),
    "a deletion fails": (("DELETE /api/sandbox/", {"status": 502, "times": 2}), True),
}  # fmt: skip


@pytest.fixture
def faulty(project, daytona):
    return clouds.prepare(project, daytona, "daytona", FLOW)


def assert_nothing_is_left_there(daytona, by_itself):
    """No sandbox: at once, or when its lifetime is over if nobody could end it."""
    if by_itself:
        daytona.advance(minutes=61)
    assert daytona.wait_until_none_lives(PROMISED_SECONDS)


@pytest.mark.sample(SAMPLE / len(MATRIX))
@pytest.mark.parametrize(("point", "who", "name"), MATRIX)
def test_after_a_fault_nothing_is_left_here_or_there(faulty, daytona, point, who, name):
    code, output = clouds.strike(faulty, daytona, "daytona", point, who, name)
    faulty.assert_nothing_left(PROMISED_SECONDS)
    assert_nothing_is_left_there(daytona, (who, name) == ("supervisor", "SIGKILL"))
    clouds.effects(output)
    whole = clouds.whole(faulty)
    assert whole in ([], [1000])
    if who == "scheduler":
        assert code != 0
    elif code == 0:
        assert whole == [1000], output
    else:
        assert "Traceback" not in output, output


@pytest.mark.sample(0.1)
@pytest.mark.parametrize("name", CONNECTIONS)
def test_a_bad_connection_ends_well_or_is_said_and_runs_no_step_twice(faulty, daytona, name):
    (match, fault), survives = CONNECTIONS[name]
    # The launch itself makes no sandbox, so these meet the step's own.
    daytona.fault(match, **fault)
    done = faulty.run("flow.py", "run")
    assert_nothing_is_left_there(daytona, False)
    clouds.effects(done.output)
    assert "Traceback" not in done.output, done.output
    if survives:
        assert done.code == 0, done.output
    if done.code == 0:
        assert clouds.whole(faulty) == [1000]


def test_the_matrix_has_every_point_and_every_fault():
    assert {point for point, _, _ in MATRIX} == set(points.POINTS)
    assert {who for _, who, _ in MATRIX} == set(SIGNALS)
