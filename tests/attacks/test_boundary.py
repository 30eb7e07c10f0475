"""Hostile steps against the trust boundary, in real runs.

Each attack writes a file on the host if it succeeds. `test_the_attack_works_without
_a_sandbox` is the positive control: the same code, unsandboxed, does write it.
"""

import json

import pytest

pytestmark = pytest.mark.sample(0.7)

FLOW = """
    import glob, json, os, pickle, subprocess, sys, time
    from metaflow import FlowSpec, Parameter, sandbox, step

    CANARY = %(canary)r

    class Bomb:
        def __reduce__(self):
            return (os.system, ("touch " + CANARY,))

    class Attack(FlowSpec):
        limit = Parameter("limit", default=1)

        @step
        def start(self):
            self.items = [1, 2]
            self.next(self.hostile, foreach="items")

        %(sandbox)s
        @step
        def hostile(self):
            self.mine = self.input
            %(attack)s
            self.next(self.join)

        @step
        def join(self, inputs):
            seen = []
            for task in inputs:
                try:
                    seen.append(task.mine)
                except Exception as e:
                    seen.append(type(e).__name__)
            print("SEEN", seen, [i.index for i in inputs])
            self.next(self.end)

        @step
        def end(self):
            print("LIMIT", self.limit)

    if __name__ == "__main__":
        Attack()
"""

# Patched so that everything that Metaflow pickles is the bomb.
PATCHED = """import metaflow.plugins.datastores.serializers.pickle_serializer as p
            real = p.pickle.dumps
            class Fake:
                loads = staticmethod(p.pickle.loads)
                @staticmethod
                def dumps(obj, protocol=None):
                    return real(Bomb(), protocol=4)
            p.pickle = Fake"""


def run(project, attack, sandboxed=True):
    canary = project.directory / "pwned"
    source = FLOW % {
        "canary": str(canary),
        "sandbox": "@sandbox(timeout=60)" if sandboxed else "",
        "attack": attack,
    }
    project.write("flow.py", source)
    done = project.run("flow.py", "run")
    return done, canary.exists()


@pytest.mark.parametrize("attack", [PATCHED, "self.mine = Bomb()"], ids=["internal", "user"])
def test_the_attack_works_without_a_sandbox(project, attack):
    _, pwned = run(project, attack, sandboxed=False)
    assert pwned


def test_a_pickle_bomb_among_the_schedulers_artifacts_is_never_unpickled(project):
    done, pwned = run(project, PATCHED)
    assert not pwned
    assert done.code != 0
    assert "is not what Metaflow records there" in done.output


def test_a_pickle_bomb_among_the_users_artifacts_is_refused_when_loaded(project):
    done, pwned = run(project, "self.mine = Bomb()")
    assert not pwned
    assert "SEEN ['ArtifactRefused', 'ArtifactRefused'] [0, 1]" in done.ok().output


def test_a_step_can_not_move_itself_in_its_foreach(project):
    attack = "self._foreach_stack = [f._replace(index=0) for f in self._foreach_stack]"
    done, _ = run(project, attack)
    assert "SEEN [1, 2] [0, 1]" in done.ok().output


def test_a_step_can_not_change_a_parameter(project):
    attack = "type(self).limit = 99; self.__dict__['limit'] = 99"
    done, _ = run(project, attack)
    assert "LIMIT 1" in done.ok().output


FORGED_RECORD = """import atexit
            def forge():
                for path in glob.glob(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"]
                                      + "/.metaflow/Attack/*/hostile/*/0.data.json"):
                    record = json.load(open(path))
                    %s
                    json.dump(record, open(path, "w"))
            atexit.register(forge)"""

FORGERIES = {
    "another run's blob": ('record["objects"]["mine"] = "0" * 40', "neither an input nor"),
    "a key that is a path": ('record["objects"]["mine"] = "../../../x"', "no proper record"),
    "a name that is a path": (
        'record["objects"]["../x"] = record["objects"]["mine"]; record["info"]["../x"] = {}',
        "an artifact has the name",
    ),
    "a name that is another's when it is written": (
        'record["objects"]["\\ufb01"] = record["objects"]["mine"]; record["info"]["\\ufb01"] = {}',
        "an artifact has the name",
    ),
    "a mark on the scheduler": (
        'record["objects"]["_control_mapper_tasks"] = record["objects"]["mine"]; '
        'record["info"]["_control_mapper_tasks"] = record["info"]["mine"]',
        "steers Metaflow's scheduler",
    ),
    "a record without end": ('record["info"]["x" * (9 << 20)] = {}', "too large"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_record_is_rejected_and_nothing_is_recorded(project, name):
    forgery, message = FORGERIES[name]
    done, pwned = run(project, FORGED_RECORD % forgery)
    assert done.code != 0
    assert message in done.output
    assert not pwned
    answer = project.client('answer = [t.finished for t in Flow("Attack").latest_run["hostile"]]')
    assert not any(answer)


HANDED_OUT = """
            root = os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"] + "/.metaflow/Attack"
            for other in ("1", "2", "3", "4"):
                folder = "%s/%s/%s/%s" % (root, os.environ["METAFLOW_RUN_ID"], "%s", other)
                os.makedirs(folder, exist_ok=True)
                for name in ("0.data.json", "0.DONE.lock", "1.data.json"):
                    try:
                        open(folder + "/" + name, "w").write("{}")
                    except OSError:
                        pass"""


@pytest.mark.parametrize("step", ["start", "hostile", "join", "end", "_parameters"])
def test_files_in_the_name_of_other_tasks_never_leave(project, step):
    attack = HANDED_OUT.replace('"%s", other', f'"{step}", other').strip()
    done, _ = run(project, attack + "\n            self.mine = self.input")
    assert "SEEN [1, 2] [0, 1]" in done.ok().output


FORGED_FILES = """
            from metaflow import current
            root = os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"] + "/.metaflow/Attack"
            run = root + "/" + current.run_id
            task = run + "/hostile/" + current.task_id
            for place in (run, task):
                os.makedirs(place + "/_meta", exist_ok=True)
                identity = {"tags": ["PLANTED"], "system_tags": ["PLANTED"], "ts_epoch": 1}
                datum = {"field_name": "PLANTED", "value": "PLANTED", "type": "PLANTED",
                         "ts_epoch": 1, "tags": ["attempt_id:0"]}
                for name, content in (("_self", identity), ("sysmeta_planted_1", datum),
                                      ("sysmeta_attempt_ok_9999999999999", datum)):
                    if os.path.lexists(place + "/_meta/" + name + ".json"):
                        os.unlink(place + "/_meta/" + name + ".json")
                    open(place + "/_meta/" + name + ".json", "w").write(json.dumps(content))
            for name in ("7.attempt.json", "7.data.json", "7.DONE.lock", "8.DONE.lock"):
                open(task + "/" + name, "w").write("{}")"""


def test_forged_metadata_tags_and_attempts_stay_inside(project):
    done, _ = run(project, FORGED_FILES.strip() + "\n            self.mine = self.input")
    assert "SEEN [1, 2] [0, 1]" in done.ok().output
    tasks = project.client(
        """
        run = Flow("Attack").latest_run
        answer = [[t.current_attempt, t.successful, sorted(t.tags), t.metadata_dict]
                  for t in [*run["hostile"]]] + [[0, run.successful, sorted(run.tags), {}]]
        """
    )
    for attempt, successful, tags, facts in tasks:
        assert (attempt, successful) == (0, True)
        assert "PLANTED" not in tags
        assert "PLANTED" not in json.dumps(facts)
    store = project.directory / ".metaflow" / "Attack"
    assert [p for p in store.rglob("*") if p.name.startswith(("7.", "8."))] == []


def test_control_sequences_reach_neither_the_terminal_nor_the_log(project):
    attack = r"""os.write(1, b"\x1b]0;owned\x07\x9b31m\n"
                     b"[MFLOG|0|2000-01-01T00:00:00.0Z|task|x]forged\n")"""
    done, _ = run(project, attack)
    log = project.client('answer = Flow("Attack").latest_run["hostile"].task.stdout')
    for text in (done.ok().output, log):
        assert "\x1b" not in text
        assert "\x9b" not in text
        assert "\u241b]0;owned" in text
    # A line that looks like Metaflow's own mark is text like any other.
    assert "[MFLOG|0|2000-01-01T00:00:00.0Z|task|x]forged" in log


ITEMS = r"""
    import os
    from metaflow import FlowSpec, sandbox, step

    class Items(FlowSpec):
        %s
        @step
        def start(self):
            self.items = ["\x1b]0;owned\x07\x9b31m", "\u202egnp"]
            self.next(self.child, foreach="items")

        @step
        def child(self):
            if self.items:
                raise ValueError("so that Metaflow says whose task failed")
            self.next(self.join)

        @step
        def join(self, inputs):
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Items()
"""


def test_the_item_that_metaflow_prints_of_a_failed_task_is_harmless(project):
    """Metaflow prints the flow, with its item, in a task that runs on the host."""
    for decorator, sandboxed in (("@sandbox(network=False)", True), ("", False)):
        project.write("flow.py", ITEMS % decorator)
        output = project.run("flow.py", "run").output
        log = project.client('answer = [t.stderr for t in Flow("Items").latest_run["child"]]')
        for text in (output, *log):
            for sequence in ("\x1b", "\x9b", "\u202e"):
                assert not sandboxed or sequence not in text
        assert not sandboxed or "\\x1b]0;owned" in output
        assert sandboxed or "\x1b" in output  # the control


DUMPED = """
    from metaflow import FlowSpec, sandbox, step

    class Dumped(FlowSpec):
        %s
        @step
        def start(self):
            self.note = chr(27) + "]0;owned" + chr(7) + chr(0x202e)
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Dumped()
"""


def test_the_values_that_dump_prints_are_harmless(project):
    for decorator, sandboxed in (("@sandbox(network=False)", True), ("", False)):
        project.write("flow.py", DUMPED % decorator)
        project.run("flow.py", "run").ok()
        run = project.client('answer = Flow("Dumped").latest_run.id')
        for step in ("start", "end"):  # where it was written, and where it was passed on
            dumped = project.run("flow.py", "dump", f"{run}/{step}").ok().output
            assert "owned" in dumped
            for sequence in ("\x1b]", "\x07", "\u202e"):
                assert (sequence in dumped) is not sandboxed


FRAMES = """
            import base64, binascii
            frame = b"mfs1 1 x " + base64.b64encode(b'{"rc": 0}')
            frame += b" %08x" % binascii.crc32(frame)
            os.write(1, frame + b"\\n"); os.write(2, frame + b"\\n")
            for pid in [p for p in os.listdir("/proc") if p.isdigit()]:
                for number in range(3, 10):
                    for name in ("/proc/%s/fd/%d" % (pid, number), "/proc/%s/fd/1" % pid):
                        try:
                            with open(name, "wb", buffering=0) as f:
                                f.write(frame + b"\\n")
                        except OSError:
                            pass
            time.sleep(1)"""


def test_frames_that_a_step_prints_are_output_and_no_more(project):
    done, _ = run(project, FRAMES.strip() + "\n            self.mine = self.input")
    assert "SEEN [1, 2] [0, 1]" in done.ok().output
    assert "mfs1 1 x " in done.output


STOPPED = {
    "kills everything": "os.kill(-1, 9)",
    "stops everything": "os.kill(-1, 19); time.sleep(1000)",
    "stops the agent": "os.kill(os.getppid(), 19); time.sleep(1000)",
    "kills the agent": "os.kill(os.getppid(), 9); time.sleep(1000)",
    "ignores its end": "import signal; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]; "
    "time.sleep(1000)",
    "fork bomb": "\n            while True:\n                try: os.fork()\n"
    "                except OSError: pass",
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_step_that_hangs_or_ends_what_holds_it_is_ended_in_time(project, name):
    source = (FLOW % {
        "canary": "-", "sandbox": "@sandbox(timeout=5)", "attack": STOPPED[name],
    })  # fmt: skip
    project.write("flow.py", source)
    done = project.run("flow.py", "run")
    assert done.code != 0
    assert "[sandbox]" in done.output


RESULTS = {
    "a link": 'os.symlink("/etc/passwd", box)',
    "a fifo": "os.mkfifo(box)",
    "a directory": "os.mkdir(box)",
    "nothing, not writable": "os.chmod(os.path.dirname(box), 0o555)",
}


@pytest.mark.parametrize("name", RESULTS)
def test_what_lies_at_the_results_place_is_not_followed(project, name):
    attack = (
        'box = os.environ["HOME"].replace("/home", "/outbox")\n'
        f"            {RESULTS[name]}\n            self.mine = os.urandom(1 << 20)"
    )
    done, _ = run(project, attack)
    assert "root:x" not in done.output


def test_what_expands_beyond_its_limit_is_rejected(project):
    attack = "self.mine = bytes(300 << 20)"
    project.write("flow.py", FLOW % {"canary": "-", "sandbox": "@sandbox", "attack": attack})
    done = project.run("flow.py", "run", env={"METAFLOW_SANDBOX_MAX_ARTIFACT": "100"})
    assert done.code != 0
    assert "an artifact is larger than 100 MB" in done.output


@pytest.mark.parametrize("name", ["mine", "items", "_foreach_num_splits"])
def test_an_exception_that_a_step_raises_is_text_for_the_host(project, name):
    attack = "raise type('Evil', (Exception,), {'__str__': lambda s: 'x' * 10, "
    attack += "'__reduce__': Bomb.__reduce__})()"
    done, pwned = run(project, attack)
    assert done.code != 0
    exception = project.client(
        'answer = [str(t.exception) for t in Flow("Attack").latest_run["hostile"]]'
    )
    assert not pwned
    assert any("Evil" in text for text in exception)


COLLIDING = """import metaflow.plugins.datastores.serializers.pickle_serializer as p
            real = p.pickle.dumps
            slow = {i * ((1 << 61) - 1) for i in range(150)}
            class Fake:
                loads = staticmethod(p.pickle.loads)
                @staticmethod
                def dumps(obj, protocol=None):
                    if obj is None:
                        big = %s
                        return big
                    return real(obj, protocol=4)
            p.pickle = Fake"""
SLOW = {
    "keys that collide": 'b"\\x80\\x04\\x8f(" + b"".join(b"\\x8a\\x0b" + '
    '(i * ((1 << 61) - 1)).to_bytes(11, "little", signed=True) for i in range(300000)) + b"\\x90."',
    "two hundred million opcodes": 'b"\\x80\\x04(" + b"N" * (200 << 20) + b"l."',
    "a list that holds itself": 'b"\\x80\\x04]\\x94" + b"h\\x00a" * 40 + b"."',
    "tuples without end": 'b"\\x80\\x04)" + b"\\x85" * 3000000 + b"."',
}


@pytest.mark.parametrize("name", SLOW)
def test_values_that_take_for_ever_to_read_are_given_up(project, name):
    done, _ = run(project, COLLIDING % SLOW[name])
    assert done.code != 0
    assert "[sandbox]" in done.output
    assert "Traceback" not in done.output
