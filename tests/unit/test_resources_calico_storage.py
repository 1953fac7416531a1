# SPDX-License-Identifier: Apache-2.0
"""crd.projectcalico.org/v1: stored objects are those of projectcalico.org/v3, once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from netpol_ebpf.policy.translate import Derivation, key_of
from netpol_ebpf.resources import calico, calico_configuration
from netpol_ebpf.resources.calico_storage import METADATA, VERSION
from netpol_ebpf.resources.load import load_paths, parse_documents
from netpol_ebpf.resources.types import Meta
from netpol_ebpf.sources.files import ManifestDirectory
from netpol_ebpf.sources.source import Remove, Upsert

SPECS = {
    "HostEndpoint": {"node": "node", "interfaceName": "eth0"},
    "Tier": {"order": 5},
    "NetworkSet": {"nets": ["192.0.2.0/24"]},
    "GlobalNetworkSet": {"nets": ["192.0.2.0/24"]},
    "FelixConfiguration": {"failsafeInboundHostPorts": []},
    "KubeControllersConfiguration": {"controllers": {}},
    "StagedKubernetesNetworkPolicy": {"podSelector": {}},
}
NAMES = {"FelixConfiguration": "default", "KubeControllersConfiguration": "default"}
STORED = [
    kind for kind in (*calico.KINDS, *calico_configuration.KINDS) if kind.kind not in ("WorkloadEndpoint", "Profile")
]


def _object(version: str, kind: str, name: str, kept: object = None, **metadata: object) -> str:
    """One JSON document; ``kept`` is put into the annotation."""
    annotations = {} if kept is None else {METADATA: kept if isinstance(kept, str) else json.dumps(kept)}
    meta = {"name": name, "annotations": annotations, **metadata}
    spec = SPECS.get(kind, {"selector": "all()", "types": ["Ingress"]})
    return json.dumps({"apiVersion": version, "kind": kind, "metadata": meta, "spec": spec})


def _meta(text: str) -> Meta:
    (resource,) = parse_documents(text, "f").check()
    return resource.meta


@pytest.mark.parametrize("kind", [kind.kind for kind in STORED])
def test_every_stored_kind_is_read_as_its_v3_form(kind: str) -> None:
    """Type, key, labels and spec are the same; only that it is stored is kept apart."""
    name = NAMES.get(kind, "a")
    (stored,) = parse_documents(_object(VERSION, kind, name, labels={"a": "b"}, namespace="x"), "f").resources
    (current,) = parse_documents(_object(calico.VERSION, kind, name, labels={"a": "b"}, namespace="x"), "f").resources
    assert (type(stored), key_of(stored)) == (type(current), key_of(current))
    assert (stored.meta.is_stored, current.meta.is_stored) == (True, False)
    assert replace(stored, meta=replace(stored.meta, is_stored=False)) == current


@pytest.mark.parametrize(
    "kind", ["NetworkPolicy", "GlobalNetworkPolicy", "StagedNetworkPolicy", "StagedGlobalNetworkPolicy"]
)
@pytest.mark.parametrize(
    ("stored", "kept", "name"),
    [
        ("default.a", None, "a"),
        ("default.a", {"creationTimestamp": None}, "a"),
        ("default.a", {"name": "a"}, "a"),
        ("default.a", {"name": "default.a"}, "default.a"),
        ("security.a", None, "security.a"),
        ("a", None, "a"),
    ],
)
def test_the_name_of_a_policy(kind: str, stored: str, kept: object, name: str) -> None:
    """The annotation's, else the stored one without the default tier's prefix."""
    assert _meta(_object(VERSION, kind, stored, kept)).name == name


def test_names_of_other_kinds_have_no_tier() -> None:
    """A set may be called default.a."""
    assert _meta(_object(VERSION, "GlobalNetworkSet", "default.a")).name == "default.a"


def test_labels() -> None:
    """Those in the annotation and those of the object, which come first."""
    kept = {"labels": {"a": "old", "b": "kept"}, "annotations": {"x": "y"}}
    assert _meta(_object(VERSION, "NetworkSet", "a", kept, labels={"a": "new"})).labels == {"a": "new", "b": "kept"}


@pytest.mark.parametrize("kept", ["{", "[]", '"x"', '{"labels": {"a": 1}}', '{"labels": []}', '{"name": 3}'])
def test_an_annotation_that_is_no_metadata(kept: str) -> None:
    """The object is refused: its name or labels may lie there."""
    result = parse_documents(_object(VERSION, "NetworkPolicy", "default.a", kept), "f")
    assert [problem.slug for problem in result.problems] == ["annotation"]
    assert result.resources == []
    assert parse_documents(_object(calico.VERSION, "NetworkPolicy", "a", kept), "f").problems == []


def test_other_stored_kinds_are_skipped() -> None:
    """Pools and blocks hold no policy; a misspelt kind is an error."""
    text = "\n".join(
        _object(VERSION, kind, "a") for kind in ("IPPool", "IPAMBlock", "ClusterInformation", "NetworkPolcy")
    )
    result = parse_documents(text, "f")
    assert sum(result.skipped.values()) == 3
    assert ["did you mean `NetworkPolicy`?" in problem.message for problem in result.problems] == [True]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_object_in_both_forms_counts_once(tmp_path: Path, order: tuple[int, int]) -> None:
    """The v3 form counts, whichever comes first, in one file and in two; that is no duplicate."""
    texts = [_object(VERSION, "NetworkPolicy", "default.a"), _object(calico.VERSION, "NetworkPolicy", "a")]
    together = parse_documents("\n".join(texts[index] for index in order), "f")
    for name, index in zip(("1.json", "2.json"), order, strict=True):
        (tmp_path / name).write_text(texts[index], encoding="utf-8")
    for result in (together, load_paths([tmp_path])):
        assert result.problems == []
        assert [(resource.meta.name, resource.meta.is_stored) for resource in result.resources] == [("a", False)]


def test_a_stored_object_twice_is_a_duplicate() -> None:
    """As any object is."""
    text = _object(VERSION, "NetworkPolicy", "default.a")
    assert [problem.slug for problem in parse_documents(f"{text}\n{text}", "f").problems] == ["duplicate"]


@pytest.mark.parametrize(("stored", "current"), [("1.json", "2.json"), ("2.json", "1.json")])
def test_a_directory_with_both_forms(tmp_path: Path, stored: str, current: str) -> None:
    """The v3 form takes the stored one's place when it comes and gives it back when it goes, whatever the files' names."""
    source = ManifestDirectory(tmp_path)
    (tmp_path / stored).write_text(_object(VERSION, "GlobalNetworkPolicy", "default.a"), encoding="utf-8")

    def events() -> list[tuple[type, bool]]:
        for _ in range(4):
            batch = source.step()
            if batch is not None:
                assert batch.problems == ()
                return [(type(event), event.resource.meta.is_stored) for event in batch.events]
        raise AssertionError("nothing was taken up")

    assert events() == [(Upsert, True)]
    (tmp_path / current).write_text(_object(calico.VERSION, "GlobalNetworkPolicy", "a"), encoding="utf-8")
    assert events() == [(Upsert, False)]
    (tmp_path / current).unlink()
    assert events() == [(Upsert, True)]
    (tmp_path / stored).write_text("---\n", encoding="utf-8")
    assert events() == [(Remove, True)]


FORMS = (_object(VERSION, "NetworkPolicy", "default.a"), _object(calico.VERSION, "NetworkPolicy", "default.a"))
"""A stored policy without annotation, and its v3 form as an API server before Calico 3.29.4 shows it: with the prefix."""


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_v3_name_with_the_prefix_is_the_stored_one_too(order: tuple[int, int]) -> None:
    """A policy without annotation does not say which name its v3 form has: either counts as the same policy, once."""
    result = parse_documents("\n".join(FORMS[index] for index in order), "f")
    assert [(one.meta.name, one.meta.is_stored) for one in result.check()] == [("default.a", False)]
    both = parse_documents("\n".join((*FORMS, _object(calico.VERSION, "NetworkPolicy", "a"))), "f").check()
    assert sorted((one.meta.name, one.meta.is_stored) for one in both) == [("a", False), ("default.a", False)]


@pytest.mark.parametrize(
    ("stored", "current"),
    [
        (_object(VERSION, "NetworkPolicy", "default.a", {"name": "a"}), FORMS[1]),
        (_object(VERSION, "NetworkPolicy", "a"), FORMS[1]),
        (_object(VERSION, "NetworkPolicy", "default.b"), FORMS[1]),
        (_object(VERSION, "NetworkPolicy", "default.a", namespace="other"), FORMS[1]),
        (_object(VERSION, "GlobalNetworkPolicy", "default.a"), FORMS[1]),
        (_object(VERSION, "NetworkSet", "default.a"), _object(calico.VERSION, "NetworkSet", "a")),
    ],
)
def test_another_object_hides_no_stored_one(stored: str, current: str) -> None:
    """One whose annotation names it, another name, namespace or kind, and kinds without a tier."""
    assert len(parse_documents(f"{stored}\n{current}", "f").check()) == 2
    derivation = Derivation()
    for text in (stored, current):
        (resource,) = parse_documents(text, "f").check()
        derivation.upsert(resource)
    assert len(derivation.world.policies) + len(derivation.world.network_sets) == 2


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_source_with_both_forms_counts_one(order: tuple[int, int]) -> None:
    """In whatever order they come; the stored form counts again when the v3 form goes, and the v3 form stays when it goes."""
    derivation = Derivation()
    objects = [parse_documents(text, "f").check()[0] for text in FORMS]
    stored, current = (key_of(one) for one in objects)

    def counted() -> set[str]:
        return {key.name for key in derivation.world.policies}

    for index in order:
        derivation.upsert(objects[index])
    assert counted() == {"default.a"}
    assert {key.name for key, one in derivation.take_changes().policies.items() if one is not None} == {"default.a"}
    derivation.remove(*current)
    assert counted() == {"a"}
    changes = derivation.take_changes().policies
    assert {key.name: one is not None for key, one in changes.items()} == {"default.a": False, "a": True}
    derivation.upsert(objects[1])
    derivation.remove(*stored)
    assert counted() == {"default.a"}
    derivation.remove(*current)
    assert counted() == set()
