"""Reads pickles without running them: the part of the trust boundary that meets hostile bytes.

A pickle is a program. This interpreter knows the opcodes that build data and builds
that data itself; everything else is refused by name. It calls nothing that the pickle
names, acts only on objects that the same pickle made, and imports nothing but numpy,
pandas and pytz, when a value is theirs. So loading is as safe as parsing JSON, whatever
the bytes are.

It lives in the package that travels, not with the host's other checks, because
an artifact may be read wherever Metaflow runs: a later step on Kubernetes has
this package and not the host's.

    opcodes.py    the stack machine, and its bounds
    grammar.py    what rules for names are made of
    builtins.py   stdlib.py   numpy.py   pandas.py      the rules, by who owns the type
    trusted.py    rules for classes that the user named
    names.py      what a pickle names, for those who decide about it

Protocols 2 to 5 are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import builtins, numpy, pandas, stdlib, trusted
from .grammar import NotHere, Refused
from .names import names
from .opcodes import Machine
from .trusted import is_class

__all__ = ["NotHere", "Refused", "is_class", "load_data", "load_plain", "names", "rules"]

#: What `trust="data"` stands for.
_RULES = {**builtins.RULES, **stdlib.RULES, **numpy.RULES, **pandas.RULES}


def rules() -> frozenset[str]:
    """The names that data may have in its pickle."""
    return frozenset(_RULES)


def load_data(data: bytes, classes: Iterable[str] = (), seconds: float | None = None) -> Any:
    """The data that a pickle describes.

    Builtin containers, numbers, strings and bytes, values of the standard library,
    numpy's arrays, pandas' frames, and the exceptions that Metaflow records; each as
    deep and as shared as pickle would make them.

    Args:
        classes: names of classes whose objects may be in it too. Their code runs.
        seconds: CPU time that it may take; None: as long as it takes.

    Raises:
        Refused: the bytes are anything else. Nothing of them was run.
    """
    rules = trusted.rules(classes, _RULES) if classes else _RULES
    return _run(Machine(data, rules, seconds))


def load_plain(data: bytes, exception_type: type) -> Any:
    """As `load_data`, for builtin types alone.

    Args:
        exception_type: stands for Metaflow's exception wrapper.
    """
    return _run(Machine(data, builtins.rules(exception_type)))


def _run(machine: Machine) -> Any:
    try:
        return machine.run()
    except RecursionError:  # comparing keys that are nested
        raise Refused("the pickle is nested too deep") from None
    except MemoryError:
        raise Refused("the pickle needs more memory than there is") from None
