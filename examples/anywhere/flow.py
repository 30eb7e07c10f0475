"""One flow, any sandbox.

    python flow.py run --with bubblewrap          # or boxlite, docker, daytona, e2b
    python flow.py run --with e2b --code "print(sum(range(10)))"

Runs a program that nobody has looked at, once in each of a few sandboxes of its own, and
prints what each printed and where it ran. It needs nothing but Python inside.
"""

import subprocess
import sys

from metaflow import FlowSpec, Parameter, step

CODE = """
import os, platform
print("user", os.getuid(), "on Linux", platform.release())
print(sorted(name for name in os.environ if "KEY" in name or "TOKEN" in name))
"""


class Anywhere(FlowSpec):
    code = Parameter("code", help="A Python program.", default=CODE)
    copies = Parameter("copies", help="How often it runs.", type=int, default=3)

    @step
    def start(self):
        self.numbers = list(range(self.copies))
        self.next(self.execute, foreach="numbers")

    @step
    def execute(self):
        command = [sys.executable, "-I", "-c", self.code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        self.number, self.exit_code = self.input, done.returncode
        self.printed = done.stdout + done.stderr
        self.next(self.join)

    @step
    def join(self, inputs):
        self.results = {i.number: (i.exit_code, i.printed) for i in inputs}
        self.next(self.end)

    @step
    def end(self):
        for number, (code, printed) in sorted(self.results.items()):
            print(f"{number} ended with {code}:")
            print(printed)


if __name__ == "__main__":
    Anywhere()
