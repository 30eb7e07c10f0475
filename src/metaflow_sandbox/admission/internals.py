"""What Metaflow's scheduler acts on. A sandbox decides almost none of it.

Most of these values follow from the graph, the job and the inputs, so the host
works them out and doesn't look at what the sandbox wrote. The few that only the
step can know are read by the interpreter of plain data and checked for their
exact form. All are written anew by the host, so the scheduler never unpickles a
byte that came out of a sandbox, whatever `trust` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from metaflow.exception import MetaflowExceptionWrapper
from metaflow.tuple_util import ForeachFrame

from ..errors import Rejected

#: Names that a sandbox can't have as artifacts: they steer unbounded foreaches,
#: which sandboxed steps can't take part in.
FORBIDDEN = frozenset(
    {
        "_unbounded_foreach",
        "_control_mapper_tasks",
        "_control_task_is_mapper_zero",
        "_parallel_ubf_iter",
    }
)
#: Names that are worked out or checked here.
INTERNAL = frozenset(
    {
        "name",
        "_catch_exception",
        "_current_step",
        "_exception",
        "_foreach_num_splits",
        "_foreach_stack",
        "_foreach_values",
        "_foreach_var",
        "_iteration_stack",
        "_success",
        "_task_ok",
        "_transition",
    }
)
MAX_SPLITS = 10_000_000


@dataclass(frozen=True)
class Position:
    """Where an attempt stands in its flow.

    Attributes:
        node: the step in Metaflow's graph; join_type: "foreach", "split" or None.
        parents: for each input, a way to read an internal artifact of it from
            the host's own datastore: (name, default) -> value.
        succeeded: whether the step's process ended with 0.
    """

    flow: str
    step: str
    node: Any
    join_type: str | None
    is_start: bool
    split_index: int | None
    parents: tuple[Callable[[str, Any], Any], ...]
    succeeded: bool


class Delivered:
    """What `reader.py` found in the few values that only the step can know."""

    #: {name of the artifact: the form that it must have}
    FORMS: ClassVar[dict[str, str]] = {
        "_task_ok": "flag",
        "_success": "flag",
        "_exception": "exception",
        "_catch_exception": "exception",
        "_foreach_num_splits": "integer",
        "_foreach_values": "texts",
        "_transition": "transition",
    }

    def __init__(self, answers: Mapping[str, Mapping[str, Any]]) -> None:
        self._answers = answers

    def get(self, name: str) -> Any:
        """The value of an artifact; None if there is none."""
        answer = self._answers.get(name, {"value": None})
        if "refused" in answer:
            raise Rejected(f"{name} is not what Metaflow records there: {answer['refused']}")
        return answer["value"]

    def flag(self, name: str) -> bool:
        return self.get(name) is True

    def exception(self, name: str) -> MetaflowExceptionWrapper | None:
        fields = self.get(name)
        if fields is None:
            return None
        wrapper = MetaflowExceptionWrapper()
        wrapper.__dict__.update(fields)
        return wrapper

    def splits(self, name: str) -> int:
        value = self.get(name)
        if value is None or not 0 < value <= MAX_SPLITS:
            raise Rejected(f"{name} is {value}, which is no number of splits")
        return int(value)

    def texts(self, name: str, count: int) -> list[str | None] | None:
        value = self.get(name)
        if value is not None and len(value) != count:
            raise Rejected(f"{name} has {len(value)} values for {count} splits")
        return None if value is None else list(value)

    def transition(
        self, targets: list[str], foreach: str | None
    ) -> tuple[list[str], str | None] | None:
        """The only transition that the graph allows, or None if the step made none.

        None makes Metaflow's scheduler say that `self.next` was not called.
        """
        value = self.get("_transition")
        if value is None:
            return None
        if value != [targets, foreach]:
            raise Rejected("the step's self.next goes where the flow doesn't")
        return targets, foreach

    def foreach(self) -> str | None:
        """The artifact that a foreach goes over, where the flow's source doesn't have its name."""
        value = self.get("_transition")
        if value is None:
            return None
        name = value[1]
        if name is None or not name.isidentifier() or name in FORBIDDEN | INTERNAL:
            raise Rejected("the step's self.next has a foreach over no artifact of the flow's")
        return str(name)

    def chosen(self, targets: list[str]) -> str:
        """The step that a switch chose, out of those that the graph allows."""
        value = self.get("_transition")
        for target in targets:
            if value == [[target], None]:
                return target
        raise Rejected("the switch chose none of the steps that the flow allows")


def admit(position: Position, delivered: Delivered) -> dict[str, Any]:
    """The internal artifacts of an attempt, to be written by the host.

    Raises:
        Rejected: a value that only the step can know is not of its exact form.
    """
    node = position.node
    values: dict[str, Any] = {
        "name": position.flow,
        "_current_step": position.step,
        "_foreach_stack": admit_foreach_stack(position),
        "_iteration_stack": _iteration_stack(position),
        "_task_ok": position.succeeded,
        "_success": position.succeeded and delivered.flag("_success"),
        "_exception": delivered.exception("_exception"),
        "_foreach_var": None,
        "_foreach_num_splits": None,
        "_transition": None,
    }
    if caught := delivered.exception("_catch_exception"):
        values["_catch_exception"] = caught
    if not position.succeeded:
        return values
    if node.type == "foreach":
        if delivered.get("_transition") is delivered.get("_foreach_num_splits") is None:
            return values  # Metaflow's scheduler says that `self.next` was not called
        count = delivered.splits("_foreach_num_splits")
        values["_foreach_num_splits"] = count
        values["_foreach_values"] = delivered.texts("_foreach_values", count)
        # Metaflow's graph has no name where the flow gives it by a variable.
        over = node.foreach_param or delivered.foreach()
        values["_foreach_var"] = over
        values["_transition"] = delivered.transition(list(node.out_funcs), over)
    elif node.type == "split-switch":
        values["_transition"] = ([delivered.chosen(list(node.out_funcs))], None)
    elif node.out_funcs:
        values["_transition"] = delivered.transition(list(node.out_funcs), None)
    return values


def admit_foreach_stack(position: Position) -> list[Any]:
    """As `MetaflowTask._init_foreach` does it, from the host's records of the inputs."""
    if position.is_start or not position.parents:
        return []
    parent = position.parents[0]
    stack = list(parent("_foreach_stack", []))
    if position.join_type == "foreach":
        return stack[:-1]
    if position.join_type or parent("_foreach_var", None) is None:
        return stack
    index = position.split_index
    texts = parent("_foreach_values", None)
    count = parent("_foreach_num_splits", None)
    if index is None or count is None or not 0 <= index < count:
        raise Rejected("the task's place in its foreach is not known")
    text = texts[index] if texts is not None else None
    frame = ForeachFrame(position.step, parent("_foreach_var", None), count, index, text)
    return [*stack, frame]


def _iteration_stack(position: Position) -> list[int]:
    """As `MetaflowTask._init_iteration` does it."""
    node = position.node
    if node.type != "split-switch" or position.step not in node.out_funcs:
        return []
    stack = list(position.parents[0]("_iteration_stack", [])) if position.parents else []
    return [*stack[:-1], stack[-1] + 1] if stack else [0]
