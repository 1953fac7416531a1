# SPDX-License-Identifier: Apache-2.0
"""Measure how long the compiler takes: a cold start, one more pod, one changed policy. Needs no root and no kernel.

    python bench/compile.py [--pods 10000] [--policies 1000] [--local 100] [--repeat 50]

The cluster is generated: namespaces of 50 pods, ten replicas of each of five applications, and policies of the kinds
that teams write (default deny; from one application to another on some ports; to another namespace; DNS; an ipBlock
with exceptions).
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_network
from zlib import crc32

from netpol_ebpf.compiler import Change, Compiler
from netpol_ebpf.policy.types import (
    TCP,
    UDP,
    Action,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    Entity,
    NamedPort,
    Policy,
    PolicyKey,
    PolicyTier,
    Ports,
    ProfileRules,
    Rule,
    World,
)
from netpol_ebpf.selector import EVERYTHING, Selector, all_of, equals, has

PODS_PER_NAMESPACE = 50
APPLICATIONS = ("web", "api", "worker", "cache", "db")
NODE = "node-0"


def pod(index: int, *, node: str, labels: dict[str, str] | None = None) -> Endpoint:
    """The pod with this index, with addresses of both families."""
    namespace, replica = f"ns-{index // PODS_PER_NAMESPACE}", index % PODS_PER_NAMESPACE
    application = APPLICATIONS[replica % len(APPLICATIONS)]
    own = {
        "app": application,
        "tier": "back" if application in {"db", "cache"} else "front",
        "pod-template-hash": f"{crc32(f'{namespace}/{application}'.encode()):x}",
        "projectcalico.org/namespace": namespace,
        "projectcalico.org/orchestrator": "k8s",
        "projectcalico.org/serviceaccount": "default",
        "pcns.kubernetes.io/metadata.name": namespace,
        "pcns.projectcalico.org/name": namespace,
        "pcns.env": ("dev", "test", "prod")[(index // PODS_PER_NAMESPACE) % 3],
        **(labels or {}),
    }
    return Endpoint(
        EndpointKey("Pod", namespace, f"{application}-{index}"),
        EndpointKind.WORKLOAD,
        own,
        (IPv4Address(0x0A000000 + index), IPv6Address((0xFD00 << 112) + index)),
        ports=(NamedPort("http", TCP, 8080 if application == "web" else 9090),),
        profiles=(f"kns.{namespace}",),
        node=node,
    )


def _in_namespace(namespace: str, *selectors: Selector) -> Selector:
    return all_of(
        equals("projectcalico.org/namespace", namespace), equals("projectcalico.org/orchestrator", "k8s"), *selectors
    )


def policy(index: int, namespaces: int, *, port: int = 0) -> Policy:
    """A policy of one of six kinds. Its index determines kind and namespace."""
    chance = random.Random(index)
    namespace = f"ns-{index % namespaces}"
    subject = _in_namespace(namespace, equals("app", chance.choice(APPLICATIONS)))
    peer = _in_namespace(namespace, equals("app", chance.choice(APPLICATIONS)))
    ports = Ports(ranges=tuple((number, number) for number in chance.sample((80, 443, 3306, 5432, 6379, 8080), 2)))
    if port:
        ports = Ports(ranges=((port, port),))
    ingress: tuple[Rule, ...] = ()
    egress: tuple[Rule, ...] = ()
    allow = Action.ALLOW
    sort = index // namespaces % 6
    if sort == 0:
        ingress = (Rule(allow, 0, protocol=TCP, source=Entity(selector=peer), destination=Entity(ports=ports)),)
    elif sort == 1:
        egress = (
            Rule(allow, 0, protocol=UDP, destination=Entity(ports=Ports(((53, 53),)))),
            Rule(allow, 1, protocol=TCP, destination=Entity(selector=peer, ports=ports)),
        )
    elif sort == 2:
        subject = _in_namespace(namespace)
    elif sort == 3:
        source = all_of(has("projectcalico.org/namespace"), equals("pcns.env", "prod"))
        ingress = (Rule(allow, 0, protocol=TCP, source=Entity(selector=source), destination=Entity(ports=ports)),)
    elif sort == 4:
        net = ip_network(f"172.{16 + index % 16}.{index % 256}.0/24")
        destination = Entity(nets=(ip_network("0.0.0.0/0"),), not_nets=(ip_network("169.254.0.0/16"), net))
        egress = (Rule(allow, 0, destination=destination),)
    else:
        named = Entity(ports=Ports(names=("http",)))
        ingress = (Rule(allow, 0, protocol=TCP, source=Entity(selector=peer), destination=named),)
    direction = Direction.EGRESS if egress else Direction.INGRESS
    key = PolicyKey("KubernetesNetworkPolicy", namespace, f"policy-{index}")
    return Policy(key, "default", 1000.0, subject, frozenset((direction,)), ingress, egress)


def make_world(pods: int, policies: int, local: int) -> World:
    """A cluster with ``pods`` pods, of which ``local`` are on this node, spread over the namespaces."""
    namespaces = max(1, pods // PODS_PER_NAMESPACE)
    # The step has no factor in common with a namespace's size, so that local pods are of all applications.
    step = max(1, pods // local) | 1
    chosen = {index * step % pods for index in range(local)}
    endpoints = [pod(index, node=NODE if index in chosen else "elsewhere") for index in range(pods)]
    profiles = [
        ProfileRules(f"kns.ns-{index}", (Rule(Action.ALLOW, 0),), (Rule(Action.ALLOW, 0),))
        for index in range(namespaces)
    ]
    made = [policy(index, namespaces) for index in range(policies)]
    baseline = Policy(
        PolicyKey("GlobalNetworkPolicy", "", "no-metadata"), "admin", 10.0, EVERYTHING, frozenset((Direction.EGRESS,)),
        egress=(Rule(Action.DENY, 0, destination=Entity(nets=(ip_network("169.254.169.254/32"),))), Rule(Action.PASS, 1)),
    )  # fmt: skip
    return World(
        tiers={"default": PolicyTier("default", 1_000_000.0), "admin": PolicyTier("admin", 100.0)},
        policies={one.key: one for one in (*made, baseline)},
        profiles={profile.name: profile for profile in profiles},
        endpoints={endpoint.key: endpoint for endpoint in endpoints},
    )


def timed(compiler: Compiler, step: Callable[[], object]) -> tuple[float, Change]:
    """The seconds of a step and of the commit after it, and the change that the commit returned."""
    start = time.perf_counter()
    step()
    change = compiler.commit()
    return time.perf_counter() - start, change


def describe(name: str, runs: list[tuple[float, Change]]) -> None:
    """Print one line: median, slowest run, rows that such a change writes, and how often it raises the generation."""
    seconds = [each for each, _ in runs]
    rows = [
        sum(len(delta.upserts) + len(delta.deletes) for _, batch in change.batches() for delta in batch.values())
        for _, change in runs
    ]
    print(
        f"{name:<34} median {statistics.median(seconds) * 1e3:8.2f} ms   slowest of {len(runs)} {max(seconds) * 1e3:8.2f} ms"
        f"   rows: median {statistics.median(rows):.0f}, most {max(rows)}"
        f"   generation bumped {sum(change.revokes for _, change in runs)} times"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pods", type=int, default=10_000)
    parser.add_argument("--policies", type=int, default=1_000)
    parser.add_argument("--local", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=50)
    options = parser.parse_args()

    world = make_world(options.pods, options.policies, options.local)
    compiler = Compiler(lambda endpoint: endpoint.node == NODE)
    seconds, _ = timed(compiler, lambda: compiler.replace(world))
    # The agent does the same after its first commit: these objects stay, so the garbage collector need not scan them
    # again.
    gc.collect()
    gc.freeze()
    print(f"{options.policies} policies, {options.local} local pods, {options.pods} pods in all: {seconds:.2f} s cold")
    print("rows: " + ", ".join(f"{table.name} {len(table)}" for table in compiler.tables.all()))

    namespaces = max(1, options.pods // PODS_PER_NAMESPACE)
    some = [policy(index, namespaces) for index in range(options.policies)]
    live = [
        one
        for one in some
        if any(one.subject.matches(each.labels) for each in world.endpoints.values() if each.node == NODE)
    ]

    known, new, gone, local, policies = [], [], [], [], []
    for index in range(options.repeat):
        number = options.pods + index
        twin = pod(index * 37 % options.pods, node="elsewhere")
        fresh = pod(number, node="elsewhere")
        same = replace(fresh, labels=twin.labels, ports=twin.ports, profiles=twin.profiles)
        known.append(timed(compiler, lambda: compiler.upsert(same)))  # noqa: B023  # called at once
        unlike = pod(number, node="elsewhere", labels={"unique": str(index)})
        new.append(timed(compiler, lambda: compiler.upsert(unlike)))  # noqa: B023  # called at once
        gone.append(timed(compiler, lambda: compiler.remove(Endpoint, fresh.key)))  # noqa: B023  # called at once
        here = pod(number, node=NODE)
        local.append(timed(compiler, lambda: compiler.upsert(here)))  # noqa: B023  # called at once
        one = live[index % len(live)]
        edited = replace(policy(int(one.key.name[7:]), namespaces, port=20_000 + index), key=one.key)
        policies.append(timed(compiler, lambda: compiler.upsert(edited)))  # noqa: B023  # called at once
    for name, runs in (
        ("one pod elsewhere, known labels", known), ("the same pod, labels never seen", new),
        ("the pod goes", gone), ("one local pod", local), ("one policy changed", policies),
    ):  # fmt: skip
        describe(name, runs)


if __name__ == "__main__":
    main()
