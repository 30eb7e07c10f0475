"""What a step can try in Daytona's sandboxes alone."""

import http.server
import threading

import pytest
from test_boundary import FLOW

from emulators import flooded


@pytest.fixture
def project(project, daytona):
    project.environment.update(daytona.environment, METAFLOW_SANDBOX_BACKEND="daytona")
    yield project
    assert daytona.wait_until_none_lives()


#: Lines that are no honest runner's.
FORGED = {
    "an end with a number that isn't one": 'b\'ffffff x {"code": Infinity, "oom": 0}\'',
    "an end of nesting": "b'ffffff x ' + b'[' * 500000",
    "an end of text": 'b\'ffffff x {"code": "x", "oom": {}}\'',
    "an absurd number": "b'f' * 500000 + b' ob eA=='",
    "output that is no base64": "b'ffffff ob x'",
    "the end of a step that goes on": 'b\'ffffff x {"code": 0, "oom": 1}\'',
}
#: The session's shell is the step's user's, and holds what its commands write into their log.
FORGE = """
            for log in glob.glob("/proc/[0-9]*/fd/1"):
                try:
                    fd = os.open(log, os.O_WRONLY)
                    os.write(fd, b"\\n" + %s + b"\\n")
                except OSError:
                    pass
            time.sleep(1000)"""


@pytest.mark.sample(0.15)
@pytest.mark.parametrize("name", FORGED)
def test_lines_that_a_step_forges_in_the_log_of_what_runs_it_get_nothing_past_the_launcher(
    project, name
):
    attack = (FORGE % FORGED[name]).strip()
    source = FLOW % {"canary": "-", "sandbox": "@sandbox(timeout=15)", "attack": attack}
    project.write("flow.py", source)
    done = project.run("flow.py", "run")
    assert done.code != 0
    assert "[sandbox]" in done.output
    assert "Traceback" not in done.output.partition("Workflow failed")[0]


# --- a daemon in whose place a step answers that has become root


@pytest.fixture
def hostile(daytona, monkeypatch):
    for name, value in daytona.environment.items():
        monkeypatch.setenv(name, value)
    yield daytona
    assert daytona.wait_until_none_lives()


PART = '--x\r\nContent-Disposition: form-data; name="error"; filename="x"\r\n\r\n'
FORM = {"headers": {"content-type": "multipart/form-data; boundary=x"}, "start": PART}
#: What is done, the request whose answer is far too large, that answer, and what comes of it.
FLOODS = {
    "a command's identity": ("run", "POST .*/exec$", {}, "ProtocolError"),
    "a command's error": ("run", "POST .*/exec$", {"status": 400}, "SandboxError"),
    "what a file is": ("read", "GET .*/files/info", {}, "ProtocolError"),
    "a file": ("read", "/files/.*download", {}, "OverflowError"),
    "a file's error": ("read", "/files/.*download", {"status": 400}, "SandboxError"),
    "an error in a form": ("read", "/files/.*download", FORM, "OverflowError"),
    "a small upload's error": ("write", "POST .*/bulk-upload", {"status": 400}, "SandboxError"),
    "a large upload's error": ("write much", "POST .*/bulk-upload", {"status": 400},
                               "SandboxError"),
    "a large upload's answer": ("write much", "POST .*/bulk-upload", {}, "nothing"),
}  # fmt: skip
#: What is the only message of a log, and what comes of it.
LOGS = {
    "one of 100 MB": (["x", 100 << 20], "ProtocolError"),
    "a line without an end": (["\1\1\1" + "x" * 997, 1000], "ProtocolError"),
    "marks alone": (["\1\1\1", 300_000], "ConnectionLost"),
}


@pytest.mark.sample(0.5)
@pytest.mark.parametrize("name", FLOODS)
def test_an_answer_without_an_end_does_not_fill_the_launchers_memory(hostile, name):
    action, match, fault, error = FLOODS[name]
    raised, grown = flooded.meet(
        "daytona", action, lambda: hostile.fault(match, flood=200, **fault)
    )
    assert grown < 50
    assert raised == error


@pytest.mark.parametrize("name", LOGS)
def test_a_message_of_a_log_takes_neither_memory_nor_time_of_the_launcher(hostile, name):
    message, error = LOGS[name]
    raised, grown = flooded.meet("daytona", "run", lambda: hostile.ask("PUT", "hostile", [message]))
    assert grown < 50
    assert raised == error


@pytest.mark.parametrize("what", ["POST .*/exec$", "GET .*/files/info", "a log"])
def test_an_answer_sends_the_launcher_nowhere_else(hostile, what):
    reached = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            reached.append(self.requestline)

        do_POST = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"

        def begin():
            if what == "a log":
                hostile.ask("PUT", "hostile", [address] * 5)
            else:
                hostile.fault(what, status=307, headers={"location": address})

        flooded.meet("daytona", "read" if "info" in what else "run", begin)
        server.shutdown()
    assert reached == []


def test_a_cookie_of_one_sandboxs_daemon_goes_to_no_other(hostile):
    hostile.set(toolbox_host="localhost")  # of addresses none is kept
    cookie = {"status": 400, "headers": {"set-cookie": "theirs=1; Path=/"}}
    flooded.meet("daytona", "run", lambda: hostile.fault("POST .*/exec$", **cookie))
    assert not any("cookie" in entry["headers"] for entry in hostile.journal())
