# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for Calico objects as parsed YAML, beside the pods and NetworkPolicies of `manifests`.

Invariant: every object drawn passes validation: a rule is of one address family, ports come with a protocol that has them,
host-only flags agree with each other.  References (tiers, services, profiles) may lead nowhere.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from manifests import (
    BLOCKS,
    KEYS,
    NAMESPACES,
    OUTSIDE,
    PODS,
    PORT_NAMES,
    PORTS,
    PROBED_PORTS,
    VALUES,
    Manifest,
    clusters,
    labels,
    pairs,
    pod_addresses,
)  # fmt: skip

API = "projectcalico.org/v3"
ACCOUNTS = ("default", "sa")
TIERS = ("default", "early", "zlate", "kube-admin", "kube-baseline")
HOSTS = ("h", "i")
SERVICES = tuple((namespace, "svc") for namespace in NAMESPACES)
PORT_PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
NETS = {
    4: (*(cidr for cidr, _ in BLOCKS if ":" not in cidr and not cidr.endswith("/0")), "10.0.0.4/31"),
    6: (*(cidr for cidr, _ in BLOCKS if ":" in cidr and not cidr.endswith("/0")), "fd00::/125"),
}
CATCH_ALL = {4: "0.0.0.0/0", 6: "::/0"}


def host_addresses(name: str) -> tuple[str, str]:
    """The expected addresses of a host endpoint."""
    number = HOSTS.index(name)
    return f"172.16.0.{number}", f"fd10::{number:x}"


def _terms(keys: tuple[str, ...], values: tuple[str, ...]) -> st.SearchStrategy[str]:
    key, value = st.sampled_from(keys), st.sampled_from(values)
    return st.one_of(
        st.just("all()"),
        st.builds("{} == '{}'".format, key, value),
        st.builds("{} != '{}'".format, key, value),
        st.builds("has({})".format, key),
        st.builds("!has({})".format, key),
        st.builds("{} in {{'{}'}}".format, key, value),
        st.builds("{} not in {{'{}', 'zz'}}".format, key, value),
        st.builds("{} starts with '{}'".format, key, value),
    )


def _expressions(terms: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        terms,
        terms,
        st.builds("{} && {}".format, terms, terms),
        st.builds("{} || {}".format, terms, terms),
        st.builds("!({} && {})".format, terms, terms),
    )


selectors = _expressions(_terms((*KEYS, "projectcalico.org/namespace"), (*VALUES, *NAMESPACES)))
namespace_selectors = _expressions(_terms((*KEYS, "projectcalico.org/name"), (*VALUES, *NAMESPACES)))
account_selectors = _expressions(_terms((*KEYS, "projectcalico.org/name"), (*VALUES, *ACCOUNTS)))
maybe = st.sampled_from((False, False, True))


@st.composite
def _port_lists(draw: st.DrawFn, *, numeric: bool) -> list[Any]:
    names = st.sampled_from(PORT_NAMES)
    if not numeric:
        return draw(st.lists(names, min_size=1, max_size=2))
    ranges = st.tuples(st.sampled_from(PORTS), st.sampled_from(PORTS)).map(lambda pair: f"{min(pair)}:{max(pair)}")
    return draw(st.lists(st.one_of(st.sampled_from(PORTS), ranges, names), min_size=1, max_size=2))


@st.composite
def _entities(draw: st.DrawFn, family: int, protocol: str, *, service: bool) -> Manifest:
    """One side of a rule. ``service``: whether services may stand here; ``protocol``: the rule's, "" for none."""
    if service and draw(maybe) and draw(maybe):
        namespace, name = draw(st.sampled_from(SERVICES))
        return {"services": {"name": name, "namespace": namespace}}
    fields = {"nets", "notNets", "selector", "notSelector", "namespaceSelector", "serviceAccounts"}
    if not protocol or protocol in PORT_PROTOCOLS:
        fields |= {"ports", "notPorts"}
    numeric = bool(protocol)
    values: dict[str, st.SearchStrategy[Any]] = {
        "nets": st.lists(st.sampled_from((CATCH_ALL[family], *NETS[family])), min_size=1, max_size=2),
        "notNets": st.lists(st.sampled_from(NETS[family]), min_size=1, max_size=2),
        "selector": selectors,
        "notSelector": selectors,
        "namespaceSelector": st.just("global()") | namespace_selectors,
        "serviceAccounts": _account_matches(),
        "ports": _port_lists(numeric=numeric),
        "notPorts": _port_lists(numeric=numeric),
    }
    size = draw(st.sampled_from((0, 0, 1, 1, 2, 3)))
    chosen = draw(st.lists(st.sampled_from(sorted(fields)), min_size=size, max_size=size, unique=True))
    return {field: draw(values[field]) for field in chosen}


@st.composite
def _account_matches(draw: st.DrawFn) -> Manifest:
    match: Manifest = {}
    if draw(st.booleans()):
        match["names"] = draw(st.lists(st.sampled_from(ACCOUNTS), min_size=1, max_size=2, unique=True))
    if not match or draw(maybe):
        match["selector"] = draw(account_selectors)
    return match


@st.composite
def rules(draw: st.DrawFn, direction: str, *, services: bool = True) -> Manifest:
    """A rule of a policy (or, without ``services``, of a profile)."""
    rule: Manifest = {"action": draw(st.sampled_from(("Allow", "Deny", "Pass", "Log")))}
    family = draw(st.sampled_from((4, 4, 6)))
    if draw(maybe):
        rule["ipVersion"] = family
    protocol = draw(st.sampled_from(("", "", "", "TCP", "TCP", "TCP", "UDP", "SCTP", "ICMP", "UDPLite", "47")))
    if protocol == "ICMP":
        protocol = "ICMP" if family == 4 else "ICMPv6"
        if draw(st.booleans()):
            rule["icmp"] = draw(st.sampled_from(({"type": 8}, {"type": 128, "code": 0}, {"type": 3, "code": 1})))
    if protocol == "47":
        rule["protocol"] = 47
    elif protocol:
        rule["protocol"] = PORT_PROTOCOLS[protocol] if protocol in PORT_PROTOCOLS and draw(maybe) else protocol
    if draw(maybe) and draw(maybe):
        rule["notProtocol"] = draw(st.sampled_from(("TCP", "UDP", 132)))
    if draw(maybe) and draw(maybe):
        rule["notICMP"] = {"type": draw(st.sampled_from((8, 128)))}
    for side, here in (("source", direction == "ingress"), ("destination", direction == "egress")):
        entity = draw(_entities(family, protocol, service=services and here))
        if entity:
            rule[side] = entity
    return rule


def _rule_lists(direction: str, *, services: bool = True) -> st.SearchStrategy[list[Manifest]]:
    rule = rules(direction, services=services)
    return st.integers(0, 3).flatmap(lambda size: st.lists(rule, min_size=size, max_size=size))


@st.composite
def policies(draw: st.DrawFn, name: str) -> Manifest:
    """A NetworkPolicy or GlobalNetworkPolicy of Calico."""
    namespace = draw(st.sampled_from(("", "", *NAMESPACES)))
    flags = draw(st.sampled_from(("", "", "", "forward", "pre", "untracked"))) if not namespace else ""
    spec: Manifest = {}
    if draw(maybe):
        spec["selector"] = draw(selectors)
    if draw(maybe) and draw(maybe):
        spec["serviceAccountSelector"] = draw(account_selectors)
    if not namespace and draw(maybe):
        spec["namespaceSelector"] = draw(namespace_selectors)
    if draw(st.booleans()):
        spec["order"] = draw(st.sampled_from((1, 10.5, 999, 1000, 2000)))
    if draw(st.booleans()):
        spec["tier"] = draw(st.sampled_from((*TIERS, "nowhere")))
    if not draw(maybe):
        spec["ingress"] = draw(_rule_lists("ingress"))
    if flags != "pre" and not draw(maybe):
        spec["egress"] = draw(_rule_lists("egress"))
    if draw(maybe):
        spec["types"] = (
            ["Ingress"]
            if flags == "pre"
            else draw(st.lists(st.sampled_from(("Ingress", "Egress")), min_size=1, max_size=2, unique=True))
        )
    if flags:
        spec["applyOnForward"] = True
    if flags == "pre":
        spec["preDNAT"] = True
    if flags == "untracked":
        spec["doNotTrack"] = True
    metadata = {"name": name, "namespace": namespace} if namespace else {"name": name}
    kind = "NetworkPolicy" if namespace else "GlobalNetworkPolicy"
    return {"apiVersion": API, "kind": kind, "metadata": metadata, "spec": spec}


@st.composite
def _tiers(draw: st.DrawFn, name: str) -> Manifest:
    spec: Manifest = {}
    if draw(st.booleans()):
        spec["order"] = draw(st.sampled_from((5, 1000, 1000000, 2000000)))
    if draw(st.booleans()):
        spec["defaultAction"] = draw(st.sampled_from(("Deny", "Pass")))
    return {"apiVersion": API, "kind": "Tier", "metadata": {"name": name}, "spec": spec}


@st.composite
def _network_sets(draw: st.DrawFn, name: str) -> Manifest:
    namespace = draw(st.sampled_from(("", *NAMESPACES)))
    metadata: Manifest = {"name": name, "labels": draw(labels)}
    if namespace:
        metadata["namespace"] = namespace
    every = (*NETS[4], *NETS[6], "198.51.100.1", "2001:db8::9")
    return {
        "apiVersion": API,
        "kind": "NetworkSet" if namespace else "GlobalNetworkSet",
        "metadata": metadata,
        "spec": {"nets": draw(st.lists(st.sampled_from(every), max_size=3, unique=True))},
    }


@st.composite
def _host_endpoints(draw: st.DrawFn, name: str) -> Manifest:
    port = st.builds(
        lambda *parts: dict(zip(("name", "protocol", "port"), parts, strict=True)),
        st.sampled_from(PORT_NAMES), st.sampled_from(tuple(PORT_PROTOCOLS)), st.sampled_from(PORTS),
    )  # fmt: skip
    spec: Manifest = {"node": "node-1", "interfaceName": draw(st.sampled_from(("*", "eth0")))}
    if draw(st.booleans()):
        spec["expectedIPs"] = list(host_addresses(name))
    if draw(maybe):
        spec["profiles"] = draw(st.sampled_from((["projectcalico-default-allow"], ["mine"], ["mine", "missing"])))
    if draw(maybe):
        spec["ports"] = draw(st.lists(port, max_size=2))
    metadata = {"name": name, "labels": draw(labels)}
    return {"apiVersion": API, "kind": "HostEndpoint", "metadata": metadata, "spec": spec}


@st.composite
def _profiles(draw: st.DrawFn) -> Manifest:
    spec = {
        "ingress": draw(_rule_lists("ingress", services=False)),
        "egress": draw(_rule_lists("egress", services=False)),
        "labelsToApply": draw(labels),
    }
    return {"apiVersion": API, "kind": "Profile", "metadata": {"name": "mine"}, "spec": spec}


@st.composite
def _slices(draw: st.DrawFn, namespace: str) -> Manifest:
    family = draw(st.sampled_from((0, 1)))
    everyone = [pod_addresses(*pod)[family] for pod in PODS]
    everyone += [address for address in OUTSIDE if (":" in address) == bool(family)]
    port = st.builds(
        lambda *parts: dict(zip(("protocol", "port"), parts, strict=True)),
        st.sampled_from(tuple(PORT_PROTOCOLS)), st.sampled_from(PORTS),
    )  # fmt: skip
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "svc-1", "namespace": namespace, "labels": {"kubernetes.io/service-name": "svc"}},
        "addressType": "IPv6" if family else "IPv4",
        "endpoints": [
            {"addresses": [address]} for address in draw(st.lists(st.sampled_from(everyone), max_size=3, unique=True))
        ],
        "ports": draw(st.lists(port, max_size=2)),
    }


@st.composite
def calico_clusters(draw: st.DrawFn, *, max_policies: int = 4) -> list[Manifest]:
    """A cluster with a Kubernetes policy at most, and Calico's objects."""
    manifests = draw(clusters(max_policies=1))
    for pod in manifests:
        if pod["kind"] == "Pod" and draw(st.booleans()):
            pod["spec"]["serviceAccountName"] = draw(st.sampled_from(ACCOUNTS))
    accounts: list[Manifest] = [
        {"apiVersion": "v1", "kind": "ServiceAccount",
         "metadata": {"name": name, "namespace": namespace, "labels": draw(labels)}}
        for namespace, name in draw(
            st.lists(st.tuples(st.sampled_from(NAMESPACES), st.sampled_from(ACCOUNTS)), unique=True, max_size=2)
        )
    ]  # fmt: skip
    tiers = draw(st.lists(st.sampled_from(("early", "zlate")), unique=True, max_size=2))
    sets = draw(st.integers(0, 2))
    hosts = draw(st.lists(st.sampled_from(HOSTS), unique=True, max_size=2))
    slices = draw(st.lists(st.sampled_from(NAMESPACES), unique=True, max_size=1))
    count = draw(st.integers(1, max_policies))
    return [
        *manifests,
        *accounts,
        *(draw(_tiers(name)) for name in tiers),
        *(draw(_network_sets(f"set-{number}")) for number in range(sets)),
        *(draw(_host_endpoints(name)) for name in hosts),
        *([draw(_profiles())] if draw(maybe) else []),
        *(draw(_slices(namespace)) for namespace in slices),
        *(draw(policies(f"calico-{number}")) for number in range(count)),
    ]


@st.composite
def calico_pairs(draw: st.DrawFn) -> tuple[str, str, int]:
    """Source and destination address and a source port."""
    hosts = tuple(address for host in HOSTS for address in host_addresses(host))
    return (*draw(pairs(more=hosts)), draw(st.sampled_from(PROBED_PORTS)))


def calico_probes_between(source: str, destination: str, source_port: int) -> list[tuple[str, str, str, int, int]]:
    """Source, destination, protocol name, source port, destination port: all protocols, all ports of one of them."""
    numbered = [
        (source, destination, protocol, source_port, port)
        for protocol in PORT_PROTOCOLS
        for port in (PROBED_PORTS if protocol == "TCP" else (80, 256))
    ]
    return [*numbered, *((source, destination, protocol, 0, 0) for protocol in ("ICMP", "UDPLite", "47"))]
