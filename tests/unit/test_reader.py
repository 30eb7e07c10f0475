"""What only the step knows is read by a process of its own, which can do no harm and be ended."""

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from metaflow.exception import MetaflowExceptionWrapper

import metaflow_sandbox
from metaflow_sandbox.admission import reader
from metaflow_sandbox.admission.internals import Delivered

PACKAGES = str(Path(metaflow_sandbox.__file__).parents[1])
ENOUGH = 128 << 20  # bytes of an answer that the launcher can hold


def an_item(directory, name, content, form=None, **changes):
    path = directory / name
    path.write_bytes(content)
    sha = hashlib.sha1(content).hexdigest()
    form = form or Delivered.FORMS[name]
    return {"name": name, "form": form, "file": str(path), "raw": True, "sha": sha, **changes}


def ask(*items):
    """The reader's answer as the launcher gets it: (exit code, bytes, up to `ENOUGH`)."""
    command = [sys.executable, "-I", "-S", "-c", reader.PROGRAM, PACKAGES]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        process.stdin.write(json.dumps({"items": items}).encode())
        process.stdin.close()
        answer = process.stdout.read(ENOUGH)
        if len(answer) == ENOUGH:
            process.kill()
        return process.wait(), answer


def answers(*items):
    code, answer = ask(*items)
    assert code == 0
    return json.loads(answer)


def test_it_runs_on_a_bare_interpreter_and_answers_in_plain_json(tmp_path):
    wrapped = MetaflowExceptionWrapper(KeyError("x"))
    values = {
        "_task_ok": True,
        "_success": None,
        "_exception": wrapped,
        "_foreach_num_splits": 3,
        "_foreach_values": ["a", None, "ü\x1b"],
        "_transition": (["next"], "items"),
    }
    items = [an_item(tmp_path, name, pickle.dumps(value, 4)) for name, value in values.items()]
    assert answers(*items) == {
        "_task_ok": {"value": True},
        "_success": {"value": None},
        "_exception": {"value": wrapped.__dict__},
        "_foreach_num_splits": {"value": 3},
        "_foreach_values": {"value": ["a", None, "ü␛"]},
        "_transition": {"value": [["next"], "items"]},
    }


def test_it_imports_no_part_of_metaflow(tmp_path):
    script = reader.PROGRAM + "; assert 'metaflow' not in sys.modules, 'it is slow'"
    item = an_item(tmp_path, "_task_ok", pickle.dumps(True))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, PACKAGES],
        input=json.dumps({"items": [item]}).encode(),
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def a_list(depth):
    return b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b"."


def doubled(depth):
    value = []
    for _ in range(depth):
        value = [value, value]
    return pickle.dumps(value, 4)


REFUSED = {
    "a call": b"\x80\x04cos\nsystem\n\x8c\x04true\x85R.",
    "nothing": b"",
    "a number of many digits": pickle.dumps(10**5000, 4),
    "a list nested too deep": a_list(100_000),
    "a small list that is long to print": doubled(40),
    "a name with a surrogate": b"\x80\x04\x8c\x02os\x8c\x03\xed\xa0\x80\x93.",
    "a name with control characters": b"\x80\x04\x8c\x02os\x8c\x04\x1b[0m\x93.",
    "a key that is hashed for ever": b"\x80\x04}N"
    + b"\x940"
    + b"".join(b"h%ch%c\x86\x940" % (i, i) for i in range(60))
    + b"h\x3cNs.",
}


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("name", ["_success", "_exception", "_foreach_values", "_transition"])
def test_hostile_values_are_refused_and_the_others_are_read(tmp_path, name, content):
    items = an_item(tmp_path, name, content), an_item(tmp_path, "_task_ok", pickle.dumps(True))
    found = answers(*items)
    assert set(found[name]) == {"refused"}
    assert found[name]["refused"].isprintable()
    assert found["_task_ok"] == {"value": True}


@pytest.mark.parametrize(
    ("content", "changes"),
    [
        (pickle.dumps(True), {"sha": "0" * 40}),
        (pickle.dumps(True), {"raw": False}),
        (bytes(reader.MAX_BYTES + 1), {}),
    ],
    ids=["another key", "not packed", "too large"],
)
def test_a_blob_that_is_not_what_it_says_is_refused(tmp_path, content, changes):
    found = answers(an_item(tmp_path, "_success", content, **changes))
    assert set(found["_success"]) == {"refused"}


def many(item, count):
    """A list of the same item again and again."""
    return b"](" + item + b"\x94" + b"h\x00" * (count - 1) + b"e"


TEXT = b"X" + (1 << 20).to_bytes(4, "little") + b"x" * (1 << 20)
SHORT = b"X" + (10_000).to_bytes(4, "little") + b"x" * 10_000
MULTIPLIED = [
    pytest.param(
        "_transition",
        b"\x80\x04" + many(TEXT, 10_000) + b"N\x86.",
        id="a transition",
    ),
    pytest.param(
        "_foreach_values",
        b"\x80\x04" + many(SHORT, 20_000) + b".",
        id="values of a foreach",
    ),
    pytest.param("_exception", pickle.dumps("x" * reader.MAX_BYTES, 4)[:100], id="an exception"),
]


@pytest.mark.parametrize(("name", "content"), MULTIPLIED)
def test_no_small_value_makes_an_answer_that_fills_the_launchers_memory(tmp_path, name, content):
    _, answer = ask(an_item(tmp_path, name, content))
    assert len(answer) < ENOUGH


def test_it_has_little_memory_and_time_and_leaves_no_core(tmp_path):
    limits = "resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_CORE"
    script = f"{reader.PROGRAM}; import resource; print(*map(resource.getrlimit, ({limits})))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, PACKAGES],
        input=b'{"items": []}',
        capture_output=True,
    )
    pairs = [(limit, limit) for limit in (reader.MEMORY, reader.SECONDS, 0)]
    assert done.stdout.decode() == "{}" + " ".join(map(str, pairs)) + "\n"


REFUSING = """
import resource, sys
real = resource.setrlimit
def setrlimit(kind, limits):
    if kind == getattr(resource, {refused!r}):
        raise ValueError("current limit exceeds maximum limit")
    real(kind, limits)
resource.setrlimit, sys.platform = setrlimit, {platform!r}
"""


@pytest.mark.parametrize(
    ("platform", "refused", "goes_on"),
    [
        ("darwin", "RLIMIT_AS", True),
        ("darwin", "RLIMIT_CPU", False),
        ("linux", "RLIMIT_AS", False),
    ],
)
def test_only_a_mac_may_refuse_a_limit_and_only_that_of_memory(platform, refused, goes_on):
    program = REFUSING.format(platform=platform, refused=refused) + reader.PROGRAM
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, PACKAGES],
        input=b'{"items": []}',
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == ((0, b"{}") if goes_on else (1, b""))
