# SPDX-License-Identifier: Apache-2.0
"""What probes of services' addresses, node ports and host ports come to: each backend is asked about, as the node does."""

from __future__ import annotations

import pytest

from netpol_ebpf.cases.case import LoadedCases, parse_cases
from netpol_ebpf.cases.runner import Cast, run_cases
from netpol_ebpf.policy.translate import derive

MANIFESTS = """\
manifests:
- {apiVersion: v1, kind: Node, metadata: {name: n1}, status: {addresses: [{type: InternalIP, address: 172.16.0.1}]}}
- {apiVersion: v1, kind: Node, metadata: {name: n2}, status: {addresses: [{type: InternalIP, address: 172.16.0.2}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop, labels: {app: web}}, spec: {nodeName: n1}, status: {podIPs: [{ip: 10.0.1.1}]}}
- apiVersion: v1
  kind: Pod
  metadata: {name: db, namespace: shop, labels: {app: db, tier: back}}
  spec: {nodeName: n1, containers: [{name: c, ports: [{name: sql, containerPort: 5432}, {containerPort: 9000, hostPort: 19000}]}]}
  status: {podIPs: [{ip: 10.0.1.2}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: far, namespace: shop, labels: {app: far, tier: back}}
  spec: {nodeName: n2, containers: [{name: c, ports: [{name: sql, containerPort: 5433}]}]}
  status: {podIPs: [{ip: 10.0.2.1}]}
- {apiVersion: v1, kind: Pod, metadata: {name: agent, namespace: kube-system, labels: {k8s-app: a}}, spec: {nodeName: n1, hostNetwork: true}, status: {podIPs: [{ip: 172.16.0.1}]}}
- apiVersion: v1
  kind: Service
  metadata: {name: back, namespace: shop}
  spec:
    clusterIPs: [10.96.0.5, "fd00:96::5"]
    externalIPs: [192.0.2.80]
    selector: {tier: back}
    ports: [{name: t, port: 80, targetPort: sql, nodePort: 30080}]
  status: {loadBalancer: {ingress: [{ip: 203.0.113.9}]}}
"""
SLICES = """\
- apiVersion: discovery.k8s.io/v1
  kind: EndpointSlice
  metadata: {name: back-1, namespace: shop, labels: {kubernetes.io/service-name: back}}
  addressType: IPv4
  endpoints: [{addresses: [10.0.1.2]}]
  ports: [{name: t, port: 5432}]
"""
NODE_PROCESSES = """\
- apiVersion: v1
  kind: Service
  metadata: {name: dns, namespace: kube-system}
  spec: {clusterIP: 10.96.0.10, ports: [{port: 53, protocol: UDP}]}
- apiVersion: discovery.k8s.io/v1
  kind: EndpointSlice
  metadata: {name: dns-1, namespace: kube-system, labels: {kubernetes.io/service-name: dns}}
  addressType: IPv4
  endpoints: [ENDPOINTS]
  ports: [{port: 53, protocol: UDP}]
"""
TO_DB_ALONE = """\
- apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata: {name: web, namespace: shop}
  spec:
    podSelector: {matchLabels: {app: web}}
    policyTypes: [Egress]
    egress: [{to: [{podSelector: {matchLabels: {app: db}}}]}]
"""


def load(manifests: str, *probes: str) -> LoadedCases:
    loaded = LoadedCases()
    text = f"name: services\n{manifests}probes:\n" + "".join(f"- {{{probe}}}\n" for probe in probes)
    parse_cases(text, "c.yaml", loaded)
    assert not loaded.invalid, loaded.invalid
    return loaded


def backends(manifests: str, probe: str) -> list[str]:
    """Where a probe's packets go, as address:port; "as written" where nobody translates them."""
    (case,) = load(manifests, f"{probe}, expect: allow").cases
    flows = [one.flow for one in Cast(case.resources, derive(case.resources)).journeys(case.probes[0])]
    return ["as written" if one.dnat_to is None else "{}:{}".format(*one.dnat_to) for one in flows]


@pytest.mark.parametrize("address", ["10.96.0.5", "192.0.2.80", "203.0.113.9"])
def test_each_address_of_a_service_stands_for_what_is_behind_it(address: str) -> None:
    """Cluster, external and balancer addresses: what the EndpointSlices say, else the pods that the selector selects."""
    probe = f"from: shop/web, to: {address}, protocol: TCP, port: 80"
    assert backends(MANIFESTS + SLICES, probe) == ["10.0.1.2:5432"]
    assert backends(MANIFESTS, probe) == ["10.0.1.2:5432", "10.0.2.1:5433"]
    other = f"from: shop/web, to: {address}, protocol: TCP, port: 81"
    assert backends(MANIFESTS, other) == ["as written"]
    assert backends(MANIFESTS, probe.replace("TCP", "UDP")) == ["as written"]
    assert backends(MANIFESTS, f"from: shop/web, to: {address}, protocol: ICMP") == ["as written"]


def test_ports_of_nodes_are_translated_at_each_node() -> None:
    """Node ports at every node's addresses; a host port at those of the pod's own node alone."""
    assert backends(MANIFESTS + SLICES, "from: 192.0.2.1, to: 172.16.0.1, protocol: TCP, port: 30080") == [
        "10.0.1.2:5432"
    ]
    assert backends(MANIFESTS + SLICES, "from: 192.0.2.1, to: 172.16.0.2, protocol: TCP, port: 30080") == [
        "10.0.1.2:5432"
    ]
    assert backends(MANIFESTS, "from: 192.0.2.1, to: 172.16.0.1, protocol: TCP, port: 19000") == ["10.0.1.2:9000"]
    assert backends(MANIFESTS, "from: 192.0.2.1, to: 172.16.0.2, protocol: TCP, port: 19000") == ["as written"]
    assert backends(MANIFESTS, "from: 192.0.2.1, to: 192.0.2.9, protocol: TCP, port: 30080") == ["as written"]


def test_every_port_of_a_service_without_slices_has_the_selected_pods() -> None:
    """Not the first port alone."""
    two = MANIFESTS.replace(
        "targetPort: sql, nodePort: 30080}", "targetPort: sql}, {name: u, port: 81, targetPort: 9000}"
    )
    for port, last in ((80, "5432"), (81, "9000")):
        probe = f"from: shop/web, to: 10.96.0.5, protocol: TCP, port: {port}"
        assert f"10.0.1.2:{last}" in backends(two, probe)


def test_probe_that_says_what_it_is_translated_to_is_left_alone() -> None:
    """A case's own dnatTo counts."""
    probe = "from: shop/web, to: 10.96.0.5, protocol: TCP, port: 80, dnatTo: {ip: 10.0.2.1, port: 1}"
    assert backends(MANIFESTS + SLICES, probe) == ["10.0.2.1:1"]


@pytest.mark.parametrize("engine", ["model", "tables"])
def test_every_backend_must_go_as_expected(engine: str) -> None:
    """A probe fails when one backend is not as expected, and the rule says which backend that was."""
    probe = "from: shop/web, to: 10.96.0.5, protocol: TCP, port: 80, expect: allow"
    assert run_cases(load(MANIFESTS + SLICES + TO_DB_ALONE, probe), engine).failed == []
    (failure,) = run_cases(load(MANIFESTS + TO_DB_ALONE, probe), engine).failed
    assert failure.got == "deny"
    assert "10.0.2.1:5433" in failure.rule


def test_nothing_known_behind_a_service_is_no_answer() -> None:
    """Without an address behind it in the packet's family nobody can say what becomes of a packet: the case is not valid."""
    nobody = MANIFESTS.replace("selector: {tier: back}", "selector: {tier: none}")
    for manifests, address in ((nobody, "10.96.0.5"), (MANIFESTS + SLICES, "'fd00:96::5'")):
        source = "shop/web" if address[0] != "'" else "'fd00::1'"
        report = run_cases(load(manifests, f"from: {source}, to: {address}, protocol: TCP, port: 80, expect: allow"))
        (invalid,) = report.invalid
        assert "nothing is known to be behind Service/shop/back" in invalid.error


def test_processes_of_the_node_behind_a_service() -> None:
    """One is judged whichever backend is taken; several deny everything, for no hook stands before them."""
    probe = "from: shop/web, to: 10.96.0.10, protocol: UDP, port: 53"
    far, own, twin = "{addresses: [10.0.2.1]}", "{addresses: [172.16.0.1]}", "{addresses: [172.16.0.7]}"
    one = MANIFESTS + NODE_PROCESSES.replace("ENDPOINTS", f"{far}, {own}")
    assert backends(one, probe) == ["10.0.2.1:53", "172.16.0.1:53"]
    assert run_cases(load(one, f"{probe}, expect: allow")).failed == []
    far_alone = TO_DB_ALONE.replace("app: db", "app: far")
    (failure,) = run_cases(load(one + far_alone, f"{probe}, expect: allow")).failed
    assert "10.0.2.1:53" in failure.rule  # the pod is allowed, and yet not reached: the node's process is not
    address = "{type: InternalIP, address: 172.16.0.1}"
    two = one.replace(address, f"{address}, {{type: InternalIP, address: 172.16.0.7}}").replace(own, f"{own}, {twin}")
    (failure,) = run_cases(load(two, f"{probe}, expect: allow")).failed
    assert "several processes of the node" in failure.rule
    for source in ("172.16.0.1", "192.0.2.1"):  # no hook of ours stands where these are translated
        assert (
            run_cases(load(two, f"from: {source}, to: 10.96.0.10, protocol: UDP, port: 53, expect: allow")).failed == []
        )
