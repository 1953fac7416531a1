# SPDX-License-Identifier: Apache-2.0
"""Settled assignments: which changes unsettle them, so that a look decides as if it decided everything anew."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from netpol_ebpf.agent import assignments as assignments_module
from netpol_ebpf.agent.assignments import Evidence, InterfaceAssignments, LocatedEndpoints
from netpol_ebpf.agent.derived_names import derived_hash
from netpol_ebpf.agent.wiring import Interface, Wiring
from netpol_ebpf.policy.types import Endpoint, EndpointKey, EndpointKind, IPAddress

UPLINK = Interface(2, "eth0", "veth", (0, 2))
WEB_LINK, DB_LINK = Interface(5, "vethweb", "veth", (1, 2)), Interface(6, "vethdb", "veth", (2, 2))
TAP = Interface(7, "tap0", "tun")
WEB, DB = (EndpointKey("Pod", "shop", name) for name in ("web", "db"))
NET = ip_network("10.0.0.0/24")
CALI = Interface(9, f"cali{derived_hash(WEB)}", "veth", (9, 2))
NEW = Interface(9, "vethnew", "veth", (9, 2))
AT_TAP = {NET: frozenset({7})}


def addresses(*written: str) -> tuple[IPAddress, ...]:
    return tuple(map(ip_address, written))


def pod(key: EndpointKey, *written: str, interface: str | None = None) -> Endpoint:
    return Endpoint(key, EndpointKind.WORKLOAD, {}, addresses(*written), interface=interface)


def wiring(
    *links: Interface, routes: Mapping[str, int] | None = None, peers: Mapping[int, Collection[str]] | None = None
) -> Wiring:
    """A node with a default route by eth0. ``peers``: addresses at the other end of interfaces, by namespace id."""
    return Wiring(
        {link.ifindex: link for link in (UPLINK, WEB_LINK, DB_LINK, TAP, *links)},
        {ip_address(address): ifindex for address, ifindex in (routes or {}).items()},
        frozenset({2}),
        {(peer, 2): addresses(*written) for peer, written in (peers or {}).items()},
        addresses={ip_address("192.0.2.1"): 7},
    )


BY_ROUTE, BY_ADDRESS = wiring(routes={"10.0.0.1": 5}), wiring(peers={1: ["10.0.0.1"]})


@dataclass
class Looks:
    """Assignments, and for each look the same look with new assignments."""

    assignments: InterfaceAssignments = field(default_factory=InterfaceAssignments)
    endpoints: Collection[Endpoint] = (pod(WEB, "10.0.0.1"),)
    stated: Collection[IPAddress] = ()
    results: Mapping[EndpointKey, Collection[str]] = field(default_factory=dict)
    contested: Collection[EndpointKey] = ()

    def look(self, snapshot: Wiring, times: int = 1) -> dict[str, int]:
        """The interfaces of pods, by the pod's name."""
        for _ in range(times):
            afresh = self.assignments.unsettled()
            expected, located = self._look(afresh, snapshot), self._look(self.assignments, snapshot)
        assert located == expected
        assert self.assignments.differences(afresh) == []
        assert self.assignments.is_dirty == afresh.is_dirty
        return {key.name: ifindex for key, ifindex in located.interfaces.items()}

    def _look(self, assignments: InterfaceAssignments, snapshot: Wiring) -> LocatedEndpoints:
        return assignments.look(
            snapshot,
            self.endpoints,
            node_addresses=self.stated,
            results=self.results,
            is_contested=self.contested.__contains__,
        )


@pytest.fixture
def looks() -> Looks:
    return Looks()


# --- what a new pod costs ---------------------------------------------------------------------------------------------


def test_new_pod_s_steps_decide_nothing_again_of_others(monkeypatch: pytest.MonkeyPatch, looks: Looks) -> None:
    """The pod's object, interface and route come, and a look without change: settled pods are not searched again."""
    looked_for: list[str] = []
    trusted = assignments_module._TrustedEvidence

    class Counting(trusted):
        def beyond_reach(self, endpoint: Endpoint) -> tuple[Evidence, set[int]]:
            looked_for.append(endpoint.key.name)
            return super().beyond_reach(endpoint)

    looks.look(BY_ROUTE, times=3)
    monkeypatch.setattr(assignments_module, "_TrustedEvidence", Counting)
    web, assignments = next(iter(looks.endpoints)), looks.assignments
    both = [web, pod(DB, "10.0.0.9")]
    assignments.look(BY_ROUTE, both)
    assert assignments.close_newborn(NEW)
    there = replace(BY_ROUTE, links={**BY_ROUTE.links, 9: NEW})
    assignments.look(there, both)
    routed = replace(there, host_routes={**there.host_routes, ip_address("10.0.0.9"): 9})
    for _ in range(2):
        located = assignments.look(routed, both)
    assert located.interfaces == {WEB: 5, DB: 9}
    assert set(looked_for) == {"db"}


# --- what unsettles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "interface"),
    [
        pytest.param(BY_ROUTE, wiring(routes={"10.0.0.1": 6}), 6, id="its route leads elsewhere"),
        pytest.param(BY_ADDRESS, wiring(routes={"10.0.0.1": 6}, peers={1: ["10.0.0.1"]}), 6, id="it got a route"),
        pytest.param(
            replace(BY_ROUTE, subnets=AT_TAP),
            replace(wiring(), subnets=AT_TAP),
            7,
            id="its route went, a prefix leads on",
        ),
        pytest.param(BY_ADDRESS, replace(BY_ADDRESS, subnets=AT_TAP), 7, id="a prefix came"),
        pytest.param(
            replace(BY_ADDRESS, subnets={NET: frozenset({9})}),
            replace(
                wiring(replace(TAP, ifindex=9, name="tap9"), peers={1: ["10.0.0.1"]}), subnets={NET: frozenset({9})}
            ),
            9,
            id="the interface of a prefix came",
        ),
        pytest.param(
            replace(BY_ADDRESS, subnets=AT_TAP, uplinks=frozenset({2, 7})),
            replace(BY_ADDRESS, subnets=AT_TAP),
            7,
            id="an uplink is none any more",
        ),
        pytest.param(BY_ADDRESS, wiring(CALI, peers={1: ["10.0.0.1"]}), 9, id="an interface with the pod's name came"),
        pytest.param(
            wiring(NEW, peers={1: ["10.0.0.1"]}),
            wiring(CALI, peers={1: ["10.0.0.1"]}),
            9,
            id="an interface got the pod's name",
        ),
    ],
)
def test_change_that_leads_a_settled_pod_elsewhere(looks: Looks, before: Wiring, after: Wiring, interface: int) -> None:
    """The new evidence is stronger, or newer, than that by which the pod settled."""
    assert looks.look(before, times=3) == {"web": 5}
    assert looks.look(after) == {"web": interface}


def test_address_of_the_node_object(looks: Looks) -> None:
    """While the Node object has an address of the tap, no prefix is evidence for a pod there. Afterwards it is."""
    looks.stated = addresses("192.0.2.1")
    snapshot = replace(BY_ADDRESS, subnets=AT_TAP)
    assert looks.look(snapshot, times=3) == {"web": 5}
    looks.stated = ()
    assert looks.look(snapshot) == {"web": 7}


def test_second_route_to_an_interface_that_comes_later(looks: Looks) -> None:
    """An endpoint has both interfaces of its routes, even one that is created after the route."""
    looks.endpoints = [pod(WEB, "10.0.0.1", "10.0.0.2")]
    assert looks.look(wiring(routes={"10.0.0.1": 5, "10.0.0.2": 9}), times=3) == {"web": 5}
    both = replace(wiring(NEW, routes={"10.0.0.1": 5, "10.0.0.2": 9}), next_hops=frozenset({9}))
    assert looks.look(both) == {"web": 5}
    assert looks.assignments.is_workload(9)


@pytest.mark.parametrize(
    ("earlier", "later", "interface"),
    [
        ({}, {WEB: ["vethdb"]}, 6),
        ({WEB: ["vethweb"]}, {WEB: ["vethdb"]}, 6),
        ({WEB: ["vethnew"]}, {WEB: ["vethnew"]}, 9),
    ],
    ids=["came", "names another interface", "names an interface that came later"],
)
def test_result_of_a_plugin(
    looks: Looks,
    earlier: Mapping[EndpointKey, Collection[str]],
    later: Mapping[EndpointKey, Collection[str]],
    interface: int,
) -> None:
    """A CNI plugin's result moves a pod that settled by weaker evidence, or by an earlier result."""
    looks.results = earlier
    assert looks.look(BY_ADDRESS, times=3) == {"web": 5}
    looks.results = later
    assert looks.look(wiring(NEW, peers={1: ["10.0.0.1"]})) == {"web": interface}


def test_further_interface_of_a_plugin_s_result_stays_a_workload_s(looks: Looks) -> None:
    """An endpoint whose evidence names two interfaces has both in every look."""
    looks.look(BY_ADDRESS)
    looks.results = {WEB: ["vethweb", "vethdb"]}
    assert looks.look(BY_ADDRESS, times=3) == {"web": 5}
    looks.look(replace(BY_ADDRESS, next_hops=frozenset({6})))
    assert looks.assignments.is_workload(6)


def test_endpoint_that_went_or_changed(looks: Looks) -> None:
    """A settled endpoint without an object has no interface. With another address it has that address's interface."""
    looks.look(BY_ROUTE, times=3)
    settled, looks.endpoints = looks.endpoints, []
    assert looks.look(BY_ROUTE) == {}
    looks.endpoints = settled
    looks.look(BY_ROUTE, times=3)
    looks.endpoints = [pod(WEB, "10.0.0.2")]
    assert looks.look(wiring(routes={"10.0.0.1": 5, "10.0.0.2": 6})) == {"web": 6}


def test_named_interface_does_not_settle(looks: Looks) -> None:
    """The name in the object decides in each look, even if another interface has it by now."""
    looks.endpoints = [pod(WEB, "10.0.0.1", interface="vethweb")]
    assert looks.look(wiring(), times=3) == {"web": 5}
    assert looks.look(wiring(replace(NEW, name="vethweb"))) == {"web": 9}


def test_interface_that_got_another_s_index(looks: Looks) -> None:
    """The assignment ends with the interface, even if a new one has the index at the next look."""
    looks.look(BY_ADDRESS, times=3)
    looks.assignments.forget([5])
    assert looks.look(wiring(peers={1: ["10.0.0.77"]})) == {}


def test_interface_that_got_another_name(looks: Looks, tmp_path: Path) -> None:
    """The file for the next agent has the present name, by which that agent recognises the interface."""
    looks.look(BY_ROUTE, times=3)
    looks.look(wiring(replace(WEB_LINK, name="vethweb2"), routes={"10.0.0.1": 5}))
    looks.assignments.save(tmp_path / "interfaces")
    assert '"vethweb2"' in (tmp_path / "interfaces").read_text()


def test_first_address_behind_a_settled_interface(looks: Looks, tmp_path: Path) -> None:
    """The address is recorded when it is first seen."""
    looks.look(BY_ROUTE, times=3)
    looks.look(wiring(routes={"10.0.0.1": 5}, peers={1: ["10.0.0.1"]}))
    looks.assignments.save(tmp_path / "interfaces")
    assert '"first": ["10.0.0.1"]' in (tmp_path / "interfaces").read_text()


def test_other_endpoint_that_leads_to_a_settled_interface(looks: Looks) -> None:
    """The two conflict. The older assignment stays, and the agent reports the newer endpoint."""
    looks.look(BY_ROUTE, times=3)
    looks.endpoints = [*looks.endpoints, pod(DB, "10.0.0.2")]
    both = wiring(routes={"10.0.0.1": 5, "10.0.0.2": 5})
    assert looks.look(both, times=3) == {"web": 5}
    assert looks.assignments.look(both, looks.endpoints).problems.keys() == {DB}
    looks.results = {DB: ["vethweb"]}  # stronger evidence
    assert looks.look(both) == {"db": 5}


def test_contested_endpoint_with_a_former_interface(looks: Looks) -> None:
    """An endpoint that moved by a route settles when its former interface is forgotten: a conflict moves it back."""
    looks.look(wiring(routes={"10.0.0.1": 6}), times=3)
    assert looks.look(BY_ROUTE, times=3) == {"web": 5}
    looks.contested = {WEB}
    assert looks.look(BY_ROUTE) == {"web": 6}


def test_former_interface_that_goes(looks: Looks) -> None:
    """The removal of a former interface changes nothing for an endpoint with an interface."""
    looks.look(BY_ROUTE, times=3)
    moved = wiring(routes={"10.0.0.1": 6})
    assert looks.look(moved, times=3) == {"web": 6}
    gone = replace(moved, links={ifindex: link for ifindex, link in moved.links.items() if ifindex != 5})
    assert looks.look(gone) == {"web": 6}


def test_assignment_of_an_earlier_agent_that_is_restored_later(looks: Looks) -> None:
    """A row of the kernel with another interface for a settled endpoint counts."""
    looks.look(BY_ADDRESS, times=3)
    looks.assignments.expect(WEB, 6)
    assert looks.look(BY_ADDRESS) == {"web": 6}


def test_interface_whose_record_changes_in_each_look_does_not_settle() -> None:
    """The operator's patterns exclude the pod's interface, so each look takes it away and gives it back."""
    looks = Looks(InterfaceAssignments(["cali*"]))
    looks.look(BY_ROUTE, times=3)
    looks.assignments.is_dirty = False
    assert looks.look(BY_ROUTE) == {"web": 5}


def test_interface_with_a_new_name_has_the_traits_of_that_name() -> None:
    """An interface that the operator's patterns exclude by its new name is no workload's."""
    looks = Looks(InterfaceAssignments((), ["own*"]))
    looks.endpoints = []
    looks.look(wiring(NEW), times=2)
    assert looks.assignments.is_workload(9)
    looks.look(wiring(replace(NEW, name="own0")))
    assert not looks.assignments.is_workload(9)


# --- differences ------------------------------------------------------------------------------------------------------


def test_differences_name_interfaces_and_endpoints() -> None:
    """Each different decision of two agents is named."""
    one, other = InterfaceAssignments(), InterfaceAssignments()
    endpoints: Iterable[Endpoint] = [pod(WEB, "10.0.0.1")]
    located = one.look(BY_ROUTE, [*endpoints]), other.look(wiring(routes={"10.0.0.1": 6}), [*endpoints])
    other.expect(DB, 0)
    assert one.differences(other) == [str(DB), "vethdb", "vethweb"]
    assert located[0].differences(located[1]) == [str(WEB)]
