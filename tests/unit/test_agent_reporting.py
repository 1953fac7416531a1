# SPDX-License-Identifier: Apache-2.0
"""An agent's report of its node: revisions in force, rejections, workloads without policy.

And its threads at a server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from apiserver_traces import failure
from fake_apiserver import FakeServer
from test_agent_core import CLUSTER, POLICY, WIRING, Bench, settle
from writable_api import WritableApi

from netpol_ebpf.agent.local_interfaces import MISSING_S
from netpol_ebpf.agent.policies_in_force import PoliciesInForce, standing_here
from netpol_ebpf.agent.reporting import AFTER_BUG_S, LOOK_S, SLOW_LOOK_S, Reporting
from netpol_ebpf.errors import InvalidInputError, MapFullError
from netpol_ebpf.policy.types import PolicyKey
from netpol_ebpf.sources.kubernetes.client import Cluster
from netpol_ebpf.status.election import LEASE, LEASES
from netpol_ebpf.status.report import COLLECTION, parse_report
from netpol_ebpf.status.standing import IN_FORCE

NAME = "KubernetesNetworkPolicy/shop/db"
KEY = ["KubernetesNetworkPolicy", "shop", "db"]
DEADLINE_S = 30.0


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    made.write("cluster.yaml", CLUSTER)
    made.write("policy.yaml", POLICY)
    yield made
    made.close()


def written(generation: int = 1, uid: str = "u1", text: str = POLICY) -> str:
    """The policy as a server has it."""
    return text.replace("namespace: shop}", f"namespace: shop, uid: {uid}, generation: {generation}}}", 1)


def test_revision_in_force_follows_the_policy(bench: Bench) -> None:
    """This includes a new generation with the same meaning, and a new object.

    Policies of other nodes are not reported.
    """
    bench.write("policy.yaml", written())
    elsewhere = written(1, "u2", POLICY.replace("name: db", "name: far").replace("{app: db}", "{app: far}"))
    bench.write("far.yaml", elsewhere)
    agent = bench.agent()
    policies = PoliciesInForce(agent)
    assert policies.look().in_force == {NAME: "u1/1"}
    for generation, uid in ((2, "u1"), (1, "u3")):
        bench.write("policy.yaml", written(generation, uid))
        before = agent.changes_seen
        settle(agent)
        assert agent.changes_seen > before
        assert policies.look().in_force == {NAME: f"{uid}/{generation}"}
    bench.remove("policy.yaml")
    settle(agent)
    assert policies.look().in_force == {}


def test_policy_of_a_manifest_has_no_revision(bench: Bench) -> None:
    """The policy is no object of a server, so no report names it. `status --local` shows it."""
    agent = bench.agent()
    assert PoliciesInForce(agent).look().in_force == {}
    found = standing_here(agent, {"key": KEY})
    assert (found["programmed"], found["generation"], found["nodes_needing"]) == (True, 0, 1)
    assert found["nodes"][0]["reason"] == IN_FORCE
    with pytest.raises(InvalidInputError, match="no source"):
        standing_here(agent, {"key": ["KubernetesNetworkPolicy", "shop", "x"]})
    with pytest.raises(InvalidInputError, match="no key"):
        standing_here(agent, {"key": "shop/db"})


def test_refused_change_keeps_the_revision_before(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older generation is in force and reported. The newer one is a shortfall with the map's name."""
    bench.write("policy.yaml", written())
    agent = bench.agent()
    policies = PoliciesInForce(agent)
    policies.look()

    def full(_changes: object) -> None:
        raise MapFullError("np_verdict has no room", map_name="np_verdict")

    for name in ("_compile", "install"):  # a change, and the later attempts
        monkeypatch.setattr(agent.enforcement, name, full if name == "_compile" else lambda: full(None))
    bench.write("policy.yaml", written(2, text=POLICY.replace("5432", "5433")))
    new = written(1, "u2", POLICY.replace("name: db", "name: new"))
    bench.write("new.yaml", new)
    settle(agent)
    status = policies.look()
    assert status.in_force == {NAME: "u1/1"}
    (short,) = status.shortfalls
    assert (short.reason, set(short.policies)) == ("MapFull", {NAME, "KubernetesNetworkPolicy/shop/new"})
    assert "np_verdict has no room" in short.message
    found = standing_here(agent, {"key": KEY})
    assert (found["programmed"], found["reason"]) == (False, "MapFull")
    monkeypatch.undo()
    bench.write("policy.yaml", written(3, text=POLICY.replace("5432", "5434")))
    settle(agent)
    status = policies.look()
    assert (status.in_force, status.shortfalls) == ({NAME: "u1/3", "KubernetesNetworkPolicy/shop/new": "u2/1"}, ())


def test_workload_without_its_interface_is_a_shortfall(bench: Bench) -> None:
    """Its policies are not in force on this node, whatever the maps have."""
    bench.write("policy.yaml", written())
    bench.node.wiring = replace(WIRING, links={2: WIRING.links[2], 5: WIRING.links[5]})
    agent = bench.agent()
    bench.now_s += MISSING_S
    bench.node.news = True
    settle(agent)
    bench.now_s += MISSING_S
    status = PoliciesInForce(agent).look()
    assert status.in_force == {}
    (short,) = status.shortfalls
    assert (short.reason, short.policies) == ("NotEnforced", (NAME,))
    assert "Pod/shop/db" in short.message


def test_invalid_policy_is_told_here(bench: Bench) -> None:
    """The report has the fault. The last good state stays in force."""
    agent = bench.agent()
    bench.write("policy.yaml", POLICY.replace("port: 5432", "port: -1"))
    settle(agent)
    found = standing_here(agent, {"key": KEY})
    assert (found["programmed"], found["reason"]) == (False, "Invalid")
    assert "port" in found["message"]
    assert PolicyKey(*KEY) in agent.objects.world.policies


# --- the threads ------------------------------------------------------------------------------------------------------


@pytest.fixture
def api() -> WritableApi:
    return WritableApi()


@pytest.fixture
def server(api: WritableApi) -> Iterator[FakeServer]:
    with FakeServer(api) as made:
        yield made


def until(is_so: Callable[[], bool], what: str) -> None:
    until_s = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < until_s, what
        time.sleep(0.01)


def test_agent_reports_and_takes_the_lease(bench: Bench, server: FakeServer, api: WritableApi) -> None:
    """The agent's loop does not wait. A server that refuses is a warning. Closing ends the threads."""
    bench.write("policy.yaml", written())
    agent = bench.agent()
    api.refusals["PATCH"] = [failure(403, "user may not patch nodereports")]
    reporting = Reporting(agent, Cluster(server.url), "here", lambda: bench.now_s)
    reporting.look()
    reporting.start()
    try:
        until(lambda: any("may not patch" in one.message for one in reporting.problems), "the refusal is told")
        assert {one.severity for one in reporting.problems} == {"warning"}
        until(lambda: f"{LEASES}/{LEASE}" in api.objects, "the Lease is taken")
        assert api.objects[f"{LEASES}/{LEASE}"]["spec"]["holderIdentity"] == "here"
        reporting.writer._due_s = reporting.writer._earliest_s = 0.0
        reporting.writer.wake.set()
        until(lambda: f"{COLLECTION}/here" in api.objects, "the report is written")
        assert parse_report(api.objects[f"{COLLECTION}/here"]).has("u1/1")
    finally:
        reporting.close()
    assert not any(thread.is_alive() for thread in reporting._threads)


def test_bug_in_a_look_is_told_and_ends_no_loop(
    bench: Bench, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look is repeated after a while."""
    reporting = Reporting(bench.agent(), Cluster(server.url), "here", lambda: bench.now_s)
    with monkeypatch.context() as broken:
        broken.setattr(reporting._policies, "look", lambda: {}["a bug"])
        reporting.look()
    assert ["KeyError" in one.message for one in reporting.problems] == [True]
    reporting.look()
    assert list(reporting.problems)
    bench.now_s += AFTER_BUG_S + SLOW_LOOK_S
    reporting.look()
    assert not list(reporting.problems)


def test_look_is_rare_and_sees_each_change(bench: Bench, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is at most one look in a period after changes, and one now and then without changes."""
    agent = bench.agent()
    reporting = Reporting(agent, Cluster(server.url), "here", lambda: bench.now_s)
    looks = []
    look = reporting._policies.look
    monkeypatch.setattr(reporting._policies, "look", lambda: looks.append(bench.now_s) or look())
    for _ in range(10):
        reporting.look()
    assert len(looks) == 1
    agent.changes_seen += 1
    reporting.look()
    assert len(looks) == 1
    bench.now_s += LOOK_S
    reporting.look()
    assert len(looks) == 2
    bench.now_s += SLOW_LOOK_S - 0.1
    reporting.look()
    assert len(looks) == 2
    bench.now_s += 0.2
    reporting.look()
    assert len(looks) == 3
