# SPDX-License-Identifier: Apache-2.0
"""Options for the origin of the agent's objects: a directory of manifests, the API of a cluster, or both.

Invariant: errors in the options, in a kubeconfig or in the installation are reported before anything is changed.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from netpol_ebpf.errors import InvalidInputError, PlatformError, UsageError
from netpol_ebpf.sources.copies import LastGoodCopies
from netpol_ebpf.sources.directory_watch import DirectoryWatch
from netpol_ebpf.sources.files import ManifestDirectory
from netpol_ebpf.sources.kubernetes.client import Cluster, in_cluster
from netpol_ebpf.sources.merged import MergedSources
from netpol_ebpf.sources.source import Source

COPIES_NAME = "manifests"
DEFAULT_MANIFESTS = Path("/etc/netpol-ebpf/manifests")
"""Default directory of manifests. It is used only if no cluster is watched."""
NODE_VARIABLE = "NODE_NAME"
"""Environment variable with the name of this node. The downward API sets it in a pod, the unit file in a service."""
DEFAULT_SAVED_STATE = Path("/var/lib/netpol-ebpf/cluster")
"""Default file of the saved state. Unlike other state it is on a disk, so that a node can start without an API
server."""

OpenSource = Callable[[bool], Source]
"""Makes the source. The argument says whether nothing is in force on this node; only then the saved state may be
used."""

log = logging.getLogger("netpol-agent")


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the origin of objects."""
    parser.add_argument(
        "--manifests", type=Path, metavar="DIR",
        help="directory (or file) of Kubernetes objects and policies; the agent watches it for changes (default, where no cluster "
        f"is watched: {DEFAULT_MANIFESTS})",
    )  # fmt: skip
    api = parser.add_mutually_exclusive_group()
    api.add_argument(
        "--kubernetes", action="store_true",
        help="watch the API server of the cluster that this pod runs in, with the pod's service account; with --manifests "
        "too, the objects of both are in force",
    )  # fmt: skip
    api.add_argument(
        "--kubeconfig",
        type=Path,
        metavar="FILE",
        help="watch the API server that a kubeconfig names, from outside a pod",
    )
    parser.add_argument("--context", metavar="NAME", help="context of the kubeconfig (default: its current context)")
    parser.add_argument(
        "--saved-state", type=Path, default=DEFAULT_SAVED_STATE, metavar="FILE",
        help="where the agent saves the last state of the cluster, for a start without the API server; on a disk, to outlive a "
        f"reboot (default: {DEFAULT_SAVED_STATE})",
    )  # fmt: skip


def node_name(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> str | None:
    """The name of this node: from ``--node``, otherwise from `NODE_VARIABLE`; None if neither gives it.

    Raises UsageError if neither gives it and a cluster is watched, because an API server lists the pods of all nodes.
    """
    if arguments.node:
        return str(arguments.node)
    found = environment.get(NODE_VARIABLE) or None
    if found is None and watches_cluster(arguments):
        variable = f", or set {NODE_VARIABLE} to spec.nodeName by the downward API" if arguments.kubernetes else ""
        raise UsageError(f"the name of this node is needed to watch a cluster: give --node NAME{variable}")
    return found


def watches_cluster(arguments: argparse.Namespace) -> bool:
    """Whether the options name an API server."""
    return bool(arguments.kubernetes) or arguments.kubeconfig is not None


def manifests_dir(arguments: argparse.Namespace) -> Path | None:
    """The directory of manifests: from ``--manifests``, otherwise the default directory, if it exists.

    None if only a cluster is watched, or if there is no directory.
    """
    if arguments.manifests is None and not watches_cluster(arguments) and DEFAULT_MANIFESTS.exists():
        return DEFAULT_MANIFESTS
    given: Path | None = arguments.manifests
    return given


def plan_source(arguments: argparse.Namespace, state_dir: Path) -> OpenSource:
    """Check the options; returns a function that makes the source.

    If both a cluster and the manifests have an object, the cluster's is used. Raises UsageError, InvalidInputError, and
    PlatformError if a Python package is missing.
    """
    plans: list[OpenSource] = []
    if watches_cluster(arguments):
        plans.append(_plan_cluster(arguments))
    elif arguments.context is not None:
        raise UsageError("--context names a context of a kubeconfig: give --kubeconfig FILE too")
    if arguments.manifests is not None:
        plans.append(_plan_manifests(arguments.manifests, state_dir))
    if not plans:
        raise UsageError(
            f"there is no source of objects: {DEFAULT_MANIFESTS} does not exist, and no other is named",
            hint="Give --manifests, --kubernetes or --kubeconfig, or write the option into the configuration file.",
        )
    if len(plans) == 1:
        return plans[0]
    return lambda may_restore: MergedSources([plan(may_restore) for plan in plans])


def cluster_of(source: Source) -> Cluster | None:
    """The cluster that a source, or one of its merged sources, watches; None if it reads only manifests."""
    for one in source.parts if isinstance(source, MergedSources) else (source,):
        cluster = getattr(one, "cluster", None)
        if isinstance(cluster, Cluster):
            return cluster
    return None


def _plan_manifests(manifests: Path, state_dir: Path) -> OpenSource:
    if not manifests.exists():
        raise InvalidInputError(f"--manifests {manifests}: there is no such directory")
    return lambda _may_restore: ManifestDirectory(
        manifests, LastGoodCopies(state_dir / COPIES_NAME), watch=_open_watch()
    )


def _plan_cluster(arguments: argparse.Namespace) -> OpenSource:
    from netpol_ebpf.sources.kubernetes.kubeconfig import load_kubeconfig

    if arguments.kubernetes and arguments.context is not None:
        raise UsageError("--context names a context of a kubeconfig, and --kubernetes reads none")
    try:
        from netpol_ebpf.sources.kubernetes.source import KubernetesSource
    except ModuleNotFoundError as error:
        if error.name != "msgspec":
            raise
        raise PlatformError(
            "the Python package msgspec is missing, without which no API server can be watched",
            hint="Install the extra: pip install 'netpol-ebpf[kubernetes]'.",
        ) from error
    cluster = (
        in_cluster()
        if arguments.kubernetes
        else load_kubeconfig([arguments.kubeconfig.expanduser()], arguments.context or "")
    )
    return lambda may_restore: KubernetesSource(cluster, arguments.saved_state, may_restore)


def _open_watch() -> DirectoryWatch | None:
    """A watch for the manifests; None if inotify has no watch left for this user.

    Without a watch the directory is scanned at intervals.
    """
    try:
        return DirectoryWatch()
    except OSError as error:
        log.warning("cannot use inotify (%s): the agent looks at the manifests by time alone", error.strerror)
        return None
