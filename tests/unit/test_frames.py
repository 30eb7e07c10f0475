"""The host reads the agent's frames: every one once, in order, and nothing that is no frame."""

import base64
import binascii
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaflow_sandbox.agent.agent import encode_frame
from metaflow_sandbox.agent.frames import MAX_LINE, MAX_REPEATED, Frame, FrameDecoder
from metaflow_sandbox.errors import ProtocolError
from metaflow_sandbox.launch.attempt import Outcome

payloads = st.one_of(
    st.binary(max_size=200),
    # What a step prints to be taken for the agent.
    st.integers(1, 50).map(lambda n: b"\n" + encode_frame(n, b"x", b'{"rc": 0}')),
)
messages = st.lists(st.tuples(st.sampled_from([b"o", b"e", b"x"]), payloads), max_size=12)


def encoded(pairs):
    return [encode_frame(i, kind, payload) for i, (kind, payload) in enumerate(pairs, 1)]


def expected(pairs):
    return [Frame(i, kind.decode(), payload) for i, (kind, payload) in enumerate(pairs, 1)]


def pieces(data, cuts):
    bounds = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    return [data[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def read(decoder, stream):
    return [frame for data in stream for frame in decoder.feed(data)]


def line(seq, kind=b"o", payload=b"YQ==", magic=b"mfs1", crc=None):
    body = b" ".join([magic, seq, kind, payload])
    return body + b" " + (b"%08x" % binascii.crc32(body) if crc is None else crc) + b"\n"


@settings(max_examples=300, deadline=None)
@given(messages, st.lists(st.integers(0, 10_000), max_size=20))
def test_frames_split_anywhere_come_out_once_and_in_order(pairs, cuts):
    stream = pieces(b"".join(encoded(pairs)), cuts)
    assert read(FrameDecoder(), stream) == expected(pairs)


def test_frames_fed_byte_by_byte_come_out_once_and_in_order():
    pairs = [(b"o", bytes(range(256))), (b"e", b""), (b"x", b"{}")]
    data = b"".join(encoded(pairs))
    assert read(FrameDecoder(), (bytes([byte]) for byte in data)) == expected(pairs)


def test_any_bytes_of_a_step_travel_as_printable_ascii():
    frame = encode_frame(1, b"o", bytes(range(256)) * 10)
    assert frame.endswith(b"\n") and frame.count(b"\n") == 1
    assert all(0x20 <= byte < 0x7F for byte in frame[:-1])


def test_a_frame_that_the_step_prints_is_only_its_output():
    forged = encode_frame(2, b"x", b'{"rc": 0}')
    frames = read(FrameDecoder(), [encode_frame(1, b"o", forged), encode_frame(2, b"e", forged)])
    assert frames == [Frame(1, "o", forged), Frame(2, "e", forged)]


def test_a_huge_payload_arrives_whole():
    payload = bytes(range(256)) * 11_000  # 2.8 MB, 3.75 MB as a line
    data = encode_frame(1, b"x", payload)
    assert len(data) < MAX_LINE
    stream = (data[i : i + 4096] for i in range(0, len(data), 4096))
    assert read(FrameDecoder(), stream) == [Frame(1, "x", payload)]


fractions = st.floats(0, 1)


@settings(max_examples=150, deadline=None)
@given(messages, st.lists(st.tuples(fractions, fractions, fractions), max_size=5))
def test_a_stream_resumed_from_any_earlier_point_repeats_and_loses_nothing(pairs, drops):
    lines = encoded(pairs)
    decoder, got, position = FrameDecoder(), [], 0
    for carried, split, back in drops:
        # A connection that carries some bytes from a frame on that is already known …
        rest = b"".join(lines[position:])
        rest = rest[: round(carried * len(rest))]
        got += read(decoder, pieces(rest, [round(split * len(rest))]))
        # … drops, and the next one starts anywhere up to the first that is missing.
        decoder.reconnect()
        position = round(back * decoder.seq)
    got += read(decoder, [b"".join(lines[position:])])
    assert got == expected(pairs)
    assert decoder.seq == len(pairs)


def test_a_line_that_a_dropped_connection_cut_is_forgotten():
    first, second = encoded([(b"o", b"one"), (b"o", b"two")])
    decoder = FrameDecoder()
    assert read(decoder, [first, second[:-3]]) == [Frame(1, "o", b"one")]
    decoder.reconnect()
    assert read(decoder, [second]) == [Frame(2, "o", b"two")]


def test_without_a_reconnect_the_two_halves_of_different_lines_are_refused():
    first, second = encoded([(b"o", b"one"), (b"o", b"two")])
    with pytest.raises(ProtocolError):
        read(FrameDecoder(), [first, second[:-3], second])


@pytest.mark.parametrize("seqs", [[2], [1, 3], [1, 2, 2, 1, 4], [1, 0x7FFFFFFFFFFFFFFFFFFF]])
def test_a_missing_frame_is_an_error(seqs):
    with pytest.raises(ProtocolError):
        read(FrameDecoder(), [encode_frame(seq, b"o", b"x") for seq in seqs])


@pytest.mark.parametrize("seqs", [[1, 1], [1, 2, 1], [0], [2]])
def test_on_a_stream_that_is_never_resumed_no_frame_comes_twice(seqs):
    with pytest.raises(ProtocolError):
        read(FrameDecoder(resumable=False), [encode_frame(seq, b"o", b"x") for seq in seqs])


GARBAGE = {
    "empty line": b"\n",
    "text of a shell": b"bash: python3: command not found\n",
    "other magic": line(b"1", magic=b"mfs2"),
    "no magic": line(b"1", magic=b""),
    "unknown kind": line(b"1", kind=b"z"),
    "two kinds": line(b"1", kind=b"oe"),
    "no kind": line(b"1", kind=b""),
    "seq is no number": line(b"one"),
    "seq is empty": line(b""),
    "payload is not base64": line(b"1", payload=b"a b"),
    "payload is cut": line(b"1", payload=b"YQ"),
    "payload has foreign characters": line(b"1", payload=b"Y\xffQ="),
    "crc is wrong": line(b"1", crc=b"00000000"),
    "crc is no number": line(b"1", crc=b"crc"),
    "crc is empty": line(b"1", crc=b""),
    "too few fields": b"mfs1 1 o\n",
    "too many fields": line(b"1")[:-1] + b" 1\n",
    "space in front": b" " + line(b"1"),
    "NUL": b"\0" + line(b"1"),
    "not ASCII": "mfs１ 1 o YQ==\n".encode(),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_a_line_that_is_no_frame_is_an_error_and_not_skipped(data):
    with pytest.raises(ProtocolError):
        read(FrameDecoder(), [data, *encoded([(b"o", b"x")])])
    with pytest.raises(ProtocolError):
        read(FrameDecoder(), [*encoded([(b"o", b"x")]), data])


@pytest.mark.parametrize("seq", [b"0", b"-1", b"+1", b"0x1", b"0_1"])
def test_a_number_that_the_agent_never_writes_is_an_error(seq):
    with pytest.raises(ProtocolError):
        read(FrameDecoder(), [line(seq)])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.data())
def test_a_damaged_frame_is_never_taken_for_another(payload, data):
    frame = bytearray(encode_frame(1, b"o", payload))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        assert read(FrameDecoder(), [bytes(frame)]) in ([], [Frame(1, "o", payload)])
    except ProtocolError:
        pass


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=80) | st.just(b"\n") | st.just(encode_frame(1, b"o", b"x"))))
def test_no_bytes_make_the_decoder_fail_in_any_other_way(stream):
    try:
        frames = read(FrameDecoder(), stream)
    except ProtocolError:
        return
    assert frames in ([], [Frame(1, "o", b"x")])


def test_a_line_without_an_end_is_given_up_before_it_fills_memory():
    decoder, fed = FrameDecoder(), 0
    with pytest.raises(ProtocolError, match="longer"):
        while fed < 4 * MAX_LINE:
            fed += 1 << 16
            read(decoder, [b"x" * (1 << 16)])
    assert fed <= MAX_LINE + (1 << 17)


def test_a_complete_line_beyond_the_limit_is_an_error():
    with pytest.raises(ProtocolError, match="longer"):
        read(FrameDecoder(), [encode_frame(1, b"o", b"x" * MAX_LINE)])


# --- the payload of the last frame --------------------------------------------

END = {"rc": 0, "signal": None, "size": 0, "inline": None, "problem": None, "dropped": 0}


def test_an_exit_frame_says_how_the_step_ended():
    inline = base64.b64encode(b"archive").decode()
    end = {**END, "rc": 139, "signal": 11, "size": 7, "inline": inline, "seconds": {"step": 1}}
    outcome = Outcome.parse(json.dumps(end).encode())
    assert (outcome.rc, outcome.signal) == (139, 11)
    assert (outcome.inline, outcome.seconds) == (b"archive", {"step": 1.0})


BROKEN_ENDS = {
    "not JSON": b"{",
    "not UTF-8": b'{"rc": "\xff"}',
    "a list": b"[]",
    "null": b"null",
    "nothing": b"{}",
    "rc is text": json.dumps({**END, "rc": "zero"}).encode(),
    "rc is null": json.dumps({**END, "rc": None}).encode(),
    "rc is NaN": json.dumps({**END, "rc": float("nan")}).encode(),
    "rc has 5000 digits": json.dumps({**END, "rc": 0}).encode().replace(b"0", b"9" * 5000, 1),
    "inline is a list": json.dumps({**END, "inline": [1]}).encode(),
    "inline is not base64": json.dumps({**END, "inline": "a"}).encode(),
    "seconds is a list": json.dumps({**END, "seconds": [1]}).encode(),
    "seconds holds text": json.dumps({**END, "seconds": {"step": "x"}}).encode(),
    "nested without end": b"[" * 100_000,
    "rc is infinite": json.dumps({**END, "rc": float("inf")}).encode(),
    "dropped is infinite": json.dumps({**END, "dropped": float("inf")}).encode(),
    "signal is infinite": json.dumps({**END, "signal": float("-inf")}).encode(),
    "seconds are huge": json.dumps({**END, "seconds": {"step": 10**400}}).encode(),
}


@pytest.mark.parametrize("payload", BROKEN_ENDS.values(), ids=BROKEN_ENDS)
def test_a_broken_exit_frame_is_a_protocol_error(payload):
    with pytest.raises(ProtocolError):
        Outcome.parse(payload)


def test_frames_that_come_again_and_again_are_given_up():
    decoder = FrameDecoder()
    frame = encode_frame(1, b"o", bytes(32 << 10))
    list(decoder.feed(frame))
    with pytest.raises(ProtocolError, match="again and again"):
        for _ in range(MAX_REPEATED // len(frame) + 2):
            assert list(decoder.feed(frame)) == []


def test_a_line_that_comes_byte_by_byte_is_searched_once():
    """What was looked through for its end isn't looked through again, up to four megabytes."""

    class Counting(bytearray):
        looked = 0

        def find(self, what, start=0):
            Counting.looked += len(self) - start
            return super().find(what, start)

    decoder = FrameDecoder()
    decoder._buffer = Counting()
    for _ in range(20_000):
        assert list(decoder.feed(b"A")) == []
    assert Counting.looked <= 2 * 20_000


@pytest.mark.parametrize("field", ["rc", "signal", "dropped"])
@pytest.mark.parametrize("value", [-1, 10**4000, 1e308])
def test_an_exit_frame_with_a_number_that_no_process_has_is_broken(field, value):
    end = {"rc": 0, "signal": None, "inline": None, "dropped": 0, "problem": None, field: value}
    with pytest.raises(ProtocolError):
        Outcome.parse(json.dumps(end).encode())
