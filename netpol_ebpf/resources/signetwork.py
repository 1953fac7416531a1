# SPDX-License-Identifier: Apache-2.0
"""policy.networking.k8s.io: AdminNetworkPolicy, BaselineAdminNetworkPolicy (v1alpha1), ClusterNetworkPolicy (v1alpha2).

Validation is as in SEMANTICS 1.13 and 1.14.  The peers of the first v1alpha1 releases (``sameLabels``) are accepted.

Invariant: a peer or protocol match of an unknown form is not dropped, but marked as ``unknown``, so that its rule fails
closed.  A peer or protocol match without fields is marked, too, because the API server may have dropped a field of a
newer API.  Unknown fields elsewhere, known fields in the wrong place, and contradictions are errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from netpol_ebpf.resources.kind import Kind
from netpol_ebpf.resources.kubernetes import read_label_selector
from netpol_ebpf.resources.reader import Reader, describe, suggestion
from netpol_ebpf.resources.syntax import (
    MAX_PORT,
    NAMES_ONLY_ALLOW,
    PROTOCOLS,
    check_dns_subdomain,
    check_domain,
    check_port_name,
    normal_domain,
    parse_network,
)
from netpol_ebpf.resources.types import (
    AdminNetworkPolicy,
    BaselineAdminNetworkPolicy,
    ClusterNetworkPolicy,
    IPNetwork,
    LabelSelector,
    Meta,
    NamespacedPodSelector,
    SigPeer,
    SigPort,
    SigRule,
    SigSubject,
)

GROUP = "policy.networking.k8s.io"
MAX_PRIORITY = 1000
MAX_RULE_NAME = 100
MAX_NETWORKS = 25
MAX_DOMAINS = 25
TIERS = ("Admin", "Baseline")

_EGRESS_ONLY = ("nodes", "networks", "domainNames")
WITHOUT_NAMED_PORTS = ("nodes", "networks", "domainNames")
_KUBERNETES_PEERS = {
    "podSelector": "`pods: {namespaceSelector: ..., podSelector: ...}`",
    "namespaceSelector": "`namespaces:` with the selector directly inside",
    "ipBlock": "`networks:` with a list of CIDRs",
}
_OLD_NAMESPACES = ("namespaceSelector", "sameLabels", "notSameLabels")


@dataclass(frozen=True, slots=True)
class Dialect:
    """The differences between the three kinds.

    ``actions``: the names of the actions.
    ``allow``: the name of the action that allows.
    ``egress_peers``: the fields of peers that only egress rules may have.
    ``ports_key``, ``read_port``: the field with a rule's ports, and the function that parses one of its entries.
    ``max_rules``: the largest number of rules in one direction.
    ``max_items``: the largest number of peers, and of ports, in a rule.
    ``older_peers``: whether the peers of the first v1alpha1 releases are accepted.
    """

    actions: tuple[str, ...]
    allow: str
    egress_peers: tuple[str, ...]
    ports_key: str
    read_port: Callable[[Reader], SigPort]
    max_rules: int
    max_items: int
    older_peers: bool


# --- ports ----------------------------------------------------------------------------------------------------------


def _unknown(reader: Reader, what: str, known: tuple[str, ...] = ()) -> None:
    fields = [field for field in reader.fields() if field not in known]
    named = ", ".join(f"`{field}`{suggestion(field, known)}" for field in fields)
    seen = f"unknown {what} {named}" if fields else f"a {what} without any field"
    reader.warning(
        None, f"{seen}: the rule fails closed (it allows nothing, or denies everything)", slug="unknown-peer"
    )


def _exactly_one(reader: Reader, keys: tuple[str, ...], what: str) -> str | None:
    """The only one of the fields ``keys`` that is present.

    If several of them are present, an error is recorded.  If none of them is present, or if another field is present, a
    warning is recorded.  In all these cases the result is None.
    """
    given = [key for key in keys if reader.has(key)]
    if len(given) > 1:
        reader.error(None, f"must have exactly one of {', '.join(keys)}; has {' and '.join(given)}", slug="conflict")
        return None
    if not given or any(field not in keys for field in reader.fields()):
        _unknown(reader, what, keys)
        return None
    return given[0]


def _alpha1_port(port: Reader) -> SigPort:
    """Parse an entry of ports[]: portNumber, portRange or namedPort."""
    which = _exactly_one(port, ("portNumber", "portRange", "namedPort"), "port match")
    if which is None:
        return SigPort(None, unknown=True)
    if which == "namedPort":
        return _named_port(port, "namedPort")
    entry = port.mapping(which)
    if entry is None:
        return SigPort(None, unknown=True)
    protocol = PROTOCOLS[entry.enum("protocol", tuple(PROTOCOLS)) or "TCP"]
    first, last = _range(entry, "start", "end") if which == "portRange" else _number(entry, "port")
    entry.done()
    return SigPort(protocol, first, last)


def _alpha2_port(entry: Reader) -> SigPort:
    """Parse an entry of protocols[]: tcp, udp or sctp with a destinationPort, or destinationNamedPort."""
    which = _exactly_one(entry, ("tcp", "udp", "sctp", "destinationNamedPort"), "protocol match")
    if which is None:
        return SigPort(None, unknown=True)
    if which == "destinationNamedPort":
        return _named_port(entry, which)
    match = entry.mapping(which)
    if match is None or _exactly_one(match, ("destinationPort",), f"{which} match") is None:
        return SigPort(None, unknown=True)
    port = match.mapping("destinationPort")
    kind = None if port is None else _exactly_one(port, ("number", "range"), "port match")
    if port is None or kind is None:
        return SigPort(None, unknown=True)
    if kind == "number":
        first, last = _number(port, "number")
    else:
        ends = port.mapping("range")
        first, last = (0, 0) if ends is None else _range(ends, "start", "end")
        if ends is not None:
            ends.done()
    return SigPort(PROTOCOLS[which.upper()], first, last)


def _named_port(reader: Reader, key: str) -> SigPort:
    name = reader.string(key) or ""
    if (message := check_port_name(name)) is not None:
        reader.error(key, message, slug="port")
    return SigPort(None, named_port=name)


def _number(reader: Reader, key: str) -> tuple[int, int]:
    number = reader.integer(key, 1, MAX_PORT) or 0
    if not reader.has(key):
        reader.missing(key)
    return number, number


def _range(reader: Reader, start: str, end: str) -> tuple[int, int]:
    first, last = (reader.integer(key, 1, MAX_PORT) for key in (start, end))
    for key in (start, end):
        if not reader.has(key):
            reader.missing(key)
    if first is not None and last is not None and first >= last:
        reader.error(end, f"must be greater than `{start}`; {last} is not greater than {first}", slug="port")
    return first or 0, last or 0


# --- subjects and peers ---------------------------------------------------------------------------------------------


def _selector(reader: Reader, key: str) -> LabelSelector:
    selector = reader.mapping(key)
    if selector is None:
        if not reader.has(key):
            reader.missing(key)
        return LabelSelector()
    return read_label_selector(selector)


def _pods(pods: Reader, *, namespace_required: bool) -> NamespacedPodSelector:
    if namespace_required or pods.has("namespaceSelector"):
        namespaces = _selector(pods, "namespaceSelector")
    else:
        pods.ignore("namespaceSelector")
        namespaces = LabelSelector()
    result = NamespacedPodSelector(namespaces, _selector(pods, "podSelector"))
    pods.done()
    return result


def _subject(spec: Reader, *, namespace_required: bool) -> SigSubject:
    subject = spec.mapping("subject")
    if subject is None:
        if not spec.has("subject"):
            spec.missing("subject")
        return SigSubject(LabelSelector())
    namespaces, pods = subject.mapping("namespaces"), subject.mapping("pods")
    result = SigSubject(
        None if namespaces is None else read_label_selector(namespaces),
        None if pods is None else _pods(pods, namespace_required=namespace_required),
    )
    if subject.has("namespaces") == subject.has("pods"):
        subject.error(None, "must have exactly one of namespaces, pods", slug="conflict")
    subject.done()
    return result


def _peer(peer: Reader, dialect: Dialect, *, ingress: bool, allows: bool) -> SigPeer:
    known = ("namespaces", "pods") if ingress else ("namespaces", "pods", *dialect.egress_peers)
    for key in _EGRESS_ONLY:
        if ingress and peer.has(key):
            peer.error(key, f"`{key}` is possible only in egress rules, under `to:`", slug="conflict")
            return SigPeer(unknown=True)
    for key, instead in _KUBERNETES_PEERS.items():
        if peer.has(key):
            peer.error(key, f"`{key}` is a peer of networking.k8s.io; here it is {instead}", slug="unknown-field")
            return SigPeer(unknown=True)
    which = _exactly_one(peer, known, "peer")
    if which is None:
        return SigPeer(unknown=True)
    if which == "networks":
        return SigPeer(networks=tuple(_networks(peer)))
    if which == "domainNames":
        if not allows:
            message = f"is possible only in a rule with action {dialect.allow}: {NAMES_ONLY_ALLOW}"
            peer.error("domainNames", message, slug="conflict")
        return SigPeer(domain_names=tuple(_domains(peer)))
    below = peer.mapping(which)
    if below is None:
        return SigPeer(unknown=True)
    if which == "nodes":
        return SigPeer(nodes=read_label_selector(below))
    if dialect.older_peers and (which == "pods" or any(field in _OLD_NAMESPACES for field in below.fields())):
        return _older_peer(below, pods=which == "pods")
    if which == "pods":
        return SigPeer(pods=_pods(below, namespace_required=False))
    return SigPeer(namespaces=read_label_selector(below))


def _older_peer(peer: Reader, *, pods: bool) -> SigPeer:
    """Parse a peer of a v1alpha1 policy, in the form of any release of v1alpha1.

    The peer selects namespaces by a selector, or by a comparison of their labels with those of the subject's namespace
    (sameLabels, notSameLabels).
    ``pods``: whether this is the field pods, which may also have a pod selector; otherwise it is the field namespaces.
    """
    if not pods:
        return _older_namespaces(peer, None)
    if not peer.has("namespaces"):
        return SigPeer(pods=_pods(peer, namespace_required=True))
    namespaces = peer.mapping("namespaces")
    pod_selector = _selector(peer, "podSelector")
    peer.done()
    return SigPeer(unknown=True) if namespaces is None else _older_namespaces(namespaces, pod_selector)


def _older_namespaces(namespaces: Reader, pod_selector: LabelSelector | None) -> SigPeer:
    which = _exactly_one(namespaces, _OLD_NAMESPACES, "peer")
    if which is None:
        return SigPeer(unknown=True)
    selector = _selector(namespaces, which) if which == "namespaceSelector" else LabelSelector()
    labels = () if which == "namespaceSelector" else namespaces.strings(which)
    if which != "namespaceSelector" and not labels:
        _unknown(namespaces, "peer")
        return SigPeer(unknown=True)
    return SigPeer(
        namespaces=selector if pod_selector is None else None,
        pods=None if pod_selector is None else NamespacedPodSelector(selector, pod_selector),
        same_labels=labels if which == "sameLabels" else (),
        not_same_labels=labels if which == "notSameLabels" else (),
    )


def _networks(peer: Reader) -> Iterator[IPNetwork]:
    _check_size(peer, "networks", 1, MAX_NETWORKS)
    for path, text in peer.indexed_strings("networks"):
        try:
            network, masked = parse_network(text)
        except ValueError as error:
            peer.report.error(path, str(error), slug="cidr")
            continue
        if ":" in text and "." in text:
            peer.report.error(
                path, f"must be either IPv4 or IPv6, not IPv4 inside IPv6; is {describe(text)}", slug="cidr"
            )
        elif masked:
            peer.report.warning(
                path, f'"{text}" has bits beyond its prefix; it is read as {network}', slug="cidr-masked"
            )
        yield network


def _domains(peer: Reader) -> Iterator[str]:
    _check_size(peer, "domainNames", 1, MAX_DOMAINS)
    for path, text in peer.indexed_strings("domainNames"):
        if (message := check_domain(text)) is not None or "*" in text[1:] or "." not in text.removesuffix("."):
            usual = 'must be a domain name such as "example.com", or "*.example.com" with "*" only in front'
            peer.report.error(path, message or f"{usual}; is {describe(text)}", slug="domain")
        yield normal_domain(text)


def _check_size(reader: Reader, key: str, low: int, high: int) -> None:
    entries = reader.list(key)
    if reader.has(key) and isinstance(reader.raw(key), (list, tuple)) and len(entries) < low:
        reader.error(key, "must have at least one entry", slug="required")
    if len(entries) > high:
        reader.error(key, f"must have at most {high} entries, has {len(entries)}", slug="limit")


# --- rules ----------------------------------------------------------------------------------------------------------


def _rules(spec: Reader, key: str, dialect: Dialect) -> tuple[SigRule, ...]:
    written = spec.raw(key)
    if isinstance(written, Mapping):
        first = next(iter(written), "action")
        spec.error(
            key, f"must be a list of rules, is a mapping; put `- ` before `{first}:` to make it an item", slug="type"
        )
        return ()
    if len(spec.list(key)) > dialect.max_rules:
        spec.error(key, f"must have at most {dialect.max_rules} rules, has {len(spec.list(key))}", slug="limit")
    return tuple(_rule(rule, dialect, ingress=key == "ingress") for rule in spec.mappings(key))


def _rule(rule: Reader, dialect: Dialect, *, ingress: bool) -> SigRule:
    peers_key, other = ("from", "to") if ingress else ("to", "from")
    name = rule.string("name") or ""
    if len(name) > MAX_RULE_NAME:
        rule.error("name", f"must have at most {MAX_RULE_NAME} characters, has {len(name)}", slug="limit")
    action = _action(rule, dialect)
    if not rule.has(peers_key):
        rule.missing(peers_key)
    _check_size(rule, peers_key, 1, dialect.max_items)
    allows = action == "Allow"
    peers = tuple(_peer(peer, dialect, ingress=ingress, allows=allows) for peer in rule.mappings(peers_key))
    _check_size(rule, dialect.ports_key, 1, dialect.max_items)
    ports = tuple(dialect.read_port(port) for port in rule.mappings(dialect.ports_key))
    if any(port.named_port is not None for port in ports):
        for peer in rule.mappings(peers_key):
            for key in WITHOUT_NAMED_PORTS:
                if peer.has(key):
                    peer.error(key, "has no named ports; a rule with this peer needs port numbers", slug="conflict")
    depth = f"is at the wrong indentation level: directly in the rule. Move it inside an item of the list under `{peers_key}:`"
    other_key = "protocols" if dialect.ports_key == "ports" else "ports"
    rule.done(
        {
            other: f"`{other}:` belongs to {'egress' if ingress else 'ingress'} rules; here it is `{peers_key}:`",
            other_key: f"unknown field `{other_key}`; in this version it is `{dialect.ports_key}`",
            **{key: f"`{key}:` {depth}" for key in ("namespaces", "pods", *_EGRESS_ONLY)},
        }
    )
    return SigRule(name, action, peers, ports if rule.has(dialect.ports_key) else None, rule.report.location(rule.path))


def _action(rule: Reader, dialect: Dialect) -> str:
    """The rule's action: Allow, Deny or Pass. If the field is wrong, an error is recorded and the result is Deny."""
    written = rule.peek("action")
    if written in ("Allow", "Accept") and written not in dialect.actions:
        rule.error(
            "action", f"must be one of {', '.join(dialect.actions)}; for {written} write {dialect.allow}", slug="enum"
        )
        rule.ignore("action")
        return "Allow"
    action = rule.enum("action", dialect.actions, required=True)
    return "Allow" if action == dialect.allow else action or "Deny"


ADMIN = Dialect(
    ("Allow", "Deny", "Pass"),
    "Allow",
    _EGRESS_ONLY,
    "ports",
    _alpha1_port,
    max_rules=100,
    max_items=100,
    older_peers=True,
)
BASELINE = Dialect(
    ("Allow", "Deny"),
    "Allow",
    ("nodes", "networks"),
    "ports",
    _alpha1_port,
    max_rules=100,
    max_items=100,
    older_peers=True,
)
CLUSTER = Dialect(
    ("Accept", "Deny", "Pass"),
    "Accept",
    _EGRESS_ONLY,
    "protocols",
    _alpha2_port,
    max_rules=25,
    max_items=25,
    older_peers=False,
)


# --- the kinds ------------------------------------------------------------------------------------------------------


def _spec(obj: Reader) -> Reader:
    if not obj.has("spec"):
        obj.missing("spec")
        obj.ignore("spec")
    return obj.mapping("spec") or Reader({}, ("spec",), obj.report)


def _priority(spec: Reader) -> int:
    if not spec.has("priority"):
        spec.missing("priority")
    return spec.integer("priority", 0, MAX_PRIORITY) or 0


def _admin(obj: Reader, meta: Meta) -> AdminNetworkPolicy:
    spec = _spec(obj)
    policy = AdminNetworkPolicy(
        meta,
        _priority(spec),
        _subject(spec, namespace_required=True),
        _rules(spec, "ingress", ADMIN),
        _rules(spec, "egress", ADMIN),
    )
    spec.done({"tier": "unknown field `tier`; a v1alpha2 ClusterNetworkPolicy has it"})
    return policy


def _baseline(obj: Reader, meta: Meta) -> BaselineAdminNetworkPolicy:
    spec = _spec(obj)
    policy = BaselineAdminNetworkPolicy(
        meta,
        _subject(spec, namespace_required=True),
        _rules(spec, "ingress", BASELINE),
        _rules(spec, "egress", BASELINE),
    )
    spec.done(
        {"priority": "unknown field `priority`; there is only one BaselineAdminNetworkPolicy, without a priority"}
    )
    return policy


def _cluster(obj: Reader, meta: Meta) -> ClusterNetworkPolicy:
    spec = _spec(obj)
    policy = ClusterNetworkPolicy(
        meta,
        spec.enum("tier", TIERS, required=True) or "Admin",
        _priority(spec),
        _subject(spec, namespace_required=False),
        _rules(spec, "ingress", CLUSTER),
        _rules(spec, "egress", CLUSTER),
    )
    spec.done()
    return policy


def _check_singleton_name(name: str) -> str | None:
    return (
        None if name == "default" else f'must be "default": there is only one BaselineAdminNetworkPolicy; is "{name}"'
    )


KINDS = (
    Kind(f"{GROUP}/v1alpha1", "AdminNetworkPolicy", namespaced=False, parse=_admin, check_name=check_dns_subdomain),
    Kind(
        f"{GROUP}/v1alpha1",
        "BaselineAdminNetworkPolicy",
        namespaced=False,
        parse=_baseline,
        check_name=_check_singleton_name,
    ),
    Kind(f"{GROUP}/v1alpha2", "ClusterNetworkPolicy", namespaced=False, parse=_cluster, check_name=check_dns_subdomain),
)
