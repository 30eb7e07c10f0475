"""`make test-vm`: real guests of boxlite, with a Metaflow flow and the contract, in a machine.

Says in its last lines what was checked and what was not. Fails if something that was
checked doesn't hold, if the flow did not run to its end, or if nothing could be checked.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import machine  # noqa: E402

FLOW_SECONDS = 420
SECONDS = 840  # in all, a machine that is there already

SCRIPT = """
ulimit -n 65536
printf '/opt/packages\\n/work/packages\\n' > /usr/local/lib/python3.11/dist-packages/vm.pth
export METAFLOW_USER=vm METAFLOW_DEFAULT_DATASTORE=local TMPDIR=/var/tmp LANG=C.UTF-8
export PYTHONDONTWRITEBYTECODE=1
uname -r; ls -l /dev/kvm
mkdir -p flow; cp tests/vm/guests.py flow; cd flow
timeout {flow} python3 guests.py --no-pylint run --max-workers 1
echo "machine: the flow ended with $?"
ls -A /var/tmp/metaflow-sandbox-0 | grep -v places | sed 's/^/machine: left behind: /'
cd ..
{contract}
"""
CONTRACT = """
export VM_IMAGE=/opt/guest VM_SHARED=1
VM_SECONDS=$(({seconds} - 60 - $(cut -d. -f1 /proc/uptime))) \\
    python3 -m pytest -q -m integration -p no:cacheprovider tests/vm/test_contract.py
echo "machine: the contract ended with $?"
"""


def main() -> int:
    if problem := machine.missing():
        print(f"test-vm: NOTHING WAS CHECKED: {problem}", file=sys.stderr)
        return 1
    machine.build()
    contract = "" if "flow" in sys.argv[1:] else CONTRACT.format(seconds=SECONDS)
    start = time.monotonic()
    lines = machine.boot(SCRIPT.format(flow=FLOW_SECONDS, contract=contract), SECONDS)
    print(f"test-vm: {time.monotonic() - start:.0f} s in the machine")
    expected = ["machine: the flow ended with 0"]
    if contract:
        expected.append("machine: the contract ended with 0")
    missed = [line for line in expected if line not in lines]
    missed += [line for line in lines if line.startswith("machine: left behind")]
    if not any("guest: squares [9, 16]" in line for line in lines):
        missed.append("no step ran in a guest with a kernel of its own")
    for line in missed:
        print(f"test-vm: not so: {line}")
    return bool(missed)


if __name__ == "__main__":
    os.nice(10)
    sys.exit(main())
