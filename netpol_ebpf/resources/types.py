# SPDX-License-Identifier: Apache-2.0
"""Typed resources: users' objects after validation, with default values, before any interpretation.

Each kind, and each nested structure, is a frozen dataclass with the fields of the API, in snake case.  The APIs are
networking.k8s.io/v1, projectcalico.org/v3, policy.networking.k8s.io/v1alpha1 and v1alpha2.  This module does not
interpret fields; `netpol_ebpf.policy.translate` does.

Invariants: every instance is valid, because outside tests only the parsers of this package create instances.  Where the
API distinguishes an absent and an empty field, these are ``None`` and ``()``.  CIDRs are networks without host bits.
Selectors are parsed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Union

from netpol_ebpf.errors import Location
from netpol_ebpf.selector import Selector

IPAddress = Union[IPv4Address, IPv6Address]
IPNetwork = Union[IPv4Network, IPv6Network]


@dataclass(frozen=True, slots=True)
class Meta:
    """The metadata of an object.

    ``namespace``: "" for cluster-scoped kinds; "default" if a manifest of a namespaced kind does not state it.
    ``is_stored``: whether the object was read in the form in which Calico stores it.  If the same object is also given
    as projectcalico.org/v3, the v3 object is used.
    ``stored_name``: the v3 object of some stored policies has one of two names, and it is not known which: ``name``, or
    the name under which the policy is stored.  Then this field has the stored name; otherwise it is "".

    ``revision``: UID/GENERATION of an API server's policy, which names one state of its spec.  It is "" for other kinds,
    and for a policy without UID or generation.

    Annotations are not kept, because pods have large ones.  The kinds have fields for the annotations that matter.
    """

    name: str
    namespace: str
    labels: Mapping[str, str]
    location: Location
    is_stored: bool = False
    stored_name: str = ""
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Requirement:
    """One matchExpressions entry. ``operator``: In, NotIn, Exists or DoesNotExist."""

    key: str
    operator: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LabelSelector:
    """A Kubernetes label selector. Labels must satisfy both fields. An empty selector matches all labels."""

    match_labels: Mapping[str, str] = field(default_factory=dict)
    match_expressions: tuple[Requirement, ...] = ()


# --- core ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Namespace:
    """v1 Namespace. The label kubernetes.io/metadata.name is added if the manifest does not have it."""

    meta: Meta


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    """v1 ServiceAccount."""

    meta: Meta


@dataclass(frozen=True, slots=True)
class ContainerPort:
    """A port that a container or init container declares.

    ``protocol``: the IANA number (6, 17, 132).
    ``host_port``: the node's port that is translated to this port; 0 if there is none.
    ``host_address``: the node's address for ``host_port``; None for all addresses.
    """

    name: str
    protocol: int
    port: int
    host_port: int = 0
    host_address: IPAddress | None = None


@dataclass(frozen=True, slots=True)
class Pod:
    """v1 Pod, or the pod of a workload's template (`workloads`), which has no address and the name KIND/NAME.

    ``finished``: whether the pod has ended, so that others may get its addresses.
    ``addresses``: from status.podIPs, else from status.podIP, else from annotations of CNI plugins.  () for a finished
    pod.
    ``allowed_source_prefixes``: from the annotation cni.projectcalico.org/allowedSourcePrefixes.
    ``uid``: the UID in the container runtime, which distinguishes successive pods of the same name; "" if it is not
    given.
    """

    meta: Meta
    node: str | None
    service_account: str
    host_network: bool
    finished: bool
    addresses: tuple[IPAddress, ...]
    ports: tuple[ContainerPort, ...]
    allowed_source_prefixes: tuple[IPNetwork, ...] = ()
    uid: str = ""


@dataclass(frozen=True, slots=True)
class NodeInterface:
    """An interface of a node, from the annotation in which Calico's agent lists the node's interfaces."""

    name: str
    addresses: tuple[IPAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class Node:
    """v1 Node.

    ``addresses``: from status.addresses (types InternalIP and ExternalIP) and Calico's annotations.
    ``external``: the addresses that have only the type ExternalIP.
    ``interfaces``: from the annotation projectcalico.org/Interfaces; () without it.
    """

    meta: Meta
    addresses: tuple[IPAddress, ...]
    external: frozenset[IPAddress] = frozenset()
    interfaces: tuple[NodeInterface, ...] = ()


@dataclass(frozen=True, slots=True)
class ServicePort:
    """A port of a Service.

    ``target_port``: a number, or the name of a container port; None if it is the same as ``port``.
    """

    name: str
    protocol: int
    port: int
    target_port: int | str | None
    node_port: int | None = None


@dataclass(frozen=True, slots=True)
class Service:
    """v1 Service.

    ``cluster_ips``: () for a headless service.
    ``external_ips``: externalIPs, and addresses of load balancers.
    """

    meta: Meta
    selector: Mapping[str, str] | None
    cluster_ips: tuple[IPAddress, ...]
    external_ips: tuple[IPAddress, ...]
    ports: tuple[ServicePort, ...]


@dataclass(frozen=True, slots=True)
class SlicePort:
    """A port of an EndpointSlice. ``port``: None if the slice gives no number; then the port gives no backends."""

    name: str
    protocol: int
    port: int | None


@dataclass(frozen=True, slots=True)
class EndpointSlice:
    """discovery.k8s.io/v1 EndpointSlice.

    ``service``: the name of its service, from a label; None without the label.
    ``addresses``: all addresses, also of endpoints that are not ready.
    """

    meta: Meta
    service: str | None
    addresses: tuple[IPAddress, ...]
    ports: tuple[SlicePort, ...]


# --- networking.k8s.io/v1 -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IPBlock:
    """The ipBlock of a Kubernetes peer."""

    cidr: IPNetwork
    excepts: tuple[IPNetwork, ...] = ()


@dataclass(frozen=True, slots=True)
class KubernetesPeer:
    """A peer of a NetworkPolicy: ``ip_block``, or at least one selector.

    A field is None if the peer does not have it.  An empty selector matches everything.
    """

    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: IPBlock | None = None


@dataclass(frozen=True, slots=True)
class KubernetesPort:
    """A port of a NetworkPolicy.

    ``port``: a number or a name; None for all ports.
    ``end_port``: the last port of a range that begins at ``port``; None if there is no range.
    """

    protocol: int
    port: int | str | None = None
    end_port: int | None = None


@dataclass(frozen=True, slots=True)
class KubernetesRule:
    """An ingress or egress rule of a NetworkPolicy.

    If ``peers`` is empty, all peers match; if ``ports`` is empty, all ports.
    """

    peers: tuple[KubernetesPeer, ...]
    ports: tuple[KubernetesPort, ...]
    location: Location


@dataclass(frozen=True, slots=True)
class KubernetesPolicySpec:
    """NetworkPolicySpec. ``policy_types``: "Ingress", "Egress"; the API server's default if the field is absent."""

    pod_selector: LabelSelector
    policy_types: tuple[str, ...]
    ingress: tuple[KubernetesRule, ...]
    egress: tuple[KubernetesRule, ...]


@dataclass(frozen=True, slots=True)
class KubernetesNetworkPolicy:
    """networking.k8s.io/v1 NetworkPolicy."""

    meta: Meta
    spec: KubernetesPolicySpec


@dataclass(frozen=True, slots=True)
class StagedKubernetesNetworkPolicy:
    """projectcalico.org/v3 StagedKubernetesNetworkPolicy. ``spec``: None if ``staged_action`` is Delete."""

    meta: Meta
    staged_action: str
    spec: KubernetesPolicySpec | None


# --- projectcalico.org/v3 -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PortSpec:
    """A Calico port: an inclusive numeric range, or a name. With a name, first and last are 0."""

    first: int
    last: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class Icmp:
    """ICMP type with optional code."""

    type: int
    code: int | None = None


@dataclass(frozen=True, slots=True)
class ServiceAccountMatch:
    """The field serviceAccounts: an account must have one of ``names`` and match ``selector``.

    If one of the two is empty, only the other must match.  They are never both empty.
    """

    names: tuple[str, ...] = ()
    selector: Selector | None = None


@dataclass(frozen=True, slots=True)
class ServiceMatch:
    """The field services of an entity rule. ``namespace``: if the field is absent, the namespace of the policy."""

    name: str
    namespace: str


@dataclass(frozen=True, slots=True)
class EntityRule:
    """The source or destination of a Calico rule. All given fields must match.

    A selector is None if the field is absent or an empty text.  ``namespace_selector`` may be global()
    (`Selector.is_global`).
    """

    nets: tuple[IPNetwork, ...] = ()
    not_nets: tuple[IPNetwork, ...] = ()
    selector: Selector | None = None
    not_selector: Selector | None = None
    namespace_selector: Selector | None = None
    ports: tuple[PortSpec, ...] = ()
    not_ports: tuple[PortSpec, ...] = ()
    service_accounts: ServiceAccountMatch | None = None
    services: ServiceMatch | None = None
    domains: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HttpPath:
    """An HTTP path. Exactly one of the two fields is given."""

    exact: str | None = None
    prefix: str | None = None


@dataclass(frozen=True, slots=True)
class HttpHeader:
    """A match of an HTTP header. ``operator``: Exists, DoesNotExist, HasPrefix, HasSuffix, In, NotIn, MatchesRegex."""

    header: str
    operator: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HttpMatch:
    """A match of an HTTP request. Method, path and headers must all match. An empty field matches any request."""

    methods: tuple[str, ...] = ()
    paths: tuple[HttpPath, ...] = ()
    headers: tuple[HttpHeader, ...] = ()


@dataclass(frozen=True, slots=True)
class CalicoRule:
    """One Calico rule. ``action``: Allow, Deny, Log, Pass. Protocols are IANA numbers."""

    action: str
    location: Location
    ip_version: int | None = None
    protocol: int | None = None
    not_protocol: int | None = None
    icmp: Icmp | None = None
    not_icmp: Icmp | None = None
    source: EntityRule = EntityRule()
    destination: EntityRule = EntityRule()
    http: HttpMatch | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CalicoPolicySpec:
    """The spec of NetworkPolicy, GlobalNetworkPolicy and their staged forms.

    ``order``: None if the field is absent; then the policy is last in its tier.
    ``types``: "Ingress", "Egress"; Calico's default if the field is absent.
    """

    tier: str
    order: float | None
    selector: Selector | None
    namespace_selector: Selector | None
    service_account_selector: Selector | None
    types: tuple[str, ...]
    ingress: tuple[CalicoRule, ...]
    egress: tuple[CalicoRule, ...]
    do_not_track: bool = False
    pre_dnat: bool = False
    apply_on_forward: bool = False
    performance_hints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CalicoNetworkPolicy:
    """projectcalico.org/v3 NetworkPolicy."""

    meta: Meta
    spec: CalicoPolicySpec


@dataclass(frozen=True, slots=True)
class GlobalNetworkPolicy:
    """projectcalico.org/v3 GlobalNetworkPolicy."""

    meta: Meta
    spec: CalicoPolicySpec


@dataclass(frozen=True, slots=True)
class StagedNetworkPolicy:
    """projectcalico.org/v3 StagedNetworkPolicy. ``staged_action``: Set, Delete, Learn, Ignore."""

    meta: Meta
    staged_action: str
    spec: CalicoPolicySpec


@dataclass(frozen=True, slots=True)
class StagedGlobalNetworkPolicy:
    """projectcalico.org/v3 StagedGlobalNetworkPolicy. ``staged_action``: Set, Delete, Learn, Ignore."""

    meta: Meta
    staged_action: str
    spec: CalicoPolicySpec


@dataclass(frozen=True, slots=True)
class Tier:
    """projectcalico.org/v3 Tier. ``order``: None if the object gives none. ``default_action``: Deny or Pass."""

    meta: Meta
    order: float | None
    default_action: str


@dataclass(frozen=True, slots=True)
class NetworkSet:
    """projectcalico.org/v3 NetworkSet, or GlobalNetworkSet if ``meta.namespace`` is "". The nets have no host bits."""

    meta: Meta
    nets: tuple[IPNetwork, ...]
    allowed_egress_domains: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EndpointPort:
    """A named port of a host or workload endpoint."""

    name: str
    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class HostEndpoint:
    """projectcalico.org/v3 HostEndpoint.

    ``interface``: a name, or "*" for all interfaces; None if the object gives none.
    """

    meta: Meta
    node: str
    interface: str | None
    expected_ips: tuple[IPAddress, ...]
    profiles: tuple[str, ...]
    ports: tuple[EndpointPort, ...]


@dataclass(frozen=True, slots=True)
class WorkloadEndpoint:
    """projectcalico.org/v3 WorkloadEndpoint: a VM, a tap device, or a pod that is not known to Kubernetes."""

    meta: Meta
    node: str
    orchestrator: str
    workload: str
    interface: str | None
    addresses: tuple[IPAddress, ...]
    profiles: tuple[str, ...]
    ports: tuple[EndpointPort, ...]
    service_account: str | None = None
    allowed_source_prefixes: tuple[IPNetwork, ...] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """projectcalico.org/v3 Profile."""

    meta: Meta
    ingress: tuple[CalicoRule, ...]
    egress: tuple[CalicoRule, ...]
    labels_to_apply: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class FailsafePort:
    """An entry of a list of failsafe ports. ``protocol``: IANA number (6, 17). ``net``: None for any remote address."""

    protocol: int
    port: int
    net: IPNetwork | None = None


@dataclass(frozen=True, slots=True)
class FelixConfiguration:
    """projectcalico.org/v3 FelixConfiguration. A list is None if the object does not give it, () if it is empty."""

    meta: Meta
    failsafe_inbound: tuple[FailsafePort, ...] | None = None
    failsafe_outbound: tuple[FailsafePort, ...] | None = None


@dataclass(frozen=True, slots=True)
class HostEndpointTemplate:
    """A template of automatic host endpoints.

    ``nets``: only the node's addresses in these nets are used.
    ``pattern``: a regular expression that is searched in the names of the node's interfaces.
    ``node_selector``: None for all nodes.
    """

    name: str
    nets: tuple[IPNetwork, ...] = ()
    pattern: str | None = None
    node_selector: Selector | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KubeControllersConfiguration:
    """projectcalico.org/v3 KubeControllersConfiguration: only the fields about automatic host endpoints."""

    meta: Meta
    creates_hosts: bool = False
    creates_default: bool = True
    templates: tuple[HostEndpointTemplate, ...] = ()


# --- policy.networking.k8s.io ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NamespacedPodSelector:
    """The field pods{namespaceSelector, podSelector} of a subject or peer."""

    namespace_selector: LabelSelector
    pod_selector: LabelSelector


@dataclass(frozen=True, slots=True)
class SigSubject:
    """The subject of a policy. Exactly one of the two fields is given."""

    namespaces: LabelSelector | None = None
    pods: NamespacedPodSelector | None = None


@dataclass(frozen=True, slots=True)
class SigPeer:
    """One peer of a SIG-network policy.

    ``same_labels``, ``not_same_labels``: label keys of older v1alpha1 forms.  They narrow ``namespaces`` or ``pods``,
    whose namespace selector then matches everything.
    ``unknown``: whether the peer has a form of a newer API, so that the rule fails closed.  Then all other fields are
    empty.
    """

    namespaces: LabelSelector | None = None
    pods: NamespacedPodSelector | None = None
    nodes: LabelSelector | None = None
    networks: tuple[IPNetwork, ...] = ()
    domain_names: tuple[str, ...] = ()
    same_labels: tuple[str, ...] = ()
    not_same_labels: tuple[str, ...] = ()
    unknown: bool = False


@dataclass(frozen=True, slots=True)
class SigPort:
    """An item of the field protocols or ports: ``named_port``, or a protocol with an inclusive range of ports.

    ``protocol``: the IANA number; None for a named port.
    ``first``, ``last``: the range; 0 and 0 stand for all ports.
    ``unknown``: whether the item has a form of a newer API, so that the rule fails closed.
    """

    protocol: int | None
    first: int = 0
    last: int = 0
    named_port: str | None = None
    unknown: bool = False


@dataclass(frozen=True, slots=True)
class SigRule:
    """A rule of a SIG-network policy.

    ``action``: Allow (also for Accept), Deny or Pass.
    ``ports``: None for all packets, also for those without ports such as ICMP.
    """

    name: str
    action: str
    peers: tuple[SigPeer, ...]
    ports: tuple[SigPort, ...] | None
    location: Location


@dataclass(frozen=True, slots=True)
class ClusterNetworkPolicy:
    """v1alpha2 ClusterNetworkPolicy. ``tier``: Admin or Baseline."""

    meta: Meta
    tier: str
    priority: int
    subject: SigSubject
    ingress: tuple[SigRule, ...]
    egress: tuple[SigRule, ...]


@dataclass(frozen=True, slots=True)
class AdminNetworkPolicy:
    """v1alpha1 AdminNetworkPolicy."""

    meta: Meta
    priority: int
    subject: SigSubject
    ingress: tuple[SigRule, ...]
    egress: tuple[SigRule, ...]


@dataclass(frozen=True, slots=True)
class BaselineAdminNetworkPolicy:
    """v1alpha1 BaselineAdminNetworkPolicy. A cluster has only one, with the name default."""

    meta: Meta
    subject: SigSubject
    ingress: tuple[SigRule, ...]
    egress: tuple[SigRule, ...]


Resource = Union[
    Namespace,
    ServiceAccount,
    Pod,
    Node,
    Service,
    EndpointSlice,
    KubernetesNetworkPolicy,
    StagedKubernetesNetworkPolicy,
    CalicoNetworkPolicy,
    GlobalNetworkPolicy,
    StagedNetworkPolicy,
    StagedGlobalNetworkPolicy,
    Tier,
    NetworkSet,
    HostEndpoint,
    WorkloadEndpoint,
    Profile,
    FelixConfiguration,
    KubeControllersConfiguration,
    ClusterNetworkPolicy,
    AdminNetworkPolicy,
    BaselineAdminNetworkPolicy,
]
