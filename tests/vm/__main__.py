"""`make test-vm`: real guests of boxlite, with a Metaflow flow and the contract, in a machine.

Says in its last lines what was checked and what was not. Fails if something that was
checked doesn't hold, if the flow did not run to its end, or if nothing could be checked.

    python tests/vm [flow] [contract]      both unless named

MACHINE_SECONDS is how long it may take in all, a machine that is there already; 840.
MACHINE_TESTS is which tests of the contract, as pytest's -k takes them.
"""

import os
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import machine  # noqa: E402

TESTS = os.environ.get("MACHINE_TESTS")
SECONDS = int(os.environ.get("MACHINE_SECONDS") or 840)

SCRIPT = """
ulimit -n 65536
printf '/opt/packages\\n/work/packages\\n' > /usr/local/lib/python3.11/dist-packages/vm.pth
export METAFLOW_USER=vm METAFLOW_DEFAULT_DATASTORE=local TMPDIR=/var/tmp LANG=C.UTF-8
export PYTHONDONTWRITEBYTECODE=1
echo "127.0.1.1 $(hostname)" >> /etc/hosts
uname -r; ls -l /dev/kvm
"""
FLOW = """
mkdir -p flow; cp tests/vm/guests.py flow; cd flow
timeout {seconds} python3 guests.py --no-pylint run --max-workers 1
echo "machine: the flow ended with $?"
find /var/tmp/metaflow-sandbox-0 -mindepth 1 -type d | sed 's/^/machine: left behind: /'
cd ..
"""
CONTRACT = """
export VM_IMAGE=/opt/guest VM_SHARED=1 SUITE=all
VM_SECONDS=$(({seconds} - 60 - $(cut -d. -f1 /proc/uptime))) \\
    python3 -m pytest -v -m integration -p no:cacheprovider tests/vm/test_contract.py {tests}
echo "machine: the contract ended with $?"
"""


def main() -> int:
    if problem := machine.missing():
        print(f"test-vm: NOTHING WAS CHECKED: {problem}", file=sys.stderr)
        return 1
    machine.build()
    tests = f"-k {shlex.quote(TESTS)}" if TESTS else ""
    parts = sys.argv[1:] or ["flow", "contract"]
    script, expected = SCRIPT, []
    if "flow" in parts:
        script += FLOW.format(seconds=int((SECONDS - 60) * machine.clock()))
        expected += ["machine: the flow ended with 0", "guest: squares [9, 16]"]
    if "contract" in parts:
        script += CONTRACT.format(seconds=int(SECONDS * machine.clock()), tests=tests)
        expected += ["machine: the contract ended with 0"]
    start = time.monotonic()
    lines = machine.boot(script, SECONDS)
    print(f"test-vm: {time.monotonic() - start:.0f} s in the machine")
    missed = [wanted for wanted in expected if not any(wanted in line for line in lines)]
    missed += [line for line in lines if line.startswith("machine: left behind")]
    for line in missed:
        print(f"test-vm: not so: {line}")
    return bool(missed)


if __name__ == "__main__":
    os.nice(10)
    sys.exit(main())
