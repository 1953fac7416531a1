# SPDX-License-Identifier: Apache-2.0
"""Objects of unknown kinds: either objects of other programs, or objects with a misspelt kind or apiVersion.

`helm template` and `kubectl get all` write Deployments and ConfigMaps into the same files as policies. Objects of other
programs are skipped and counted.

Invariant: an object whose kind or apiVersion is probably misspelt is not skipped, because its policy would not be
enforced and nothing would say so.  In an API group whose kinds are all known, every other kind is an error.  In other
groups, a kind and group with names similar to known ones are an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import get_close_matches

from netpol_ebpf.resources.reader import suggestion

KindName = tuple[str, str]
"""(apiVersion, kind)."""

_CALICO = (
    *(
        "AlertException",
        "BFDConfiguration",
        "BGPConfiguration",
        "BGPFilter",
        "BGPPeer",
        "BlockAffinity",
        "CalicoNodeStatus",
    ),
    *("ClusterInformation", "DeepPacketInspection", "EgressGatewayPolicy", "ExternalNetwork", "GlobalAlert"),
    *("GlobalAlertTemplate", "GlobalReport", "GlobalReportType", "GlobalThreatFeed", "IPAMConfiguration", "IPPool"),
    *("IPReservation", "LicenseKey", "LiveMigration", "ManagedCluster", "Node", "PacketCapture"),
    *(
        "PolicyRecommendationScope",
        "RemoteClusterConfiguration",
        "SecurityEventWebhook",
        "UISettings",
        "UISettingsGroup",
    ),
)
_OTHER_KINDS: dict[str, frozenset[str]] = {
    "": frozenset((
        *("Binding", "ComponentStatus", "ConfigMap", "Endpoints", "Event", "LimitRange", "PersistentVolume"),
        *("PersistentVolumeClaim", "PodTemplate", "ReplicationController", "ResourceQuota", "Secret"),
    )),
    "networking.k8s.io": frozenset(("ClusterCIDR", "IPAddress", "Ingress", "IngressClass", "ServiceCIDR")),
    "projectcalico.org": frozenset(_CALICO),
    "crd.projectcalico.org": frozenset((*_CALICO, "IPAMBlock", "IPAMConfig", "IPAMHandle", "Profile")),
}  # fmt: skip
"""For each API group of which the agent reads some kinds: the other kinds of the group.

The kinds are those of Kubernetes 1.34, Calico 3.31 and Calico's commercial edition.
"""

_NEAR = 0.8
"""Similarity above which an API group is probably a misspelling of another one; arbitrary.

One or two wrong letters in `networking.k8s.io` give this similarity.
"""
_POLICY = re.compile(r"NetworkPolicy\Z")


def find_slip(api_version: str, kind: str, known: Collection[KindName]) -> tuple[str, str] | None:
    """The misspelling in an object of an unknown kind, as (field, message).

    None if the object is of another program.
    ``known``: the kinds that the author may have meant.
    """
    group = group_of(api_version)
    groups = {group_of(version) for version, _ in known}
    if group in groups:
        if kind in _OTHER_KINDS.get(group, ()):
            return None
        near = [(version, name) for version, name in known if group_of(version) == group]
        return _wrong_version(api_version, kind, near) or _wrong_version(api_version, kind, known) or (
            "kind", _unknown_kind(api_version, kind, near),
        )  # fmt: skip
    near_groups = get_close_matches(group, groups - {""}, cutoff=_NEAR)
    near = [(version, name) for version, name in known if group_of(version) in near_groups]
    if suggestion(kind, [name for _, name in near]):
        return _wrong_version(api_version, kind, near) or ("kind", _unknown_kind(api_version, kind, near))
    if "." not in group or group.endswith(".k8s.io"):  # a group of Kubernetes itself
        return _wrong_version(api_version, kind, known)
    return None


def is_policy(kind: str) -> bool:
    """Whether ``kind``, a kind of another program, has the name of a network policy.

    Such a policy is not enforced here.
    """
    return _POLICY.search(kind) is not None


def group_of(api_version: str) -> str:
    """The API group of an apiVersion; "" for the core group."""
    return api_version.rpartition("/")[0]


def _wrong_version(api_version: str, kind: str, known: Collection[KindName]) -> tuple[str, str] | None:
    versions = [version for version, name in known if name == kind]
    if not versions:
        return None
    return "apiVersion", f'unknown apiVersion "{api_version}" of {kind}; write {" or ".join(versions)}'


def _unknown_kind(api_version: str, kind: str, known: Collection[KindName]) -> str:
    by_version: dict[str, list[str]] = {}
    for version, name in known:
        by_version.setdefault(version, []).append(name)
    read = "; ".join(f"{version}: {', '.join(names)}" for version, names in by_version.items())
    near = suggestion(kind, [name for _, name in known])
    return f"unknown kind {kind} of {api_version}{near}; what is read: {read}"
