"""`network=` as Daytona has it: a block of everything, IPv4 networks, or domains."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any

from ...errors import NotEnforceable
from ..base import network_kind

_MOST_NETWORKS = 10


def settings(network: bool | Sequence[str] | None) -> dict[str, Any]:
    """The parameters of a creation; {} leaves the organisation's own policy.

    Raises:
        NotEnforceable: a list that Daytona can't hold a sandbox to.
    """
    if network is None or network is True:
        return {}
    if network is False:
        return {"network_block_all": True}
    domains, networks = [], []
    for host in network:
        try:
            address = ipaddress.ip_network(host, strict=False)
        except ValueError:
            domains.append(host)
            continue
        if address.version != 4:
            raise NotEnforceable(
                f"network: {host}: Daytona's lists have IPv4 alone. Name the host instead.",
                op="create",
                retryable=False,
            )
        networks.append(str(address))
    if domains and networks:
        raise NotEnforceable(
            "network: Daytona holds a sandbox to a list of domains or to one of addresses, not to "
            "both. Name hosts only, or addresses only.",
            op="create",
            retryable=False,
        )
    if len(networks) > _MOST_NETWORKS:
        raise NotEnforceable(
            f"network: Daytona takes {_MOST_NETWORKS} addresses at most, and these are "
            f"{len(networks)}. Leave some out, or name hosts.",
            op="create",
            retryable=False,
        )
    if networks:
        return {"network_allow_list": ",".join(networks)}
    return {"domain_allow_list": ",".join(domains)}


def name(network: bool | Sequence[str] | None) -> str:
    """For the record of an attempt."""
    return "the organisation's" if network is None else network_kind(network)
