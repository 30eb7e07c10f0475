"""The same flow on other datastores and metadata providers: the relay knows none by name."""

import pytest

FLOW = """
    from metaflow import FlowSpec, IncludeFile, Parameter, sandbox, step

    class Store(FlowSpec):
        number = Parameter("number", default=3)
        text = IncludeFile("text", default="text.txt")

        @step
        def start(self):
            self.items = ["a", "b"]
            self.next(self.work, foreach="items")

        @sandbox
        @step
        def work(self):
            import os
            self.seen = {k: v for k, v in os.environ.items() if "AWS" in k or "S3" in k}
            self.result = self.input * self.number + self.text.strip()
            self.big = bytes(2_000_000)
            print("in the sandbox", self.input)
            self.next(self.join)

        @sandbox
        @step
        def join(self, inputs):
            self.results = sorted(i.result for i in inputs)
            self.next(self.end)

        @step
        def end(self):
            print("results", self.results)

    if __name__ == "__main__":
        Store()
"""
LOOK = """
    def task_code(task):
        return task.code and task.code.flowspec
    run = Flow("Store").latest_run
    tasks = list(run["work"])
    answer = {
        "ok": run.successful, "results": run.data.results, "seen": [t.data.seen for t in tasks],
        "logs": sorted(t.stdout for t in tasks),
        "big": {len(t.data.big) for t in tasks} == {2000000},
        "code": "class Store" in str(task_code(tasks[0])), "done": [t.finished for t in tasks],
        "ds": sorted({t.metadata_dict["ds-type"] for t in tasks}),
    }
"""


def expected(datastore):
    return {
        "ok": True, "results": ["aaahello", "bbbhello"], "seen": [{}, {}],
        "logs": ["in the sandbox a\n", "in the sandbox b\n"], "big": True, "code": True,
        "done": [True, True], "ds": [datastore],
    }  # fmt: skip


sampled = pytest.mark.sample(0.3)


@pytest.mark.parametrize(
    "backend",
    ["bubblewrap", pytest.param("e2b", marks=sampled), pytest.param("daytona", marks=sampled)],
)
def test_s3_with_no_s3_credential_inside(request, project, s3, backend):
    if backend != "bubblewrap":
        project.environment |= request.getfixturevalue(backend).environment
    project.write("flow.py", FLOW)
    project.write("text.txt", "hello\n")
    project.run("flow.py", "run", env={**s3, "METAFLOW_SANDBOX_BACKEND": backend}).ok()
    assert project.client(LOOK, env=s3) == expected("s3")


def test_service_metadata_through_metaflows_own_provider(project, service):
    project.write("text.txt", "hello\n")
    views = []
    for source in (FLOW.replace("@sandbox", ""), FLOW):
        project.write("flow.py", source)
        project.run("flow.py", "run", env=service).ok()
        views.append(project.client(LOOK, env=service))
    # This service doesn't tell when a task finished, sandboxed or not.
    plain, sandboxed = views
    assert sandboxed == {**plain, "code": True}
    assert sandboxed["results"] == ["aaahello", "bbbhello"]
