"""A trace is off unless it is asked for, and has an end."""

from types import SimpleNamespace

import pytest
from metaflow import metaflow_config

from metaflow_sandbox.launch import trace

JOB = SimpleNamespace(
    flow="F", run="1", step="s", task="2", attempt=0, backend="b", environment={"A": "secret"}
)


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.mark.parametrize("value", [None, "", "0", "false", "False", 0, False])
def test_it_is_off_unless_asked_for(monkeypatch, tmp_path, value):
    monkeypatch.setattr(metaflow_config, "SANDBOX_DEBUG", value)
    trace.Trace(JOB).event("anything")
    assert list(tmp_path.iterdir()) == []


def test_it_has_an_end_whatever_a_step_prints(monkeypatch):
    monkeypatch.setattr(metaflow_config, "SANDBOX_DEBUG", "1")
    monkeypatch.setattr(trace, "_MOST", 5)
    made = trace.Trace(JOB)
    for i in range(20):
        made.event("frame", seq=i)
    lines = (made.directory / "events.jsonl").read_text().splitlines()
    assert len(lines) == 5
    assert "secret" not in "".join(lines)
