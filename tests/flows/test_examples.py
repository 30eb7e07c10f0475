"""The examples run as their first lines say."""

from pathlib import Path

import pytest

ANYWHERE = Path(__file__).parents[2] / "examples/anywhere/flow.py"


@pytest.mark.parametrize("backend", ["bubblewrap", "remote-like"])
def test_anywhere_runs_with_any_backend(project, backend):
    project.write("flow.py", ANYWHERE.read_text())
    keys = {"PROVIDER_KEY": "secret"}
    done = project.run("flow.py", "run", "--with", f"sandbox:backend={backend}", env=keys).ok()
    assert done.output.count("ended with 0:") == 3
    assert done.output.count("[]") == 3  # no variable of the host's looks like a key
    assert "secret" not in done.output


def test_anywhere_runs_the_program_that_it_is_given(project):
    project.write("flow.py", ANYWHERE.read_text())
    code = "print(6 * 7); raise SystemExit(3)"
    words = ["run", "--with", "bubblewrap", "--code", code, "--copies", "1"]
    output = project.run("flow.py", *words).ok().output
    assert "0 ended with 3:" in output and "42" in output
