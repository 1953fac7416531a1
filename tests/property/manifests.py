# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for Kubernetes objects as parsed YAML: namespaces, pods and NetworkPolicies of small clusters.

Invariant: every object drawn is valid and every pod has addresses of its own, so an oracle may look a pod up by address.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st

Manifest = dict[str, Any]

KEYS = ("app", "tier")
VALUES = ("a", "b", "")
NAMESPACES = ("x", "w")
PODS = tuple((namespace, name) for namespace in NAMESPACES for name in ("p", "q", "r"))
OUTSIDE = ("192.0.2.9", "198.51.100.1", "2001:db8::9")
PORTS = (79, 80, 81, 82, 255, 256, 65535)
PORT_NAMES = ("web", "dns")
PROTOCOLS = ("TCP", "UDP", "SCTP")
BLOCKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("10.0.0.0/24", ("10.0.0.0/30", "10.0.0.4/32", "10.0.0.1/32")),
    ("10.0.0.0/30", ("10.0.0.2/32",)),
    ("0.0.0.0/0", ("10.0.0.0/8", "192.0.2.0/24", "10.0.0.5/32")),
    ("192.0.2.9/32", ()),
    ("fd00::/64", ("fd00::/126", "fd00::5/128")),
    ("::/0", ("fd00::/16",)),
)


def pod_addresses(namespace: str, name: str) -> tuple[str, str]:
    """The IPv4 and IPv6 address of a pod."""
    number = PODS.index((namespace, name))
    return f"10.0.0.{number}", f"fd00::{number:x}"


labels = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=2)


def _some(elements: st.SearchStrategy[Any], *, least: int = 0, most: int = 2) -> st.SearchStrategy[list[Any]]:
    """Any length with equal chance."""
    return st.integers(least, most).flatmap(lambda size: st.lists(elements, min_size=size, max_size=size))


@st.composite
def _requirements(draw: st.DrawFn) -> Manifest:
    operator = draw(st.sampled_from(("In", "NotIn", "Exists", "DoesNotExist")))
    requirement: Manifest = {"key": draw(st.sampled_from(KEYS)), "operator": operator}
    if operator in ("In", "NotIn"):
        requirement["values"] = draw(_some(st.sampled_from(VALUES), least=1))
    return requirement


@st.composite
def label_selectors(draw: st.DrawFn) -> Manifest:
    """Empty, matchLabels, matchExpressions, or both."""
    form = draw(st.sampled_from(("", "", "l", "e", "le")))
    selector: Manifest = {}
    if "l" in form:
        selector["matchLabels"] = draw(labels)
    if "e" in form:
        selector["matchExpressions"] = draw(_some(_requirements()))
    return selector


@st.composite
def namespace_selectors(draw: st.DrawFn) -> Manifest:
    """As for labels, or by the name that each namespace is labelled with."""
    if draw(st.booleans()):
        return {"matchLabels": {"kubernetes.io/metadata.name": draw(st.sampled_from(NAMESPACES))}}
    return draw(label_selectors())


@st.composite
def _peers(draw: st.DrawFn) -> Manifest:
    form = draw(st.sampled_from(("pod", "namespace", "both", "block")))
    if form == "block":
        cidr, holes = draw(st.sampled_from(BLOCKS))
        block: Manifest = {"cidr": cidr}
        excepts = draw(st.lists(st.sampled_from(holes), max_size=2, unique=True)) if holes else []
        if excepts:
            block["except"] = excepts
        return {"ipBlock": block}
    peer: Manifest = {}
    if form in ("pod", "both"):
        peer["podSelector"] = draw(label_selectors())
    if form in ("namespace", "both"):
        peer["namespaceSelector"] = draw(namespace_selectors())
    return peer


@st.composite
def _ports(draw: st.DrawFn) -> Manifest:
    port: Manifest = {}
    protocol = draw(st.none() | st.sampled_from(PROTOCOLS))
    if protocol:
        port["protocol"] = protocol
    form = draw(st.sampled_from(("number", "name", "range", "range", "all")))
    if form == "name":
        port["port"] = draw(st.sampled_from(PORT_NAMES))
    elif form == "number":
        port["port"] = draw(st.sampled_from(PORTS))
    elif form == "range":
        port["port"], port["endPort"] = sorted(draw(st.tuples(st.sampled_from(PORTS), st.sampled_from(PORTS))))
    return port


@st.composite
def _rules(draw: st.DrawFn, peers: str) -> Manifest:
    rule: Manifest = {}
    if draw(st.booleans()):
        rule[peers] = draw(_some(_peers()))
    if draw(st.booleans()):
        rule["ports"] = draw(_some(_ports(), most=3))
    return rule


@st.composite
def network_policies(draw: st.DrawFn, name: str) -> Manifest:
    """A NetworkPolicy; lists and policyTypes may be absent, empty or given."""
    spec: Manifest = {"podSelector": draw(label_selectors())}
    types = draw(st.sampled_from(("", "", "Ingress", "Egress", "Ingress Egress")))
    if types:
        spec["policyTypes"] = types.split()
    for field, peers in (("ingress", "from"), ("egress", "to")):
        if draw(st.sampled_from((True, True, False))):
            spec[field] = draw(_some(_rules(peers)))
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": draw(st.sampled_from(NAMESPACES))},
        "spec": spec,
    }


def _container_port(name: str, protocol: str, port: int) -> Manifest:
    return {"name": name, "protocol": protocol, "containerPort": port}


@st.composite
def pods(draw: st.DrawFn, namespace: str, name: str) -> Manifest:
    """A pod with both addresses or one; it may be of the host's network or finished; ports of init containers count."""
    state = draw(st.sampled_from(("", "", "", "", "host", "finished")))
    port = st.builds(_container_port, st.sampled_from(PORT_NAMES), st.sampled_from(PROTOCOLS), st.sampled_from(PORTS))
    declared = st.lists(port, max_size=2, unique_by=lambda entry: str(entry["name"]))
    spec: Manifest = {
        "containers": [{"name": "c", "image": "x", "ports": draw(declared)}],
        "initContainers": [{"name": "i", "image": "x", "ports": draw(st.lists(port, max_size=1))}],
    }
    if state == "host":
        spec["hostNetwork"] = True
    addresses = draw(st.sampled_from((slice(0, 2), slice(0, 2), slice(0, 1), slice(1, 2))))
    ips = pod_addresses(namespace, name)[addresses]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": draw(labels)},
        "spec": spec,
        "status": {
            "phase": "Succeeded" if state == "finished" else "Running",
            "podIP": ips[0],
            "podIPs": [{"ip": ip} for ip in ips],
        },
    }


@st.composite
def clusters(draw: st.DrawFn, *, max_policies: int = 3) -> list[Manifest]:
    """Namespaces, pods and policies; what policies name may be missing."""
    namespaces = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": draw(labels)}}
        for name in NAMESPACES
    ]
    size = draw(st.integers(1, 5))
    chosen = draw(st.lists(st.sampled_from(PODS), unique=True, min_size=size, max_size=size))
    count = draw(st.integers(0, max_policies))
    return [
        *namespaces,
        *(draw(pods(*pod)) for pod in chosen),
        *(draw(network_policies(f"policy-{number}")) for number in range(count)),
    ]


@st.composite
def pairs(draw: st.DrawFn, *, more: tuple[str, ...] = ()) -> tuple[str, str]:
    """Source and destination address, of one family and not equal. ``more``: further addresses to choose from."""
    everyone = [address for pod in PODS for address in pod_addresses(*pod)] + [*OUTSIDE, *more]
    source = draw(st.sampled_from(everyone))
    others = [address for address in everyone if (":" in address) == (":" in source) and address != source]
    return source, draw(st.sampled_from(others))


PROBED_PORTS = (1, *PORTS, 257)
"""Every port that a rule may name, and both sides of the lowest and of the block border at 256."""


def probes_between(source: str, destination: str) -> list[tuple[str, str, str, int]]:
    """Source, destination, protocol name (or ICMP) and destination port: everything a rule could tell apart."""
    numbered = [(source, destination, protocol, port) for protocol in PROTOCOLS for port in PROBED_PORTS]
    return [*numbered, (source, destination, "ICMP", 0)]
