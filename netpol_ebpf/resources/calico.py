# SPDX-License-Identifier: Apache-2.0
"""The kinds of projectcalico.org/v3: policies, staged policies, tiers, network sets, endpoints, profiles.

Validation and default values are as in SEMANTICS 1.7 to 1.12.  `calico_rule` parses the rules of policies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from netpol_ebpf.resources.calico_rule import (
    PROTOCOLS,
    WITH_PORTS,
    read_domains,
    read_protocol,
    read_rules,
    read_selector,
)
from netpol_ebpf.resources.kind import Kind
from netpol_ebpf.resources.kubernetes import read_policy_spec
from netpol_ebpf.resources.reader import Reader, describe
from netpol_ebpf.resources.syntax import (
    MAX_PORT,
    check_dns_label,
    check_dns_subdomain,
    check_label,
    parse_address,
    parse_network,
)
from netpol_ebpf.resources.types import (
    CalicoNetworkPolicy,
    CalicoPolicySpec,
    EndpointPort,
    GlobalNetworkPolicy,
    HostEndpoint,
    IPAddress,
    IPNetwork,
    Meta,
    NetworkSet,
    Profile,
    Resource,
    StagedGlobalNetworkPolicy,
    StagedKubernetesNetworkPolicy,
    StagedNetworkPolicy,
    Tier,
    WorkloadEndpoint,
)

VERSION = "projectcalico.org/v3"
DEFAULT_TIER = "default"
BUILT_IN_TIERS = {
    "kube-admin": (1_000.0, "Pass"),
    "default": (1_000_000.0, "Deny"),
    "kube-baseline": (10_000_000.0, "Pass"),
}

STAGED_ACTIONS = ("Set", "Delete", "Learn", "Ignore")
TIER_ACTIONS = ("Deny", "Pass")
_DIRECTIONS = ("Ingress", "Egress")
PERFORMANCE_HINT = "AssumeNeededOnEveryNode"
_NAMESPACE_LABEL = "projectcalico.org/namespace"

_LABEL = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
_POLICY_NAME = re.compile(rf"(?:{_LABEL}\.)?{_LABEL}\Z")
_CONVERTED_NAME = re.compile(rf"(?:knp|ossg)\.default\.{_LABEL}(?:\.{_LABEL})*\Z")
INTERFACE = re.compile(r"[a-zA-Z0-9_.-]{1,15}\Z")
PORT_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}\Z")
_CONTAINER_ID = re.compile(r"[a-zA-Z0-9](?:[-a-zA-Z0-9]*[a-zA-Z0-9])?\Z")
_MAC = re.compile(r"(?:[0-9a-fA-F]{2}[:-]){5}[0-9a-fA-F]{2}\Z")

_ONLY_GLOBAL = ("namespaceSelector", "doNotTrack", "preDNAT", "applyOnForward")


# --- names ----------------------------------------------------------------------------------------------------------


def _check_policy_name(name: str) -> str | None:
    """Check a policy's name. Returns the fault, or None.

    The name must be one DNS label, two labels with a dot between them, or the name of an object that Calico converts to
    a policy.
    """
    return None if len(name) <= 253 and _CONVERTED_NAME.match(name) else _check_global_policy_name(name)  # noqa: PLR2004


def _check_global_policy_name(name: str) -> str | None:
    """Check a global policy's name: one DNS label, or two with a dot between them. Returns the fault, or None."""
    if (message := check_dns_subdomain(name)) is not None:
        return message
    if not _POLICY_NAME.match(name):
        reserved = "; knp.default. and ossg.default. are reserved" if _CONVERTED_NAME.match(name) else ""
        return f'must be a name without dots, or "tier.name" with a single dot{reserved}; is "{name}"'
    return None


# --- policies -------------------------------------------------------------------------------------------------------


def _spec(obj: Reader) -> Reader:
    return obj.mapping("spec") or Reader({}, ("spec",), obj.report)


def _policy_spec(spec: Reader, namespace: str, *, is_global: bool) -> CalicoPolicySpec:
    """Parse the spec of a Calico policy, staged or not, global or not. ``namespace``: "" for a global policy."""
    tier = _tier_name(spec)
    order = spec.number("order")
    selector = read_selector(spec, "selector")
    account_selector = read_selector(spec, "serviceAccountSelector")
    ingress = read_rules(spec, "ingress", namespace)
    egress = read_rules(spec, "egress", namespace)
    types = _types(spec)
    hints = _performance_hints(spec)
    namespace_selector = None
    flags = [False, False, False]
    if is_global:
        namespace_selector = read_selector(spec, "namespaceSelector")
        flags = [spec.boolean(key) for key in _ONLY_GLOBAL[1:]]
        _check_host_flags(spec, flags, types)
    spec.done(_misplaced(is_global=is_global))
    _warn_inert(spec, types)
    return CalicoPolicySpec(
        tier=tier,
        order=order,
        selector=selector,
        namespace_selector=namespace_selector,
        service_account_selector=account_selector,
        types=types or _default_types(spec),
        ingress=ingress,
        egress=egress,
        do_not_track=flags[0],
        pre_dnat=flags[1],
        apply_on_forward=flags[2],
        performance_hints=hints,
    )


def _misplaced(*, is_global: bool) -> dict[str, str]:
    hints = {
        "policyTypes": "unknown field `policyTypes`; in a projectcalico.org policy it is `types`",
        "podSelector": "unknown field `podSelector`; in a projectcalico.org policy it is `selector`, an expression",
        "ports": "`ports:` is at the wrong indentation level: directly under `spec:`. Move it inside the `source:` or "
        "`destination:` of a rule under `ingress:` or `egress:`",
    }
    if not is_global:
        hints |= {key: f"unknown field `{key}`; only a GlobalNetworkPolicy has it" for key in _ONLY_GLOBAL}
    return hints


def _tier_name(spec: Reader) -> str:
    tier = spec.string("tier") or DEFAULT_TIER
    if (message := check_dns_label(tier)) is not None:
        spec.error("tier", message, slug="name")
    return tier


def _types(spec: Reader) -> tuple[str, ...]:
    """Parse the field ``types``. Returns the directions in the order Ingress, Egress; () if the field is absent."""
    types: list[str] = []
    for path, name in spec.indexed_strings("types"):
        if name not in _DIRECTIONS:
            near = next((f'; write "{one}"' for one in _DIRECTIONS if one.lower() == name.lower()), "")
            spec.report.error(path, f"must be Ingress or Egress, is {describe(name)}{near}", slug="enum")
        elif name in types:
            spec.report.error(path, f"{name} is given twice", slug="duplicate-entry")
        types.append(name)
    return tuple(one for one in _DIRECTIONS if one in types)


def _default_types(spec: Reader) -> tuple[str, ...]:
    """The policy types if the field ``types`` is absent.

    They are Ingress if there are no egress rules, Egress if there are only egress rules, and both if there are rules of
    both directions.  The default of a Kubernetes policy is different.
    """
    if not spec.list("egress"):
        return _DIRECTIONS[:1]
    return _DIRECTIONS if spec.list("ingress") else _DIRECTIONS[1:]


def _warn_inert(spec: Reader, types: tuple[str, ...]) -> None:
    if not types or len(types) != len(spec.list("types")):  # the field is absent, or has invalid values
        return
    for direction in _DIRECTIONS:
        field = direction.lower()
        if direction not in types and spec.list(field):
            spec.warning(field, f"has no effect, because `types` does not list {direction}", slug="inert-rules")


def _check_host_flags(spec: Reader, flags: list[bool], types: tuple[str, ...]) -> None:
    do_not_track, pre_dnat, apply_on_forward = flags
    if do_not_track and pre_dnat:
        spec.error("preDNAT", "cannot be combined with `doNotTrack`; choose one of the two", slug="conflict")
    if (do_not_track or pre_dnat) and not apply_on_forward:
        which = "preDNAT" if pre_dnat else "doNotTrack"
        spec.error(which, "needs `applyOnForward: true` beside it", slug="conflict")
    if pre_dnat and spec.list("egress"):
        spec.error("egress", "a preDNAT policy has only ingress rules", slug="conflict")
    if pre_dnat and "Egress" in types:
        spec.error("types", "a preDNAT policy cannot have the type Egress", slug="conflict")


def _performance_hints(spec: Reader) -> tuple[str, ...]:
    hints = spec.strings("performanceHints")
    for path, hint in spec.indexed_strings("performanceHints"):
        if hint != PERFORMANCE_HINT:
            spec.report.error(path, f"must be {PERFORMANCE_HINT}, is {describe(hint)}", slug="enum")
    if len(set(hints)) != len(hints):
        spec.error("performanceHints", "names a hint twice", slug="duplicate-entry")
    return hints


def _network_policy(obj: Reader, meta: Meta) -> CalicoNetworkPolicy:
    return CalicoNetworkPolicy(meta, _policy_spec(_spec(obj), meta.namespace, is_global=False))


def _global_network_policy(obj: Reader, meta: Meta) -> GlobalNetworkPolicy:
    return GlobalNetworkPolicy(meta, _policy_spec(_spec(obj), "", is_global=True))


# --- staged policies ------------------------------------------------------------------------------------------------


def _staged_action(spec: Reader, *, keep: tuple[str, ...]) -> str:
    """Parse the field stagedAction. With the action Delete, all fields of the spec except ``keep`` must be empty."""
    action = spec.enum("stagedAction", STAGED_ACTIONS) or "Set"
    if action == "Delete":
        for key in spec.fields():
            if key not in ("stagedAction", *keep) and not _is_zero(spec.peek(key)):
                spec.error(key, "must be empty with `stagedAction: Delete`", slug="conflict")
    return action


def _is_zero(value: Any) -> bool:
    """Whether a value is absent, false or empty. A number is not empty, because order 0 is a given order."""
    return value is None or value is False or (isinstance(value, (str, list, Mapping)) and not value)


def _staged_spec(spec: Reader, namespace: str, *, is_global: bool) -> tuple[str, CalicoPolicySpec]:
    action = _staged_action(spec, keep=("tier",))
    return action, _policy_spec(spec, namespace, is_global=is_global)


def _staged_network_policy(obj: Reader, meta: Meta) -> StagedNetworkPolicy:
    return StagedNetworkPolicy(meta, *_staged_spec(_spec(obj), meta.namespace, is_global=False))


def _staged_global_network_policy(obj: Reader, meta: Meta) -> StagedGlobalNetworkPolicy:
    return StagedGlobalNetworkPolicy(meta, *_staged_spec(_spec(obj), "", is_global=True))


def _staged_kubernetes_network_policy(obj: Reader, meta: Meta) -> StagedKubernetesNetworkPolicy:
    spec = _spec(obj)
    action = _staged_action(spec, keep=())
    read = read_policy_spec(spec)
    return StagedKubernetesNetworkPolicy(meta, action, None if action == "Delete" else read)


# --- tiers and sets -------------------------------------------------------------------------------------------------


def _tier(obj: Reader, meta: Meta) -> Tier:
    spec = _spec(obj)
    order = spec.number("order")
    action = spec.enum("defaultAction", TIER_ACTIONS) or "Deny"
    spec.done()
    built_in = BUILT_IN_TIERS.get(meta.name)
    if built_in is not None:
        wanted_order, wanted_action = built_in
        if order is None:
            message = f"the built-in tier {meta.name} must say its order: `order: {wanted_order:.0f}`"
            spec.error(None, message, slug="built-in-order")
            order = wanted_order
        elif order != wanted_order:
            message = f"the order of the built-in tier {meta.name} must be {wanted_order:.0f}, is {order:g}"
            spec.error("order", message, slug="built-in-tier")
        if action != wanted_action:
            spec.error(
                "defaultAction",
                f"of the built-in tier {meta.name} must be {wanted_action}, is {action}",
                slug="built-in-tier",
            )
    if built_in is None and order is None:
        where = "before" if meta.name < DEFAULT_TIER else "after"
        spec.warning(
            None,
            f"without `order` it counts as {BUILT_IN_TIERS[DEFAULT_TIER][0]:.0f}, as the tier {DEFAULT_TIER} does; names decide "
            f"between the two, so it comes {where} {DEFAULT_TIER}",
            slug="tier-order",
        )
    return Tier(meta, order, action)


def _network_set(obj: Reader, meta: Meta) -> NetworkSet:
    spec = _spec(obj)
    if _NAMESPACE_LABEL in meta.labels:
        path = ("metadata", "labels", _NAMESPACE_LABEL)
        obj.report.error(path, "this label is reserved: it is set from the namespace of the object", slug="label")
    nets = tuple(
        network for network in (read_net(spec, path, text) for path, text in spec.indexed_strings("nets")) if network
    )
    domains = read_domains(spec, "allowedEgressDomains")
    spec.done()
    return NetworkSet(meta, nets, domains)


def read_net(spec: Reader, path: tuple[str | int, ...], text: str) -> IPNetwork | None:
    """Parse a CIDR, or an address without prefix length, to a network with host bits cleared.

    If the text is invalid, an error is recorded at ``path`` and None is returned.
    """
    full = text if "/" in text else f"{text}/{128 if ':' in text else 32}"
    try:
        network, masked = parse_network(full)
    except ValueError:
        spec.report.error(path, f"must be an IP address or a CIDR, is {describe(text)}", slug="cidr")
        return None
    if masked:
        spec.report.warning(path, f'"{text}" has bits beyond its prefix; it is read as {network}', slug="cidr-masked")
    return network


# --- endpoints ------------------------------------------------------------------------------------------------------


def _host_endpoint(obj: Reader, meta: Meta) -> HostEndpoint:
    spec = _spec(obj)
    node = _checked_name(spec, "node") or ""
    if not spec.raw("node"):
        spec.missing("node")
    interface = spec.string("interfaceName") or None
    if interface is not None and interface != "*":
        _check_interface(spec, interface)
    expected = tuple(_addresses(spec, "expectedIPs", parse_address))
    if interface is None and not spec.list("expectedIPs") and not spec.has("interfaceName"):
        spec.error(None, "needs `interfaceName`, `expectedIPs` or both", slug="required")
    elif interface is None and not spec.list("expectedIPs"):
        spec.error("interfaceName", "is empty; name an interface, or give `expectedIPs`", slug="required")
    profiles = _profiles(spec)
    ports = tuple(port for port in (_endpoint_port(port) for port in spec.mappings("ports")) if port)
    spec.done()
    return HostEndpoint(meta, node, interface, expected, profiles, ports)


def _checked_name(spec: Reader, key: str) -> str | None:
    name = spec.string(key)
    if name and (message := check_dns_subdomain(name)) is not None:
        spec.error(key, message, slug="name")
    return name or None


def _check_interface(spec: Reader, interface: str) -> None:
    if not INTERFACE.match(interface):
        spec.error(
            "interfaceName",
            f'must be an interface name of at most 15 letters, digits, "-", "_" and "."; is {describe(interface)}',
        )


def _addresses(spec: Reader, key: str, read: Callable[[str], IPAddress]) -> list[IPAddress]:
    found: list[IPAddress] = []
    for path, text in spec.indexed_strings(key):
        try:
            found.append(read(text))
        except ValueError as error:  # noqa: PERF203 - every wrong address must be reported
            spec.report.error(path, str(error), slug="address")
    return found


def _profiles(spec: Reader) -> tuple[str, ...]:
    profiles = []
    for path, name in spec.indexed_strings("profiles"):
        profiles.append(name)
        if (message := check_dns_subdomain(name)) is not None:
            spec.report.error(path, message, slug="name")
    return tuple(profiles)


def _endpoint_port(port: Reader, *, may_be_unnamed: bool = False) -> EndpointPort | None:
    """Parse a named port of an endpoint.

    None if the port is invalid or has no name.
    ``may_be_unnamed``: whether a port without a name is valid, and the fields hostPort and hostIP are allowed.
    """
    name = port.string("name") or ""
    if not name and not may_be_unnamed:
        port.missing("name")
    elif name and not PORT_NAME.match(name):
        port.error("name", f'must have 1 to 128 letters, digits, "-", "_" and "."; is {describe(name)}', slug="port")
    protocol = read_protocol(port, "protocol")
    if not port.has("protocol"):
        port.missing("protocol")
    elif protocol is not None and protocol not in WITH_PORTS:
        names = {number: text for text, number in PROTOCOLS.items()}
        port.error("protocol", f"must be TCP, UDP or SCTP, is {names.get(protocol, protocol)}", slug="enum")
    number = port.integer("port", 1, MAX_PORT)
    if not port.has("port"):
        port.missing("port")
    if may_be_unnamed:
        host_port = port.integer("hostPort", 0, MAX_PORT)
        if not name and not host_port:
            port.error(None, "needs a `name`, or a `hostPort`", slug="required")
        if host_ip := port.string("hostIP"):
            _one_address(port, "hostIP", host_ip)
    port.done()
    if not name or protocol is None or number is None:
        return None
    return EndpointPort(name, protocol, number)


def _workload_endpoint(obj: Reader, meta: Meta) -> WorkloadEndpoint:
    spec = _spec(obj)
    names = {
        key: _checked_name(spec, key)
        for key in ("orchestrator", "workload", "node", "pod", "endpoint", "serviceAccountName")
    }
    container = spec.string("containerID")
    if container and not _CONTAINER_ID.match(container):
        spec.error("containerID", f"must hold only letters, digits and inner dashes; is {describe(container)}")
    interface = spec.required_string("interfaceName")
    if interface:
        _check_interface(spec, interface)
    addresses = tuple(_addresses(spec, "ipNetworks", _single_address))
    _nats(spec, addresses)
    for key, version in (("ipv4Gateway", 4), ("ipv6Gateway", 6)):
        if text := spec.string(key):
            gateway = _one_address(spec, key, text)
            if gateway is not None and gateway.version != version:
                spec.error(key, f"must be an IPv{version} address, is {describe(text)}", slug="address")
    if (mac := spec.string("mac")) and not _MAC.match(mac):
        spec.error("mac", f"must be a MAC address such as ee:ee:ee:ee:ee:ee; is {describe(mac)}")
    prefixes = [read_net(spec, path, text) for path, text in spec.indexed_strings("allowSpoofedSourcePrefixes")]
    ports = [_endpoint_port(port, may_be_unnamed=True) for port in spec.mappings("ports")]
    profiles = _profiles(spec)
    spec.ignore("qosControls")
    spec.done()
    return WorkloadEndpoint(
        meta=meta,
        node=names["node"] or "",
        orchestrator=names["orchestrator"] or "",
        workload=names["pod"] or names["workload"] or "",
        interface=interface or None,
        addresses=addresses,
        profiles=profiles,
        ports=tuple(port for port in ports if port is not None),
        service_account=names["serviceAccountName"],
        allowed_source_prefixes=tuple(prefix for prefix in prefixes if prefix is not None),
    )


def _single_address(text: str) -> IPAddress:
    """Parse an address, with or without the prefix length of a single address. Raises ValueError."""
    if "/" not in text:
        return parse_address(text)
    network, _ = parse_network(text)
    if network.prefixlen != network.max_prefixlen:
        raise ValueError(f"must be a single address (/{network.max_prefixlen}), is {describe(text)}")
    return network.network_address


def _one_address(reader: Reader, key: str, text: str) -> IPAddress | None:
    try:
        return _single_address(text)
    except ValueError as error:
        reader.error(key, str(error), slug="address")
        return None


def _nats(spec: Reader, addresses: tuple[IPAddress, ...]) -> None:
    """Check the field ipNATs (1:1 NAT). Its entries are not used, but an invalid entry makes the object invalid."""
    for nat in spec.mappings("ipNATs"):
        ends = []
        for key in ("internalIP", "externalIP"):
            text = nat.required_string(key)
            ends.append(_one_address(nat, key, text) if text else None)
        nat.ignore("source")
        nat.done()
        internal, external = ends
        if internal is not None and external is not None and internal.version != external.version:
            nat.error("externalIP", "must be of the same IP version as `internalIP`", slug="conflict")
        if internal is not None and internal not in addresses:
            nat.error("internalIP", f"{internal} is none of the endpoint's `ipNetworks`", slug="conflict")


def _profile(obj: Reader, meta: Meta) -> Profile:
    spec = _spec(obj)
    ingress, egress = read_rules(spec, "ingress", ""), read_rules(spec, "egress", "")
    labels = spec.string_map("labelsToApply", check_label)
    spec.done()
    return Profile(meta, ingress, egress, labels)


_Parse = Callable[[Reader, Meta], Resource]


def _kind(name: str, parse: _Parse, check_name: Callable[[str], str | None], *, namespaced: bool) -> Kind:
    return Kind(VERSION, name, namespaced=namespaced, parse=parse, check_name=check_name)


KINDS = (
    _kind("NetworkPolicy", _network_policy, _check_policy_name, namespaced=True),
    _kind("GlobalNetworkPolicy", _global_network_policy, _check_global_policy_name, namespaced=False),
    _kind("StagedNetworkPolicy", _staged_network_policy, _check_policy_name, namespaced=True),
    _kind("StagedGlobalNetworkPolicy", _staged_global_network_policy, _check_global_policy_name, namespaced=False),
    _kind("StagedKubernetesNetworkPolicy", _staged_kubernetes_network_policy, check_dns_subdomain, namespaced=True),
    _kind("Tier", _tier, check_dns_label, namespaced=False),
    _kind("NetworkSet", _network_set, check_dns_subdomain, namespaced=True),
    _kind("GlobalNetworkSet", _network_set, check_dns_subdomain, namespaced=False),
    _kind("HostEndpoint", _host_endpoint, check_dns_subdomain, namespaced=False),
    _kind("WorkloadEndpoint", _workload_endpoint, check_dns_subdomain, namespaced=True),
    _kind("Profile", _profile, check_dns_subdomain, namespaced=False),
)
