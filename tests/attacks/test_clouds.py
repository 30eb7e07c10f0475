"""Hostile steps in the sandboxes of clouds: the same boundary, on another way out.

On the emulated services. What `test_boundary.py` and `test_taken_over.py` try, where the positive
controls are, too; a commit runs a part of it.
"""

import pytest
import test_boundary as boundary
import test_taken_over as taken_over

pytestmark = pytest.mark.sample(0.15)
#: Where the agent leaves what a step made, in each cloud's sandboxes.
OUTBOXES = {
    "e2b": "/home/user/sandbox/outbox",
    "daytona": "/tmp/metaflow-sandbox/outbox",
}
ENDED = {
    **{name: boundary.STOPPED[name] for name in ("kills everything", "kills the agent")},
    **{name: boundary.STOPPED[name] for name in ("stops everything", "stops the agent")},
    "ignores its end": boundary.STOPPED["ignores its end"],
    "daemons that stay": "\n            for _ in range(20):\n                if os.fork() == 0:\n"
    "                    os.setsid()\n                    if os.fork(): os._exit(0)\n"
    "                    time.sleep(1000)\n            time.sleep(1000)",
}


@pytest.fixture(params=OUTBOXES)
def cloud(request):
    return request.param


@pytest.fixture
def project(request, project, cloud):
    service = request.getfixturevalue(cloud)
    project.environment.update(service.environment, METAFLOW_SANDBOX_BACKEND=cloud)
    yield project
    assert service.wait_until_none_lives()


def test_a_pickle_bomb_is_never_unpickled_and_a_forged_record_is_rejected(project):
    for attack, message in (
        (boundary.PATCHED, "is not what Metaflow records there"),
        (
            boundary.FORGED_RECORD % boundary.FORGERIES["another run's blob"][0],
            "neither an input nor",
        ),
    ):
        done, pwned = boundary.run(project, attack)
        assert not pwned
        assert done.code != 0
        assert message in done.output


def test_a_pickle_bomb_among_the_users_artifacts_is_refused_when_loaded(project):
    boundary.test_a_pickle_bomb_among_the_users_artifacts_is_refused_when_loaded(project)


def test_frames_that_a_step_prints_are_output_and_no_more(project):
    boundary.test_frames_that_a_step_prints_are_output_and_no_more(project)


@pytest.mark.parametrize("name", ENDED)
def test_a_step_that_ends_or_outlasts_what_holds_it_is_ended_in_time(project, name):
    source = boundary.FLOW % {
        "canary": "-", "sandbox": "@sandbox(timeout=15)", "attack": ENDED[name],
    }  # fmt: skip
    project.write("flow.py", source)
    done = project.run("flow.py", "run")
    assert done.code != 0
    assert "[sandbox]" in done.output
    assert "Traceback" not in done.output.partition("Workflow failed")[0]


def test_daemons_that_a_step_leaves_keep_nobody_waiting(project):
    attack = ENDED["daemons that stay"].rpartition("\n")[0] + "\n            self.mine = self.input"
    done, _ = boundary.run(project, attack)
    assert "SEEN [1, 2] [0, 1]" in done.ok().output


def test_a_flood_of_output_is_cut_and_the_step_goes_on(project):
    attack = """for _ in range(200):
                os.write(1, b"x" * 65535 + b"\\n")
                os.write(2, os.urandom(65535).replace(b"\\n", b"") + b"\\n")
            self.mine = self.input"""
    project.environment["METAFLOW_SANDBOX_MAX_OUTPUT"] = "1"
    done, _ = boundary.run(project, attack)
    assert "SEEN [1, 2] [0, 1]" in done.ok().output
    assert "bytes of output were dropped" in done.output
    assert len(done.output) < 6 << 20


@pytest.mark.parametrize("part", taken_over.PARTS)
def test_an_agent_that_was_taken_over_gets_nothing_past_the_launcher(project, cloud, part):
    flow = taken_over.FLOW.replace(
        'backend="remote-like", network=False, timeout=50, disk=512, memory=1024',
        f'backend="{cloud}", network=False, timeout=50',
    )
    program = taken_over.PROGRAM.replace("/sandbox/outbox", OUTBOXES[cloud])
    assert flow != taken_over.FLOW and program != taken_over.PROGRAM
    project.seconds = 900  # of sixteen sandboxes, some for all of their 50 s
    attacks = {**taken_over.PARTS[part], **taken_over.CONTROL}
    found = taken_over.outcomes(project, attacks, flow, program)
    assert taken_over.what_got_past(attacks, found) == {}
