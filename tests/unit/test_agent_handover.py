# SPDX-License-Identifier: Apache-2.0
"""Handovers of the CNI plugin: whose an interface is before the cluster says so, and when the plugin is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from test_agent_core import CLUSTER, DB, POLICY, WIRING, Bench, settle

from netpol_ebpf.agent.assignments import Evidence
from netpol_ebpf.agent.core import Agent, AgentSettings
from netpol_ebpf.agent.handover import Handover, Handovers, parse_attach
from netpol_ebpf.agent.main import IN_FORCE, waits_of
from netpol_ebpf.agent.wiring import Interface
from netpol_ebpf.apply.ledger import Ledger
from netpol_ebpf.errors import UnreachableError, UsageError
from netpol_ebpf.policy.types import EndpointKey
from netpol_ebpf.sources.files import ManifestDirectory

NEW = EndpointKey("Pod", "shop", "new")
ADDRESS = ip_address("10.0.0.9")
LINK = Interface(9, "veth9", "veth", (9, 2))
"""An interface without a name or route that identifies its pod. Only the plugin knows the pod."""
POD = """\
---
apiVersion: v1
kind: Pod
metadata: {{name: new, namespace: shop, uid: "{uid}", labels: {{app: {app}}}}}
spec: {{nodeName: here, containers: [{{name: c, image: x}}]}}
status: {{phase: Pending, podIPs: [{addresses}]}}
"""
REQUEST: dict[str, Any] = {
    "op": "attach", "namespace": "shop", "name": "new", "uid": "u-1", "inside": "eth0", "interface": "veth9", "ifindex": 9,
    "peer": [9, 2], "timeout_s": 30, "addresses": ["10.0.0.9/24"],
}  # fmt: skip


def pod(uid: str = "u-1", *addresses: str, app: str = "db") -> str:
    return POD.format(uid=uid, app=app, addresses=", ".join(f"{{ip: {one}}}" for one in addresses))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A node with the new interface, which has no known pod."""
    bench = Bench(tmp_path)
    bench.write("cluster.yaml", CLUSTER)
    bench.write("policy.yaml", POLICY)
    bench.node.wiring = replace(WIRING, links={**WIRING.links, 9: LINK})
    yield bench
    bench.close()


def handed(**fields: Any) -> Handover:
    return parse_attach({**REQUEST, **fields})[0]


def is_bound(bench: Bench, agent: Agent) -> bool:
    binding = agent.enforcement.applier.bindings.get(NEW)
    return binding is not None and binding.ifindex == 9 and bench.node.row(9) is not None


def test_the_answer_waits_for_the_pod(bench: Bench) -> None:
    """It stays closed and unanswered until the Pod object arrives.

    Then it is bound, with an address that the object lacks.
    """
    agent = bench.agent()
    agent.hand_over(handed())
    settle(agent)
    assert "has not arrived" in agent.missing_for(handed())
    assert 9 in bench.node.programs
    assert not is_bound(bench, agent)
    bench.write("new.yaml", pod())
    settle(agent)
    assert agent.missing_for(handed()) == ""
    assert is_bound(bench, agent)
    assert agent.interfaces.evidence[NEW] is Evidence.CNI
    assert agent.objects.owner_of(ADDRESS) == str(NEW)
    assert agent.enforcement.tables.endpoints[NEW].number
    (local,) = (one for one in agent.objects.local.values() if one.key == NEW)
    assert local.addresses == (ADDRESS,)
    assert agent.objects.world_in_force.endpoints[NEW] == local


def test_the_pod_is_there_first(bench: Bench) -> None:
    """If the object exists already, the next step suffices."""
    bench.write("new.yaml", pod())
    agent = bench.agent()
    assert not is_bound(bench, agent)
    agent.hand_over(handed())
    assert agent.has_handovers
    assert agent.missing_for(handed())
    agent.step()
    assert not agent.has_handovers
    assert agent.missing_for(handed()) == ""
    assert is_bound(bench, agent)


def test_the_objects_addresses_take_over(bench: Bench) -> None:
    """When the object has addresses, these count, and not those of the handover."""
    bench.write("new.yaml", pod())
    agent = bench.agent()
    agent.hand_over(handed(addresses=["10.0.0.9/24", "fd00::9/64"]))
    agent.step()
    bench.write("new.yaml", pod("u-1", "10.0.0.9"))
    settle(agent)
    assert agent.objects.world_in_force.endpoints[NEW].addresses == (ADDRESS,)
    assert is_bound(bench, agent)
    assert agent.objects.owner_of(ip_address("fd00::9")) is None


def test_a_sandbox_made_anew(bench: Bench) -> None:
    """After a reboot, a pod's object has the address of a former sandbox. The pod has the address of the new one."""
    bench.write("new.yaml", pod("u-1", "10.0.0.8"))
    agent = bench.agent()
    agent.hand_over(handed())
    agent.step()
    assert agent.missing_for(handed()) == ""
    assert agent.objects.world_in_force.endpoints[NEW].addresses == (ADDRESS,)
    assert (agent.objects.owner_of(ip_address("10.0.0.8")), agent.objects.owner_of(ADDRESS)) == (None, str(NEW))
    bench.write("new.yaml", pod("u-1", "10.0.0.9"))
    settle(agent)
    assert agent.objects.world_in_force.endpoints[NEW].addresses == (ADDRESS,)
    again = handed(ifindex=11, interface="veth11", peer=[11, 2], addresses=["10.0.0.7/24"])
    links = {**WIRING.links, 11: Interface(11, "veth11", "veth", (11, 2))}
    bench.node.wiring, bench.node.gone, bench.node.news = replace(WIRING, links=links), {9}, True
    agent.hand_over(again)
    agent.step()
    assert agent.missing_for(again) == ""
    assert agent.missing_for(handed())
    assert agent.enforcement.applier.bindings[NEW].ifindex == 11
    assert agent.objects.world_in_force.endpoints[NEW].addresses == (ip_address("10.0.0.7"),)


def test_an_older_pod_of_that_name(bench: Bench) -> None:
    """An object with another UID is of an earlier pod. Neither its interface nor its policy becomes the new pod's."""
    bench.write("new.yaml", pod("u-0"))
    agent = bench.agent()
    agent.hand_over(handed())
    agent.step()
    assert "only another one's" in agent.missing_for(handed())
    assert not is_bound(bench, agent)
    assert agent.objects.owner_of(ADDRESS) is None
    bench.write("new.yaml", pod("u-1"))
    settle(agent)
    assert agent.missing_for(handed()) == ""
    bench.write("new.yaml", pod("u-2"))
    settle(agent)
    assert agent.missing_for(handed())
    assert agent.objects.owner_of(ADDRESS) is None


def test_without_a_uid_the_name_counts(bench: Bench) -> None:
    """If the runtime gives no UID, or the object has none, the name identifies the pod."""
    bench.write("new.yaml", pod("u-7"))
    agent = bench.agent()
    agent.hand_over(handed(uid=""))
    agent.step()
    assert agent.missing_for(handed(uid="")) == ""
    bench.write("new.yaml", pod(""))
    settle(agent)
    agent.hand_over(handed())
    agent.step()
    assert agent.missing_for(handed()) == ""


@pytest.mark.parametrize(
    "link",
    [
        None,
        replace(LINK, name="veth8"),
        replace(LINK, peer=(8, 2)),
        replace(LINK, peer=(9, 3)),
        replace(LINK, peer=None, kind="dummy"),
    ],
)
def test_an_interface_that_is_not_as_handed_over(bench: Bench, link: Interface | None) -> None:
    """Nothing is bound or answered unless the node has exactly this interface, with its other end in that namespace."""
    bench.write("new.yaml", pod())
    bench.node.wiring = replace(WIRING, links={**WIRING.links, **({} if link is None else {9: link})})
    agent = bench.agent()
    agent.hand_over(handed())
    agent.step()
    assert "no interface veth9" in agent.missing_for(handed())
    assert not is_bound(bench, agent)


def test_it_takes_an_interface_from_weaker_evidence(bench: Bench) -> None:
    """A handover is as strong as a plugin's result on the node."""
    agent = bench.agent()
    assert agent.interfaces.evidence[DB] is Evidence.ROUTE
    mine = handed(name="db", uid="", addresses=["10.0.0.2/32"])
    agent.hand_over(mine)
    agent.step()
    assert agent.missing_for(mine) == ""
    assert agent.interfaces.evidence[DB] is Evidence.CNI
    assert agent.enforcement.applier.bindings[DB].ifindex == 9


def test_it_ends_with_the_interface(bench: Bench) -> None:
    """Neither the address nor the binding outlives the interface."""
    bench.write("new.yaml", pod())
    agent = bench.agent()
    agent.hand_over(handed())
    agent.step()
    bench.node.wiring, bench.node.gone, bench.node.news = WIRING, {9}, True
    agent.step()
    assert not is_bound(bench, agent)
    assert agent.objects.owner_of(ADDRESS) is None
    bench.node.wiring = replace(WIRING, links={**WIRING.links, 9: LINK})
    bench.node.news = True
    settle(agent)
    assert not is_bound(bench, agent)


def test_an_address_that_another_has(bench: Bench) -> None:
    """The older holder keeps it, and the answer names the holder."""
    bench.write("new.yaml", pod())
    agent = bench.agent()
    mine = handed(addresses=["10.0.0.1/24"])
    agent.hand_over(mine)
    agent.step()
    assert agent.missing_for(mine) == "10.0.0.1 is Pod/shop/web's"
    assert not agent.objects.world_in_force.endpoints[NEW].addresses


def test_addresses_that_changed_places(bench: Bench) -> None:
    """After a reboot, addresses in objects may belong to other pods. Each pod gets the address from the runtime."""
    bench.write("new.yaml", pod("u-1", "10.0.0.9") + pod("u-2", "10.0.0.8").replace("name: new", "name: old"))
    agent = bench.agent()
    mine = handed(addresses=["10.0.0.8/24"])
    agent.hand_over(mine)
    agent.step()
    assert agent.missing_for(mine) == ""
    assert agent.objects.owner_of(ip_address("10.0.0.8")) == str(NEW)
    other = handed(name="old", uid="u-2", ifindex=11, interface="veth11", peer=[11, 2])
    links = {**WIRING.links, 9: LINK, 11: Interface(11, "veth11", "veth", (11, 2))}
    bench.node.wiring, bench.node.news = replace(WIRING, links=links), True
    agent.hand_over(other)
    agent.step()
    assert agent.missing_for(other) == agent.missing_for(mine) == ""
    assert agent.objects.owner_of(ADDRESS) == "Pod/shop/old"
    assert not [one for one in agent.problems if one.slug == "address-claimed"]


def test_what_no_policy_waits_for(bench: Bench) -> None:
    """A pod of another node, one in the host's network, and one without its Namespace get an error with the reason."""
    bench.write("new.yaml", pod().replace("nodeName: here", "nodeName: there"))
    agent = bench.agent()
    agent.hand_over(handed())
    agent.step()
    assert "another node" in agent.missing_for(handed())
    bench.write("new.yaml", pod().replace("nodeName: here,", "nodeName: here, hostNetwork: true,"))
    settle(agent)
    assert "host's network" in agent.missing_for(handed())
    bench.write("new.yaml", pod().replace("namespace: shop", "namespace: void"))
    lost = handed(namespace="void")
    agent.hand_over(lost)
    settle(agent)
    assert agent.missing_for(lost) == "its Namespace void has not arrived"


def test_a_further_interface(bench: Bench) -> None:
    """Any interface except the first stays closed, and its addresses are not the pod's."""
    bench.write("new.yaml", pod())
    agent = bench.agent()
    further = handed(inside="net1", addresses=["10.7.0.9/24"])
    agent.hand_over(further)
    agent.step()
    assert "further interface" in agent.missing_for(further)
    assert not is_bound(bench, agent)
    assert agent.objects.owner_of(ip_address("10.7.0.9")) is None


def test_programs_that_cannot_be_put_on(bench: Bench) -> None:
    """If the programs cannot be attached, the answer is an error."""
    bench.write("new.yaml", pod())
    bench.node.refuses = {9}
    agent = bench.agent()
    agent.hand_over(handed())
    agent.step()
    assert "has no programs" in agent.missing_for(handed())


def test_a_change_that_was_refused(bench: Bench) -> None:
    """While the kernel has no room, the answer is the reason."""
    agent = bench.agent()
    bench.write("new.yaml", pod())
    agent.hand_over(handed())
    bench.node.in_force["np_addr4"].hard_limit = len(bench.node.in_force["np_addr4"].rows)
    settle(agent)
    assert "stays in force" in agent.missing_for(handed())


def test_attach_answers_when_it_is_so(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """The operation begins, waits, and answers. If its time is over, answer and log state what was missing."""
    now_s = 0.0
    agent = bench.agent()
    attach = waits_of(agent, lambda: now_s)["attach"]
    wait = attach(REQUEST)
    settle(agent)
    assert wait() is None
    now_s = 30.0
    with pytest.raises(UnreachableError, match="Pod/shop/new is not under policy within 30 s: its Pod object has not"):
        wait()
    assert caplog.text.count("Pod/shop/new is not under policy within 30 s") == 1
    bench.write("new.yaml", pod())
    settle(agent)
    assert wait() == IN_FORCE


@pytest.mark.parametrize(
    "change",
    [
        {"namespace": ""},
        {"name": 7},
        {"uid": None},
        {"ifindex": "9"},
        {"ifindex": True},
        {"interface": None},
        {"peer": [9]},
        {"peer": [9, None]},
        {"addresses": []},
        {"addresses": ["10.0.0.9/33"]},
        {"addresses": "10.0.0.9"},
        {"timeout_s": -1},
        {"timeout_s": 601},
        {"timeout_s": 1e300},
        {"inside": ["eth0"]},
    ],
)
def test_a_request_that_is_none(change: dict[str, Any]) -> None:
    """A request that the plugin would not make is an error."""
    with pytest.raises(UsageError, match="not an interface to attach"):
        parse_attach({**REQUEST, **change})


def test_handovers_of_a_pod() -> None:
    """A new handover for an interface replaces the earlier one. A reused index ends the earlier handover."""
    known = Handovers()
    first, again, other = handed(), handed(ifindex=11, interface="veth11"), handed(ifindex=11, name="other")
    known.add(first)
    assert known.take_changed() == {NEW}
    known.add(first)
    assert not known.is_changed
    known.add(again)
    assert known.of(NEW) == [again]
    known.add(other)
    assert known.of(NEW) == []
    assert known.of(other.pod) == [other]
    known.forget({11})
    assert not [*known.pods]


# --- beyond the process ---------------------------------------------------------------------------------------------------


def lasting_agent(bench: Bench) -> Agent:
    """An agent that stores handovers beside the manifests."""
    bench.close()
    bench.ledgers.append(Ledger(bench.home / "numbers"))
    agent = Agent(
        AgentSettings("here"), bench.node, ManifestDirectory(bench.home / "manifests"), bench.ledgers[-1],
        lambda: bench.now_s, handovers_file=bench.home / "handovers",
    )  # fmt: skip
    agent.start()
    return agent


def test_the_next_agent_knows_it(bench: Bench) -> None:
    """A pod without an address in the cluster stays open with the next agent.

    One that was removed meanwhile does not.
    """
    bench.write("new.yaml", pod())
    agent = lasting_agent(bench)
    agent.hand_over(handed())
    agent.step()
    agent = lasting_agent(bench)
    assert is_bound(bench, agent)
    assert agent.missing_for(handed()) == ""
    assert agent.problems == []
    bench.node.wiring = WIRING
    agent = lasting_agent(bench)
    assert not is_bound(bench, agent)
    assert agent.objects.owner_of(ADDRESS) is None
    bench.node.wiring = replace(WIRING, links={**WIRING.links, 9: LINK})
    assert not is_bound(bench, lasting_agent(bench))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": 2, "handovers": []}',
        '{"format": 1, "handovers": {}}',
        '{"format": 1, "handovers": [{"namespace": "shop"}]}',
        '{"format": 1, "handovers": [' + "[" * 100_000,
    ],
)
def test_a_damaged_file(bench: Bench, text: str) -> None:
    """The file is kept under another name and reported, and the agent starts."""
    (bench.home / "handovers").write_text(text)
    agent = lasting_agent(bench)
    (problem,) = agent.problems
    assert (problem.slug, problem.severity) == ("interfaces-file", "warning")
    assert (bench.home / "handovers.damaged").read_text() == text


def test_what_is_right_in_a_damaged_file_counts(bench: Bench) -> None:
    """Each handover is read separately."""
    bench.write("new.yaml", pod())
    lines = [{"namespace": 7}, {**REQUEST, "op": None}]
    (bench.home / "handovers").write_text(json.dumps({"format": 1, "handovers": lines}))
    agent = lasting_agent(bench)
    assert is_bound(bench, agent)
    assert len(agent.problems) == 1


def test_no_room_for_the_file(bench: Bench) -> None:
    """A file that cannot be written is a warning, and the pod starts nevertheless."""
    bench.write("new.yaml", pod())
    agent = lasting_agent(bench)
    (bench.home / "handovers.draft").mkdir()
    agent.hand_over(handed())
    agent.step()
    assert agent.missing_for(handed()) == ""
    assert [one.slug for one in agent.problems] == ["interfaces-file"]
    (bench.home / "handovers.draft").rmdir()
    agent.hand_over(handed(uid="u-2"))
    agent.step()
    assert agent.problems == []


def test_a_dispute_outlives_the_agent(bench: Bench) -> None:
    """An endpoint that had an address before the restart, and still has its interface, keeps the address."""
    bench.write("new.yaml", pod())
    mine = handed(addresses=["10.0.0.1/24"])
    for _ in range(2):
        agent = lasting_agent(bench)
        agent.hand_over(mine)
        agent.step()
        assert agent.objects.owner_of(ip_address("10.0.0.1")) == "Pod/shop/web"
        assert agent.missing_for(mine)


def test_ready(bench: Bench) -> None:
    """An agent that answers is ready for pods."""
    assert waits_of(bench.agent())["ready"]({})() == IN_FORCE
