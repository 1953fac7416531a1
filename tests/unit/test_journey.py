# SPDX-License-Identifier: Apache-2.0
"""Journeys: who is asked, in which direction and stage, about which packet, and how the answers combine."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest
from worlds import packet

from netpol_ebpf.policy.journey import (
    OUTSIDE,
    Finding,
    Flow,
    FlowEnd,
    FlowEndKind,
    HopReason,
    Journey,
    JourneyHop,
    Topology,
    walk,
)
from netpol_ebpf.policy.types import (
    ICMP,
    ICMPV6,
    TCP,
    UDP,
    Action,
    Cause,
    CauseKind,
    ClusterNode,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    Failsafe,
    Outcome,
    Packet,
    PolicySettings,
    Question,
    Stage,
    Verdict,
    World,
)

INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS


def workload(name: str, address: str, node: str | None) -> Endpoint:
    return Endpoint(EndpointKey("Pod", "ns", name), EndpointKind.WORKLOAD, {}, (ip_address(address),), node=node)


def host(name: str, node: str, interface: str | None, *addresses: str) -> Endpoint:
    key = EndpointKey("HostEndpoint", "", name)
    owned = tuple(map(ip_address, addresses))
    return Endpoint(key, EndpointKind.HOST, {}, owned, node=node, interface=interface)


def world(*hosts: Endpoint, settings: PolicySettings | None = None) -> World:
    """Pods 10.0.1.1 and .2 on n1 (172.16.0.1), 10.0.2.1 on n2 (172.16.0.2), 10.0.9.1 on no node."""
    pods = [
        workload("a", "10.0.1.1", "n1"),
        workload("b", "10.0.1.2", "n1"),
        workload("c", "10.0.2.1", "n2"),
        workload("d", "10.0.9.1", None),
    ]
    nodes = [ClusterNode(f"n{number}", {}, (ip_address(f"172.16.0.{number}"),)) for number in (1, 2, 3)]
    return World(
        endpoints={endpoint.key: endpoint for endpoint in (*pods, *hosts)},
        nodes={node.name: node for node in nodes},
        settings=settings or PolicySettings(),
    )


def hops(held: World, about: Packet, dnat_to: tuple[str, int] | None = None) -> list[str]:
    """The journey in short: `endpoint direction stage+stage`, or the name of a reason."""
    translated = None if dnat_to is None else (ip_address(dnat_to[0]), dnat_to[1])
    return [render(hop, about) for hop in Topology(held).plan(Flow(about, translated)).hops]


def render(hop: JourneyHop, original: Packet) -> str:
    if hop.reason is not None:
        return hop.reason.name
    assert hop.endpoint is not None
    assert hop.direction is not None
    stages = [
        question.stage.value + ("" if question.packet.destination == original.destination else "'")
        for question in hop.questions
    ]
    return f"{hop.endpoint.name} {hop.direction.value} {'+'.join(stages)}"


A, B, C, D, N1, N2, OUT = "10.0.1.1", "10.0.1.2", "10.0.2.1", "10.0.9.1", "172.16.0.1", "172.16.0.2", "192.0.2.1"
ETH1, ETH2 = host("eth1", "n1", "eth0", N1), host("eth2", "n2", "eth0", N2)
ANY1, ANY2 = host("any1", "n1", "*", N1), host("any2", "n2", "*", N2)


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        (A, B, ["a egress normal", "b ingress normal"]),
        (A, C, ["a egress normal", "c ingress normal"]),
        (A, D, ["a egress normal", "d ingress normal"]),
        (D, OUT, ["d egress normal"]),
        (OUT, A, ["a ingress normal"]),
        (A, A, ["TO_ITSELF"]),
        (A, N1, ["a egress normal", "WORKLOAD_TO_HOST_ACCEPTED"]),
        (A, N2, ["a egress normal", "NO_HOST_ENDPOINT"]),
        (N1, A, ["HOST_TO_LOCAL_WORKLOAD"]),
        (N1, C, ["NO_HOST_ENDPOINT", "c ingress normal"]),
        (N1, D, ["NO_HOST_ENDPOINT", "d ingress normal"]),
        (N1, N1, ["LOOPBACK"]),
        (N1, N2, ["NO_HOST_ENDPOINT", "NO_HOST_ENDPOINT"]),
        (OUT, N1, ["NO_HOST_ENDPOINT"]),
        (OUT, "192.0.2.2", ["NOT_OURS"]),
    ],
)
def test_without_host_endpoints(source: str, destination: str, expected: list[str]) -> None:
    """Each end's own policy, and the exemptions of SEMANTICS 4.5 and 1.1."""
    assert hops(world(), packet(source, destination)) == expected


IN, IN_LOCAL = "untracked+pre-dnat+forward", "untracked+pre-dnat+normal"
OUTWARD, OUT_LOCAL = "untracked+forward", "untracked+normal"


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        (A, B, ["a egress normal", "b ingress normal"]),
        (A, C, ["a egress normal", f"eth1 egress {OUTWARD}", f"eth2 ingress {IN}", "c ingress normal"]),
        (A, N1, ["a egress normal", "WORKLOAD_TO_HOST_ACCEPTED"]),
        (A, N2, ["a egress normal", f"eth1 egress {OUTWARD}", f"eth2 ingress {IN_LOCAL}"]),
        (A, OUT, ["a egress normal", f"eth1 egress {OUTWARD}"]),
        (OUT, A, [f"eth1 ingress {IN}", "a ingress normal"]),
        (D, A, ["d egress normal", f"eth1 ingress {IN}", "a ingress normal"]),
        (N1, N2, [f"eth1 egress {OUT_LOCAL}", f"eth2 ingress {IN_LOCAL}"]),
        (N1, OUT, [f"eth1 egress {OUT_LOCAL}"]),
        (N1, C, [f"eth1 egress {OUT_LOCAL}", f"eth2 ingress {IN}", "c ingress normal"]),
        (N1, A, ["HOST_TO_LOCAL_WORKLOAD"]),
        (OUT, N1, [f"eth1 ingress {IN_LOCAL}"]),
    ],
)
def test_named_host_endpoints(source: str, destination: str, expected: list[str]) -> None:
    """On the interface to other nodes, in and out; local traffic meets normal policy, the rest forward policy."""
    assert hops(world(ETH1, ETH2), packet(source, destination)) == expected


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        (
            A,
            B,
            ["a egress normal", "any1 ingress pre-dnat+forward", "any1 egress forward", "b ingress normal"],
        ),
        (
            A,
            C,
            [
                "a egress normal",
                "any1 ingress pre-dnat+forward",
                "any1 egress forward",
                "any2 ingress pre-dnat+forward",
                "any2 egress forward",
                "c ingress normal",
            ],
        ),
        (A, N1, ["a egress normal", "any1 ingress pre-dnat", "WORKLOAD_TO_HOST_ACCEPTED"]),
        (N1, A, ["HOST_TO_LOCAL_WORKLOAD"]),
        (OUT, A, ["any1 ingress pre-dnat+forward", "any1 egress forward", "a ingress normal"]),
        (OUT, N1, ["any1 ingress pre-dnat+normal"]),
        (N1, OUT, ["any1 egress normal"]),
        (N1, N1, ["LOOPBACK"]),
    ],
)
def test_wildcard_host_endpoints(source: str, destination: str, expected: list[str]) -> None:
    """On every interface: a workload's too, where directions are the host's; never untracked."""
    assert hops(world(ANY1, ANY2), packet(source, destination)) == expected


@pytest.mark.parametrize(
    ("action", "hosts", "expected"),
    [
        (Action.DENY, (), ["a egress normal", "WORKLOAD_TO_HOST_DROPPED"]),
        (Action.ALLOW, (), ["a egress normal", "WORKLOAD_TO_HOST_ACCEPTED"]),
        (Action.PASS, (), ["a egress normal", "NO_HOST_ENDPOINT"]),
        (Action.PASS, (ETH1,), ["a egress normal", "NO_HOST_ENDPOINT"]),
        (Action.PASS, (ANY1,), ["a egress normal", "any1 ingress pre-dnat+normal"]),
        (Action.DENY, (ANY1,), ["a egress normal", "any1 ingress pre-dnat", "WORKLOAD_TO_HOST_DROPPED"]),
    ],
)
def test_workload_to_its_own_host(action: Action, hosts: tuple[Endpoint, ...], expected: list[str]) -> None:
    """After the workload's egress policy the setting decides; with Pass a wildcard host endpoint does."""
    assert [
        render(hop, packet(A, N1))
        for hop in Topology(world(*hosts, settings=PolicySettings(workload_to_host=action)))
        .plan(Flow(packet(A, N1)))
        .hops
    ] == expected


@pytest.mark.parametrize(
    ("hosts", "address", "expected"),
    [
        ((ETH1, host("aaa", "n1", "eth1", "172.17.0.1")), N1, "eth1"),
        ((ETH1, host("aaa", "n1", "eth1", "172.17.0.1")), "172.17.0.1", "aaa"),
        ((host("b", "n1", "eth0", N1), host("a", "n1", "eth0", N1)), N1, "a"),
        ((ANY1, host("x", "n1", "eth0")), N1, "x"),
        ((ANY1, host("x", "n1", "eth0", "172.17.0.1")), N1, "any1"),
        ((host("x", "n1", "eth0", "172.17.0.1"),), N1, "x"),
        ((host("x", "n1", None, N1), ANY1), N1, "x"),
        ((host("b", "n1", "eth0"), host("a", "n1", None, N1)), N1, "b"),
        ((host("b", "n1", "eth0", N1), host("a", "n1", None, N1)), N1, "b"),
        ((host("b", "n1", "eth0", N1), host("a", "n1", "eth0")), N1, "a"),
        ((host("b", "n1", "eth0", N1), host("a", "n1", "eth1")), N1, "b"),
        ((host("b", "n1", None, N1), host("a", "n1", None, N1), ANY1), N1, "a"),
        ((host("b", "n1", "*"), host("a", "n1", "*")), N1, "a"),
        ((host("a", "n1", None, "172.17.0.1"), ANY1), N1, "any1"),
        ((host("a", "n1", None, "172.17.0.1"), host("b", "n1", "*"), host("c", "n1", "eth0")), None, "c"),
        ((ETH1, ANY1), None, "eth1"),
        ((host("x", "n9", "eth0", "172.17.0.1"), host("y", "n9", "*")), None, "x"),
    ],
)
def test_which_host_endpoint_an_interface_has(hosts: tuple[Endpoint, ...], address: str | None, expected: str) -> None:
    """One that names the interface, then one with the address, then the wildcard, then any; by name among equals."""
    held = world(*hosts)
    node = hosts[0].node
    assert node is not None
    found = Topology(held).uplink(node, None if address is None else ip_address(address), 4)
    assert found is not None
    assert found.key.name == expected


def test_failsafe_traffic_meets_nothing_before_normal_policy() -> None:
    """Neither untracked nor preDNAT policy of a host can block it; forwarded traffic has no such right."""
    held = world(ETH1)
    assert hops(held, packet(OUT, N1, TCP, 22)) == ["eth1 ingress normal"]
    assert hops(held, packet(N1, OUT, UDP, 53)) == ["eth1 egress normal"]
    assert hops(held, packet(OUT, A, TCP, 22)) == [f"eth1 ingress {IN}", "a ingress normal"]
    held.settings = PolicySettings(failsafe_inbound=(Failsafe(TCP, 22, None),), failsafe_outbound=())
    assert hops(held, packet(N1, OUT, UDP, 53)) == [f"eth1 egress {OUT_LOCAL}"]


def test_failsafe_ports_are_those_of_the_node() -> None:
    """Of the node whose interface it is."""
    held = world(ETH1, ETH2, settings=PolicySettings(node_failsafes={("n1", INGRESS): ()}))
    assert hops(held, packet(OUT, N1, TCP, 22)) == [f"eth1 ingress {IN_LOCAL}"]
    assert hops(held, packet(OUT, N2, TCP, 22)) == ["eth2 ingress normal"]


def test_tunnels_between_nodes_meet_nothing_before_normal_policy() -> None:
    """At both ends, whatever host endpoint they have; from and to anybody else they are packets like any other."""
    for hosts, names in (((ETH1, ETH2), ("eth1", "eth2")), ((ANY1, ANY2), ("any1", "any2"))):
        held = world(*hosts)
        expected = [f"{names[0]} egress normal", f"{names[1]} ingress normal"]
        assert hops(held, packet(N1, N2, UDP, 4789)) == expected
        assert hops(held, packet(N1, N2, 4, 0)) == expected
    held = world(ETH1, ETH2)
    assert hops(held, packet(OUT, N1, UDP, 4789)) == [f"eth1 ingress {IN_LOCAL}"]
    assert hops(held, packet(N1, OUT, UDP, 4789)) == [f"eth1 egress {OUT_LOCAL}"]
    assert hops(held, packet(N1, C, UDP, 4789)) == [
        f"eth1 egress {OUT_LOCAL}",
        f"eth2 ingress {IN}",
        "c ingress normal",
    ]
    assert hops(held, packet(A, N2, UDP, 4789))[-1] == f"eth2 ingress {IN_LOCAL}"
    assert hops(held, packet(N1, N2, TCP, 4789)) == [f"eth1 egress {OUT_LOCAL}", f"eth2 ingress {IN_LOCAL}"]


def test_the_address_of_a_host_endpoint_makes_no_known_node() -> None:
    """Whoever writes host endpoints must not open tunnels by it."""
    held = world(ETH1, host("other", "n7", "eth0", OUT))
    assert hops(held, packet(OUT, N1, UDP, 4789))[-1] == f"eth1 ingress {IN_LOCAL}"


def test_a_failsafe_port_is_the_one_after_translation() -> None:
    """Translating some port to ssh opens it, translating ssh away closes it."""
    held = world(ETH1)
    assert hops(held, packet(OUT, N1, TCP, 2222), (N1, 22)) == ["eth1 ingress normal"]
    assert hops(held, packet(OUT, N1, TCP, 22), (N1, 2222)) == [f"eth1 ingress {IN_LOCAL}"]


@pytest.mark.parametrize(
    ("source", "destination", "dnat_to", "expected"),
    [
        # a node port: translated on the node whose address it is
        (OUT, N1, (A, 80), ["eth1 ingress untracked+pre-dnat+forward'", "a ingress normal'"]),
        (
            OUT,
            N1,
            (C, 80),
            [
                "eth1 ingress untracked+pre-dnat+forward'",
                "eth1 egress untracked'+forward'",
                "eth2 ingress untracked'+pre-dnat'+forward'",
                "c ingress normal'",
            ],
        ),
        # a service address: translated where the sender is, or before the receiver
        (
            A,
            "10.96.0.1",
            (C, 80),
            [
                "a egress normal'",
                "eth1 egress untracked'+forward'",
                "eth2 ingress untracked'+pre-dnat'+forward'",
                "c ingress normal'",
            ],
        ),
        (OUT, "10.96.0.1", (C, 80), ["eth2 ingress untracked+pre-dnat+forward'", "c ingress normal'"]),
        (N1, "10.96.0.1", (A, 80), ["HOST_TO_LOCAL_WORKLOAD"]),
        (A, "10.96.0.1", (A, 80), ["a egress normal'", "HAIRPIN"]),
        # another node's port, with the backend there, at home, and the sender itself; of a process of the node, too
        (
            A,
            N2,
            (C, 80),
            [
                "a egress normal",
                "eth1 egress untracked+forward",
                "eth2 ingress untracked+pre-dnat+forward'",
                "c ingress normal'",
            ],
        ),
        (D, N2, (C, 80), ["d egress normal", "eth2 ingress untracked+pre-dnat+forward'", "c ingress normal'"]),
        (
            A,
            N2,
            (A, 80),
            [
                "a egress normal",
                "eth1 egress untracked+forward",
                "eth2 ingress untracked+pre-dnat+forward'",
                "eth2 egress untracked'+forward'",
                "eth1 ingress untracked'+pre-dnat'+forward'",
                "a ingress normal'",
            ],
        ),
        (
            N1,
            N2,
            (C, 80),
            ["eth1 egress untracked+normal", "eth2 ingress untracked+pre-dnat+forward'", "c ingress normal'"],
        ),
        # its own node's port is translated before it leaves
        (
            A,
            N1,
            (C, 80),
            [
                "a egress normal'",
                "eth1 egress untracked'+forward'",
                "eth2 ingress untracked'+pre-dnat'+forward'",
                "c ingress normal'",
            ],
        ),
        (A, N1, (A, 80), ["a egress normal'", "HAIRPIN"]),
        (
            A,
            N2,
            (B, 80),
            [
                "a egress normal",
                "eth1 egress untracked+forward",
                "eth2 ingress untracked+pre-dnat+forward'",
                "eth2 egress untracked'+forward'",
                "eth1 ingress untracked'+pre-dnat'+forward'",
                "b ingress normal'",
            ],
        ),
        # a node that balances between outsiders
        (OUT, N1, ("192.0.2.9", 80), ["eth1 ingress untracked+pre-dnat+forward'", "eth1 egress untracked'+forward'"]),
    ],
)
def test_translation(source: str, destination: str, dnat_to: tuple[str, int], expected: list[str]) -> None:
    """Before the node that translates, all policy sees the original (no mark); there, untracked and preDNAT policy do."""
    assert hops(world(ETH1, ETH2), packet(source, destination), dnat_to) == expected


def test_a_wildcard_and_failsafes_of_the_sender_see_what_another_node_translates_as_it_was_written() -> None:
    """What leaves the sender's node is for the other node's address, whatever becomes of it there."""
    assert hops(world(ANY1), packet(A, N2), (C, 80))[:2] == ["a egress normal", "any1 ingress pre-dnat+forward"]
    assert hops(world(ETH1), packet(N1, N2, TCP, 6443), (C, 80))[0] == "eth1 egress normal"
    assert hops(world(ETH1), packet(N1, N2, TCP, 80), (C, 6443))[0] == "eth1 egress untracked+normal"


@pytest.mark.parametrize(
    ("source", "destination", "icmp_type", "code", "passes"),
    [
        ("fd00::1", "ff02::1:ff00:2", 135, 0, True),
        ("::", "ff02::1:ff00:1", 135, 0, True),
        ("fd00::1", "fe80::1", 136, 0, True),
        ("fd00::1", "ff02::2", 133, 0, True),
        ("fe80::1", "ff02::16", 143, 0, True),
        ("::", "ff02::1:ff00:1", 131, 0, True),
        ("fd00::1", "fd00::2", 135, 0, False),  # routers would pass it on
        ("fd00::1", "ff05::2", 133, 0, False),
        ("fd00::1", "ff02::1", 135, 1, False),
        ("fd00::1", "ff02::16", 143, 0, False),  # not from an address of the link
        ("fe80::1", "fd00::2", 130, 0, False),
        ("fd00::1", "ff02::1", 134, 0, False),
        ("fd00::1", "ff02::1", 128, 0, False),
    ],
)
def test_neighbour_discovery(source: str, destination: str, icmp_type: int, code: int, passes: bool) -> None:  # noqa: FBT001 - a table's column
    """By type, and only what stays on its link."""
    about = Packet(ip_address(source), ip_address(destination), ICMPV6, icmp_type=icmp_type, icmp_code=code)
    assert (hops(world(), about) == ["NEIGHBOUR_DISCOVERY"]) is passes


def test_over_ipv4_neighbour_discovery_is_a_message_like_any_other() -> None:
    """ICMPv6 is a protocol number there, no more."""
    foreign = Packet(ip_address(A), ip_address(B), ICMPV6, icmp_type=135)
    assert hops(world(), foreign) == ["a egress normal", "b ingress normal"]


@pytest.mark.parametrize(
    ("about", "is_forged"),
    [
        (Packet(ip_address(A), ip_address(B), UDP, source_port=67, destination_port=68), True),
        (Packet(ip_address(A), ip_address(B), UDP, source_port=68, destination_port=67), False),
        (Packet(ip_address(A), ip_address(B), ICMP, icmp_type=5), True),
        (Packet(ip_address(A), ip_address(B), ICMP, icmp_type=3), False),
        (Packet(ip_address(OUT), ip_address(B), ICMP, icmp_type=5), False),
    ],
    ids=["DHCP offer", "DHCP request", "redirect", "unreachable", "from a router"],
)
def test_a_workload_does_not_speak_for_routers(about: Packet, is_forged: bool) -> None:  # noqa: FBT001
    """Nor for DHCP servers, whatever its policy says; what is outside may."""
    assert (hops(world(), about) == ["FORGED"]) is is_forged


def test_the_ends_may_be_told() -> None:
    """For a pod of the host's network on a node whose address is not known."""
    flow = Flow(packet("172.16.0.99", A), source=FlowEnd(FlowEndKind.HOST, node="n1"))
    assert [hop.reason for hop in Topology(world()).plan(flow).hops] == [HopReason.HOST_TO_LOCAL_WORKLOAD]
    assert Topology(world()).locate(ip_address("172.16.0.99")) == OUTSIDE


# --- combining answers --------------------------------------------------------------------------------------------------

ALLOW, DENY, CONTINUE = Outcome.ALLOW, Outcome.DENY, Outcome.CONTINUE


def answer(outcome: Outcome, staged: Outcome | None = None) -> Verdict:
    cause = Cause(CauseKind.NO_MATCH, INGRESS)
    return Verdict(outcome, cause, staged or outcome, cause)


def question(stage: Stage, name: str = "h", direction: Direction = INGRESS) -> Question:
    return Question(EndpointKey("HostEndpoint", "", name), direction, stage, packet(OUT, N1))


RAW, PRE, NORMAL = question(Stage.UNTRACKED), question(Stage.PRE_DNAT), question(Stage.NORMAL)
RAW_BACK, NORMAL_BACK = question(Stage.UNTRACKED, direction=EGRESS), question(Stage.NORMAL, direction=EGRESS)
ARRIVAL = JourneyHop(RAW.endpoint, INGRESS, (RAW, PRE, NORMAL), (RAW_BACK, NORMAL_BACK))
LAST = question(Stage.NORMAL, "pod")


def result(answers: dict[Question, Verdict], *hops: JourneyHop) -> Finding:
    return walk(Journey(Flow(packet(OUT, N1)), hops), answers.__getitem__)


@pytest.mark.parametrize(
    ("answers", "allowed", "decider"),
    [
        ({RAW: CONTINUE, PRE: CONTINUE, NORMAL: ALLOW}, True, NORMAL),
        ({RAW: CONTINUE, PRE: CONTINUE, NORMAL: DENY}, False, NORMAL),
        ({RAW: CONTINUE, PRE: CONTINUE, NORMAL: CONTINUE}, True, NORMAL),
        ({RAW: CONTINUE, PRE: ALLOW}, True, PRE),
        ({RAW: CONTINUE, PRE: DENY}, False, PRE),
        ({RAW: DENY}, False, RAW),
        ({RAW: ALLOW, RAW_BACK: ALLOW}, True, RAW_BACK),
        ({RAW: ALLOW, RAW_BACK: DENY}, False, RAW_BACK),
        ({RAW: ALLOW, RAW_BACK: CONTINUE, NORMAL_BACK: DENY}, False, NORMAL_BACK),
    ],
)
def test_stages_of_one_hop(answers: dict[Question, Outcome], allowed: bool, decider: Question) -> None:  # noqa: FBT001
    """The first word counts; untracked policy that allows is asked about the reply as well; no others are asked."""
    found = result({asked: answer(outcome) for asked, outcome in answers.items()}, ARRIVAL)
    assert (found.allowed, found.question) == (allowed, decider)
    assert [asked for asked, _ in found.answers] == list(answers)


def test_all_hops_must_allow_and_the_first_refusal_is_named() -> None:
    """Questions after a refusal are not evaluated."""
    first, second = JourneyHop(LAST.endpoint, INGRESS, (NORMAL,)), JourneyHop(LAST.endpoint, INGRESS, (LAST,))
    found = result({NORMAL: answer(ALLOW), LAST: answer(DENY)}, first, second)
    assert (found.allowed, found.question) == (False, LAST)
    found = result({NORMAL: answer(DENY)}, first, second)
    assert (found.allowed, found.question) == (False, NORMAL)


def test_a_reason_decides_without_a_question() -> None:
    """The last word of an allowed journey may be one; the one that refuses ends it."""
    asked = JourneyHop(LAST.endpoint, INGRESS, (LAST,))
    found = result({LAST: answer(ALLOW)}, asked, JourneyHop(reason=HopReason.HAIRPIN))
    assert (found.allowed, found.question, found.cause) == (True, None, HopReason.HAIRPIN)
    found = result({LAST: answer(ALLOW)}, asked, JourneyHop(reason=HopReason.WORKLOAD_TO_HOST_DROPPED))
    assert (found.allowed, found.cause) == (False, HopReason.WORKLOAD_TO_HOST_DROPPED)
    assert str(found) == HopReason.WORKLOAD_TO_HOST_DROPPED.value


def test_the_pending_verdict_takes_its_own_way() -> None:
    """Staged answers may allow or refuse where the enforced ones do not, and meet other stages."""
    answers = {RAW: answer(CONTINUE), PRE: answer(ALLOW, CONTINUE), NORMAL: answer(ALLOW, DENY)}
    found = result(answers, ARRIVAL)
    assert (found.allowed, found.staged_allowed) == (True, False)
    found = result({RAW: answer(DENY, CONTINUE), PRE: answer(ALLOW)}, ARRIVAL)
    assert (found.allowed, found.staged_allowed) == (False, True)


def test_a_finding_names_where_and_why() -> None:
    """For people: the endpoint and the rule."""
    cause = Cause(CauseKind.RULE, INGRESS, "default", None, index=2, action=Action.DENY)
    verdict = replace(answer(DENY), cause=cause)
    assert str(result({LAST: verdict}, JourneyHop(LAST.endpoint, INGRESS, (LAST,)))) == f"HostEndpoint/pod: {cause}"


def test_a_journey_lists_every_question_there_could_be() -> None:
    """The questions about replies too."""
    journey = Journey(Flow(packet(OUT, N1)), (ARRIVAL,))
    assert list(journey.questions()) == [RAW, PRE, NORMAL, RAW_BACK, NORMAL_BACK]
