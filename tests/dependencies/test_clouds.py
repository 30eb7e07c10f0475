"""What is built for a cloud's sandboxes is kept there, and used again."""

import pytest
from test_environments import a_step, answer

WHICH = "import tomli, sys; self.found = [tomli.__file__, sys.executable]"


@pytest.mark.heavy
@pytest.mark.parametrize("kind, version", [("pypi", "2.0.1"), ("conda", "2.2.1")])
@pytest.mark.parametrize("cloud", ["e2b", "daytona"])
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
    announced = "once: "
    assert announced in said[0] and announced not in said[1]
