"""An attempt's archive is read without trusting a byte of it."""

import gzip
import hashlib
import io
import json
import os
import random
import tracemalloc
import zlib
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaflow_sandbox.admission import cards, claims, results
from metaflow_sandbox.admission.blobs import send, sent, unpacked, whole
from metaflow_sandbox.admission.claims import MAX_ARTIFACTS
from metaflow_sandbox.admission.results import MAX_CARDS, Results, receive
from metaflow_sandbox.errors import Rejected

LIMIT = 1 << 20
RECORD = {"type": "<class 'int'>", "encoding": "pickle-v4"}


def key(data):
    return hashlib.sha1(data).hexdigest()


def entry(content=b"", size=None, **header):
    header = {**header, "size": len(content) if size is None else size}
    return json.dumps(header).encode() + b"\n" + content


def data_json(objects, info=None):
    info = dict.fromkeys(objects, RECORD) if info is None else info
    return entry(json.dumps({"objects": objects, "info": info}).encode(), name="data.json")


def a_blob(content, sha=None, raw=False):
    return entry(content, name="blob", sha=key(content) if sha is None else sha, raw=raw)


def a_card(file, content=b"<html>"):
    return entry(content, name="card", file=file)


def unpack(stream, directory, limit=LIMIT):
    async def pieces():
        for piece in [stream] if isinstance(stream, bytes) else stream:
            yield piece

    directory.mkdir(exist_ok=True)
    results = anyio.run(receive, pieces(), directory, limit)
    if results.record is not None:
        claimed = claims.read(results.record)
        results.objects, results.info = claimed["objects"], claimed["info"]
    return results


def content_of(results):
    """All that was received, without the names of the host's files."""
    return (
        results.record is not None,
        results.objects,
        results.info,
        {sha: (path.read_bytes(), raw) for sha, (path, raw) in results.blobs.items()},
        {file: path.read_bytes() for file, path in results.cards.items()},
    )


HONEST = (
    data_json({"x": key(b"x"), "_y2": key(b"old")})
    + a_blob(gzip.compress(b"x\n", mtime=0), sha=key(b"x"))
    + a_blob(b"\n{}\n" * 100, raw=True)
    + a_blob(b"")
    + a_card("default-0123abc.html")
    + a_card("vega-my_id-0123abc.html", b"\xff\x00\n")
)


# --- honest archives ----------------------------------------------------------------


def test_an_archive_is_read_whole(tmp_path):
    complete, objects, info, blobs, cards = content_of(unpack(HONEST, tmp_path))
    assert complete
    assert objects == {"x": key(b"x"), "_y2": key(b"old")}
    assert info == {"x": RECORD, "_y2": RECORD}
    assert blobs == {
        key(b"x"): (gzip.compress(b"x\n", mtime=0), False),
        key(b"\n{}\n" * 100): (b"\n{}\n" * 100, True),
        key(b""): (b"", False),
    }
    assert cards == {
        "default-0123abc.html": b"<html>",
        "vega-my_id-0123abc.html": b"\xff\x00\n",
    }


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, len(HONEST)), max_size=30).map(sorted))
def test_an_archive_split_anywhere_is_read_the_same(tmp_path_factory, cuts):
    bounds = [0, *cuts, len(HONEST)]
    stream = [HONEST[a:b] for a, b in zip(bounds, bounds[1:])]  # empty pieces too
    directory = tmp_path_factory.mktemp("split")
    whole = unpack(HONEST, directory / "whole")
    assert content_of(unpack(stream, directory / "split")) == content_of(whole)


def test_an_archive_that_comes_byte_by_byte_is_read_the_same(tmp_path):
    stream = (bytes([byte]) for byte in HONEST)
    whole = content_of(unpack(HONEST, tmp_path / "whole"))
    assert content_of(unpack(stream, tmp_path / "bytes")) == whole


@pytest.mark.parametrize("stream", [b"", [], [b"", b""]], ids=repr)
def test_an_empty_archive_is_an_attempt_that_recorded_nothing(tmp_path, stream):
    assert content_of(unpack(stream, tmp_path)) == content_of(Results())


def test_content_lies_where_the_host_says_and_nowhere_else(tmp_path):
    unpack(HONEST, tmp_path / "inner")
    names = {path.name for path in (tmp_path / "inner").iterdir()}
    blobs = {f"blob-{key(c)}" for c in (b"x", b"\n{}\n" * 100, b"")}
    assert names == {"data.json", "card-0", "card-1"} | blobs
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]


# --- hostile archives -----------------------------------------------------------------

SHA = key(b"z")
BROKEN = {
    "no header": b"\n",
    "text": b"hello\n",
    "no end of the header": b'{"name": "blob"',
    "a header without end": b"{" * 5000,
    "a header of 2001 bytes": b" " * 1980 + entry(name="card", file="a-b.html"),
    "not UTF-8": b'{"name": "\xff", "size": 0}\n',
    "nested without end": b"[" * 1900 + b"\n",
    "a list": b"[]\n",
    "a string": b'"name"\n',
    "null": b"null\n",
    "no size": b'{"name": "data.json"}\n',
    "no name": b'{"size": 0}\n',
    "another name": entry(name="outbox"),
    "a path as the name": entry(name="../data.json"),
    "a list as the name": entry(name=["blob"]),
    "size below zero": entry(name="blob", size=-1, sha=SHA, raw=True),
    "size is text": entry(name="blob", size="0", sha=SHA, raw=True),
    "size is a float": entry(name="blob", size=0.0, sha=SHA, raw=True),
    "size is true": entry(b"x", name="blob", size=True, sha=SHA, raw=True),
    "size is NaN": b'{"name": "blob", "size": NaN}\n',
    "size is null": entry(name="blob", size=[], sha=SHA, raw=True),
    "size is too large": entry(b"xyz", name="blob", size=4, sha=SHA, raw=True),
    "size is absurd": entry(b"xyz", name="blob", size=10**30, sha=SHA, raw=True),
    "size is too small": entry(b"xyz", name="blob", size=2, sha=SHA, raw=True),
    "nothing after the header": entry(name="blob", size=1, sha=SHA, raw=True),
    "more after the end": HONEST + b"x",
    "cut short": HONEST[:-1],
    "a null byte between": HONEST + b"\0" + a_blob(b"more"),
    "data.json twice": data_json({}) + data_json({}),
    "a blob twice": a_blob(b"a", sha=SHA) + a_blob(b"b", sha=SHA),
    "a card twice": a_card("a-b.html") + a_card("a-b.html"),
    "too many blobs": b"".join(a_blob(b"%d" % i) for i in range(MAX_ARTIFACTS + 1)),
    "too many cards": b"".join(a_card(f"c-{i}.html") for i in range(MAX_CARDS + 1)),
    "blob without a key": entry(name="blob", raw=True),
    "blob without raw": entry(name="blob", sha=SHA),
    "raw is a number": entry(name="blob", sha=SHA, raw=1),
    "key is a number": entry(name="blob", sha=5, raw=True),
    "key is short": entry(name="blob", sha=SHA[:-1], raw=True),
    "key is long": entry(name="blob", sha=SHA + "0", raw=True),
    "key is uppercase": entry(name="blob", sha=SHA.upper(), raw=True),
    "key ends with a newline": entry(name="blob", sha=SHA + "\n", raw=True),
    "key is a path": entry(name="blob", sha="../" * 13 + "a", raw=True),
    "card without a file": entry(name="card"),
}


@pytest.mark.parametrize("archive", BROKEN.values(), ids=BROKEN)
def test_a_broken_archive_is_rejected(tmp_path, archive):
    with pytest.raises(Rejected):
        unpack(archive, tmp_path / "inner", limit=8 << 20)
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]


@pytest.mark.parametrize("sizes", [(11,), (5, 5, 5, 5, 5)], ids=["one", "together"])
def test_cards_that_are_too_large_are_rejected(tmp_path, sizes, monkeypatch):
    monkeypatch.setattr(results, "CARD", 10)
    monkeypatch.setattr(results, "CARDS", 20)
    archive = [a_card(f"c-{i}.html", b"x" * size) for i, size in enumerate(sizes)]
    with pytest.raises(Rejected, match="too large"):
        unpack(b"".join(archive), tmp_path / "inner")
    unpack(b"".join(archive[:-1]), tmp_path / "fewer")


MULTIPLIED = {
    "scripts": b"".join(b"<script>%06x</script>" % i for i in range(cards.SCRIPTS + 1)),
    "quotes": b'"' * results.CARD,
}


@pytest.mark.parametrize("card", MULTIPLIED.values(), ids=MULTIPLIED)
def test_a_card_that_would_be_many_times_as_large_when_it_is_wrapped_is_rejected(card):
    with pytest.raises(Rejected, match="a card"):
        cards.wrap(card)
    assert cards.wrap(card[: len(card) // 2])


CARD_FILES = [
    "", "a.html", "-.html", "-a.html", "a-.html", "a-b", "a-b.htm", "a-b.HTML", "a-b.html\n",
    "a-b-c-d.html", "a b-c.html", "ä-b.html", "a\0-b.html", "a-b.html\0", "\x1b[31m-b.html",
    "../a-b.html", "/a-b.html", "a/b-c.html", "a-../../b.html", "a-b/../c.html", "..\\a-b.html",
    "a" * 101 + "-b.html", "a-" + "b" * 101 + ".html", None, 5, True, ["a-b.html"], {"a-b.html": 1},
]  # fmt: skip


@pytest.mark.parametrize("file", CARD_FILES)
def test_a_card_with_a_name_that_metaflow_never_gives_is_rejected(tmp_path, file):
    with pytest.raises(Rejected) as rejected:
        unpack(a_card(file), tmp_path / "inner")
    assert "\x1b" not in str(rejected.value) and "\0" not in str(rejected.value)
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]


ARTIFACT_NAMES = [
    "", " ", "a b", "a-b", "1a", "a.b", "a/b", "../a", "/etc/passwd", "a\n", "a\0", "\x1b[31m",
    "a\u202eb", "a" * 201,
]  # fmt: skip


@pytest.mark.parametrize("name", ARTIFACT_NAMES, ids=repr)
def test_an_artifact_with_a_name_that_is_no_identifier_is_rejected(tmp_path, name):
    with pytest.raises(Rejected) as rejected:
        unpack(data_json({name: SHA}), tmp_path)
    assert "\x1b" not in str(rejected.value) and "\0" not in str(rejected.value)


@pytest.mark.parametrize("name", ["x", "_x", "X9", "größe", "名前", "a" * 200, "class"])
def test_an_artifact_may_have_any_name_that_python_allows(tmp_path, name):
    assert unpack(data_json({name: SHA}), tmp_path).objects == {name: SHA}


DATA_JSONS = {
    "nothing": b"",
    "not JSON": b"{",
    "not UTF-8": b'{"objects": {}, "info": "\xff"}',
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "no objects": b'{"info": {}}',
    "no info": b'{"objects": {}}',
    "objects are a list": b'{"objects": [], "info": {}}',
    "objects are text": b'{"objects": "x", "info": {}}',
    "info is a list": b'{"objects": {}, "info": []}',
    "nested without end": b'{"objects": {}, "info": ' + b'{"a":' * 200_000,
    "a number of many digits": b'{"objects": {}, "info": {"x": ' + b"9" * 5000 + b"}}",
    "too many artifacts": json.dumps(
        {
            "objects": {f"x{i}": SHA for i in range(MAX_ARTIFACTS + 1)},
            "info": {f"x{i}": {} for i in range(MAX_ARTIFACTS + 1)},
        }
    ).encode(),
    "a key that is none": json.dumps({"objects": {"x": "abc"}, "info": {"x": {}}}).encode(),
    "a key that is null": json.dumps({"objects": {"x": None}, "info": {"x": {}}}).encode(),
    "a key that is a list": json.dumps({"objects": {"x": [SHA]}, "info": {"x": {}}}).encode(),
    "an artifact without a record": json.dumps({"objects": {"x": SHA}, "info": {}}).encode(),
    "a record that is a list": json.dumps({"objects": {"x": SHA}, "info": {"x": []}}).encode(),
    "a record that is null": json.dumps({"objects": {"x": SHA}, "info": {"x": None}}).encode(),
}


@pytest.mark.parametrize("content", DATA_JSONS.values(), ids=DATA_JSONS)
def test_a_record_that_metaflow_never_writes_is_rejected(tmp_path, content):
    with pytest.raises(Rejected):
        unpack(entry(content, name="data.json"), tmp_path, limit=8 << 20)


@pytest.mark.parametrize(
    "archive",
    [a_card("\ud800-b.html"), data_json({"\ud800": SHA}), data_json({"x\udfff": SHA})],
    ids=["card", "artifact", "end of a name"],
)
def test_a_name_with_a_surrogate_is_rejected(tmp_path, archive):
    with pytest.raises(Rejected):
        unpack(archive, tmp_path)


def test_nesting_of_any_depth_in_a_name_is_rejected(tmp_path):
    for depth in range(1, 990, 7):  # what JSON just reads may be too deep to be shown
        with pytest.raises(Rejected):
            unpack(a_card([]).replace(b"[]", b"[" * depth + b"]" * depth), tmp_path)


def test_records_that_belong_to_no_artifact_are_not_kept(tmp_path):
    results = unpack(data_json({"x": SHA}, info={"x": RECORD, "../y": RECORD}), tmp_path)
    assert set(results.info) == {"x"}


edits = st.lists(
    st.tuples(st.sampled_from("rid"), st.floats(0, 1), st.binary(min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=400, deadline=None)
@given(edits, st.integers(1, 200))
def test_a_changed_archive_is_read_or_rejected(tmp_path_factory, changes, size):
    data = HONEST
    for kind, where, content in changes:
        at = round(where * len(data))
        data = (
            data[:at]
            + (content if kind != "d" else b"")
            + data[at + len(content) * (kind != "i") :]
        )
    directory = tmp_path_factory.mktemp("changed")
    try:
        results = unpack([data[i : i + size] for i in range(0, len(data), size)], directory / "in")
    except Rejected:
        pass
    else:
        for path, _ in results.blobs.values():
            assert path.parent == directory / "in"
    assert os.listdir(directory) == ["in"]


# --- sizes ----------------------------------------------------------------------------


def test_an_archive_of_exactly_the_limit_is_read_and_one_byte_more_is_not(tmp_path):
    assert unpack(HONEST, tmp_path / "fits", limit=len(HONEST)).record
    with pytest.raises(Rejected, match="larger"):
        unpack(HONEST, tmp_path / "more", limit=len(HONEST) - 1)


def test_an_endless_archive_takes_no_more_disk_and_memory_than_it_may(tmp_path):
    def endless():
        yield entry(name="blob", size=10**18, sha=SHA, raw=True)
        while True:
            yield bytes(1 << 16)

    tracemalloc.start()
    with pytest.raises(Rejected, match="larger than 32 MB"):
        unpack(endless(), tmp_path, limit=32 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 32 << 20


@pytest.mark.parametrize("archive", [
    entry(name="data.json", size=9 << 20), entry(name="card", file="a-b.html", size=65 << 20),
], ids=["data.json", "card"])  # fmt: skip
def test_an_entry_that_is_too_large_is_rejected_before_it_comes(tmp_path, archive):
    def stream():
        yield archive
        pytest.fail("it was read on")

    with pytest.raises(Rejected, match="too large"):
        unpack(stream(), tmp_path, limit=1 << 40)


# --- blobs ----------------------------------------------------------------------------


def delivered(directory, stored, sha, raw=False):
    path = directory / "blob"
    path.write_bytes(stored)
    return Results(blobs={sha: (path, raw)})


def blob(results, sha, limit):
    (item,) = results.delivered([sha])
    return unpacked(Path(item["file"]), item["raw"], sha, limit)


def packed(content):
    """As Metaflow's content-addressed store packs it."""
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=3) as packer:
        packer.write(content)
    return file.getvalue()


CONTENTS = [b"", b"x", random.Random(0).randbytes(100_000), bytes(LIMIT), b"ab" * (LIMIT // 2)]


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "packed"])
@pytest.mark.parametrize("content", CONTENTS, ids=len)
def test_a_blob_up_to_the_limit_comes_back_whole(tmp_path, content, raw):
    results = delivered(tmp_path, content if raw else packed(content), key(content), raw)
    assert blob(results, key(content), LIMIT) == content


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "packed"])
def test_a_blob_beyond_the_limit_is_rejected(tmp_path, raw):
    content = bytes(LIMIT + 1)
    results = delivered(tmp_path, content if raw else packed(content), key(content), raw)
    with pytest.raises(Rejected, match="larger than 1 MB"):
        blob(results, key(content), LIMIT)


def test_a_bomb_is_rejected_before_it_fills_memory(tmp_path):
    bomb = gzip.compress(bytes(256 << 20), compresslevel=6)
    assert len(bomb) < LIMIT
    results = delivered(tmp_path, bomb, SHA)
    tracemalloc.start()
    with pytest.raises(Rejected, match="METAFLOW_SANDBOX_MAX_ARTIFACT"):
        blob(results, SHA, LIMIT)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * LIMIT


GOOD = packed(b"content")
BAD_BLOBS = {
    "nothing": b"",
    "not gzip": b"content",
    "zlib": zlib.compress(b"content"),
    "another member": GOOD + packed(b" and more"),
    "an empty member": GOOD + packed(b""),
    "a zero behind": GOOD + b"\0",
    "text behind": GOOD + b"x",
    "much behind": GOOD + bytes(3 << 20),
    "wrong checksum": GOOD[:-8] + b"\0\0\0\0" + GOOD[-4:],
    "wrong length": GOOD[:-4] + b"\0\0\0\0",
    "a flaw": GOOD[:12] + bytes([GOOD[12] ^ 0xFF]) + GOOD[13:],
}


@pytest.mark.parametrize("stored", BAD_BLOBS.values(), ids=BAD_BLOBS)
def test_a_blob_that_is_not_packed_as_metaflow_does_it_is_rejected(tmp_path, stored):
    with pytest.raises(Rejected):
        blob(delivered(tmp_path, stored, key(b"content")), key(b"content"), LIMIT)


def test_a_blob_cut_anywhere_is_rejected(tmp_path):
    for length in range(len(GOOD)):
        with pytest.raises(Rejected):
            blob(delivered(tmp_path, GOOD[:length], key(b"content")), key(b"content"), LIMIT)


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "packed"])
def test_a_blob_under_the_key_of_another_is_rejected(tmp_path, raw):
    stored = b"content" if raw else GOOD
    with pytest.raises(Rejected, match="something else"):
        blob(delivered(tmp_path, stored, SHA, raw), SHA, LIMIT)


def test_a_packed_blob_that_claims_to_be_raw_is_rejected(tmp_path):
    with pytest.raises(Rejected, match="something else"):
        blob(delivered(tmp_path, GOOD, key(b"content"), raw=True), key(b"content"), LIMIT)


def test_a_blob_that_was_not_delivered_is_rejected(tmp_path):
    with pytest.raises(Rejected, match="neither"):
        blob(delivered(tmp_path, GOOD, key(b"content")), SHA, LIMIT)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_as_a_blob_are_rejected_or_are_what_their_key_says(tmp_path_factory, stored, raw):
    directory = tmp_path_factory.mktemp("any")
    sha = key(stored)
    try:
        assert blob(delivered(directory, stored, sha, raw), sha, LIMIT) == stored
    except Rejected:
        assert not raw


# --- the stream in which a reader sends them ----------------------------------------------


def through_a_stream(items, limit):
    """What comes out at the other end: contents, up to the first that is rejected."""
    out = io.BytesIO()
    send(items, limit, out)
    out.seek(0)
    return [whole(sent(out.read, limit), item["sha"]) for item in items]


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "packed"])
def test_blobs_come_whole_through_a_readers_stream(tmp_path, raw):
    items = []
    for number, content in enumerate(CONTENTS):
        path = tmp_path / str(number)
        path.write_bytes(content if raw else packed(content))
        items.append({"sha": key(content), "file": str(path), "raw": raw})
    assert through_a_stream(items, LIMIT) == CONTENTS


def test_a_blob_that_a_reader_rejects_is_rejected_with_its_reason(tmp_path):
    path = tmp_path / "blob"
    path.write_bytes(packed(bytes(LIMIT + 1)))
    with pytest.raises(Rejected, match="larger than 1 MB"):
        through_a_stream([{"sha": SHA, "file": str(path), "raw": False}], LIMIT)


def frame(kind, content=b"", size=None):
    return kind + (len(content) if size is None else size).to_bytes(4, "big") + content


TAKEN_OVER = {
    "another letter": frame(b"x"),
    "an end with content": frame(b"e", b"x"),
    "a piece without end": frame(b"d", size=1 << 31),
    "more than the limit": frame(b"d", bytes(1 << 20)) * 2,
    "text": b"hello, world",
    "another content": frame(b"d", b"other") + frame(b"e"),
}


@pytest.mark.parametrize("stream", TAKEN_OVER.values(), ids=TAKEN_OVER)
def test_a_reader_that_was_taken_over_can_send_nothing_but_the_blob(stream):
    with pytest.raises(Rejected):
        whole(sent(io.BytesIO(stream).read, LIMIT), key(b"content"))


# --- what is kept of a record ----------------------------------------------------------


def test_of_a_record_only_what_is_asked_for_is_kept(tmp_path):
    deep = {}
    for _ in range(500):
        deep = {"a": deep}
    claimed = {**RECORD, "serializer_info": {"a": 1}, "size": 5, "junk": [[]] * 1000}
    assert unpack(data_json({"x": SHA}, {"x": claimed}), tmp_path / "a").info == {
        "x": {**RECORD, "serializer_info": {"a": 1}}
    }
    for value in ("x" * 2000, 5, None, ["x"], deep):
        claimed = {"type": value, "encoding": value, "serializer_info": value}
        assert unpack(data_json({"x": SHA}, {"x": claimed}), tmp_path / "b").info == {"x": {}}
