"""Faults in an attempt's life in E2B's sandboxes; see `clouds.py`."""

import clouds
import points
import pytest

START = "POST /process.Process/Start"
CREATE = "POST /v2/sandboxes"


def answer(status, message, **more):
    return {"status": status, "body": {"code": status, "message": message}, **more}


CONNECTIONS = {
    "creations are throttled": (CREATE, answer(429, "Rate limit exceeded", times=5)),
    "others have all places": (CREATE, answer(429, "maximum number of concurrent", times=9)),
    "E2B is busy": (CREATE, answer(503, "no room", times=5)),
    "a creation fails": (CREATE, answer(500, "sorry")),
    "the answer to a creation is lost": (CREATE, {"lose": True}),
    "an upload isn't taken": ("POST /files", answer(502, "the port is not open")),
    "an upload is throttled": ("POST /files", answer(429, "slow")),
    "an upload is reset": ("POST /files", {"reset_upload": 1000}),
    "the answer to an upload is lost": ("POST /files", {"lose": True}),
    "a command isn't taken": (START, answer(502, "the port is not open")),
    "the answer to a command is lost": (START, {"lose": True}),
    "the output is reset": (START, {"reset_download": 300}),
    "the output is cut off": (START, {"cut_download": 300}),
    "deletions fail": ("DELETE /sandboxes", answer(500, "sorry", times=2)),
    "deletions are throttled": ("DELETE /sandboxes", answer(429, "slow", times=5)),
    "the answer to a deletion is lost": ("DELETE /sandboxes", {"lose": True}),
}


@pytest.fixture
def faulty(project, e2b):
    return clouds.prepare(project, e2b, "e2b")


@pytest.mark.sample(0.05)
@pytest.mark.parametrize(("point", "who", "name"), clouds.MATRIX)
def test_after_a_fault_nothing_is_left_here_or_there(faulty, e2b, point, who, name):
    clouds.meet(faulty, e2b, "e2b", point, who, name)


@pytest.mark.sample(0.1)
@pytest.mark.parametrize("name", CONNECTIONS)
def test_a_bad_connection_is_survived_and_the_step_runs_once(faulty, e2b, name):
    match, fault = CONNECTIONS[name]
    assert clouds.connect(faulty, e2b, match, fault) == ["SIDE EFFECT 0"]
    assert clouds.whole(faulty) == [1000]
    assert [f for f in e2b.ask("GET", "faults") if f["times"]] == []  # they were met


def test_the_matrix_has_every_point_and_every_fault():
    assert {point for point, _, _ in clouds.MATRIX} == set(points.POINTS)
    assert {who for _, who, _ in clouds.MATRIX} == set(clouds.SIGNALS)
