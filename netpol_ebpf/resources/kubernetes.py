# SPDX-License-Identifier: Apache-2.0
"""networking.k8s.io/v1 NetworkPolicy: validation and default values as in the API server (SEMANTICS 1.1).

This module also parses the Kubernetes label selector, which other API groups use, and the spec of the staged form.
CIDRs may have leading zeros and host bits, because older API servers stored such objects.  Then a warning shows the
CIDR that is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from netpol_ebpf.resources.kind import Kind
from netpol_ebpf.resources.reader import Reader, describe
from netpol_ebpf.resources.syntax import (
    MAX_PORT,
    PROTOCOLS,
    check_dns_subdomain,
    check_label,
    check_label_key,
    check_label_value,
    check_port_name,
    parse_network,
)
from netpol_ebpf.resources.types import (
    IPBlock,
    IPNetwork,
    KubernetesNetworkPolicy,
    KubernetesPeer,
    KubernetesPolicySpec,
    KubernetesPort,
    KubernetesRule,
    LabelSelector,
    Meta,
    Requirement,
)
from netpol_ebpf.resources.yamltree import Path

DIRECTIONS = ("Ingress", "Egress")

_WITH_VALUES = ("In", "NotIn")
_WITHOUT_VALUES = ("Exists", "DoesNotExist")


# --- label selectors ------------------------------------------------------------------------------------------------


def read_label_selector(selector: Reader) -> LabelSelector:
    """Parse a LabelSelector. All its requirements must match."""
    labels = selector.string_map("matchLabels", check_label)
    requirements = tuple(_requirement(expression) for expression in selector.mappings("matchExpressions"))
    hints = {
        key: f"unknown field `{key}`; a label belongs under `matchLabels:`"
        for key in selector.fields()
        if not key.lower().startswith("match")
    }
    selector.done(hints)
    return LabelSelector(labels, requirements)


def _requirement(expression: Reader) -> Requirement:
    key = expression.required_string("key")
    if key and (message := check_label_key(key)) is not None:
        expression.error("key", message, slug="label")
    operator = expression.enum("operator", (*_WITH_VALUES, *_WITHOUT_VALUES), required=True)
    values = []
    for path, value in expression.indexed_strings("values"):
        values.append(value)
        if (message := check_label_value(value)) is not None:
            expression.report.error(path, message, slug="label")
    if operator in _WITH_VALUES and not values and not expression.list("values"):
        expression.error(None, f"operator {operator} needs at least one entry in `values`", slug="required")
    if operator in _WITHOUT_VALUES and values:
        expression.error("values", f"must be empty with operator {operator}")
    expression.done()
    return Requirement(key, operator or "Exists", tuple(values))


def optional_selector(parent: Reader, key: str) -> LabelSelector | None:
    """Parse the label selector in a field. None if the field is absent, which differs from an empty selector."""
    selector = parent.mapping(key)
    return None if selector is None else read_label_selector(selector)


# --- the policy -----------------------------------------------------------------------------------------------------


def _network_policy(obj: Reader, meta: Meta) -> KubernetesNetworkPolicy:
    spec = obj.mapping("spec")
    if spec is None and not obj.has("spec"):
        obj.warning(
            None, "has no `spec`: it selects every pod of its namespace and allows no ingress", slug="empty-policy"
        )
    return KubernetesNetworkPolicy(meta, read_policy_spec(spec or Reader({}, ("spec",), obj.report)))


def read_policy_spec(spec: Reader, *, more: tuple[str, ...] = ()) -> KubernetesPolicySpec:
    """Parse a NetworkPolicySpec, with the default of policyTypes. ``more``: names of fields that the caller reads."""
    selector = optional_selector(spec, "podSelector") or LabelSelector()
    ingress = tuple(_rules(spec, "ingress", "from"))
    egress = tuple(_rules(spec, "egress", "to"))
    types = _policy_types(spec, has_egress=bool(egress))
    spec.ignore(*more)
    rules = "`ingress:` or `egress:`"
    spec.done(
        {
            "ports": f"`ports:` is at the wrong indentation level: directly under `{spec.path[-1]}:`. Move it inside the "
            "`- from:` item under `ingress:` (or the `- to:` item under `egress:`), in line with `from:`",
            "from": "`from:` is at the wrong indentation level: move it inside an item (`- from:`) of the list under `ingress:`",
            "to": "`to:` is at the wrong indentation level: move it inside an item (`- to:`) of the list under `egress:`",
            "matchLabels": "unknown field `matchLabels`; it belongs inside `podSelector:`",
            "types": "unknown field `types`; in a networking.k8s.io NetworkPolicy it is `policyTypes`",
            "selector": "unknown field `selector`; in a networking.k8s.io NetworkPolicy it is `podSelector`",
            "rules": f"unknown field `rules`; rules are the items under {rules}",
        }
    )
    return KubernetesPolicySpec(selector, types, ingress, egress)


def _policy_types(spec: Reader, *, has_egress: bool) -> tuple[str, ...]:
    types = []
    for path, name in spec.indexed_strings("policyTypes"):
        if name in DIRECTIONS:
            types.append(name)
        else:
            near = next((one for one in DIRECTIONS if one.lower() == name.lower()), None)
            wanted = f'write "{near}"' if near else "must be Ingress or Egress"
            spec.report.error(path, f"{wanted}; is {describe(name)}", slug="enum")
    if len(spec.list("policyTypes")) > len(DIRECTIONS):
        spec.error("policyTypes", "must have at most two entries, Ingress and Egress", slug="limit")
    if not spec.list("policyTypes"):
        return DIRECTIONS if has_egress else DIRECTIONS[:1]
    for direction in DIRECTIONS:
        field = direction.lower()
        if len(types) == len(spec.list("policyTypes")) and direction not in types and spec.list(field):
            spec.warning(field, f"has no effect, because `policyTypes` does not list {direction}", slug="inert-rules")
    return tuple(one for one in DIRECTIONS if one in types)


def _rules(spec: Reader, direction: str, peers_key: str) -> Iterator[KubernetesRule]:
    written = spec.raw(direction)
    if isinstance(written, Mapping):
        _not_a_list(spec, direction, peers_key, written)
        return
    before: KubernetesRule | None = None
    for rule in spec.mappings(direction):
        read = _rule(rule, direction, peers_key)
        if before is not None and (_is_half(before, read) or _is_half(read, before)):
            rule.warning(
                None,
                f"this item and the one before it are two rules, one with only `{peers_key}:` and one with only `ports:`; each "
                "allows on its own. If both were meant to hold together, remove the dash that begins this item",
                slug="split-rule",
            )
        before = read
        yield read


def _is_half(peers: KubernetesRule, ports: KubernetesRule) -> bool:
    """Whether ``peers`` is a rule with peers only, and ``ports`` a rule with ports only.

    Two such neighbours are probably one rule that was split by mistake.
    """
    return bool(peers.peers and not peers.ports and ports.ports and not ports.peers)


def _not_a_list(spec: Reader, direction: str, peers_key: str, written: Mapping[object, object]) -> None:
    """Record the error that a mapping is in place of the list of rules, with the probable mistake."""
    if "ports" in written:
        spec.report.error(
            (*spec.path, direction, "ports"),
            f"`ports:` is at the wrong indentation level: directly under `{direction}:`. `{direction}:` is a list of rules; "
            f"move `ports:` inside its `- {peers_key}:` item, in line with `{peers_key}:`",
            slug="wrong-depth",
        )
    first = next(iter(written), peers_key)
    spec.error(
        direction, f"must be a list of rules, is a mapping; put `- ` before `{first}:` to make it an item", slug="type"
    )


def _rule(rule: Reader, direction: str, peers_key: str) -> KubernetesRule:
    peers = tuple(_peers(rule, direction, peers_key))
    ports = tuple(_port(port) for port in rule.mappings("ports"))
    if rule.given(peers_key) and not rule.raw(peers_key) and not isinstance(rule.raw(peers_key), Mapping):
        whom = "source" if peers_key == "from" else "destination"
        rule.warning(
            peers_key,
            f"`{peers_key}:` is empty, so this rule allows every {whom}; leave it out if that is meant",
            slug="empty-peers",
        )
    other, other_direction = ("to", "egress") if peers_key == "from" else ("from", "ingress")
    peer_hint = "is at the wrong indentation level: move it inside an item of the list under "
    rule.done(
        {
            other: f"`{other}:` belongs to {other_direction} rules; a rule under `{direction}:` has `{peers_key}:`",
            "podSelector": f"`podSelector:` {peer_hint}`{peers_key}:`",
            "namespaceSelector": f"`namespaceSelector:` {peer_hint}`{peers_key}:`",
            "ipBlock": f"`ipBlock:` {peer_hint}`{peers_key}:`",
            "port": "`port:` is at the wrong indentation level: move it inside an item of the list under `ports:`",
            "protocol": "`protocol:` is at the wrong indentation level: move it inside an item of the list under `ports:`",
        }
    )
    return KubernetesRule(peers, ports, rule.report.location(rule.path))


def _peers(rule: Reader, direction: str, peers_key: str) -> Iterator[KubernetesPeer]:
    written = rule.raw(peers_key)
    if isinstance(written, Mapping):
        first = next(iter(written), "podSelector")
        rule.error(
            peers_key,
            f"must be a list of peers, is a mapping; put `- ` before `{first}:` to make it an item",
            slug="type",
        )
        return
    for peer in rule.mappings(peers_key):
        yield _peer(peer, direction, peers_key)


def _peer(peer: Reader, direction: str, peers_key: str) -> KubernetesPeer:
    pods = optional_selector(peer, "podSelector")
    namespaces = optional_selector(peer, "namespaceSelector")
    block_reader = peer.mapping("ipBlock")
    block = None if block_reader is None else _ip_block(block_reader)
    if peer.has("ipBlock") and (peer.has("podSelector") or peer.has("namespaceSelector")):
        peer.error(
            None,
            "`ipBlock` cannot be combined with a selector in one peer; write two items to allow either",
            slug="conflict",
        )
    wrong_depth = {
        "ports": f"`ports:` is at the wrong indentation level: inside a peer of `{peers_key}:`. Move it out, inside the "
        f"`- {peers_key}:` item of `{direction}:`, in line with `{peers_key}:`",
        "matchLabels": "unknown field `matchLabels`; it belongs inside `podSelector:` or `namespaceSelector:`",
        "matchExpressions": "unknown field `matchExpressions`; it belongs inside `podSelector:` or `namespaceSelector:`",
        "cidr": "unknown field `cidr`; it belongs inside `ipBlock:`",
    }
    if not any(peer.has(key) for key in ("podSelector", "namespaceSelector", "ipBlock", *wrong_depth)):
        peer.error(
            None,
            "a peer needs `podSelector`, `namespaceSelector` or `ipBlock`; to allow everyone, leave out "
            f"`{peers_key}:` altogether",
            slug="required",
        )
    peer.done(wrong_depth)
    return KubernetesPeer(pods, namespaces, block)


def _ip_block(block: Reader) -> IPBlock | None:
    text = block.required_string("cidr")
    cidr = _network(block, (*block.path, "cidr"), text) if text else None
    excepts = []
    for path, except_text in block.indexed_strings("except"):
        network = _network(block, path, except_text)
        if network is None or cidr is None:
            continue
        if not _strictly_within(network, cidr):
            block.report.error(path, f'"{except_text}" must lie within cidr "{text}" and be smaller', slug="cidr")
        excepts.append(network)
    block.done({"excepts": "unknown field `excepts` (did you mean `except`?)"})
    return None if cidr is None else IPBlock(cidr, tuple(excepts))


def _strictly_within(inner: IPNetwork, outer: IPNetwork) -> bool:
    return (
        inner.version == outer.version
        and inner.prefixlen > outer.prefixlen
        and int(inner.network_address) >> (inner.max_prefixlen - outer.prefixlen)
        == int(outer.network_address) >> (outer.max_prefixlen - outer.prefixlen)
    )


def _network(reader: Reader, path: Path, text: str) -> IPNetwork | None:
    try:
        network, masked = parse_network(text, lenient=True)
    except ValueError as error:
        reader.report.error(path, str(error), slug="cidr")
        return None
    if masked:
        reader.report.warning(path, f'"{text}" has bits beyond its prefix; it is read as {network}', slug="cidr-masked")
    return network


def _port(port: Reader) -> KubernetesPort:
    protocol = PROTOCOLS[port.enum("protocol", tuple(PROTOCOLS)) or "TCP"]
    value = port.raw("port")
    number: int | str | None = None
    if isinstance(value, str):
        number = value
        if (message := check_port_name(value)) is not None:
            port.error("port", message, slug="port")
    elif value is not None:
        number = port.integer("port", 1, MAX_PORT)
    end = _end_port(port)
    if port.has("endPort"):
        if value is None:
            port.error("endPort", "needs a `port` to begin the range", slug="port")
        elif isinstance(value, str):
            port.error("endPort", "needs a numeric `port`; a range cannot begin with a port name", slug="port")
        elif isinstance(number, int) and end is not None and end < number:
            port.error("endPort", f"must not be less than `port`; {end} is less than {number}", slug="port")
    port.done()
    return KubernetesPort(protocol, number, end)


def _end_port(port: Reader) -> int | None:
    """Parse endPort. A value above 65535 is read as 65535 and recorded as an error, in lenient mode as a warning."""
    end = port.integer("endPort", 1, 2**31 - 1)
    if end is not None and end > MAX_PORT:
        seen = port.report.describe((*port.path, "endPort"), end)
        port.error("endPort", f"must be at most {MAX_PORT}, is {seen}", slug="end-port")
        return MAX_PORT
    return end


KINDS = (
    Kind(
        "networking.k8s.io/v1", "NetworkPolicy", namespaced=True, parse=_network_policy, check_name=check_dns_subdomain
    ),
)
