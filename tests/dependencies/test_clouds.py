"""What is built for a cloud's sandboxes is kept there, and used again."""

import pytest
from test_environments import a_step, answer

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
