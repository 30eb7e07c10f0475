"""A flow whose steps run in guests of boxlite: one, two at once, and one that fails.

python guests.py run --image PATH
"""

import platform

from metaflow import FlowSpec, boxlite, catch, current, step

IMAGE = "/opt/guest"  # in the machine of machine.py


def where(flow):
    flow.kernel = platform.release()
    print("guest: step", current.step_name, "runs on Linux", flow.kernel)


class Guests(FlowSpec):
    @step
    def start(self):
        self.numbers = [3, 4]
        self.kernel = platform.release()
        print("guest: the host runs on Linux", self.kernel)
        self.next(self.work, foreach="numbers")

    @boxlite(image=IMAGE, network=False, memory=512, cpu=1)
    @step
    def work(self):
        where(self)
        self.square = self.input**2
        self.next(self.join)

    @step
    def join(self, inputs):
        self.squares = sorted(i.square for i in inputs)
        self.kernels = sorted({i.kernel for i in inputs})
        self.next(self.fail)

    @catch(var="problem")
    @boxlite(image=IMAGE, network=False, memory=512)
    @step
    def fail(self):
        where(self)
        raise ValueError("as it was meant to")
        self.next(self.end)

    @step
    def end(self):
        own = platform.release()
        assert self.squares == [9, 16], self.squares
        assert own not in self.kernels, self.kernels
        assert "as it was meant to" in str(self.problem), self.problem
        print("guest: squares", self.squares, "kernels", self.kernels, "host", own)
        print("guest: the step failed with", str(self.problem).strip().splitlines()[-1])


if __name__ == "__main__":
    Guests()
