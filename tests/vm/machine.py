"""A machine in which boxlite boots its guests wherever QEMU runs, without the host's KVM.

QEMU emulates a processor with AMD's virtualisation in software (TCG). Debian's kernel in it
has a KVM that works, so that an unmodified boxlite boots an unmodified guest there. That
shows what it does; it shows neither how fast it is nor what hardware isolation is worth.

Made of Debian's packages and PyPI's alone, into `build/vm`, and kept there:

    vmlinuz, initrd.gz    Debian's cloud kernel, and the modules that it needs
    debian.tar            Debian with python3
    guest/                an OCI layout of it, what steps run in
    root.img              the machine's disk: it too, with this package's dependencies

What a run needs beside these rides on a second disk, which is a tar archive.

    MACHINE_CLOCK   such as 0.25: how fast the machine's clock goes, by libfaketime. boxlite gives a
                    guest 30 seconds to boot, and a host that is busy needs more
    MACHINE_DISK    a disk to use, made if it isn't there, and not thrown away: a second run
                    finds what the first made of the image
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import selectors
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "vm"
SUITE = "bookworm"
PYTHON = "3.11"  # of that suite
PACKAGES = ["qemu-system-x86", "busybox-static", "mmdebstrap", "e2fsprogs", "cpio"]
MEMORY = 6144
DISK = "8000M"
# In the order in which they have to be loaded.
MODULES = (
    "drivers/virtio/virtio_ring drivers/virtio/virtio drivers/virtio/virtio_mmio "
    "drivers/virtio/virtio_pci_legacy_dev drivers/virtio/virtio_pci_modern_dev "
    "drivers/virtio/virtio_pci drivers/block/virtio_blk virt/lib/irqbypass arch/x86/kvm/kvm "
    "arch/x86/kvm/kvm-amd fs/fuse/fuse drivers/net/tun fs/overlayfs/overlay"
).split()
_FIRST = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev
for m in {modules}; do insmod /m/$m.ko; done
until [ -b /dev/vda ]; do sleep 0.1; done
mount -t ext4 /dev/vda /mnt; umount /proc /sys; mount --move /dev /mnt/dev
exec switch_root /mnt /init
"""
_INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root USER=root LANG=C.UTF-8
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts; for d in /tmp /dev/shm /run; do mount -t tmpfs tmpfs $d; done
mount -t cgroup2 cgroup2 /sys/fs/cgroup; ip link set lo up
mkdir -p /work /var/tmp/boxes; tar -xf /dev/vdb -C /work
cd /work; sh ./run.sh 2>&1; echo "machine: ended with $?"
sync; echo o > /proc/sysrq-trigger; sleep 10
"""


def sh(*command: str | Path, **more: object) -> str:
    """Runs a command, shows what it says if it fails, and returns its output."""
    words = [str(c) for c in command]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(words, text=True, **both, **more)  # type: ignore[call-overload]
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return str(done.stdout)


def missing() -> str | None:
    """Why the machine can't be made here, with the remedy."""
    if platform.machine() != "x86_64" or not shutil.which("apt-get"):
        return "it is made of Debian's packages for x86_64, by apt-get: run it on Debian or Ubuntu"
    if os.getuid() != 0:
        return "its disks hold files of root's: run it as root"
    needed = ("qemu-system-x86_64", "busybox", "mmdebstrap", "mke2fs", "cpio")
    absent = [name for name in needed if not shutil.which(name)]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install {' '.join(PACKAGES)}"
    return None


def build() -> None:
    """Makes what isn't there yet. Two minutes, and 3 GB of which most is sparse."""
    BUILD.mkdir(parents=True, exist_ok=True)
    for target, make in (
        ("vmlinuz", _kernel),
        ("debian.tar", _debian),
        ("guest", _guest),
        ("root.img", _disk),
    ):
        if not (BUILD / target).exists():
            start = time.monotonic()
            with tempfile.TemporaryDirectory(dir=BUILD) as directory:
                make(Path(directory))
            print(f"machine: made {target} in {time.monotonic() - start:.0f} s", flush=True)


def _kernel(work: Path) -> None:
    depends = sh("apt-cache", "depends", "linux-image-cloud-amd64")
    package = next(w for w in depends.split() if w.startswith("linux-image-6"))
    work.chmod(0o777)  # apt downloads as a user of its own
    sh("apt-get", "download", package, cwd=work)
    sh("dpkg", "-x", next(work.glob("*.deb")), work / "kernel")
    (modules,) = (work / "kernel/lib/modules").glob("*/kernel")
    tree = work / "initrd"
    for directory in ("bin", "dev", "proc", "sys", "mnt", "m"):
        (tree / directory).mkdir(parents=True)
    shutil.copy(str(shutil.which("busybox")), tree / "bin/busybox")
    names = []
    for module in MODULES:
        names.append(Path(module).name)
        shutil.copy(modules / f"{module}.ko", tree / "m")
    (tree / "init").write_text(_FIRST.format(modules=" ".join(names)))
    (tree / "init").chmod(0o755)
    sh("sh", "-c", f"find . | cpio --quiet -o -H newc | gzip -1 > {BUILD}/initrd.gz", cwd=tree)
    shutil.move(next((work / "kernel/boot").glob("vmlinuz-*")), BUILD / "vmlinuz")


def _debian(work: Path) -> None:
    include = "--include=python3,iproute2,procps,ca-certificates"
    sh("mmdebstrap", "--quiet", "--variant=minbase", include, SUITE, work / "debian.tar")
    (work / "debian.tar").rename(BUILD / "debian.tar")


def _guest(work: Path) -> None:
    layout(BUILD / "debian.tar", work / "guest")
    (work / "guest").rename(BUILD / "guest")


def layout(layer: Path, target: Path) -> None:
    """Writes an OCI layout with one layer, a tar archive."""
    blobs = target / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    content = layer.read_bytes()
    diff = hashlib.sha256(content).hexdigest()
    packed = gzip.compress(content, compresslevel=1, mtime=0)
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": [f"PATH={path}"], "Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff}"]},
    }
    oci = "application/vnd.oci.image"
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{oci}.manifest.v1+json",
        "config": put(json.dumps(config).encode(), f"{oci}.config.v1+json"),
        "layers": [put(packed, f"{oci}.layer.v1.tar+gzip")],
    }
    index = {
        "schemaVersion": 2,
        "manifests": [put(json.dumps(manifest).encode(), f"{oci}.manifest.v1+json")],
    }
    (target / "index.json").write_text(json.dumps(index))
    (target / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def _disk(work: Path) -> None:
    tree = work / "tree"
    tree.mkdir()
    sh("tar", "-xpf", BUILD / "debian.tar", "-C", tree)
    sh(
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--target", tree / "opt/packages", "--python-version", PYTHON,
        "--only-binary=:all:", *_requirements(), "pytest>=8.2",
    )  # fmt: skip
    shutil.copytree(BUILD / "guest", tree / "opt/guest")
    (tree / "init").write_text(_INIT)
    (tree / "init").chmod(0o755)
    made = work / "root.img"
    sh("mke2fs", "-q", "-t", "ext4", "-d", tree, made, DISK)
    made.rename(BUILD / "root.img")


def _requirements() -> list[str]:
    """What this package needs in the machine, with its extra for boxlite."""
    there = {"extra": "boxlite", "python_version": PYTHON}
    declared = map(Requirement, metadata.requires("metaflow-sandbox") or ())
    needed = [r for r in declared if r.marker is None or r.marker.evaluate(there)]
    return [f"{r.name}{r.specifier}" for r in needed]


def payload(target: Path, script: str) -> None:
    """Writes the second disk: this package, its tests, and what to run."""
    with tempfile.TemporaryDirectory(dir=BUILD) as directory:
        packages = Path(directory, "packages")
        sh(
            sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--target", packages, ROOT,
        )  # fmt: skip
        run = Path(directory, "run.sh")
        run.write_text(script)
        with tarfile.open(target, "w") as archive:
            archive.add(packages, "packages")
            archive.add(ROOT / "tests", "tests")
            archive.add(ROOT / "pyproject.toml", "pyproject.toml")
            archive.add(run, "run.sh")


def boot(script: str, seconds: float) -> list[str]:
    """Runs a shell script in the machine and shows what it prints.

    Returns:
        Its lines, also if the time was over; the last says so then.
    """
    with tempfile.TemporaryDirectory(dir=BUILD) as directory:
        root, second = Path(directory, "root.img"), Path(directory, "payload.tar")
        if kept := os.environ.get("MACHINE_DISK"):  # another run's, with what that left
            root = Path(kept)
        if not root.exists():
            sh("cp", "--sparse=always", BUILD / "root.img", root)
        payload(second, script)
        command = [
            *_slowed(), "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-nographic",
            "-serial", "stdio", "-no-reboot", "-smp", "2", "-m", str(MEMORY), "-M", "q35",
            "-accel", "tcg,thread=multi", "-cpu", "max,+svm,+npt",
            "-kernel", str(BUILD / "vmlinuz"), "-initrd", str(BUILD / "initrd.gz"),
            "-drive", f"file={root},format=raw,if=virtio,cache=unsafe",
            "-drive", f"file={second},format=raw,if=virtio,readonly=on",
            # A busy host can be too slow for the kernel's test of its timer.
            "-append", "console=ttyS0 panic=-1 no_timer_check mitigations=off "
            "random.trust_cpu=1 quiet",
        ]  # fmt: skip
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            return _lines(process, seconds)
        finally:
            process.kill()
            process.wait()


def clock() -> float:
    """Seconds of the machine that pass in one of ours."""
    return float(os.environ.get("MACHINE_CLOCK") or 1)


def _slowed() -> list[str]:
    return ["faketime", "-m", "-f", f"+0x{clock()}"] if clock() != 1 else []


def _lines(process: subprocess.Popen[bytes], seconds: float) -> list[str]:
    lines, text, deadline = [], b"", time.monotonic() + seconds
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                lines.append(f"machine: stopped after {seconds:.0f} s")
                print(lines[-1], flush=True)
                return lines
            if not selector.select(left):
                continue
            piece = os.read(process.stdout.fileno(), 65536)
            *whole, text = (text + piece).split(b"\n")
            for line in whole:
                lines.append(line.decode(errors="replace").rstrip("\r"))
                print(lines[-1], flush=True)
            if not piece:
                return lines
