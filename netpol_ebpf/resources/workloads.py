# SPDX-License-Identifier: Apache-2.0
"""Deployments and other objects that make pods, as pods where there is no cluster.

Charts and repositories contain workloads, not pods.  For `check`, `explain` and `test` the template of a workload is
therefore a pod with the template's labels, service account and ports, named ``KIND/NAME``, which no real pod can have
as name.  The agent does not read these kinds: a node has the pods themselves.

Invariant: such a pod has no address until a caller of `as_cluster` requests one, so no statement about addresses of
pods applies to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from ipaddress import ip_network

from netpol_ebpf.errors import InvalidInputError
from netpol_ebpf.resources.core import NAMESPACE_NAME_LABEL, any_name, read_template
from netpol_ebpf.resources.kind import Kind
from netpol_ebpf.resources.reader import Reader
from netpol_ebpf.resources.sharing import share_texts
from netpol_ebpf.resources.types import Meta, Namespace, NetworkSet, Pod, Resource, WorkloadEndpoint

STAND_INS = (ip_network("240.0.0.0/4"), ip_network("100::/64"))
"""Address ranges that no pod has: the reserved range of RFC 1112, and that of RFC 6666 for packets that are discarded.
"""

_TEMPLATES: dict[tuple[str, str], tuple[str, ...]] = {
    ("apps/v1", "DaemonSet"): ("spec", "template"),
    ("apps/v1", "Deployment"): ("spec", "template"),
    ("apps/v1", "ReplicaSet"): ("spec", "template"),
    ("apps/v1", "StatefulSet"): ("spec", "template"),
    ("batch/v1", "CronJob"): ("spec", "jobTemplate", "spec", "template"),
    ("batch/v1", "Job"): ("spec", "template"),
    ("v1", "PodTemplate"): ("template",),
    ("v1", "ReplicationController"): ("spec", "template"),
}
"""By kind, the path of the pod template."""
_KIND_NAMES = frozenset(kind for _, kind in _TEMPLATES)


def _parser(kind: str, path: tuple[str, ...]) -> Callable[[Reader, Meta], Pod]:
    def parse(obj: Reader, meta: Meta) -> Pod:
        template = obj
        for key in path:
            template = template.mapping(key) or Reader({}, (*template.path, key), obj.report)
        metadata = template.mapping("metadata")
        labels = {} if metadata is None else metadata.string_map("labels")
        if kind == "Job":  # its controller adds these
            labels = {"job-name": meta.name, "batch.kubernetes.io/job-name": meta.name, **labels}
        return read_template(template, replace(meta, name=f"{kind}/{meta.name}", labels=share_texts(labels)))

    return parse


KINDS = tuple(
    Kind(version, kind, namespaced=True, parse=_parser(kind, path), check_name=any_name, strict=False)
    for (version, kind), path in _TEMPLATES.items()
)


def as_cluster(resources: Iterable[Resource], *, addressed: bool = False) -> list[Resource]:
    """The resources of a cluster with these workloads: their namespaces exist, with no label but that of their name.

    A namespace that is not given stays absent if it has a pod with an address, or a network set: a Namespace would
    change what is allowed to that pod, while the agent has none. ``addressed``: each pod of a workload also gets an
    address of `STAND_INS` of each family, and the workload's own name where no pod and no other workload of its
    namespace has it.
    """
    given = list(resources)
    pods = [one for one in given if _is_of_workload(one)]
    settled = {one.meta.name for one in given if isinstance(one, Namespace)}
    settled |= {one.meta.namespace for one in given if isinstance(one, NetworkSet) or _has_address(one)}
    for pod in pods:
        namespace = pod.meta.namespace
        if namespace not in settled:
            settled.add(namespace)
            given.append(Namespace(Meta(namespace, "", {NAMESPACE_NAME_LABEL: namespace}, pod.meta.location)))
    return list(_addressed(given)) if addressed and pods else given


def _addressed(resources: list[Resource]) -> Iterator[Resource]:
    taken = Counter(_own_name(one) for one in resources if isinstance(one, (Pod, WorkloadEndpoint)))
    number = 0
    for one in resources:
        if not (isinstance(one, Pod) and _is_of_workload(one)):
            yield one
            continue
        number += 1
        name = one.meta.name if taken[_own_name(one)] > 1 else _own_name(one)[1]
        addresses = tuple(network[number] for network in STAND_INS)
        yield replace(one, meta=replace(one.meta, name=name), addresses=addresses)


def stand_in_notes(resources: Iterable[Resource], ends: Iterable[object]) -> Iterator[str]:
    """A note for each (namespace, name) of ``ends`` that is a workload with a stand-in address, instead of a pod.

    Raises InvalidInputError for a name that several workloads have and no pod.
    """
    pods = [one for one in resources if isinstance(one, (Pod, WorkloadEndpoint))]
    for end in ends:
        named = [one for one in pods if _own_name(one) == end]
        exact = [one for one in named if one.meta.name == one.meta.name.rpartition("/")[2]]
        if len(named) > 1 and not exact:
            kinds = " and ".join(one.meta.name for one in named)
            raise InvalidInputError(
                f"{'/'.join(map(str, end))} is ambiguous: {kinds}",  # type: ignore[call-overload]
                hint="Give pods with names of their own, or only one of the workloads.",
            )
        for one in exact:
            if one.addresses and one.addresses[0] in STAND_INS[0]:
                addresses = " and ".join(map(str, one.addresses))
                yield (
                    f"{one.meta.namespace}/{one.meta.name} is a workload without a pod here: {addresses} stand for the addresses of "
                    "its pods, so rules about networks may judge those otherwise"
                )


def _is_of_workload(resource: Resource) -> bool:
    return isinstance(resource, Pod) and resource.meta.name.partition("/")[0] in _KIND_NAMES and not resource.addresses


def _has_address(resource: Resource) -> bool:
    return isinstance(resource, (Pod, WorkloadEndpoint)) and bool(resource.addresses)


def _own_name(resource: Resource) -> tuple[str, str]:
    """Namespace and name; for a workload's pod, the name of the workload."""
    return resource.meta.namespace, resource.meta.name.rpartition("/")[2]
