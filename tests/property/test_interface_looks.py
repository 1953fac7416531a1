# SPDX-License-Identifier: Apache-2.0
"""A look with settled assignments decides the same as a look without: whatever changed, in whatever order."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings

from netpol_ebpf.agent.assignments import InterfaceAssignments, LocatedEndpoints
from netpol_ebpf.agent.derived_names import derived_hash
from netpol_ebpf.agent.wiring import NOWHERE, Interface, Wiring
from netpol_ebpf.policy.types import Endpoint, EndpointKey, EndpointKind, IPAddress

PODS = [EndpointKey("Pod", "shop", name) for name in ("web", "db", "cache", "queue", "mail")]
ADDRESSES = [ip_address(f"10.0.0.{last}") for last in range(1, 6)] + [
    ip_address(f"fd00::{last}") for last in range(1, 4)
]
NUMBERS = range(2, 10)
NAMES = ["eth0", "vetha", "vethb", "vethc", "own0", *(f"cali{derived_hash(key)}" for key in PODS)]
NETS = [ip_network("10.0.0.0/30"), ip_network("10.0.0.0/24")]


@dataclass
class Node:
    """The inputs of a look, in objects that stay as long as nothing about them changes."""

    links: dict[int, Interface] = field(default_factory=dict)
    routes: dict[IPAddress, int] = field(default_factory=dict)
    peers: dict[tuple[int, int], tuple[IPAddress, ...]] = field(default_factory=dict)
    sets: dict[str, frozenset[int]] = field(
        default_factory=lambda: dict.fromkeys(("uplinks", "next_hops", "shared"), frozenset())
    )
    subnets: dict[Any, frozenset[int]] = field(default_factory=dict)
    endpoints: dict[EndpointKey, Endpoint] = field(default_factory=dict)
    results: dict[EndpointKey, set[str]] = field(default_factory=dict)
    stated: list[IPAddress] = field(default_factory=list)
    contested: set[EndpointKey] = field(default_factory=set)

    def look(self, assignments: InterfaceAssignments) -> LocatedEndpoints:
        """Look at the node as it is now."""
        wiring = Wiring(
            dict(self.links), dict(self.routes), peer_addresses=dict(self.peers), subnets=dict(self.subnets),
            addresses={ADDRESSES[0]: 2, ADDRESSES[1]: 3}, **self.sets,
        )  # fmt: skip
        return assignments.look(
            wiring,
            list(self.endpoints.values()),
            node_addresses=list(self.stated),
            results={key: set(names) for key, names in self.results.items()},
            is_contested=self.contested.__contains__,
        )


def veth(number: int, name: str | None = None) -> Interface:
    return Interface(number, name or f"veth{number}", "veth", (number, 2))


def settled() -> Node:
    """A node with two pods that have their interfaces."""
    node = Node({2: Interface(2, "eth0", "veth", (0, 2)), 3: veth(3), 4: veth(4)}, {ADDRESSES[0]: 3, ADDRESSES[1]: 4})
    node.sets["uplinks"] = frozenset({2})
    node.endpoints = {
        PODS[number]: Endpoint(PODS[number], EndpointKind.WORKLOAD, {}, (ADDRESSES[number],)) for number in (0, 1)
    }
    return node


ORDINARY = ("link", "link", "route", "route", "peer", "pod", "pod", "newborn")
RARE = ("again", "forget", "node", "subnet", "result", "result", "stated", "contested", "expect")


@st.composite
def changes(draw: st.DrawFn) -> Callable[[Node, list[InterfaceAssignments]], None]:
    """One change of a node; most often a step of a pod that comes: its object, interface, route, or first address."""
    kind = draw(st.sampled_from([*ORDINARY, *ORDINARY, *RARE]))
    at = draw(st.integers(0, len(PODS) - 1))
    key, number, address = PODS[at], 3 + at, ADDRESSES[at]
    addresses: tuple[IPAddress, ...] = (address,)
    link, name, interface, is_there = veth(number), f"veth{number}", None, True
    if draw(st.integers(0, 3)) == 0:  # it concerns another pod, or vanishes
        number = draw(st.sampled_from([number, number, *NUMBERS]))
        name = draw(st.sampled_from([name, *NAMES]))
        link = draw(st.sampled_from([veth(number), veth(number, name), Interface(number, name, "tun")]))
        addresses = draw(st.sampled_from([addresses, (), (ADDRESSES[at], ADDRESSES[at - 1]), (ADDRESSES[-1],)]))
        interface = draw(st.sampled_from([None, None, name]))
        is_there = draw(st.sampled_from([True, True, False]))
    some = draw(st.sampled_from([frozenset(), frozenset({2}), frozenset({number}), frozenset({2, number})]))
    which, net = draw(st.sampled_from(["uplinks", "next_hops", "shared"])), draw(st.sampled_from(NETS))

    def put(table: dict[Any, Any], at: Any, value: Any) -> None:
        if is_there:
            table[at] = value
        else:
            table.pop(at, None)

    def change(node: Node, both: list[InterfaceAssignments]) -> None:
        if kind == "link":
            put(node.links, number, link)
        elif kind == "newborn" and number not in node.links:
            node.links[number] = link
            assert len({one.close_newborn(link) for one in both}) == 1
        elif kind == "forget":
            for one in both:
                one.forget([number])
        elif kind == "expect":
            for one in both:
                one.expect(key, number if number in node.links else NOWHERE)
        elif kind == "route":
            put(node.routes, address, number)
        elif kind == "peer":
            put(node.peers, (number, 2), addresses)
        elif kind == "pod":
            put(node.endpoints, key, Endpoint(key, EndpointKind.WORKLOAD, {}, addresses, interface=interface))
        elif kind == "node":
            node.sets[which] = some
        elif kind == "subnet":
            put(node.subnets, net, some)
        elif kind == "result":
            put(node.results, key, {name} if addresses else set())
        elif kind == "stated":
            node.stated = list(addresses)
        elif kind == "contested":
            node.contested ^= {key}

    return change


def saved(assignments: InterfaceAssignments, home: Path) -> Any:
    """The facts that the next agent would read."""
    assignments.save(home / "interfaces")
    return json.loads((home / "interfaces").read_text(encoding="utf-8"))


OPTIONS = st.sampled_from([((), ()), ((), ()), ((), ("own*",)), (("veth*", "cali*"), ())])


@settings(max_examples=max(300, settings.default.max_examples))
@given(OPTIONS, st.booleans(), st.lists(st.lists(changes(), min_size=1, max_size=3), min_size=1, max_size=20))
def test_look_with_settled_assignments_decides_as_one_from_nothing(
    options: tuple[tuple[str, ...], tuple[str, ...]],
    is_empty: bool,  # noqa: FBT001 - drawn
    rounds: list[list[Callable[[Node, list[InterfaceAssignments]], None]]],
) -> None:
    """After each change: interfaces, evidence, problems, doubts, roles, and the file for the next agent."""
    node = Node() if is_empty else settled()
    both = [InterfaceAssignments(*options) for _ in range(2)]
    with tempfile.TemporaryDirectory() as name:
        for turn in [[], [], *rounds]:
            for change in turn:
                change(node, both)
            both[1] = both[1].unsettled()
            assert node.look(both[0]) == node.look(both[1])
            assert both[0].differences(both[1]) == []
            assert both[0].is_dirty == both[1].is_dirty
            assert saved(both[0], Path(name)) == saved(both[1], Path(name))
            assert both[0].workloads == both[1].workloads
