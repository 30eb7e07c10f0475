# ruff: noqa: E501 - tables
"""What unpacks an image's layers, run as a plain process: nothing leaves its directory.

In a sandbox there would be nothing to leave it for; here there is.
"""

import errno
import gzip
import io
import json
import lzma
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import images
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metaflow_sandbox.backends.bubblewrap import image

DIRECTORY, FILE, LINK = tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.SYMTYPE
HARD, FIFO, DEVICE = tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE
OPAQUE = ".wh..wh..opq"
PLENTY = 1 << 20


def archive(entries, compress=False):
    """A layer of (kind, name, link target or content)."""
    found = []
    for kind, name, *more in entries:
        info = tarfile.TarInfo(name)
        info.type = kind
        content = b""
        if kind in (LINK, HARD):
            info.linkname = more[0]
        elif kind == FILE:
            content = more[0] if more else b""
        found.append((info, content))
    return images.layer(found, compress=compress)


class Place:
    """A directory to unpack in, and others beside it that must stay as they are."""

    def __init__(self, root):
        self.root = Path(root)
        self.target, self.layers = self.root / "outer/target", self.root / "layers"
        self.target.mkdir(parents=True)
        self.layers.mkdir()
        (self.root / "outer/victim").mkdir()
        (self.root / "outer/victim/file").write_text("untouched")

    def put(self, layers):
        for number, content in enumerate(layers):
            (self.layers / f"{number:04d}").write_bytes(content)
        return tree_of(self.root, leave=self.target)

    def unpack(self, *layers, limit=PLENTY, program=None):
        """Runs the program. Returns the last line of what it says, "" if all went well."""
        before = self.put(layers)
        script = [str(image.UNPACK)] if program is None else ["-c", program]
        done = subprocess.run(
            [sys.executable, "-I", "-S", *script, self.layers, self.target, str(limit)],
            capture_output=True, text=True, umask=0o022,
        )  # fmt: skip
        assert tree_of(self.root, leave=self.target) == before
        assert bool(done.returncode) == bool(done.stderr)
        return done.stderr.strip().splitlines()[-1] if done.returncode else ""

    @property
    def tree(self):
        return tree_of(self.target)


def tree_of(directory, leave=None):
    """{name: a directory's dict, a file's content, or the target of a link}."""
    found = {}
    for entry in os.scandir(directory):
        if entry.is_symlink():
            found[entry.name] = ("link", os.readlink(entry.path))
        elif entry.is_dir():
            found[entry.name] = {} if Path(entry.path) == leave else tree_of(entry.path, leave)
        else:
            found[entry.name] = Path(entry.path).read_bytes()
    return found


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


# --- what layers say


def lower():
    return archive([
        (DIRECTORY, "d"), (FILE, "d/one", b"1"), (FILE, "d/two", b"2"), (DIRECTORY, "d/sub"),
        (FILE, "d/sub/three", b"3"), (FILE, "f", b"f"), (LINK, "to_d", "d"),
    ])  # fmt: skip


ALL = {
    "d": {"one": b"1", "two": b"2", "sub": {"three": b"3"}}, "f": b"f", "to_d": ("link", "d"),
}  # fmt: skip
UPPER = {
    "nothing": ([], ALL),
    "a whiteout of a file": ([(FILE, "d/.wh.one")], ALL | {"d": {"two": b"2", "sub": {"three": b"3"}}}),
    "a whiteout of a directory": ([(FILE, ".wh.d")], {"f": b"f", "to_d": ("link", "d")}),
    "a whiteout of a link": ([(FILE, ".wh.to_d")], {"d": ALL["d"], "f": b"f"}),
    "a whiteout of what is not there": ([(FILE, "d/.wh.no"), (FILE, "d/.wh.")], ALL),
    "an opaque mark": ([(DIRECTORY, "d"), (FILE, f"d/{OPAQUE}"), (FILE, "d/new", b"n")], ALL | {"d": {"new": b"n"}}),
    "an opaque mark after content": ([(FILE, "d/sub/new", b"n"), (FILE, "d/two", b"n"), (FILE, f"d/{OPAQUE}")], ALL | {"d": {"sub": {"new": b"n"}, "two": b"n"}}),
    "a whiteout after content": ([(DIRECTORY, "d"), (FILE, "d/new", b"n"), (FILE, ".wh.d")], ALL | {"d": {"new": b"n"}}),
    "an opaque mark of the root": ([(FILE, OPAQUE), (FILE, "new", b"n")], {"new": b"n"}),
    "an opaque mark in what replaces a link": ([(DIRECTORY, "to_d"), (FILE, f"to_d/{OPAQUE}"), (FILE, "to_d/new", b"n")], ALL | {"to_d": {"new": b"n"}}),
    "a whiteout through a link": ([(FILE, "to_d/.wh.one")], ALL | {"d": {"two": b"2", "sub": {"three": b"3"}}}),
    "a whiteout of the directory itself": ([(FILE, "d/.wh.."), (FILE, "d/.wh...")], ALL),
    "a file for a directory": ([(FILE, "d", b"n")], ALL | {"d": b"n"}),
    "a directory for a file": ([(DIRECTORY, "f"), (FILE, "f/new", b"n")], ALL | {"f": {"new": b"n"}}),
    "a directory for a file, unsaid": ([(FILE, "f/new", b"n")], ALL | {"f": {"new": b"n"}}),
    "a link for a directory": ([(LINK, "d", "f")], ALL | {"d": ("link", "f")}),
    "a file for a link": ([(FILE, "to_d", b"n")], ALL | {"to_d": b"n"}),
    "a directory that is there": ([(DIRECTORY, "d")], ALL),
    "a file through a link": ([(FILE, "to_d/sub/new", b"n")], ALL | {"d": ALL["d"] | {"sub": {"three": b"3", "new": b"n"}}}),
    "a hard link": ([(HARD, "same", "d/one")], ALL | {"same": b"1"}),
    "a hard link through a link": ([(HARD, "same", "/to_d/one")], ALL | {"same": b"1"}),
    "a hard link to a link": ([(HARD, "same", "to_d")], ALL | {"same": ("link", "d")}),
    "a hard link to itself": ([(HARD, "f", "./f")], ALL),
    "what no image needs": ([(FIFO, "pipe"), (DEVICE, "null"), (tarfile.BLKTYPE, "disk")], ALL),
    "its own root": ([(DIRECTORY, "."), (DIRECTORY, "./"), (FILE, ""), (LINK, "/", "d")], ALL),
}  # fmt: skip


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("case", UPPER)
def test_a_layer_is_applied_to_those_below(place, case, compress):
    entries, expected = UPPER[case]
    assert place.unpack(lower(), archive(entries, compress)) == ""
    assert place.tree == expected


def test_a_hard_link_is_one_file(place):
    assert place.unpack(archive([(FILE, "a", b"x"), (HARD, "b", "a")])) == ""
    assert (place.target / "a").stat().st_ino == (place.target / "b").stat().st_ino


@pytest.mark.parametrize(
    ("mode", "kept"),
    [(0o644, 0o644), (0, 0o644), (0o600, 0o644), (0o4755, 0o755), (0o2711, 0o755), (0o700, 0o755),
     (0o1777, 0o755), (0o666, 0o644)],
)  # fmt: skip
def test_everybody_may_read_and_nobody_write_or_change_user(place, mode, kept):
    entries = []
    for name, kind in (("f", FILE), ("d", DIRECTORY)):
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.uid = kind, mode, 0
        entries.append((info, b""))
    assert place.unpack(images.layer(entries)) == ""
    assert stat.S_IMODE((place.target / "f").stat().st_mode) == kept
    assert stat.S_IMODE((place.target / "d").stat().st_mode) == 0o755
    assert (place.target / "f").stat().st_uid == os.getuid()


def test_names_are_bytes(place):
    names = [b"line\nbreak", b"\x1b[2J", b"\xff\xfe", "ü".encode(), b" ", b"-rf", b"a" * 200]
    layer = archive([(FILE, os.fsdecode(name), b"x") for name in names])
    assert place.unpack(layer) == ""
    assert sorted(os.listdir(os.fsencode(place.target))) == sorted(names)


# --- what is refused


def sized(size, kind=FILE):
    """An archive whose only header claims a size."""
    info = tarfile.TarInfo("f")
    info.type = kind
    header = bytearray(info.tobuf())
    header[124:136] = size.to_bytes(12, "big", signed=True)
    if size >= 0:
        header[124] |= 0x80
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:512]))
    return bytes(header) + bytes(2048)


REFUSED = {
    "no archive": (b"x" * 2000, "ReadError"),
    "nothing": (b"", "ReadError"),
    "half an archive": (archive([(FILE, "f", b"x" * 5000)])[:3000], "unexpected end of data"),
    "half a gzip": (archive([(FILE, "f", os.urandom(5000))], True)[:3000], "ended before"),
    "a wrong gzip": (archive([(FILE, "f", b"x")], True)[:20] + b"x" * 50, ""),
    "zstandard": (b"\x28\xb5\x2f\xfd" + bytes(600), "ReadError"),
    "xz": (lzma.compress(archive([(FILE, "f")])), "ReadError"),
    "a negative size": (sized(-4096), "larger than may be unpacked"),
    "a size without end": (sized(1 << 62), "larger than may be unpacked"),
    "a long name": (archive([(FILE, "a/../" * 3000)]), "characters"),
    "a long target": (archive([(HARD, "f", "a/../" * 3000)]), "characters"),
    "a name with a null": (None, ""),
    "a component that is too long": (archive([(FILE, "a" * 300)]), "name too long"),
    "directories without end": (archive([(FILE, "a/" * 201 + "f")]), "more than 200 deep"),
    "a link to itself": (archive([(LINK, "l", "l"), (FILE, "l/f")]), "too many links"),
    "links in a circle": (archive([(LINK, "l", "m"), (LINK, "m", "l"), (FILE, "l/f")]), "too many links"),
    "a hard link to nothing": (archive([(HARD, "f", "no")]), "No such file"),
    "a hard link into nothing": (archive([(HARD, "f", "no/no")]), "which is not there"),
    "a hard link into a file": (archive([(FILE, "f"), (HARD, "g", "f/x")]), "which is not there"),
    "a hard link to a directory": (archive([(DIRECTORY, "d"), (HARD, "g", "d")]), os.strerror(errno.EPERM)),
    "a hard link without a target": (archive([(HARD, "g", "")]), "which is a directory"),
    "a hard link to the root": (archive([(HARD, "g", "/")]), "which is a directory"),
    "a hard link to what is above": (archive([(HARD, "g", "../..")]), "which is a directory"),
    "a hard link over what it is in": (archive([(FILE, "d/f"), (HARD, "d", "d/f")]), "No such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_layer_ends_with_a_sentence(place, case):
    content, words = REFUSED[case]
    if case == "a name with a null":
        info = tarfile.TarInfo("f")
        info.pax_headers = {"path": "a\0b"}
        content = images.layer([(info, b"")], compress=False)
        if b"a\0b" not in content:
            pytest.skip("this Python writes no such archive")
    said = place.unpack(content)
    assert said
    assert words in said


def test_a_small_layer_that_expands_beyond_the_limit_is_stopped(place):
    bomb = archive([(FILE, "zeros", bytes(8 << 20))], compress=True)
    assert len(bomb) < 50_000
    assert "larger than may be unpacked" in place.unpack(bomb, limit=1 << 20)
    assert place.tree == {}
    parts = archive([(FILE, "same", bytes(1 << 19))] * 4, compress=True)
    assert "larger than may be unpacked" in place.unpack(parts, limit=1 << 20)


def test_a_sparse_file_counts_with_its_holes(place):
    raw = place.root / "sparse"
    with open(raw, "wb") as file:
        file.truncate(64 << 20)
    done = subprocess.run(
        ["tar", "-C", place.root, "--sparse", "-cf", "-", "sparse"], capture_output=True
    )
    assert len(done.stdout) < 1 << 20
    assert "larger than may be unpacked" in place.unpack(done.stdout, limit=1 << 20)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME], ids=["pax", "gnu"])
def test_a_header_that_expands_does_not_take_the_machines_memory(place, kind):
    source = image.UNPACK.read_text()
    assert "1 << 30" in source
    content = sized(150 << 20, kind)[:512] + bytes(150 << 20)
    program = source.replace("1 << 30", "100 << 20")
    assert "MB of memory" in place.unpack(gzip.compress(content, 1), program=program)


def test_the_number_of_files_is_limited_with_the_directories_that_nobody_named(place):
    source = image.UNPACK.read_text()
    assert "2_000_000" in source
    program = source.replace("2_000_000", "500")
    many = archive([(FILE, f"f{i}") for i in range(501)])
    assert "more than 500 files" in place.unpack(many, program=program)
    deep = archive([(FILE, f"{i}/" + "d/" * 99 + "f") for i in range(5)])
    assert "more than 500 files" in place.unpack(deep, program=program)
    assert place.unpack(archive([(FIFO, "f")] * 499), program=program) == ""


# --- any archive, against a model


class Refused(Exception):
    pass


class Model:
    """The same in memory: a directory is a dict, a link a tuple, a file its content."""

    def __init__(self):
        self.root = {}
        self.brought = {}

    def layer(self, entries):
        self.brought = {}
        for kind, name, *more in entries:
            parts = [p for p in name.split("/") if p not in ("", ".")]
            if not parts or parts[-1] == "..":
                continue
            parent, last = self.walk(parts[:-1], make=True), parts[-1]
            if last == OPAQUE:
                for child in list(parent):
                    self.hide(parent, child)
            elif last.startswith(".wh."):
                self.hide(parent, last[4:])
            else:
                self.add(kind, parent, last, *more)

    def bring(self, parent, name):
        self.brought[id(parent), name] = parent  # which keeps its id its own

    def add(self, kind, parent, name, value=b""):
        if kind == DIRECTORY:
            if not isinstance(parent.get(name), dict):
                parent[name] = {}
        elif kind == FILE:
            parent[name] = value
        elif kind == LINK:
            parent[name] = ("link", value)
        elif kind == HARD:
            source = [p for p in value.split("/") if p not in ("", ".")]
            if not source or source[-1] == "..":
                raise Refused
            directory = self.walk(source[:-1], make=False)
            if (directory, name) != (parent, source[-1]) or directory is not parent:
                found = directory.get(source[-1])
                if found is None or isinstance(found, dict):
                    raise Refused
                if self.holds(parent.get(name), directory):
                    raise Refused
                parent[name] = found
        else:
            return
        self.bring(parent, name)

    def holds(self, node, directory):
        return isinstance(node, dict) and (
            node is directory or any(self.holds(child, directory) for child in node.values())
        )

    def hide(self, parent, name):
        node = parent.get(name)
        if isinstance(node, dict):
            for child in list(node):
                self.hide(node, child)
        if not ((id(parent), name) in self.brought or (isinstance(node, dict) and node)):
            parent.pop(name, None)

    def walk(self, parts, make):
        todo, path, links = list(parts), [self.root], 0
        while todo:
            part = todo.pop(0)
            if part == "..":
                path = path[:-1] or path
                continue
            node = path[-1].get(part)
            if isinstance(node, tuple):
                links += 1
                if links > 40:
                    raise Refused
                todo = [p for p in node[1].split("/") if p not in ("", ".")] + todo
                if node[1].startswith("/"):
                    path = [self.root]
                continue
            if not isinstance(node, dict):
                if not make:
                    raise Refused
                node = path[-1][part] = {}
            path.append(node)
        return path[-1]


#: Runs the program once for each line with its arguments: quicker than an interpreter each.
MANY = """
import json, runpy, sys
for line in sys.stdin:
    program, *sys.argv[1:] = json.loads(line)
    try:
        runpy.run_path(program)
        print("", flush=True)
    except (SystemExit, OSError) as e:
        print("refused: " + ascii(str(e)), flush=True)
"""


@pytest.fixture(scope="module")
def unpacker():
    argv = [sys.executable, "-I", "-S", "-c", MANY]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, umask=0o022
    ) as process:

        def unpack(place):
            arguments = [image.UNPACK, place.layers, place.target, PLENTY]
            process.stdin.write(json.dumps([str(a) for a in arguments]) + "\n")
            process.stdin.flush()
            return process.stdout.readline().rstrip("\n")

        yield unpack
        process.stdin.close()


PARTS = st.sampled_from(["q", "r", "s", "..", ".", "", "victim", "file"])
PATHS = st.builds(
    lambda start, parts: start + "/".join(parts),
    st.sampled_from(["", "", "", "/", "../", "../../", "OUTER/", "OUTER/victim/"]),
    st.lists(PARTS, min_size=1, max_size=4),
)
HIDDEN = st.builds(
    lambda path, name: f"{path}/{name}",
    PATHS,
    st.sampled_from([".wh.q", ".wh.r", ".wh.victim", OPAQUE]),
)
ENTRIES = st.one_of(
    st.tuples(st.just(DIRECTORY), PATHS),
    st.tuples(st.just(FILE), PATHS, st.binary(max_size=3)),
    st.tuples(st.just(LINK), PATHS, PATHS.filter(bool)),
    st.tuples(st.just(HARD), PATHS, PATHS),
    st.tuples(st.just(FILE), HIDDEN),
    st.tuples(st.sampled_from([FIFO, DEVICE]), PATHS),
)


@settings(max_examples=150)
@given(st.lists(st.lists(ENTRIES, max_size=8), min_size=1, max_size=3))
@example([[(LINK, "q", "OUTER/victim"), (FILE, "q/file", b"x"), (FILE, "q/.wh.file")]])
@example([[(LINK, "q", "../.."), (FILE, f"q/{OPAQUE}"), (HARD, "r", "q/outer/victim/file")]])
@example([[(LINK, "q", "/"), (LINK, "q/q/r", ".."), (FILE, "r/r/s", b"x")], [(FILE, "q/.wh.s")]])
def test_any_archive_gives_what_the_model_says_and_nothing_outside(unpacker, layers):
    with tempfile.TemporaryDirectory() as root:
        place, model = Place(root), Model()
        outer = str(place.root / "outer")
        layers = [
            [(kind, *(w.replace("OUTER", outer) if isinstance(w, str) else w for w in words))
             for kind, *words in entries]
            for entries in layers
        ]  # fmt: skip
        try:
            for entries in layers:
                model.layer(entries)
        except Refused:
            model = None
        before = place.put(map(archive, layers))
        said = unpacker(place)
        assert tree_of(place.root, leave=place.target) == before
        assert bool(said) == (model is None), said
        if model is not None:
            assert place.tree == model.root


def test_a_plain_extraction_of_such_archives_gets_out(place):
    """The control: what the others would have changed, had they been unpacked like this."""
    attacks = [
        [(FILE, "../victim/file", b"x")],
        [(FILE, str(place.root / "outer/victim/file"), b"x")],
        [(LINK, "q", "../victim"), (FILE, "q/file", b"x")],
        [(LINK, "q", str(place.root / "outer/victim")), (FILE, "q/file", b"x")],
    ]
    victim = place.root / "outer/victim/file"
    for entries in attacks:
        assert place.unpack(archive(entries)) == ""
        assert victim.read_text() == "untouched"
        with (
            tarfile.open(fileobj=io.BytesIO(archive(entries))) as file,
            tempfile.TemporaryDirectory(dir=place.root / "outer") as naive,
        ):
            if hasattr(tarfile, "fully_trusted_filter"):
                file.extraction_filter = staticmethod(tarfile.fully_trusted_filter)
            file.extractall(naive)
        assert victim.read_bytes() == b"x"
        victim.write_text("untouched")
