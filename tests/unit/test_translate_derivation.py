# SPDX-License-Identifier: Apache-2.0
"""The incremental derivation: endpoints, inheritance, services, what each event changes and no more."""

from __future__ import annotations

from ipaddress import ip_address
from itertools import permutations
from typing import get_args

import pytest
from worlds import read

from netpol_ebpf.errors import Location
from netpol_ebpf.policy.translate import Derivation, derive, key_of
from netpol_ebpf.policy.translate.derivation import BUILT_IN_TIERS
from netpol_ebpf.policy.types import (
    TCP,
    UDP,
    Action,
    Backend,
    Changes,
    EndpointKey,
    EndpointKind,
    NamedPort,
    ProfileRules,
    Rule,
    World,
)
from netpol_ebpf.resources.types import Meta, Resource, Tier

NAMESPACE = """
---
apiVersion: v1
kind: Namespace
metadata: {name: ns, labels: {env: dev}}
"""
RELABELLED = NAMESPACE.replace("dev", "prod")
ACCOUNT = """
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: my.sa, namespace: ns, labels: {team: blue}}
"""
POD = """
---
apiVersion: v1
kind: Pod
metadata:
  name: pod
  namespace: ns
  labels: {app: web, pcns.env: prod, pcsa.team: red, projectcalico.org/namespace: other}
  annotations: {cni.projectcalico.org/allowedSourcePrefixes: '["192.0.2.0/24"]'}
spec:
  nodeName: n1
  serviceAccountName: my.sa
  initContainers: [{name: i, image: x, ports: [{name: init, containerPort: 1}]}]
  containers:
  - {name: c, image: x, ports: [{name: http, containerPort: 80}, {containerPort: 81}, {name: http, containerPort: 80}]}
  - {name: d, image: x, ports: [{name: dns, containerPort: 53, protocol: UDP}]}
status: {podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]}
"""
KEY = EndpointKey("Pod", "ns", "pod")


def test_a_pod_is_a_workload_with_effective_labels() -> None:
    """Own labels without pretended ones, the reserved three, and what namespace and account hand down."""
    endpoint = derive(read(NAMESPACE + ACCOUNT + POD)).endpoints[KEY]
    assert dict(endpoint.labels) == {
        "app": "web",
        "projectcalico.org/namespace": "ns",
        "projectcalico.org/orchestrator": "k8s",
        "projectcalico.org/serviceaccount": "my.sa",
        "pcns.env": "dev",
        "pcns.kubernetes.io/metadata.name": "ns",
        "pcns.projectcalico.org/name": "ns",
        "pcsa.team": "blue",
        "pcsa.projectcalico.org/name": "my.sa",
    }
    assert endpoint.kind is EndpointKind.WORKLOAD
    assert endpoint.profiles == ("kns.ns", "ksa.ns.my.sa")
    assert endpoint.addresses == (ip_address("10.0.0.1"), ip_address("fd00::1"))
    assert endpoint.ports == (NamedPort("init", TCP, 1), NamedPort("http", TCP, 80), NamedPort("dns", UDP, 53))
    assert endpoint.node == "n1"
    assert [str(net) for net in endpoint.allowed_sources] == ["192.0.2.0/24"]


def test_namespaces_and_accounts_are_profiles() -> None:
    """A namespace's allows everything, an account's has no rules."""
    world = derive(read(NAMESPACE + ACCOUNT))
    everything = (Rule(Action.ALLOW, 0),)
    assert world.profiles["kns.ns"] == ProfileRules("kns.ns", everything, everything)
    assert world.profiles["ksa.ns.my.sa"] == ProfileRules("ksa.ns.my.sa")
    assert world.profiles["projectcalico-default-allow"].ingress == everything


@pytest.mark.parametrize("spec", ["spec: {hostNetwork: true}", "status: {phase: Failed, podIPs: [{ip: 10.0.0.1}]}"])
def test_host_network_and_finished_pods_are_no_endpoints(spec: str) -> None:
    """Selectors see neither of them."""
    text = f"apiVersion: v1\nkind: Pod\nmetadata: {{name: pod, namespace: ns}}\n{spec}\n"
    assert not derive(read(text)).endpoints


def test_a_pod_without_address_is_an_endpoint_already() -> None:
    """Its interface may exist before its address is known; policy for it is then ready."""
    text = "apiVersion: v1\nkind: Pod\nmetadata: {name: pod, namespace: ns}\nspec: {}\n"
    assert derive(read(text)).endpoints[KEY].addresses == ()


def test_host_and_workload_endpoints() -> None:
    """Inherited labels: own first, then the first profile, then later ones."""
    world = derive(
        read(
            """
            apiVersion: projectcalico.org/v3
            kind: Profile
            metadata: {name: one}
            spec: {labelsToApply: {a: one, b: one}}
            ---
            apiVersion: projectcalico.org/v3
            kind: Profile
            metadata: {name: two}
            spec: {labelsToApply: {a: two, b: two, c: two}}
            ---
            apiVersion: projectcalico.org/v3
            kind: HostEndpoint
            metadata: {name: h, labels: {a: own, projectcalico.org/orchestrator: k8s}}
            spec:
              node: n1
              interfaceName: '*'
              expectedIPs: [172.16.0.1]
              profiles: [one, two]
              ports: [{name: ssh, protocol: TCP, port: 22}]
            """
        )
    )
    host = world.endpoints[EndpointKey("HostEndpoint", "", "h")]
    assert dict(host.labels) == {"a": "own", "b": "one", "c": "two"}
    assert (host.kind, host.interface, host.node) == (EndpointKind.HOST, "*", "n1")
    assert host.ports == (NamedPort("ssh", TCP, 22),)
    assert host.addresses == (ip_address("172.16.0.1"),)


SETS = """
---
apiVersion: projectcalico.org/v3
kind: NetworkSet
metadata: {name: s, namespace: ns, labels: {kind: own, pcns.env: spoofed, projectcalico.org/orchestrator: k8s}}
spec: {nets: [192.0.2.7]}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkSet
metadata: {name: s, labels: {kind: global, projectcalico.org/serviceaccount: sa}}
spec: {nets: [192.0.2.0/24], allowedEgressDomains: ["*.Example.com."]}
"""


def test_network_sets() -> None:
    """A namespaced one inherits from its namespace; neither can look like a pod."""
    sets = derive(read(NAMESPACE + SETS)).network_sets
    assert dict(sets["ns/s"].labels) == {
        "kind": "own",
        "projectcalico.org/namespace": "ns",
        "pcns.env": "dev",
        "pcns.kubernetes.io/metadata.name": "ns",
        "pcns.projectcalico.org/name": "ns",
    }
    assert dict(sets["s"].labels) == {"kind": "global"}
    assert (sets["ns/s"].domains, sets["s"].domains) == (frozenset(), frozenset({"*.example.com"}))


SLICE = """
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, namespace: ns, labels: {{kubernetes.io/service-name: {service}}}}}
addressType: IPv4
endpoints: [{{addresses: [{address}]}}]
ports: {ports}
"""


def slices(*rows: tuple[str, str, str, str]) -> str:
    return "".join(SLICE.format(name=n, service=s, address=a, ports=p) for n, s, a, p in rows)


def test_services_are_the_union_of_their_slices() -> None:
    """Also when a slice moves to another service or goes."""
    derivation = Derivation()
    ports = "[{port: 80, protocol: TCP}, {name: none, protocol: UDP}]"
    for resource in read(slices(("one", "svc", "10.0.0.1", ports), ("two", "svc", "10.0.0.2", "[]"))):
        derivation.upsert(resource)
    one, two = Backend(ip_address("10.0.0.1"), TCP, 80), Backend(ip_address("10.0.0.2"), 0, 0)
    assert derivation.world.services["ns", "svc"].backends == {one, two}
    (moved,) = read(slices(("two", "other", "10.0.0.2", "[]")))
    derivation.upsert(moved)
    assert derivation.world.services["ns", "svc"].backends == {one}
    assert derivation.world.services["ns", "other"].backends == {two}
    derivation.remove("EndpointSlice", "ns", "one")
    assert ("ns", "svc") not in derivation.world.services


def test_nothing_changes_a_built_in_tier() -> None:
    """Neither an object of its name nor its removal."""
    derivation = Derivation()
    meta = Meta("kube-admin", "", {}, Location("t"))
    derivation.upsert(Tier(meta, 5.0, "Deny"))
    assert derivation.world.tiers == BUILT_IN_TIERS
    derivation.remove("Tier", "", "kube-admin")
    assert derivation.world.tiers == BUILT_IN_TIERS


def test_relabelling_a_namespace_changes_its_heirs_and_nothing_else() -> None:
    """Pods and network sets of it, not the profile's rules, not other pods, not policies."""
    derivation = Derivation()
    other = POD.replace("namespace: ns", "namespace: other")
    policy = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: ns}\nspec: {podSelector: {}}\n"
    for resource in read(NAMESPACE + POD + other + SETS + policy):
        derivation.upsert(resource)
    derivation.take_changes()
    (relabelled,) = read(RELABELLED)
    derivation.upsert(relabelled)
    changes = derivation.take_changes()
    assert set(changes.endpoints) == {KEY}
    assert set(changes.network_sets) == {"ns/s"}
    assert changes == Changes(endpoints=changes.endpoints, network_sets=changes.network_sets)
    endpoint = changes.endpoints[KEY]
    assert endpoint is not None
    assert endpoint.labels["pcns.env"] == "prod"


def test_an_equal_object_is_no_change() -> None:
    """Nor is the removal of something unknown."""
    derivation = Derivation()
    objects = read(NAMESPACE + ACCOUNT + POD + SETS)
    for resource in objects:
        derivation.upsert(resource)
    derivation.take_changes()
    for resource in objects:
        derivation.upsert(resource)
    derivation.remove("Pod", "ns", "unknown")
    assert not derivation.take_changes()


def test_changes_applied_to_a_copy_keep_it_equal() -> None:
    """`Changes` says all there is to know of a step, removals too."""
    derivation, copy = Derivation(), World()
    objects = read(NAMESPACE + ACCOUNT + POD + SETS + slices(("one", "svc", "10.0.0.1", "[]")))
    for resource in objects:
        derivation.upsert(resource)
    derivation.take_changes().apply_to(copy)
    assert copy == derivation.world
    for resource in objects:
        derivation.remove(*key_of(resource))
        derivation.take_changes().apply_to(copy)
        assert copy == derivation.world
    assert copy == derive([])


def test_every_order_of_events_ends_in_the_same_world() -> None:
    """A pod before its namespace, a slice before its service, and each object twice."""
    objects = read(NAMESPACE + ACCOUNT + POD + SETS)
    expected = derive(objects)
    for order in permutations(objects):
        assert derive(order) == expected
        assert derive([*order, order[0]]) == expected


RELATED = """
---
apiVersion: policy.networking.k8s.io/v1alpha1
kind: AdminNetworkPolicy
metadata: {name: p}
spec: {priority: 1, subject: {namespaces: {}}, ingress: [{action: Deny, from: [{namespaces: {sameLabels: [env]}}]}]}
"""


def space(name: str, env: str) -> list[Resource]:
    return read(f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{env: {env}}}}}\n")


def test_policies_that_compare_namespaces_follow_the_values_there_are() -> None:
    """They change when a value appears or goes, not with every namespace."""
    derivation = Derivation()
    for resource in [*space("a", "one"), *read(RELATED)]:
        derivation.upsert(resource)

    def values() -> int:
        (policy,) = derivation.world.policies.values()
        return len(policy.ingress)

    assert values() == 1
    derivation.take_changes()
    derivation.upsert(*space("b", "one"))
    assert not derivation.take_changes().policies
    derivation.upsert(*space("b", "two"))
    assert values() == 2
    derivation.remove("Namespace", "", "b")
    assert values() == 1
    derivation.remove("AdminNetworkPolicy", "", "p")
    derivation.upsert(*space("c", "three"))
    assert not derivation.world.policies


def test_a_profile_object_gives_way_to_a_namespace_of_its_name() -> None:
    """And comes back when the namespace goes."""
    derivation = Derivation()
    text = (
        "apiVersion: projectcalico.org/v3\nkind: Profile\nmetadata: {name: kns.ns}\nspec: {labelsToApply: {x: 'y'}}\n"
    )
    for resource in [*read(text), *read(POD)]:
        derivation.upsert(resource)
    assert derivation.world.profiles["kns.ns"].ingress == ()
    assert derivation.world.endpoints[KEY].labels["x"] == "y"
    derivation.upsert(*read(NAMESPACE))
    assert derivation.world.profiles["kns.ns"].ingress != ()
    assert "x" not in derivation.world.endpoints[KEY].labels
    derivation.remove("Namespace", "", "ns")
    assert derivation.world.endpoints[KEY].labels["x"] == "y"


WORKLOAD = """
---
apiVersion: projectcalico.org/v3
kind: WorkloadEndpoint
metadata: {name: n1-vms-vm--1-eth0, namespace: ns, labels: {app: vm, pcns.env: spoofed}}
spec:
  node: n1
  orchestrator: vms
  workload: vm-1
  endpoint: eth0
  interfaceName: tap0
  ipNetworks: [10.0.7.1/32, 'fd00:7::1/128']
  profiles: [kns.ns]
  ports: [{name: http, protocol: TCP, port: 8080}]
"""


def test_a_workload_endpoint_is_a_workload_of_its_own_orchestrator() -> None:
    """So NetworkPolicy of Kubernetes does not select it, and Calico's policies do."""
    text = WORKLOAD + "  serviceAccountName: my.sa\n"
    for written, account in ((WORKLOAD, {}), (text, {"projectcalico.org/serviceaccount": "my.sa"})):
        (endpoint,) = derive(read(NAMESPACE + written)).endpoints.values()
        assert endpoint.key == EndpointKey("WorkloadEndpoint", "ns", "n1-vms-vm--1-eth0")
        assert (endpoint.kind, endpoint.node, endpoint.interface) == (EndpointKind.WORKLOAD, "n1", "tap0")
        assert endpoint.addresses == (ip_address("10.0.7.1"), ip_address("fd00:7::1"))
        assert endpoint.ports == (NamedPort("http", TCP, 8080),)
        assert dict(endpoint.labels) == {
            "app": "vm",
            "projectcalico.org/namespace": "ns",
            "projectcalico.org/orchestrator": "vms",
            "pcns.env": "dev",
            "pcns.kubernetes.io/metadata.name": "ns",
            "pcns.projectcalico.org/name": "ns",
            **account,
        }


def test_each_kind_that_is_read_is_translated() -> None:
    """One entry for each type that a parser makes, each with a name of its own."""
    kinds = Derivation.kinds.values()
    assert Derivation.kinds.keys() == set(get_args(Resource))
    names = [name for kind in kinds for name in (kind.name, kind.cluster_name) if name]
    assert len(set(names)) == len(names)
    assert all(kind.name.endswith("NetworkPolicy") == (kind.policy is not None) for kind in kinds)
