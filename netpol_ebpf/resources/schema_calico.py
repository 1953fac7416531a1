# SPDX-License-Identifier: Apache-2.0
"""The custom resources of projectcalico.org/v3, as `calico` and `calico_configuration` read them.

WorkloadEndpoint has no definition, because agents derive it from a pod.  Manifests for commands without a cluster may
contain it.
"""

from __future__ import annotations

from netpol_ebpf.resources import calico, calico_configuration
from netpol_ebpf.resources.kubernetes import DIRECTIONS
from netpol_ebpf.resources.schema import (
    LABEL_VALUE,
    MAX_CIDR,
    MAX_PORT_NAME,
    PORT_NAME,
    WIDE,
    CustomResource,
    Schema,
    boolean,
    dns_label,
    dns_name,
    given,
    integer_or_text,
    label_selector,
    list_of,
    number,
    port_number,
    re2,
    rule,
    struct,
    text,
    text_map,
    word,
)
from netpol_ebpf.resources.schema_rule import domains, protocol, rules, selector
from netpol_ebpf.resources.syntax import MAX_LABEL, MAX_PORT, PROTOCOLS

_NET_OR_ADDRESS = [{"format": "cidr"}, {"format": "ipv4"}, {"format": "ipv6"}]


# --- names ----------------------------------------------------------------------------------------------------------


# The API server itself checks that every name is a DNS subdomain.
_ONE_DOT = "self.metadata.name.split('.').size() <= 2"
_NAME_MESSAGE = 'the name must be one without dots, or "tier.name" with a single dot'
_GLOBAL_POLICY_NAME = rule(_ONE_DOT, _NAME_MESSAGE)
_POLICY_NAME = rule(
    f"{_ONE_DOT} || self.metadata.name.startsWith('knp.default.') || self.metadata.name.startsWith('ossg.default.')",
    _NAME_MESSAGE,
)
_TIER_NAME = rule(
    f"size(self.metadata.name) <= {MAX_LABEL} && !self.metadata.name.contains('.')",
    f"the name must have at most {MAX_LABEL} characters and no dots",
)


# --- policies -------------------------------------------------------------------------------------------------------


def _policy_fields(*, is_global: bool) -> dict[str, Schema]:
    fields = {
        "tier": dns_label("The tier the policy belongs to.", default=calico.DEFAULT_TIER),
        "order": number("Policies of a tier are evaluated from low to high; last when absent."),
        "selector": selector("Endpoints the policy applies to; all of them when empty."),
        "serviceAccountSelector": selector("Only pods of these service accounts."),
        "types": list_of(
            "Directions the policy applies to; by its rules when absent.",
            word("A direction.", DIRECTIONS),
            len(DIRECTIONS),
            is_set=True,
        ),
        "ingress": rules("Rules for what arrives, in order.", ingress=True, namespaced=not is_global),
        "egress": rules("Rules for what leaves, in order.", ingress=False, namespaced=not is_global),
        "performanceHints": list_of(
            "Hints; they change no verdict.", word("A hint.", (calico.PERFORMANCE_HINT,)), 1, is_set=True
        ),
    }
    if is_global:
        fields |= {
            "namespaceSelector": selector("Only pods of these namespaces."),
            "doNotTrack": boolean("Of host endpoints: before connection tracking."),
            "preDNAT": boolean("Of host endpoints: before addresses of services are translated."),
            "applyOnForward": boolean("Of host endpoints: also for what the host forwards."),
        }
    return fields


def _is_true(field: str) -> str:
    return f"(has(self.{field}) && self.{field})"


_HOST_RULES = [
    rule(f"!({_is_true('doNotTrack')} && {_is_true('preDNAT')})", "preDNAT cannot be combined with doNotTrack"),
    rule(
        f"!({_is_true('doNotTrack')} || {_is_true('preDNAT')}) || {_is_true('applyOnForward')}",
        "doNotTrack and preDNAT need applyOnForward: true",
    ),
    rule(f"!{_is_true('preDNAT')} || !{given('egress')}", "a preDNAT policy has only ingress rules"),
    rule(
        f"!{_is_true('preDNAT')} || !has(self.types) || !('Egress' in self.types)",
        "a preDNAT policy cannot have the type Egress",
    ),
]


def _policy(about: str, *, is_global: bool, staged: bool = False) -> Schema:
    fields = _policy_fields(is_global=is_global)
    constraints = list(_HOST_RULES) if is_global else []
    if staged:
        constraints.append(_nothing_but_the_action({key: one for key, one in fields.items() if key != "tier"}))
        fields["stagedAction"] = _STAGED_ACTION
    return struct(about, fields, rules=constraints)


_STAGED_ACTION = word(
    "What enforcing it would do: set the policy of the same name, or delete it; Learn and Ignore are bookkeeping.",
    calico.STAGED_ACTIONS,
    default=calico.STAGED_ACTIONS[0],
)


def _nothing_but_the_action(fields: dict[str, Schema]) -> dict[str, str]:
    """The CEL rule which requires that a staged policy with the action Delete has no value in any of ``fields``."""
    empty = []
    for key, field in fields.items():
        if field["type"] == "number":
            empty.append(f"!has(self.{key})")
        elif field["type"] == "boolean":
            empty.append(f"!{_is_true(key)}")
        elif field["type"] == "object":
            parts = " && ".join(f"!has(self.{key}.{below})" for below in field["properties"])
            empty.append(f"(!has(self.{key}) || {parts})")
        else:
            empty.append(f"!{given(key)}")
    return rule(
        f"!has(self.stagedAction) || self.stagedAction != 'Delete' || ({' && '.join(empty)})",
        "with stagedAction: Delete every other field must be empty",
    )


# --- a staged Kubernetes policy -------------------------------------------------------------------------------------


def _kubernetes_policy(about: str) -> Schema:
    fields = {
        "podSelector": label_selector("Pods of the namespace that the policy applies to."),
        "policyTypes": list_of("Directions that are isolated.", word("A direction.", DIRECTIONS), len(DIRECTIONS)),
        "ingress": list_of("Rules that allow what arrives.", _kubernetes_rule("from"), WIDE),
        "egress": list_of("Rules that allow what leaves.", _kubernetes_rule("to"), WIDE),
    }
    constraint = _nothing_but_the_action(fields)
    return struct(about, fields | {"stagedAction": _STAGED_ACTION}, rules=[constraint])


def _kubernetes_rule(peers_key: str) -> Schema:
    peer = struct(
        "Pods by labels, or addresses.",
        {
            "podSelector": label_selector("Pods by their labels."),
            "namespaceSelector": label_selector("Namespaces by their labels."),
            "ipBlock": struct(
                "Addresses.",
                {
                    "cidr": text("Addresses that are meant.", longest=MAX_CIDR, form="cidr"),
                    "except": list_of(
                        "Parts of them that are not.", text("A CIDR.", longest=MAX_CIDR, form="cidr"), WIDE
                    ),
                },
                required=("cidr",),
            ),
        },
        rules=[
            rule(
                "has(self.podSelector) || has(self.namespaceSelector) || has(self.ipBlock)",
                "a peer needs podSelector, namespaceSelector or ipBlock",
            ),
            rule(
                "!has(self.ipBlock) || !has(self.podSelector) && !has(self.namespaceSelector)",
                "ipBlock cannot be combined with a selector in one peer",
            ),
        ],
    )
    port = struct(
        "Ports of one protocol.",
        {
            "protocol": word("TCP when absent.", tuple(PROTOCOLS)),
            "port": integer_or_text(
                "A number or a name; every port when absent.", 1, MAX_PORT, MAX_PORT_NAME, PORT_NAME
            ),
            "endPort": port_number("The last port of a range that begins at port."),
        },
        rules=[
            rule(
                "!has(self.endPort) || has(self.port) && type(self.port) == int && int(self.port) <= self.endPort",
                "endPort needs a numeric port that is not greater",
            )
        ],
    )
    return struct(
        "All sources or destinations, and all ports, where the list is empty.",
        {peers_key: list_of("Peers.", peer, WIDE), "ports": list_of("Ports.", port, WIDE)},
    )


# --- tiers, sets, endpoints, profiles -------------------------------------------------------------------------------


def _built_in(name: str) -> dict[str, str]:
    order, action = calico.BUILT_IN_TIERS[name]
    return rule(
        f"self.metadata.name != '{name}' || "
        f"has(self.spec.order) && self.spec.order == {order} && self.spec.defaultAction == '{action}'",
        f"the tier {name} is built in: its order is {order:.0f}, its defaultAction {action}",
    )


_TIER = struct(
    "Policies that are evaluated together.",
    {
        "order": number(
            f"Tiers are evaluated from low to high; {calico.BUILT_IN_TIERS[calico.DEFAULT_TIER][0]:.0f} when absent."
        ),
        "defaultAction": word(
            "For packets of an endpoint to which a policy of the tier applies, and which none of its rules decides.",
            calico.TIER_ACTIONS,
            default=calico.TIER_ACTIONS[0],
        ),
    },
)


def _network_set(about: str) -> Schema:
    net = text("A CIDR or an address.", longest=MAX_CIDR) | {"anyOf": _NET_OR_ADDRESS}
    return struct(
        about,
        {"nets": list_of("Addresses.", net), "allowedEgressDomains": domains("Domain names.")},
    )


def _labels(about: str) -> Schema:
    return text_map(about, text("A value.", longest=MAX_LABEL, pattern=LABEL_VALUE))


_HOST_ENDPOINT = struct(
    "An interface of a node, or all of them.",
    {
        "node": dns_name("The node's name.", required=True),
        "interfaceName": text(
            "The interface, or * for all.", pattern=rf"^(\*|{re2(calico.INTERFACE)[1:-1]})?$", longest=15
        ),
        "expectedIPs": list_of(
            "Addresses of the interface, by which rules select it.",
            text("An address.", longest=MAX_CIDR) | {"anyOf": _NET_OR_ADDRESS[1:]},
            WIDE,
        ),
        "profiles": list_of("Profiles, evaluated after all tiers.", dns_name("A profile's name.", required=True), WIDE),
        "ports": list_of(
            "Names for ports.",
            struct(
                "One port.",
                {
                    "name": text("Its name.", longest=128, pattern=re2(calico.PORT_NAME), required=True),
                    "protocol": protocol("TCP, UDP or SCTP."),
                    "port": port_number("Its number."),
                },
                required=("name", "protocol", "port"),
                rules=[
                    rule(
                        "type(self.protocol) == int ? self.protocol in [6, 17, 132] : "
                        "self.protocol in ['TCP', 'UDP', 'SCTP', '6', '06', '006', '17', '017', '132']",
                        "protocol must be TCP, UDP or SCTP",
                    )
                ],
            ),
            WIDE,
        ),
    },
    required=("node",),
    rules=[
        rule(f"{given('interfaceName')} || {given('expectedIPs')}", "interfaceName, expectedIPs or both must be given")
    ],
)

_PROFILE = struct(
    "Rules and labels of the endpoints that name it.",
    {
        "ingress": rules("Rules for what arrives, in order.", ingress=True, namespaced=False),
        "egress": rules("Rules for what leaves, in order.", ingress=False, namespaced=False),
        "labelsToApply": _labels("Labels that the endpoints get."),
    },
)


# --- configuration --------------------------------------------------------------------------------------------------

_OTHERS_FIELDS = {"x-kubernetes-preserve-unknown-fields": True}
"""Keys for the schemas of kinds with many fields of other programs: unknown fields are kept."""


def _failsafes(about: str) -> Schema:
    protocols = "|".join(
        "".join(f"[{letter}{letter.lower()}]" for letter in one) for one in calico_configuration.FAILSAFE_PROTOCOLS
    )
    entry = struct(
        "One port.",
        {
            "protocol": text("TCP or UDP.", pattern=f"^({protocols})$", required=True),
            "port": port_number("Its number."),
            "net": text("Only for these addresses.", longest=MAX_CIDR)
            | {"anyOf": [*_NET_OR_ADDRESS, {"maxLength": 0}]},
        },
        required=("protocol", "port"),
    )
    return list_of(about, entry)


_FELIX = struct(
    "What the agents of all nodes, or of one, do beyond policy; only the fields below are read here.",
    {
        "failsafeInboundHostPorts": _failsafes("Ports of the host that no policy closes to what arrives."),
        "failsafeOutboundHostPorts": _failsafes("Ports that no policy closes to what the host sends."),
    },
    more=_OTHERS_FIELDS,
)

_TEMPLATE = struct(
    "Host endpoints that each node gets.",
    {
        "generateName": dns_name("The end of their names.", required=True),
        "interfaceCIDRs": list_of(
            "Interfaces with an address of these.", text("A CIDR.", longest=MAX_CIDR) | {"anyOf": _NET_OR_ADDRESS}, WIDE
        ),
        "interfacePattern": text("Interfaces by name: a regular expression.", longest=WIDE, pattern=r"^[^\n]*$"),
        "nodeSelector": selector("Nodes by their labels."),
        "labels": _labels("Labels of the host endpoints."),
    },
    required=("generateName",),
    rules=[
        rule(
            f"{given('interfaceCIDRs')} || {given('interfacePattern')}",
            "interfaceCIDRs, interfacePattern or both must be given",
        )
    ],
)

_KUBE_CONTROLLERS = struct(
    "What is made of objects of the cluster; only the host endpoints of nodes are read here.",
    {
        "controllers": struct(
            "One field a controller.",
            {
                "node": struct(
                    "The controller of nodes.",
                    {
                        "hostEndpoint": struct(
                            "Host endpoints of nodes.",
                            {
                                "autoCreate": word(
                                    "Whether each node gets host endpoints.", calico_configuration.MODES
                                ),
                                "createDefaultHostEndpoint": word(
                                    "Whether one of them is for all interfaces.", calico_configuration.MODES
                                ),
                                "templates": list_of("Further host endpoints.", _TEMPLATE, WIDE),
                            },
                        )
                    },
                    more=_OTHERS_FIELDS,
                )
            },
            more=_OTHERS_FIELDS,
        )
    },
    more=_OTHERS_FIELDS,
)


# --- the kinds ------------------------------------------------------------------------------------------------------

_TIER_COLUMNS = (("Tier", "string", ".spec.tier"), ("Order", "number", ".spec.order"))
_STAGED_COLUMNS = (*_TIER_COLUMNS, ("Action", "string", ".spec.stagedAction"))
_BY_TIER = (".spec.tier",)

RESOURCES = (
    CustomResource(
        calico.VERSION,
        "NetworkPolicy",
        "networkpolicies",
        ("caliconp",),
        namespaced=True,
        spec=_policy("Rules for pods of one namespace.", is_global=False),
        columns=_TIER_COLUMNS,
        selectable=_BY_TIER,
        rules=(_POLICY_NAME,),
    ),
    CustomResource(
        calico.VERSION,
        "GlobalNetworkPolicy",
        "globalnetworkpolicies",
        ("gnp",),
        namespaced=False,
        spec=_policy("Rules for endpoints of the whole cluster.", is_global=True),
        columns=_TIER_COLUMNS,
        selectable=_BY_TIER,
        rules=(_GLOBAL_POLICY_NAME,),
    ),
    CustomResource(
        calico.VERSION,
        "StagedNetworkPolicy",
        "stagednetworkpolicies",
        ("snp",),
        namespaced=True,
        spec=_policy("A NetworkPolicy that is evaluated and not enforced.", is_global=False, staged=True),
        columns=_STAGED_COLUMNS,
        selectable=_BY_TIER,
        rules=(_POLICY_NAME,),
    ),
    CustomResource(
        calico.VERSION,
        "StagedGlobalNetworkPolicy",
        "stagedglobalnetworkpolicies",
        ("sgnp",),
        namespaced=False,
        spec=_policy("A GlobalNetworkPolicy that is evaluated and not enforced.", is_global=True, staged=True),
        columns=_STAGED_COLUMNS,
        selectable=_BY_TIER,
        rules=(_GLOBAL_POLICY_NAME,),
    ),
    CustomResource(
        calico.VERSION,
        "StagedKubernetesNetworkPolicy",
        "stagedkubernetesnetworkpolicies",
        ("sknp",),
        namespaced=True,
        spec=_kubernetes_policy("A NetworkPolicy of networking.k8s.io that is evaluated and not enforced."),
        columns=(("Action", "string", ".spec.stagedAction"),),
    ),
    CustomResource(
        calico.VERSION,
        "Tier",
        "tiers",
        (),
        namespaced=False,
        spec=_TIER,
        columns=(("Order", "number", ".spec.order"), ("Default action", "string", ".spec.defaultAction")),
        rules=(_TIER_NAME, *(_built_in(name) for name in calico.BUILT_IN_TIERS)),
    ),
    CustomResource(
        calico.VERSION,
        "NetworkSet",
        "networksets",
        ("netset",),
        namespaced=True,
        spec=_network_set("Addresses that rules select by the labels of this object."),
    ),
    CustomResource(
        calico.VERSION,
        "GlobalNetworkSet",
        "globalnetworksets",
        ("gnetset",),
        namespaced=False,
        spec=_network_set("Addresses that rules select by the labels of this object."),
    ),
    CustomResource(
        calico.VERSION,
        "HostEndpoint",
        "hostendpoints",
        ("hep",),
        namespaced=False,
        spec=_HOST_ENDPOINT,
        columns=(("Node", "string", ".spec.node"), ("Interface", "string", ".spec.interfaceName")),
        selectable=(".spec.node",),
        spec_default=False,
    ),
    CustomResource(calico.VERSION, "Profile", "profiles", (), namespaced=False, spec=_PROFILE),
    CustomResource(
        calico.VERSION,
        "FelixConfiguration",
        "felixconfigurations",
        ("felixconfig",),
        namespaced=False,
        spec=_FELIX,
        rules=(
            rule(
                f"self.metadata.name == '{calico_configuration.DEFAULT}' || "
                f"self.metadata.name.startsWith('{calico_configuration.NODE_PREFIX}')",
                f'the name must be "{calico_configuration.DEFAULT}" or "{calico_configuration.NODE_PREFIX}" and a node\'s name',
            ),
        ),
    ),
    CustomResource(
        calico.VERSION,
        "KubeControllersConfiguration",
        "kubecontrollersconfigurations",
        ("kccfg",),
        namespaced=False,
        spec=_KUBE_CONTROLLERS,
        rules=(
            rule(
                f"self.metadata.name == '{calico_configuration.DEFAULT}'",
                f'the name must be "{calico_configuration.DEFAULT}"',
            ),
        ),
    ),
)
