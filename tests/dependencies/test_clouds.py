"""What is built for a cloud's sandboxes is kept there, and used again."""

import os
import signal
import subprocess
import sys
import time

import pytest
from test_environments import a_step, answer, write_flow

WHICH = "import tomli, sys; self.found = [tomli.__file__, sys.executable]"


#: What is said when something is built.
ANNOUNCED = {"e2b": "builds a template", "daytona": "installing what the step needs"}


@pytest.mark.sample(0.08)
@pytest.mark.parametrize("kind, version", [("pypi", "2.0.1"), ("conda", "2.2.1")])
@pytest.mark.parametrize("cloud", ANNOUNCED)
def test_two_runs_share_one_build(request, project, shared_packages, cloud, kind, version):
    service = request.getfixturevalue(cloud)
    project.environment |= service.environment
    before = f"from metaflow import {cloud}"
    decorators = [f"@{cloud}(network=False)", f'@{kind}(packages={{"tomli": "{version}"}})']
    said = [
        a_step(project, decorators, WHICH, kind=kind, before=before).ok().output for _ in range(2)
    ]
    file, executable = answer(project)
    assert "/environments/" in file and "/environments/" in executable
    assert [ANNOUNCED[cloud] in text for text in said] == [True, False]


@pytest.mark.sample(0.2)
def test_what_a_build_that_was_killed_leaves_is_listed_and_ended_by_gc(
    project, daytona, shared_packages
):
    project.environment |= daytona.environment
    packages = '@pypi(packages={"tomli": "2.0.1"})'
    alone = "@daytona(setup=['true'])"  # of which no other test has made anything here
    write_flow(project, [alone, packages], kind="pypi", before="from metaflow import daytona")
    daytona.fault("POST .*/files/bulk-upload", delay=60)
    process = project.start("flow.py", "--environment=pypi", "run")
    while not (found := [i for i in daytona.living() if is_builder(daytona, i)]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    ((*listed, _, step),) = builders(project, "list")
    assert (listed, step) == (["daytona", found[0]], "Deps/?/start/?/?")
    assert builders(project, "gc") == []
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert builders(project, "gc") == [["ended", "daytona", found[0], f"({step})"]]
    assert daytona.wait_until_none_lives()


def is_builder(daytona, sandbox):
    return daytona.state()["requests"][sandbox]["name"].endswith("-builder")


def builders(project, command):
    """The words with which a command tells of each sandbox."""
    done = subprocess.run(
        [sys.executable, "-m", "metaflow_sandbox.cli", command, "--backend", "daytona"],
        env=project.environment, cwd=project.directory, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines() if "daytona" in line]
