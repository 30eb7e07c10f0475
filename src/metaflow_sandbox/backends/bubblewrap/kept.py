"""What `keep` leaves of a sandbox: its work directory, and what is needed to enter it again.

A sandbox of this backend can't outlive its launcher. So its work directory is kept as
one archive, which nobody unpacks on the host: `metaflow-sandbox shell` makes a new
sandbox with the same parameters, unpacks the archive in it, and opens a shell there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from platformdirs import user_state_path

from ... import cache, leases
from ...errors import SandboxError
from ..base import SandboxSpec

ARCHIVE = "work.tar"
INSIDE = "/kept"  # where a new sandbox sees the directory
_SECONDS = 7 * 86400.0
_NAME = re.compile(r"[^A-Za-z0-9_.-]+")
PACK = (
    "import sys, tarfile\n"
    "def keep(m):\n"
    "    return None if m.isdev() else m\n"
    "with tarfile.open(fileobj=sys.stdout.buffer, mode='w|') as a:\n"
    "    a.add(sys.argv[1], arcname='.', filter=keep)\n"
)
UNPACK = (
    "import sys, tarfile\n"
    "options = {'filter': 'tar'} if hasattr(tarfile, 'tar_filter') else {}\n"
    "with tarfile.open(sys.argv[1]) as a:\n"
    "    a.extractall(sys.argv[2], **options)\n"
)


@dataclass(frozen=True)
class Kept:
    """One kept sandbox: a private directory with `work.tar`, `spec.json` and mounts."""

    path: Path

    def spec(self) -> SandboxSpec:
        """The parameters of the sandbox that it was, with the mounts that were kept.

        Its environment stays in the cache while this process lives.

        Raises:
            SandboxError: a mount is there no more.
        """
        record = json.loads((self.path / "spec.json").read_text())
        mounts = {inside: Path(host) for inside, host in record.pop("mounts").items()}
        for host in mounts.values():
            if not cache.hold(host):
                raise SandboxError(
                    f"the step's environment, {host}, was removed from the cache since. The next "
                    "run of the flow builds it again; then this works, too.",
                    op="shell",
                )
        spec = SandboxSpec(**record, mounts={**mounts, INSIDE: self.path})
        return replace(spec, labels={**spec.labels, "purpose": "shell"})


def _base() -> Path:
    path = Path(user_state_path("metaflow-sandbox")) / "kept"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def name_of(spec: SandboxSpec, sandbox_id: str) -> str:
    """A name that the user recognises: run, step, task and attempt."""
    keys = ("metaflow-run", "metaflow-step", "metaflow-task", "metaflow-attempt")
    parts = [spec.labels[k] for k in keys if k in spec.labels] or [sandbox_id]
    return _NAME.sub("_", "-".join(parts))[:150].lstrip(".")


def begin() -> Path:
    """A new directory to fill. Removes what is older than a week."""
    base = _base()
    leases.remove_old(base, _SECONDS)
    return Path(tempfile.mkdtemp(prefix=".new-", dir=base))


def finish(new: Path, name: str, spec: SandboxSpec, mounts: Mapping[str, Path]) -> str:
    """Completes a directory: copies those mounts that will be gone. Returns its name."""
    base = _base()
    final = base / name
    for i in range(2, 1000):
        if not final.exists():
            break
        final = base / f"{name}-{i}"
    where = {}
    temporary = leases.base()
    for number, (inside, host) in enumerate(mounts.items()):
        if host.is_relative_to(temporary):
            shutil.copytree(host, new / f"mount-{number}", symlinks=True)
            where[inside] = str(final / f"mount-{number}")
        else:
            where[inside] = str(host)
    record = {**asdict(replace(spec, mounts={})), "mounts": where}
    (new / "spec.json").write_text(json.dumps(record))
    new.chmod(0o755)  # what is above it is private; as root a sandbox has another user
    os.rename(new, final)
    return final.name


def find(name: str) -> Kept:
    """A kept sandbox by its name, or the last one of a task by RUN/STEP/TASK.

    Raises:
        SandboxError: there is none.
    """
    there = [p for p in _base().iterdir() if not p.name.startswith(".")]
    there.sort(key=lambda p: p.stat().st_mtime)
    start = _NAME.sub("_", name.replace("/", "-")) + "-"
    for path in reversed(there):
        if path.name == name or ("/" in name and path.name.startswith(start)):
            return Kept(path)
    known = ", ".join(p.name for p in there) or "none"
    raise SandboxError(f"no sandbox was kept as {name!r}. There are: {known}.", op="shell")
