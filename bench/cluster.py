# SPDX-License-Identifier: Apache-2.0
"""A generated cluster in the form of an API server's objects: namespaces, pods and policies as plain objects.

A namespace has 50 pods: ten replicas of each of five applications. The policies are of the kinds that teams write:
default deny; from one application to another on some ports; from another namespace; DNS; an ipBlock with exceptions; a
named port.

Invariant: an object follows from its number alone, so every object can be generated again, or with changes, at any
time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from itertools import islice
from pathlib import Path
from typing import Any

PODS_PER_NAMESPACE = 50
APPLICATIONS = ("web", "api", "worker", "cache", "db")
ENVIRONMENTS = ("dev", "test", "prod")
PORTS = (80, 443, 3306, 5432, 6379, 8080)
HERE, ELSEWHERE = "node-0", "node-1"
OBJECTS_PER_FILE = 50
FIRST4, FIRST6 = 0x0A000000, 0xFD00 << 112

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a cluster. ``local``: the number of its pods that are on this node."""

    pods: int
    policies: int
    local: int

    @property
    def namespaces(self) -> int:
        """The number of namespaces."""
        return max(1, self.pods // PODS_PER_NAMESPACE)

    def local_pods(self) -> list[int]:
        """The numbers of the local pods.

        They are of all applications, because the step between them has no factor in common with the size of a
        namespace.
        """
        step = max(1, self.pods // self.local) | 1
        return sorted({number * step % self.pods for number in range(self.local)})


def namespace(number: int, labels: Mapping[str, str] | None = None) -> Object:
    """The object of a namespace."""
    own = {"env": ENVIRONMENTS[number % len(ENVIRONMENTS)], **(labels or {})}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"ns-{number}", "labels": own}}


def pod(
    number: int, *, node: str = ELSEWHERE, like: int | None = None, labels: Mapping[str, str] | None = None
) -> Object:
    """A running pod with addresses of both families.

    ``like``: the number of a pod with the same namespace and application.
    """
    model = number if like is None else like
    application = APPLICATIONS[model % PODS_PER_NAMESPACE % len(APPLICATIONS)]
    space = f"ns-{model // PODS_PER_NAMESPACE}"
    own = {
        "app": application,
        "tier": "back" if application in {"db", "cache"} else "front",
        "pod-template-hash": f"{random.Random(f'{space}/{application}').getrandbits(24):06x}",
        **(labels or {}),
    }
    addresses = (IPv4Address(FIRST4 + number), IPv6Address(FIRST6 + number))
    port = {"name": "http", "containerPort": 8080 if application == "web" else 9090, "protocol": "TCP"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{application}-{number}", "namespace": space, "labels": own},
        "spec": {"nodeName": node, "containers": [{"name": "main", "ports": [port]}]},
        "status": {
            "phase": "Running",
            "podIP": str(addresses[0]),
            "podIPs": [{"ip": str(address)} for address in addresses],
        },
    }


def policy(number: int, size: Size, *, port: int = 0) -> Object:
    """A NetworkPolicy of one of six kinds.

    Its number determines kind and namespace. ``port``: replaces the usual port.
    """
    chance = random.Random(number)
    subject = {"app": chance.choice(APPLICATIONS)}
    peer = {"podSelector": {"matchLabels": {"app": chance.choice(APPLICATIONS)}}}
    numbers = [port] if port else chance.sample(PORTS, 2)
    ports = [{"protocol": "TCP", "port": one} for one in numbers]
    prod = {"namespaceSelector": {"matchLabels": {"env": "prod"}}}
    net = f"172.{16 + number % 16}.{number % 256}.0/24"
    world = {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16", net]}}
    specs: tuple[Object, ...] = (
        {"ingress": [{"from": [peer], "ports": ports}]},
        {"egress": [{"ports": [{"protocol": "UDP", "port": 53}]}, {"to": [peer], "ports": ports}]},
        {"ingress": []},
        {"ingress": [{"from": [prod], "ports": ports}]},
        {"egress": [{"to": [world]}]},
        {"ingress": [{"from": [peer], "ports": [{"protocol": "TCP", "port": port or "http"}]}]},
    )
    sort = number // size.namespaces % len(specs)
    spec = specs[sort]
    everyone = sort == 2
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"policy-{number}", "namespace": f"ns-{number % size.namespaces}"},
        "spec": {
            "podSelector": {} if everyone else {"matchLabels": subject},
            "policyTypes": ["Egress" if "egress" in spec else "Ingress"],
            **spec,
        },
    }


def objects(size: Size) -> Iterator[Object]:
    """All objects of the cluster, as list requests return them."""
    local = set(size.local_pods())
    yield from (namespace(number) for number in range(size.namespaces))
    yield from (pod(number, node=HERE if number in local else ELSEWHERE) for number in range(size.pods))
    yield from (policy(number, size) for number in range(size.policies))


def write_manifests(size: Size, directory: Path) -> None:
    """Write the same objects to files, each a list of OBJECTS_PER_FILE objects as ``kubectl get -o json`` prints it."""
    directory.mkdir(parents=True)
    given, number = objects(size), 0
    while items := list(islice(given, OBJECTS_PER_FILE)):
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=4)
        (directory / f"{number:06}.json").write_text(text, encoding="utf-8")
        number += 1
