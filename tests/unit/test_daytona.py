"""How a log of Daytona's daemon is read."""

import anyio
from hypothesis import given
from hypothesis import strategies as st

from metaflow_sandbox.backends.daytona.sandbox import Output
from metaflow_sandbox.backends.daytona.toolbox import Marks

OUT, ERR = b"\x01\x01\x01", b"\x02\x02\x02"
TEXT = st.binary(max_size=6).map(lambda data: data.translate(None, b"\x01\x02"))


@given(
    st.lists(st.tuples(st.sampled_from([OUT, ERR]), TEXT)),
    st.lists(st.integers(0, 60)),
)
def test_standard_output_is_told_from_the_rest_wherever_a_log_is_cut(parts, cuts):
    log = b"before" + b"".join(mark + text for mark, text in parts)
    bounds = sorted({0, len(log), *(min(cut, len(log)) for cut in cuts)})
    marks = Marks()
    found = b"".join(marks.output(log[a:b]) for a, b in zip(bounds, bounds[1:], strict=False))
    assert found == b"".join(text for mark, text in parts if mark == OUT)


@given(st.lists(st.integers(0, 60)))
def test_lines_are_whole_wherever_output_is_cut_and_come_once_though_it_drops(cuts):
    log = b"1 ol one\n2 et two\n3 ob dGhyZWUK\n4 x " + b'{"code": 7, "oom": 0}\n'
    bounds = sorted({0, len(log), *(min(cut, len(log)) for cut in cuts)})
    said = []

    async def take(data):
        said.append(data)

    async def read():
        output = Output(take, take)
        for end in bounds:
            output.reconnect()
            for a, b in zip(bounds, bounds[1:], strict=False):
                if b <= end:
                    await output.feed(log[a:b])
        return output.end.code

    assert anyio.run(read) == 7
    assert said == [b"one\n", b"two", b"three\n"]
