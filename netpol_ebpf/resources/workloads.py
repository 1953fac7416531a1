# SPDX-License-Identifier: Apache-2.0
"""Reads Deployments and other workloads as pods, for commands without a cluster.

Charts and repositories contain workloads, not pods.  So for `check`, `explain` and `test` the template of a workload is
a pod with the template's labels, service account and ports.  The pod's name is ``KIND/NAME``, which no real pod can
have.  The agent does not read these kinds, because in a cluster their pods exist.

Invariant: such a pod has no address unless a caller of `as_cluster` requests one.
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
"""The ranges of stand-in addresses, which no pod can have: reserved (RFC 1112), and discard-only (RFC 6666)."""

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
"""Maps (apiVersion, kind) to the path of the pod template in the object."""
_KIND_NAMES = frozenset(kind for _, kind in _TEMPLATES)


def _parser(kind: str, path: tuple[str, ...]) -> Callable[[Reader, Meta], Pod]:
    def parse(obj: Reader, meta: Meta) -> Pod:
        template = obj
        for key in path:
            template = template.mapping(key) or Reader({}, (*template.path, key), obj.report)
        metadata = template.mapping("metadata")
        labels = {} if metadata is None else metadata.string_map("labels")
        if kind == "Job":  # the Job controller adds these labels
            labels = {"job-name": meta.name, "batch.kubernetes.io/job-name": meta.name, **labels}
        return read_template(template, replace(meta, name=f"{kind}/{meta.name}", labels=share_texts(labels)))

    return parse


KINDS = tuple(
    Kind(version, kind, namespaced=True, parse=_parser(kind, path), check_name=any_name, strict=False)
    for (version, kind), path in _TEMPLATES.items()
)


def as_cluster(resources: Iterable[Resource], *, addressed: bool = False) -> list[Resource]:
    """The resources as a cluster would have them, with the namespaces of workloads.

    An added Namespace has only the label of its name.  A missing namespace is not added if the input has a pod with an
    address, or a network set, of that namespace: an agent with the same input lacks the Namespace, too, and an added
    one would change verdicts.
    ``addressed``: whether each pod of a workload also gets an address of each family from `STAND_INS`.  Then its name
    becomes the name of the workload, unless a pod or another workload of the namespace has that name.
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
    """A note for each (namespace, name) in ``ends`` that names a workload with a stand-in address instead of a pod.

    Raises InvalidInputError if a name belongs to several workloads and to no pod.
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
    """(namespace, name) of a resource. For the pod of a workload it is the name of the workload."""
    return resource.meta.namespace, resource.meta.name.rpartition("/")[2]
