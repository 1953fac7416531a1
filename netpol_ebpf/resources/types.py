# SPDX-License-Identifier: Apache-2.0
"""Typed resources: users' objects after validation and defaulting, before any interpretation.

One frozen dataclass for each kind, one for each nested structure, field names as in the API but in snake case.  They
mirror the published APIs (networking.k8s.io/v1, projectcalico.org/v3, policy.networking.k8s.io/v1alpha1 and v1alpha2)
and mean nothing by themselves: `netpol_ebpf.policy.translate` gives them their meaning.

Invariants: an instance is valid (the parser in this package is the only maker outside tests); absent and empty are
distinct where the API distinguishes them (``None`` against ``()``); CIDRs are masked networks; selectors are parsed.
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
    """Object metadata. ``namespace`` is "" for cluster-scoped kinds ("default" is filled in for namespaced ones).

    Annotations are not kept: pods have large ones, and what a kind means by one is in a field of its own.  ``is_stored``: read from
    the form in which Calico stores the object, to which the same object as projectcalico.org/v3 is preferred.
    """

    name: str
    namespace: str
    labels: Mapping[str, str]
    location: Location
    is_stored: bool = False


@dataclass(frozen=True, slots=True)
class Requirement:
    """One matchExpressions entry; ``operator`` is In, NotIn, Exists or DoesNotExist."""

    key: str
    operator: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LabelSelector:
    """A Kubernetes label selector; both parts are ANDed, empty matches everything of its kind."""

    match_labels: Mapping[str, str] = field(default_factory=dict)
    match_expressions: tuple[Requirement, ...] = ()


# --- core ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Namespace:
    """v1 Namespace; the label kubernetes.io/metadata.name is added when the manifest lacks it."""

    meta: Meta


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    """v1 ServiceAccount."""

    meta: Meta


@dataclass(frozen=True, slots=True)
class ContainerPort:
    """A declared container port (init containers included). ``protocol``: IANA number (6, 17, 132).

    ``host_port``: port of the node that is translated to the container port, 0: none; ``host_address``: address of the
    node for it, None: all.
    """

    name: str
    protocol: int
    port: int
    host_port: int = 0
    host_address: IPAddress | None = None


@dataclass(frozen=True, slots=True)
class Pod:
    """v1 Pod, or the pod of a workload's template (`workloads`), which has no address and the name KIND/NAME.

    ``addresses``: by the precedence of status.podIPs, podIP, then the CNI annotations; () for a finished pod. ``uid``:
    as the container runtime knows it, empty where it is not given: successive pods of the same name differ in it.

    ``allowed_source_prefixes`` from annotation cni.projectcalico.org/allowedSourcePrefixes.
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
    """An interface of a node, from an annotation by Calico's agent on the Node object."""

    name: str
    addresses: tuple[IPAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class Node:
    """v1 Node. ``addresses``: status.addresses of type InternalIP/ExternalIP plus Calico tunnel annotations.

    ``external``: addresses that are of type ExternalIP only.  ``interfaces`` from annotation
    projectcalico.org/Interfaces, () without it.
    """

    meta: Meta
    addresses: tuple[IPAddress, ...]
    external: frozenset[IPAddress] = frozenset()
    interfaces: tuple[NodeInterface, ...] = ()


@dataclass(frozen=True, slots=True)
class ServicePort:
    """``target_port`` is a number, a port name, or None (same as port)."""

    name: str
    protocol: int
    port: int
    target_port: int | str | None
    node_port: int | None = None


@dataclass(frozen=True, slots=True)
class Service:
    """v1 Service. ``cluster_ips`` excludes "None"; ``external_ips`` holds externalIPs and load-balancer addresses."""

    meta: Meta
    selector: Mapping[str, str] | None
    cluster_ips: tuple[IPAddress, ...]
    external_ips: tuple[IPAddress, ...]
    ports: tuple[ServicePort, ...]


@dataclass(frozen=True, slots=True)
class SlicePort:
    """A port of an EndpointSlice. ``port`` None: contributes nothing."""

    name: str
    protocol: int
    port: int | None


@dataclass(frozen=True, slots=True)
class EndpointSlice:
    """discovery.k8s.io/v1 EndpointSlice; not-ready addresses are included. ``service``: the service-name label."""

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
    """Either ``ip_block`` or at least one selector; None is absent, an empty selector matches everything."""

    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: IPBlock | None = None


@dataclass(frozen=True, slots=True)
class KubernetesPort:
    """``port``: number, name or None (all ports of the protocol); ``end_port`` inclusive."""

    protocol: int
    port: int | str | None = None
    end_port: int | None = None


@dataclass(frozen=True, slots=True)
class KubernetesRule:
    """One ingress or egress item. Empty ``peers``/``ports`` mean: no constraint."""

    peers: tuple[KubernetesPeer, ...]
    ports: tuple[KubernetesPort, ...]
    location: Location


@dataclass(frozen=True, slots=True)
class KubernetesPolicySpec:
    """NetworkPolicySpec with ``policy_types`` defaulted as the API server does ("Ingress", "Egress")."""

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
    """projectcalico.org/v3 StagedKubernetesNetworkPolicy. ``spec`` is None when ``staged_action`` is Delete."""

    meta: Meta
    staged_action: str
    spec: KubernetesPolicySpec | None


# --- projectcalico.org/v3 -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PortSpec:
    """A Calico port: an inclusive numeric range, or a name (then first and last are 0)."""

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
    """Service accounts: names (ORed) AND selector; either may be empty/None, not both."""

    names: tuple[str, ...] = ()
    selector: Selector | None = None


@dataclass(frozen=True, slots=True)
class ServiceMatch:
    """The field services{name, namespace}; namespace defaulted to the policy's own for a NetworkPolicy."""

    name: str
    namespace: str


@dataclass(frozen=True, slots=True)
class EntityRule:
    """The source or destination of a Calico rule, every given field ANDed. None: field absent or empty string.

    ``namespace_selector`` may be exactly global(); ``Selector.is_global`` checks that.
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
    """An HTTP path: exactly one of the two fields is given."""

    exact: str | None = None
    prefix: str | None = None


@dataclass(frozen=True, slots=True)
class HttpHeader:
    """An HTTP header condition. Operator: Exists, DoesNotExist, HasPrefix, HasSuffix, In, NotIn, MatchesRegex."""

    header: str
    operator: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HttpMatch:
    """An HTTP condition: methods AND paths AND headers; empty means any."""

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
    """Spec of NP, GNP and their staged forms. ``order`` None: last. ``types`` defaulted per the Calico rule."""

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
    """projectcalico.org/v3 StagedNetworkPolicy; ``staged_action``: Set, Delete, Learn, Ignore."""

    meta: Meta
    staged_action: str
    spec: CalicoPolicySpec


@dataclass(frozen=True, slots=True)
class StagedGlobalNetworkPolicy:
    """projectcalico.org/v3 StagedGlobalNetworkPolicy."""

    meta: Meta
    staged_action: str
    spec: CalicoPolicySpec


@dataclass(frozen=True, slots=True)
class Tier:
    """projectcalico.org/v3 Tier. ``order`` None as written; ``default_action``: Deny or Pass."""

    meta: Meta
    order: float | None
    default_action: str


@dataclass(frozen=True, slots=True)
class NetworkSet:
    """projectcalico.org/v3 NetworkSet and GlobalNetworkSet (``meta.namespace`` == ""). Nets are masked."""

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
    """projectcalico.org/v3 HostEndpoint; ``interface`` may be "*" or None."""

    meta: Meta
    node: str
    interface: str | None
    expected_ips: tuple[IPAddress, ...]
    profiles: tuple[str, ...]
    ports: tuple[EndpointPort, ...]


@dataclass(frozen=True, slots=True)
class WorkloadEndpoint:
    """projectcalico.org/v3 WorkloadEndpoint (VMs, taps, pods not known to Kubernetes)."""

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
    """An entry of a list of failsafe ports. ``protocol``: IANA number (6, 17); ``net`` None: any remote address."""

    protocol: int
    port: int
    net: IPNetwork | None = None


@dataclass(frozen=True, slots=True)
class FelixConfiguration:
    """projectcalico.org/v3 FelixConfiguration; a list is None where it is not given, () where it is given empty."""

    meta: Meta
    failsafe_inbound: tuple[FailsafePort, ...] | None = None
    failsafe_outbound: tuple[FailsafePort, ...] | None = None


@dataclass(frozen=True, slots=True)
class HostEndpointTemplate:
    """A template of automatic host endpoints.

    ``nets``: the node's addresses that count; ``pattern``: a regular expression that is searched in the names of its
    interfaces; ``node_selector`` None: all nodes.
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
    """The subject of a policy: exactly one of the two fields is given."""

    namespaces: LabelSelector | None = None
    pods: NamespacedPodSelector | None = None


@dataclass(frozen=True, slots=True)
class SigPeer:
    """One peer; ``unknown`` is True for a peer of a newer API (fails closed), then all other fields are empty.

    ``same_labels``/``not_same_labels``: the older v1alpha1 forms; they narrow the ``namespaces`` or ``pods`` beside
    them, with a namespace selector that matches everything.
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
    """A protocols[]/ports[] entry: protocol number (None with ``named_port``), inclusive range (0-0: all), or a name."""

    protocol: int | None
    first: int = 0
    last: int = 0
    named_port: str | None = None
    unknown: bool = False


@dataclass(frozen=True, slots=True)
class SigRule:
    """``action``: Accept/Allow (normalised to "Allow"), Deny or Pass. ``ports`` None: everything incl. ICMP."""

    name: str
    action: str
    peers: tuple[SigPeer, ...]
    ports: tuple[SigPort, ...] | None
    location: Location


@dataclass(frozen=True, slots=True)
class ClusterNetworkPolicy:
    """v1alpha2 ClusterNetworkPolicy; ``tier``: Admin or Baseline."""

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
    """v1alpha1 BaselineAdminNetworkPolicy (a singleton named default)."""

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
