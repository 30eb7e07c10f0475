"""What the host may load of what a sandbox wrote, and what a later sandboxed step may."""

import pytest

FLOW = """
    import datetime, os
    from metaflow import FlowSpec, sandbox, step

    class Thing:
        value = 5

    class Trust(FlowSpec):
        @step
        def start(self):
            self.mine = Thing()
            self.next(self.write)

        @sandbox(%(write)s)
        @step
        def write(self):
            self.data = [1, "two", {"three": (4.0, None)}]
            self.gift = Thing()
            self.gift.value = 7
            self.copy_of_mine = self.mine
            self.next(self.relay)

        %(relay)s
        @step
        def relay(self):
            %(body)s
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Trust()
"""
SANDBOX = "@sandbox"


def write(project, write="", relay="", body="pass"):
    project.write("flow.py", FLOW % {"write": write, "relay": relay, "body": body})


def test_data_loads_on_the_host_and_the_rest_is_refused_on_one_screen(project):
    write(project, body="print('data', self.data); print(self.gift)")
    done = project.run("flow.py", "run")
    assert done.code != 0
    assert "data [1, 'two', {'three': (4.0, None)}]" in done.output
    assert "`gift` of Trust/" in done.output
    assert "the pickle refers to `__main__.Thing`" in done.output
    assert 'trust="all"' in done.output
    screen = done.output.partition("This artifact was written in a sandbox")[2]
    assert len(screen.partition("Task failed")[0].splitlines()) < 16
    answer = project.client(
        """
        data = Flow("Trust").latest_run["write"].task.data
        try:
            data.gift
            answer = "loaded"
        except Exception as e:
            answer = [type(e).__name__, data.data]
        """
    )
    assert answer == ["ArtifactRefused", [1, "two", {"three": [4.0, None]}]]


def test_a_later_sandboxed_step_loads_anything_and_what_it_saves_again_stays_marked(project):
    body = "assert self.gift.value == 7; assert self.mine.value == 5; self.again = self.gift"
    write(project, relay=SANDBOX, body=body)
    project.run("flow.py", "run").ok()
    # The same content under a new claim: the laundering of a mark.
    answer = project.client(
        """
        answer = []
        for step, name in [("relay", "again"), ("end", "again"), ("end", "gift")]:
            try:
                Flow("Trust").latest_run[step].task[name].data
                answer.append("loaded")
            except Exception as e:
                answer.append(type(e).__name__)
        """
    )
    assert answer == ["ArtifactRefused"] * 3


def test_what_the_host_wrote_keeps_its_record_through_a_sandbox(project):
    write(project, body="print('value', self.mine.value, self.copy_of_mine.value)")
    assert "value 5 5" in project.run("flow.py", "run").ok().output


def test_trust_all_stores_what_metaflow_would(project):
    write(project, write='trust="all"', body="print('value', self.gift.value)")
    assert "value 7" in project.run("flow.py", "run").ok().output


def test_resume_keeps_the_mark(project):
    write(project, body="raise ValueError('stop')")
    assert project.run("flow.py", "run").code != 0
    write(project, body="print(self.gift)")
    done = project.run("flow.py", "resume")
    assert done.code != 0
    assert "the pickle refers to `__main__.Thing`" in done.output


def test_without_the_extension_metaflow_refuses_by_itself(project):
    write(project)
    project.run("flow.py", "run").ok()
    answer = project.client(
        """
        from metaflow.datastore.artifacts.serializer import SerializerStore
        SerializerStore._active_serializers.discard(
            SerializerStore._all_serializers["sandbox-pickle"])
        SerializerStore._ordered_cache = None
        try:
            Flow("Trust").latest_run["write"].task["gift"].data
            answer = "loaded"
        except Exception as e:
            answer = str(e)
        """,
    )
    assert "No deserializer claimed artifact 'gift' (encoding: sandbox-v1+pickle-v4" in answer


@pytest.mark.parametrize("name", ["data", "gift"])
def test_dump_shows_data_and_refuses_the_rest(project, name):
    write(project)
    project.run("flow.py", "run").ok()
    run, task = project.client('t = Flow("Trust").latest_run["write"].task; '
                               "answer = [t.pathspec.split('/')[1], t.id]")  # fmt: skip
    done = project.run("flow.py", "dump", f"{run}/write/{task}", "--include", name)
    assert ("two" in done.output) == (name == "data")
    assert ("written in a sandbox" in done.output) == (name == "gift")
