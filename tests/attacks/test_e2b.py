"""Every byte that E2B is sent, and what a step can try in its sandboxes alone."""

import gzip
import io
import json
import re
import tarfile

import pytest
import what_goes_in as manifest
from test_boundary import FLOW, run
from test_what_goes_in import Host, named

from emulators.e2b.server import KEY


@pytest.fixture
def project(project, e2b):
    project.environment.update(e2b.environment, METAFLOW_SANDBOX_BACKEND="e2b")
    yield project
    assert e2b.wait_until_none_lives()


# --- what the service is sent


def contents(data):
    """Everything in a body, archives in archives unpacked."""
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    try:
        archive = tarfile.open(fileobj=io.BytesIO(data), mode="r:")
    except tarfile.TarError:
        yield data
        return
    for member in archive:
        yield member.name.encode()
        if member.isfile():
            yield from contents(archive.extractfile(member).read())


def test_nothing_secret_is_sent_to_the_service_but_the_key_in_its_header(project, e2b, tmp_path):
    """A launch, the build of a template, an attempt and its end, on a host full of secrets."""
    host = Host(project)
    host.variables |= {**e2b.environment, "E2B_ACCESS_TOKEN": host.canary("environment")}
    bodies = tmp_path / "bodies"
    bodies.mkdir()
    e2b.settings(bodies=str(bodies))
    host.run(
        '@sandbox(backend="e2b", env=["WANTED"], network=False, cpu=1, setup=["true"], '
        'image="python:3.12-slim")'
    )
    journal = {e["number"]: e for e in e2b.journal() if not e["path"].startswith("/_test")}
    steps = {(e["method"], re.sub(r"/i[a-z0-9]{19}", "/*", e["path"])) for e in journal.values()}
    assert {
        ("POST", "/v3/templates"), ("POST", "/v2/templates/*/builds/*"), ("POST", "/v2/sandboxes"),
        ("POST", "/files"), ("POST", "/process.Process/Start"), ("DELETE", "/sandboxes/*"),
    } <= steps  # fmt: skip
    for entry in journal.values():
        about = json.dumps({**entry, "headers": {**entry["headers"], "x-api-key": ""}})
        assert KEY not in about and host.token not in about
        to_the_sandbox = "e2b-sandbox-id" in entry["headers"]
        assert entry["headers"].get("x-api-key") == (None if to_the_sandbox else KEY)
    uploaded = set()
    for path in bodies.iterdir():
        entry = journal.get(int(path.name.partition("-")[2]))
        if entry is None:
            continue
        for data in contents(path.read_bytes()):
            assert KEY.encode() not in data, entry["path"]
            found = re.findall(rf"canary-{host.token}-[a-z0-9-]+[a-z]".encode(), data)
            assert not found or entry["path"] == "/files", (entry["path"], found)
            uploaded |= {named(secret.decode()) for secret in found}
    assert uploaded == set(manifest.GOES_IN)  # so that the rest would have been seen


# --- what comes out


def test_a_step_that_fills_the_disk_fails_alone(project, e2b):
    e2b.cloud(disk=64)
    attack = """
            with open(os.environ["HOME"] + "/full", "wb") as f:
                try:
                    while True: f.write(bytes(1 << 20)); f.flush()
                except OSError:
                    pass
            self.mine = os.urandom(1 << 20)"""
    done, _ = run(project, attack.strip())
    assert done.code != 0
    assert "its sandbox's disk is full" in done.output
    assert "Traceback" not in "".join(x for x in done.output.splitlines() if "[sandbox]" in x)


PROFILE = r"""
            import base64, signal
            forged = "o " + base64.b64encode(b"mfs1 1 x forged\n").decode()
            with open("/home/user/.bash_profile", "w") as f:
                f.write("printf '%%s\\n' '%s' 'e !!' 'm x' 'a shell of mine'; sleep 1\n" % forged)
                f.write("exec() { exit 0; }\n")
            os.makedirs("/home/user/.local/bin", exist_ok=True)
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    command = open("/proc/%s/cmdline" % pid).read()
                except OSError:
                    continue
                if "python3\0-I\0-S\0-c" in command and "agent.py" in command:
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(1000)"""


def test_a_shell_that_a_step_prepares_for_the_launcher_gets_nothing_past_it(project):
    """E2B runs each command by a login shell, whose files are the step's to write."""
    source = FLOW % {"canary": "-", "sandbox": "@sandbox(timeout=15)", "attack": PROFILE.strip()}
    project.write("flow.py", source)
    done = project.run("flow.py", "run")
    assert done.code != 0
    assert "Traceback" not in done.output.partition("Workflow failed")[0]
    assert not any(
        project.client('answer = [t.finished for t in Flow("Attack").latest_run["hostile"]]')
    )
