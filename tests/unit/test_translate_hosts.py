# SPDX-License-Identifier: Apache-2.0
"""Failsafe ports and automatic host endpoints, from the objects that configure them."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network
from itertools import permutations

import pytest
from worlds import read

from netpol_ebpf.policy.translate import Derivation, derive, key_of
from netpol_ebpf.policy.translate.hosts import CONTROLLER, CREATED_BY
from netpol_ebpf.policy.types import (
    FAILSAFE_INBOUND,
    FAILSAFE_OUTBOUND,
    TCP,
    TUNNELS,
    UDP,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    Failsafe,
    PolicySettings,
    Tunnel,
    World,
)

INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS
SSH, DNS = Failsafe(TCP, 22, ip_network("10.0.0.0/8")), Failsafe(UDP, 53)


def felix(name: str, spec: str) -> str:
    """A FelixConfiguration."""
    return (
        f"---\napiVersion: projectcalico.org/v3\nkind: FelixConfiguration\nmetadata: {{name: {name}}}\nspec: {spec}\n"
    )


def controllers(hosts: str) -> str:
    """The configuration of automatic host endpoints."""
    return (
        "---\napiVersion: projectcalico.org/v3\nkind: KubeControllersConfiguration\nmetadata: {name: default}\n"
        f"spec: {{controllers: {{node: {{hostEndpoint: {hosts}}}}}}}\n"
    )


def node(name: str, labels: str = "{}", *addresses: str, interfaces: str = "[]") -> str:
    """A node with addresses of its own, and an external one."""
    own = ", ".join(f"{{type: InternalIP, address: '{one}'}}" for one in addresses)
    return (
        f"---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}, labels: {labels}, "
        f"annotations: {{projectcalico.org/Interfaces: '{interfaces}'}}}}\n"
        f"status: {{addresses: [{own}, {{type: ExternalIP, address: 203.0.113.9}}]}}\n"
    )


IN_10 = "{failsafeInboundHostPorts: [{protocol: TCP, port: 22, net: 10.0.0.0/8}]}"
NONE_OUT = "{failsafeOutboundHostPorts: []}"
DNS_OUT = "{failsafeOutboundHostPorts: [{protocol: udp, port: 53}]}"


def lists(text: str, name: str) -> tuple[tuple[Failsafe, ...], tuple[Failsafe, ...]]:
    """The failsafe ports of a node, inwards and outwards."""
    settings = derive(read(text)).settings
    return settings.failsafes(name, INGRESS), settings.failsafes(name, EGRESS)


@pytest.mark.parametrize(
    ("text", "n1", "n2"),
    [
        ("", (FAILSAFE_INBOUND, FAILSAFE_OUTBOUND), (FAILSAFE_INBOUND, FAILSAFE_OUTBOUND)),
        (felix("default", IN_10), ((SSH,), FAILSAFE_OUTBOUND), ((SSH,), FAILSAFE_OUTBOUND)),
        (felix("node.n1", IN_10), ((SSH,), FAILSAFE_OUTBOUND), (FAILSAFE_INBOUND, FAILSAFE_OUTBOUND)),
        (felix("default", NONE_OUT) + felix("node.n1", DNS_OUT), (FAILSAFE_INBOUND, (DNS,)), (FAILSAFE_INBOUND, ())),
        (felix("default", IN_10) + felix("node.n1", NONE_OUT), ((SSH,), ()), ((SSH,), FAILSAFE_OUTBOUND)),
    ],
)
def test_failsafe_ports_of_nodes(text: str, n1: object, n2: object) -> None:
    """Each list by itself: the node's, else the one for all nodes, else the built-in one; an empty list is a list."""
    assert lists(text, "n1") == n1
    assert lists(text, "n2") == n2


def test_failsafe_ports_come_and_go() -> None:
    """Each change of them is a change of the settings, and no other event is one."""
    derivation = Derivation(PolicySettings(tunnels=frozenset()))
    assert derivation.take_changes().settings == derivation.world.settings
    (default,) = read(felix("default", IN_10))
    derivation.upsert(default)
    changed = derivation.take_changes().settings
    assert changed is not None
    assert (changed.failsafe_inbound, changed.tunnels) == ((SSH,), frozenset())
    derivation.upsert(default)
    (other,) = read(node("n1", "{}", "10.0.0.1"))
    derivation.upsert(other)
    assert derivation.take_changes().settings is None
    derivation.remove(*key_of(default))
    changed = derivation.take_changes().settings
    assert changed == derivation.world.settings == PolicySettings(tunnels=frozenset())
    assert not derivation.is_changed


def test_tunnels_are_told_apart_from_objects() -> None:
    """They stay while failsafe ports change, and the other way round."""
    derivation, geneve = Derivation(), Tunnel(UDP, 6081)
    (default,) = read(felix("default", IN_10))
    derivation.set_tunnels({*TUNNELS, geneve})
    derivation.upsert(default)
    assert derivation.world.settings == replace(PolicySettings(), tunnels=TUNNELS | {geneve}, failsafe_inbound=(SSH,))
    derivation.take_changes()
    derivation.set_tunnels({*TUNNELS, geneve})
    assert not derivation.is_changed
    derivation.set_tunnels(TUNNELS)
    assert derivation.take_changes().settings == replace(PolicySettings(), failsafe_inbound=(SSH,))


ENABLED = controllers("{autoCreate: Enabled}")
TEMPLATES = (
    "{autoCreate: Enabled, createDefaultHostEndpoint: DEFAULT, templates: ["
    "{generateName: lan, interfaceCIDRs: [10.0.0.0/8], nodeSelector: has(lan), labels: {where: lan, role: template}}, "
    "{generateName: nic, interfacePattern: 'eth[01]$', interfaceCIDRs: ['fd00::/8'], labels: {where: nic}}]}"
)


def hosts(world: World) -> dict[str, Endpoint]:
    """The host endpoints by name."""
    assert all(key == endpoint.key for key, endpoint in world.endpoints.items())
    return {key.name: one for key, one in world.endpoints.items() if one.kind is EndpointKind.HOST}


def addresses(endpoint: Endpoint) -> list[str]:
    return [str(address) for address in endpoint.addresses]


def test_automatic_host_endpoint_of_a_node() -> None:
    """All interfaces, the node's labels and own addresses, the controller's label, and the profile that allows all."""
    text = node("n1", "{role: worker}", "10.0.0.1", "fd00::1", interfaces='[{"name":"eth1","addresses":["192.0.2.1"]}]')
    assert derive(read(text)).endpoints == {}
    ((name, host),) = hosts(derive(read(text + ENABLED))).items()
    assert (name, host.interface, host.node) == ("n1-auto-hep", "*", "n1")
    assert dict(host.labels) == {"role": "worker", CREATED_BY: CONTROLLER}
    assert addresses(host) == ["10.0.0.1", "fd00::1", "192.0.2.1"]
    assert host.profiles == ("projectcalico-default-allow",)


def test_templates_of_host_endpoints() -> None:
    """By addresses: one for each node that has some; by pattern: one for each interface, with its own addresses besides."""
    interfaces = '[{"name":"eth0","addresses":["192.0.2.1"]},{"name":"eth1"},{"name":"eth10"},{"name":"veth0x"}]'
    text = node("n1", "{lan: '', role: worker}", "10.0.0.1", "fd00::1", interfaces=interfaces)
    text += node("n2", "{lan: ''}", "192.0.2.2") + node("n3", "{}", "10.0.0.3")
    found = hosts(derive(read(text + controllers(TEMPLATES.replace("DEFAULT", "Disabled")))))
    assert {name: (one.interface, addresses(one)) for name, one in found.items()} == {
        "n1-lan-auto-hep": (None, ["10.0.0.1"]),
        "n1-nic-eth0-auto-hep": ("eth0", ["fd00::1", "192.0.2.1"]),
        "n1-nic-eth1-auto-hep": ("eth1", ["fd00::1"]),
    }
    assert dict(found["n1-lan-auto-hep"].labels) == {
        "lan": "", "role": "template", "where": "lan", CREATED_BY: CONTROLLER,
    }  # fmt: skip
    every = hosts(derive(read(text + controllers(TEMPLATES.replace("DEFAULT", "Enabled")))))
    assert every.keys() - found.keys() == {"n1-auto-hep", "n2-auto-hep", "n3-auto-hep"}


def test_a_name_that_is_too_long_is_a_hash() -> None:
    """As the controller does it, so that both speak of one object."""
    template = f"{{autoCreate: Enabled, createDefaultHostEndpoint: Disabled, templates: [{{generateName: {'t' * 240}, interfaceCIDRs: [10.0.0.0/8]}}]}}"
    (name,) = hosts(derive(read(node("node-name", "{}", "10.0.0.1") + controllers(template))))
    assert name == "bcn4kj0cd5bbsofjw9bwuncnrqe47iomiegbbbin8z4-auto-hep"


def test_a_host_endpoint_that_is_written_takes_the_place_of_the_automatic_one() -> None:
    """A cluster's export holds the controller's own objects beside its configuration; without them the automatic one is back."""
    written = (
        "---\napiVersion: projectcalico.org/v3\nkind: HostEndpoint\nmetadata: {name: n1-auto-hep}\n"
        "spec: {node: n1, interfaceName: eth7}\n"
    )
    texts = [written, node("n1", "{}", "10.0.0.1"), ENABLED]
    for order in permutations(texts):
        derivation = Derivation()
        for resource in read("".join(order)):
            derivation.upsert(resource)
        assert hosts(derivation.world)["n1-auto-hep"].interface == "eth7"
        derivation.take_changes()
        derivation.remove("HostEndpoint", "", "n1-auto-hep")
        assert hosts(derivation.world)["n1-auto-hep"].interface == "*"
        key = EndpointKey("HostEndpoint", "", "n1-auto-hep")
        assert derivation.take_changes().endpoints == {key: derivation.world.endpoints[key]}


def test_automatic_host_endpoints_come_and_go_with_nodes_and_configuration() -> None:
    """Only what a change concerns changes."""
    derivation = Derivation()
    for resource in read(node("n1", "{}", "10.0.0.1") + node("n2", "{}", "10.0.0.2") + ENABLED):
        derivation.upsert(resource)
    derivation.take_changes()
    (moved,) = read(node("n1", "{}", "10.0.0.9"))
    derivation.upsert(moved)
    changes = derivation.take_changes()
    assert [key.name for key in changes.endpoints] == ["n1-auto-hep"]
    assert addresses(hosts(derivation.world)["n1-auto-hep"]) == ["10.0.0.9"]
    derivation.remove("Node", "", "n2")
    assert hosts(derivation.world).keys() == {"n1-auto-hep"}
    (disabled,) = read(controllers("{autoCreate: Disabled}"))
    derivation.upsert(disabled)
    assert hosts(derivation.world) == {}
    assert len(derivation.take_changes().endpoints) == 2


def test_two_nodes_whose_host_endpoints_have_one_name() -> None:
    """The first node's counts, whichever came first; when it goes, the other's is there."""
    template = "{autoCreate: Enabled, createDefaultHostEndpoint: Disabled, templates: [{generateName: b-c, interfaceCIDRs: [10.0.0.0/8]}, {generateName: c, interfaceCIDRs: [10.0.0.0/8]}]}"
    texts = [node("a", "{}", "10.0.0.1"), node("a-b", "{}", "10.0.0.2"), controllers(template)]
    for order in permutations(texts):
        derivation = Derivation()
        for resource in read("".join(order)):
            derivation.upsert(resource)
        assert hosts(derivation.world)["a-b-c-auto-hep"].node == "a"
        derivation.remove("Node", "", "a")
        assert hosts(derivation.world)["a-b-c-auto-hep"].node == "a-b"


def test_a_tunnel_and_its_number() -> None:
    """The number is what a cause holds, so it must lead back."""
    for tunnel in TUNNELS:
        assert Tunnel.of_number(tunnel.number) == tunnel
