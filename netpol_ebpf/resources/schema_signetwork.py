# SPDX-License-Identifier: Apache-2.0
"""The custom resources of policy.networking.k8s.io, as `signetwork` reads them.

Every mapping keeps undeclared fields.  If the API server dropped a field of a newer version, the rule would match more
than its author meant, and no reader could see it.  So the agent sees the field and fails closed.  Before that, the
admission policy `unknown-fields` rejects an object with such a field (ADR 16).
"""

from __future__ import annotations

from netpol_ebpf.resources import signetwork
from netpol_ebpf.resources.schema import (
    DOMAIN_LABEL,
    MAX_CIDR,
    MAX_PORT_NAME,
    PORT_NAME,
    WIDE,
    CustomResource,
    Schema,
    integer,
    keep_unknown_fields,
    label_selector,
    list_of,
    port_number,
    rule,
    struct,
    text,
    word,
)
from netpol_ebpf.resources.syntax import MAX_LABEL, MAX_NAME, PROTOCOLS

DOMAIN = rf"^(\*\.({DOMAIN_LABEL}\.)*|({DOMAIN_LABEL}\.)+){DOMAIN_LABEL}\.?$"
"""The pattern of a domain name: at least two labels, of which only the first may be ``*``."""
NETWORK = r"^([0-9.]+|[0-9a-fA-F:]+)/[0-9]{1,3}$"
"""The pattern of a CIDR in addition to the OpenAPI format. It excludes IPv6 addresses that end in an IPv4 address."""

_APPROVED = ("api-approved.kubernetes.io", "unapproved, experimental-only")
"""The annotation that the API server requires of definitions in a protected API group.

In upstream's own definitions, the annotation's value is the address of the pull request that approved them.
"""


def _subject(*, namespace_required: bool) -> Schema:
    pods = struct(
        "Pods by their labels and their namespaces'.",
        {
            "namespaceSelector": label_selector("Namespaces by their labels."),
            "podSelector": label_selector("Pods by their labels."),
        },
        required=("namespaceSelector", "podSelector") if namespace_required else ("podSelector",),
    )
    return struct(
        "Pods the policy applies to.",
        {"namespaces": label_selector("All pods of these namespaces."), "pods": pods},
        rules=[rule("has(self.namespaces) != has(self.pods)", "exactly one of namespaces and pods must be given")],
    )


# --- peers ----------------------------------------------------------------------------------------------------------


def _peer(dialect: signetwork.Dialect, *, ingress: bool) -> Schema:
    older = dialect.older_peers
    fields = {"namespaces": _namespaces(older=older), "pods": _pods(older=older)}
    every = {
        "nodes": label_selector("Nodes by their labels."),
        "networks": list_of(
            "CIDRs.",
            text("A CIDR.", longest=MAX_CIDR, pattern=NETWORK, form="cidr"),
            signetwork.MAX_NETWORKS,
            least=1,
        ),
        "domainNames": list_of(
            "Domain names; only where the rule allows.",
            text("A domain name.", longest=MAX_NAME, pattern=DOMAIN),
            signetwork.MAX_DOMAINS,
            least=1,
        ),
    }
    if not ingress:
        fields |= {key: every[key] for key in dialect.egress_peers}
    return struct("Exactly one of the fields.", fields, one_field=True)


def _namespaces(*, older: bool) -> Schema:
    schema = label_selector("All pods of these namespaces.")
    if older:
        schema["properties"] |= _older_namespaces()
    return schema


def _older_namespaces() -> dict[str, Schema]:
    """The schemas of the namespace fields that peers had in the first releases of v1alpha1."""
    labels = text("A label's name.", longest=MAX_NAME + 1 + MAX_LABEL)
    return {
        "namespaceSelector": label_selector("Namespaces by their labels."),
        "sameLabels": list_of("Namespaces with the subject's values of these labels.", labels, WIDE),
        "notSameLabels": list_of("Namespaces with other values of these labels.", labels, WIDE),
    }


def _pods(*, older: bool) -> Schema:
    fields = {
        "namespaceSelector": label_selector("Namespaces by their labels."),
        "podSelector": label_selector("Pods by their labels."),
    }
    if not older:
        return struct("Pods by their labels and their namespaces'.", fields, required=("podSelector",))
    fields["namespaces"] = struct("Namespaces, as in the first releases.", _older_namespaces(), one_field=True)
    return struct(
        "Pods by their labels and their namespaces'.",
        fields,
        required=("podSelector",),
        rules=[
            rule(
                "has(self.namespaces) != has(self.namespaceSelector)",
                "exactly one of namespaceSelector and namespaces must be given",
            )
        ],
    )


# --- ports ----------------------------------------------------------------------------------------------------------


def _range(fields: dict[str, Schema]) -> Schema:
    ends = {"start": port_number("The first port."), "end": port_number("The last port.")}
    return struct(
        "A range of ports.",
        fields | ends,
        required=("start", "end"),
        rules=[rule("self.start < self.end", "end must be greater than start")],
    )


def _alpha1_port() -> Schema:
    with_protocol = {"protocol": word("TCP when absent.", tuple(PROTOCOLS))}
    return struct(
        "Exactly one of the fields.",
        {
            "portNumber": struct("One port.", with_protocol | {"port": port_number("Its number.")}, required=("port",)),
            "portRange": _range(with_protocol),
            "namedPort": text("A port of the pods by its name.", longest=MAX_PORT_NAME, pattern=PORT_NAME),
        },
        one_field=True,
    )


def _alpha2_port() -> Schema:
    port = struct(
        "Exactly one of the fields.", {"number": port_number("One port."), "range": _range({})}, one_field=True
    )
    fields: dict[str, Schema] = {
        name.lower(): struct(f"Ports of {name}.", {"destinationPort": port}, one_field=True) for name in PROTOCOLS
    }
    fields["destinationNamedPort"] = text("A port of the pods by its name.", longest=MAX_PORT_NAME, pattern=PORT_NAME)
    return struct("Exactly one of the fields.", fields, one_field=True)


# --- rules ----------------------------------------------------------------------------------------------------------


def _rules(about: str, dialect: signetwork.Dialect, *, ingress: bool) -> Schema:
    peers_key = "from" if ingress else "to"
    is_alpha2 = dialect.ports_key == "protocols"
    named = "destinationNamedPort" if is_alpha2 else "namedPort"
    constraints = []
    if not ingress:
        without = [key for key in signetwork.WITHOUT_NAMED_PORTS if key in dialect.egress_peers]
        constraints.append(
            rule(
                f"!has(self.{dialect.ports_key}) || !self.{dialect.ports_key}.exists(p, has(p.{named})) || "
                f"self.to.all(t, {' && '.join(f'!has(t.{key})' for key in without)})",
                f"{', '.join(without)} have no named ports",
            )
        )
        if "domainNames" in dialect.egress_peers:
            constraints.append(
                rule(
                    f"self.action == '{dialect.allow}' || self.to.all(t, !has(t.domainNames))",
                    f"domainNames are possible only with action {dialect.allow}",
                )
            )
    fields = {
        "name": text("Shown with the verdicts of the rule.", longest=signetwork.MAX_RULE_NAME),
        "action": word("What happens to a packet that matches.", dialect.actions),
        peers_key: list_of("Peers of which one matches.", _peer(dialect, ingress=ingress), dialect.max_items, least=1),
        dialect.ports_key: list_of(
            "Ports of which one matches; every protocol and port when absent.",
            _alpha2_port() if is_alpha2 else _alpha1_port(),
            dialect.max_items,
            least=1,
        ),
    }
    one = struct("All that is given must match.", fields, required=("action", peers_key), rules=constraints)
    return list_of(about, one, dialect.max_rules)


def _spec(about: str, dialect: signetwork.Dialect, first: dict[str, Schema]) -> Schema:
    fields = {
        **first,
        "subject": _subject(namespace_required=dialect.older_peers),
        "ingress": _rules("Rules for what arrives, in order.", dialect, ingress=True),
        "egress": _rules("Rules for what leaves, in order.", dialect, ingress=False),
    }
    return keep_unknown_fields(struct(about, fields, required=(*first, "subject")))


_PRIORITY = {"priority": integer("Evaluated from low to high.", 0, signetwork.MAX_PRIORITY)}
_COLUMNS = (("Priority", "integer", ".spec.priority"),)

RESOURCES = (
    CustomResource(
        f"{signetwork.GROUP}/v1alpha1",
        "AdminNetworkPolicy",
        "adminnetworkpolicies",
        ("anp",),
        namespaced=False,
        spec=_spec("Rules of an administrator, before all NetworkPolicies.", signetwork.ADMIN, _PRIORITY),
        columns=_COLUMNS,
        spec_default=False,
        annotations=(_APPROVED,),
    ),
    CustomResource(
        f"{signetwork.GROUP}/v1alpha1",
        "BaselineAdminNetworkPolicy",
        "baselineadminnetworkpolicies",
        ("banp",),
        namespaced=False,
        spec=_spec("Rules of an administrator, after all NetworkPolicies.", signetwork.BASELINE, {}),
        rules=(rule("self.metadata.name == 'default'", 'the name must be "default": there is only one'),),
        spec_default=False,
        annotations=(_APPROVED,),
    ),
    CustomResource(
        f"{signetwork.GROUP}/v1alpha2",
        "ClusterNetworkPolicy",
        "clusternetworkpolicies",
        ("cnp",),
        namespaced=False,
        spec=_spec(
            "Rules of an administrator, before or after all NetworkPolicies.",
            signetwork.CLUSTER,
            {"tier": word("Before NetworkPolicies (Admin) or after them (Baseline).", signetwork.TIERS), **_PRIORITY},
        ),
        columns=(("Tier", "string", ".spec.tier"), *_COLUMNS),
        selectable=(".spec.tier",),
        spec_default=False,
        annotations=(_APPROVED,),
    ),
)
