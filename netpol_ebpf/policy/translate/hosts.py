# SPDX-License-Identifier: Apache-2.0
"""Settings of host endpoints from Calico's configuration objects: failsafe ports, automatic host endpoints.

SEMANTICS 4.6, 1.3 and 1.10 specify them.  Automatic host endpoints get the names, addresses and labels that Calico's
controller gives them.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from netpol_ebpf.policy.journey import WILDCARD
from netpol_ebpf.policy.translate.endpoints import DEFAULT_ALLOW, HOST_ENDPOINT, host_endpoint
from netpol_ebpf.policy.types import Direction, Endpoint, EndpointKey, Failsafe, IPAddress, PolicySettings
from netpol_ebpf.resources import types as resources
from netpol_ebpf.resources.calico_configuration import DEFAULT, NODE_PREFIX
from netpol_ebpf.resources.syntax import MAX_NAME

CREATED_BY = "projectcalico.org/created-by"
CONTROLLER = "calico-kube-controllers"
"""Value of the label CREATED_BY. It distinguishes an automatic host endpoint from a user's host endpoint."""

_SUFFIX = "auto-hep"


def with_failsafes(settings: PolicySettings, configurations: Iterable[resources.FelixConfiguration]) -> PolicySettings:
    """``settings`` with the failsafe lists of ``configurations``. A list that no configuration gives is unchanged."""
    of_nodes: dict[tuple[str, Direction], tuple[Failsafe, ...]] = {}
    for one in configurations:
        inbound, outbound = _failsafes(one.failsafe_inbound), _failsafes(one.failsafe_outbound)
        if one.meta.name == DEFAULT:
            settings = replace(
                settings,
                failsafe_inbound=settings.failsafe_inbound if inbound is None else inbound,
                failsafe_outbound=settings.failsafe_outbound if outbound is None else outbound,
            )
        elif one.meta.name.startswith(NODE_PREFIX):
            node = one.meta.name.removeprefix(NODE_PREFIX)
            given = ((Direction.INGRESS, inbound), (Direction.EGRESS, outbound))
            of_nodes.update({(node, direction): ports for direction, ports in given if ports is not None})
    return replace(settings, node_failsafes=of_nodes)


def _failsafes(ports: tuple[resources.FailsafePort, ...] | None) -> tuple[Failsafe, ...] | None:
    return None if ports is None else tuple(Failsafe(one.protocol, one.port, one.net) for one in ports)


def automatic_hosts(
    configuration: resources.KubeControllersConfiguration, node: resources.Node
) -> dict[EndpointKey, Endpoint]:
    """The automatic host endpoints of a node. Of two with the same name, the first is used."""
    found: dict[EndpointKey, Endpoint] = {}
    for host in _automatic(configuration, node):
        key = EndpointKey(HOST_ENDPOINT, "", host.meta.name)
        found.setdefault(key, host_endpoint(key, host, lambda _: {}))  # their profile has no labels
    return found


def _automatic(
    configuration: resources.KubeControllersConfiguration, node: resources.Node
) -> Iterator[resources.HostEndpoint]:
    if not configuration.creates_hosts:
        return
    addresses = _expected_addresses(node)
    if configuration.creates_default:
        yield _host(node, (), {}, WILDCARD, addresses)
    for template in configuration.templates:
        if template.node_selector is not None and not template.node_selector.matches(node.meta.labels):
            continue
        inside = [address for address in addresses if any(address in net for net in template.nets)]
        if template.pattern is None:
            if inside:  # without an address, nothing identifies the interface
                yield _host(node, (template.name,), template.labels, None, inside)
            continue
        pattern = re.compile(template.pattern, re.ASCII)
        for interface in node.interfaces:
            if pattern.search(interface.name):
                expected = dict.fromkeys((*inside, *interface.addresses))
                yield _host(node, (template.name, interface.name), template.labels, interface.name, expected)


def _expected_addresses(node: resources.Node) -> list[IPAddress]:
    """A node's addresses, and the addresses of its interfaces.

    External addresses of the Node object count only if an interface has them.
    """
    own = [address for address in node.addresses if address not in node.external]
    return list(dict.fromkeys((*own, *(address for one in node.interfaces for address in one.addresses))))


def _host(
    node: resources.Node, parts: tuple[str, ...], labels: Mapping[str, str],
    interface: str | None, addresses: Iterable[IPAddress],
) -> resources.HostEndpoint:  # fmt: skip
    """An automatic host endpoint. ``parts``: the parts of its name between the node's name and the suffix."""
    meta = resources.Meta(
        _name("-".join((node.meta.name, *parts, _SUFFIX))),
        "",
        {**node.meta.labels, **labels, CREATED_BY: CONTROLLER},
        node.meta.location,
    )
    return resources.HostEndpoint(meta, node.meta.name, interface, tuple(addresses), (DEFAULT_ALLOW,), ())


def _name(name: str) -> str:
    """The name of an automatic host endpoint: ``name``, or its hash with the suffix if ``name`` is too long.

    Calico's controller makes the same names.
    """
    if len(name) <= MAX_NAME:
        return name
    digest = base64.urlsafe_b64encode(hashlib.sha256(name.encode()).digest()).decode().rstrip("=")
    return f"{re.sub('[-_.]', '', digest)}-{_SUFFIX}".lower()
