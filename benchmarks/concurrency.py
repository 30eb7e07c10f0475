"""What a running attempt costs the host: CPU seconds and resident memory, many at once.

    python benchmarks/concurrency.py [TASKS ...] [--plain N] [--profile FILE]

A foreach of sandboxed steps on the backend "replaying" (tests/third_party), whose sandboxes
cost nothing, so that what is measured is the host's side alone: the attempts' clients, the
run's supervisor, and its children. Beside it the same flow with plain Metaflow tasks that
sleep as long: what a launcher would cost that is a whole Metaflow for each attempt.

CPU: all that these processes used, from their start to their end. Memory: sums of PSS (a page
that several processes share counts in parts) and RSS, when all attempts run.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PR_SET_CHILD_SUBREAPER = 36
TICK = os.sysconf("SC_CLK_TCK")
SETTLE_SECONDS = 3.0
SAMPLE_SECONDS = 0.1
PLAIN_TASKS = 50  # each takes about a CPU second to start, and 50 MB or more

FLOW = """
import os, time
from metaflow import FlowSpec, step
DECORATOR_IMPORT

class Wide(FlowSpec):
    @step
    def start(self):
        self.common = "the same for all"
        self.items = list(range(int(os.environ["WIDE"])))
        self.next(self.work, foreach="items")

    DECORATOR
    @step
    def work(self):
        self.result = {"score": 0.5, "log": "x" * 1000}
        print("worked")
        PAUSE
        self.next(self.join)

    @step
    def join(self, inputs):
        self.next(self.end)

    @step
    def end(self):
        pass

if __name__ == "__main__":
    Wide()
"""


@dataclass
class Process:
    """What was last seen of a process."""

    parent: int
    command: str
    cpu: float = 0.0

    @property
    def kind(self):
        if "launch/client.py" in self.command:
            return "client"
        return "supervisor" if " sandbox supervise" in self.command else "other"


@dataclass
class Measured:
    """One run. CPU seconds and KB, of all attempts together."""

    tasks: int
    seconds: float = 0.0
    at_once: int = 0
    cpu: dict = field(default_factory=dict)
    cpu_running: dict = field(default_factory=dict)
    pss: dict = field(default_factory=dict)
    rss: dict = field(default_factory=dict)


def stat(pid):
    """(parent, own CPU seconds, CPU seconds of children that it collected)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system, child_user, child_system = map(int, fields[11:15])
    return int(fields[1]), (user + system) / TICK, (child_user + child_system) / TICK


def memory(pid):
    """(PSS, RSS) in KB."""
    found = dict.fromkeys(("Pss", "Rss"), 0)
    with contextlib.suppress(OSError):  # it may have ended
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0])
    return found["Pss"], found["Rss"]


def below(root, known):
    """Processes below `root`, with their CPU time to the nanosecond."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parents[int(name)] = stat(name)[0]
            except OSError:
                continue
    found = {}
    for pid, parent in parents.items():
        above = parent
        while above not in (0, root):
            above = parents.get(above, 0)
        if above != root:
            continue
        try:
            process = known.get(pid)
            if process is None or process.kind == "other":  # it may not have run its program yet
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                process = known[pid] = Process(parent, command, process.cpu if process else 0.0)
            # The first is exact, but for the first thread alone; the other counts whole ticks.
            exact = int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
            process.cpu = max(exact, stat(pid)[1])
            process.parent = parent
            found[pid] = process
        except OSError:
            continue
    return found


def group(found, scheduler, kind_of_attempt):
    """{kind: process ids} of those that are the attempts' cost."""
    supervisors = [pid for pid, p in found.items() if p.kind == "supervisor"]
    if kind_of_attempt == "plain":
        plain = [
            p for p, x in found.items() if x.parent == scheduler and " step work " in x.command
        ]
        return {"attempts": plain}
    return {
        "clients": [pid for pid, p in found.items() if p.kind == "client"],
        "supervisor": supervisors,
        "its children": [pid for pid, p in found.items() if p.parent in supervisors],
    }


def measure(directory, environment, tasks, kind, seconds, profile=None):
    """Runs the flow, with all of its attempts at once."""
    measured, known = Measured(tasks), {}
    began = time.monotonic()
    log = Path(directory, f"{kind}.log")
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, f"flow_{kind}.py", "--no-pylint", "run"),
                *("--max-workers", str(tasks), "--max-num-splits", str(tasks)),
            ],
            cwd=directory,
            env={
                **environment,
                "WIDE": str(tasks),
                "SECONDS": str(seconds),
                "REPLAY_SECONDS": str(seconds),
            },
            stdout=output,
            stderr=output,
        )
    full_since, profiler = None, None
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        found = below(os.getpid(), known)
        groups = group(found, process.pid, kind)
        at_once = len(next(iter(groups.values())))
        if profile and profiler is None and groups.get("supervisor"):
            command = [str(Path(sys.executable).with_name("py-spy")), "record", "--subprocesses"]
            command += ["-r", "200", "-f", "raw", "-o", profile, "-p", str(groups["supervisor"][0])]
            profiler = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        if at_once == tasks and full_since is None:
            full_since = time.monotonic()
        if full_since and not measured.pss and time.monotonic() - full_since > SETTLE_SECONDS:
            measured.at_once = at_once
            for name, pids in groups.items():
                sizes = [memory(pid) for pid in pids]
                measured.pss[name] = sum(pss for pss, _ in sizes)
                measured.rss[name] = sum(rss for _, rss in sizes)
                measured.cpu_running[name] = sum(found[pid].cpu for pid in pids)
        time.sleep(SAMPLE_SECONDS)
    # Those that ended keep their times until somebody collects them.
    _, _, of_tasks = stat(process.pid)
    if process.wait() != 0:
        raise SystemExit(log.read_text()[-5000:])
    others = sum(
        p.cpu
        for p in known.values()
        if p.parent == process.pid
        and (" step work " not in p.command or kind == "plain")
        and p.kind == "other"
    )
    if kind == "plain":
        measured.cpu["attempts"] = sum(
            p.cpu for p in known.values() if p.parent == process.pid and " step work " in p.command
        )
    else:
        measured.cpu["clients"] = of_tasks - others
        measured.cpu["supervisor"] = measured.cpu["its children"] = 0.0
        for pid, known_process in known.items():
            if known_process.kind == "supervisor" and known_process.parent != process.pid:
                try:
                    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
                    _, own, children = stat(pid)
                    os.waitpid(pid, 0)
                except (ChildProcessError, OSError):
                    continue
                measured.cpu["supervisor"] += own
                measured.cpu["its children"] += children
    if profiler is not None:
        profiler.wait()
    measured.seconds = time.monotonic() - began
    return measured


def capture(directory, environment):
    """Runs the step once in a real sandbox, so that there is something to replay."""
    done = subprocess.run(
        [sys.executable, "flow_recording.py", "--no-pylint", "run"],
        cwd=directory,
        env={**environment, "WIDE": "1", "SECONDS": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)


def row(name, measured):
    cpu = sum(measured.cpu.values()) / measured.tasks
    pss, rss = (sum(x.values()) / measured.tasks / 1024 for x in (measured.pss, measured.rss))
    print(
        f"| {name} | {measured.tasks} | {measured.at_once} | {cpu:.3f} | {pss:.1f} | {rss:.1f} "
        f"| {measured.seconds:.0f} |",
        flush=True,
    )


def details(measured):
    for name, cpu in measured.cpu.items():
        print(
            f"    {name:14} {cpu / measured.tasks * 1e3:7.1f} ms CPU each "
            f"(until all ran: {measured.cpu_running.get(name, 0) / measured.tasks * 1e3:.1f}), "
            f"PSS {measured.pss.get(name, 0) / 1024:.0f} MB together",
            file=sys.stderr,
        )


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("tasks", nargs="*", type=int, default=[100, 500])
    parser.add_argument("--plain", type=int, default=PLAIN_TASKS, help="0: none")
    parser.add_argument("--profile", help="a file for py-spy's stacks of the supervisor")
    options = parser.parse_args()
    # The supervisor outlives the client that started it: it becomes a child of this process.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as directory:
        environment = {
            **os.environ,
            "METAFLOW_USER": "bench",
            "PYTHONPATH": str(ROOT / "tests/third_party"),
            "REPLAY": directory,
            "TMPDIR": directory,
        }
        for name in ("replaying", "recording", "plain"):
            sandboxed = name != "plain"
            source = FLOW.replace("DECORATOR_IMPORT", "from metaflow import sandbox" * sandboxed)
            source = source.replace("DECORATOR", f"@sandbox(backend='{name}')" * sandboxed)
            source = source.replace(
                "PAUSE", "" if sandboxed else "time.sleep(float(os.environ['SECONDS']))"
            )
            Path(directory, f"flow_{name}.py").write_text(source)
        capture(directory, environment)
        print("| launcher | tasks | at once | CPU s a task | PSS MB a task | RSS MB a task | s |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for tasks in options.tasks:
            measured = measure(
                directory, environment, tasks, "replaying", 10 + tasks * 0.1, options.profile
            )
            row("one supervisor", measured)
            details(measured)
        if options.plain:
            measured = measure(
                directory, environment, options.plain, "plain", 20 + options.plain * 2.0
            )
            row("a Metaflow each", measured)


if __name__ == "__main__":
    main()
