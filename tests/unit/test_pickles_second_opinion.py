"""What another reader of pickles, fickling, says of the same bytes, and what it can't say."""

import pickle

import numpy
import pytest
from fickling.analysis import Severity, check_safety
from fickling.fickle import Pickled

from tests.attacks.test_pickles import ATTACKS, bytes_of
from tests.unit.test_pickles import HOSTILE

CALLS = [
    *("GLOBAL, REDUCE", "STACK_GLOBAL, REDUCE", "STACK_GLOBAL by memo", "INST", "OBJ", "NEWOBJ"),
    *("builtins.eval", "builtins.getattr", "__builtin__.eval", "a dotted name"),
]


def severity(data):
    return check_safety(Pickled.load(data)).severity


@pytest.mark.parametrize("name", CALLS)
def test_fickling_warns_of_every_call_of_the_hosts(name):
    assert severity(b"\x80\x04" + HOSTILE[name] + b".") >= Severity.LIKELY_OVERTLY_MALICIOUS


def test_fickling_finds_plain_data_safe():
    assert severity(pickle.dumps([1, {"a": (2.5, None, b"x")}], 4)) == Severity.LIKELY_SAFE


def test_fickling_can_not_tell_a_forged_array_from_an_honest_one():
    honest = severity(pickle.dumps(numpy.arange(3), 4))
    assert severity(bytes_of(ATTACKS["references in bytes"][0])) == honest
    assert severity(bytes_of(ATTACKS["BUILD on a class"][0])) == Severity.LIKELY_SAFE
