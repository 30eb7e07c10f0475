"""No way to start a sandboxed step runs it bare: each fails closed, and says what to do.

With Metaflow's real commands. The step marks the host if it runs there; the control is
the same flow without the decorator, where the same commands do run it.
"""

import contextlib
import http.server
import json
import threading

import pytest

FLOW = """
    import os
    from metaflow import *

    MARK = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ran-on-the-host")

    class Bare(FlowSpec):
        @step
        def start(self):
            self.next(self.work)

        %s
        @step
        def work(self):
            open(MARK, "w").close()
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Bare()
"""
PLAIN = "\n"


def prepare(project, decorators):
    """A run whose first step is done, so that `work` can be started by hand."""
    project.write("flow.py", FLOW % PLAIN)
    project.run("flow.py", "run").ok()
    run, task = project.client('r = Flow("Bare").latest_run; answer = [r.id, r["start"].task.id]')
    (project.directory / "ran-on-the-host").unlink()
    project.write("flow.py", FLOW % decorators)
    return run, ["--run-id", run, "--task-id", "99", "--input-paths", f"{run}/start/{task}"]


BY_HAND = {
    "step": (["step", "work"], []),
    "its second attempt": (
        ["step", "work"],
        ["--retry-count", "1", "--max-user-code-retries", "1"],
    ),
    "what follows its last attempt": (
        ["step", "work"],
        ["--retry-count", "1", "--max-user-code-retries", "0"],
    ),
}


SANDBOXED = ["@sandbox", "@retry(times=1)\n        @e2b"]


def test_a_step_that_is_run_by_hand_does_not_run_bare(project):
    _, place = prepare(project, PLAIN)
    mark = project.directory / "ran-on-the-host"
    for command, options in BY_HAND.values():
        for decorators in SANDBOXED:
            project.write("flow.py", FLOW % decorators)
            done = project.run("flow.py", *command, *place, *options)
            assert done.code != 0 and "outside of any sandbox" in done.output
            assert not mark.exists()
        project.write("flow.py", FLOW % PLAIN)
        done = project.run("flow.py", "--with", "sandbox", *command, *place, *options)
        assert done.code != 0 and "outside of any sandbox" in done.output
        assert not mark.exists()
        project.run("flow.py", *command, *place, *options).ok()  # the control
        mark.unlink()


SKIPPING = "@catch(var='caught')\n        @sandbox\n        @runs_it"
RUNS_IT = """
    import os
    from metaflow import user_step_decorator

    MARK = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ran-on-the-host")

    @user_step_decorator
    def runs_it(step_name, flow, inputs, attributes):
        if "METAFLOW_SANDBOX_WORKLOAD" not in os.environ:
            open(MARK, "w").close()
        yield
"""


def test_what_catch_runs_on_the_host_has_no_decorators_of_the_users_around_it(project):
    project.write("around.py", RUNS_IT)
    for decorators, sandboxed in ((SKIPPING, True), (SKIPPING.replace("@sandbox", ""), False)):
        source = (FLOW % decorators).replace('open(MARK, "w").close()', "raise ValueError(1)")
        project.write(
            "flow.py", source.replace("import os", "import os; from around import runs_it", 1)
        )
        project.run("flow.py", "run").ok()
        assert (project.directory / "ran-on-the-host").exists() != sandboxed
        assert project.client('answer = bool(Flow("Bare").latest_run["work"].task.data.caught)')


def test_spin_does_not_run_a_step_bare(project):
    _, place = prepare(project, "@sandbox")
    mark = project.directory / "ran-on-the-host"
    for options in ([], ["--skip-decorators"]):
        done = project.run("flow.py", "spin", "work", *options)
        assert done.code != 0 and "@sandbox" in done.output
        assert not mark.exists()
    project.run("flow.py", "spin-step", "work", *place)
    assert not mark.exists()
    project.write("flow.py", FLOW % PLAIN)
    project.run("flow.py", "spin", "work").ok()  # the control
    assert mark.exists()


DEPLOYERS = {
    "argo-workflows": ["argo-workflows", "create", "--only-json"],
    "step-functions": ["step-functions", "create", "--only-json"],
    "airflow": ["airflow", "create", "dag.py"],
}


@pytest.mark.parametrize("name", DEPLOYERS)
@pytest.mark.parametrize("how", ["decorator", "with", "default"])
def test_a_deployer_is_refused_by_name_before_it_packs_anything(project, name, how):
    project.write("flow.py", FLOW % ("@sandbox" if how == "decorator" else PLAIN))
    options = ["--with", "sandbox"] if how == "with" else []
    default = {"METAFLOW_DECOSPECS": "sandbox"} if how == "default" else {}
    done = project.run("flow.py", *options, *DEPLOYERS[name], env=default)
    assert done.code != 0
    assert f"`{name}` would run step" in done.output, done.output
    assert "outside of any sandbox" in done.output
    assert not (project.directory / "dag.py").exists()


def test_what_is_refused_would_have_run_the_step_bare(project, s3):
    """The control: without the decorator each has a machine run the step as it is."""
    project.write("flow.py", FLOW % PLAIN)
    with amazon() as url:
        env = {
            **s3,
            "AWS_ENDPOINT_URL": url,
            "METAFLOW_SFN_IAM_ROLE": "arn:aws:iam::1:role/any",
            "METAFLOW_BATCH_JOB_QUEUE": "queue",
            "METAFLOW_ECS_S3_ACCESS_IAM_ROLE": "role",
            "METAFLOW_KUBERNETES_NAMESPACE": "default",
        }
        for name, command in DEPLOYERS.items():
            done = project.run("flow.py", *command, env=env).ok()
            dag = project.directory / "dag.py"
            plan = dag.read_text() if name == "airflow" else done.output
            assert "step work --run-id" in plan, (name, plan)


@contextlib.contextmanager
def amazon():
    """Step Functions and Batch, as far as a state machine's plan needs them: there is none yet."""

    answer = {
        "stateMachines": [],
        "jobQueues": [{"computeEnvironmentOrder": [{"computeEnvironment": "one"}]}],
        "computeEnvironments": [{"computeResources": {"type": "EC2"}}],
        "jobDefinitions": [],
        "jobDefinitionArn": "job",
    }

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
