"""Hosts are allowed by name, in one spelling, before anything is looked up."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaflow_sandbox.egress.rules import Rules, is_address, normal

RULES = Rules(("pypi.org", "*.wild.test", "1.1.1.1", "2606:4700::1111", "xn--bcher-kva.test"))
ANY = Rules(None)

ALLOWED = [
    "pypi.org",
    "PyPI.org",
    "pypi.org.",
    "a.wild.test",
    "a.b.c.wild.test",
    "A.WILD.TEST.",
    "_dmarc.wild.test",
    "r3---sn-4g5e.wild.test",
    "1.1.1.1",
    "2606:4700::1111",
    "[2606:4700::1111]",
    "[2606:4700:0:0:0:0:0:1111]",
    "xn--bcher-kva.test",
]
NOT_LISTED = [
    "pypi.org.evil.com",
    "evilpypi.org",
    "evil-pypi.org",
    "files.pypi.org",
    "org",
    "pypi",
    "wild.test",
    "evilwild.test",
    "a.wild.test.evil.com",
    "1.1.1.2",
    "2606:4700::1112",
    "localhost",
]
# None of these may get as far as a resolver, whatever is allowed.
NOT_A_HOST = [
    "",
    ".",
    "..",
    ".pypi.org",
    "pypi..org",
    "pypi.org..",
    "*.wild.test",
    ".wild.test",
    "-a.wild.test",
    "a-.wild.test",
    "pypi.org\0",
    "pypi.org\0.evil.com",
    "evil.com\0.wild.test",
    "pypi.org ",
    " pypi.org",
    "pypi.org\n",
    "pypi.org\t",
    "pypi.org\r\nHost: evil.com",
    "pypi.org@evil.com",
    "evil.com@pypi.org",
    "evil.com/.wild.test",
    "evil.com#.wild.test",
    "evil.com?.wild.test",
    "evil.com\\.wild.test",
    "evil.com:80.wild.test",
    "pypi%2eorg",
    "pypi.org%00",
    "pypi.org%",
    "pyp\u0131.org",
    "PYP\u0130.org",
    "pypi\u3002org",
    "\u212a.wild.test",  # lower() makes it a k
    "b\u00fccher.test",
    "a" * 64 + ".wild.test",
    "a." * 130 + "wild.test",
    # other notations of addresses, which getaddrinfo would understand
    "127.1",
    "127.0.1",
    "2130706433",
    "0x7f000001",
    "0X7F000001",
    "0x7f.0.0.1",
    "127.0.0.0x1",
    "0x",
    "017700000001",
    "0177.0.0.1",
    "127.0.0.01",
    "127.0.0.1.1",
    "256.1.1.1",
    "1.1.1.1..",
    "a.wild.test.1",
    "a.wild.test.0x1f",
    "1",
    "[1.1.1.1]",
    "[2606:4700::1111",
    "2606:4700::1111]",
    "[[2606:4700::1111]]",
    "[2606:4700::1111].",
    "[2606:4700::1111%eth0]",
    "[2606:4700::1111%251]",
    "[::1%lo]",
    "[v1.x]",
    "[]",
    "[:]",
    ":::",
    "1:2",
]


@pytest.mark.parametrize("host", ALLOWED)
def test_listed_hosts_are_allowed(host):
    assert RULES.refusal(host, 443) is None
    assert RULES.refusal(host, 80) is None


@pytest.mark.parametrize("host", NOT_LISTED)
def test_other_hosts_are_refused_with_what_to_write(host):
    assert f'add "{host}" to network=[...]' in RULES.refusal(host, 443)
    assert ANY.refusal(host, 443) is None


@pytest.mark.parametrize("host", NOT_A_HOST)
def test_what_is_not_a_host_is_refused_even_where_every_host_is_allowed(host):
    for rules in (RULES, ANY, Rules(("*.wild.test", "*.org", "*.com", "*.test"))):
        reason = rules.refusal(host, 443)
        assert reason
        assert reason.isascii() and reason.isprintable()


@pytest.mark.parametrize("port", [0, 1, 22, 25, 8080, 65535])
def test_listed_hosts_have_two_ports_and_any_host_has_all(port):
    assert "ports 80 and 443" in RULES.refusal("pypi.org", port)
    assert ANY.refusal("pypi.org", port) is None


def test_a_list_without_hosts_allows_nothing():
    assert Rules(()).refusal("pypi.org", 443)


def test_addresses_that_are_not_listed_are_refused():
    assert Rules(("*.1.test",)).refusal("1.1.1.1", 443)


@pytest.mark.parametrize(
    ("given_host", "expected"),
    [
        ("PyPI.org.", "pypi.org"),
        ("[2606:4700:0::1111]", "2606:4700::1111"),
        ("2606:4700:0::1111", "2606:4700::1111"),
        ("1.1.1.1.", "1.1.1.1"),
    ],
)
def test_a_host_has_one_spelling(given_host, expected):
    assert normal(given_host) == expected
    assert normal(expected) == expected


@pytest.mark.parametrize("host", [h for h in NOT_A_HOST if h] + ["*", "https://pypi.org", "a:80"])
def test_rules_that_name_no_host_are_refused_when_made(host):
    if host == "*.wild.test":
        return
    with pytest.raises(ValueError, match="network: "):
        Rules((host,))


@pytest.mark.parametrize("host", ["*.1.1.1.1", "*.::1", "*.", "*.*.test", "a.*.test", "*a.test"])
def test_wildcards_stand_before_a_name_only(host):
    with pytest.raises(ValueError, match="network: "):
        Rules((host,))


def test_rules_are_compared_in_their_one_spelling():
    rules = Rules(("PyPI.org.", "*.Wild.Test", "[2606:4700:0::1111]"))
    assert rules.hosts == ("pypi.org", "*.wild.test", "2606:4700::1111")
    assert rules.refusal("pypi.org", 443) is None


text = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="aA.*-_0x17@%[]: \0wild.test", max_size=40),
    st.builds("{}{}{}".format, st.text(max_size=5), st.sampled_from(ALLOWED), st.text(max_size=5)),
)


@given(text, st.integers(0, 65535))
def test_nothing_is_allowed_that_is_not_listed_or_below_a_listed_name(host, port):
    if RULES.refusal(host, port) is not None:
        return
    name = host.lower().removesuffix(".").removeprefix("[").removesuffix("]")
    listed = {"pypi.org", "1.1.1.1", "xn--bcher-kva.test"}
    is_v6 = ":" in name and socket.inet_pton(socket.AF_INET6, name) == socket.inet_pton(
        socket.AF_INET6, "2606:4700::1111"
    )
    assert name in listed or is_v6 or name.endswith(".wild.test")
    assert port in (80, 443)


@given(text)
def test_what_a_resolver_takes_for_an_address_is_a_canonical_address(host):
    try:
        name = normal(host)
    except ValueError:
        return
    assert name.isascii() and name.isprintable() and " " not in name
    assert len(name) <= 253
    if ":" in name:
        assert socket.inet_pton(socket.AF_INET6, name)
        return
    try:
        packed = socket.inet_aton(name)  # as leniently as getaddrinfo
    except OSError:
        assert not is_address(name)
        return
    assert socket.inet_ntoa(packed) == name and is_address(name)


@given(text)
def test_the_one_spelling_is_stable(host):
    try:
        name = normal(host)
    except ValueError:
        return
    assert normal(name) == name
    assert Rules((name,)).refusal(host, 443) is None
