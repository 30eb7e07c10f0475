"""What a step can try in Daytona's sandboxes alone."""

import pytest
from test_boundary import FLOW


@pytest.fixture
def project(project, daytona):
    project.environment.update(daytona.environment, METAFLOW_SANDBOX_BACKEND="daytona")
    yield project
    assert daytona.wait_until_none_lives()


#: Lines that are no honest runner's.
FORGED = {
    "an end with a number that isn't one": 'b\'ffffff x {"code": Infinity, "oom": 0}\'',
    "an end of nesting": "b'ffffff x ' + b'[' * 500000",
    "an end of text": 'b\'ffffff x {"code": "x", "oom": {}}\'',
    "an absurd number": "b'f' * 500000 + b' ob eA=='",
    "output that is no base64": "b'ffffff ob x'",
    "the end of a step that goes on": 'b\'ffffff x {"code": 0, "oom": 1}\'',
}
#: The session's shell is the step's user's, and holds what its commands write into their log.
FORGE = """
            for log in glob.glob("/proc/[0-9]*/fd/1"):
                try:
                    fd = os.open(log, os.O_WRONLY)
                    os.write(fd, b"\\n" + %s + b"\\n")
                except OSError:
                    pass
            time.sleep(1000)"""


@pytest.mark.sample(0.3)
@pytest.mark.parametrize("name", FORGED)
def test_lines_that_a_step_forges_in_the_log_of_what_runs_it_get_nothing_past_the_launcher(
    project, name
):
    attack = (FORGE % FORGED[name]).strip()
    source = FLOW % {"canary": "-", "sandbox": "@sandbox(timeout=15)", "attack": attack}
    project.write("flow.py", source)
    done = project.run("flow.py", "run")
    assert done.code != 0
    assert "[sandbox]" in done.output
    assert "Traceback" not in done.output.partition("Workflow failed")[0]
