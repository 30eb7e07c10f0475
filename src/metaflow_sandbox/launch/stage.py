"""Lays out what goes into a sandbox: two directories on the host, and nothing else.

    code/       the unpacked code package, the same for all tasks of a run; without
                Metaflow itself where the backend can bind the installed one
    attempt/    agent.py, job.json, input-paths, metaflow/config.json, files/,
                datastore/ with the records and blobs of the attempt's own inputs

The host's copies may say more than a sandbox should know. `_graph_info` has every
step's decorators with their values, @environment's included; the package's INFO
has the git remote, with the token in it; the locks of environments have those of
indexes; and Metaflow packs what links of the flow's directory lead to, wherever that
is. All are scrubbed here.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import metaflow
from metaflow import util
from metaflow.includefile import IncludedFile
from metaflow.package import MetaflowPackage

from ..agent import AGENT
from ..backends.base import Backend, nobodys
from .job import Job
from .store import Parent, blob_files

# Sends back with the exit frame what is no larger than this.
INLINE_BYTES = 256 << 10
PROCESSES = 2048
_METAFLOW = ".mf_code/metaflow"
_INFO_KEPT = {
    "platform",
    "environment_type",
    "use_r",
    "python_version",
    "python_version_code",
    "metaflow_version",
    "script",
    "ext_info",
}
# Metaflow's other plugins need packages that an image may lack, and services
# that a sandbox can't reach.
_METAFLOW_CONFIG = {
    "METAFLOW_ENABLED_METADATA_PROVIDER": ["local"],
    "METAFLOW_ENABLED_SIDECAR": ["save_logs_periodically"],
}
_INCLUDED_FILE = str(IncludedFile)
_WITHHELD = "withheld.json"
# What Metaflow's environments are made from: what a step needs of it is installed already, and
# the addresses of indexes have passwords in them.
_LOCKS = frozenset(f".mf_meta/{name}" for name in ("conda.manifest", "uv.lock", "pyproject.toml"))


def withhold(workspace: Path, members: Iterable[tuple[str, str]]) -> list[str]:
    """Decides which of the user's files of the code package don't go into any sandbox.

    Args:
        members: (path, name in the package) of each, as Metaflow has them.

    Returns:
        The names of those that links lead to from outside of the flow's directory.
    """
    names = []
    for path, name in members:
        if not path.endswith(f"/{name}"):
            continue  # it doesn't come from a directory: a decorator packs it
        root = os.path.realpath(path[: -len(name)])
        if os.path.commonpath([root, os.path.realpath(path)]) != root:
            names.append(name)
    (workspace / _WITHHELD).write_text(json.dumps(names))
    return names


def _withheld(workspace: Path) -> frozenset[str]:
    return frozenset(json.loads((workspace / _WITHHELD).read_text()))


def code_mounts(
    workspace: Path, metadata: str, load: Callable[[], bytes], backend: Backend
) -> dict[str, Path]:
    """The directories with the code, as mounts.

    A backend that binds directories gets Metaflow from where it is installed, since
    that is what Metaflow packages: it need not be unpacked, and its bytecode is there.
    Others get one archive, made once for all attempts of the run.

    Args:
        metadata: the code package's, as Metaflow writes it.
        load: gives the package's bytes.
    """
    inside = f"{backend.inbox}/code"
    withheld = _withheld(workspace)
    if not backend.binds_mounts:
        return {inside: packed(code_tree(workspace / "code", metadata, load, withheld))}
    tree = code_tree(
        workspace / "code-without-metaflow", metadata, load, withheld, without=_METAFLOW
    )
    return {inside: tree, f"{inside}/{_METAFLOW}": Path(metaflow.__file__).parent}


def code_tree(
    target: Path,
    metadata: str,
    load: Callable[[], bytes],
    withheld: frozenset[str],
    without: str | None = None,
) -> Path:
    """The unpacked and scrubbed code package of a run, made by whoever needs it first.

    Args:
        withheld: names of files that are not unpacked.
        without: a directory of the package that stays empty.

    Returns:
        `target`, a directory that is complete and that nobody changes any more.
    """

    def make(new: Path) -> None:
        new.mkdir()
        archiver = MetaflowPackage.get_backend(metadata)
        with archiver.cls_open(io.BytesIO(load())) as archive:
            members = [
                member
                for member in archiver.cls_list_members(archive)
                if (name := archiver.cls_member_name(member)) not in withheld | _LOCKS
                and (without is None or not name.startswith(f"{without}/"))
            ]
            archiver.cls_extract_members(archive, members, str(new))
        if without is not None:
            (new / without).mkdir(parents=True, exist_ok=True)
        info = new / ".mf_meta" / "INFO"
        if info.is_file():
            kept = {k: v for k, v in json.loads(info.read_text()).items() if k in _INFO_KEPT}
            info.write_text(json.dumps(kept))
        for folder, _, files in os.walk(new):
            os.chmod(folder, 0o755)  # under root the step runs as another user
            for name in files:
                path = Path(folder, name)
                if not path.is_symlink():
                    path.chmod(path.stat().st_mode & 0o777 | 0o444)

    return _once(target, make)


def packed(tree: Path) -> Path:
    """An archive of a tree that nobody changes, made by whoever needs it first."""

    def make(new: Path) -> None:
        with tarfile.open(new, "w:gz") as archive:
            archive.add(tree, arcname=".", filter=nobodys)

    return _once(tree.with_name(f"{tree.name}.tar.gz"), make)


def _once(target: Path, make: Callable[[Path], None]) -> Path:
    """A file or directory that all attempts of a run share: whoever needs it first makes it.

    Args:
        make: makes it at another path, from where it is moved when it is complete.
    """
    if not target.exists():
        with open(f"{target}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                place = Path(tempfile.mkdtemp(dir=target.parent))
                make(place / target.name)
                (place / target.name).rename(target)
                place.rmdir()
    return target


class Staging:
    """Fills an attempt's directory.

    Attributes:
        directory: on the host; the sandbox sees it at `inside`.
    """

    def __init__(self, job: Job, backend: Backend, directory: Path) -> None:
        self.job = job
        self.directory = directory
        self.inside = f"{backend.inbox}/attempt"
        self.code_inside = f"{backend.inbox}/code"
        self.work = backend.work
        chosen = job.python or job.request.executable
        self.python = chosen or backend.interpreter(job.prepared.image)
        os.chmod(directory, 0o755)

    def fill(self, parents: list[Parent], flow_datastore: Any, output_bytes: int) -> None:
        """Writes everything. Blocking: it reads the datastore, and fetches secrets.

        Raises:
            SandboxError: a secret can't be had.
        """
        job = self.job
        variables = {**job.environment, **job.secrets.fetch(job.environment)}
        shutil.copyfile(AGENT, self._path("agent.py"))
        self._put("input-paths", job.input_paths.encode())
        self._put("metaflow/config.json", json.dumps(_METAFLOW_CONFIG).encode())
        known = self._inputs(parents, flow_datastore)
        self._identities()
        limits = {"processes": PROCESSES, "output": output_bytes, "inline": INLINE_BYTES}
        task = {
            "flow": job.flow,
            "run": job.run,
            "step": job.step,
            "task": job.task,
            "attempt": job.attempt,
        }
        description = {
            "argv": job.argv(
                self.python, f"{self.work}/datastore/.metaflow", f"{self.inside}/input-paths"
            ),
            "env": self._environment(variables),
            "task": task,
            "known": sorted(known),
            "limits": limits,
        }
        # Last, and complete at once: the agent starts from it.
        self._put("job.json", json.dumps(description).encode())

    def _path(self, name: str) -> Path:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _put(self, name: str, content: bytes) -> None:
        self._path(name).write_bytes(content)

    def _environment(self, variables: dict[str, str]) -> dict[str, str]:
        job = self.job
        own = {
            "METAFLOW_SANDBOX_WORKLOAD": "1",
            "METAFLOW_USER": util.get_username() or "unknown",
            "METAFLOW_RUN_ID": job.run,
            "METAFLOW_FLOW_FILENAME": job.script,
            "METAFLOW_RUNTIME_ENVIRONMENT": "sandbox",
            "METAFLOW_DEFAULT_DATASTORE": "local",
            "METAFLOW_DEFAULT_METADATA": "local",
            "METAFLOW_DATASTORE_SYSROOT_LOCAL": f"{self.work}/datastore",
            # Looked for above the working directory otherwise, and not found.
            "METAFLOW_CARD_LOCALROOT": f"{self.work}/datastore/.metaflow/mf.cards",
            "METAFLOW_HOME": f"{self.inside}/metaflow",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        code = MetaflowPackage.get_post_extract_env_vars(job.package[0], self.code_inside)
        for name, value in code.items():
            own[name.rstrip(":")] = value
        # Metaflow itself comes first on the path, then what the user wants there.
        if extra := variables.get("PYTHONPATH"):
            own["PYTHONPATH"] = ":".join(filter(None, (own.get("PYTHONPATH"), extra)))
        theirs = {k: v for k, v in variables.items() if not k.startswith(("METAFLOW_", "MF_"))}
        return {**theirs, **own}

    # --- the datastore inside

    def _inputs(self, parents: list[Parent], flow_datastore: Any) -> set[str]:
        """Copies the records and blobs of the inputs. Returns the keys as the host has them."""
        keys: set[str] = set()
        for parent in parents:
            objects, info = dict(parent.objects), dict(parent.info)
            for name, content in self._rewrite(parent).items():
                key = hashlib.sha1(content, usedforsecurity=False).hexdigest()
                blob = f"datastore/{self.job.flow}/data/{key[:2]}/{key}"
                self._put(blob, content)
                self._put(f"{blob}_meta", b'{"cas_raw": true, "cas_version": 1}')
                objects[name] = key
                info[name] = {**info[name], "size": len(content), "encoding": "pickle-v4"}
            keys |= {sha for name, sha in objects.items() if sha == parent.objects[name]}
            record = {
                "datastore": "local",
                "version": "1.0",
                "attempt": parent.attempt,
                "objects": objects,
                "info": info,
            }
            base = f"datastore/{self.job.flow}/{parent.run}/{parent.step}/{parent.task}"
            start = f"{base}/{parent.attempt}."
            self._put(start + "attempt.json", json.dumps({"time": time.time()}).encode())
            self._put(start + "data.json", json.dumps(record).encode())
            self._put(start + "DONE.lock", b"")
        for key, file, metadata in blob_files(flow_datastore, sorted(keys)):
            target = self._path(f"datastore/{self.job.flow}/data/{key[:2]}/{key}")
            self._link(file, target)
            if metadata is not None:
                target.with_name(target.name + "_meta").write_text(json.dumps(metadata))
        return keys

    @staticmethod
    def _link(source: str, target: Path) -> None:
        # Under root the step runs as another user, who can't read the store's
        # private files; a copy gets this process's default permissions.
        if os.getuid() != 0:
            try:
                os.link(source, target)
            except OSError:
                pass
            else:
                return
        shutil.copyfile(source, target)
        os.chmod(target, 0o644)

    def _rewrite(self, parent: Parent) -> dict[str, bytes]:
        """The artifacts whose inner copy differs: {name: pickle}."""
        rewritten = {}
        if "_graph_info" in parent.objects:
            rewritten["_graph_info"] = _pickled(scrub_graph(parent.read("_graph_info")))
        parameters = {p["name"] for p in (parent.read("_graph_info") or {}).get("parameters", [])}
        for name in parameters & parent.objects.keys():
            if parent.info[name].get("type") == _INCLUDED_FILE:
                rewritten[name] = _pickled(self._included(parent.read(name)))
        return rewritten

    def _included(self, file: Any) -> Any:
        """An IncludeFile's pointer, turned to a copy of what it points to on the host."""
        from metaflow.plugins import DATACLIENTS

        url = file.descriptor["url"]
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        clients = {client.TYPE: client for client in DATACLIENTS}
        with clients[url.partition("://")[0]]() as client:
            shutil.copyfile(client.get(url).path, self._path(f"files/{name}"))
        return IncludedFile({**file.descriptor, "url": f"local://{self.inside}/files/{name}"})

    def _identities(self) -> None:
        """What Metaflow's client needs to find the run, step and task inside (for cards)."""
        job = self.job
        user = f"user:{util.get_username()}"
        path = f"datastore/{job.flow}"
        identity = {
            "flow_id": job.flow,
            "run_number": job.run,
            "step_name": job.step,
            "task_id": job.task,
            "ts_epoch": int(time.time() * 1000),
            "tags": [],
            "system_tags": [user],
            "user_name": util.get_username(),
        }
        for part in (
            "",
            f"/{job.run}",
            f"/{job.run}/{job.step}",
            f"/{job.run}/{job.step}/{job.task}",
        ):
            self._put(f"{path}{part}/_meta/_self.json", json.dumps(identity).encode())


def scrub_graph(graph: Any) -> Any:
    """`_graph_info` without the values of decorators and the host's paths."""
    decorated = [graph, *graph.get("steps", {}).values()]
    for item in decorated:
        for deco in item.get("decorators", []):
            deco["attributes"] = {}
        if item.get("source_file"):
            item["source_file"] = os.path.basename(item["source_file"])
    return graph


def _pickled(value: Any) -> bytes:
    return pickle.dumps(value, protocol=4)
