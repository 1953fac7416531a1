# SPDX-License-Identifier: Apache-2.0
"""Open TCP connections as sockets show them, in this namespace and at the other ends of veth pairs; bound sockets.

The agent uses this on kernels without connection tracking. A socket does not tell which side opened its connection. If
another socket listens on the same port, the connection counts as accepted, otherwise as opened by this side. So a
server that has stopped listening counts as a client.

A socket is visible only in its own network namespace, and the kernel cannot list the sockets of another namespace by
the namespace's id. So a thread looks through the named namespaces and those of all processes. It enters the ones that
it needs, and then ends.

Invariant: the module only reads, and no other thread changes its namespace. The module must not know endpoints or
policy.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from netpol_ebpf.errors import PlatformError, PrivilegeError
from netpol_loader.host.address import IPAddress
from netpol_loader.host.conntrack import TCP, Ends
from netpol_loader.host.netlink import SOCK_DIAG, Channel, NetlinkError, RouteChannel, attribute, attributes

NAMED = Path("/run/netns")
PROCESSES = Path("/proc")
CLONE_NEWNET = 0x4000_0000  # linux/sched.h; os.setns comes with Python 3.12

# include/uapi/linux/netlink.h, sock_diag.h, inet_diag.h, net_namespace.h, rtnetlink.h; include/net/tcp_states.h
_SOCK_DIAG_BY_FAMILY = 20
_RTM_NEWNSID, _RTM_GETNSID = 88, 90
_NETNSA_NSID, _NETNSA_FD = 1, 3
_UDP = 17
_CLOSE, _LISTEN = 7, 10  # a UDP socket without a peer is in the state TCP_CLOSE
_OPEN_STATES = (1, 4, 5, 8, 9)  # ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK
_REQUEST = struct.Struct("=BBBBI48x")  # struct inet_diag_req_v2
_ANSWER = struct.Struct("=BBBB2s2s16s16s")  # the beginning of struct inet_diag_msg


@dataclass(frozen=True, slots=True)
class Opened:
    """An open TCP connection.

    ``ends``: tuple of the connection's first packet. ``namespace``: id of the socket's namespace; None: this namespace.
    """

    ends: Ends
    namespace: int | None = None


@dataclass(slots=True)
class Sockets:
    """The connections that were found. ``unseen``: texts that say why some sockets could not be read."""

    opened: list[Opened] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)


def look_for_sockets(namespace_ids: Collection[int]) -> Sockets:
    """The open TCP connections of this namespace, and of the namespaces with the given ids."""
    found = Sockets()
    try:
        found.opened += [Opened(ends) for ends in tcp_sockets()]
    except NetlinkError as error:
        found.unseen.append(f"the kernel does not list this node's sockets: {os.strerror(error.code)}")
    missing = set(namespace_ids)
    if missing:
        thread = threading.Thread(target=_look_around, args=(missing, found), name="sockets")
        thread.start()
        thread.join()
    if missing:
        found.unseen.append(f"no process and no name leads to the network namespaces of {len(missing)} interfaces")
    return found


def tcp_sockets() -> list[Ends]:
    """For each open connection in the calling thread's namespace, the tuple of its first packet.

    Raises NetlinkError.
    """
    listening: set[tuple[IPAddress | None, int]] = set()
    pairs: list[Ends] = []
    for family in (socket.AF_INET, socket.AF_INET6):
        for state, ends in _dump(family, TCP, (_LISTEN, *_OPEN_STATES)):
            if state != _LISTEN:
                pairs.append(ends)
            else:
                listening.add((None if ends.source.is_unspecified else ends.source, ends.source_port))
    return [
        ends if listening.isdisjoint({(None, ends.source_port), (ends.source, ends.source_port)}) else ends.reversed()
        for ends in pairs
    ]


def bound_sockets() -> frozenset[tuple[int, IPAddress, int]]:
    """(protocol, address, port) of the TCP and UDP sockets of this namespace that accept packets at one address.

    Sockets that are bound to all addresses are left out.  Raises NetlinkError.
    """
    return frozenset(
        (protocol, ends.source, ends.source_port)
        for protocol, state in ((TCP, _LISTEN), (_UDP, _CLOSE))
        for family in (socket.AF_INET, socket.AF_INET6)
        for _, ends in _dump(family, protocol, (state,))
        if not ends.source.is_unspecified and ends.source_port
    )


def _dump(family: int, protocol: int, states: Collection[int]) -> Iterator[tuple[int, Ends]]:
    """The sockets of an address family and protocol in one of the states (include/net/tcp_states.h)."""
    body = _REQUEST.pack(family, protocol, 0, 0, sum(1 << state for state in states))
    with Channel(SOCK_DIAG, "sock_diag") as channel:
        for kind, _, payload in channel.stream(_SOCK_DIAG_BY_FAMILY, body):
            if kind == _SOCK_DIAG_BY_FAMILY:
                yield _parse(payload)


def _parse(payload: bytes) -> tuple[int, Ends]:
    family, state, _, _, source_port, destination_port, source, destination = _ANSWER.unpack_from(payload)
    ports = (int.from_bytes(source_port, "big"), int.from_bytes(destination_port, "big"))
    if family == socket.AF_INET:
        return state, Ends(IPv4Address(source[:4]), IPv4Address(destination[:4]), *ports)
    return state, Ends(_unmapped(IPv6Address(source)), _unmapped(IPv6Address(destination)), *ports)


def _unmapped(address: IPv6Address) -> IPAddress:
    """The IPv4 address in an IPv4-mapped one, which IPv6 sockets have for IPv4 peers; any other address unchanged."""
    return address.ipv4_mapped or address


# --- other namespaces -----------------------------------------------------------------------------------------------


def _look_around(missing: set[int], found: Sockets) -> None:
    """Read the connections of those ``missing`` namespaces that can be found, and remove their ids from ``missing``.

    The calling thread enters these namespaces, and does not return to its own.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.ExitStack() as stack:
        entries: dict[int, int] = {}
        try:
            channel = stack.enter_context(RouteChannel())
            for path in _namespace_files():
                # The process has ended meanwhile, or its namespace has no id that this one can see.
                with contextlib.suppress(OSError, NetlinkError):
                    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                    stack.callback(os.close, fd)
                    number = _id_of(channel, fd)
                    if number in missing:
                        entries.setdefault(number, fd)
            for number, fd in entries.items():
                missing.discard(number)
                if libc.setns(fd, CLONE_NEWNET) != 0:
                    code = ctypes.get_errno()
                    raise (PrivilegeError if code in (1, 13) else PlatformError)(os.strerror(code))
                found.opened += [Opened(ends, number) for ends in tcp_sockets()]
        except (OSError, PlatformError, PrivilegeError) as error:
            missing.clear()
            found.unseen.append(f"the sockets of workloads cannot be looked at: {error}")


def _namespace_files() -> Iterator[Path]:
    """One file for each network namespace that has a name or a process."""
    seen: set[tuple[int, int]] = set()
    named = NAMED.iterdir() if NAMED.is_dir() else ()
    for path in (*named, *PROCESSES.glob("[0-9]*/ns/net")):
        with contextlib.suppress(OSError):
            status = path.stat()
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                yield path


def _id_of(channel: RouteChannel, fd: int) -> int:
    """The id that this namespace has for the namespace of the descriptor ``fd``; -1: none. Raises NetlinkError."""
    for kind, _, payload in channel.ask(_RTM_GETNSID, bytes(4) + attribute(_NETNSA_FD, struct.pack("=i", fd))):
        found = attributes(payload, 4)
        if kind == _RTM_NEWNSID and _NETNSA_NSID in found:
            return int(struct.unpack("=i", found[_NETNSA_NSID])[0])
    return -1
