# SPDX-License-Identifier: Apache-2.0
"""Failures around the agent, on a simulated node: they are reported, retried, and stop nothing else."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_agent_core import CLUSTER, POD, POLICY, Bench, settle

from netpol_ebpf.agent.local_interfaces import SEARCH_S
from netpol_ebpf.agent.rejected import RETRY_S, RejectedChanges
from netpol_ebpf.agent.repair import AUDIT_S
from netpol_ebpf.agent.settings import AgentSettings
from netpol_ebpf.agent.wiring import Interface
from netpol_ebpf.compiler import Compiler
from netpol_ebpf.errors import InvalidInputError, LimitError, MapFullError, PlatformError
from netpol_loader.pins.drift import Drift, PartlyMendedError

BRIDGE_HOST = """\
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: bridge}
spec: {node: here, interfaceName: br9}
"""


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    bench.write("cluster.yaml", CLUSTER)
    bench.write("policy.yaml", POLICY)
    yield bench
    bench.close()


def test_interface_that_refuses_programs_is_named_and_the_others_are_served(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error while it lasts, and the agent tries again and continues."""
    real = bench.node.attach

    def attach(ifindex: int, *, is_newborn: bool = False) -> bool:
        if ifindex == 5:
            raise PlatformError("the kernel says no")
        return real(ifindex, is_newborn=is_newborn)

    monkeypatch.setattr(bench.node, "attach", attach)
    agent = bench.agent()
    assert bench.node.programs == {2, 6}
    (problem,) = agent.problems
    assert (problem.slug, problem.severity) == ("attach", "error")
    assert problem.message == "policy NOT enforced on interface cali1: the kernel says no"
    monkeypatch.undo()
    agent.step()
    assert bench.node.programs == {2, 6}
    bench.now_s += SEARCH_S
    agent.step()
    assert bench.node.programs == {2, 5, 6}
    assert agent.problems == []


def test_interface_that_keeps_programs_is_named_and_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that cannot be removed from an interface without policy are an error until they can be."""
    wiring = bench.node.wiring
    bench.node.wiring = replace(wiring, links={**wiring.links, 9: Interface(9, "br9", "bridge")})
    bench.write("host.yaml", BRIDGE_HOST)
    agent = bench.agent()
    assert 9 in agent.attachments.interfaces

    def detach(_ifindex: int) -> None:
        raise PlatformError("the kernel says no")

    monkeypatch.setattr(bench.node, "detach", detach)
    bench.write("host.yaml", "---\n")
    settle(agent)
    assert [problem.message for problem in agent.problems] == [
        "policy is still enforced on interface br9, to which it does not apply any more: the kernel says no"
    ]
    assert 9 in agent.attachments.interfaces
    monkeypatch.undo()
    bench.now_s += SEARCH_S
    agent.step()
    assert 9 not in bench.node.programs
    assert agent.problems == []


def test_directory_that_cannot_be_read_is_no_empty_policy(bench: Bench) -> None:
    """An agent that starts without its manifests reports this, and keeps the policy in force."""
    bench.agent()
    before = bench.node.exchanges
    manifests = bench.home / "manifests"
    manifests.rename(bench.home / "elsewhere")
    with pytest.raises(InvalidInputError, match=r"cannot read the manifests: .*manifests cannot be read"):
        bench.agent()
    assert bench.node.exchanges == before
    assert bench.node.row(5) is not None


def test_pod_that_goes_while_memory_is_short_is_forgotten_with_its_sources(bench: Bench) -> None:
    """A removed pod makes room, and is not looked up in the maps that replace the old ones."""
    agent = bench.agent(AgentSettings("here", borrow_sources=True))
    peers = bench.node.in_force["np_addr4"]
    peers.hard_limit = len(peers.rows)
    bench.write("late.yaml", POD.format(name="late", node="there", last=9))
    settle(agent)
    assert [problem.slug for problem in agent.problems] == [MapFullError.slug]
    bench.remove("late.yaml")
    bench.write("cluster.yaml", CLUSTER.replace(POD.format(name="web", node="here", last=1), ""))
    settle(agent)
    assert agent.problems == []
    assert bench.node.row(5) is None


def test_limit_is_not_tried_again_by_itself(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a full map, a change may exceed a limit.

    Then the whole is compiled with the next change, and not at each step.
    """
    agent = bench.agent()
    peers = bench.node.in_force["np_addr4"]
    peers.hard_limit = len(peers.rows)
    bench.write("late.yaml", POD.format(name="late", node="there", last=9))
    settle(agent)

    def commit(_self: Compiler) -> None:
        raise LimitError("too much", limit="rules")

    monkeypatch.setattr(Compiler, "commit", commit)
    bench.now_s += RETRY_S
    agent.step()
    assert agent.rejected.count == 2
    for _ in range(3):
        bench.now_s += RETRY_S
        agent.step()
    assert agent.rejected.count == 2
    monkeypatch.undo()
    bench.write("later.yaml", POD.format(name="later", node="there", last=10))
    settle(agent)
    assert agent.problems == []


def test_retries_grow_rare_and_begin_anew() -> None:
    """Each rejection for lack of memory doubles the time to the next attempt. A success resets it."""
    refusals = RejectedChanges()
    full = MapFullError("full", map_name="np_rule")
    refusals.reject(full, 0.0)
    refusals.reject(full, RETRY_S)
    assert refusals.retry_at_s == RETRY_S + 2 * RETRY_S
    refusals.reject(LimitError("too much", limit="rules"), 100.0)
    assert refusals.retry_at_s is None
    refusals.accept()
    refusals.reject(full, 200.0)
    assert refusals.retry_at_s == 200.0 + RETRY_S


def test_what_could_be_put_back_counts_although_something_could_not(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The restored row is counted, and connections are judged again.

    The other one is a problem until it is restored.
    """
    agent = bench.agent()
    generation = agent.enforcement.applier.generation

    def mend(_ifindexes: Collection[int]) -> list[Drift]:
        raise PartlyMendedError("no room", [Drift("program", "interface 5", "missing"), Drift("pin", "p", "missing")])

    monkeypatch.setattr(bench.node, "mend", mend)
    bench.now_s += AUDIT_S
    agent.step()
    assert agent.repair.drift.counts == {"program": 1, "pin": 1}
    assert agent.enforcement.applier.generation == generation + 1
    assert [problem.message for problem in agent.problems] == ["cannot restore what something else changed: no room"]
    monkeypatch.undo()
    bench.now_s += AUDIT_S
    agent.step()
    assert agent.problems == []


def services(*last: int) -> str:
    """Services of one port each."""
    return "---\n".join(
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: s{one}, namespace: shop}}\n"
        f"spec: {{clusterIPs: [10.96.0.{one}], ports: [{{port: 80}}]}}\n"
        for one in last
    )


def test_refused_services_come_into_force_by_no_way(bench: Bench) -> None:
    """Services without room are not written with the next news of the node, and do not end the agent."""
    bench.write("services.yaml", services(1))
    agent = bench.agent()
    vips = bench.node.in_force["np_vip4"]
    before = dict(vips.rows)
    assert len(before) == 1
    vips.max_entries = 2
    bench.write("services.yaml", services(1, 2, 3))
    settle(agent)
    for _ in range(2):
        assert [(problem.slug, "np_vip4" in problem.message) for problem in agent.problems] == [("map-full", True)]
        assert bench.node.in_force["np_vip4"].rows == before
        bench.node.news = True
        agent.step()
    bench.write("services.yaml", services(2, 3))
    settle(agent)
    assert agent.problems == []
    assert len(bench.node.in_force["np_vip4"].rows) == 2


def test_services_refused_for_a_limit_come_into_force_by_no_way(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole change waits, even the parts that would fit."""
    agent = bench.agent()

    def commit(_self: Compiler) -> None:
        raise LimitError("too much", limit="rules")

    monkeypatch.setattr(Compiler, "commit", commit)
    bench.write("services.yaml", services(1))
    settle(agent)
    bench.node.news = True
    agent.step()
    assert bench.node.in_force["np_vip4"].rows == {}
    monkeypatch.undo()
    bench.write("late.yaml", POD.format(name="late", node="there", last=9))
    settle(agent)
    assert len(bench.node.in_force["np_vip4"].rows) == 1


def test_program_of_others_before_ours_is_a_warning_as_long_as_it_is(bench: Bench) -> None:
    """The problem names the interface. The agent changes nothing."""
    agent = bench.agent()
    bench.node.behind = {5, 77}
    bench.now_s += AUDIT_S
    agent.step()
    (problem,) = agent.problems
    assert (problem.slug, problem.severity) == ("overtaken", "error")
    assert "before policy" in problem.message
    assert "cali1 tcx ingress program 7" in problem.message
    bench.node.behind = set()
    bench.now_s += AUDIT_S
    agent.step()
    assert agent.problems == []
