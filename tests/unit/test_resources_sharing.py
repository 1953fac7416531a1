# SPDX-License-Identifier: Apache-2.0
"""One object in place of equal ones."""

from __future__ import annotations

from typing import Any

from netpol_ebpf.policy.translate import Derivation
from netpol_ebpf.resources.load import parse_object
from netpol_ebpf.resources.sharing import share, share_text, share_texts
from netpol_ebpf.resources.types import ContainerPort, Pod


def _fresh(text: str) -> str:
    """Another object of the same text."""
    return text.encode().decode()


def _pod(name: str, **labels: str) -> Pod:
    text: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": _fresh("n-s"), "labels": labels},
        "spec": {"containers": [{"ports": [{"name": "http", "containerPort": 80}]}]},
        "status": {"podIP": "10.0.0.1"},
    }
    (pod,) = parse_object(text, "test").check()
    assert isinstance(pod, Pod)
    return pod


def test_equal_values_become_one() -> None:
    """Labels, names and other values."""
    assert share_texts({"a": "1", "b": "2"}) is share_texts({"a": "1", "b": "2"})
    assert share_text(_fresh("xy")) is share_text(_fresh("xy"))
    assert share((ContainerPort("http", 6, 80),)) is share((ContainerPort("http", 6, 80),))


def test_different_values_stay_apart() -> None:
    """A name in the place of a text, another order, another port, nothing at all."""
    assert share_texts({"a": "b", "c": "d"}) == {"a": "b", "c": "d"}
    assert share_texts({"b": "a", "c": "d"}) == {"b": "a", "c": "d"}
    assert list(share_texts({"c": "d", "a": "b"})) == ["c", "a"]
    assert share((ContainerPort("http", 6, 81),)) == (ContainerPort("http", 6, 81),)
    assert share_texts({}) == {}


def test_pods_of_one_template_share_what_they_say_alike() -> None:
    """Their labels, own and effective, ports, profiles and namespace are there once, whatever a namespace hands down later."""
    derivation = Derivation()
    pods = [_pod("one", app="web"), _pod("two", app="web")]
    for pod in pods:
        derivation.upsert(pod)
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n-s", "labels": {"env": "prod"}}}
    derivation.upsert(parse_object(namespace, "test").check()[0])
    one, two = pods
    assert (one.meta.labels, one.meta.namespace, one.ports) == (two.meta.labels, two.meta.namespace, two.ports)
    assert one.meta.labels is two.meta.labels
    assert one.meta.namespace is two.meta.namespace
    assert one.ports is two.ports
    first, second = derivation.world.endpoints.values()
    assert first.labels["pcns.env"] == "prod"
    assert first.labels is second.labels
    assert first.profiles is second.profiles
    assert first.ports is second.ports
