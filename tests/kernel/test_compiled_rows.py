# SPDX-License-Identifier: Apache-2.0
"""Rows as the compiler writes them, through the branches of the program that read more than a verdict.

Hand-written rows of other tests repeat their author's beliefs.  The compiler, for one, leaves room in the bounds of a
set's constant side for later classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import packets as p
import pytest
from map_sizes import SIZES
from one_cpu import on_one_cpu
from rig import LO, Rig, Seen

from netpol_ebpf.apply.applier import Applier
from netpol_ebpf.apply.encode import EndpointFlag, EndpointSets, endpoint_element, host_element, place_element
from netpol_ebpf.compiler import Compiler
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import EndpointKey
from netpol_ebpf.resources.load import parse_documents
from netpol_loader.pins.dataplane import Dataplane

pytestmark = pytest.mark.kernel

POD, WILDCARD = EndpointKey("Pod", "shop", "pod"), EndpointKey("HostEndpoint", "", "all")
POD4, POD6, NODE4, NODE6, PEER4, PEER6 = "10.0.0.7", "fd00::7", "192.0.2.9", "2001:db8::9", "10.0.0.9", "fd00::9"
CLUSTER = f"""\
{{apiVersion: v1, kind: Namespace, metadata: {{name: shop}}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: pod, namespace: shop, labels: {{app: pod}}}}
spec: {{nodeName: node}}
status: {{podIPs: [{{ip: {POD4}}}, {{ip: "{POD6}"}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: peer, namespace: shop, labels: {{app: peer}}}}
spec: {{containers: [{{name: c, ports: [{{name: web, containerPort: 9090}}]}}]}}
status: {{podIPs: [{{ip: {PEER4}}}, {{ip: "{PEER6}"}}]}}
---
{{apiVersion: projectcalico.org/v3, kind: GlobalNetworkSet, metadata: {{name: some, labels: {{set: some}}}}, spec: {{nets: [10.0.0.0/24]}}}}
---
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {{name: all, labels: {{host: all}}}}
spec: {{node: node, interfaceName: "*", profiles: [projectcalico-default-allow]}}
"""
BORROWS = """name: pod, annotations: {cni.projectcalico.org/allowedSourcePrefixes: '["10.20.0.0/16", "fd20::/64"]'},"""
FORWARD = """\
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {{name: forward}}
spec: {{selector: host == 'all', applyOnForward: true, types: [Ingress], ingress: [{rules}]}}
"""
EGRESS = """\
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {{name: egress}}
spec: {{selector: app == 'pod', types: [Egress], egress: [{rules}]}}
"""


@dataclass(frozen=True)
class Node:
    """A dataplane with the pod on the only interface, on a node with a wildcard host endpoint."""

    rig: Rig
    sender: int
    """The sender tag: number of the endpoint that must judge the packet."""

    def returns(self, source: str, destination: str) -> Seen:
        """Run a packet to a service that reaches the pod with a sender tag; ``source``: its source there."""
        return self.rig.into(p.frame(source, destination, p.TCP, p.tcp(40000, 80)), carries=self.sender)


@pytest.fixture(scope="module")
def own_rig() -> Iterator[Rig]:
    root = Path(f"/sys/fs/bpf/netpol-rows-{os.getpid()}")
    dataplane = Dataplane.open(root, sizes=SIZES)
    rig = Rig(dataplane)
    yield rig
    rig.reader.close()
    dataplane.remove()


@pytest.fixture
def own(own_rig: Rig) -> Iterator[Rig]:
    with on_one_cpu():
        own_rig.reset()
        yield own_rig


def node(rig: Rig, manifests: str, sender: EndpointKey = POD) -> Node:
    """The rows that an agent of the node would write."""
    compiler = Compiler()
    compiler.replace(derive(parse_documents(manifests, "test.yaml").check()))
    applier = Applier(rig.dataplane.maps, wait=lambda: None)
    applier.apply(compiler.commit())
    pod, wildcard = (compiler.tables.endpoints[key] for key in (POD, WILDCARD))
    for name, key, value in (
        endpoint_element(LO, pod.number, EndpointSets.of(pod), EndpointFlag.NONE),
        place_element(pod.number, LO),
        host_element(wildcard.number, wildcard.sets),
    ):
        rig.map(name).put(key, value)
    rig.defer()
    rig.local(NODE4, NODE6)
    config = rig.dataplane.config()
    config.wildcard = wildcard.number
    rig.dataplane.set_config(config)
    rig.dataplane.bump_generation()
    return Node(rig, wildcard.number if sender is WILDCARD else pod.number)


PASSES, DENIED, HIDDEN = "passes", "policy-deny", "hidden-source"
"""The result for a TCP packet to port 80."""

RULES = [
    # no rule asks for the source
    ("{action: Allow}", PASSES),
    ("{action: Deny}", DENIED),
    ("{action: Log}, {action: Allow}", PASSES),
    ("{action: Pass}", PASSES),
    ("{action: Allow, protocol: TCP, destination: {ports: [80]}}, {action: Deny}", PASSES),
    ("{action: Deny, protocol: TCP, destination: {ports: [80]}}, {action: Allow}", DENIED),
    ("{action: Deny, protocol: ICMP}, {action: Deny, protocol: ICMPv6}, {action: Allow}", PASSES),
    ("{action: Allow, ipVersion: 4}, {action: Allow, ipVersion: 6}", PASSES),
    ("{action: Deny, ipVersion: 4}, {action: Deny, ipVersion: 6}", DENIED),
    ("{action: Allow, source: {nets: [0.0.0.0/0]}}, {action: Allow, source: {nets: ['::/0']}}", PASSES),
    ("{action: Allow, destination: {selector: app == 'pod'}}, {action: Deny}", PASSES),
    ("{action: Deny, destination: {selector: app == 'pod'}}, {action: Allow}", DENIED),
    (
        "{action: Deny, destination: {nets: [172.16.0.0/12]}}, {action: Deny, destination: {notNets: ['fd00::/8']}}, {action: Allow}",
        PASSES,
    ),
    ("{action: Allow, protocol: TCP, destination: {notPorts: [81]}}, {action: Deny, ipVersion: 4}", PASSES),
    # a rule asks for it; the pod's own side is known if it owns all its addresses
    ("{action: Allow, source: {nets: [10.0.0.0/8]}}, {action: Allow}", HIDDEN),
    ("{action: Deny, source: {notNets: [10.0.0.0/8, 172.16.0.0/12]}}, {action: Allow}", HIDDEN),
    ("{action: Allow, source: {selector: app == 'pod'}}, {action: Deny}", HIDDEN),
    ("{action: Deny, source: {selector: app == 'nobody'}}, {action: Allow}", HIDDEN),
    ("{action: Deny, source: {notSelector: app == 'pod'}}, {action: Allow}", HIDDEN),
    ("{action: Allow, source: {selector: set == 'some'}}, {action: Allow}", HIDDEN),
    ("{action: Allow, source: {serviceAccounts: {names: [default]}}}, {action: Deny}", HIDDEN),
    ("{action: Deny, source: {ports: [web]}}, {action: Allow}", HIDDEN),
]
STAGED = [rules for rules, expected in RULES if expected == HIDDEN]
KNOWN = [(rules, "") for rules, expected in RULES if expected == HIDDEN and "set ==" not in rules]
"""Without the network set that tells the pod's IPv4 address from its IPv6 address."""
PORT = "{action: Deny, protocol: TCP, source: {ports: [81]}}, {action: Allow}"


def _check(at: Node, version: int, expected: str) -> None:
    """Check a packet of the pod with a source that the node replaced, and one with the pod's own source."""
    pod, host = (POD4, NODE4) if version == 4 else (POD6, NODE6)
    seen, shown = at.returns(host, pod), at.returns(pod, pod)
    assert seen.passed if expected == PASSES else set(seen.reasons) == {expected}, seen
    assert HIDDEN not in shown.reasons
    assert expected == HIDDEN or shown.passed == seen.passed


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("policy", "sender"), [(FORWARD, POD), (FORWARD, WILDCARD), (EGRESS, POD)], ids=["behind a wildcard", "host", "pod"]
)
@pytest.mark.parametrize(("rules", "expected"), [*RULES, (PORT, HIDDEN)])
def test_a_hidden_source_denies_where_a_rule_asks_for_it(
    own: Rig, policy: str, sender: EndpointKey, rules: str, expected: str, version: int
) -> None:
    """A hidden source denies if a forward rule of a host endpoint asks for the peer, or a pod's rule for its own side."""
    cluster = CLUSTER if policy is FORWARD else CLUSTER.replace("name: pod,", BORROWS)
    _check(node(own, cluster + policy.format(rules=rules), sender), version, expected)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("policy", "sender"), [(FORWARD, POD), (FORWARD, WILDCARD), (EGRESS, POD)], ids=["behind a wildcard", "host", "pod"]
)
@pytest.mark.parametrize("rules", [*STAGED, PORT])
def test_a_staged_rule_that_asks_for_the_source_denies_nothing(
    own: Rig, policy: str, sender: EndpointKey, rules: str, version: int
) -> None:
    """A staged policy changes no verdict, whatever its rules match on."""
    cluster = CLUSTER if policy is FORWARD else CLUSTER.replace("name: pod,", BORROWS)
    staged = policy.replace("kind: GlobalNetworkPolicy", "kind: StagedGlobalNetworkPolicy").format(rules=rules)
    enforced = policy.replace("metadata: {{name: ", "metadata: {{name: enforced-").format(rules="{action: Allow}")
    _check(node(own, cluster + enforced + staged, sender), version, PASSES)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("rules", "expected"), [*KNOWN, (PORT, HIDDEN)])
def test_the_own_side_of_a_workload_with_its_own_addresses_alone_is_known(
    own: Rig, rules: str, expected: str, version: int
) -> None:
    """A workload with one own address has a known own side, so only its source port can be hidden."""
    at = node(own, CLUSTER + EGRESS.format(rules=rules))
    pod = POD4 if version == 4 else POD6
    passes = at.returns(pod, pod).passed
    _check(at, version, expected or (PASSES if passes else DENIED))
