"""What one attempt is: everything the launcher needs, read once from Metaflow's context."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaflow import util
from metaflow.metaflow_config import SANDBOX_DECORATORS

from ..backends.base import Prepared
from ..errors import SandboxError
from .request import Request
from .secrets import Secrets


def _prepared(workspace: Path, step: str) -> Path:
    return workspace / f"prepared-{step}.json"


def save_prepared(workspace: Path, step: str, prepared: Prepared, python: str | None) -> None:
    """Leaves what a step's sandboxes are made from to the run's supervisor.

    Args:
        python: the interpreter of the step's own environment.
    """
    mounts = {inside: str(path) for inside, path in prepared.mounts.items()}
    saved = {"image": prepared.image, "mounts": mounts, "python": python}
    _prepared(workspace, step).write_text(json.dumps(saved))


def _load_prepared(workspace: Path, step: str) -> tuple[Prepared, str | None]:
    saved = json.loads(_prepared(workspace, step).read_text())
    mounts = {k: Path(v) for k, v in saved["mounts"].items()}
    return Prepared(saved["image"], mounts), saved["python"]


def _scrubbed(options: dict[str, Any]) -> dict[str, Any]:
    """Metaflow's options, without what `--with` says to the scheduler's side alone."""
    specs = []
    for spec in options.get("decospecs") or ():
        name = spec.partition(":")[0]
        if name in SANDBOX_DECORATORS:
            specs.append(name)  # inside, it has nothing to do
        elif name not in ("environment", "secrets"):  # which are among the step's variables
            specs.append(spec)
    return {**options, "decospecs": tuple(specs)}


@dataclass(frozen=True)
class Job:
    """One attempt of one task.

    Attributes:
        package: (metadata, sha, url) of the code package.
        top_options: Metaflow's options before `step`, as they are on the host.
        environment: variables of the step from @environment and `env=`; secret.
        secrets: those of @secrets, which are not fetched yet.
        prepared: what its sandbox is made from.
        python: the interpreter of the step's own environment, if it has one.
    """

    flow: str
    run: str
    step: str
    task: str
    attempt: int
    max_user_code_retries: int
    input_paths: str
    split_index: int | None
    clone_run: str | None
    tags: tuple[str, ...]
    namespace: str | None
    script: str
    package: tuple[str, str, str]
    top_options: dict[str, Any]
    environment: dict[str, str]
    secrets: Secrets
    request: Request
    backend: str
    workspace: Path
    prepared: Prepared
    python: str | None

    @property
    def pathspec(self) -> str:
        return f"{self.flow}/{self.run}/{self.step}/{self.task}"

    @classmethod
    def from_context(cls, ctx: Any, options: dict[str, Any]) -> Job:
        """Reads Metaflow's click context and the options of `sandbox step`.

        Raises:
            SandboxError: the step has no sandbox decorator, or `env` names a
                variable that isn't set.
        """
        step = options["step_name"]
        decorators = ctx.obj.graph[step].decorators
        requests = [d.request for d in decorators if hasattr(d, "request")]
        if not requests:
            raise SandboxError(f"step {step} has no sandbox decorator", op="launch")
        environment: dict[str, str] = {}
        for deco in decorators:
            if deco.name == "environment":
                environment.update({k: str(v) for k, v in deco.attributes["vars"].items()})
        environment.update(requests[0].variables())
        prepared, python = _load_prepared(Path(options["workspace"]), step)
        return cls(
            flow=ctx.obj.flow.name,
            run=options["run_id"],
            step=step,
            task=options["task_id"],
            attempt=options["retry_count"],
            max_user_code_retries=options["max_user_code_retries"],
            input_paths=options["input_paths"] or "",
            split_index=options["split_index"],
            clone_run=options["clone_run_id"],
            tags=tuple(options["tag"] or ()),
            namespace=options["namespace"],
            script=os.path.basename(sys.argv[0]),
            package=(
                options["code_package_metadata"],
                options["code_package_sha"],
                options["code_package_url"],
            ),
            top_options=_scrubbed(ctx.parent.parent.params),
            environment=environment,
            secrets=Secrets.of(decorators),
            request=requests[0],
            backend=options["backend"],
            workspace=Path(options["workspace"]),
            prepared=prepared,
            python=python,
        )

    def argv(self, python: str, datastore_root: str, input_paths: str) -> list[str]:
        """The command that runs the step inside, on a datastore and metadata of its own."""
        top = {
            **self.top_options,
            "datastore": "local",
            "datastore_root": datastore_root,
            "metadata": "local",
            "event_logger": "nullSidecarLogger",
            "monitor": "nullSidecarMonitor",
        }
        options = {
            "run_id": self.run,
            "task_id": self.task,
            "input_paths_filename": input_paths,
            "split_index": self.split_index,
            "retry_count": self.attempt,
            "max_user_code_retries": self.max_user_code_retries,
            "clone_run_id": self.clone_run,
            "tag": self.tags,
            "namespace": self.namespace,
        }

        def words(mapping: dict[str, Any]) -> list[str]:
            given = {k: v for k, v in mapping.items() if v not in (None, ())}
            return shlex.split(" ".join(util.dict_to_cli_options(given)))

        # As Metaflow does: packages of a user's home are not the environment's.
        own = ["-s"] if self.python else []
        return [python, *own, "-u", self.script, *words(top), "step", self.step, *words(options)]
