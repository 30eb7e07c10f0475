"""Which addresses a sandbox may reach: public ones that aren't this machine's own."""

from __future__ import annotations

import errno
import socket
from ipaddress import ip_address, ip_network

# From IANA's registries of special-purpose addresses, and more. A list of our own, because
# what `ipaddress` calls global differs between releases of Python. It is stricter than the
# registries: no block in it is left open for the few services that are reachable there.
NOT_PUBLIC = tuple(
    ip_network(block)
    for block in (
        "0.0.0.0/8",  # this network; Linux takes 0.0.0.0 for itself
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # behind a provider's NAT; Alibaba's metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's platform, which hands out a machine's secrets
        "169.254.0.0/16",  # link-local; the metadata of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
        # Of IPv6, all but 2000::/3. Here are loopback, ULA (AWS's and Google's metadata too),
        # link-local, site-local, multicast, SRv6, discard, and what holds an IPv4 address:
        # mapped (::ffff:0:0/96), compatible (::/96), translated (::ffff:0:0:0/96, NAT64).
        "::/3",
        "4000::/2",
        "8000::/1",
        # Of 2000::/3:
        "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID, AMT, AS112
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which holds an IPv4 address
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)


def is_public(address: str) -> bool:
    """Whether this is an address of the public internet.

    Not public are addresses that name an interface ("fe80::1%eth0"), and whatever isn't an
    address. IPv4 addresses in another notation ("127.1", "0x7f000001") aren't addresses here.
    """
    if "%" in address:
        return False
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    return not any(parsed in network for network in NOT_PUBLIC)


def is_own(address: str) -> bool:
    """Whether an address is this machine's, so that its own services listen there.

    Only a machine's own addresses can be bound; nothing is sent to find out. In doubt it
    is ours: with net.ipv4.ip_nonlocal_bind set, as on some load balancers, every address is.

    Raises:
        ValueError: it isn't an address.
    """
    parsed = ip_address(address)
    family = socket.AF_INET if parsed.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(parsed), 0))
    except OSError as e:
        return e.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return True


def is_reachable(address: str) -> bool:
    """Whether a sandbox may be connected to an address."""
    return is_public(address) and not is_own(address)
