"""Rules for classes that the user named: their objects may be in what is loaded, and run.

A class is the one of that very name, so that no name of something else's leads to it. Its
objects are made by `__new__` (NEWOBJ) and get their state as pickle gives it; members of
an enum are looked up. Nothing else of it can be called: no other function, no method, no
`__reduce__` of its own.
"""

from __future__ import annotations

import enum
import importlib
import sys
import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .grammar import NotHere, Refused, Rule, Rules, attributes, items_of, mark_of, odd, value_of
from .stdlib import RULES as _STDLIB

if TYPE_CHECKING:
    from .opcodes import Machine

_GETATTR = "builtins.getattr"
_PYTHONS = frozenset(getattr(sys, "stdlib_module_names", sys.builtin_module_names))


def rules(classes: Iterable[str], data: Rules) -> Rules:
    """{name: rule} for classes beside data. Their modules are imported when a pickle names them.

    A class of data is made as data, though it be named.
    """
    return {**{name: _rule(name) for name in classes}, **data, _GETATTR: Rule(call=_getattr)}


def is_class(name: str) -> bool:
    """Whether a name is that of a class, which one may trust, rather than of code to be called.

    Nothing is imported: of what isn't loaded here, the way in which it is written decides.
    Neither are those of Python's own classes whose objects are called, such as `functools.partial`.
    """
    parts = name.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return False
    loaded = (n for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in sys.modules)
    if (n := next(loaded, 0)) > 0:
        found: Any = sys.modules[".".join(parts[:n])]
        for part in parts[n:]:
            found = getattr(found, "__dict__", {}).get(part)  # runs nothing, as `getattr` may
        if isinstance(found, type):
            called = any("__call__" in vars(cls) for cls in found.__mro__)
            return not called or found.__module__.partition(".")[0] not in _PYTHONS
        if found is not None:
            return False
    return parts[-1].lstrip("_")[:1].isupper()


def _rule(name: str) -> Rule:
    def new(machine: Machine, args: tuple[Any, ...]) -> Any:
        cls = _class(name)
        if issubclass(cls, enum.Enum):  # which would give the member itself, to be changed
            raise odd("an enum has a member")
        made = cls.__new__(cls, *(value_of(a) for a in args))
        if type(made) is not cls:
            raise Refused(f"`{name}` makes objects of another class", name)
        return machine.own(made, lambda state: _build(machine, made, state))

    def call(machine: Machine, args: tuple[Any, ...]) -> Any:
        cls = _class(name)
        if not issubclass(cls, enum.Enum):
            raise Refused(f"`{name}` is made by a call, which may be any code of it", name)
        if len(args) != 1:
            raise odd("an enum has a member")
        return _member(cls, value_of(args[0]))

    return Rule(call=call, new=new, mark=name)


def _class(name: str) -> Any:
    """The class of that name.

    Raises:
        NotHere: there is none, or what has the name is something else.
    """
    module, _, rest = name.rpartition(".")
    inner = [rest]
    while True:
        try:
            found: Any = sys.modules.get(module) or importlib.import_module(module)
        except ImportError:
            module, _, outer = module.rpartition(".")
            inner.insert(0, outer)
            if module:
                continue
            raise NotHere(f"`{name}` can't be imported here", name) from None
        break
    for part in inner:
        found = getattr(found, part, None)
    # A class of a flow's own file has that file's name in a notebook, which imports it.
    if (
        not isinstance(found, type)
        or found.__qualname__ != ".".join(inner)
        or module not in (found.__module__, "__main__")
    ):
        raise NotHere(f"there is no class `{name}` here", name)
    return found


def _member(cls: Any, value: Any) -> Any:
    for member in cls.__members__.values():
        if type(member.value) is type(value) and member.value == value:
            return member
    if issubclass(cls, enum.Flag) and type(value) is int:
        return cls(value)
    raise odd("an enum has a member")


def _getattr(machine: Machine, args: tuple[Any, ...]) -> Any:
    """How some versions of Python write members of an enum: by their name."""
    if len(args) == 2 and type(args[1]) is str and (name := mark_of(args[0])) in machine.rules:
        cls = _class(str(name))
        if issubclass(cls, enum.Enum) and args[1] in cls.__members__:
            return cls.__members__[args[1]]
    return _STDLIB[_GETATTR].call(machine, args)  # type: ignore[misc]


def _build(machine: Machine, made: Any, state: Any) -> None:
    """As `pickle` does it, but for what it sets: own fields, and declared slots."""
    if (setstate := getattr(made, "__setstate__", None)) is not None:
        setstate(value_of(state))
        return
    fields, slots = value_of(state), None
    if type(fields) is tuple:
        fields, slots = items_of(fields) if len(fields) == 2 else (0, 0)
    fields, slots = (attributes(part or {}) for part in (fields, slots))
    if fields:
        machine.charge_items(dict, len(fields))
        made.__dict__.update({sys.intern(k): v for k, v in fields.items()})
    for key, value in slots.items():
        slot = next((c.__dict__[key] for c in type(made).__mro__ if key in c.__dict__), None)
        if not isinstance(slot, types.MemberDescriptorType):
            raise odd("an object has a state")
        slot.__set__(made, value)
