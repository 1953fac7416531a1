# SPDX-License-Identifier: Apache-2.0
"""The incremental translation of a cluster's resources into a `World`.

Invariants: state, not history: after any sequence of calls the world is that of the resources now held, whatever the order in
which they came.  Cost of a call: what it affects (the object, the heirs of a profile whose labels changed, the slices of
one service), never the cluster.  An object derived equal to what it was is not a change.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from netpol_ebpf.policy.translate import calico, endpoints, hosts, kubernetes, signetwork
from netpol_ebpf.policy.types import (
    Action,
    Backend,
    Changes,
    Endpoint,
    EndpointKey,
    Policy,
    PolicyKey,
    PolicySettings,
    PolicyTier,
    ProfileRules,
    ResourceKey,
    ServiceBackends,
    Tunnel,
    Vip,
    VipKey,
    World,
)
from netpol_ebpf.resources import types as resources
from netpol_ebpf.resources.calico_configuration import DEFAULT
from netpol_ebpf.resources.types import Resource

K = TypeVar("K")
V = TypeVar("V")


GLOBAL_NETWORK_SET = "GlobalNetworkSet"

_KINDS: Mapping[type, str] = {
    resources.Namespace: "Namespace",
    resources.ServiceAccount: "ServiceAccount",
    resources.Pod: endpoints.POD,
    resources.Node: "Node",
    resources.Service: "Service",
    resources.EndpointSlice: "EndpointSlice",
    resources.KubernetesNetworkPolicy: kubernetes.KIND,
    resources.StagedKubernetesNetworkPolicy: kubernetes.STAGED_KIND,
    resources.CalicoNetworkPolicy: calico.NETWORK_POLICY,
    resources.GlobalNetworkPolicy: calico.GLOBAL_NETWORK_POLICY,
    resources.StagedNetworkPolicy: calico.STAGED_NETWORK_POLICY,
    resources.StagedGlobalNetworkPolicy: calico.STAGED_GLOBAL_NETWORK_POLICY,
    resources.Tier: "Tier",
    resources.NetworkSet: "NetworkSet",
    resources.HostEndpoint: endpoints.HOST_ENDPOINT,
    resources.WorkloadEndpoint: endpoints.WORKLOAD_ENDPOINT,
    resources.Profile: "Profile",
    resources.FelixConfiguration: "FelixConfiguration",
    resources.KubeControllersConfiguration: "KubeControllersConfiguration",
    resources.ClusterNetworkPolicy: signetwork.CLUSTER,
    resources.AdminNetworkPolicy: signetwork.ADMIN,
    resources.BaselineAdminNetworkPolicy: signetwork.BASELINE,
}

_CONTROLLERS = ResourceKey("KubeControllersConfiguration", "", DEFAULT)
"""The only object of its kind that counts."""

BUILT_IN_TIERS: Mapping[str, PolicyTier] = {
    tier.name: tier
    for tier in (
        signetwork.KUBE_ADMIN,
        signetwork.OLD_ADMIN,
        PolicyTier(kubernetes.TIER, calico.UNORDERED_TIER, Action.DENY),
        signetwork.KUBE_BASELINE,
        signetwork.OLD_BASELINE,
    )
}
"""They always exist, and no Tier object changes them."""


def key_of(resource: Resource) -> ResourceKey:
    """The key under which `Derivation` holds a resource; of what stands for an endpoint, that of the endpoint."""
    kind = _KINDS[type(resource)]
    if isinstance(resource, (resources.Pod, resources.WorkloadEndpoint, resources.HostEndpoint)):
        return EndpointKey(kind, resource.meta.namespace, resource.meta.name)
    if isinstance(resource, resources.NetworkSet) and not resource.meta.namespace:
        kind = GLOBAL_NETWORK_SET
    return ResourceKey(kind, resource.meta.namespace, resource.meta.name)


def derive(objects: Iterable[Resource], settings: PolicySettings | None = None) -> World:
    """The world of these resources; of two with one key the later counts."""
    derivation = Derivation(settings)
    for resource in objects:
        derivation.upsert(resource)
    return derivation.world


class Derivation:
    """Holds resources and keeps ``world`` their translation. ``world`` must only be read; it changes with each call."""

    def __init__(self, settings: PolicySettings | None = None) -> None:
        self._given = settings or PolicySettings()
        self.world = World(settings=self._given)
        self.world.tiers.update(BUILT_IN_TIERS)
        self._changes = Changes(settings=self._given)
        self._changes.tiers.update(BUILT_IN_TIERS)
        self._resources: dict[ResourceKey, Resource] = {}
        self._profile_labels: dict[str, Mapping[str, str]] = {}
        self._heirs: defaultdict[str, set[ResourceKey]] = defaultdict(set)
        self._slices: defaultdict[tuple[str, str], dict[ResourceKey, frozenset[Backend]]] = defaultdict(dict)
        self._vips: defaultdict[VipKey, dict[ResourceKey, Vip]] = defaultdict(dict)  # by whose they are
        self._namespace_values: dict[tuple[str, ...], Counter[signetwork.LabelValues]] = {}
        self._related: defaultdict[tuple[str, ...], set[ResourceKey]] = defaultdict(set)
        self._configurations: dict[str, resources.FelixConfiguration] = {}
        self._automatic: defaultdict[EndpointKey, dict[str, Endpoint]] = defaultdict(dict)  # by the node they are of
        self._automatic_of: dict[str, tuple[EndpointKey, ...]] = {}
        self._derive_profile(endpoints.DEFAULT_ALLOW)

    def upsert(self, resource: Resource, key: ResourceKey | None = None) -> None:
        """Add a resource, or put it in the place of the one with its key. ``key``: that one, of somebody who holds it too."""
        key = key_of(resource) if key is None else key
        old = self._resources.get(key)
        self._resources[key] = resource
        self._derive(key, old, resource)

    def remove(self, kind: str, namespace: str, name: str) -> None:
        """Forget a resource; one that is not held is no change. ``kind`` as in `ResourceKey`."""
        old = self._resources.pop(ResourceKey(kind, namespace, name), None)
        if old is not None:
            self._derive(key_of(old), old, None)

    def get(self, key: ResourceKey) -> Resource | None:
        """The resource held under a key."""
        return self._resources.get(key)

    def resources(self) -> Collection[Resource]:
        """All resources held; for reading, and until the next change."""
        return self._resources.values()

    @property
    def is_changed(self) -> bool:
        """Whether there are changes to be taken."""
        return bool(self._changes)

    def set_tunnels(self, tunnels: Iterable[Tunnel]) -> None:
        """Say by which encapsulation nodes carry each other's packets, in place of what was said before."""
        self._given = replace(self._given, tunnels=frozenset(tunnels))
        self._derive_settings()

    def take_changes(self) -> Changes:
        """What changed in ``world`` since the last call (at first: everything, built-in objects too)."""
        changes, self._changes = self._changes, Changes()
        return changes

    # --- one resource ---------------------------------------------------------------------------------------------------

    def _derive(self, key: ResourceKey, old: Resource | None, new: Resource | None) -> None:
        """Bring the world in line with one resource that changed from ``old`` to ``new`` (None: absent)."""
        kind = type(new if new is not None else old)
        if kind in (resources.Pod, resources.WorkloadEndpoint, resources.HostEndpoint, resources.NetworkSet):
            self._inherit(key, old, new)
            self._derive_heir(key)
            self._share_vips(key, endpoints.host_ports(old), endpoints.host_ports(new))
        elif kind is resources.Namespace:
            self._derive_profile(endpoints.namespace_profile(key.name))
            self._count_values(old, new)
        elif kind is resources.ServiceAccount:
            self._derive_profile(endpoints.service_account_profile(key.namespace, key.name))
        elif kind is resources.Profile:
            self._derive_profile(key.name)
        elif kind is resources.EndpointSlice:
            self._derive_slice(key, old, new)
        elif kind is resources.Node:
            node = endpoints.node(new) if isinstance(new, resources.Node) else None
            _put(self.world.nodes, self._changes.nodes, key.name, node)
            self._derive_automatic_hosts(key.name)
        elif kind is resources.KubeControllersConfiguration:
            for name in self.world.nodes:
                self._derive_automatic_hosts(name)
        elif kind is resources.FelixConfiguration:
            self._configurations.pop(key.name, None)
            if isinstance(new, resources.FelixConfiguration):
                self._configurations[key.name] = new
            self._derive_settings()
        elif kind is resources.Tier:
            tier = calico.translate_tier(new) if isinstance(new, resources.Tier) else None
            if key.name not in BUILT_IN_TIERS:
                _put(self.world.tiers, self._changes.tiers, key.name, tier)
        elif kind is resources.Service:
            self._derive_vips((key.namespace, key.name), old)
        else:
            self._relate(key, old, new)
            self._derive_policy(key)

    def _derive_settings(self) -> None:
        settings = hosts.with_failsafes(self._given, self._configurations.values())
        if settings != self.world.settings:
            self.world.settings = self._changes.settings = settings

    def _derive_automatic_hosts(self, node: str) -> None:
        """The host endpoints that a node has without anybody writing them."""
        configuration, resource = self._resources.get(_CONTROLLERS), self._resources.get(ResourceKey("Node", "", node))
        wanted: Mapping[EndpointKey, Endpoint] = {}
        if isinstance(configuration, resources.KubeControllersConfiguration) and isinstance(resource, resources.Node):
            wanted = hosts.automatic_hosts(configuration, resource)
        for key in dict.fromkeys((*self._automatic_of.pop(node, ()), *wanted)):
            self._automatic[key].pop(node, None)
            if key in wanted:
                self._automatic[key][node] = wanted[key]
            if not self._automatic[key]:
                del self._automatic[key]
            self._derive_heir(key)
        if wanted:
            self._automatic_of[node] = tuple(wanted)

    def _derive_policy(self, key: ResourceKey) -> None:
        policy = self._policy(self._resources.get(key))
        _put(self.world.policies, self._changes.policies, PolicyKey(*key), policy)

    def _policy(self, resource: Resource | None) -> Policy | None:
        if isinstance(resource, resources.KubernetesNetworkPolicy):
            return kubernetes.translate_network_policy(resource)
        if isinstance(resource, resources.StagedKubernetesNetworkPolicy):
            return kubernetes.translate_staged_network_policy(resource)
        if isinstance(resource, (resources.CalicoNetworkPolicy, resources.GlobalNetworkPolicy)):
            return calico.translate_policy(resource)
        if isinstance(resource, (resources.StagedNetworkPolicy, resources.StagedGlobalNetworkPolicy)):
            return calico.translate_staged_policy(resource)
        if isinstance(
            resource,
            (resources.ClusterNetworkPolicy, resources.AdminNetworkPolicy, resources.BaselineAdminNetworkPolicy),
        ):
            return signetwork.translate(resource, lambda keys: self._namespace_values[keys])
        return None

    def _derive_slice(self, key: ResourceKey, old: Resource | None, new: Resource | None) -> None:
        touched = set()
        if isinstance(old, resources.EndpointSlice) and old.service:
            touched.add((key.namespace, old.service))
            del self._slices[key.namespace, old.service][key]
        if isinstance(new, resources.EndpointSlice) and new.service:
            touched.add((key.namespace, new.service))
            self._slices[key.namespace, new.service][key] = endpoints.backends(new)
        for name in touched:
            slices = self._slices[name]
            service = ServiceBackends(*name, frozenset().union(*slices.values())) if slices else None
            if not slices:
                del self._slices[name]
            _put(self.world.services, self._changes.services, name, service)
            self._derive_vips(name, self._resources.get(ResourceKey("Service", *name)))

    def _derive_vips(self, name: tuple[str, str], old: Resource | None) -> None:
        """The addresses of one service, which others may share; ``old``: what it was."""
        owner = ResourceKey("Service", *name)
        slices = [self._resources[key] for key in self._slices.get(name, ())]
        self._share_vips(owner, endpoints.vips(old, ()), endpoints.vips(self._resources.get(owner), slices))

    def _share_vips(self, owner: ResourceKey, old: Iterable[Vip], new: Iterable[Vip]) -> None:
        """Bring the addresses that ``owner`` is reached by in line, which others may share; ``old``: those it had."""
        wanted = {vip.key: vip for vip in new}
        for key in {vip.key for vip in old} | wanted.keys():
            if key in wanted:
                self._vips[key][owner] = wanted[key]
            else:
                self._vips[key].pop(owner, None)
            shares = self._vips[key].values()
            vip = Vip(key, frozenset().union(*(share.backends for share in shares))) if shares else None
            if vip is None:
                del self._vips[key]
            _put(self.world.vips, self._changes.vips, key, vip)

    # --- inheritance ----------------------------------------------------------------------------------------------------

    def _inherit(self, key: ResourceKey, old: Resource | None, new: Resource | None) -> None:
        """Note from which profiles a resource inherits labels."""
        for profile in _profiles(old):
            self._heirs[profile].discard(key)
            if not self._heirs[profile]:
                del self._heirs[profile]
        for profile in _profiles(new):
            self._heirs[profile].add(key)

    def _derive_heir(self, key: ResourceKey) -> None:
        """An endpoint or a network set, from its resource and the labels of its profiles."""
        resource = self._resources.get(key)
        if not isinstance(key, EndpointKey):
            held = (
                endpoints.network_set(resource, self._labels_of) if isinstance(resource, resources.NetworkSet) else None
            )
            name = endpoints.network_set_key(key.namespace, key.name)
            _put(self.world.network_sets, self._changes.network_sets, name, held)
            return
        endpoint = None
        if isinstance(resource, resources.Pod):
            endpoint = endpoints.pod_endpoint(key, resource, self._labels_of)
        elif isinstance(resource, resources.WorkloadEndpoint):
            endpoint = endpoints.workload_endpoint(key, resource, self._labels_of)
        elif isinstance(resource, resources.HostEndpoint):
            endpoint = endpoints.host_endpoint(key, resource, self._labels_of)
        elif key in self._automatic:  # one that is written takes its place; of two nodes' the first one's counts
            endpoint = min(self._automatic[key].items())[1]
        _put(self.world.endpoints, self._changes.endpoints, key, endpoint)

    def _labels_of(self, profile: str) -> Mapping[str, str]:
        return self._profile_labels.get(profile, {})

    def _derive_profile(self, name: str) -> None:
        """A profile and, when the labels it hands down changed, all its heirs."""
        profile, labels = self._profile(name)
        _put(self.world.profiles, self._changes.profiles, name, profile)
        if labels == self._labels_of(name):
            return
        self._profile_labels[name] = labels
        if not labels:
            del self._profile_labels[name]
        for key in self._heirs.get(name, ()):
            self._derive_heir(key)

    def _profile(self, name: str) -> tuple[ProfileRules | None, Mapping[str, str]]:
        """What stands behind a profile's name: the built-in, else a namespace or account, else a Profile object."""
        if name == endpoints.DEFAULT_ALLOW:
            return endpoints.allow_all(name), {}
        derived = self._profile_source(name)
        if isinstance(derived, resources.Namespace):
            return endpoints.allow_all(name), endpoints.namespace_labels(derived.meta)
        if isinstance(derived, resources.ServiceAccount):
            return ProfileRules(name), endpoints.service_account_labels(derived.meta)
        written = self._resources.get(ResourceKey("Profile", "", name))
        if isinstance(written, resources.Profile):
            return calico.translate_profile(written), dict(written.labels_to_apply)
        return None, {}

    def _profile_source(self, name: str) -> Resource | None:
        """The Namespace or ServiceAccount that a profile's name speaks of."""
        family, _, rest = name.partition(".")
        if family == "kns":
            return self._resources.get(ResourceKey("Namespace", "", rest))
        if family == "ksa":
            namespace, _, account = rest.partition(".")  # a namespace's name has no dots, an account's may
            return self._resources.get(ResourceKey("ServiceAccount", namespace, account))
        return None

    # --- policies that compare namespaces -------------------------------------------------------------------------------

    def _relate(self, key: ResourceKey, old: Resource | None, new: Resource | None) -> None:
        """Note on which namespace labels' values a policy depends, and count those values from then on."""
        for keys in _related_keys(old):
            self._related[keys].discard(key)
        for keys in _related_keys(new):
            self._related[keys].add(key)
            if keys not in self._namespace_values:
                namespaces = (one for one in self._resources.values() if isinstance(one, resources.Namespace))
                self._namespace_values[keys] = Counter(_values(one, keys) for one in namespaces)
        for keys in _related_keys(old):
            if not self._related[keys]:
                del self._related[keys], self._namespace_values[keys]

    def _count_values(self, old: Resource | None, new: Resource | None) -> None:
        """Keep the counts of label values over namespaces; derive again the policies that depend on a new set of values."""
        for keys, counts in self._namespace_values.items():
            before = set(counts)
            if isinstance(old, resources.Namespace):
                counts[_values(old, keys)] -= 1
            if isinstance(new, resources.Namespace):
                counts[_values(new, keys)] += 1
            self._namespace_values[keys] = +counts
            if self._namespace_values[keys].keys() != before:
                for key in self._related[keys]:
                    self._derive_policy(key)


def _profiles(resource: Resource | None) -> tuple[str, ...]:
    """The profiles whose labels a resource inherits."""
    if isinstance(resource, resources.Pod):
        return endpoints.pod_profiles(resource)
    if isinstance(resource, resources.NetworkSet):
        return endpoints.network_set_profiles(resource)
    if isinstance(resource, (resources.WorkloadEndpoint, resources.HostEndpoint)):
        return resource.profiles
    return ()


def _related_keys(resource: Resource | None) -> frozenset[tuple[str, ...]]:
    if isinstance(resource, (resources.AdminNetworkPolicy, resources.BaselineAdminNetworkPolicy)):
        return signetwork.related_keys(resource)
    return frozenset()


def _values(namespace: resources.Namespace, keys: tuple[str, ...]) -> signetwork.LabelValues:
    return tuple(namespace.meta.labels.get(key) for key in keys)


def _put(table: dict[K, V], changes: dict[K, V | None], key: K, value: V | None) -> None:
    """Write one object of the world, or take it out (None), and note it if that is a change."""
    if table.get(key) != value:
        changes[key] = value
    if value is None:
        table.pop(key, None)
    else:
        table[key] = value
