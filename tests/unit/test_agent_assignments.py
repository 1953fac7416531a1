# SPDX-License-Identifier: Apache-2.0
"""The assignment of interfaces to endpoints: by which evidence, for how long, in which conflicts.

And doubtful cases.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from netpol_ebpf.agent.assignments import Evidence, InterfaceAssignments, LocatedEndpoints
from netpol_ebpf.agent.derived_names import derived_hash
from netpol_ebpf.agent.wiring import Interface, Wiring
from netpol_ebpf.apply.records import DAMAGED_SUFFIX
from netpol_ebpf.policy.types import Endpoint, EndpointKey, EndpointKind

LO = Interface(1, "lo")
UPLINK = Interface(2, "eth0", "veth", (0, 2))
WEB = Interface(5, "vethweb", "veth", (1, 2))
DB = Interface(6, "vethdb", "veth", (2, 2))
TAP = Interface(7, "tap0", "tun")
BRIDGE = Interface(8, "cni0", "bridge")
LINKS = {link.ifindex: link for link in (LO, UPLINK, WEB, DB, TAP, BRIDGE)}


def key(name: str) -> EndpointKey:
    return EndpointKey("Pod", "shop", name)


def endpoint(name: str, *addresses: str, interface: str | None = None) -> Endpoint:
    return Endpoint(key(name), EndpointKind.WORKLOAD, {}, tuple(map(ip_address, addresses)), interface=interface)


def wiring(
    routes: Mapping[str, int] | None = None,
    peers: Mapping[tuple[int, int], Collection[str]] | None = None,
    subnets: Mapping[str, int] | None = None,
    shared: Collection[int] = (),
) -> Wiring:
    """A node with a default route by eth0.

    ``peers``: addresses at other ends. ``shared``: interfaces with an address of the node.
    """
    return Wiring(
        LINKS,
        {ip_address(address): ifindex for address, ifindex in (routes or {}).items()},
        frozenset({UPLINK.ifindex}),
        {peer: tuple(map(ip_address, addresses)) for peer, addresses in (peers or {}).items()},
        subnets={ip_network(net): frozenset({ifindex}) for net, ifindex in (subnets or {}).items()},
        shared=frozenset(shared),
    )


def names(located: LocatedEndpoints) -> dict[str, int]:
    return {one.name: ifindex for one, ifindex in located.interfaces.items()}


def found(snapshot: Wiring, *endpoints: Endpoint) -> dict[str, int]:
    return names(InterfaceAssignments().look(snapshot, endpoints))


# --- by what evidence -----------------------------------------------------------------------------------------------


def test_host_route_leads_to_the_interface() -> None:
    """The interface of a pod is that of the node's route to one of its addresses.

    A family without a route changes nothing.
    """
    located = InterfaceAssignments().look(wiring({"10.0.0.1": 5}), [endpoint("web", "10.0.0.1", "fd00::1")])
    assert (names(located), located.evidence) == ({"web": 5}, {key("web"): Evidence.ROUTE})


def test_other_end_of_the_pair_leads_to_the_interface() -> None:
    """Without a route, it is the veth whose other end has the address.

    Equal indices in two namespaces are not confused.
    """
    snapshot = wiring(peers={(1, 2): ["10.0.0.1", "fe80::1"], (2, 2): ["10.0.0.2", "fe80::1"]})
    located = InterfaceAssignments().look(snapshot, [endpoint("web", "10.0.0.1"), endpoint("db", "10.0.0.2")])
    assert names(located) == {"web": 5, "db": 6}
    assert set(located.evidence.values()) == {Evidence.ADDRESS}


def test_subnet_on_the_node_s_end_leads_to_the_interface() -> None:
    """An end on the node has a prefix of its own, /24 or /31. The first address behind it shows which pod it is."""
    snapshot = wiring(subnets={"10.0.0.0/31": 5, "10.0.0.0/8": 2}, peers={(1, 2): ["10.0.0.1"]}, shared=[5])
    assignments = InterfaceAssignments()
    located = assignments.look(snapshot, [endpoint("web", "10.0.0.1")])
    assert (names(located), located.evidence[key("web")]) == ({"web": 5}, Evidence.ADDRESS)
    assert assignments.is_workload(5)
    assert not assignments.doubts


@pytest.mark.parametrize("born", [True, False], ids=["born under the agent", "there before"])
def test_later_address_in_the_node_s_prefix_makes_nobody_of_a_pod_that_is_to_come(
    tmp_path: Path, *, born: bool
) -> None:
    """On a node's end with a prefix only the first address counts, for the interface's life and all agents."""
    assignments = InterfaceAssignments()
    if born:
        assignments.close_newborn(WEB)
    assignments.look(wiring(subnets={"10.0.0.0/24": 5}, peers={(1, 2): ["10.0.0.77"]}, shared=[5]), [])
    later = wiring(subnets={"10.0.0.0/24": 5}, peers={(1, 2): ["10.0.0.1"]}, shared=[5])
    assignments.save(tmp_path / "interfaces")
    again = InterfaceAssignments()
    assert again.load(tmp_path / "interfaces") is None
    for one in (assignments, again):
        assert names(one.look(later, [endpoint("web", "10.0.0.1")])) == {}
        assert names(one.look(later, [endpoint("first", "10.0.0.77")])) == {"first": 5}


def test_first_address_behind_an_end_in_doubt_is_looked_for() -> None:
    """No notification tells when the address comes, and without it the interface has no known pod."""
    assignments = InterfaceAssignments()
    empty = wiring(subnets={"10.0.0.0/24": 5}, peers={(2, 2): ["10.0.0.9"]}, shared=[5])
    assignments.look(empty, [])
    assert (assignments.is_workload(5), assignments.is_curious(empty)) == (False, True)
    assignments.look(
        wiring(subnets={"10.0.0.0/24": 5}, peers={(1, 2): ["10.0.0.1"], (2, 2): ["10.0.0.9"]}, shared=[5]), []
    )
    assert not assignments.is_curious(empty)


def test_subnet_of_a_link_without_the_pod_is_no_trace() -> None:
    """On a node that is a container, another link's pods may be macvlan devices, whose packets pass others as well."""
    snapshot = wiring(subnets={"10.0.0.0/24": 5}, peers={(1, 2): ["10.0.0.254"]}, shared=[5])
    assignments = InterfaceAssignments()
    assert names(assignments.look(snapshot, [endpoint("web", "10.0.0.1")])) == {}
    assert (assignments.is_workload(5), list(assignments.doubts)) == (False, [5])
    virtual_machine = wiring(subnets={"10.0.0.0/24": 7}, shared=[7])  # the other end of a tap cannot be read
    assert found(virtual_machine, endpoint("web", "10.0.0.1")) == {"web": 7}


def test_subnet_of_a_bridge_is_no_trace() -> None:
    """The prefix of a bridge may lead to any of its ports."""
    assert found(wiring(subnets={"10.0.0.0/24": 8}), endpoint("web", "10.0.0.1")) == {}


def test_route_tells_more_than_a_peer() -> None:
    """If route and peer lead to different interfaces, the route counts."""
    assert found(wiring({"10.0.0.1": 6}, {(1, 2): ["10.0.0.1"]}), endpoint("web", "10.0.0.1")) == {"web": 6}


@pytest.mark.parametrize("kind", ["macvlan", "bridge", "vxlan"])
def test_route_by_an_interface_that_no_workload_has_is_no_trace(kind: str) -> None:
    """Packets of the pod to other hosts do not pass the node's own path to it, so policy there would have no effect."""
    own = Interface(9, "shim0", kind)
    snapshot = replace(wiring({"10.0.0.1": 9}), links={**LINKS, 9: own})
    assignments = InterfaceAssignments()
    assert names(assignments.look(snapshot, [endpoint("web", "10.0.0.1")])) == {}
    assert not assignments.is_workload(9)
    assert names(InterfaceAssignments(workloads=["shim*"]).look(snapshot, [endpoint("web", "10.0.0.1")])) == {"web": 9}


@pytest.mark.parametrize("name", ["vethweb", f"cali{derived_hash(key('web'))}"])
def test_interface_that_an_option_calls_the_node_s_is_no_trace(name: str) -> None:
    """Neither a route, nor the node's prefix there, a plugin's result or the name makes it a workload's interface."""
    own = replace(WEB, name=name)
    links = {**LINKS, own.ifindex: own}
    for snapshot, results in (
        (wiring({"10.0.0.1": 5}), {}),
        (wiring(subnets={"10.0.0.0/24": 5}, shared=[5]), {}),
        (wiring(), {key("web"): {name}}),
        (wiring(), {}),
    ):
        assignments = InterfaceAssignments(own=["vethw*", "cali*"])
        located = assignments.look(replace(snapshot, links=links), [endpoint("web", "10.0.0.1")], results=results)
        assert (located.interfaces, assignments.is_workload(5), assignments.doubts) == ({}, False, {})


@pytest.mark.parametrize("is_kept", [True, False], ids=["by the file", "by the rows"])
def test_option_that_was_given_since_frees_what_an_earlier_agent_bound(tmp_path: Path, *, is_kept: bool) -> None:
    """A binding outlives the agent, but an operator's option ends it. A binding by an object's field stays."""
    pods = [endpoint("web", "10.0.0.1"), endpoint("db", interface="vethdb")]
    earlier = InterfaceAssignments()
    assert names(earlier.look(wiring({"10.0.0.1": 5}), pods)) == {"web": 5, "db": 6}
    later = InterfaceAssignments(own=["veth*"])
    if is_kept:
        earlier.save(tmp_path / "interfaces")
        assert later.load(tmp_path / "interfaces") is None
    else:
        later.expect(key("web"), 5)
    assert names(later.look(wiring({"10.0.0.1": 5}), pods)) == {"db": 6}
    assert (later.is_workload(5), later.is_workload(6)) == (False, True)


def test_plugin_that_left_nothing_on_the_node_speaks_against_all_else() -> None:
    """A macvlan pod's address is in the prefix of the interface below it.

    It may be at the other end of a node's interface.
    """
    snapshot = wiring({"fd00::1": 6}, {(1, 2): ["10.0.0.1"]}, subnets={"10.0.0.0/24": 5}, shared=[5])
    located = InterfaceAssignments().look(
        snapshot, [endpoint("web", "10.0.0.1", "fd00::1")], results={key("web"): set()}
    )
    assert located == LocatedEndpoints()


def test_plugin_s_result_tells_more_than_a_route() -> None:
    """The plugin's result on the node names the interface. A bridge that the result also names is not assigned."""
    located = InterfaceAssignments().look(
        wiring({"10.0.0.1": 6}), [endpoint("web", "10.0.0.1")], results={key("web"): {"vethweb", "cni0"}}
    )
    assert (names(located), located.evidence) == ({"web": 5}, {key("web"): Evidence.CNI})


@pytest.mark.parametrize("prefix", ["cali", "eni", "vlan", "gke", "azv"])
def test_name_made_of_the_pod_s_is_evidence(prefix: str) -> None:
    """The names that Calico, AWS (also for pods with security groups), GKE and Azure give to interfaces."""
    named = Interface(9, f"{prefix}{derived_hash(key('web'))}", "veth", (3, 2))
    snapshot = replace(wiring(peers={(1, 2): ["10.0.0.1"]}), links={**LINKS, 9: named})
    located = InterfaceAssignments().look(snapshot, [endpoint("web", "10.0.0.1")])
    assert (names(located), located.evidence) == ({"web": 9}, {key("web"): Evidence.NAME})
    assert derived_hash(EndpointKey("Pod", "kube-system", "coredns-0")) == "8c346e38bf4"


def test_named_interface_needs_no_address() -> None:
    """An endpoint that names an interface has that one, and none while that one does not exist."""
    snapshot = wiring({"10.0.0.1": 5})
    assert found(snapshot, endpoint("vm", "10.0.0.1", interface="tap0")) == {"vm": 7}
    assert found(snapshot, endpoint("vm", "10.0.0.1", interface="tap9")) == {}


def test_interface_that_was_named_is_free_with_its_name() -> None:
    """If the object names another interface, or none, the first one is assigned as without the name."""
    assignments = InterfaceAssignments()
    assignments.look(wiring(), [endpoint("vm", "10.0.0.1", interface="eth0")])
    assert assignments.is_workload(2)
    located = assignments.look(wiring(), [endpoint("vm", "10.0.0.1", interface="tap0")])
    assert (names(located), assignments.is_workload(2)) == ({"vm": 7}, False)
    assignments.look(wiring(), [])
    assert assignments.is_workload(7)
    assert names(assignments.look(wiring({"10.0.0.2": 7}), [endpoint("other", "10.0.0.2")])) == {"other": 7}


def test_route_to_a_vanished_interface_is_no_trace() -> None:
    """A route whose interface is not in the snapshot is no evidence."""
    assert found(wiring({"10.0.0.1": 99}), endpoint("web", "10.0.0.1")) == {}


def test_uplink_is_nobody_s_by_address() -> None:
    """Neither a route nor a peer's address makes an uplink a workload's interface. An endpoint that names it does."""
    snapshot = wiring({"10.0.0.1": 2}, {(0, 2): ["10.0.0.2"]})
    assert found(snapshot, endpoint("a", "10.0.0.1"), endpoint("b", "10.0.0.2")) == {}
    assert found(snapshot, endpoint("c", interface="eth0")) == {"c": 2}


def test_pod_that_is_not_here_is_no_problem() -> None:
    """An endpoint without evidence is neither found nor a problem."""
    assert InterfaceAssignments().look(wiring(), [endpoint("web", "10.0.0.1")]) == LocatedEndpoints()


# --- conflicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("routes", "peers"),
    [({"10.0.0.1": 5, "fd00::1": 6}, {}), ({}, {(1, 2): ["10.0.0.1"], (2, 2): ["10.0.0.1"]})],
    ids=["by family", "one address twice"],
)
def test_endpoint_with_two_interfaces_has_none(routes: dict[str, int], peers: dict[tuple[int, int], list[str]]) -> None:
    """If a pod's addresses lead to several interfaces from the start, a problem names them, and nothing is guessed."""
    located = InterfaceAssignments().look(wiring(routes, peers), [endpoint("web", "10.0.0.1", "fd00::1")])
    assert located.interfaces == {}
    assert list(located.problems.values()) == ["its addresses lead to several interfaces: vethdb, vethweb"]


def test_interface_of_two_endpoints_is_neither_s() -> None:
    """Two endpoints that lead to one interface from the start get neither. A third endpoint is not affected."""
    snapshot = wiring({"10.0.0.1": 5, "10.0.0.2": 5, "10.0.0.3": 6})
    located = InterfaceAssignments().look(
        snapshot, [endpoint("a", "10.0.0.1"), endpoint("b", "10.0.0.2"), endpoint("c", "10.0.0.3")]
    )
    assert set(names(located)) == {"c"}
    assert set(located.problems.values()) == {
        "interface vethweb belongs to several by evidence of the same strength: Pod/shop/a, Pod/shop/b"
    }
    assert {one.name for one in located.problems} == {"a", "b"}


def test_of_several_with_an_address_it_is_the_one_whose_first_it_is() -> None:
    """A pod that adds a neighbour's address after its own harms nobody, even if the agent is new to both."""
    snapshot = wiring(peers={(1, 2): ["10.0.0.1", "10.0.0.2"], (2, 2): ["10.0.0.2"]})
    assert found(snapshot, endpoint("web", "10.0.0.1"), endpoint("db", "10.0.0.2")) == {"web": 5, "db": 6}


def test_neighbour_s_address_closes_no_neighbour() -> None:
    """Addresses at the other end of another interface do not change a bound interface."""
    assignments = InterfaceAssignments()
    pods = [endpoint("web", "10.0.0.1"), endpoint("db", "10.0.0.2")]
    assignments.look(wiring(peers={(1, 2): ["10.0.0.1"], (2, 2): ["10.0.0.2"]}), pods)
    located = assignments.look(wiring(peers={(1, 2): ["10.0.0.2"], (2, 2): ["10.0.0.2"]}), pods)
    assert (names(located), located.problems) == ({"web": 5, "db": 6}, {})


def test_address_at_another_interface_moves_no_bond() -> None:
    """The binding stays even if nothing else leads to its interface, and the address is the other interface's first."""
    assignments = InterfaceAssignments()
    assignments.look(wiring({"10.0.0.1": 5}), [endpoint("web", "10.0.0.1")])
    located = assignments.look(wiring(peers={(2, 2): ["10.0.0.1"]}), [endpoint("web", "10.0.0.1")])
    assert (names(located), located.problems) == ({"web": 5}, {})


@pytest.mark.parametrize(
    ("routes", "first", "evidence"),
    [({}, ["10.0.0.9", "fd00::10"], Evidence.ADDRESS), ({"10.0.0.9": 5}, ["10.0.0.10", "fd00::10"], Evidence.ROUTE)],
    ids=["weakly", "by a route"],
)
@pytest.mark.parametrize("subnets", [{}, {"10.0.0.0/24": 5}], ids=["", "with a prefix"])
def test_bound_pod_closes_no_pod_that_is_to_come(
    routes: dict[str, int], first: list[str], evidence: Evidence, subnets: dict[str, int]
) -> None:
    """Neither a later address nor a first one of a bound interface is evidence for another pod."""
    assignments = InterfaceAssignments()
    late, vic = endpoint("late", "10.0.0.9"), endpoint("vic", "10.0.0.10", "fd00::10")
    shared = list(subnets.values())
    located = assignments.look(wiring(routes, {(1, 2): first}, subnets, shared), [late])
    assert (names(located), located.evidence) == ({"late": 5}, {late.key: evidence})
    taken = wiring(routes, {(1, 2): ["10.0.0.10", "fd00::10"]}, subnets, shared)
    assignments.look(taken, [late, vic])
    both = wiring(routes, {(1, 2): ["10.0.0.10"], (2, 2): ["10.0.0.10", "fd00::10"]}, subnets, shared)
    located = assignments.look(both, [late, vic])
    assert (names(located), located.problems) == ({"late": 5, "vic": 6}, {})


def test_first_address_that_contradicts_makes_nobody_of_a_pod_that_is_to_come() -> None:
    """A first address of either family may contradict, in either order. The pod gets its own interface."""
    pod = endpoint("web", "10.0.0.1", "fd00::1")
    for first in (["10.0.0.66", "fd00::1"], ["10.0.0.1", "fd00::66"], ["fd00::1", "10.0.0.66"]):
        assignments = InterfaceAssignments()
        assignments.look(wiring(peers={(1, 2): first}), [])
        assert names(assignments.look(wiring(peers={(1, 2): first}), [pod])) == {}
        own = wiring(peers={(1, 2): first, (2, 2): ["10.0.0.1", "fd00::1"]})
        assert names(assignments.look(own, [pod])) == {"web": 6}


@pytest.mark.parametrize(
    ("first", "addresses"),
    [
        (["10.0.0.1"], ["10.0.0.1", "fd00::1"]),
        (["fd00::1"], ["10.0.0.1", "fd00::1"]),
        (["10.0.0.1", "fe80::1"], ["10.0.0.1", "fd00::1"]),
        (["10.0.0.1", "10.0.0.200", "2001:db8::77", "fd00::1", "fe80::1"], ["10.0.0.1", "fd00::1"]),
        (["10.0.0.1", "2001:db8::77"], ["10.0.0.1"]),
        (["10.0.0.200", "fd00::1"], ["fd00::1"]),
    ],
    ids=["second family later", "first family later", "link-local", "further ones beside", "SLAAC beside IPv4", "IPv4 beside IPv6"],
)  # fmt: skip
def test_address_of_a_family_that_a_pod_lacks_contradicts_nothing(first: list[str], addresses: list[str]) -> None:
    """A second family may come later, by a router without the object, and so may temporary addresses."""
    assignments = InterfaceAssignments()
    assignments.look(wiring(peers={(1, 2): first}), [])
    late = [*first, *(one for one in addresses if one not in first)]
    assert names(assignments.look(wiring(peers={(1, 2): late}), [endpoint("web", *addresses)])) == {"web": 5}


@pytest.mark.parametrize("later", [["10.0.0.9", "10.0.0.1"], ["10.0.0.1"]], ids=["beside the first", "in its place"])
def test_address_that_comes_later_makes_nobody_of_a_pod_that_is_to_come(later: list[str]) -> None:
    """An unknown interface stays unknown, whatever address comes at its other end. The pod gets its own interface."""
    assignments = InterfaceAssignments()
    assignments.look(wiring(peers={(1, 2): ["10.0.0.9"]}), [])
    assert names(assignments.look(wiring(peers={(1, 2): later}), [endpoint("web", "10.0.0.1")])) == {}
    own = wiring(peers={(1, 2): later, (2, 2): ["10.0.0.1"]})
    assert names(assignments.look(own, [endpoint("web", "10.0.0.1")])) == {"web": 6}


def test_interface_of_a_pod_that_went_is_no_other_s_by_an_address() -> None:
    """The interface of a deleted pod is not another pod's by an address. A route of the node makes it the new pod's."""
    assignments = InterfaceAssignments()
    snapshot = wiring(peers={(1, 2): ["10.0.0.1"]})
    assignments.look(snapshot, [endpoint("old", "10.0.0.1")])
    located = assignments.look(snapshot, [endpoint("new", "10.0.0.1")])
    assert located.interfaces == {}
    assert located.problems == {
        key(
            "new"
        ): "interface vethweb belonged to Pod/shop/old: an address at its other end gives it to no other workload"
    }
    routed = wiring({"10.0.0.1": 5}, {(1, 2): ["10.0.0.1"]})
    assert names(assignments.look(routed, [endpoint("new", "10.0.0.1")])) == {"new": 5}


def test_bond_outlives_what_made_it() -> None:
    """Neither a deleted route nor an address that the pod gave up ends the binding."""
    assignments = InterfaceAssignments()
    assignments.look(wiring({"10.0.0.1": 5}), [endpoint("web", "10.0.0.1")])
    located = assignments.look(wiring(), [endpoint("web", "10.0.0.1")])
    assert (names(located), located.evidence) == ({"web": 5}, {key("web"): Evidence.ROUTE})


def test_stronger_evidence_takes_an_interface_from_a_weaker() -> None:
    """The node's route shows that the interface is another's than its first address showed.

    The earlier owner gets a problem.
    """
    assignments = InterfaceAssignments()
    peers = {(1, 2): ["10.0.0.2"]}
    assignments.look(wiring(peers=peers), [endpoint("thief", "10.0.0.2")])
    located = assignments.look(
        wiring({"10.0.0.1": 5}, peers), [endpoint("thief", "10.0.0.2"), endpoint("web", "10.0.0.1")]
    )
    assert names(located) == {"web": 5}
    assert located.problems == {key("thief"): "interface vethweb belongs to Pod/shop/web"}


# --- pods that come again ---------------------------------------------------------------------------------------------


def test_pod_under_its_old_name_gets_its_new_interface() -> None:
    """The pod has another address, so it gets the new interface, although the old one still exists."""
    assignments = InterfaceAssignments()
    assignments.look(wiring(peers={(1, 2): ["10.0.0.1"]}), [endpoint("web", "10.0.0.1")])
    snapshot = wiring(peers={(1, 2): ["10.0.0.1"], (2, 2): ["10.0.0.7"]})
    assert names(assignments.look(snapshot, [endpoint("web", "10.0.0.7")])) == {"web": 6}


def test_pod_that_keeps_its_address_gets_its_new_interface_when_the_old_one_is_gone() -> None:
    """A pod of a StatefulSet with a fixed address. While both interfaces exist, it has the first one."""
    assignments = InterfaceAssignments()
    pod = endpoint("web", "10.0.0.1")
    assignments.look(wiring(peers={(1, 2): ["10.0.0.1"]}), [pod])
    both = wiring(peers={(1, 2): ["10.0.0.1"], (2, 2): ["10.0.0.1"]})
    assert names(assignments.look(both, [pod])) == {"web": 5}
    assignments.forget([5])
    after = replace(wiring(peers={(2, 2): ["10.0.0.1"]}), links={1: LO, 2: UPLINK, 6: DB})
    assert names(assignments.look(after, [pod])) == {"web": 6}


def test_contested_pod_gets_no_other_interface() -> None:
    """While another object claims its address, it keeps its interface. When the interface is gone, it has none."""
    assignments = InterfaceAssignments()
    pod = endpoint("web", "10.0.0.1")
    assignments.look(wiring({"10.0.0.1": 5}), [pod])
    moved = wiring({"10.0.0.1": 6})
    located = assignments.look(moved, [pod], is_contested=lambda _key: True)
    assert names(located) == {"web": 5}
    assert located.problems == {key("web"): "vethdb has an address that others claim as well"}
    assignments.forget([5])
    gone = replace(moved, links={1: LO, 2: UPLINK, 6: DB})
    assert names(assignments.look(gone, [pod], is_contested=lambda _key: True)) == {}
    assert names(assignments.look(gone, [pod])) == {"web": 6}


# --- own or workload's ------------------------------------------------------------------------------------------------


def workloads(assignments: InterfaceAssignments) -> list[str]:
    return [link.name for link in LINKS.values() if assignments.is_workload(link.ifindex)]


def test_workload_interfaces_are_told_from_the_node_s_own() -> None:
    """Veths into other namespaces and taps are workloads'.

    Loopback, bridges, and interfaces of default routes are not.
    """
    assignments = InterfaceAssignments()
    assignments.look(wiring(), [])
    assert workloads(assignments) == ["vethweb", "vethdb", "tap0"]


def test_netkit_is_a_workload_s_kind() -> None:
    """A netkit device is, like a veth. A tunnel of the node is not, whatever its addresses are."""
    assignments = InterfaceAssignments()
    netkit, tun = Interface(9, "nk0", "netkit", (3, 2)), Interface(10, "tun0", "tun", hardware=65534)
    assignments.look(replace(wiring(), links={9: netkit, 10: tun}), [])
    assert (assignments.is_workload(9), assignments.is_workload(10)) == (True, False)


def test_patterns_decide_alone() -> None:
    """With patterns, only they determine workloads' interfaces.

    Patterns of own interfaces are exceptions from the kinds.
    """
    assignments = InterfaceAssignments(workloads=("tap*", "eth0"))
    assignments.look(wiring(), [])
    assert workloads(assignments) == ["eth0", "tap0"]
    assignments = InterfaceAssignments(own=("tap*", "vethd*"))
    assignments.look(wiring(), [])
    assert workloads(assignments) == ["vethweb"]
    assert not assignments.close_newborn(Interface(11, "tap1", "tun"))


def test_address_of_the_node_s_object_speaks_for_its_own() -> None:
    """On a node that is a container, the uplink is a veth like those of pods."""
    assignments = InterfaceAssignments()
    snapshot = replace(wiring(), uplinks=frozenset(), addresses={ip_address("192.0.2.1"): 2}, shared=frozenset({2}))
    assignments.look(snapshot, [], node_addresses=[ip_address("192.0.2.1")])
    assert workloads(assignments) == ["vethweb", "vethdb", "tap0"]
    assert not assignments.doubts


@pytest.mark.parametrize("born", [True, False], ids=["born under the agent", "there before"])
def test_doubt_is_told_and_changes_nothing(*, born: bool) -> None:
    """The node has an address on the interface, and no route.

    Closed interfaces stay closed, open ones open, with a problem each.
    """
    assignments = InterfaceAssignments()
    if born:
        assert assignments.close_newborn(WEB)
    assignments.look(wiring(shared=[5]), [])
    assert assignments.is_workload(5) is born
    assert (("closed" if born else "NOT enforced") in assignments.doubts[5], list(assignments.doubts)) == (True, [5])
    routed = replace(wiring(shared=[5]), next_hops=frozenset({5}))
    assignments.look(routed, [])
    assert not assignments.is_workload(5)
    assert not assignments.doubts


def test_bound_interface_is_never_let_go() -> None:
    """Neither an address nor a route that makes it look like the node's own ends the binding."""
    assignments = InterfaceAssignments()
    pod = endpoint("web", "10.0.0.1")
    assignments.look(wiring({"10.0.0.1": 5}), [pod])
    lured = replace(wiring({}, shared=[5]), uplinks=frozenset({2, 5}), addresses={ip_address("192.0.2.1"): 5})
    assert names(assignments.look(lured, [pod], node_addresses=[ip_address("192.0.2.1")])) == {"web": 5}
    assert assignments.is_workload(5)
    assignments.look(lured, [])
    assert assignments.is_workload(5)


def test_own_interface_stays_the_node_s() -> None:
    """An uplink whose route is missing for a while is not closed."""
    assignments = InterfaceAssignments()
    assignments.look(wiring(), [])
    assignments.look(replace(wiring(), uplinks=frozenset()), [])
    assert not assignments.is_workload(2)


# --- beyond the process -----------------------------------------------------------------------------------------------


def test_what_was_decided_outlives_the_agent(tmp_path: Path) -> None:
    """Assignments, first addresses and roles are stored.

    If an index belongs to another interface by now, nothing is used.
    """
    path = tmp_path / "interfaces"
    assignments = InterfaceAssignments()
    assignments.close_newborn(DB)
    assignments.look(wiring(peers={(1, 2): ["10.0.0.1"], (2, 2): ["10.0.0.9"]}), [endpoint("web", "10.0.0.1")])
    assert assignments.is_dirty
    assignments.save(path)
    assert not assignments.is_dirty
    again = InterfaceAssignments()
    assert again.load(path) is None
    later = wiring(peers={(1, 2): ["10.0.0.2"], (2, 2): ["10.0.0.9", "10.0.0.5"]})
    pods = [endpoint("web", "10.0.0.1"), endpoint("db", "10.0.0.5")]
    assert names(again.look(later, pods)) == {"web": 5}
    other = InterfaceAssignments()
    other.load(path)
    renamed = replace(later, links={**LINKS, 5: replace(WEB, name="vethnew")})
    assert names(other.look(renamed, [endpoint("web", "10.0.0.1")])) == {}


WHOLE = {
    "empty": "", "list": "[]", "other format": '{"format": 99, "interfaces": {}}', "not UTF-8": "\xff", "too deep": "[" * 200_000,
    "text for a format": '{"format": "1", "interfaces": {}}', "list for a format": '{"format": [], "interfaces": {}}',
    "list of interfaces": '{"format": 1, "interfaces": []}', "no interfaces": '{"format": 1}',
}  # fmt: skip


@pytest.mark.parametrize("text", WHOLE.values(), ids=WHOLE)
def test_damaged_file_is_told(tmp_path: Path, text: str) -> None:
    """The file is kept under another name, and everything is decided anew."""
    path = tmp_path / "interfaces"
    path.write_bytes(text.encode("latin-1"))
    assignments = InterfaceAssignments()
    problem = assignments.load(path)
    assert problem is not None
    assert problem.slug == "interfaces-file"
    assert path.with_suffix(DAMAGED_SUFFIX).read_bytes() == text.encode("latin-1")
    assert names(assignments.look(wiring({"10.0.0.1": 5}), [endpoint("web", "10.0.0.1")])) == {"web": 5}


ENTRIES: dict[str, Any] = {
    "list": [], "nothing": {}, "no name": {"name": None}, "numbers for addresses": {"first": [1, 2]}, "no addresses": {"first": None},
    "no address": {"first": ["x"]}, "unknown side": {"side": "mine"}, "list for a side": {"side": ["own"]}, "bond is a text": {"bond": "x"},
    "endpoint of numbers": {"endpoint": [1, 2, 3]}, "endpoint of lists": {"endpoint": [["a"], ["b"], ["c"]]},
    "endpoint too short": {"endpoint": ["Pod"]}, "unknown evidence": {"evidence": "HEARSAY"}, "list for evidence": {"evidence": ["CNI"]},
    "text for addresses": {"addresses": "10.0.0.1"}, "half a character": {"name": "\udfff"},
}  # fmt: skip


@pytest.mark.parametrize("damage", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize("number", ["5", "0", "-5", "05x", "\u0665", "99999999999999999999999", ""])
def test_damaged_entry_is_told_and_the_others_count(tmp_path: Path, damage: Any, number: str) -> None:
    """This includes valid JSON.

    The entry is decided anew, all others are kept, and the next agent finds a correct file.
    """
    path = tmp_path / "interfaces"
    earlier = InterfaceAssignments()
    pods = [endpoint("web", "10.0.0.1"), endpoint("db", "10.0.0.2")]
    earlier.look(wiring({"10.0.0.1": 5, "10.0.0.2": 6}), pods)
    earlier.save(path)
    document = json.loads(path.read_text())
    whole = document["interfaces"].pop("5")
    if isinstance(damage, dict):
        inner = damage.keys() & whole["bond"].keys()
        damage = {**whole, **({"bond": {**whole["bond"], **damage}} if inner else damage)} if damage else damage
    document["interfaces"][number] = damage
    path.write_text(json.dumps(document))
    assignments = InterfaceAssignments()
    problem = assignments.load(path)
    assert problem is not None
    assert problem.slug == "interfaces-file"
    assert assignments.is_dirty
    assert names(assignments.look(wiring({"10.0.0.1": 5}), pods)) == {"web": 5, "db": 6}
    assignments.save(path)
    assert InterfaceAssignments().load(path) is None


def fifo(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(100 << 30)


def link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [fifo, sparse, link, directory])
@pytest.mark.parametrize("before", [None, fifo, link], ids=["", "beside an earlier FIFO", "beside an earlier link"])
def test_what_is_no_file_of_interfaces_keeps_nobody_waiting(
    tmp_path: Path, make: Callable[[Path], None], before: Callable[[Path], None] | None
) -> None:
    """It blocks neither a read nor a write and is reported. The next agent finds a regular file."""
    path = tmp_path / "interfaces"
    make(path)
    if before is not None:
        before(path.with_suffix(DAMAGED_SUFFIX))
    assignments = InterfaceAssignments()
    problem = assignments.load(path)
    assert problem is not None
    assert "is kept as" in problem.message
    if make is not directory:
        make(path.with_suffix(".draft"))
    assignments.look(wiring({"10.0.0.1": 5}), [endpoint("web", "10.0.0.1")])
    assignments.save(path)
    again = InterfaceAssignments()
    assert again.load(path) is None
    assert names(again.look(wiring(), [endpoint("web", "10.0.0.1")])) == {"web": 5}


def test_workload_cannot_make_the_file_grow(tmp_path: Path) -> None:
    """Of all addresses behind an interface, only the oldest of each family is stored."""
    assignments = InterfaceAssignments()
    assignments.look(wiring(peers={(1, 2): [f"10.{one >> 8}.{one & 255}.1" for one in range(3000)]}), [])
    assignments.save(tmp_path / "interfaces")
    assert (tmp_path / "interfaces").stat().st_size < 1000


def test_rows_of_the_kernel_stand_in_for_the_file() -> None:
    """The row names the endpoint of the interface, and nothing at the other end changes that."""
    assignments = InterfaceAssignments()
    assignments.expect(key("web"), 5)
    located = assignments.look(
        wiring(peers={(1, 2): ["10.0.0.2"]}), [endpoint("web", "10.0.0.1"), endpoint("db", "10.0.0.2")]
    )
    assert names(located) == {"web": 5}
