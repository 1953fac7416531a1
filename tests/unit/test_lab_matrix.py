# SPDX-License-Identifier: Apache-2.0
"""The table of who reaches whom: what is tried, how it is compared with a prediction, how it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address

import pytest

from netpol_ebpf.errors import InvalidInputError
from netpol_ebpf.lab.attempt import Attempt, AttemptResult, Reachability
from netpol_ebpf.lab.matrix import Matrix, Observation, ProbedService
from netpol_ebpf.lab.scene import plan_for
from netpol_ebpf.lab.topology import ICMP, ICMPV6, TCP, UDP, Host, Listen, Plan
from netpol_ebpf.resources.load import parse_documents

PLAN = Plan(
    [
        Host("net", None, (ip_address("192.0.2.1"),)),
        Host("shop/a", "net", (ip_address("10.0.0.1"), ip_address("fd00::1"))),
        Host("shop/b", "net", (ip_address("10.0.0.2"), ip_address("fd00::2"))),
        Host("old", "net", (ip_address("10.0.0.3"),)),
    ]
)
WEB, DNS, PING = ProbedService("shop/b", TCP, 8080), ProbedService("shop/b", UDP, 53), ProbedService("shop/a", ICMP)
MATRIX = Matrix(PLAN, ["shop/a", "shop/b", "old"], [WEB, DNS, PING], {"shop/a": "a", "shop/b": "b"})


def observe(outcome_of: Callable[[Attempt], Reachability]) -> Observation:
    """What would be seen if each attempt ended so."""
    return Observation(
        MATRIX, {attempt: AttemptResult(attempt, outcome_of(attempt), 0.0) for attempt in MATRIX.attempts()}
    )


def only_old_is_silenced(attempt: Attempt) -> Reachability:
    return Reachability.SILENT if attempt.source == "old" else Reachability.REACHED


def test_attempts_use_the_families_both_ends_have() -> None:
    """Dual-stack pairs are tried in both, others in the common one, an echo request in its own protocol per family."""
    attempts = MATRIX.attempts()
    assert [attempt for attempt in attempts if attempt.source == "shop/b"] == [
        Attempt("shop/b", ip_address("10.0.0.1"), ICMP),
        Attempt("shop/b", ip_address("fd00::1"), ICMPV6),
    ]
    assert [str(attempt.destination) for attempt in attempts if attempt.source == "old"] == [
        "10.0.0.2",
        "10.0.0.2",
        "10.0.0.1",
    ]


def test_prediction_fails_on_both_kinds_of_surprise() -> None:
    """A denied attempt that was answered and an allowed one that was not are both named."""
    seen = observe(only_old_is_silenced)
    assert seen.mismatches(lambda attempt: attempt.source != "old") == []
    surprises = seen.mismatches(lambda attempt: attempt.source == "old")
    assert len(surprises) == len(seen.results)
    assert "old to 10.0.0.2 protocol 6 port 8080: silent, expected reached" in map(str, surprises)
    assert "shop/a to fd00::2 protocol 17 port 53: reached, expected silent" in map(str, surprises)


@pytest.mark.parametrize("outcome", [Reachability.REFUSED, Reachability.UNREACHABLE])
def test_an_error_is_never_taken_for_a_denial(outcome: Reachability) -> None:
    """A refused or unreachable destination contradicts every prediction."""
    seen = observe(lambda _: outcome)
    assert len(seen.mismatches(lambda _: False)) == len(seen.results)
    assert len(seen.mismatches(lambda _: True)) == len(seen.results)
    assert "?" in seen.render(colour=False)


def test_table_shows_families_that_differ() -> None:
    """A cell says 4 or 6 when only that family is answered."""
    seen = observe(lambda attempt: Reachability.SILENT if attempt.destination.version == 4 else Reachability.REACHED)
    assert seen.render(colour=False).splitlines() == [
        "      b          a",
        "from  8080 53/u  ping",
        "a       6    6     ·",
        "b       ·    ·     6",
        "old     ✗    ✗     ✗",
    ]
    assert seen.as_rows()["shop/a"] == {"shop/b:8080": "silent/reached", "shop/b:53/u": "silent/reached"}


def test_table_marks_what_changed() -> None:
    """Only the cells that are not as before carry an asterisk; there is a form without other characters than ASCII."""
    before, after = observe(lambda _: Reachability.REACHED), observe(only_old_is_silenced)
    assert after.changed(before) == [("old", service) for service in (WEB, DNS, PING)]
    table = after.render(colour=False, earlier=before, ascii_only=True)
    assert table.isascii()
    assert table.splitlines()[2:] == ["a       o    o     .", "b       .    .     o", "old     x*   x*    x*"]
    assert (before.reached, after.reached) == (9, 6)


def test_colour_only_adds_escapes() -> None:
    """The coloured table has the same text."""
    seen = observe(only_old_is_silenced)
    coloured = seen.render(colour=True)
    assert "\033[32m" in coloured
    assert "\033[31m" in coloured
    for code in ("\033[32m", "\033[31m", "\033[33m", "\033[1m", "\033[2m", "\033[0m"):
        coloured = coloured.replace(code, "")
    assert [line.rstrip() for line in coloured.splitlines()] == seen.render(colour=False).splitlines()


MANIFESTS = """
{apiVersion: v1, kind: Node, metadata: {name: n1}, status: {addresses: [{type: InternalIP, address: 172.30.0.10}]}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop}
spec:
  nodeName: n1
  containers: [{name: c, ports: [{containerPort: 80}, {containerPort: 53, protocol: UDP}, {containerPort: 9, protocol: SCTP}]}]
status: {phase: Running, podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: proxy, namespace: shop}
spec: {nodeName: n1, hostNetwork: true, containers: [{name: c}]}
status: {phase: Running, podIPs: [{ip: 172.30.0.10}]}
---
apiVersion: v1
kind: Pod
metadata: {name: done, namespace: shop}
spec: {nodeName: n1, containers: [{name: c}]}
status: {phase: Succeeded, podIPs: [{ip: 10.0.0.1}]}
"""


def test_scene_follows_the_manifests() -> None:
    """Running pods hang off their node and listen on their declared ports; host-network and finished pods are absent."""
    outside = Host("outside", "internet", (ip_address("198.51.100.9"),))
    plan = plan_for(parse_documents(MANIFESTS, "m.yaml").check(), [outside])
    assert list(plan.hosts) == ["internet", "n1", "shop/web", "outside"]
    assert plan.hosts["shop/web"].parent == "n1"
    assert plan.hosts["shop/web"].listens == (Listen(TCP, 80), Listen(UDP, 53))


def test_scene_refuses_a_pod_without_a_node() -> None:
    """The error names file, line, pod and node."""
    text = MANIFESTS.replace("nodeName: n1", "nodeName: n2", 1)
    with pytest.raises(InvalidInputError, match=r"m.yaml:\d+: Pod/shop/web: spec.nodeName: n2: there is no Node"):
        plan_for(parse_documents(text, "m.yaml").check())
