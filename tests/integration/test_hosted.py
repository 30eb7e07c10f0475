"""A flow in each provider's own sandboxes: `pytest tests/integration -m integration`.

Needs the provider's backend and the user's own key, and says what it did not run.
"""

import os

import pytest

from metaflow_sandbox.backends import registry

KEYS = {"daytona": "DAYTONA_API_KEY", "e2b": "E2B_API_KEY"}
FLOW = """
    from metaflow import FlowSpec, sandbox, step

    class Hosted(FlowSpec):
        @step
        def start(self):
            self.items = [1, 2]
            self.next(self.work, foreach="items")

        @sandbox(backend="%s")
        @step
        def work(self):
            import os
            self.result = self.input * 10
            self.seen = sorted(k for k in os.environ if "KEY" in k or "SECRET" in k)
            print("in the sandbox")
            self.next(self.join)

        @step
        def join(self, inputs):
            self.results = sorted(i.result for i in inputs)
            self.seen = [i.seen for i in inputs]
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Hosted()
"""


@pytest.mark.integration
@pytest.mark.parametrize("name", KEYS)
def test_a_flow_runs_in_the_providers_own_sandboxes(project, name):
    if name not in registry.names():
        pytest.skip(f"NOT RUN: this version has no backend {name!r}")
    if KEYS[name] not in os.environ:
        pytest.skip(f"NOT RUN: {KEYS[name]} is not set")
    project.write("flow.py", FLOW % name)
    key = {KEYS[name]: os.environ[KEYS[name]]}
    project.run("flow.py", "run", env=key).ok()
    answer = project.client(
        'd = Flow("Hosted").latest_run.data; answer = [d.results, d.seen]', env=key
    )
    assert answer == [[10, 20], [[], []]]
