# SPDX-License-Identifier: Apache-2.0
"""The rights of deploy/manifests/rbac.yaml at a real API server suffice, and each missing one is reported."""

from __future__ import annotations

import copy
import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from server import Server
from test_source import DEFINITION, TIERS, OwnServer, cluster

from netpol_ebpf.sources.kubernetes import watching
from netpol_ebpf.sources.kubernetes.decoding import KINDS, WatchedKind
from netpol_ebpf.sources.kubernetes.source import KubernetesSource

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0
FIRST = KINDS[0]
"""A built-in kind that each source in these tests has besides a custom one, because a probe reads a built-in kind."""


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "GRACE_S", 1.0)
    monkeypatch.setattr(watching, "LONGEST_RETRY_S", 1.0)


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    """A server with the definition of tiers."""
    made = OwnServer(Path(os.environ["KUBE_APISERVER"]), Path(os.environ["ETCD"]), tmp_path_factory.mktemp("own"))
    try:
        made.define_tiers()
        yield made
    finally:
        made.close()


def role() -> dict[str, Any]:
    """The ClusterRole in the file."""
    documents = yaml.safe_load_all((ROOT / "deploy" / "manifests" / "rbac.yaml").read_text(encoding="utf-8"))
    (found,) = (one for one in documents if one["kind"] == "ClusterRole")
    return dict(found)


def without(group: str, resource: str, verb: str) -> dict[str, Any]:
    """The ClusterRole without one right."""
    found = role()
    rules = []
    for rule in found["rules"]:
        for each in rule["apiGroups"]:
            for one in rule["resources"]:
                verbs = [v for v in rule["verbs"] if (each, one, v) != (group, resource, verb)]
                if verbs:
                    rules.append({"apiGroups": [each], "resources": [one], "verbs": verbs})
    assert rights_of(rules) == rights_of(found["rules"]) - {(group, resource, verb)} != rights_of(found["rules"])
    return {**found, "rules": rules}


def rights_of(rules: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    """The (group, resource, verb) of each right."""
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def give(server: Server, user: str, rights: dict[str, Any]) -> None:
    """Bind a user to a new role with these rights, and wait until the rights are in force."""
    named = copy.deepcopy(rights)
    named["metadata"] = {"name": user}
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": user},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": user},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
    }
    for one in (named, binding):
        assert server.apply(one).status in (200, 201)


def until(followed: KubernetesSource, is_so: Callable[[], bool]) -> None:
    until_s = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < until_s, ([str(one) for one in followed.problems], followed.states())
        select.select([followed.fileno()], [], [], 0.1)
        followed.note_news()
        followed.step()


RIGHTS = [(kind, verb) for kind in KINDS for verb in ("list", "watch")]


@pytest.mark.parametrize(("kind", "verb"), RIGHTS, ids=[f"{verb}-{kind}" for kind, verb in RIGHTS])
def test_each_right_that_is_missing_is_named(own_server: OwnServer, kind: WatchedKind, verb: str) -> None:
    """The problem names the kind, and the verb that the role lacks."""
    readable = "namespaces" if kind != FIRST else "nodes"
    user = f"without-{verb}-{kind}"
    give(own_server, user, without(kind.api_version.rpartition("/")[0], kind.plural, verb))
    own_server.wait_for(lambda: own_server.get(f"/api/v1/{readable}", user=user).status == 200, "the role")
    followed = KubernetesSource(cluster(own_server, user), kinds=tuple(dict.fromkeys((FIRST, kind))))
    try:
        for watcher in followed.watchers.values():  # a streaming list is a WATCH, and needs only the right to watch
            watcher._streams = verb == "watch"
        followed.begin()
        until(followed, lambda: any(one.slug == "forbidden" for one in followed.problems))
        (problem,) = (one for one in followed.problems if one.slug == "forbidden")
        assert str(kind) in f"{problem.obj} {problem.message}"
        assert verb in problem.message
    finally:
        followed.close()


def test_definitions_that_cannot_be_read_are_named(own_server: OwnServer) -> None:
    """A custom kind does not sync: a deletion of its objects could not be distinguished from that of the kind."""
    user = "without-definitions"
    give(own_server, user, without("apiextensions.k8s.io", "customresourcedefinitions", "get"))
    own_server.wait_for(lambda: own_server.get("/api/v1/namespaces", user=user).status == 200, "the role")
    assert own_server.get(DEFINITION, user=user).status == 403
    kinds = tuple(kind for kind in KINDS if str(kind) in ("namespaces", TIERS))
    followed = KubernetesSource(cluster(own_server, user), kinds=kinds)
    try:
        followed.begin()
        until(followed, lambda: any("CustomResourceDefinition" in one.message for one in followed.problems))
        assert not followed.has_synced
        assert {one.kind: one.is_synced for one in followed.states()} == {"namespaces": True, TIERS: False}
    finally:
        followed.close()


def test_all_rights_of_the_file_are_enough(own_server: OwnServer) -> None:
    """Every kind is watched or not installed, and there is no problem."""
    give(own_server, "with-all", role())
    own_server.wait_for(lambda: own_server.get("/api/v1/namespaces", user="with-all").status == 200, "the role")
    followed = KubernetesSource(cluster(own_server, "with-all"))
    try:
        followed.begin()
        until(followed, lambda: followed.has_synced and not followed.problems)
        assert {one.state for one in followed.states()} <= {"watching", "listing", "not installed"}
    finally:
        followed.close()
