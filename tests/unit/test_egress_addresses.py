"""A sandbox reaches public addresses that aren't this machine's own, and no others."""

import socket
from ipaddress import IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaflow_sandbox.egress.addresses import NOT_PUBLIC, is_own, is_public, is_reachable

PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.0",
    "151.101.0.223",
    "168.63.129.15",
    "168.63.129.17",
    "169.253.255.255",
    "169.255.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "192.167.255.255",
    "192.169.0.0",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "2001:200::1",
    "2001:4860:4860::8888",
    "2003::1",
    "2606:4700:4700::1111",
    "2a04:4e42::223",
    "3ffe::1",
]
REFUSED = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "100.127.255.255",
    "127.0.0.1",
    "127.255.255.255",
    "168.63.129.16",
    "169.254.169.254",
    "169.254.170.2",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.31.196.1",
    "192.52.193.1",
    "192.88.99.1",
    "192.168.1.1",
    "192.175.48.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::8.8.8.8",
    "::ffff:8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:7f00:1",
    "::ffff:0:127.0.0.1",
    "64:ff9b::8.8.8.8",
    "64:ff9b::10.0.0.1",
    "64:ff9b:1::1",
    "100::1",
    "1fff::1",
    "2001::1",
    "2001:0:7f00:1::",
    "2001:2::1",
    "2001:10::1",
    "2001:20::1",
    "2001:1ff:ffff::",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:808:808::1",
    "2620:4f:8000::1",
    "3fff::1",
    "4000::1",
    "5f00::1",
    "8000::1",
    "fc00::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fe80::1",
    "fe80::1%eth0",
    "2606:4700::1%eth0",
    "febf::1",
    "fec0::1",
    "ff02::1",
    "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
]
NOT_ADDRESSES = [
    "",
    "localhost",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0x7f.0.0.1",
    "017700000001",
    "0177.0.0.1",
    "008.008.008.008",
    "1.1.1.1.",
    " 1.1.1.1",
    "1.1.1.1\n",
    "1.1.1.1\0",
    "\uff11.1.1.1",
    "[2606:4700::1]",
    "1.1.1.1:80",
    "1.1.1.0/24",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize("address", REFUSED)
def test_special_addresses_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", NOT_ADDRESSES)
def test_what_is_not_an_address_is_not_public(address):
    assert not is_public(address)


addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
special = st.sampled_from(NOT_PUBLIC).flatmap(
    lambda block: st.integers(int(block[0]), int(block[-1])).map(type(block[0]))
)


@given(special)
def test_nothing_in_the_list_is_public_in_any_spelling(address):
    for text in (str(address), address.exploded, str(address).upper(), address.exploded.upper()):
        assert not is_public(text)


@given(addresses)
def test_what_is_public_is_what_python_calls_global(address):
    # The other way round doesn't hold: the list is stricter.
    if is_public(str(address)):
        assert address.is_global or str(address) in ("192.0.0.9", "192.0.0.10")


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_inside_an_ipv6_address_is_never_public(inner):
    n = int(inner)
    teredo = (0x20010000 << 96) | (n << 64) | (n ^ 0xFFFFFFFF)
    embedded = [
        n,  # compatible
        (0xFFFF << 32) | n,  # mapped
        (0xFFFF << 48) | n,  # translated
        (0x64FF9B << 96) | n,  # NAT64
        (0x64FF9B0001 << 80) | n,
        (0x2002 << 112) | (n << 80) | 1,  # 6to4
        teredo,
        (0xFE80 << 112) | (0x5EFE << 32) | n,  # ISATAP
    ]
    for value in embedded:
        assert not is_public(str(IPv6Address(value)))
    assert not is_public(f"::ffff:{inner}")
    assert not is_public(f"0:0:0:0:0:FFFF:{inner}")


@given(st.integers(0, 2**128 - 1))
def test_of_ipv6_only_the_unicast_block_is_public(n):
    if is_public(str(IPv6Address(n))):
        assert n >> 125 == 0b001


def own_addresses():
    """Addresses of this machine beyond loopback, found without sending anything."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))  # only chooses a source address
        except OSError:
            return []
        return [probe.getsockname()[0]]


def test_this_machines_addresses_are_its_own():
    for address in ["127.0.0.1", "127.8.9.10", "0.0.0.0", *own_addresses()]:
        assert is_own(address)
        assert not is_reachable(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "198.51.100.77", "2606:4700::1111"])
def test_other_machines_addresses_are_not_its_own(address):
    try:
        with open("/proc/sys/net/ipv4/ip_nonlocal_bind") as f:
            if f.read().strip() == "1":
                pytest.skip("every address can be bound here")
    except OSError:
        pass
    assert not is_own(address)
    assert is_reachable(address) == is_public(address)


def test_in_doubt_an_address_is_our_own(monkeypatch):
    def exhausted(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket, "socket", exhausted)
    assert is_own("1.1.1.1")
    assert not is_reachable("1.1.1.1")


def test_whether_a_name_is_our_own_is_not_looked_up():
    with pytest.raises(ValueError):
        is_own("localhost")
    assert not is_reachable("localhost")
