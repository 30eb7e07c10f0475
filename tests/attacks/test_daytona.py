"""Hostile steps in a cloud's sandbox: the same boundary, on the other way out of a sandbox.

The tests are those of `test_boundary.py`, where their positive controls are, too.
"""

import pytest
from test_boundary import (
    FLOW,
    FORGED_RECORD,
    FORGERIES,
    PATCHED,
    STOPPED,
    run,
    test_a_pickle_bomb_among_the_users_artifacts_is_refused_when_loaded,  # noqa: F401
    test_frames_that_a_step_prints_are_output_and_no_more,  # noqa: F401
)

#: They take a while; in a few commits each has run.
pytestmark = pytest.mark.sample(0.3)


@pytest.fixture
def project(project, daytona):
    project.environment.update(daytona.environment, METAFLOW_SANDBOX_BACKEND="daytona")
    yield project
    assert daytona.wait_until_none_lives()


def test_a_pickle_bomb_is_never_unpickled_and_a_forged_record_is_rejected(project):
    for attack, message in (
        (PATCHED, "is not what Metaflow records there"),
        (FORGED_RECORD % FORGERIES["another run's blob"][0], "neither an input nor"),
    ):
        done, pwned = run(project, attack)
        assert not pwned
        assert done.code != 0
        assert message in done.output


@pytest.mark.parametrize("name", ["kills everything", "stops the agent"])
def test_a_step_that_ends_or_stops_what_holds_it_is_ended_in_time(project, name):
    source = FLOW % {
        "canary": "-", "sandbox": "@sandbox(timeout=15)", "attack": STOPPED[name],
    }  # fmt: skip
    project.write("flow.py", source)
    done = project.run("flow.py", "run")
    assert done.code != 0
    assert "Traceback" not in done.output.partition("Workflow failed")[0]
