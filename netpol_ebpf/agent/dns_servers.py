# SPDX-License-Identifier: Apache-2.0
"""The DNS servers whose answers the program believes, and the addresses that it never learns from them.

A server is an address with a port, or a service: then the service's cluster addresses and its backends are servers, as
one or the other is what a workload's packets have, depending on where the cluster translates services.

Invariant: the result depends on the options and the objects alone. This module writes no maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network

from netpol_ebpf.errors import Location, Problem, UsageError
from netpol_ebpf.policy.types import UDP, IPAddress, IPNetwork, ResourceKey, World
from netpol_ebpf.resources.types import Resource, Service

SLUG = "dns-servers"
DOMAIN_PORT = 53
SERVICE_PREFIX = "k8s-service:"
DEFAULT_NAMESPACE = "kube-system"
DEFAULT_SERVERS = ("k8s-service:kube-dns",)
OTHER_PORTS = 4
"""Largest number of ports besides 53 that DNS servers may have (``np_config.dns_ports``)."""
NEVER_LEARNED: tuple[IPNetwork, ...] = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/32", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4",
        "::/128", "::1/128", "fe80::/10", "ff00::/8",
    )
)  # fmt: skip
"""Unspecified, loopback, link-local and multicast addresses, as `policy.domain_names.is_never_learned`. The program itself
refuses IPv4-mapped IPv6 addresses."""


@dataclass(frozen=True, slots=True)
class DnsServer:
    """One value of the option ``--dns-server``: an address, or a service.

    ``port``: for an address its port; for a service the number of the service's port; None: 53 if the service has it,
    otherwise its first port with UDP.
    """

    address: IPAddress | None = None
    service: tuple[str, str] | None = None
    port: int | None = None

    def __str__(self) -> str:
        if self.service is not None:
            namespace, name = self.service
            return f"{SERVICE_PREFIX}{namespace}/{name}" + ("" if self.port is None else f":{self.port}")
        host = f"[{self.address}]" if isinstance(self.address, IPv6Address) else str(self.address)
        return f"{host}:{self.port}"


def parse_dns_server(text: str) -> DnsServer:
    """Parse ``ADDRESS[:PORT]``, ``[ADDRESS]:PORT`` or ``k8s-service:[NAMESPACE/]NAME[:PORT]``.

    Raises UsageError.
    """
    try:
        if text.startswith(SERVICE_PREFIX):
            return _service(text.removeprefix(SERVICE_PREFIX))
        host, port = text, ""
        if text.startswith("["):
            host, _, port = text[1:].partition("]")
            host, port = (host, port.removeprefix(":")) if port[:1] in ("", ":") else ("", "")
        elif text.count(":") == 1:
            host, _, port = text.partition(":")
        return DnsServer(ip_address(host), port=_port(port) if port else DOMAIN_PORT)
    except ValueError:
        raise UsageError(
            f"--dns-server {text}: must be ADDRESS, ADDRESS:PORT, [ADDRESS]:PORT or {SERVICE_PREFIX}[NAMESPACE/]NAME[:PORT]"
        ) from None


def _service(text: str) -> DnsServer:
    """Parse ``[NAMESPACE/]NAME[:PORT]``. Raises ValueError."""
    path, _, port = text.partition(":")
    namespace, slash, name = path.partition("/")
    pair = (namespace, name) if slash else (DEFAULT_NAMESPACE, path)
    if not all(pair):
        raise ValueError(f"{text} names no service")
    return DnsServer(service=pair, port=_port(port) if port else None)


def _port(text: str) -> int:
    port = int(text)
    if not 0 < port <= 65535:  # noqa: PLR2004  # the largest port
        raise ValueError(f"{port} is no port")
    return port


@dataclass(frozen=True, slots=True)
class DnsInputs:
    """What the packet path must know of DNS servers.

    ``resolvers``: (address, port) of each server.
    ``unlearned``: prefixes whose addresses are never learned.
    ``own``: addresses of nodes and services, which are never learned either.
    """

    resolvers: frozenset[tuple[IPAddress, int]] = frozenset()
    unlearned: frozenset[IPNetwork] = frozenset()
    own: frozenset[IPAddress] = frozenset()

    def is_refused(self, address: IPAddress) -> bool:
        """Whether the address is never learned."""
        return address in self.own or any(address in net for net in self.unlearned)

    @property
    def other_ports(self) -> tuple[int, ...]:
        """The servers' ports besides 53, in ascending order."""
        return tuple(sorted({port for _, port in self.resolvers} - {DOMAIN_PORT}))


NO_DNS = DnsInputs()


class DnsServers:
    """Finds the servers of the options in the objects.

    ``missing``: the services that do not exist or have no address, as last looked up.
    """

    def __init__(
        self,
        servers: Sequence[DnsServer],
        unlearned: Iterable[IPNetwork],
        get: Callable[[ResourceKey], Resource | None],
    ) -> None:
        """``unlearned``: further prefixes that are never learned. ``get``: returns the object of a key."""
        self.missing: tuple[DnsServer, ...] = ()
        self._servers = tuple(servers)
        self._unlearned = frozenset((*unlearned, *NEVER_LEARNED))
        self._get = get

    def inputs(self, world: World) -> DnsInputs:
        """The servers and the refused prefixes for the present objects. Cost: linear in nodes and service addresses."""
        found: set[tuple[IPAddress, int]] = set()
        missing = []
        for server in self._servers:
            addresses = self._addresses(server, world)
            found |= addresses
            if not addresses:
                missing.append(server)
        self.missing = tuple(missing)
        own = {address for node in world.nodes.values() for address in node.addresses}
        own |= {key.address for key in world.vips if key.address is not None}
        return DnsInputs(frozenset(found), self._unlearned, frozenset(own))

    def _addresses(self, server: DnsServer, world: World) -> set[tuple[IPAddress, int]]:
        if server.address is not None:
            return {(server.address, server.port or DOMAIN_PORT)}
        if server.service is None:
            raise AssertionError("a server is an address or a service")
        found: set[tuple[IPAddress, int]] = set()
        service = self._get(ResourceKey("Service", *server.service))
        if isinstance(service, Service):
            ports = [one.port for one in service.ports if one.protocol == UDP]
            chosen = server.port or (DOMAIN_PORT if DOMAIN_PORT in ports else ports[0] if ports else DOMAIN_PORT)
            found |= {(address, chosen) for address in service.cluster_ips}
        backends = world.services.get(server.service)
        if backends is not None:
            found |= {(one.address, one.port) for one in backends.backends if one.protocol == UDP and one.port}
        return found

    def problems(self, inputs: DnsInputs, *, is_used: bool) -> list[Problem]:
        """What keeps the program from learning names. ``is_used``: rules with domain names apply to workloads here."""
        if not is_used:
            return []
        found = [
            f"the DNS server {server} is not known: answers of it teach no names, so rules with domain names do not match"
            for server in self.missing
        ]
        if len(inputs.other_ports) > OTHER_PORTS:
            ports = ", ".join(map(str, inputs.other_ports[OTHER_PORTS:]))
            found.append(
                f"DNS servers have more than {OTHER_PORTS} ports besides 53: answers from port {ports} are not read"
            )
        problems = [Problem(Location(""), "", message, severity="warning", slug=SLUG) for message in found]
        if not inputs.resolvers:
            message = "no DNS server is known (--dns-server): rules with domain names match nothing"
            problems.append(Problem(Location(""), "", message, slug=SLUG))
        return problems
