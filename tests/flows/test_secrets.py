"""`@secrets`: fetched here by the cloud's real client, and given to the step as values."""

import http.server
import json
import threading

import pytest
from metaflow.plugins.secrets.secrets_decorator import SecretsDecorator

from metaflow_sandbox.errors import SandboxError
from metaflow_sandbox.launch.secrets import Secrets

VALUE = "canary-of-the-secret"
KEY = "canary-of-the-cloud-key"


class SecretsManager(http.server.BaseHTTPRequestHandler):
    """As much of AWS's as its client needs to read a secret."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["SecretId"]
        self.server.asked.append(asked)
        if asked in self.server.secrets:
            text = json.dumps(self.server.secrets[asked])
            status, answer = 200, {"Name": asked, "SecretString": text}
        else:
            status, answer = 400, {"__type": "ResourceNotFoundException", "Message": "no such"}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def manager(project):
    """A service that a project's flows reach with a key in a variable."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SecretsManager) as server:
        server.asked, server.secrets = [], {"mine": {"MY-TOKEN": VALUE}}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        project.environment.update(
            AWS_ENDPOINT_URL_SECRETS_MANAGER=f"http://127.0.0.1:{server.server_port}",
            AWS_ACCESS_KEY_ID="mine",
            AWS_SECRET_ACCESS_KEY=KEY,
            AWS_DEFAULT_REGION="eu-west-1",
        )
        yield server
        server.shutdown()


@pytest.fixture
def here(project, manager, monkeypatch):
    """Has this process reach the service as flows do."""
    for name, value in project.environment.items():
        if name.startswith("AWS"):
            monkeypatch.setenv(name, value)


def flow(project, decorators, body):
    lines = "\n    ".join(decorators)
    project.write(
        "flow.py",
        f"""
import os
from metaflow import FlowSpec, catch, environment, retry, sandbox, secrets, step

class Secret(FlowSpec):
    {lines}
    @step
    def start(self):
        {body}
        self.next(self.end)

    @secrets(sources=["aws-secrets-manager.mine"])
    @step
    def end(self):
        self.token = os.environ["MY_TOKEN"]

if __name__ == "__main__":
    Secret()
""",
    )


SEEN = (
    'self.seen = {k: v for k, v in os.environ.items() if k.startswith(("AWS", "MY_"))}; '
    'self.commands = [open(f"/proc/{pid}/cmdline").read() '
    'for pid in filter(str.isdigit, os.listdir("/proc"))]'
)
SANDBOX, SECRETS = "@sandbox(network=False)", '@secrets(sources=["aws-secrets-manager.mine"])'


@pytest.mark.parametrize("decorators", [[SANDBOX, SECRETS], [SECRETS, SANDBOX]], ids=["1", "2"])
def test_a_step_gets_its_secrets_and_no_way_to_them(project, manager, decorators):
    flow(project, decorators, SEEN)
    done = project.run("flow.py", "run").ok()
    seen, commands, token = project.client(
        'run = Flow("Secret").latest_run; d = run["start"].task.data; '
        "answer = [d.seen, d.commands, run.data.token]"
    )
    assert seen == {"MY_TOKEN": VALUE}
    assert token == VALUE  # of the step beside it, which has no sandbox
    assert manager.asked == ["mine", "mine"]
    assert VALUE not in done.output + str(commands)
    files = [p for p in project.directory.rglob("*") if p.is_file()]
    assert [p for p in files if KEY.encode() in p.read_bytes()] == []


def test_secrets_come_by_with_too_and_for_each_attempt_anew(project, manager):
    manager.secrets["other"] = {"MY_X": "1"}
    flow(project, ["@retry(times=1, minutes_between_retries=0)"], "assert not os.environ['MY_X']")
    by_with = ["--with", "sandbox", "--with", 'secrets:sources=["aws-secrets-manager.other"]']
    done = project.run("flow.py", "run", *by_with)
    assert done.code != 0
    assert manager.asked == ["other", "other"]


def test_a_secret_that_can_not_be_had_is_said_and_the_step_does_not_begin(project, manager):
    flow(project, [SANDBOX, SECRETS.replace("mine", "none")], 'print("THE STEP RUNS")')
    done = project.run("flow.py", "run")
    assert done.code != 0
    assert "none (aws-secrets-manager) can't be fetched" in done.output
    assert "THE STEP RUNS" not in done.output
    assert "Traceback" not in done.output


def fetched(sources, taken, **more):
    attributes = {"sources": [f"aws-secrets-manager.{name}" for name in sources], **more}
    decorator = SecretsDecorator(attributes, statically_defined=True)
    decorator.init()
    return Secrets.of([decorator]).fetch(taken)


@pytest.mark.parametrize(
    ("sources", "taken", "message"),
    [
        (["mine", "second"], [], "'MY_TOKEN' as env var, and it is also added by"),
        (["metaflows"], [], "METAFLOW_HOME"),
        (["metaflows-too"], [], "MF_ATTEMPT is Metaflow's own"),
        (["mine"], ["MY_TOKEN"], "so does @environment or env= of the step"),
    ],
)
def test_a_name_that_something_else_has_is_refused(manager, here, sources, taken, message):
    manager.secrets |= {"second": {"MY_TOKEN": "2"}, "metaflows": {"METAFLOW_HOME": "/"}}
    manager.secrets["metaflows-too"] = {"MF_ATTEMPT": "7"}
    with pytest.raises(SandboxError, match=message):
        fetched(sources, taken)


def test_a_secret_may_replace_a_variable_of_the_step_where_that_is_said(manager, here):
    assert fetched(["mine"], ["MY_TOKEN"], allow_override=True) == {"MY_TOKEN": VALUE}


def test_what_follows_the_last_attempt_needs_no_secret(project, manager):
    flow(project, ['@catch(var="failure")', SANDBOX, SECRETS], 'raise ValueError("as planned")')
    done = project.run("flow.py", "run").ok()
    assert "ValueError: as planned" in done.output
    assert manager.asked == ["mine", "mine"]  # of the attempt, and of the plain step
