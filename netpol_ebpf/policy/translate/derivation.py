# SPDX-License-Identifier: Apache-2.0
"""The incremental translation of a cluster's resources into a `World`.

Invariants: the world depends on the present resources alone, not on the order in which they were added and removed.
The cost of a call depends on the number of objects that it changes (the given object, the objects that inherit a
profile's changed labels, the slices of one service), not on the size of the cluster. An internal object that is equal
to the previous one is not a change.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, ClassVar, TypeVar

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
from netpol_ebpf.resources import types as api
from netpol_ebpf.resources.calico_configuration import DEFAULT
from netpol_ebpf.resources.calico_storage import unprefixed
from netpol_ebpf.resources.types import Resource

K = TypeVar("K")
V = TypeVar("V")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class TranslatedKind:
    """The translation of one kind of resource into objects of a `World`.

    ``resource``: the type of the parsed resource (`netpol_ebpf.resources.load.KINDS` has the API names and parsers).
    ``name``: the kind in the `ResourceKey` of a resource.
    ``cluster_name``: the kind in the `ResourceKey` of a resource without a namespace; "" if it is the same as ``name``.
    ``derive``: called with (derivation, key, old resource, new resource) to update the world for one changed resource.
    A resource is None if it does not exist at that time.
    ``policy``, ``endpoint``: translate a resource that is a policy or an endpoint.
    ``profiles``: returns the names of the profiles from which a resource inherits labels.
    ``related_keys``: returns tuples of namespace label keys.  The translation of a policy depends on the values of
    these labels.
    """

    resource: type[Resource]
    name: str
    derive: Callable[[Derivation, ResourceKey, Any, Any], None]
    cluster_name: str = ""
    policy: Callable[[PolicyKey, Any, signetwork.DistinctValues], Policy | None] | None = None
    endpoint: Callable[[EndpointKey, Any, endpoints.ProfileLabels], Endpoint | None] | None = None
    profiles: Callable[[Any], tuple[str, ...]] = lambda _: ()
    related_keys: Callable[[Any], frozenset[tuple[str, ...]]] = lambda _: frozenset()


def _alone(
    translate: Callable[[PolicyKey, R], Policy | None],
) -> Callable[[PolicyKey, R, signetwork.DistinctValues], Policy | None]:
    """Wrap the translation of policies that do not depend on namespace labels, for `TranslatedKind.policy`."""
    return lambda key, policy, _: translate(key, policy)


_CONTROLLERS = ResourceKey("KubeControllersConfiguration", "", DEFAULT)
"""The key of the only KubeControllersConfiguration that is used."""

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
"""Tiers that always exist. Tier objects of these names are ignored."""


def key_of(resource: Resource) -> ResourceKey:
    """The key under which `Derivation` stores a resource. The key of an endpoint's resource is an `EndpointKey`."""
    kind, meta = Derivation.kinds[type(resource)], resource.meta
    name = kind.name if meta.namespace or not kind.cluster_name else kind.cluster_name
    return (ResourceKey if kind.endpoint is None else EndpointKey)(name, meta.namespace, meta.name)


def derive(objects: Iterable[Resource], settings: PolicySettings | None = None) -> World:
    """The world of ``objects``. Of two resources with the same key the later one is used."""
    derivation = Derivation(settings)
    for resource in objects:
        derivation.upsert(resource)
    return derivation.world


class Derivation:
    """Stores resources, and translates each change of a resource into a change of ``world``.

    ``world`` is read-only for callers.  `upsert`, `remove` and `set_tunnels` change it.
    """

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
        # Destination -> key of each resource with this destination -> destination with the backends from this
        # resource.
        self._vips: defaultdict[VipKey, dict[ResourceKey, Vip]] = defaultdict(dict)
        self._namespace_values: dict[tuple[str, ...], Counter[signetwork.LabelValues]] = {}
        self._related: defaultdict[tuple[str, ...], set[ResourceKey]] = defaultdict(set)
        self._configurations: dict[str, api.FelixConfiguration] = {}
        # Key of the endpoint -> name of the node -> endpoint.
        self._automatic: defaultdict[EndpointKey, dict[str, Endpoint]] = defaultdict(dict)
        self._automatic_of: dict[str, tuple[EndpointKey, ...]] = {}
        self._derive_profile(endpoints.DEFAULT_ALLOW)

    def upsert(self, resource: Resource, key: ResourceKey | None = None) -> None:
        """Add a resource, or replace the resource with the same key.

        ``key``: the resource's key, if the caller has it already.  Sharing the key object saves memory.
        """
        key = key_of(resource) if key is None else key
        old = self._resources.get(key)
        self._resources[key] = resource
        self._derive(key, old, resource)

    def remove(self, kind: str, namespace: str, name: str) -> None:
        """Remove a resource. If there is no such resource, nothing changes. ``kind``: as in `ResourceKey`."""
        old = self._resources.pop(ResourceKey(kind, namespace, name), None)
        if old is not None:
            self._derive(key_of(old), old, None)

    def get(self, key: ResourceKey) -> Resource | None:
        """The resource with this key, or None."""
        return self._resources.get(key)

    def resources(self) -> Collection[Resource]:
        """All resources; read-only, and valid until the next change."""
        return self._resources.values()

    @property
    def is_changed(self) -> bool:
        """Whether ``world`` changed since the last call of `take_changes`."""
        return bool(self._changes)

    def set_tunnels(self, tunnels: Iterable[Tunnel]) -> None:
        """Replace the set of encapsulations in which nodes send each other packets."""
        self._given = replace(self._given, tunnels=frozenset(tunnels))
        self._derive_settings()

    def take_changes(self) -> Changes:
        """Return the changes of ``world`` since the last call.

        The first call returns all objects, also built-in ones.
        """
        changes, self._changes = self._changes, Changes()
        return changes

    # --- one resource ---------------------------------------------------------------------------------------------------

    def _derive(self, key: ResourceKey, old: Resource | None, new: Resource | None) -> None:
        """Update the world for one changed resource.

        ``old``, ``new``: the resource before and after the change; None if it does not exist at that time.
        """
        resource = new if new is not None else old
        self.kinds[type(resource)].derive(self, key, old, new)

    def _derive_owner(self, key: ResourceKey, old: Resource | None, new: Resource | None) -> None:
        """Update the endpoint or network set of one changed resource."""
        self._inherit(key, old, new)
        self._derive_heir(key)
        self._share_vips(key, endpoints.host_ports(old), endpoints.host_ports(new))

    def _derive_namespace(self, key: ResourceKey, old: api.Namespace | None, new: api.Namespace | None) -> None:
        self._derive_profile(endpoints.namespace_profile(key.name))
        self._count_values(old, new)

    def _derive_service_account(self, key: ResourceKey, _old: Resource | None, _new: Resource | None) -> None:
        self._derive_profile(endpoints.service_account_profile(key.namespace, key.name))

    def _derive_written_profile(self, key: ResourceKey, _old: Resource | None, _new: Resource | None) -> None:
        self._derive_profile(key.name)

    def _derive_node(self, key: ResourceKey, _old: api.Node | None, new: api.Node | None) -> None:
        node = None if new is None else endpoints.node(new)
        _put(self.world.nodes, self._changes.nodes, key.name, node)
        self._derive_automatic_hosts(key.name)

    def _derive_controllers(self, _key: ResourceKey, _old: Resource | None, _new: Resource | None) -> None:
        for name in self.world.nodes:
            self._derive_automatic_hosts(name)

    def _derive_configuration(
        self, key: ResourceKey, _old: Resource | None, new: api.FelixConfiguration | None
    ) -> None:
        self._configurations.pop(key.name, None)
        if new is not None:
            self._configurations[key.name] = new
        self._derive_settings()

    def _derive_tier(self, key: ResourceKey, _old: api.Tier | None, new: api.Tier | None) -> None:
        if key.name not in BUILT_IN_TIERS:
            tier = None if new is None else calico.translate_tier(new)
            _put(self.world.tiers, self._changes.tiers, key.name, tier)

    def _derive_service(self, key: ResourceKey, old: Resource | None, _new: Resource | None) -> None:
        self._derive_vips((key.namespace, key.name), old)

    def _derive_settings(self) -> None:
        settings = hosts.with_failsafes(self._given, self._configurations.values())
        if settings != self.world.settings:
            self.world.settings = self._changes.settings = settings

    def _derive_automatic_hosts(self, node: str) -> None:
        configuration, resource = self._resources.get(_CONTROLLERS), self._resources.get(ResourceKey("Node", "", node))
        wanted: Mapping[EndpointKey, Endpoint] = {}
        if isinstance(configuration, api.KubeControllersConfiguration) and isinstance(resource, api.Node):
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

    def _derive_changed_policy(self, key: ResourceKey, old: Resource | None, new: Resource | None) -> None:
        self._relate(key, old, new)
        self._derive_policy(key)
        changed = new if new is not None else old
        name = "" if changed is None or changed.meta.is_stored else unprefixed(changed.meta.name)
        if name:
            self._derive_policy(key._replace(name=name))  # perhaps the stored form of the same policy

    def _is_stored_copy(self, key: ResourceKey, resource: Resource) -> bool:
        """Whether a stored policy is also there as projectcalico.org/v3, under the name with which it is stored."""
        if not resource.meta.stored_name:
            return False
        current = self._resources.get(key._replace(name=resource.meta.stored_name))
        return current is not None and not current.meta.is_stored

    def _derive_policy(self, key: ResourceKey) -> None:
        resource, policy_key, policy = self._resources.get(key), PolicyKey(*key), None
        if resource is not None and self._is_stored_copy(key, resource):
            resource = None
        translate = None if resource is None else self.kinds[type(resource)].policy
        if translate is not None:
            policy = translate(policy_key, resource, lambda keys: self._namespace_values[keys])
        _put(self.world.policies, self._changes.policies, policy_key, policy)

    def _derive_slice(self, key: ResourceKey, old: api.EndpointSlice | None, new: api.EndpointSlice | None) -> None:
        touched = set()
        if old is not None and old.service:
            touched.add((key.namespace, old.service))
            del self._slices[key.namespace, old.service][key]
        if new is not None and new.service:
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
        """Update the destinations that nodes translate for one service.

        Other services may have the same destinations.
        ``name``: namespace and name of the service.
        ``old``: the Service before the change; None if it did not exist.
        """
        owner = ResourceKey("Service", *name)
        slices = [self._resources[key] for key in self._slices.get(name, ())]
        self._share_vips(owner, endpoints.vips(old, ()), endpoints.vips(self._resources.get(owner), slices))

    def _share_vips(self, owner: ResourceKey, old: Iterable[Vip], new: Iterable[Vip]) -> None:
        """Replace the destinations ``old`` of the object ``owner`` by ``new``.

        Other objects may have the same destinations.
        """
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
        """Record the profiles from which the resource ``new`` inherits labels, in place of those of ``old``."""
        for profile in self._profiles_of(old):
            self._heirs[profile].discard(key)
            if not self._heirs[profile]:
                del self._heirs[profile]
        for profile in self._profiles_of(new):
            self._heirs[profile].add(key)

    def _profiles_of(self, resource: Resource | None) -> tuple[str, ...]:
        return () if resource is None else self.kinds[type(resource)].profiles(resource)

    def _derive_heir(self, key: ResourceKey) -> None:
        """Update an endpoint or a network set from its resource and the labels of its profiles."""
        resource = self._resources.get(key)
        if not isinstance(key, EndpointKey):
            held = endpoints.network_set(resource, self._labels_of) if isinstance(resource, api.NetworkSet) else None
            name = endpoints.network_set_key(key.namespace, key.name)
            _put(self.world.network_sets, self._changes.network_sets, name, held)
            return
        endpoint = None
        translate = None if resource is None else self.kinds[type(resource)].endpoint
        if translate is not None:
            endpoint = translate(key, resource, self._labels_of)
        elif key in self._automatic:  # no resource of a user has the key; of several nodes, the first by name counts
            endpoint = min(self._automatic[key].items())[1]
        _put(self.world.endpoints, self._changes.endpoints, key, endpoint)

    def _labels_of(self, profile: str) -> Mapping[str, str]:
        return self._profile_labels.get(profile, {})

    def _derive_profile(self, name: str) -> None:
        """Update a profile. If its labels changed, update all objects that inherit them."""
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
        """The rules of the profile ``name``, and the labels that endpoints inherit from it.

        A profile is built in, or belongs to a namespace or service account, or is a Profile object, in this order of
        precedence.  The rules are None if the profile does not exist.
        """
        if name == endpoints.DEFAULT_ALLOW:
            return endpoints.allow_all(name), {}
        derived = self._profile_source(name)
        if isinstance(derived, api.Namespace):
            return endpoints.allow_all(name), endpoints.namespace_labels(derived.meta)
        if isinstance(derived, api.ServiceAccount):
            return ProfileRules(name), endpoints.service_account_labels(derived.meta)
        written = self._resources.get(ResourceKey("Profile", "", name))
        if isinstance(written, api.Profile):
            return calico.translate_profile(written), dict(written.labels_to_apply)
        return None, {}

    def _profile_source(self, name: str) -> Resource | None:
        """The Namespace or ServiceAccount to which a profile's name refers."""
        family, _, rest = name.partition(".")
        if family == "kns":
            return self._resources.get(ResourceKey("Namespace", "", rest))
        if family == "ksa":
            namespace, _, account = rest.partition(".")  # only the account's name can contain dots
            return self._resources.get(ResourceKey("ServiceAccount", namespace, account))
        return None

    # --- policies that compare namespaces -------------------------------------------------------------------------------

    def _relate(self, key: ResourceKey, old: Resource | None, new: Resource | None) -> None:
        """Record the namespace label keys on which a policy depends. From then on their values are counted."""
        for keys in self._related_keys(old):
            self._related[keys].discard(key)
        for keys in self._related_keys(new):
            self._related[keys].add(key)
            if keys not in self._namespace_values:
                namespaces = (one for one in self._resources.values() if isinstance(one, api.Namespace))
                self._namespace_values[keys] = Counter(_values(one, keys) for one in namespaces)
        for keys in self._related_keys(old):
            if not self._related[keys]:
                del self._related[keys], self._namespace_values[keys]

    def _related_keys(self, resource: Resource | None) -> frozenset[tuple[str, ...]]:
        return frozenset() if resource is None else self.kinds[type(resource)].related_keys(resource)

    def _count_values(self, old: api.Namespace | None, new: api.Namespace | None) -> None:
        """Update the counts of label values for one changed namespace.

        If the set of values changed, the policies that depend on it are translated again.
        """
        for keys, counts in self._namespace_values.items():
            before = set(counts)
            if old is not None:
                counts[_values(old, keys)] -= 1
            if new is not None:
                counts[_values(new, keys)] += 1
            self._namespace_values[keys] = +counts
            if self._namespace_values[keys].keys() != before:
                for key in self._related[keys]:
                    self._derive_policy(key)

    # --- the kinds ------------------------------------------------------------------------------------------------------

    kinds: ClassVar[Mapping[type, TranslatedKind]] = {
        kind.resource: kind
        for kind in (
            TranslatedKind(api.Namespace, "Namespace", _derive_namespace),
            TranslatedKind(api.ServiceAccount, "ServiceAccount", _derive_service_account),
            TranslatedKind(api.Profile, "Profile", _derive_written_profile),
            TranslatedKind(api.Node, "Node", _derive_node),
            TranslatedKind(api.Service, "Service", _derive_service),
            TranslatedKind(api.EndpointSlice, "EndpointSlice", _derive_slice),
            TranslatedKind(api.Tier, "Tier", _derive_tier),
            TranslatedKind(api.FelixConfiguration, "FelixConfiguration", _derive_configuration),
            TranslatedKind(api.KubeControllersConfiguration, _CONTROLLERS.kind, _derive_controllers),
            TranslatedKind(
                api.NetworkSet, "NetworkSet", _derive_owner,
                cluster_name="GlobalNetworkSet", profiles=endpoints.network_set_profiles,
            ),
            TranslatedKind(
                api.Pod, "Pod", _derive_owner,
                endpoint=endpoints.pod_endpoint, profiles=endpoints.pod_profiles,
            ),
            TranslatedKind(
                api.WorkloadEndpoint, "WorkloadEndpoint", _derive_owner,
                endpoint=endpoints.workload_endpoint, profiles=attrgetter("profiles"),
            ),
            TranslatedKind(
                api.HostEndpoint, endpoints.HOST_ENDPOINT, _derive_owner,
                endpoint=endpoints.host_endpoint, profiles=attrgetter("profiles"),
            ),
            TranslatedKind(
                api.KubernetesNetworkPolicy, "KubernetesNetworkPolicy", _derive_changed_policy,
                policy=_alone(kubernetes.translate_network_policy),
            ),
            TranslatedKind(
                api.StagedKubernetesNetworkPolicy, "StagedKubernetesNetworkPolicy", _derive_changed_policy,
                policy=_alone(kubernetes.translate_staged_network_policy),
            ),
            TranslatedKind(
                api.CalicoNetworkPolicy, "NetworkPolicy", _derive_changed_policy,
                policy=_alone(calico.translate_policy),
            ),
            TranslatedKind(
                api.GlobalNetworkPolicy, "GlobalNetworkPolicy", _derive_changed_policy,
                policy=_alone(calico.translate_policy),
            ),
            TranslatedKind(
                api.StagedNetworkPolicy, "StagedNetworkPolicy", _derive_changed_policy,
                policy=_alone(calico.translate_staged_policy),
            ),
            TranslatedKind(
                api.StagedGlobalNetworkPolicy, "StagedGlobalNetworkPolicy", _derive_changed_policy,
                policy=_alone(calico.translate_staged_policy),
            ),
            TranslatedKind(
                api.ClusterNetworkPolicy, "ClusterNetworkPolicy", _derive_changed_policy,
                policy=signetwork.translate_cluster_policy,
            ),
            TranslatedKind(
                api.AdminNetworkPolicy, "AdminNetworkPolicy", _derive_changed_policy,
                policy=signetwork.translate_admin_policy, related_keys=signetwork.related_keys,
            ),
            TranslatedKind(
                api.BaselineAdminNetworkPolicy, "BaselineAdminNetworkPolicy", _derive_changed_policy,
                policy=signetwork.translate_baseline_policy, related_keys=signetwork.related_keys,
            ),
        )
    }  # fmt: skip
    """Every kind that is translated, by the type of its parsed resources. To add a kind, add one entry here."""


def _values(namespace: api.Namespace, keys: tuple[str, ...]) -> signetwork.LabelValues:
    return tuple(namespace.meta.labels.get(key) for key in keys)


def _put(table: dict[K, V], changes: dict[K, V | None], key: K, value: V | None) -> None:
    """Write one object of the world. ``value`` None removes it. A difference is recorded in ``changes``."""
    if table.get(key) != value:
        changes[key] = value
    if value is None:
        table.pop(key, None)
    else:
        table[key] = value
