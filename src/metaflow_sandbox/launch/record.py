"""Records an attempt in the user's datastore and metadata, by Metaflow's own classes.

The order is what makes it safe to be stopped at any point: blobs, then the cards,
then the record of the artifacts, and the mark that it is whole at the very end.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaflow.metadata_provider import MetaDatum

from ..admission import artifacts, internals
from ..admission.cards import wrap
from ..admission.reader import MAX_BYTES
from ..admission.results import Results
from ..errors import Rejected
from .heartbeat import beating
from .job import Job
from .store import Parent, save_cards, stored

# How many artifacts of the largest size an attempt may leave.
_ARTIFACTS = 8
# What no step can change, beside Parameters and constants.
_ALWAYS_KNOWN = ("_graph_info", "_configs_processed")


class _Records:
    """The form in which Metaflow takes over records: see `TaskDataStore.passdown_partial`."""

    def __init__(self, objects: dict[str, str], info: dict[str, Any]) -> None:
        self._objects = objects
        self._info = info


@dataclass(frozen=True)
class Admitted:
    """What of an attempt's results is recorded: internal artifacts, the others, success."""

    values: dict[str, Any]
    decision: artifacts.Decision
    succeeded: bool


@dataclass(frozen=True)
class Verdict:
    """What became of an attempt that left results.

    Attributes:
        succeeded: whether the step did what it should.
        explained: whether it recorded an exception, which its output shows.
    """

    succeeded: bool
    explained: bool


class Recorder:
    """One attempt's way into the datastore and the metadata. Blocking; one call at a time."""

    def __init__(self, job: Job, context: Any) -> None:
        self.job = job
        self.flow_datastore = context.flow_datastore
        # A provider keeps things of one task: each attempt needs its own.
        given = context.metadata
        self.metadata = type(given)(
            context.environment, context.flow, context.event_logger, context.monitor
        )
        self.graph = context.graph
        #: What is known of the sandbox itself: {name of a metadatum: text}.
        self.facts: dict[str, str] = {}
        self.output = self.flow_datastore.get_task_datastore(
            job.run, job.step, job.task, attempt=job.attempt, mode="w"
        )

    def begin(self, parents: list[Parent]) -> None:
        """What Metaflow records before a step runs."""
        job = self.job
        metadata, sha, url = job.package
        # Metaflow reads these to record which code a task ran.
        os.environ.update(
            METAFLOW_CODE_METADATA=metadata,
            METAFLOW_CODE_SHA=sha,
            METAFLOW_CODE_URL=url,
            METAFLOW_CODE_DS=self.flow_datastore.TYPE,
        )
        self.metadata.add_sticky_tags(tags=job.tags)
        self.metadata.register_run_id(job.run)
        self.metadata.register_task_id(job.run, job.step, job.task, job.attempt)
        self.output.init_task()
        facts: dict[str, Any] = {
            "attempt": str(job.attempt),
            "origin-run-id": str(job.clone_run),
            "ds-type": self.flow_datastore.TYPE,
            "ds-root": self.flow_datastore.datastore_root,
            "sandbox-backend": job.backend,
        }
        stack = internals.admit_foreach_stack(self._position(parents, succeeded=False))
        if shown := [f"{f.var}={f.value}" for f in stack if f.var and f.value]:
            facts["foreach-stack"] = shown
        if stack:
            facts["foreach-execution-path"] = ",".join(f"{f.step}:{f.index}" for f in stack)
        self._register(facts)
        self.output.save_metadata(
            {
                "task_begin": {
                    "code_package_metadata": metadata,
                    "code_package_sha": sha,
                    "code_package_ds": self.flow_datastore.TYPE,
                    "code_package_url": url,
                    "retry_count": job.attempt,
                }
            }
        )

    def alive(self) -> contextlib.AbstractAsyncContextManager[None]:
        """While this context lasts the metadata service hears that the task lives."""
        job = self.job
        return beating(self.metadata, job.flow, job.run, job.step, job.task)

    def internals_request(
        self, parents: list[Parent], results: Results, directory: Path
    ) -> list[dict[str, Any]]:
        """What `admission/reader.py` is to read: the delivered values, as files.

        A value that an input has too was not delivered again; it is copied to
        `directory` out of the host's own datastore.
        """
        inputs = {sha: p.info[n] for p in parents for n, sha in p.objects.items()}
        items = []
        for name, form in internals.Delivered.FORMS.items():
            if (sha := results.objects.get(name)) is None:
                continue
            if sha in results.blobs:
                path, raw = results.blobs[sha]
            elif sha in inputs and int(inputs[sha].get("size", 0)) <= MAX_BYTES:
                path, raw = directory / f"input-{sha}", True
                path.write_bytes(stored(self.flow_datastore, sha) or b"")
            else:
                raise Rejected(f"the blob {sha} was neither an input nor delivered")
            items.append({"name": name, "form": form, "file": str(path), "raw": raw, "sha": sha})
        return items

    def decide(
        self,
        parents: list[Parent],
        results: Results,
        delivered: internals.Delivered,
        *,
        exited_well: bool,
    ) -> Admitted:
        """Decides what of an attempt's results is recorded, and how.

        Args:
            exited_well: whether the step's process ended with exit code 0.
            delivered: what the reader found in the values that only the step knows.

        Raises:
            Rejected: something in it is not what an honest step leaves.
        """
        job = self.job
        inherited = artifacts.inherited_records((p.objects, p.info) for p in parents)
        # A step that calls exit(0) leaves results too, which say that it isn't done.
        succeeded = exited_well and delivered.flag("_task_ok")
        values = internals.admit(self._position(parents, succeeded), delivered)
        decision = artifacts.decide(
            results,
            known=self._known(parents),
            inherited=inherited,
            trust=job.request.trust,
            origin=job.pathspec,
        )
        return Admitted(values, decision, succeeded)

    def finish(
        self,
        results: Results,
        admitted: Admitted,
        contents: Iterator[tuple[str, bytes]],
        limit: int,
    ) -> Verdict:
        """Records an attempt's results.

        Args:
            contents: (key, content) of the blobs in `admitted.decision.new`.
            limit: bytes that one artifact may have.

        Raises:
            Rejected: a blob is not what its key says. Nothing but blobs that nobody
                refers to was stored.
        """
        decision, values = admitted.decision, admitted.values
        self._save_blobs(decision, contents, limit)
        self.output.save_artifacts(iter(values.items()), len_hint=len(values))
        self.output.passdown_partial(
            _Records(decision.objects, decision.info), list(decision.objects)
        )
        self._save_cards(results)
        self._end(admitted.succeeded)
        self.output.save_metadata({"task_end": {}})
        self.output.done()
        return Verdict(admitted.succeeded, values["_exception"] is not None)

    def fail(self) -> None:
        """What is recorded of an attempt that left no results."""
        self._end(False)

    # --- parts

    def _position(self, parents: list[Parent], succeeded: bool) -> internals.Position:
        job, graph = self.job, self.graph
        node = graph[job.step]
        join = graph[node.split_parents[-1]].type if node.type == "join" else None
        return internals.Position(
            flow=job.flow,
            step=job.step,
            node=node,
            join_type=join,
            is_start=job.step == graph.start_step,
            split_index=job.split_index,
            parents=tuple(p.read for p in parents),
            succeeded=succeeded,
        )

    @staticmethod
    def _known(parents: list[Parent]) -> dict[str, tuple[str, dict[str, Any]]]:
        first = parents[0]
        graph = first.read("_graph_info") or {}
        names = {i["name"] for kind in ("parameters", "constants") for i in graph.get(kind, [])}
        return {
            name: (first.objects[name], first.info[name])
            for name in [*sorted(names), *_ALWAYS_KNOWN]
            if name in first.objects
        }

    def _save_blobs(
        self, decision: artifacts.Decision, contents: Iterator[tuple[str, bytes]], limit: int
    ) -> None:
        """Stores what is new, one blob in memory at a time, under keys that the host works out."""
        sizes: dict[str, int] = {}

        def checked() -> Iterator[bytes]:
            for sha, data in contents:
                # Metaflow keeps what is there. SHA-1 can be made to collide, so
                # make sure that it is the same.
                if (there := stored(self.flow_datastore, sha)) is not None and there != data:
                    raise Rejected(f"the datastore has something else under the key {sha}")
                sizes[sha] = len(data)
                if sum(sizes.values()) > limit * _ARTIFACTS:
                    raise Rejected(
                        f"the artifacts are larger than {limit * _ARTIFACTS >> 20} MB together"
                    )
                yield data

        self.flow_datastore.ca_store.save_blobs(checked(), len_hint=len(decision.new))
        for name, sha in decision.objects.items():
            if sha in sizes and decision.info[name].get("size") == 0:
                decision.info[name]["size"] = sizes[sha]

    def _save_cards(self, results: Results) -> None:
        job = self.job
        folder = f"{job.flow}/runs/{job.run}/steps/{job.step}/tasks/{job.task}/cards"
        if results.cards:
            save_cards(
                self.flow_datastore,
                (  # one in memory at a time: wrapped, they may be several times as large
                    (f"{folder}/{name}", io.BytesIO(wrap(path.read_bytes())))
                    for name, path in results.cards.items()
                ),
            )

    def _end(self, succeeded: bool) -> None:
        status = {"attempt_ok": "internal_attempt_status"}
        self._register({**self.facts, "attempt_ok": str(succeeded)}, status)

    def _register(self, facts: dict[str, Any], types: Mapping[str, str] | None = None) -> None:
        types = types or {}
        tags = [f"attempt_id:{self.job.attempt}"]
        self.metadata.register_metadata(
            self.job.run,
            self.job.step,
            self.job.task,
            [
                MetaDatum(field=k, value=v, type=types.get(k, k), tags=tags)
                for k, v in facts.items()
            ],
        )
