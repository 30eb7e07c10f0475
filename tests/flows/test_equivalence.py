"""A sandboxed flow leaves what the same flow leaves without a sandbox."""

import pytest

FLOW = """
    import sys
    from metaflow import FlowSpec, Config, IncludeFile, Parameter, card, catch, current, retry, step

    class Everything(FlowSpec):
        KIND = "constant"
        number = Parameter("number", default=3, type=int)
        text = IncludeFile("text", default="text.txt")
        settings = Config("settings", default="settings.json")

        @step
        def start(self):
            self.data = {"a": [1, 2.5, None, True], "b": b"\\x00\\xff", "c": {1, 2}, "d": (3, "ü")}
            print("out line", self.number, self.text.strip(), self.settings.colour)
            print("err line", file=sys.stderr)
            self.next(self.left, self.right)

        @step
        def left(self):
            self.side = "left"
            self.letters = ["x", "y"]
            self.next(self.outer, foreach="letters")

        @step
        def outer(self):
            self.letter = self.input
            self.digits = list(range(self.number))
            self.next(self.inner, foreach="digits")

        @retry(times=1, minutes_between_retries=0)
        @step
        def inner(self):
            self.pair = self.letter + str(self.input)
            self.where = [(i, n) for i, n, _ in self.foreach_stack()]
            if self.pair == "y1" and current.retry_count == 0:
                print("about to fail")
                raise ValueError("the first attempt fails")
            self.next(self.inner_join)

        @step
        def inner_join(self, inputs):
            self.pairs = sorted(i.pair for i in inputs)
            self.merge_artifacts(inputs, include=["data", "side", "letter"])
            self.next(self.outer_join)

        @step
        def outer_join(self, inputs):
            self.pairs = sum((i.pairs for i in inputs), [])
            self.merge_artifacts(inputs, include=["data", "side"])
            self.next(self.meet)

        @catch(var="failure", print_exception=False)
        @step
        def right(self):
            self.side = "right"
            raise KeyError("caught")
            self.next(self.meet)

        @step
        def meet(self, inputs):
            self.sides = sorted(i.side for i in inputs)
            self.pairs = inputs.outer_join.pairs
            self.why = str(inputs.right.failure).splitlines()[-1]
            self.data = inputs.outer_join.data
            self.count = 0
            self.next(self.loop)

        @step
        def loop(self):
            self.count += 1
            self.go = "again" if self.count < 3 else "on"
            self.next({"again": self.loop, "on": self.last}, condition="go")

        @step
        def last(self):
            self.from_constants = (self.KIND, self.number, self.settings.colour, self.text)
            self.big = bytes(1_000_000)
            self.next(self.end)

        @step
        def end(self):
            self.user, self.run_seen = current.username, current.run_id
            print("the end", self.count)

    if __name__ == "__main__":
        Everything()
"""

VIEW = """
    run = Flow("Everything").latest_run
    answer = {"run": [run.successful, run.finished, sorted(run.tags)]}
    for step in run:
        for task in step:
            key = step.id + str(task.metadata_dict.get("foreach-execution-path"))
            key += ",".join(map(str, getattr(task.data, "_iteration_stack", [])))
            plain = {a.id: repr(a.data) for a in task if a.id not in %r}
            facts = sorted(
                {"%%s=%%s" %% (m.name, m.value) for m in task.metadata if m.name not in %r}
            )
            answer[key] = {
                "ok": task.successful, "finished": task.finished, "artifacts": plain,
                "facts": facts, "attempt": task.current_attempt,
                "out": task.stdout, "err": task.stderr.splitlines()[-1:],
                "exception": str(task.exception).splitlines()[-1:], "index": task.index,
            }
"""
# What may differ: ids and paths of this run, and what a task that ran elsewhere has in addition.
VARYING = ["run_seen", "_graph_info", "failure", "_catch_exception", "text", "from_constants"]
ADDED = [
    "code-package", "ds-root", "sandbox-backend", "sandbox-provider", "sandbox-limits",
    "sandbox-network",
]  # fmt: skip


@pytest.fixture
def everything(project):
    project.write("flow.py", FLOW)
    project.write("text.txt", "included\n")
    project.write("settings.json", '{"colour": "blue"}')
    return project


def view(project, *arguments):
    project.run("flow.py", "run", "--tag", "mine", *arguments).ok()
    return project.client(VIEW % (VARYING, ADDED))


def differences(one, other, path=""):
    """{path: (value, value)} where two nested answers differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = {}
        for key in one.keys() | other.keys():
            found |= differences(one.get(key), other.get(key), f"{path}/{key}")
        return found
    return {} if one == other else {path: (one, other)}


def test_artifacts_logs_metadata_and_foreach_are_as_without_a_sandbox(everything):
    plain = view(everything)
    assert differences(plain, view(everything, "--with", "sandbox")) == {}


def test_a_backend_of_another_package_runs_the_same_flow_by_archive_and_spool(everything):
    plain = view(everything)
    remote = view(everything, "--with", "sandbox:backend=remote-like")
    assert differences(plain, remote) == {}


def test_the_code_of_a_task_is_there_as_with_other_remote_backends(everything):
    everything.run("flow.py", "run", "--with", "sandbox").ok()
    answer = everything.client(
        """
        task = Flow("Everything").latest_run["start"].task
        answer = ["class Everything" in str(task.code.flowspec), task.code.info["script"]]
        """
    )
    assert answer == [True, "flow.py"]


def test_resume_goes_on_from_a_sandboxed_run(everything):
    source = FLOW.replace('print("the end"', 'open("go")\n            print("the end"')
    everything.write("flow.py", source)
    assert everything.run("flow.py", "run", "--with", "sandbox").code != 0
    everything.write("flow.py", FLOW)
    done = everything.run("flow.py", "resume", "--with", "sandbox").ok()
    assert done.output.count("Task is starting") == 1
    answer = everything.client(
        "r = Flow('Everything').latest_run\nanswer = [r.successful, r.origin_pathspec is not None]"
    )
    assert answer[0] is True


def test_the_runner_api_works(everything):
    answer = everything.client(
        """
        with Runner("flow.py", pylint=False, decospecs=["sandbox"]).run(number=2) as running:
            answer = [running.status, running.run.data.count]
        """
    )
    assert answer == ["successful", 3]


@pytest.mark.parametrize("inside", [[], ["--with", "sandbox"]], ids=["outside", "inside"])
def test_a_foreach_may_have_its_name_in_a_variable(project, inside):
    project.write(
        "flow.py",
        """
        from metaflow import FlowSpec, step

        FIELD = "numbers"

        class Variable(FlowSpec):
            @step
            def start(self):
                self.numbers = [1, 2]
                self.next(self.double, foreach=FIELD)

            @step
            def double(self):
                self.doubled = 2 * self.input
                self.next(self.join)

            @step
            def join(self, inputs):
                print("DOUBLED", [i.doubled for i in inputs])
                self.next(self.end)

            @step
            def end(self):
                pass

        if __name__ == "__main__":
            Variable()
        """,
    )
    assert "DOUBLED [2, 4]" in project.run("flow.py", "run", *inside).ok().output
