# SPDX-License-Identifier: Apache-2.0
"""The cluster of the demonstration: the hosts outside it, the attempted connections, and the policy change.

Invariant: policies, pods and their ports are declared only in the manifests (examples/demo).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

from netpol_ebpf.errors import InvalidInputError, PlatformError
from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.matrix import ProbedService
from netpol_ebpf.lab.scene import INTERNET, plan_for
from netpol_ebpf.lab.topology import ICMP, TCP, UDP, Host, Listen, Plan
from netpol_ebpf.resources.types import Resource

NODE = "node-1"
DATABASE = ip_address("10.244.1.12")
BULK_PORT = 5433  # a port of the database that policy opens to the back end; iperf3 listens there, not an echo server

OUTSIDE = (
    Host("outside/customer", INTERNET, (ip_address("198.51.100.10"), ip_address("2001:db8:100::10"))),
    Host("outside/blocked", INTERNET, (ip_address("198.51.100.200"), ip_address("2001:db8:100:bad::10"))),
    Host(
        "outside/payments",
        INTERNET,
        (ip_address("203.0.113.10"), ip_address("2001:db8:200::10")),
        (Listen(TCP, 443),),
    ),
)
TWINS = (
    # A second node without an agent: its two pods show connections without enforcement.
    Host("node-2", INTERNET, (ip_address("172.30.0.20"),), interface="node-2"),
    Host("twin/client", "node-2", (ip_address("10.244.2.1"),)),
    Host("twin/server", "node-2", (ip_address("10.244.2.2"),)),
)
SOURCES = (
    NODE,
    "shop/front-end",
    "shop/back-end",
    "shop/database",
    "shop/debug",
    "monitoring/prometheus",
    "monitoring/grafana",
    "kube-system/coredns",
    "outside/customer",
    "outside/blocked",
)
SERVICES = (
    ProbedService("shop/front-end", TCP, 8080),
    ProbedService("shop/front-end", TCP, 9100),
    ProbedService("shop/back-end", TCP, 8443),
    ProbedService("shop/back-end", TCP, 9100),
    ProbedService("shop/database", TCP, 5432),
    ProbedService("shop/database", TCP, 9187),
    ProbedService("shop/database", ICMP),
    ProbedService("monitoring/prometheus", TCP, 9090),
    ProbedService("monitoring/grafana", TCP, 3000),
    ProbedService("kube-system/coredns", UDP, 53),
    ProbedService("kube-system/coredns", TCP, 53),
    ProbedService("outside/payments", TCP, 443),
)
NAMES = {name: name.rpartition("/")[2] for name in (*SOURCES, *(service.host for service in SERVICES))}

EXPLAINED = Attempt("shop/front-end", DATABASE, TCP, 5432)
"""A connection that policy denies, and of which the demonstration explains the denial."""

INCIDENT = Attempt("shop/debug", DATABASE, TCP, 5432)
"""A connection that is allowed only while INCIDENT_POLICY is in force."""

INCIDENT_POLICY = """\
# Someone needs to look into the database: the debugging pod is let in for an hour.
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: incident-database
  namespace: shop
spec:
  podSelector:
    matchLabels:
      app: database
  policyTypes: [Ingress]
  ingress:
    - from:
        - podSelector:
            matchLabels:
              run: debug
      ports:
        - port: postgres
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: incident-debug
  namespace: shop
spec:
  podSelector:
    matchLabels:
      run: debug
  policyTypes: [Egress]
  egress:
    - to:
        - podSelector:
            matchLabels:
              app: database
      ports:
        - port: postgres
"""


def manifests_dir() -> Path:
    """The directory of the demonstration's manifests.

    An installed package has them beside this module, a checkout in examples/demo. Raises PlatformError if neither
    exists.
    """
    packaged = Path(__file__).parent / "demo"
    checkout = Path(__file__).parents[2] / "examples" / "demo"
    for candidate in (packaged, checkout):
        if candidate.is_dir():
            return candidate
    raise PlatformError(
        f"the demonstration's manifests are neither in {packaged} nor in {checkout}",
        hint="Give their directory with --manifests; they are in examples/demo of the source.",
    )


def shop_plan(resources: Iterable[Resource]) -> Plan:
    """The laboratory's plan for the manifests, with OUTSIDE and TWINS added.

    Raises InvalidInputError if the manifests lack a pod or node that the demonstration uses.
    """
    plan = plan_for(resources, (*OUTSIDE, *TWINS))
    missing = sorted(NAMES.keys() - plan.hosts.keys())
    if missing:
        raise InvalidInputError(
            f"the manifests lack {', '.join(missing)}",
            hint="The demonstration needs the pods and the node of examples/demo; its policies may be changed.",
        )
    return Plan(
        replace(host, listens=tuple(listen for listen in host.listens if listen.port != BULK_PORT))
        for host in plan.hosts.values()
    )
