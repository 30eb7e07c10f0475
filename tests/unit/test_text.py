"""Text from a sandbox is harmless to print and to store, and can be turned back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaflow_sandbox.admission.text import escape, harmless, message, unescape
from metaflow_sandbox.text import printable

CONTROLS = {*range(0x20), *range(0x7F, 0xA0)} - {0x09}
TRICKS = {*range(0x2028, 0x202F), *range(0x2066, 0x206A)}  # line ends and reversed text
# The alphabet of the escapes themselves, control characters, and broken UTF-8.
awkward = st.lists(
    st.sampled_from(
        [chr(c).encode() for c in {*range(0x2400, 0x2427), *TRICKS}]
        + [bytes([c]) for c in range(256)]
        + [b"\xc2\x85", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x90", b"1b", b"ff", b"plain"]
    ),
    max_size=30,
).map(b"".join)
anything = st.binary(max_size=100) | awkward | st.text(max_size=50).map(str.encode)


def assert_harmless(text):
    assert not (CONTROLS | TRICKS) & {ord(char) for char in text}


@settings(max_examples=1000, deadline=None)
@given(anything)
def test_any_bytes_are_turned_back_by_unescape(data):
    assert unescape(escape(data)) == data


@settings(max_examples=1000, deadline=None)
@given(anything)
def test_escaped_text_is_utf8_without_control_characters(data):
    assert_harmless(escape(data).decode("utf-8", "strict"))


@pytest.mark.parametrize("byte", range(256))
def test_every_single_byte_is_harmless_and_turned_back(byte):
    for data in (bytes([byte]), b"a%cb" % byte, bytes([0xC2, byte]), bytes([0xE2, 0x90, byte])):
        assert_harmless(escape(data).decode())
        assert unescape(escape(data)) == data


@settings(max_examples=500, deadline=None)
@given(st.lists(anything, max_size=4))
def test_lines_escaped_apart_are_turned_back_together(lines):
    assert unescape(b"\n".join(escape(line) for line in lines)) == b"\n".join(lines)


ORDINARY = [
    "",
    "plain text",
    "a\ttab",
    "naïve café, Größe, Ελληνικά, 日本語, עברית, العربية",
    "🎉 👩‍👩‍👧‍👦 🏳️‍🌈 é",
    "█▓░ ─│┌┐ 100%|██████████|",
    "“quotes” — and … dashes",
    "␧ U+2427 is no picture of a control character",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_left_as_it_is(text):
    assert escape(text.encode()) == text.encode()
    assert harmless(text) == text


SHOWN = [
    ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
    ("\x1b]0;title\x07", "␛]0;title␇"),
    ("50%\r100%", "50%␍100%"),
    ("a\0b\x7f", "a␀b␡"),
    ("\x9b31m", "␦c2␦9b31m"),
    ("␛", "␠␛"),
    ("␠", "␠␠"),
    ("␦1b", "␠␦1b"),
    ("\u202egpj.exe", "␦e2␦80␦aegpj.exe"),
    ("one\u2028two", "one␦e2␦80␦a8two"),
]


@pytest.mark.parametrize(("text", "shown"), SHOWN)
def test_what_a_terminal_would_act_on_is_shown_as_a_picture(text, shown):
    assert escape(text.encode()).decode() == shown


@pytest.mark.parametrize(
    ("data", "shown"), [(b"\xff", "␦ff"), (b"\xc2", "␦c2"), (b"\xed\xa0\x80", "␦ed␦a0␦80")]
)
def test_bytes_that_are_no_characters_are_shown_in_hexadecimal(data, shown):
    assert escape(data).decode() == shown


# --- short forms for messages -----------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=())), st.integers(1, 50))
def test_a_short_form_of_any_text_is_short_and_harmless(text, limit):
    shown = harmless(text, limit)
    assert len(shown) <= 9 * limit + 1  # a character that can't be shown takes nine
    assert_harmless(shown)
    shown.encode()


def test_text_that_is_cut_says_so():
    assert harmless("x" * 300) == "x" * 300
    assert harmless("x" * 301) == "x" * 300 + "…"


def test_a_message_is_made_harmless_once():
    quoted = harmless("\x1b[31m\x00")
    assert message(f"it said {quoted}\nand more") == f"it said {quoted}\nand more"
    assert message("\x1b]0;owned\x07\ud800\udc9b\u202e\x9b") == (
        "\u241b]0;owned\u2407\u2426ed\u2426a0\u242680\u24269b"
        "\u2426e2\u242680\u2426ae\u2426c2\u24269b"
    )


@given(anything)
def test_text_of_others_in_messages_is_harmless_too(data):
    assert_harmless(printable(data.decode(errors="surrogateescape")).replace("\n", ""))
    assert printable("a\tb\nü \x1b[2J\r") == "a\tb\nü \\x1b[2J\\r"
