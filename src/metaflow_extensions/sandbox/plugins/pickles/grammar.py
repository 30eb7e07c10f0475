"""What the grammars of the types are written in: rules for names, and how values are made.

A pickle builds an object in steps: a name is called with arguments (REDUCE) or made
anew (NEWOBJ), then gets its state (BUILD). A `Rule` says what a name may be used for.
Its functions get what the pickle gives, check every part of it, and make the value by
themselves. What they get may be symbolic: see `Name`, `Blob`, `Pending`, `Parts`.

A rule must keep no list or dict that it was given: the pickle may change it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .opcodes import Machine


class Refused(Exception):
    """The pickle is not plain data. `name` is what it asks for, if it names something."""

    def __init__(self, reason: str, name: str | None = None) -> None:
        super().__init__(reason)
        self.name = name


class NotHere(Refused):
    """What the pickle names may be in it, and can't be imported on this machine."""


def odd(what: str) -> Refused:
    """What the bytes say could be said, but pickle never writes it."""
    return Refused(f"{what} that it is never pickled with")


class Name:
    """A global that a pickle names: a mark on the stack, never the thing itself."""

    __slots__ = ("rule", "text")

    def __init__(self, text: str, rule: Rule) -> None:
        self.text = text
        self.rule = rule


class Blob:
    """Many bytes, not copied out of the pickle until they are wanted as such."""

    __slots__ = ("_value", "view")

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self._value: bytes | None = None

    def value(self) -> bytes:
        if self._value is None:
            self._value = bytes(self.view)
        return self._value


class Pending:
    """An object that has not got its state yet, so that it is not there yet."""

    __slots__ = ("done", "finish", "name", "result")

    def __init__(self, name: str, finish: Callable[[Any], Any]) -> None:
        self.name = name
        self.finish = finish
        self.done = False
        self.result: Any = None

    def build(self, state: Any) -> None:
        if self.done:
            raise odd(f"`{self.name}` has two states")
        self.result = self.finish(state)
        self.done = True

    def value(self) -> Any:
        if not self.done:
            raise Refused(f"the pickle uses a `{self.name}` before it is whole")
        return self.result


class Parts:
    """A tuple with something symbolic in it: arguments or a state, or an ordinary tuple yet."""

    __slots__ = ("_value", "items")

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self._value: tuple[Any, ...] | None = None

    def value(self) -> tuple[Any, ...]:
        if self._value is None:
            self._value = tuple(value_of(item) for item in self.items)
        return self._value


MARK = object()


def value_of(item: Any) -> Any:
    """An item that may become part of data: no mark, no bare name, nothing unfinished."""
    kind = type(item)
    if kind is Name:
        if item.rule.value is not None:
            return item.rule.value()
        raise Refused(f"the pickle refers to `{item.text}`", item.text)
    if kind is Parts or kind is Pending or kind is Blob:
        return item.value()
    if item is MARK:
        raise Refused("the pickle's stack is out of order")
    return item


@dataclass(frozen=True)
class Rule:
    """What a name may be used for.

    Attributes:
        call: gets the arguments of a call, and makes the value.
        new: the same for NEWOBJ.
        value: makes what the name itself stands for, where it may be a value.
        mark: what other rules know the name by, if it may be an argument of theirs.
    """

    call: Callable[[Machine, tuple[Any, ...]], Any] | None = None
    new: Callable[[Machine, tuple[Any, ...]], Any] | None = None
    value: Callable[[], Any] | None = None
    mark: str | None = None


if TYPE_CHECKING:
    Rules = dict[str, Rule]
else:
    Rules = dict  # Python 3.8, which a sandbox may have


def only(args: tuple[Any, ...], *types: type | tuple[type, ...]) -> tuple[Any, ...]:
    """The values of as many arguments, each of exactly one of these types."""
    if len(args) != len(types):
        raise odd("a constructor has arguments")
    found = tuple(value_of(a) for a in args)
    for value, kinds in zip(found, types):
        if type(value) not in (kinds if type(kinds) is tuple else (kinds,)):
            raise odd("a constructor has arguments")
    return found


def mark_of(item: Any) -> str | None:
    """What a name stands for as an argument; None for anything else."""
    return item.rule.mark if type(item) is Name else None


def items_of(item: Any) -> tuple[Any, ...]:
    """The items of a tuple, symbolic or not.

    Raises:
        Refused: it is no tuple.
    """
    if type(item) is Parts:
        return tuple(item.items)
    if type(item) is not tuple:
        raise odd("an object has arguments or a state")
    return item


def attributes(fields: Any) -> dict[str, Any]:
    """What may become an object's attributes: names that are nothing to Python itself.

    Those would be found before what the class has, by `pickle` and `copy` among others.
    """
    if type(fields) is not dict:
        raise odd("an object has a state")
    for key in fields:
        if type(key) is not str or (key.startswith("__") and key.endswith("__")):
            raise odd("an object has a state")
    return fields


def fields_of(item: Any, *names: str) -> dict[str, Any]:
    """A copy of a dict that has no other keys than these."""
    state = value_of(item)
    if type(state) is not dict or any(type(k) is not str or k not in names for k in state):
        raise odd("an object has a state")
    return dict(state)
