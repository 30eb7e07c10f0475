"""Classes that the user named, and what was refused and is released afterwards."""

import subprocess
import sys
from pathlib import Path

import pytest

CLASSES = """
    import enum
    from dataclasses import dataclass

    class Color(enum.Enum):
        RED = "red"

    @dataclass
    class Point:
        x: int
        color: Color

    class Other:
        pass
"""
FLOW = """
    import things
    from metaflow import FlowSpec, sandbox, step

    class Release(FlowSpec):
        @step
        def start(self):
            self.next(self.write)

        @sandbox(%(write)s)
        @step
        def write(self):
            self.point = things.Point(3, things.Color.RED)
            self.other = things.Other()
            self.next(self.relay)

        @sandbox
        @step
        def relay(self):
            self.again = self.point
            self.next(self.read)

        @step
        def read(self):
            %(body)s
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Release()
"""
READ = "print('POINT', self.point.x, self.again.color)"
NAMED = 'trust=["things.Point", "things.Color"]'
ASK = """
    answer = []
    for step, name in [("write", "point"), ("relay", "again"), ("read", "point"), ("end", "other")]:
        try:
            answer.append(type(Flow("Release").latest_run[step].task[name].data).__name__)
        except Exception as e:
            answer.append(type(e).__name__)
"""


def write(project, write="", body="pass"):
    project.write("things.py", CLASSES)
    project.write("flow.py", FLOW % {"write": write, "body": body})


def release(project, *arguments):
    return subprocess.run(
        [Path(sys.executable).with_name("metaflow-sandbox"), "release", *arguments],
        cwd=project.directory,
        env=project.environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def test_objects_of_classes_that_are_named_load_and_no_others(project):
    write(project, NAMED, READ)
    assert "POINT 3 Color.RED" in project.run("flow.py", "run").ok().output
    assert project.client(ASK) == ["Point", "Point", "Point", "ArtifactRefused"]


@pytest.fixture
def refused(project):
    """A run that ended because its plain step couldn't load what the sandboxed ones left."""
    write(project, "", READ)
    done = project.run("flow.py", "run")
    assert "POINT" not in done.output
    assert 'trust=["things.Point"]' in done.output
    asked = ASK.replace('"end"', '"relay"').replace('"read"', '"write"')
    assert project.client(asked) == ["ArtifactRefused"] * 4
    return project


def test_a_setting_releases_what_was_refused(refused):
    setting = {"METAFLOW_SANDBOX_RELEASE": "things.Point,things.Color"}
    assert "POINT 3 Color.RED" in refused.run("flow.py", "resume", env=setting).ok().output
    assert refused.client(ASK, env=setting) == ["Point", "Point", "Point", "ArtifactRefused"]
    # What a plain step loaded, it saved again itself.
    assert refused.client(ASK) == ["ArtifactRefused", "ArtifactRefused", "Point", "ArtifactRefused"]


def test_a_context_releases_what_was_refused_and_for_no_longer(refused):
    loaded = refused.client(
        """
        from metaflow_sandbox import trusting
        point = Flow("Release").latest_run["write"].task["point"]
        answer = []
        for names in (["things.Point", "things.Color"], ["all"]):
            with trusting(*names):
                answer.append(str(point.data))
        try:
            answer.append(point.data)
        except Exception as e:
            answer.append(type(e).__name__)
        """
    )
    shown = "Point(x=3, color=<Color.RED: 'red'>)"
    assert loaded == [shown, shown, "ArtifactRefused"]


def test_the_command_releases_one_artifact_after_it_asked(refused):
    task = refused.client('answer = Flow("Release").latest_run["write"].task.pathspec')
    asked = release(refused, f"{task}/point")
    assert asked.returncode != 0  # nobody said yes
    assert "names         things.Point, things.Color" in asked.stdout
    assert "released" not in asked.stdout
    said = release(refused, f"{task}/point", "--yes")
    assert said.returncode == 0, said.stderr
    # Where it was written, where it was passed on, and where that step saved it again.
    assert said.stdout.count("released Release/") == 3
    assert "POINT 3 Color.RED" in refused.run("flow.py", "resume").ok().output
    assert refused.client(ASK) == ["Point", "Point", "Point", "ArtifactRefused"]


def test_the_command_releases_everything_only_when_told_to(refused):
    task = refused.client('answer = Flow("Release").latest_run["write"].task.pathspec')
    assert "was not written in a sandbox" in release(refused, f"{task}/name", "--yes").stderr
    assert release(refused, f"{task}/other", "--all", "--yes").returncode == 0
    assert "was not written in a sandbox" in release(refused, f"{task}/other", "--yes").stderr
    asked = ASK.replace('"end"', '"relay"').replace('"read"', '"write"')
    assert refused.client(asked) == ["ArtifactRefused"] * 3 + ["Other"]


PROGRAM = """
    import uuid
    from metaflow import FlowSpec, sandbox, step

    class Made:
        def __init__(self, call, *args):
            self.parts = call, args
        def __reduce__(self):
            return self.parts
        def __call__(self):
            pass

    def of(value, name):
        return Made(getattr, value, name)

    class Program(FlowSpec):
        @sandbox
        @step
        def start(self):
            modules = of(of(of(uuid.UUID, "__init__"), "__globals__"), "get")
            self.result = Made(of(Made(modules, "os"), "system"), "touch ran")
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Program()
"""


def test_a_program_that_names_what_data_names_is_not_taken_for_data(project):
    project.write("flow.py", PROGRAM)
    project.run("flow.py", "run").ok()
    task = project.client('answer = Flow("Program").latest_run["start"].task.pathspec')
    said = release(project, f"{task}/result", "--yes")
    assert said.returncode != 0 and "released" not in said.stdout
    assert "names         builtins.getattr, uuid.UUID" in said.stdout
    assert "it is a program. --all runs it" in said.stderr
    assert not (project.directory / "ran").exists()
    assert "program" in release(project, f"{task}/result", "--all").stdout


def test_a_program_that_names_functions_is_not_taken_for_objects_of_classes(project):
    project.write("flow.py", PROGRAM.replace('of(Made(modules, "os"), "system")', "eval"))
    project.run("flow.py", "run").ok()
    task = project.client('answer = Flow("Program").latest_run["start"].task.pathspec')
    said = release(project, f"{task}/result", "--yes")
    assert said.returncode != 0 and "released" not in said.stdout
    assert "builtins.eval: no class" in said.stderr and "--all runs it" in said.stderr
