"""A step that has taken over the agent: all that the launcher hears and gets is the attacker's.

On a backend whose inbox a step can write, it puts a program of its own in the agent's
place and ends the process that the launcher listens to. When the launcher connects again,
it talks to the attacker. One run has all attacks, each in a sandbox of its own, and the
control: an honest end that the same program forges is recorded.
"""

import re

import pytest

#: They take a while; in a few commits each has run.
pytestmark = pytest.mark.sample(0.2)

FLOW = """
    import json, os, signal, time
    from metaflow import FlowSpec, catch, sandbox, step
    from attacks import ATTACKS, PROGRAM

    class TakenOver(FlowSpec):
        @step
        def start(self):
            self.items = sorted(ATTACKS)
            self.next(self.hostile, foreach="items")

        @catch(var="caught", print_exception=False)
        @sandbox(backend="remote-like", network=False, timeout=50, disk=512, memory=1024)
        @step
        def hostile(self):
            agent = os.path.join(os.path.dirname(os.environ["METAFLOW_HOME"]), "agent.py")
            os.unlink(agent)
            with open(agent, "w") as f:
                f.write(PROGRAM + ATTACKS[self.input])
            print("so that the launcher connects again", flush=True)
            time.sleep(2)
            listening = True
            while listening:
                for pid in filter(str.isdigit, os.listdir("/proc")):
                    try:
                        command = open("/proc/%s/cmdline" % pid).read()
                    except OSError:
                        continue
                    if "agent.py\\0start" in command and int(pid) != os.getppid():
                        listening = os.kill(int(pid), signal.SIGKILL)
            time.sleep(10000)
            self.next(self.join)

        @step
        def join(self, inputs):
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        TakenOver()
"""
PROGRAM = r"""
import base64, binascii, hashlib, json, os, sys, time

SEQ, OUTBOX = int(sys.argv[3]), "/sandbox/outbox"

def frame(seq, kind, payload):
    body = b"mfs1 %x %s %s" % (seq, kind, base64.b64encode(payload))
    data = memoryview(body + b" %08x\n" % binascii.crc32(body))
    while data:
        data = data[os.write(1, data):]

def end(seq=None, **more):
    report = {"rc": 0, "signal": None, "inline": None, "dropped": 0, "problem": None}
    frame(seq or SEQ + 1, b"x", json.dumps({**report, **more}).encode())

def entry(content=b"", **header):
    header.setdefault("size", len(content))
    return json.dumps(header).encode() + b"\n" + content

def record(objects, info=None):
    one = {"type": "<class 'int'>", "encoding": "pickle-v4"}
    info = dict.fromkeys(objects, one) if info is None else info
    return entry(json.dumps({"objects": objects, "info": info}).encode(), name="data.json")

def blob(content):
    return entry(content, name="blob", sha=hashlib.sha1(content).hexdigest(), raw=True)

def outbox(*parts):
    with open(OUTBOX, "wb") as f:
        for part in parts:
            f.write(part)

def sha(content):
    return hashlib.sha1(content).hexdigest()

ZERO = "0" * 40
TRUE, FIVE = b"\x80\x04\x88.", b"\x80\x04K\x05."
def pickled(value):
    import pickle
    return pickle.dumps(value, 4)
HONEST = {"_task_ok": TRUE, "_success": TRUE, "mine": FIVE,
          "_transition": pickled((["join"], None))}
def honest(**more):
    values = {**HONEST, **more}
    return [record({n: sha(v) for n, v in values.items()}), *map(blob, set(values.values()))]
"""
#: {attack: (what it does in the agent's place, what the launcher says)}.
STREAM = {
    "floods with output": (
        "while True:\n    SEQ += 1\n    frame(SEQ, b'o', bytes(32768))",
        "more output comes than an agent passes on",
    ),
    "floods with frames of nothing": (
        "while True:\n    SEQ += 1\n    frame(SEQ, b'e', b'')",
        "more output comes than an agent passes on",
    ),
    "sends old frames for ever": (
        "frame(SEQ + 1, b'o', b'x')\nwhile True: frame(SEQ + 1, b'o', bytes(32768))",
        "frames come again and again",
    ),
    "sends a line without end": (
        "os.write(1, b'mfs1 ')\nwhile True: os.write(1, b'A' * 65536)",
        "a frame is longer than any that the agent sends",
    ),
    "leaves out frames": ("frame(SEQ + 9, b'o', b'x')", "comes after frame"),
    "goes on after the end": ("end(); frame(SEQ + 2, b'o', b'x')", "frames go on after the end"),
    "prints on its own stderr for ever": (
        "while True: os.write(2, bytes(65536))",
        "more output comes than an agent passes on",
    ),
    "ends with an absurd code": ("end(rc=10**4000)", "the exit frame is broken"),
    "ends by a signal that isn't one": ("end(signal=-9)", "the exit frame is broken"),
    "ends with a number that isn't one": ("end(dropped=float('inf'))", "the exit frame is broken"),
    "ends with nesting": (
        "frame(SEQ + 1, b'x', b'[' * 500000)",
        "the exit frame is broken",
    ),
    "is silent": ("time.sleep(10000)", "the step was ended after 50 s"),
    "closes its end and stays": (
        "os.close(1); os.close(2); time.sleep(10000)",
        "the step was ended after 50 s",
    ),
    "says what is no frame": (
        "os.write(1, b'\\x1b]0;owned\\x07 not a frame\\n')",
        "not a frame: b'\\x1b]0;owned",
    ),
    "has a problem with control characters": (
        "end(rc=1, problem='\\x1b]0;owned\\x07')",
        "the agent could not run the step: \u241b]0;owned",
    ),
}
ARCHIVE = {
    "a link": ("os.symlink('/etc/passwd', OUTBOX); end()", "has a broken header"),
    "a device": ("os.symlink('/dev/zero', OUTBOX); end()", "can't be read"),
    "a fifo": ("os.mkfifo(OUTBOX); end()", "can't be read"),
    "a directory": ("os.mkdir(OUTBOX); end()", "can't be read"),
    "nothing": ("end()", "can't be read"),
    "a sparse file": (
        "f = open(OUTBOX, 'wb'); f.write(entry(name='blob', size=1 << 40, sha=ZERO, raw=True))\n"
        "f.truncate(1 << 40); f.close(); end()",
        "the results are larger than",
    ),
    "an absurd header": ("outbox(b'{' * 100000); end()", "cut short"),
    "a path as a name": ("outbox(entry(name='../../data.json')); end()", "has a broken header"),
    "a card that is a path": (
        "outbox(entry(b'x', name='card', file='../../x-y.html')); end()",
        "a card has the name ../../x-y.html",
    ),
    "a card with control characters": (
        "outbox(entry(b'x', name='card', file='\\x1b]0;owned')); end()",
        "a card has the name \u241b]0;owned",
    ),
}
RECORD = {
    "a record that fills the memory": (
        "junk = b'{\"objects\": {}, \"info\": {\"x\": [' + b'[],' * 2600000 + b'[]]}}'\n"
        "outbox(entry(junk, name='data.json')); end()",
        "",  # read in its own process, within its memory, or rejected
    ),
    "a record of nesting": (
        "outbox(entry(b'{\"objects\": ' * 500000, name='data.json')); end()",
        "the record of the artifacts is not what Metaflow writes",
    ),
    "a blob that is another": (
        "values = honest(); values[1] = values[1].replace(b'\\x80\\x04', b'\\x80\\x03')\n"
        "outbox(*values); end()",
        "something else",
    ),
    "a blob of another run": (
        "outbox(record({**{n: sha(v) for n, v in HONEST.items()}, 'mine': ZERO}),"
        "*map(blob, set(HONEST.values()) - {FIVE})); end()",
        "neither an input nor delivered",
    ),
    "a bomb": (
        "import gzip\npacked = gzip.compress(bytes(300 << 20))\n"
        "o = {n: sha(v) for n, v in HONEST.items()}; o['mine'] = sha(bytes(300 << 20))\n"
        "outbox(record(o), *map(blob, set(HONEST.values()) - {FIVE}),"
        " entry(packed, name='blob', sha=o['mine'], raw=False)); end()",
        "an artifact is larger than 100 MB",
    ),
    "another way through the flow": (
        "outbox(*honest(_transition=pickled((['end'], None)))); end()",
        "goes where the flow doesn't",
    ),
    "artifacts of an unbounded foreach": (
        "outbox(*honest(_control_mapper_tasks=FIVE)); end()",
        "steers Metaflow's scheduler",
    ),
}
CONTROL = {"the control": ("outbox(*honest()); end()", None)}
PARTS = {"the stream": STREAM, "the archive": ARCHIVE, "the record": RECORD}


def outcomes(project, attacks, flow=FLOW, program=PROGRAM):
    """{attack: (what was printed of it, whether it failed, whether it recorded something)}."""
    programs = {name: own for name, (own, _) in attacks.items()}
    project.write("attacks.py", f"PROGRAM = {program!r}\nATTACKS = {programs!r}\n")
    project.write("flow.py", flow)
    limits = {"METAFLOW_SANDBOX_MAX_ARTIFACT": "100", "METAFLOW_SANDBOX_MAX_OUTPUT": "1"}
    output = project.run("flow.py", "run", "--max-workers", "4", env=limits).ok().output
    assert "\x1b" not in output and "Traceback" not in output
    tasks = project.client(
        """
        answer = []
        for t in Flow("TakenOver").latest_run["hostile"]:
            index = int(t.metadata_dict["foreach-execution-path"].rpartition(":")[2])
            answer.append([index, t.id, "caught" in t, "mine" in t])
        """
    )
    return {
        sorted(attacks)[index]: (re.findall(rf"/hostile/{task} .*\[sandbox\] (.*)", output), *rest)
        for index, task, *rest in tasks
    }


def what_got_past(attacks, found):
    """{attack: its outcome} of those that did not end as they should."""
    wrong = {}
    for name, (_, said) in attacks.items():
        printed, failed, recorded = found[name]
        held = (failed, recorded) == ((False, True) if said is None else (True, False))
        if not held or (said or "") not in "\n".join(printed):
            wrong[name] = found[name]
    return wrong


@pytest.mark.parametrize("part", PARTS)
def test_an_agent_that_was_taken_over_gets_nothing_past_the_launcher(project, part):
    attacks = {**PARTS[part], **CONTROL}
    assert what_got_past(attacks, outcomes(project, attacks)) == {}
