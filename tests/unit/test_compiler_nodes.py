# SPDX-License-Identifier: Apache-2.0
"""The node of an address, and the nodes with numbers."""

from __future__ import annotations

import random
from ipaddress import ip_address

import pytest

from netpol_ebpf.compiler import Compiler, Limits
from netpol_ebpf.compiler.tables import FIRST_NODE
from netpol_ebpf.errors import LimitError
from netpol_ebpf.policy.types import ClusterNode, Endpoint, EndpointKey, EndpointKind

HERE = "here"


def compiler(*objects: Endpoint | ClusterNode, limits: Limits | None = None) -> Compiler:
    """A compiler for the node HERE, with these objects in force."""
    one = Compiler(lambda endpoint: endpoint.node == HERE, limits=limits)
    change(one, *objects)
    return one


def change(one: Compiler, *objects: Endpoint | ClusterNode) -> None:
    """Put these objects in force, too."""
    for each in objects:
        one.upsert(each)
    one.commit()


def endpoint(name: str, node: str | None, *addresses: str, kind: EndpointKind = EndpointKind.WORKLOAD) -> Endpoint:
    """A workload or host on a node."""
    return Endpoint(EndpointKey(kind.value, "", name), kind, {}, tuple(map(ip_address, addresses)), node=node)


def node(name: str, *addresses: str) -> ClusterNode:
    """A node with these addresses."""
    return ClusterNode(name, {}, tuple(map(ip_address, addresses)))


def node_of(one: Compiler, address: str) -> str | None:
    """The name of the node in the row of an address; None: the row has none."""
    row = one.tables.addresses[ip_address(address)]
    assert not (row.node and row.endpoint)
    names = {number: name for name, number in one.tables.nodes.items()}
    assert all(number >= FIRST_NODE for number in names)
    return names[row.node] if row.node else None


def test_address_elsewhere_is_on_its_node() -> None:
    """This holds for workloads, hosts and the node itself.

    A local address has its own number, one without a node none.
    """
    one = compiler(
        node("there", "172.16.0.2"), node(HERE, "172.16.0.1"), endpoint("far", "there", "10.0.0.2", "fd00::2"),
        endpoint("host", "there", "172.16.0.9", kind=EndpointKind.HOST), endpoint("near", HERE, "10.0.0.1"),
        endpoint("lost", None, "10.0.0.3"), endpoint("unheard", "nowhere", "10.0.0.4"),
    )  # fmt: skip
    for address in ("10.0.0.2", "fd00::2", "172.16.0.9", "172.16.0.2"):
        assert node_of(one, address) == "there"
    for address in ("10.0.0.1", "10.0.0.3", "10.0.0.4"):
        assert node_of(one, address) is None
    assert one.tables.addresses[ip_address("10.0.0.1")].endpoint


def test_rows_follow_workloads_that_move() -> None:
    """They move to another node, to this one, and away."""
    one = compiler(node("a", "172.16.0.1"), node("b", "172.16.0.2"), endpoint("pod", "a", "10.0.0.1"))
    for place in ("b", HERE, "a", None, "b"):
        change(one, endpoint("pod", place, "10.0.0.1"))
        assert node_of(one, "10.0.0.1") == (None if place == HERE else place)
    change(one, endpoint("pod", "b", "10.0.0.2"), endpoint("heir", "a", "10.0.0.1"))
    assert [node_of(one, f"10.0.0.{last}") for last in (1, 2)] == ["a", "b"]


def test_rows_follow_nodes() -> None:
    """Nodes come after their workloads, lose their addresses, and come again with a new number."""
    one = compiler(endpoint("pod", "a", "10.0.0.1"), endpoint("other", "b", "10.0.0.2"), node("b", "172.16.0.2"))
    numbers = set()
    for addresses in (("172.16.0.1",), (), ("172.16.0.9", "fd00::9"), ()):
        change(one, node("a", *addresses))
        assert node_of(one, "10.0.0.1") == ("a" if addresses else None)
        assert node_of(one, "10.0.0.2") == "b"
        numbers.add(one.tables.nodes.get("a"))
    assert len(numbers) == 3
    change(one, node("a", "172.16.0.1"))
    kept = one.tables.nodes["a"]
    change(one, node("a", "172.16.0.3"))
    assert one.tables.nodes["a"] == kept
    one.remove(ClusterNode, "a")
    one.commit()
    assert node_of(one, "10.0.0.1") is None
    assert "a" not in one.tables.nodes


def test_nodes_that_share_an_address_are_not_told_apart() -> None:
    """Two Node objects of one machine. Neither has a number while both have the address."""
    one = compiler(
        node("old", "172.16.0.1"), node("b", "172.16.0.2"), endpoint("pod", "old", "10.0.0.1"),
        endpoint("next", "new", "10.0.0.2"), endpoint("other", "b", "10.0.0.3"),
    )  # fmt: skip
    change(one, node("new", "172.16.0.1", "fd00::1"))
    assert [node_of(one, f"10.0.0.{last}") for last in (1, 2, 3)] == [None, None, "b"]
    one.remove(ClusterNode, "old")
    one.commit()
    assert [node_of(one, f"10.0.0.{last}") for last in (1, 2, 3)] == [None, "new", "b"]


def test_address_of_two_nodes_is_on_none() -> None:
    """Two workloads on different nodes have it. On one node there is no conflict."""
    one = compiler(node("a", "172.16.0.1"), node("b", "172.16.0.2"), endpoint("x", "a", "10.0.0.1"))
    for place, found in (("b", None), ("a", "a")):
        change(one, endpoint("y", place, "10.0.0.1"))
        assert node_of(one, "10.0.0.1") == found


def test_refused_change_leaves_numbers_as_they_were() -> None:
    """A commit that exceeds a limit changes no numbers of nodes."""
    one = compiler(node("a", "172.16.0.1"), endpoint("pod", "a", "10.0.0.1"), limits=Limits(addresses=3))
    before = one.canonical()
    with pytest.raises(LimitError):
        change(one, node("a"), node("b", "172.16.0.2", "172.16.0.3", "172.16.0.4"), endpoint("pod", "b", "10.0.0.1"))
    assert one.canonical() == before
    change(one, endpoint("pod", "a", "10.0.0.2"))
    assert node_of(one, "10.0.0.2") == "a"


@pytest.mark.parametrize("seed", range(20))
def test_any_history_gives_the_same_tables(seed: int) -> None:
    """Nodes and workloads are added, moved and removed in any order. The result is that of a new compiler."""
    chance = random.Random(seed)
    one, left = compiler(), {}
    for _ in range(60):
        for _ in range(chance.randrange(1, 4)):
            if chance.random() < 0.4:
                addresses = chance.sample([f"172.16.0.{last}" for last in range(1, 6)], chance.randrange(3))
                new: Endpoint | ClusterNode = node(chance.choice((HERE, "a", "b", "c")), *addresses)
                key = type(new), new.name  # type: ignore[union-attr]  # a node
            else:
                addresses = chance.sample([f"10.0.0.{last}" for last in range(1, 6)], chance.randrange(1, 3))
                kind = chance.choice((EndpointKind.WORKLOAD, EndpointKind.WORKLOAD, EndpointKind.HOST))
                name, place = chance.choice("xyz"), chance.choice((None, HERE, "a", "b", "c"))
                new = endpoint(name, place, *addresses, kind=kind)
                key = type(new), new.key
            if chance.random() < 0.2:
                one.remove(*key)
                left.pop(key, None)
            else:
                one.upsert(new)
                left[key] = new
        one.commit()
    assert one.canonical() == compiler(*left.values()).canonical()
