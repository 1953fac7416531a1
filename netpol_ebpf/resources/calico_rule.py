# SPDX-License-Identifier: Apache-2.0
"""Parses a projectcalico.org/v3 rule: every field of SEMANTICS 1.4 to 1.6 and every constraint between fields.

Invariant: this module accepts exactly the rules that Calico's own validation accepts, and two fields of Calico's
commercial edition (``domains`` and HTTP headers).  It does not decide which packets a rule matches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from netpol_ebpf.errors import SelectorError
from netpol_ebpf.resources.reader import FOLDING_HINT, Reader, describe, suggestion
from netpol_ebpf.resources.syntax import (
    MAX_PORT,
    NAMES_ONLY_ALLOW,
    check_annotations,
    check_dns_subdomain,
    check_domain,
    normal_domain,
    parse_network,
)
from netpol_ebpf.resources.types import (
    CalicoRule,
    EntityRule,
    HttpHeader,
    HttpMatch,
    HttpPath,
    Icmp,
    IPNetwork,
    PortSpec,
    ServiceAccountMatch,
    ServiceMatch,
)
from netpol_ebpf.resources.yamltree import Path
from netpol_ebpf.selector import Selector, parse

ACTIONS = ("Allow", "Deny", "Log", "Pass")
PROTOCOLS = {"TCP": 6, "UDP": 17, "ICMP": 1, "ICMPv6": 58, "SCTP": 132, "UDPLite": 136}
ICMP, ICMPV6, TCP = PROTOCOLS["ICMP"], PROTOCOLS["ICMPv6"], PROTOCOLS["TCP"]
WITH_PORTS = (PROTOCOLS["TCP"], PROTOCOLS["UDP"], PROTOCOLS["SCTP"])

MAX_RULES = 1024
MAX_PORTS = 50
MAX_NETS = 256
MAX_SELECTOR = 1024
MAX_HTTP = 20
MAX_PATH = 1024

_PORT_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}\Z")
_LETTER = re.compile(r"[a-zA-Z]")
_RANGE = re.compile(r"([0-9]{1,8}):([0-9]{1,8})\Z")
HEADER_OPERATORS = ("Exists", "DoesNotExist", "HasPrefix", "HasSuffix", "In", "NotIn", "MatchesRegex")
NO_VALUES = ("Exists", "DoesNotExist")

_MISPLACED = {
    **{
        field: f"`{field}:` is at the wrong indentation level: directly in the rule. Move it inside `source:` or `destination:`"
        for field in (
            *("ports", "notPorts", "nets", "notNets", "selector", "notSelector", "namespaceSelector"),
            *("serviceAccounts", "services", "domains"),
        )
    },
    "from": "unknown field `from`; a Calico rule has `source:`",
    "to": "unknown field `to`; a Calico rule has `destination:`",
    "notIcmp": "unknown field `notIcmp` (did you mean `notICMP`?)",
}


@dataclass(frozen=True, slots=True)
class RuleContext:
    """Properties of a rule that its own fields do not state.

    ``ingress``: whether it is an ingress rule.
    ``namespace``: the policy's namespace; "" for a global policy.
    """

    ingress: bool
    namespace: str


def read_rules(spec: Reader, key: str, namespace: str) -> tuple[CalicoRule, ...]:
    """Parse the rules in the field ``key``, which is ``ingress`` or ``egress``.

    ``namespace``: the policy's namespace; "" for a global policy.
    """
    written = spec.raw(key)
    if isinstance(written, Mapping):
        first = next(iter(written), "action")
        spec.error(
            key, f"must be a list of rules, is a mapping; put `- ` before `{first}:` to make it an item", slug="type"
        )
        return ()
    if len(spec.list(key)) > MAX_RULES:
        spec.error(key, f"must have at most {MAX_RULES} rules, has {len(spec.list(key))}", slug="limit")
    context = RuleContext(key == "ingress", namespace)
    return tuple(_rule(rule, context) for rule in spec.mappings(key))


def _rule(rule: Reader, context: RuleContext) -> CalicoRule:
    action = rule.enum("action", ACTIONS, required=True) or "Deny"
    version = _ip_version(rule)
    protocol = read_protocol(rule, "protocol")
    not_protocol = read_protocol(rule, "notProtocol")
    icmp, not_icmp = _icmp(rule, "icmp"), _icmp(rule, "notICMP")
    source = _entity(rule, "source", context)
    destination = _entity(rule, "destination", context)
    http = _http(rule, context, action, protocol)
    metadata = rule.mapping("metadata")
    annotations = {} if metadata is None else read_annotations(metadata)
    if metadata is not None:
        metadata.done()
    rule.done(_MISPLACED)
    unknown_protocol = rule.has("protocol") and protocol is None  # this error is reported already
    if rule.has("icmp") and protocol not in (ICMP, ICMPV6) and not unknown_protocol:
        rule.error("icmp", "needs `protocol: ICMP` or `protocol: ICMPv6` in the same rule", slug="conflict")
    if not unknown_protocol:
        _check_ports_protocol(rule, protocol, source, destination)
    _check_families(rule, version, (protocol, not_protocol), source, destination)
    _check_domains(rule, context, action)
    return CalicoRule(
        action=action,
        location=rule.report.location(rule.path),
        ip_version=version,
        protocol=protocol,
        not_protocol=not_protocol,
        icmp=icmp,
        not_icmp=not_icmp,
        source=source,
        destination=destination,
        http=http,
        annotations=annotations,
    )


def _ip_version(rule: Reader) -> int | None:
    value = rule.raw("ipVersion")
    if value is None or (value in (4, 6) and isinstance(value, int)):
        return value
    seen = rule.report.describe((*rule.path, "ipVersion"), value)
    rule.error("ipVersion", f"must be 4 or 6 (without quotes), is {seen}", slug="enum")
    return None


def read_protocol(reader: Reader, key: str) -> int | None:
    """Parse a protocol to its IANA number. None if the field is absent, or after an error.

    The protocol is a name as spelled in `PROTOCOLS`, or a number from 1 to 255.
    """
    value = reader.raw(key)
    if value is None:
        return None
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 4 else value  # noqa: PLR2004
    if isinstance(number, int) and not isinstance(number, bool):
        if 0 < number <= 255:  # noqa: PLR2004 - the width of the IP header's field
            return number
        seen = reader.report.describe((*reader.path, key), number)
        reader.error(key, f"must be a protocol number from 1 to 255, is {seen}", slug="range")
        return None
    if isinstance(value, str) and value in PROTOCOLS:
        return PROTOCOLS[value]
    near = suggestion(value, tuple(PROTOCOLS)) if isinstance(value, str) else ""
    names = ", ".join(PROTOCOLS)
    seen = reader.report.describe((*reader.path, key), value)
    reader.error(key, f"must be one of {names} or a number from 1 to 255; is {seen}{near}", slug="enum")
    return None


def _icmp(rule: Reader, key: str) -> Icmp | None:
    fields = rule.mapping(key)
    if fields is None:
        return None
    kind = fields.integer("type", 0, 254)
    code = fields.integer("code", 0, 255)
    if fields.has("code") and not fields.has("type"):
        fields.error("code", "needs a `type` beside it", slug="conflict")
    fields.done()
    return None if kind is None else Icmp(kind, code)


def read_annotations(reader: Reader) -> dict[str, str]:
    """Parse annotations, with the API server's limits on names and sizes."""
    annotations = reader.string_map("annotations")
    if (message := check_annotations(annotations)) is not None:
        reader.error("annotations", message, slug="annotation")
    return annotations


# --- source and destination -----------------------------------------------------------------------------------------


def _entity(rule: Reader, key: str, context: RuleContext) -> EntityRule:
    entity = rule.mapping(key)
    if entity is None:
        return EntityRule()
    result = EntityRule(
        nets=tuple(_nets(entity, "nets")),
        not_nets=tuple(_nets(entity, "notNets")),
        selector=read_selector(entity, "selector"),
        not_selector=read_selector(entity, "notSelector"),
        namespace_selector=read_selector(entity, "namespaceSelector", allow_global=True),
        ports=tuple(_ports(entity, "ports")),
        not_ports=tuple(_ports(entity, "notPorts")),
        service_accounts=_service_accounts(entity),
        services=_services(entity, key, context),
        domains=read_domains(entity, "domains"),
    )
    entity.done(
        {
            "ipBlock": "unknown field `ipBlock`; a Calico rule has `nets:`",
            "cidr": "unknown field `cidr` (did you mean `nets`?)",
        }
    )
    return result


def _nets(entity: Reader, key: str) -> Iterator[IPNetwork]:
    if len(entity.list(key)) > MAX_NETS:
        entity.error(key, f"must have at most {MAX_NETS} entries, has {len(entity.list(key))}", slug="limit")
    for path, text in entity.indexed_strings(key):
        try:
            network, masked = parse_network(text)
        except ValueError as error:
            entity.report.error(path, str(error), slug="cidr")
            continue
        if masked:
            entity.report.error(path, f'"{text}" has bits beyond its prefix; write {network}', slug="cidr")
        elif key == "notNets" and network.prefixlen == 0:
            entity.report.error(path, f'"{text}" would exclude every address; remove it', slug="excludes-all")
        yield network


def read_selector(reader: Reader, key: str, *, allow_global: bool = False) -> Selector | None:
    """Parse a selector expression.

    None if it is absent or empty, or after an error.
    ``allow_global``: whether ``global()`` is allowed.
    """
    text = reader.string(key)
    if not text:
        return None
    if len(text) > MAX_SELECTOR:
        reader.error(key, f"must have at most {MAX_SELECTOR} characters, has {len(text)}", slug="limit")
        return None
    try:
        selector = parse(text)
    except SelectorError as error:
        _wrong_selector(reader, key, text, error)
        return None
    if selector.mentions_global and not allow_global:
        reader.error(
            key,
            "global() is allowed only in the `namespaceSelector` of a rule's source or destination",
            slug="selector",
        )
    elif selector.mentions_global and not selector.is_global:
        reader.error(key, "global() must stand alone; it cannot be combined with other terms", slug="selector")
    return selector


def _wrong_selector(reader: Reader, key: str, text: str, error: SelectorError) -> None:
    """Record the syntax error of a selector.

    A line break gets a message of its own, because a caret cannot point at a line break.
    """
    one_line = " ".join(text.split("\n"))
    if one_line != text:
        reader.error(key, f"holds a line break, which a selector cannot have; {FOLDING_HINT}", slug="selector")
        try:
            parse(one_line)
        except SelectorError as other:
            error = other
        else:
            return
    reader.error(key, str(error), slug="selector")


def _ports(entity: Reader, key: str) -> Iterator[PortSpec]:
    entries = entity.list(key)
    if len(entries) > MAX_PORTS:
        entity.error(key, f"must have at most {MAX_PORTS} entries, has {len(entries)}", slug="limit")
    for index, entry in enumerate(entries):
        path = (*entity.path, key, index)
        try:
            port = _port(entry, entity.report.describe(path, entry))
        except ValueError as error:
            entity.report.error(path, str(error), slug="port")
            continue
        if port.name and not _LETTER.search(port.name):
            entity.report.warning(path, _not_a_range(port.name), slug="port-range")
        yield port


def _not_a_range(name: str) -> str:
    """The message for a port name without a letter, which matches no port of a pod."""
    ends = re.fullmatch(r"([0-9]+)[-_.]+([0-9]+)", name)
    hint = f'; a range is written "{ends[1]}:{ends[2]}"' if ends else ""
    return f'"{name}" is read as the name of a port, and the name of a pod\'s port has a letter, so it matches no pod{hint}'


def _port(value: Any, seen: str) -> PortSpec:
    """Parse a port: a number, "first:last" or a name.

    Raises ValueError.
    ``seen``: the description of the value in messages.
    """
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 9:  # noqa: PLR2004 - before int()
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= MAX_PORT:
            raise ValueError(f"must be a port from 1 to {MAX_PORT}, is {seen}")
        return PortSpec(value, value)
    if not isinstance(value, str):
        raise ValueError(f'must be a port number, a range such as "8000:8080" or a port name; is {seen}')  # noqa: TRY004
    match = _RANGE.match(value)
    if match is not None:
        first, last = int(match[1]), int(match[2])
        if not (1 <= first <= MAX_PORT and 1 <= last <= MAX_PORT):
            raise ValueError(f'both ends of the range "{value}" must be from 1 to {MAX_PORT}')
        if first > last:
            raise ValueError(f'the range "{value}" ends before it begins')
        return PortSpec(first, last)
    if not _PORT_NAME.match(value):
        raise ValueError(f'must be a port number, a range such as "8000:8080" or a port name; is {seen}')
    return PortSpec(0, 0, value)


def _service_accounts(entity: Reader) -> ServiceAccountMatch | None:
    match = entity.mapping("serviceAccounts")
    if match is None:
        return None
    names = match.strings("names")
    match.refuse_line_breaks("names")
    selector = read_selector(match, "selector")
    match.done()
    if not names and selector is None and set(match.fields()) <= {"names", "selector"}:
        match.warning(None, "is empty, so it does not restrict the rule", slug="inert-field")
    return ServiceAccountMatch(names, selector) if names or selector is not None else None


def _services(entity: Reader, key: str, context: RuleContext) -> ServiceMatch | None:
    match = entity.mapping("services")
    if match is None:
        return None
    name = match.required_string("name")
    namespace = match.string("namespace") or ""
    for field, text in (("name", name), ("namespace", namespace)):
        if text and (message := check_dns_subdomain(text)) is not None:
            match.error(field, message, slug="name")
    match.done()
    if not namespace and not context.namespace:
        match.error(None, "the field `namespace` is required in a policy of the whole cluster", slug="required")
    side = "source" if context.ingress else "destination"
    if key != side:
        direction = "ingress" if context.ingress else "egress"
        entity.error("services", f"is allowed only in the `{side}` of an {direction} rule", slug="conflict")
    for other in ("selector", "notSelector", "namespaceSelector", "nets", "notNets", "serviceAccounts"):
        if entity.has(other) and (other == "serviceAccounts" or entity.raw(other)):
            entity.error("services", f"cannot be combined with `{other}` in the same `{key}`", slug="conflict")
    for other in ("ports", "notPorts"):
        if key == "destination" and entity.list(other):
            entity.error(other, "cannot be combined with `services`: the service's own ports apply", slug="conflict")
    return ServiceMatch(name, namespace or context.namespace)


def read_domains(reader: Reader, key: str) -> tuple[str, ...]:
    """Parse a list of domain names. The results are in lower case, without trailing dots."""
    domains = []
    for path, text in reader.indexed_strings(key):
        if (message := check_domain(text)) is not None:
            reader.report.error(path, message, slug="domain")
        domains.append(normal_domain(text))
    return tuple(domains)


# --- constraints between fields -------------------------------------------------------------------------------------


def _check_ports_protocol(rule: Reader, protocol: int | None, source: EntityRule, destination: EntityRule) -> None:
    """Check that a rule with ports has a protocol with ports. A rule without a protocol may have named ports only."""
    if protocol in WITH_PORTS:
        return
    for side, entity in (("source", source), ("destination", destination)):
        for field, ports in (("ports", entity.ports), ("notPorts", entity.not_ports)):
            if not ports or (not rule.has("protocol") and all(port.name for port in ports)):
                continue
            if rule.has("protocol"):
                message = f"needs protocol TCP, UDP or SCTP; the rule has protocol {describe(rule.raw('protocol'))}"
            else:
                message = "needs `protocol: TCP`, `UDP` or `SCTP` in the rule (only named ports can do without)"
            rule.report.error((*rule.path, side, field), message, slug="conflict")


def _check_families(
    rule: Reader,
    version: int | None,
    protocols: tuple[int | None, int | None],
    source: EntityRule,
    destination: EntityRule,
) -> None:
    """Check that ipVersion, the protocol (ICMP or ICMPv6) and all CIDRs of a rule have the same IP version."""
    for key, number in zip(("protocol", "notProtocol"), protocols, strict=True):
        wanted = {ICMP: 4, ICMPV6: 6}.get(number or 0)
        if version is not None and wanted is not None and version != wanted:
            rule.error(
                "ipVersion",
                f"{key} {describe(rule.raw(key))} exists only in IPv{wanted}; write {wanted}",
                slug="conflict",
            )
    first: tuple[int, str] | None = None
    for path, network in _all_nets(source, destination):
        field: Path = (*rule.path, *path)
        if version is not None and network.version != version:
            rule.report.error(
                field, f"{network} is IPv{network.version}, but the rule has ipVersion {version}", slug="conflict"
            )
        elif first is not None and network.version != first[0]:
            rule.report.error(
                field,
                f"{network} is IPv{network.version}, but {first[1]} in the same rule is IPv{first[0]}; make two rules",
                slug="conflict",
            )
        first = first or (network.version, str(network))


def _all_nets(source: EntityRule, destination: EntityRule) -> Iterator[tuple[Path, IPNetwork]]:
    for side, entity in (("source", source), ("destination", destination)):
        for field, nets in (("nets", entity.nets), ("notNets", entity.not_nets)):
            for network in nets:
                yield (side, field), network


def _check_domains(rule: Reader, context: RuleContext, action: str) -> None:
    for side in ("source", "destination"):
        entity = rule.mapping(side)
        if entity is None or not entity.list("domains"):
            continue
        if side == "source" or context.ingress:
            entity.error(
                "domains", "is allowed only in the `destination` of an egress rule with action Allow", slug="conflict"
            )
        elif action != "Allow":
            entity.error(
                "domains",
                f"is allowed only with action Allow: {NAMES_ONLY_ALLOW}",
                slug="conflict",
            )
        for other in ("nets", "selector"):
            if entity.raw(other):
                entity.error("domains", f"cannot be combined with `{other}` in the same `{side}`", slug="conflict")


# --- HTTP -----------------------------------------------------------------------------------------------------------


def _http(rule: Reader, context: RuleContext, action: str, protocol: int | None) -> HttpMatch | None:
    http = rule.mapping("http")
    if http is None:
        return None
    if action != "Allow":
        rule.error("http", "is allowed only with action Allow", slug="conflict")
    if not context.ingress:
        rule.error("http", "is allowed only in ingress rules", slug="conflict")
    if rule.has("protocol") and protocol != TCP:
        rule.error("http", "needs `protocol: TCP`, or none", slug="conflict")
    methods = http.strings("methods")
    http.refuse_line_breaks("methods")
    if len(methods) != len(set(methods)):
        http.error("methods", "names a method twice", slug="duplicate-entry")
    for key in ("methods", "paths"):
        if len(http.list(key)) > MAX_HTTP:
            http.error(key, f"must have at most {MAX_HTTP} entries, has {len(http.list(key))}", slug="limit")
    match = HttpMatch(
        methods,
        tuple(_path(path) for path in http.mappings("paths")),
        tuple(_header(header) for header in http.mappings("headers")),
    )
    http.done()
    return match


def _path(path: Reader) -> HttpPath:
    exact, prefix = path.string("exact") or None, path.string("prefix") or None
    if exact is not None and prefix is not None:
        path.error(None, "must have either `exact` or `prefix`, not both", slug="conflict")
    elif exact is None and prefix is None:
        path.error(None, "must have `exact` or `prefix`", slug="required")
    for key, text in (("exact", exact), ("prefix", prefix)):
        if text is None:
            continue
        if not text.startswith("/") or any(character in text for character in "? #\n"):
            path.error(key, f'must begin with "/" and hold neither "?", "#" nor a space; is {describe(text)}')
        if len(text) > MAX_PATH:
            path.error(key, f"must have at most {MAX_PATH} characters, has {len(text)}", slug="limit")
    path.done()
    return HttpPath(exact, prefix)


def _header(header: Reader) -> HttpHeader:
    name = header.required_string("header")
    operator = header.enum("operator", HEADER_OPERATORS, required=True) or "Exists"
    values = header.strings("values")
    header.refuse_line_breaks("values")
    header.done()
    if header.has("operator"):
        if operator in NO_VALUES and values:
            header.error("values", f"must be empty with operator {operator}", slug="conflict")
        if operator not in NO_VALUES and not header.list("values"):
            header.error(None, f"operator {operator} needs at least one entry in `values`", slug="required")
    if operator == "MatchesRegex":
        for index, value in enumerate(values):
            try:
                re.compile(value)
            except (re.error, OverflowError, RecursionError) as error:  # noqa: PERF203 - all errors must be reported
                header.report.error((*header.path, "values", index), f"not a regular expression: {error}")
    return HttpHeader(name, operator, values)
