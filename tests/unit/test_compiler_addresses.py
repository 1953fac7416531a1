# SPDX-License-Identifier: Apache-2.0
"""Addresses, prefixes and their identities."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from netpol_ebpf.compiler import CompiledTables, Compiler, Interpreter, KnownNumbers
from netpol_ebpf.compiler.tables import FIRST_IDENTITY, WORLD_V4, WORLD_V6
from netpol_ebpf.policy.types import (
    Action,
    Backend,
    BackendMatch,
    ClusterNode,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    Entity,
    LabelledNets,
    NamedPort,
    Policy,
    PolicyKey,
    Rule,
    ServiceBackends,
    World,
)
from netpol_ebpf.selector import EVERYTHING


def pod(
    name: str, *addresses: str, labels: dict[str, str] | None = None, ports: tuple[NamedPort, ...] = ()
) -> Endpoint:
    """A pod with these addresses."""
    key = EndpointKey("Pod", "n", name)
    return Endpoint(key, EndpointKind.WORKLOAD, labels or {}, tuple(map(ip_address, addresses)), ports=ports)


def network_set(key: str, *nets: str, **labels: str) -> LabelledNets:
    """A network set with these nets."""
    return LabelledNets(key, labels, tuple(map(ip_network, nets)))


def watching(*entities: Entity) -> Policy:
    """A policy for every endpoint whose rules have these sources, so that their terms are used."""
    rules = tuple(Rule(Action.ALLOW, index, source=entity) for index, entity in enumerate(entities))
    key = PolicyKey("GlobalNetworkPolicy", "", "watching")
    return Policy(key, "default", 1.0, EVERYTHING, frozenset({Direction.INGRESS}), rules)


def compiled(*objects: object) -> Compiler:
    """A compiler with these objects in force."""
    compiler = Compiler()
    for obj in objects:
        compiler.upsert(obj)  # type: ignore[arg-type]
    compiler.commit()
    return compiler


def identity(tables: CompiledTables, address: str) -> int:
    """The identity of a packet's address."""
    return Interpreter(tables).identity_of(ip_address(address))


def test_nothing_known_is_the_world_of_its_family() -> None:
    """There are no rows."""
    tables = compiled().tables
    assert (identity(tables, "192.0.2.1"), identity(tables, "2001:db8::1")) == (WORLD_V4, WORLD_V6)


def test_pods_with_equal_labels_share_an_identity() -> None:
    """Names and namespaces make no difference. Labels, families and named ports do."""
    port = NamedPort("http", 6, 80)
    tables = compiled(
        pod("one", "10.0.0.1", "fd00::1", labels={"a": "1"}),
        pod("two", "10.0.0.2", labels={"a": "1"}),
        pod("three", "10.0.0.3", labels={"a": "2"}),
        pod("four", "10.0.0.4", labels={"a": "1"}, ports=(port,)),
    ).tables
    numbers = [identity(tables, address) for address in ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "fd00::1")]
    assert numbers[0] == numbers[1]
    assert len(set(numbers)) == 4
    assert min(numbers) >= FIRST_IDENTITY


def test_all_prefixes_of_a_network_set_share_an_identity() -> None:
    """A hundred prefixes have one number."""
    nets = [f"198.18.{index}.0/24" for index in range(100)]
    tables = compiled(network_set("s", *nets, kind="bad")).tables
    assert len(tables.cidrs) == 100
    assert len({number for _, number in tables.cidrs.items()}) == 1
    assert len(tables.identities) == 1


def test_prefix_has_what_the_prefixes_around_it_have() -> None:
    """The longest match decides alone. Equal content is one identity, whatever its origin."""
    tables = compiled(
        network_set("outer", "10.0.0.0/8", which="outer"),
        network_set("inner", "10.1.0.0/16", which="inner"),
        network_set("both", "172.16.0.0/12", which="outer"),
        network_set("too", "172.16.0.0/12", which="inner"),
    ).tables
    assert identity(tables, "10.1.2.3") == identity(tables, "172.16.0.1")
    assert identity(tables, "10.2.0.0") != identity(tables, "10.1.0.0")
    assert identity(tables, "11.0.0.0") == WORLD_V4


def test_exact_address_includes_its_prefixes() -> None:
    """This includes a prefix of the address's own length. A pod in a net differs from an equal one outside."""
    outside, inside, own = "192.0.2.1", "10.0.0.1", "10.0.0.2"
    tables = compiled(
        pod("outside", outside, labels={"a": "1"}),
        pod("inside", inside, labels={"a": "1"}),
        pod("own", own, labels={"a": "1"}),
        network_set("s", "10.0.0.0/24", net="yes"),
        network_set("host", "10.0.0.2/32", net="own"),
    ).tables
    assert len({identity(tables, address) for address in (outside, inside, own)}) == 3
    assert ip_network("10.0.0.2/32") in tables.cidrs


def test_default_route_of_a_network_set_has_a_row() -> None:
    """All other addresses of its family then belong to the set, and every known address does, too."""
    before = compiled(pod("p", "10.0.0.1"))
    alone = before.tables.identities[identity(before.tables, "10.0.0.1")]
    tables = compiled(pod("p", "10.0.0.1"), network_set("all", "0.0.0.0/0", who="anyone")).tables
    assert tables.cidrs[ip_network("0.0.0.0/0")] == identity(tables, "203.0.113.9") >= FIRST_IDENTITY
    assert tables.identities[identity(tables, "10.0.0.1")] != alone
    assert identity(tables, "2001:db8::1") == WORLD_V6


def test_default_route_of_a_rule_needs_no_row() -> None:
    """Such a rule is about a family, and needs no prefix."""
    tables = compiled(pod("p", "10.0.0.1"), watching(Entity(nets=(ip_network("0.0.0.0/0"),)))).tables
    assert len(tables.cidrs) == 0


def test_nets_of_rules_are_stored_while_a_local_endpoint_has_the_rule() -> None:
    """Rules with equal lists share the prefixes. With the last rule they are removed."""
    nets = (ip_network("192.0.2.0/24"), ip_network("198.51.100.0/24"))
    compiler = compiled(pod("p", "10.0.0.1"), watching(Entity(nets=nets), Entity(nets=nets[::-1])))
    assert {net for net, _ in compiler.tables.cidrs.items()} == set(nets)
    assert len(compiler.tables.identities) == 2
    compiler.remove(Endpoint, EndpointKey("Pod", "n", "p"))
    compiler.commit()
    assert len(compiler.tables.cidrs) == len(compiler.tables.identities) == 0


def test_nodes_and_backends_are_known_addresses() -> None:
    """A node is known by its labels, a backend by the services in rules."""
    service = ServiceBackends("n", "s", frozenset({Backend(ip_address("10.9.0.1"), 6, 80)}))
    node = ClusterNode("node", {"zone": "a"}, (ip_address("172.16.0.1"),))
    unused = compiled(pod("p", "10.0.0.1"), service, node).tables
    assert identity(unused, "10.9.0.1") == WORLD_V4
    assert identity(unused, "172.16.0.1") >= FIRST_IDENTITY
    match = Entity(service=BackendMatch("n", "s", match_ports=False))
    used = compiled(pod("p", "10.0.0.1"), service, node, watching(match)).tables
    assert identity(used, "10.9.0.1") >= FIRST_IDENTITY


def test_address_of_a_local_endpoint_names_it() -> None:
    """The row is for anti-spoofing. A workload comes before a host. A remote endpoint has no number."""
    here, away = pod("here", "10.0.0.1"), pod("away", "10.0.0.2")
    host = Endpoint(EndpointKey("HostEndpoint", "", "h"), EndpointKind.HOST, {}, (ip_address("10.0.0.1"),))
    compiler = Compiler(lambda endpoint: endpoint.key != away.key)
    compiler.replace(World(endpoints={one.key: one for one in (here, away, host)}))
    compiler.commit()
    tables = compiler.tables
    assert tables.addresses[ip_address("10.0.0.1")].endpoint == tables.endpoints[here.key].number != 0
    assert tables.addresses[ip_address("10.0.0.2")].endpoint == 0
    assert away.key not in tables.endpoints


def test_shared_address_has_the_owners_of_all() -> None:
    """After the removal of one owner, it has the others."""
    compiler = compiled(
        pod("one", "10.0.0.1", labels={"a": "1"}),
        pod("two", "10.0.0.1", labels={"b": "1"}),
        pod("three", "10.0.0.3", labels={"b": "1"}),
    )
    tables = compiler.tables
    assert identity(tables, "10.0.0.1") != identity(tables, "10.0.0.3")
    compiler.remove(Endpoint, EndpointKey("Pod", "n", "one"))
    compiler.commit()
    assert identity(tables, "10.0.0.1") == identity(tables, "10.0.0.3")


def test_numbers_of_an_earlier_run_are_kept() -> None:
    """An identity is recognised by its content, whatever the order of objects is."""
    objects = [pod(str(index), f"10.0.0.{index}", labels={"a": str(index)}) for index in range(1, 5)]
    first = compiled(*objects)
    known = {digest: number + 100 for number, digest in first.tables.identities.items()}
    second = Compiler(known=KnownNumbers(identities=known))
    for obj in reversed(objects):
        second.upsert(obj)
    second.commit()
    assert {digest: number for number, digest in second.tables.identities.items()} == known
    second.upsert(pod("new", "10.0.0.9", labels={"a": "9"}))
    second.commit()
    assert identity(second.tables, "10.0.0.9") not in known.values()


@pytest.mark.parametrize("count", [200])
def test_prefixes_follow_when_one_around_them_changes(count: int) -> None:
    """Prefixes and addresses inside the changed one are computed again. Those outside keep their rows."""
    inner = [f"10.{index}.0.0/16" for index in range(count)]
    compiler = compiled(
        network_set("inner", *inner, a="1"),
        network_set("outside", "192.0.2.0/24", a="1"),
        pod("p", "10.3.0.1"),
        pod("q", "10.0.0.1"),
    )
    before = dict(compiler.tables.cidrs.items())
    compiler.upsert(network_set("outer", "10.0.0.0/9", b="1"))
    change = compiler.commit()
    written = change.flip["cidrs"].upserts
    assert set(written) == {ip_network("10.0.0.0/9"), *(ip_network(net) for net in inner[:128])}
    assert change.flip["addresses"].upserts.keys() == {ip_address("10.3.0.1"), ip_address("10.0.0.1")}
    compiler.remove(LabelledNets, "outer")
    compiler.commit()
    after = dict(compiler.tables.cidrs.items())
    assert {net: compiler.tables.identities[number] for net, number in after.items()}.keys() == before.keys()
    assert len(set(after.values())) == 1
