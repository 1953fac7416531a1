# SPDX-License-Identifier: Apache-2.0
"""The schema of a projectcalico.org/v3 rule.

The schema has the fields that `calico_rule` reads, and those of its checks that CEL can express.  `netpolctl check` and
the agent make the other checks.  CEL cannot check whether a selector parses.  Some checks would exceed the API server's
cost limit for the 1 024 rules of a direction: whether a range of ports is in order, whether CIDRs have host bits, and
whether they have one IP version.
"""

from __future__ import annotations

from netpol_ebpf.resources import calico_rule
from netpol_ebpf.resources.schema import (
    DOMAIN_LABEL,
    MAX_CIDR,
    ONE_LINE,
    WIDE,
    Schema,
    dns_name,
    given,
    integer,
    integer_or_text,
    list_of,
    rule,
    struct,
    text,
    text_map,
    word,
)
from netpol_ebpf.resources.syntax import MAX_NAME, MAX_PORT

DOMAIN = rf"^({DOMAIN_LABEL}\.)*(\*\.)?({DOMAIN_LABEL}\.)*{DOMAIN_LABEL}\.?$"
"""The pattern of a domain name. One label, but not the last, may be ``*``."""

_PORT = "(0*([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))"
_BYTE = "(0{0,2}[1-9]|0?[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_PORTS = rf"^({_PORT}|{_PORT}:{_PORT}|[0-9]{{9,128}}|[a-zA-Z0-9_.-]*[a-zA-Z_.-][a-zA-Z0-9_.-]*)$"
"""The pattern of a port: a number, a range or a name. A text of more than eight digits is a name."""
_PROTOCOL = f"^({'|'.join(calico_rule.PROTOCOLS)}|{_BYTE})$"
_PREFIX_NOT_ZERO = r"/0*[1-9][0-9]*$"


def _spellings(name: str) -> str:
    """The CEL list of all spellings of the protocol ``name``."""
    number = calico_rule.PROTOCOLS[name]
    texts = ", ".join(
        f"'{spelling}'" for spelling in dict.fromkeys((name, f"{number:d}", f"{number:02d}", f"{number:03d}"))
    )
    return f"[{texts}]"


def _protocol_in(*names: str) -> str:
    """The CEL expression for "``self.protocol`` is one of ``names``"."""
    numbers = ", ".join(str(calico_rule.PROTOCOLS[name]) for name in names)
    texts = " + ".join(_spellings(name) for name in names)
    return f"(type(self.protocol) == int ? self.protocol in [{numbers}] : self.protocol in {texts})"


def protocol(about: str) -> Schema:
    """The schema of a protocol's name or number."""
    return integer_or_text(about, 1, 255, len("UDPLite"), _PROTOCOL)


def selector(about: str) -> Schema:
    """The schema of a selector expression."""
    return text(about, longest=calico_rule.MAX_SELECTOR, pattern=ONE_LINE)


def domains(about: str, most: int | None = None) -> Schema:
    """The schema of a list of domain names."""
    return list_of(about, text("A domain name.", longest=MAX_NAME, pattern=DOMAIN), most)


def rules(about: str, *, ingress: bool, namespaced: bool) -> Schema:
    """The schema of the rules under ``ingress`` or ``egress``.

    ``namespaced``: whether the policy belongs to a namespace.
    """
    return list_of(about, _rule(ingress=ingress, namespaced=namespaced), calico_rule.MAX_RULES)


def _rule(*, ingress: bool, namespaced: bool) -> Schema:
    source = _entity("Where the packet comes from.", services=ingress, domains_allowed=False, namespaced=namespaced)
    destination = _entity(
        "Where the packet goes.",
        services=not ingress,
        domains_allowed=not ingress,
        namespaced=namespaced,
        ports_with_services=False,
    )
    fields = {
        "action": word("What happens to a packet that matches.", calico_rule.ACTIONS),
        "ipVersion": {"description": "4 or 6; both when absent.", "type": "integer", "enum": [4, 6]},
        "protocol": protocol("Protocol by name or number; any when absent."),
        "notProtocol": protocol("Any protocol but this one."),
        "icmp": _icmp("ICMP type and code that must match; needs protocol ICMP or ICMPv6."),
        "notICMP": _icmp("ICMP type and code that must not match."),
        "source": source,
        "destination": destination,
        "http": _http(),
        "metadata": struct(
            "What is said of the rule.",
            {"annotations": text_map("Free texts, shown with the rule.", {"type": "string"})},
        ),
    }
    return struct("All that is given must match.", fields, required=("action",), rules=_constraints(ingress=ingress))


def _constraints(*, ingress: bool) -> list[dict[str, str]]:
    numbers = [
        f"(!has(self.{side}) || !has(self.{side}.{field}) || !self.{side}.{field}.exists(p, type(p) == int))"
        for side in ("source", "destination")
        for field in ("ports", "notPorts")
    ]
    none = [part.replace(".exists(p, type(p) == int)", ".exists(p, true)") for part in numbers]
    found = [
        rule(
            f"!has(self.icmp) || has(self.protocol) && {_protocol_in('ICMP', 'ICMPv6')}",
            "icmp needs protocol ICMP or ICMPv6 in the same rule",
        ),
        rule(
            f"has(self.protocol) || {' && '.join(numbers)}",
            "port numbers need protocol TCP, UDP or SCTP in the rule (only named ports can do without)",
        ),
        rule(
            f"!has(self.protocol) || {_protocol_in('TCP', 'UDP', 'SCTP')} || {' && '.join(none)}",
            "ports need protocol TCP, UDP or SCTP",
        ),
    ]
    for field in ("protocol", "notProtocol"):
        for name, version in (("ICMP", 4), ("ICMPv6", 6)):
            other = 10 - version  # the other IP version
            is_this = _protocol_in(name).replace("self.protocol", f"self.{field}")
            found.append(
                rule(
                    f"!has(self.ipVersion) || self.ipVersion != {other} || !has(self.{field}) || !{is_this}",
                    f"{field} {name} exists only in IPv{version}",
                )
            )
    if ingress:
        found += [
            rule("!has(self.http) || self.action == 'Allow'", "http is allowed only with action Allow"),
            rule(
                f"!has(self.http) || !has(self.protocol) || {_protocol_in('TCP')}", "http needs protocol TCP, or none"
            ),
        ]
    else:
        found += [
            rule("!has(self.http)", "http is allowed only in ingress rules"),
            rule(
                "self.action == 'Allow' || !has(self.destination) || !has(self.destination.domains) || "
                "size(self.destination.domains) == 0",
                "domains are allowed only with action Allow",
            ),
        ]
    return found


def _icmp(about: str) -> Schema:
    fields = {"type": integer("ICMP type.", 0, 254), "code": integer("ICMP code; needs a type.", 0, 255)}
    return struct(about, fields, rules=[rule("!has(self.code) || has(self.type)", "code needs a type beside it")])


# --- source and destination -----------------------------------------------------------------------------------------


def _entity(
    about: str, *, services: bool, domains_allowed: bool, namespaced: bool, ports_with_services: bool = True
) -> Schema:
    """The schema of one side of a rule.

    ``services``, ``domains_allowed``: whether this side may have these fields.
    ``ports_with_services``: whether this side may have both ports and services.
    """
    fields = {
        "nets": _nets("CIDRs of which one holds the address."),
        "notNets": _nets("CIDRs of which none holds the address.", pattern=_PREFIX_NOT_ZERO),
        "selector": selector("Endpoints and network sets by their labels."),
        "notSelector": selector("Not these endpoints and network sets."),
        "namespaceSelector": selector("Namespaces of the endpoints; global() for what belongs to none."),
        "ports": _ports("Ports, ranges such as 8000:8080, or names of ports."),
        "notPorts": _ports("Not these ports."),
        "serviceAccounts": struct(
            "Service accounts of the endpoints; names and selector must both match.",
            {
                "names": list_of("Names of which one matches.", text("A name.", longest=MAX_NAME, pattern=ONE_LINE)),
                "selector": selector("Service accounts by their labels."),
            },
        ),
        "services": _services(namespaced=namespaced),
        "domains": domains("Domain names of the address.", WIDE if domains_allowed else 0),
    }
    rules = []
    if not services:
        rules.append(
            rule(
                "!has(self.services)",
                "services is allowed in the source of ingress and the destination of egress rules",
            )
        )
    else:
        others = ("selector", "notSelector", "namespaceSelector", "nets", "notNets")
        rules.append(
            rule(
                f"!has(self.services) || !has(self.serviceAccounts) && {' && '.join('!' + given(one) for one in others)}",
                "services cannot be combined with selectors, nets or serviceAccounts on the same side",
            )
        )
        if not ports_with_services:
            rules.append(
                rule(
                    f"!has(self.services) || !{given('ports')} && !{given('notPorts')}",
                    "ports cannot be combined with services: the service's own ports apply",
                )
            )
    if domains_allowed:
        rules.append(
            rule(
                f"!{given('domains')} || !{given('nets')} && !{given('selector')}",
                "domains cannot be combined with nets or selector",
            )
        )
    return struct(about, fields, rules=rules)


def _nets(about: str, pattern: str | None = None) -> Schema:
    net = text("A CIDR without bits beyond its prefix.", longest=MAX_CIDR, pattern=pattern, form="cidr")
    return list_of(about, net, calico_rule.MAX_NETS)


def _ports(about: str) -> Schema:
    one = integer_or_text("A port, a range or a name.", 1, MAX_PORT, 128, _PORTS)
    return list_of(about, one, calico_rule.MAX_PORTS)


def _services(*, namespaced: bool) -> Schema:
    fields = {
        "name": dns_name("The service's name.", required=True),
        "namespace": dns_name(
            "The service's namespace; that of the policy when absent." if namespaced else "The service's namespace.",
            required=not namespaced,
        ),
    }
    return struct(
        "The addresses and ports behind one service.",
        fields,
        required=("name",) if namespaced else ("name", "namespace"),
    )


# --- HTTP -----------------------------------------------------------------------------------------------------------


def _http() -> Schema:
    path_pattern = r"^(/[^?# \n]*)?$"
    path = struct(
        "Either exact or prefix.",
        {
            key: text(about, longest=calico_rule.MAX_PATH, pattern=path_pattern)
            for key, about in (("exact", "The whole path."), ("prefix", "How the path begins."))
        },
        rules=[rule(f"{given('exact')} != {given('prefix')}", "exactly one of exact and prefix must be given")],
    )
    no_values = ", ".join(f"'{one}'" for one in calico_rule.NO_VALUES)
    header = struct(
        "One header.",
        {
            "header": text("The header's name.", longest=WIDE, required=True),
            "operator": word("How the value is compared.", calico_rule.HEADER_OPERATORS),
            "values": list_of("Values.", text("A value.", longest=calico_rule.MAX_PATH, pattern=ONE_LINE), WIDE),
        },
        required=("header", "operator"),
        rules=[
            rule(
                f"self.operator in [{no_values}] ? !{given('values')} : {given('values')}",
                "values must be empty with Exists and DoesNotExist, and given with every other operator",
            )
        ],
    )
    method = text("A method, in its own case; * for any.", longest=WIDE, pattern=ONE_LINE)
    return struct(
        "What the request must be; all that is given must match.",
        {
            "methods": list_of("Methods of which one matches.", method, calico_rule.MAX_HTTP, is_set=True),
            "paths": list_of("Paths of which one matches.", path, calico_rule.MAX_HTTP),
            "headers": list_of("Headers that must all match.", header, calico_rule.MAX_HTTP),
        },
    )
