"""A thousand attempts under random faults: `make soak`, or soak.py [TASKS [SEED]].

Every sandbox is a fake (`tests/third_party/replaying.py`); all else is real. Meanwhile
clients are killed, supervisors are killed, sandboxes vanish and connections drop. At the
end the run has succeeded, each task has its one result, and nothing is left.
"""

import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.conftest import Project

TASKS, WORKERS, RETRIES = 1000, 50, 4  # as many as Metaflow allows
A_SUPERVISOR = 250  # tasks for each one that is killed: all that run fail with it
LIMIT_SECONDS = 330
HITS = 2  # of one task's clients, so that its retries last
PAUSE_SECONDS = (0.1, 0.8)  # between two clients that are killed
FAULTS = {"REPLAY_SECONDS": "0.5-2", "REPLAY_FAULTS": "gone=0.03,lost=0.05"}

FLOW = """
    import os
    from metaflow import FlowSpec, retry, sandbox, step

    class Soak(FlowSpec):
        @step
        def start(self):
            self.items = list(range(int(os.environ["SOAK_TASKS"])))
            self.next(self.work, foreach="items")

        @retry(times=%d, minutes_between_retries=0)
        @sandbox(backend="%s")
        @step
        def work(self):
            self.result = "whole"
            self.next(self.join)

        @step
        def join(self, inputs):
            results = [i.result for i in inputs]
            assert set(results) == {"whole"}
            self.joined = len(results)
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Soak()
"""
# What a user sees of the run: its tasks by their place in the foreach, and what is in each.
RESULTS = """
    run = Flow("Soak").latest_run
    found = {}
    for task in run["work"]:
        place = task.metadata_dict["foreach-execution-path"]
        found.setdefault(place, []).append([task.successful, task.data.result])
    answer = [run.successful, run["join"].task.data.joined, found]
"""


class Storm:
    """Delivers faults to a run, and counts them."""

    def __init__(self, project, tasks, seed):
        self.project = project
        self.random = random.Random(seed)
        self.delivered = Counter()
        self.killed = set()  # supervisors
        self.hits = Counter()
        self.next_client = 0.0
        self.thresholds = list(range(A_SUPERVISOR // 2, tasks, A_SUPERVISOR))

    def blow(self, ended):
        """Delivers what is due when `ended` sandboxes have ended."""
        clients, supervisors = self.processes()
        if self.thresholds and ended >= self.thresholds[0] and supervisors:
            self.thresholds.pop(0)
            for pid in supervisors:
                self.killed.add(pid)
                self.deliver(pid, "supervisor", signal.SIGKILL)
        # Not when few are left: the same ones would be hit until they are out of retries.
        elif len(clients) > WORKERS // 2 and time.monotonic() >= self.next_client:
            self.next_client = time.monotonic() + self.random.uniform(*PAUSE_SECONDS)
            number = self.random.choice([signal.SIGKILL, signal.SIGTERM])
            pid, task = self.random.choice(clients)
            self.hits[task] += 1
            if self.hits[task] <= HITS:
                self.deliver(pid, "client", number)

    def deliver(self, pid, what, number):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        self.delivered[f"{number.name} to a {what}"] += 1

    def processes(self):
        """([(client, task)], supervisors) of this project."""
        mark = str(self.project.temporary).encode()
        clients, supervisors = [], []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                command = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if mark in command and b"launch/client.py\0" in command:
                words = command.split(b"\0")
                clients.append((int(path.name), words[words.index(b"--task-id") + 1]))
            elif mark in command and b"\0sandbox\0supervise\0" in command:
                supervisors.append(int(path.name))
        return sorted(clients), supervisors


def sandboxes(log):
    """What the fake wrote down: [(event, sandbox, process)]."""
    return [tuple(line.split()) for line in log.read_text().splitlines()] if log.exists() else []


def run(project, tasks, storm, environment, log):
    """Runs the flow under faults. Returns what it printed."""
    arguments = ("run", "--max-workers", str(WORKERS), "--max-num-splits", str(tasks))
    process = project.start("soak.py", *arguments, env=environment)
    output = []
    reading = threading.Thread(target=lambda: output.append(process.stdout.read()))
    reading.start()
    deadline = time.monotonic() + LIMIT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        storm.blow(sum(event == "end" for event, *_ in sandboxes(log)))
        time.sleep(0.05)
    if process.poll() is None:
        process.terminate()
        process.wait()
    reading.join()
    printed = output[0].decode(errors="replace")
    if process.returncode != 0:
        tasks = re.findall(r"task-id (\d+)\) failed", printed)
        about = [x for x in printed.splitlines() if any(f"/work/{t} " in x for t in tasks)]
        lines = "\n".join(about or printed.splitlines()[-50:])
        raise SystemExit(f"{lines}\nthe run failed, or took too long; {dict(storm.delivered)}")
    return printed


def check(project, tasks, storm, log):
    """Everything that must hold at the end. Returns what is worth knowing."""
    successful, joined, found = project.client(RESULTS)
    assert successful
    assert joined == tasks
    assert found == {f"work:{n}": [[True, "whole"]] for n in range(tasks)}
    attempts = Counter()
    for task in (project.directory / ".metaflow/Soak").glob("[0-9]*/work/[0-9]*"):
        whole = {int(p.name.partition(".")[0]) for p in task.glob("*.DONE.lock")}
        begun = {int(p.name.partition(".")[0]) for p in task.glob("*.attempt.json")}
        # The last attempt is whole. One before it may be, if its client was killed
        # between its record and the scheduler's knowing of it.
        assert max(begun) in whole, task
        attempts[f"tasks that took {max(begun) + 1} attempts"] += 1
        attempts["attempts that were recorded and run again"] += len(whole) - 1
    events = sandboxes(log)
    mine = [(e, box) for e, box, pid in events if int(pid) not in storm.killed]
    made = {box for event, box in mine if event == "create"}
    ended = {box for event, box in mine if event in ("destroy", "gone")}
    assert made == ended, f"{len(made - ended)} sandboxes were not destroyed"
    project.assert_nothing_left()
    others = [p for p in project.temporary.iterdir() if p.name != f"metaflow-sandbox-{os.getuid()}"]
    left = [p.name for p in others if any(p.iterdir() if p.is_dir() else [p])]
    assert left == [], left
    return attempts + Counter(f"sandboxes: {event}" for event, *_ in events)


def main():
    tasks = int(sys.argv[1]) if len(sys.argv) > 1 else TASKS
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    print(f"{tasks} tasks, {WORKERS} at once, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        project = Project(Path(directory))
        log = project.directory / "sandboxes.log"
        environment = {"REPLAY": str(project.directory), "SOAK_TASKS": str(tasks)}
        project.write("soak.py", FLOW % (RETRIES, "recording"))
        project.run("soak.py", "run", env={**environment, "SOAK_TASKS": "1"}).ok()
        project.write("soak.py", FLOW % (RETRIES, "replaying"))
        began = time.monotonic()
        storm = Storm(project, tasks, seed)
        printed = run(project, tasks, storm, {**environment, **FAULTS, "REPLAY_LOG": str(log)}, log)
        counts = storm.delivered + check(project, tasks, storm, log)
        counts["attempts that the scheduler saw fail"] = len(re.findall("Task failed", printed))
        unexpected = re.findall(r"^.*Traceback.*$", printed, re.M)
        for what, count in sorted(counts.items()):
            print(f"{count:6} {what}")
        assert not unexpected, printed[printed.index("Traceback") - 2000 :][:6000]
        print(f"all is well after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
