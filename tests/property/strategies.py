# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for selectors, worlds of the internal policy model, and packets to judge in them.

Invariant: all universes are small (a few labels, addresses, ports and names), so that what is drawn independently meets:
selectors match, nets overlap, orders tie, names collide, packets hit the edges of ranges.  Everything drawn is allowed by
`netpol_ebpf.policy.types` and defined by MATCHING.md, also what no translation of today makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any, TypeVar

import hypothesis.strategies as st

from netpol_ebpf.policy.types import (
    ICMP,
    ICMPV6,
    SCTP,
    TCP,
    UDP,
    UDPLITE,
    Action,
    Backend,
    BackendMatch,
    ClusterNode,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    Entity,
    Failsafe,
    IcmpType,
    IPAddress,
    IPNetwork,
    LabelledNets,
    NamedPort,
    Packet,
    Policy,
    PolicyKey,
    PolicySettings,
    PolicyTier,
    Ports,
    ProfileRules,
    Question,
    Rule,
    ServiceBackends,
    Stage,
    Staged,
    Tunnel,
    World,
)  # fmt: skip
from netpol_ebpf.selector import Selector, tree

T = TypeVar("T")
Strategy = st.SearchStrategy

# --- selectors ------------------------------------------------------------------------------------------------------


def selector_trees(
    keys: tuple[str, ...], values: tuple[str, ...], *, max_leaves: int = 8
) -> Strategy[tree.SelectorNode]:
    """Expression trees with every operator over these keys and values."""
    key, value = st.sampled_from(keys), st.sampled_from(values)
    some = st.lists(value, max_size=4)
    leaves: Strategy[tree.SelectorNode] = st.one_of(
        st.builds(tree.Equals, key, value),
        st.builds(tree.In, key, some),
        st.builds(tree.Has, key),
        st.builds(tree.NotEquals, key, value),
        st.builds(tree.NotIn, key, some),
        st.builds(tree.Contains, key, value),
        st.builds(tree.StartsWith, key, value),
        st.builds(tree.EndsWith, key, value),
        st.just(tree.All()),
        st.just(tree.Global()),
    )

    def grow(inner: Strategy[tree.SelectorNode]) -> Strategy[tree.SelectorNode]:
        operands = st.lists(inner, min_size=2, max_size=3).map(tuple)
        return st.one_of(st.builds(tree.And, operands), st.builds(tree.Or, operands), st.builds(tree.negated, inner))

    return st.recursive(leaves, grow, max_leaves=max_leaves)


# --- universes ------------------------------------------------------------------------------------------------------

LABEL_KEYS = ("app", "env", "team")
LABEL_VALUES = ("a", "b", "ab")
NAMESPACES = ("n1", "n2")
ADDRESSES: tuple[IPAddress, ...] = tuple(
    ip_address(text)
    for text in ("10.0.0.0", "10.0.0.1", "10.0.0.3", "10.0.0.4", "10.0.1.0", "192.0.2.9", "fd00::", "fd00::1", "fd00::4", "2001:db8::9")
)  # fmt: skip
NETS: tuple[IPNetwork, ...] = tuple(
    ip_network(text)
    for text in (
        "10.0.0.0/24", "10.0.0.0/30", "10.0.0.1/32", "10.0.0.4/31", "10.0.0.0/8", "192.0.2.0/24", "0.0.0.0/0", "0.0.0.0/1",
        "fd00::/64", "fd00::/126", "fd00::1/128", "2001:db8::/32", "::/0",
    )
)  # fmt: skip
EDGES = (1, 79, 80, 81, 255, 256, 443, 8080, 65534, 65535)
"""Ends of port ranges; 255 and 256 are on both sides of a block of the compiled tables."""
PORT_NAMES = ("http", "dns")
TIERS = ("default", "admin", "zz")
ORDERS = (10.0, 1000.0, 1000000.0, math.inf)
PROFILES = ("kns.n1", "custom", "missing")
WORKLOADS = tuple(EndpointKey("Pod", namespace, name) for namespace in NAMESPACES for name in ("p", "q"))
HOSTS = (EndpointKey("HostEndpoint", "", "h"), EndpointKey("HostEndpoint", "", "i"))
NODES = ("node-1", "node-2")
SERVICES = (("n1", "s"), ("n2", "s"))
POLICY_KINDS = ("KubernetesNetworkPolicy", "NetworkPolicy", "GlobalNetworkPolicy", "ClusterNetworkPolicy")
PROTOCOLS = (TCP, UDP, SCTP, ICMP, ICMPV6, UDPLITE, 47)
ICMP_TYPES = (0, 3, 8, 128, 254)
ICMP_CODES = (0, 1, 255)

labels: Strategy[dict[str, str]] = st.dictionaries(
    st.sampled_from(LABEL_KEYS), st.sampled_from(LABEL_VALUES), max_size=3
)
_plain_trees: tuple[tree.SelectorNode, ...] = (
    tree.All(),
    tree.Has("app"),
    tree.NotEquals("app", "a"),
    tree.Equals("app", "a"),
)
selectors: Strategy[Selector] = st.one_of(
    st.sampled_from(_plain_trees),
    selector_trees(LABEL_KEYS, LABEL_VALUES, max_leaves=3),
).map(Selector)
directions = st.sampled_from(Direction)


def _tuples(elements: Strategy[T], *, min_size: int = 0, max_size: int = 2) -> Strategy[tuple[T, ...]]:
    return st.lists(elements, min_size=min_size, max_size=max_size).map(tuple)


@st.composite
def _several(draw: st.DrawFn, elements: Strategy[T], least: int, most: int, by: Callable[[T], Any] = id) -> list[T]:
    """A list of any length with equal chance; `hypothesis` left to itself prefers short ones."""
    size = draw(st.integers(least, most))
    return draw(st.lists(elements, min_size=size, max_size=size, unique_by=by))


def _distinct(values: tuple[T, ...], *, max_size: int) -> Strategy[tuple[T, ...]]:
    return st.lists(st.sampled_from(values), unique=True, max_size=max_size).map(tuple)


def _with_some(build: Callable[..., T], fields: dict[str, Strategy[Any]], *, most: int) -> Strategy[T]:
    """``build`` with at most ``most`` of the optional fields given. Draws little for what is left out."""

    @st.composite
    def draw_fields(draw: st.DrawFn) -> T:
        names = draw(st.lists(st.sampled_from(sorted(fields)), unique=True, max_size=most))
        return build(**{name: draw(fields[name]) for name in names})

    return draw_fields()


# --- rules ----------------------------------------------------------------------------------------------------------

port_ranges = st.tuples(st.sampled_from(EDGES), st.sampled_from(EDGES)).map(lambda pair: (min(pair), max(pair)))
ports = st.builds(Ports, _tuples(port_ranges), _distinct(PORT_NAMES, max_size=2))
icmp_types = st.builds(IcmpType, st.sampled_from(ICMP_TYPES), st.none() | st.sampled_from(ICMP_CODES))
nets = _tuples(st.sampled_from(NETS), min_size=1)
service_matches = st.builds(
    lambda key, match_ports: BackendMatch(key[0], key[1], match_ports),
    st.sampled_from((*SERVICES, ("n1", "none"))),
    st.booleans(),
)


def _entity(**fields: Any) -> Entity:
    """One with both selectors is none: the negated one is left out."""
    return Entity(
        **{name: value for name, value in fields.items() if name != "not_selector" or "selector" not in fields}
    )


entities: Strategy[Entity] = _with_some(
    _entity,
    {
        "nets": nets,
        "not_nets": nets,
        "selector": selectors,
        "not_selector": selectors,
        "nodes": selectors,
        "ports": ports,
        "not_ports": ports,
        "service": service_matches,
        "impossible": st.sampled_from((False, False, False, True)),
    },
    most=3,
)
actions = st.sampled_from(Action)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    """A rule with index 0."""
    rule = draw(
        _with_some(
            lambda **fields: Rule(Action.DENY, 0, **fields),
            {
                "ip_version": st.sampled_from((4, 6)),
                "protocol": st.sampled_from(PROTOCOLS),
                "not_protocol": st.sampled_from(PROTOCOLS),
                "icmp": icmp_types,
                "not_icmp": icmp_types,
                "source": entities,
                "destination": entities,
            },
            most=3,
        )
    )
    action = draw(actions)
    # Only Allow rules can lack something of this build.
    lacking = draw(st.sampled_from(("", "", "", "", "http"))) if action is Action.ALLOW else ""
    return replace(rule, action=action, unsupported=lacking)


@st.composite
def rule_lists(draw: st.DrawFn) -> tuple[Rule, ...]:
    """Rules as translated: one or two internal rules for each entry of the user's list."""
    drawn = draw(_several(rules(), 0, 3))
    index, indexed = 0, []
    for rule in drawn:
        indexed.append(replace(rule, index=index))
        index += draw(st.sampled_from((1, 1, 0)))
    return tuple(indexed)


# --- objects --------------------------------------------------------------------------------------------------------

named_ports = st.builds(
    NamedPort, st.sampled_from(PORT_NAMES), st.sampled_from((TCP, UDP, SCTP)), st.sampled_from((80, 81, 8080))
)


@st.composite
def endpoints(draw: st.DrawFn, key: EndpointKey) -> Endpoint:
    """An endpoint of that key; addresses may be those of others too, or none."""
    host = key in HOSTS
    return Endpoint(
        key,
        EndpointKind.HOST if host else EndpointKind.WORKLOAD,
        draw(labels),
        draw(_distinct(ADDRESSES, max_size=2)),
        ports=draw(_tuples(named_ports, max_size=2)),
        profiles=draw(_distinct(PROFILES, max_size=2)),
        node=draw(st.sampled_from(NODES)),
        interface=draw(st.sampled_from(("*", "eth0"))) if host else f"veth-{key.namespace}-{key.name}",
        allowed_sources=() if host else draw(st.sampled_from(((), (), (), (NETS[0],)))),
    )


@st.composite
def policies(draw: st.DrawFn, key: PolicyKey) -> Policy:
    """An enforced policy of that key; those with host-only flags are as validation lets them be."""
    types = frozenset(draw(st.sampled_from(([Direction.INGRESS], [Direction.EGRESS], list(Direction)))))
    flags = draw(st.sampled_from(("", "", "", "", "forward", "pre", "untracked")))
    if flags == "pre":
        types = frozenset({Direction.INGRESS})
    return Policy(
        key,
        draw(st.sampled_from((*TIERS, "ghost"))),
        draw(st.sampled_from(ORDERS)),
        draw(selectors),
        types,
        ingress=draw(rule_lists()) if Direction.INGRESS in types else (),
        egress=draw(rule_lists()) if Direction.EGRESS in types else (),
        do_not_track=flags == "untracked",
        pre_dnat=flags == "pre",
        apply_on_forward=bool(flags),
    )


@st.composite
def staged_policies(draw: st.DrawFn, twins: tuple[PolicyKey, ...]) -> Policy:
    """A staged policy that replaces an enforced one, or one that is not there, or none; or asks for its removal."""
    replaces = draw(st.none() | st.sampled_from((*twins, PolicyKey("NetworkPolicy", "n1", "gone"))))
    name = replaces.name if replaces and draw(st.booleans()) else "staged"
    key = PolicyKey("StagedGlobalNetworkPolicy", "", name)
    policy = draw(policies(key))
    staged = draw(st.sampled_from((Staged.SET, Staged.SET, Staged.DELETE)))
    if staged is Staged.DELETE:
        policy = replace(policy, ingress=(), egress=())
    return replace(policy, staged=staged, replaces=replaces)


policy_keys = st.builds(
    PolicyKey, st.sampled_from(POLICY_KINDS), st.sampled_from(("", *NAMESPACES)), st.sampled_from(("x", "y"))
)
failsafes = st.builds(
    Failsafe, st.sampled_from((TCP, UDP)), st.sampled_from((80, 443)), st.none() | st.sampled_from(NETS)
)
tunnels = st.frozensets(st.sampled_from((Tunnel(47), Tunnel(UDP, 80), Tunnel(UDP, 443), Tunnel(SCTP, 80))), max_size=3)
settings_ = st.just(PolicySettings()) | st.builds(
    PolicySettings,
    _tuples(failsafes),
    _tuples(failsafes),
    st.sampled_from((Action.DENY, Action.PASS, Action.ALLOW)),
    st.dictionaries(
        st.tuples(st.sampled_from(NODES), st.sampled_from(tuple(Direction))), _tuples(failsafes), max_size=2
    ),
    tunnels,
)
tiers = st.dictionaries(
    st.sampled_from(TIERS), st.tuples(st.sampled_from(ORDERS), st.sampled_from((Action.DENY, Action.PASS))), max_size=3
).map(lambda drawn: {name: PolicyTier(name, order, action) for name, (order, action) in drawn.items()})
profiles = st.dictionaries(
    st.sampled_from(PROFILES[:2]), st.tuples(rule_lists(), rule_lists()), max_size=2
).map(lambda drawn: {name: ProfileRules(name, *lists) for name, lists in drawn.items()})  # fmt: skip
ALLOW_ALL = (Rule(Action.ALLOW, 0),)
network_sets = st.dictionaries(
    st.sampled_from(("n1/set", "set")), st.tuples(labels, _distinct(NETS, max_size=3)), max_size=2
).map(lambda drawn: {key: LabelledNets(key, *parts) for key, parts in drawn.items()})  # fmt: skip
nodes = st.dictionaries(st.sampled_from(NODES), st.tuples(labels, _distinct(ADDRESSES, max_size=2)), max_size=2).map(
    lambda drawn: {name: ClusterNode(name, *parts) for name, parts in drawn.items()}
)
backends = st.builds(
    Backend, st.sampled_from(ADDRESSES), st.sampled_from((TCP, UDP, SCTP)), st.sampled_from((0, 80, 8080))
)
services = st.dictionaries(st.sampled_from(SERVICES), st.frozensets(backends, max_size=3), max_size=2).map(
    lambda drawn: {key: ServiceBackends(*key, members) for key, members in drawn.items()}
)


@st.composite
def worlds(draw: st.DrawFn, *, max_policies: int = 4) -> World:
    """A cluster state with at least one endpoint; profile kns.n1 allows all unless it is drawn otherwise or missing."""
    keys = draw(_several(st.sampled_from((*HOSTS, *WORKLOADS)), 1, 4, by=str))
    enforced = draw(_several(policy_keys, 0, max_policies, by=str))
    every = [draw(policies(key)) for key in enforced]
    every += draw(st.lists(staged_policies(tuple(enforced)), max_size=2, unique_by=lambda policy: policy.key))
    custom = draw(profiles)
    if draw(st.booleans()):
        custom = {"kns.n1": ProfileRules("kns.n1", ALLOW_ALL, ALLOW_ALL), **custom}
    return World(
        tiers=draw(tiers),
        policies={policy.key: policy for policy in every},
        profiles=custom,
        endpoints={key: draw(endpoints(key)) for key in keys},
        network_sets=draw(network_sets),
        nodes=draw(nodes),
        services=draw(services),
        settings=draw(settings_),
    )


# --- packets and questions ------------------------------------------------------------------------------------------

_PORTS_NEAR_EDGES = tuple(sorted({port for edge in EDGES for port in (edge - 1, edge, edge + 1) if 0 < port < 65536}))


@st.composite
def packets(draw: st.DrawFn) -> Packet:
    """A packet between two addresses of one family, with ports at the edges of ranges or ICMP types that rules name."""
    source = draw(st.sampled_from(ADDRESSES))
    destination = draw(st.sampled_from([address for address in ADDRESSES if address.version == source.version]))
    protocol = draw(st.sampled_from((TCP, TCP, UDP, SCTP, *PROTOCOLS, 255)))
    if protocol in (TCP, UDP, SCTP):
        port = st.sampled_from(_PORTS_NEAR_EDGES)
        return Packet(source, destination, protocol, draw(port), draw(port))
    if protocol in (ICMP, ICMPV6):
        icmp_type, code = draw(st.sampled_from((*ICMP_TYPES, 135))), draw(st.sampled_from((*ICMP_CODES, 2)))
        return Packet(source, destination, protocol, icmp_type=icmp_type, icmp_code=code)
    return Packet(source, destination, protocol)


def questions_about(world: World, drawn: list[Packet]) -> list[Question]:
    """Every endpoint in every direction and, for hosts, every stage, for each packet; and some that have no policy.

    A workload whose own address is certain (see `has_own_address_only`) is asked about packets from or to that address;
    the packets are changed accordingly.
    """
    questions = []
    for key, endpoint in world.endpoints.items():
        host = endpoint.kind is EndpointKind.HOST
        for direction in Direction:
            asked = [changed for packet in drawn for changed in _as_seen_by(endpoint, direction, packet)]
            questions += [
                Question(key, direction, stage, packet)
                for stage in Stage
                for packet in (asked if host or stage is Stage.NORMAL else asked[:1])
            ]
    unknown = EndpointKey("Pod", "n1", "unknown")
    return [*questions, Question(unknown, Direction.INGRESS, Stage.NORMAL, drawn[0])]


def has_own_address_only(endpoint: Endpoint) -> bool:
    """Whether engines may take the own side of an endpoint's packets for one of its addresses (MATCHING.md, owners)."""
    return endpoint.kind is EndpointKind.WORKLOAD and bool(endpoint.addresses) and not endpoint.allowed_sources


def _as_seen_by(endpoint: Endpoint, direction: Direction, packet: Packet) -> list[Packet]:
    if not has_own_address_only(endpoint):
        return [packet]
    own = [address for address in endpoint.addresses if address.version == packet.source.version]
    if direction is Direction.INGRESS:
        return [replace(packet, destination=address) for address in own]
    return [replace(packet, source=address) for address in own]
