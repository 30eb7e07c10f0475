"""Images for tests, made of this machine's own Python."""

import gzip
import hashlib
import io
import json
import platform
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

PYTHON = Path("/usr/bin/python3")


def libraries(program):
    """What the dynamic linker loads for a program, the linker too."""
    said = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
    return [Path(p) for p in re.findall(r"(/\S+)", said)]


def root_file_system(target):
    """A small root with the system's Python, `sh`, `ls` and `cat`; no Metaflow."""
    real = PYTHON.resolve()
    library = Path("/usr/lib") / real.name
    for name in ("usr/bin", "usr/lib", "etc", "tmp", "proc", "dev", "opt/app"):
        (target / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(real, target / "usr/bin/python3")
    skipped = shutil.ignore_patterns("test", "__pycache__", "idlelib", "dist-packages", "*.a")
    shutil.copytree(library, target / "usr/lib" / library.name, symlinks=True, ignore=skipped)
    shutil.rmtree(target / "usr/lib" / library.name / "sitecustomize.py", ignore_errors=True)
    programs = [real]
    for name in ("sh", "ls", "cat", "true", "sleep", "id"):
        found = Path(shutil.which(name, path="/usr/bin:/bin")).resolve()
        shutil.copy(found, target / "usr/bin" / name)
        programs.append(found)
    programs += (target / "usr/lib" / library.name).glob("lib-dynload/*.so")
    for path in {p for program in programs for p in libraries(program)}:
        copy = target / "usr" / path.relative_to("/usr" if path.is_relative_to("/usr") else "/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for name in ("bin", "lib", "lib64"):
        (target / "usr" / name).mkdir(exist_ok=True)
        (target / name).symlink_to(f"usr/{name}")
    (target / "etc/os-release").write_text("ID=test\n")
    (target / "opt/app/note").write_text("from the image")
    return target


def blob(layout, content):
    digest = hashlib.sha256(content).hexdigest()
    path = layout / "blobs/sha256" / digest
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return {"digest": f"sha256:{digest}", "size": len(content)}


def layer(entries=(), tree=None, compress=True):
    """A layer's bytes: a tree, then (TarInfo or name, content) entries."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        if tree is not None:
            archive.add(tree, arcname=".")
        for info, content in entries:
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), 1) if compress else buffer.getvalue()


def link(name, target, kind=tarfile.SYMTYPE, mode=0o777):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, target, mode
    return info, b""


def layout(target, layers, environment=(), tag="latest", media="tar+gzip"):
    """An OCI layout with one image for this machine."""
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    target.mkdir(parents=True, exist_ok=True)
    (target / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    kind = f"application/vnd.oci.image.layer.v1.{media}"
    config = blob(target, json.dumps({"config": {"Env": list(environment)}}).encode())
    manifest = {
        "schemaVersion": 2,
        "config": config,
        "layers": [{**blob(target, content), "mediaType": kind} for content in layers],
    }
    entry = blob(target, json.dumps(manifest).encode())
    entry["platform"] = {"os": "linux", "architecture": machine}
    entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
    (target / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return target
