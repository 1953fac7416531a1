# SPDX-License-Identifier: Apache-2.0
"""Sockets that the kernel lists as bound to one address."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from ipaddress import ip_address

from netpol_ebpf.policy.types import TCP, UDP
from netpol_loader.host.sockets import bound_sockets


def test_sockets_that_accept_packets_at_one_address() -> None:
    """Listening TCP and unconnected UDP, of both families; none with all addresses, none with a peer, none that does not listen."""
    with ExitStack() as stack:

        def bound(address: str, kind: socket.SocketKind) -> socket.socket:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            one = stack.enter_context(socket.socket(family, kind))
            one.bind((address, 0))
            return one

        def port(one: socket.socket) -> int:
            return int(one.getsockname()[1])

        listening = [bound(address, socket.SOCK_STREAM) for address in ("127.0.0.1", "::1", "0.0.0.0", "::")]
        for one in listening:
            one.listen()
        datagram = [bound(address, socket.SOCK_DGRAM) for address in ("127.0.0.1", "::1", "0.0.0.0", "::")]
        silent, connected = bound("127.0.0.1", socket.SOCK_STREAM), bound("127.0.0.1", socket.SOCK_DGRAM)
        connected.connect(datagram[0].getsockname())
        found = bound_sockets()
        for protocol, sockets in ((TCP, listening), (UDP, datagram)):
            of_family = [port(one) for one in sockets]
            assert (protocol, ip_address("127.0.0.1"), of_family[0]) in found
            assert (protocol, ip_address("::1"), of_family[1]) in found
            assert {of_family[2], of_family[3]}.isdisjoint({number for one, _, number in found if one == protocol})
        assert (TCP, ip_address("127.0.0.1"), port(silent)) not in found
        assert (UDP, ip_address("127.0.0.1"), port(connected)) not in found
