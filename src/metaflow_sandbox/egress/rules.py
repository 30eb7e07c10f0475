"""Which hosts a sandbox may reach. Decided by name and port alone, before anything is looked up."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

_LABEL = "[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
# A last label like these makes resolvers read the whole as an address: 127.1, 0x7f000001.
_NUMBER = re.compile("[0-9]+|0x[0-9a-f]*")
_IPV6 = re.compile(r"\[([0-9a-f:.]+)\]|([0-9a-f:.]*:[0-9a-f:.]*)")


def normal(host: str) -> str:
    """The one way to write a host: a name in lower case without a final dot, or an address.

    Raises:
        ValueError: it is neither. The message doesn't repeat it.
    """
    if not host.isascii():  # first, as lower() makes ASCII letters of some others
        raise ValueError('it is not a host name; write names in other scripts as "xn--..."')
    host = host.lower()
    try:
        if found := _IPV6.fullmatch(host):
            return str(IPv6Address(found[1] or found[2]))
        name = host.removesuffix(".")
        if is_address(name):
            return str(IPv4Address(name))  # which takes four decimal numbers and nothing else
    except ValueError:
        raise ValueError("it is not an address; write four decimal numbers, or IPv6") from None
    if len(name) > 253 or not _NAME.fullmatch(name):
        raise ValueError("it is not a host name")
    return name


def is_address(name: str) -> bool:
    """Whether what `normal` gives is an address, or its argument would be taken for one."""
    return ":" in name or _NUMBER.fullmatch(name.rpartition(".")[2]) is not None


@dataclass(frozen=True)
class Rules:
    """What `network=` allows.

    Attributes:
        hosts: names, addresses, and "*.name" for all that is below a name at any depth,
            but not for the name itself. None: every public host, at every port.
        ports: those that are open at the listed hosts.

    Raises:
        ValueError: a host is none of these.
    """

    hosts: tuple[str, ...] | None
    ports: tuple[int, ...] = (80, 443)

    def __post_init__(self) -> None:
        if self.hosts is not None:
            object.__setattr__(self, "hosts", tuple(_pattern(host) for host in self.hosts))

    def refusal(self, host: str, port: int) -> str | None:
        """Why a host may not be reached, for the user; None if it may, where it is public."""
        try:
            name = normal(host)
        except ValueError as e:
            return str(e)
        if self.hosts is None:
            return None
        if not any(_matches(name, pattern) for pattern in self.hosts):
            return f'it is not listed; to allow it, add "{name}" to network=[...]'
        if port not in self.ports:
            ports = " and ".join(str(p) for p in self.ports)
            return f"network=[...] opens the ports {ports} only; network=True opens every port"
        return None


def _pattern(host: str) -> str:
    wildcard, name = ("*.", host[2:]) if host.startswith("*.") else ("", host)
    try:
        name = normal(name)
    except ValueError as e:
        raise ValueError(f"network: {host!r} can't be listed: {e}") from None
    if wildcard and is_address(name):
        raise ValueError(f"network: {host!r} can't be listed: nothing is below an address")
    return wildcard + name


def _matches(name: str, pattern: str) -> bool:
    return name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern
