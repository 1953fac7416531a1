# SPDX-License-Identifier: Apache-2.0
"""The rows that the agent makes from the connections that a node knows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

import pytest
from memory_maps import MemoryMap, memory_maps

from netpol_ebpf.agent import adoption
from netpol_ebpf.agent.adoption import (
    NO_GENERATION,
    Adoption,
    LiveConnections,
    NodeAddresses,
    Workload,
    old_connections,
)
from netpol_ebpf.errors import PlatformError
from netpol_ebpf.policy.types import ICMP, TCP, UDP, VipKey
from netpol_loader import abi
from netpol_loader.host.conntrack import Ends, Tracked
from netpol_loader.host.sockets import Opened, Sockets

WEB, DB, NODE, OUTSIDE, VIP = (ip_address(f"10.0.0.{last}") for last in (1, 2, 100, 200, 250))
WORKLOADS = {5: Workload(11, [WEB], 1), 6: Workload(12, [DB], 2)}
PLACE = NodeAddresses([NODE], [VipKey(VIP, TCP, 80)])
IN, OUT = abi.NP_DIRECTION_INGRESS, abi.NP_DIRECTION_EGRESS


def ends(source: object, destination: object, source_port: int = 4000, destination_port: int = 80) -> Ends:
    return Ends(ip_address(str(source)), ip_address(str(destination)), source_port, destination_port)


def plain(one: Ends, protocol: int = TCP) -> Tracked:
    """A connection without translation, with packets in both directions."""
    return Tracked(protocol, one, one.reversed(), is_replied=True)


@dataclass
class Node:
    """A node that knows the given connections."""

    live: LiveConnections
    maps: Mapping[str, MemoryMap] = field(default_factory=lambda: memory_maps([]))
    asked: list[set[int]] = field(default_factory=list)

    def live_connections(self, namespaces: Collection[int]) -> LiveConnections:
        self.asked.append(set(namespaces))
        return self.live


def seen(*tracked: Tracked, opened: Collection[Opened] = ()) -> set[tuple[int, int, Ends, int]]:
    """The rows made from the connections, as (number, direction, ends, flags)."""
    found = old_connections(LiveConnections(tracked, opened), WORKLOADS.values(), PLACE)
    return {(one.number, one.direction, one.ends, one.flags) for one in found}


def rows(node: Node) -> dict[str, int]:
    """The number of rows in each table of connections."""
    return {
        name: len(one.rows)
        for name, one in node.maps.items()
        if name in {*abi.UNREPLIED_VIEWS, *abi.UNREPLIED_VIEWS.values()} and one.rows
    }


def test_both_ends_see_a_connection_each_in_its_direction() -> None:
    """A connection between two workloads gets two rows, one with the outside only the workload's row."""
    assert seen(plain(ends(WEB, DB))) == {(11, OUT, ends(WEB, DB), 0), (12, IN, ends(WEB, DB), 0)}
    assert seen(plain(ends(OUTSIDE, DB))) == {(12, IN, ends(OUTSIDE, DB), 0)}
    assert seen(plain(ends(OUTSIDE, NODE))) == set()
    assert seen(plain(ends(WEB, DB), ICMP)) == set()


def test_each_end_sees_its_side_of_a_translation() -> None:
    """The sender's row has the service, with a deferred verdict.

    The receiver's row has the backend and the node's address.
    """
    one = Tracked(TCP, ends(WEB, VIP), ends(DB, NODE, 7000, 61000), is_replied=True)
    deferred = abi.NP_CONN_DEFERRED | abi.NP_CONN_TAGGED
    assert seen(one) == {(11, OUT, ends(WEB, VIP), deferred), (12, IN, ends(NODE, DB, 61000, 7000), 0)}


def test_what_the_node_or_the_workload_itself_opened_is_exempt() -> None:
    """Such connections are exempt, as for a program that sees them from the beginning."""
    assert seen(plain(ends(NODE, DB))) == {(12, IN, ends(NODE, DB), abi.NP_CONN_EXEMPT)}
    hairpin = Tracked(TCP, ends(DB, VIP), ends(DB, NODE, 7000, 61000), is_replied=True)
    assert (12, IN, ends(NODE, DB, 61000, 7000), abi.NP_CONN_EXEMPT) in seen(hairpin)


def test_sockets_of_a_workload_speak_of_no_other() -> None:
    """The sockets of a namespace make rows only for the workload in it, those of the node for all workloads."""
    assert seen(opened=[Opened(ends(WEB, DB), 1)]) == {(11, OUT, ends(WEB, DB), 0)}
    assert seen(opened=[Opened(ends(OUTSIDE, DB), 1)]) == set()
    assert seen(opened=[Opened(ends(NODE, DB))]) == {(12, IN, ends(NODE, DB), abi.NP_CONN_EXEMPT)}


def test_rows_are_of_no_generation_and_tracking_goes_before_sockets() -> None:
    """Policy judges the next packet, in the direction from tracking. A connection without an answer is unreplied."""
    unreplied = Tracked(UDP, ends(OUTSIDE, DB), ends(DB, OUTSIDE, 80, 4000), is_replied=False)
    lie = Opened(ends(DB, WEB, 80, 4000), 2)
    node = Node(LiveConnections([plain(ends(WEB, DB)), unreplied], [lie], 77))
    old = Adoption({6})
    old.go_ahead(node, WORKLOADS, PLACE)
    assert rows(node) == {"np_conn4": 1, "np_unreplied4": 1}
    ((key, value),) = node.maps["np_conn4"].rows.items()
    row, place = abi.np_conn.from_buffer_copy(value), abi.np_conn4_key.from_buffer_copy(key)
    assert (row.generation, row.direction, row.state, row.seen_jiffies) == (NO_GENERATION, IN, abi.NP_CONN_TCP_OPEN, 77)
    assert (place.endpoint, bytes(place.local), bytes(place.remote)) == (12, DB.packed, WEB.packed)
    assert (place.local_port, place.remote_port, place.protocol) == (80, 4000, TCP)
    assert node.asked == [{2}]


def test_connections_to_services_come_last() -> None:
    """Before the programs are attached they are left out, because the program adopts services last.

    Each interface has both turns once.
    """
    node = Node(LiveConnections([Tracked(TCP, ends(WEB, VIP), ends(DB, WEB, 7000, 4000), is_replied=True)]))
    old = Adoption({5})
    old.go_behind(node, WORKLOADS, PLACE)
    assert node.asked == []
    old.go_ahead(node, WORKLOADS, PLACE)
    assert rows(node) == {}
    old.go_behind(node, WORKLOADS, PLACE)
    assert rows(node) == {"np_conn4": 1}
    old.go_ahead(node, WORKLOADS, PLACE)
    old.go_behind(node, WORKLOADS, PLACE)
    assert len(node.asked) == 2


def test_what_the_program_learned_is_kept_unless_it_took_an_answer_for_a_request() -> None:
    """After the programs are attached, a row of the same direction stays. One of the other direction is replaced."""
    node = Node(LiveConnections([plain(ends(WEB, DB))]))
    old = Adoption({6})
    old.go_ahead(node, WORKLOADS, PLACE)
    (key,) = node.maps["np_conn4"].rows
    for direction, generation in ((IN, 9), (OUT, NO_GENERATION)):
        node.maps["np_conn4"].rows[key] = bytes(abi.np_conn(direction=direction, generation=9))
        old.expect({6})
        old.go_ahead(node, WORKLOADS, PLACE)
        row = abi.np_conn.from_buffer_copy(node.maps["np_conn4"].rows[key])
        assert (row.direction, row.generation) == (IN, generation)


def test_no_more_than_a_share_of_a_table_is_filled_and_the_rest_is_told() -> None:
    """Too many connections, and connections that the kernel does not report, are warnings."""
    flood = [plain(ends(OUTSIDE, DB, port)) for port in range(1, 11)]
    node = Node(LiveConnections(flood, unknown=["no tracking"]))
    node.maps["np_conn4"].max_entries = 8
    old = Adoption({6})
    old.go_ahead(node, WORKLOADS, PLACE)
    assert rows(node) == {"np_conn4": 4}
    assert {one.severity for one in old.warnings.values()} == {"warning"}
    first, second = old.warnings
    assert "no tracking" in first
    assert "6 connections" in second


def test_kernel_that_cannot_tell_is_reported_and_no_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tracking, unreadable sockets are a loss and are reported. With tracking, they are none."""

    def refuse() -> Iterator[Tracked]:
        raise PlatformError("no tracking here")

    monkeypatch.setattr(adoption, "read_jiffies", lambda: 7)
    monkeypatch.setattr(adoption, "look_for_sockets", lambda _ids: Sockets([Opened(ends(WEB, DB), 1)], ["no sockets"]))
    monkeypatch.setattr(adoption, "tracked", refuse)
    assert adoption.look_at_connections([1]) == LiveConnections(
        [], [Opened(ends(WEB, DB), 1)], 7, ["no tracking here", "no sockets"]
    )
    one = plain(ends(WEB, DB))
    monkeypatch.setattr(adoption, "tracked", lambda: iter([one]))
    assert adoption.look_at_connections([1]) == LiveConnections([one], [Opened(ends(WEB, DB), 1)], 7, [])
