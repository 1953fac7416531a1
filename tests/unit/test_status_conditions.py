# SPDX-License-Identifier: Apache-2.0
"""The leading agent: who leads, and the conditions and Events that it writes, over real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from apiserver_traces import Clock, failure
from fake_apiserver import FakeServer
from writable_api import WritableApi, ok

from netpol_ebpf.errors import UnreachableError
from netpol_ebpf.policy.translate import Derivation
from netpol_ebpf.policy.types import PolicyKey, ResourceKey
from netpol_ebpf.resources.load import parse_documents
from netpol_ebpf.sources.kubernetes.client import Client, Cluster
from netpol_ebpf.status.conditions import EVENTS_PER_MINUTE, SWEEP_S, TEXT_S, ConditionWriter, View
from netpol_ebpf.status.election import DURATION_S, LEADS_S, LEASE, LEASES, Election
from netpol_ebpf.status.report import NodeReport, NodeStatus, Shortfall, parse_report, render_report

NOW_S = 1_800_000_000.0
CALICO = "/apis/projectcalico.org/v3"
KUBERNETES = "/apis/networking.k8s.io/v1"
POLICY = f"{CALICO}/namespaces/shop/networkpolicies/db"
PLAIN = f"{KUBERNETES}/namespaces/shop/networkpolicies/db"
KEY = "NetworkPolicy/shop/db"
PLAIN_KEY = "KubernetesNetworkPolicy/shop/db"
OBJECTS = """\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: shop, labels: {app: db}}
spec: {nodeName: n1, containers: [{name: c, image: x}]}
status: {podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: b, namespace: shop, labels: {app: db}}
spec: {nodeName: n2, containers: [{name: c, image: x}]}
status: {podIPs: [{ip: 10.0.0.2}]}
---
apiVersion: v1
kind: Pod
metadata: {name: c, namespace: shop, labels: {app: web}}
spec: {nodeName: n3, containers: [{name: c, image: x}]}
status: {podIPs: [{ip: 10.0.0.3}]}
---
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: db, namespace: shop, uid: u1, generation: 1}
spec: {selector: app == 'db'}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop, uid: u2, generation: 1}
spec: {podSelector: {matchLabels: {app: db}}}
"""


def view(text: str = OBJECTS, **faults: str) -> View:
    derivation = Derivation()
    for resource in parse_documents(text, "x").resources:
        derivation.upsert(resource)
    resources = {key: derivation.get(ResourceKey(*key)) for key in derivation.world.policies}
    revisions = {key: one.meta.revision for key, one in resources.items() if one is not None}
    return View(dict(derivation.world.policies), dict(derivation.world.endpoints), revisions, faults)


def reports(*of: tuple[str, dict[str, str]], short: tuple[Shortfall, ...] = ()) -> dict[str, NodeReport]:
    return {node: parse_report(render_report(node, NodeStatus(in_force, short), NOW_S, 60.0)) for node, in_force in of}


@pytest.fixture
def api() -> WritableApi:
    """With a status for Calico's kind alone."""
    found = WritableApi()
    found.objects[CALICO] = {"resources": [{"name": "networkpolicies"}, {"name": "networkpolicies/status"}]}
    found.objects[KUBERNETES] = {"resources": [{"name": "networkpolicies"}]}
    found.objects[f"{CALICO}/networkpolicies"] = {"items": [], "metadata": {}}
    found.objects[POLICY] = {"metadata": {"name": "db", "namespace": "shop", "uid": "u1", "generation": 1}}
    found.objects[PLAIN] = {"metadata": {"name": "db", "namespace": "shop", "uid": "u2", "generation": 1}}
    return found


@pytest.fixture
def server(api: WritableApi) -> Iterator[FakeServer]:
    with FakeServer(api) as made:
        yield made


@pytest.fixture
def clock() -> Clock:
    return Clock(0.0)


@pytest.fixture
def writer(server: FakeServer, clock: Clock) -> ConditionWriter:
    return ConditionWriter(Client(Cluster(server.url)), "n1", clock, lambda: NOW_S + clock.now_s)


def condition(api: WritableApi, path: str = POLICY) -> dict[str, Any]:
    (found,) = api.objects[path]["status"]["conditions"]
    return dict(found)


IN_FORCE = {KEY: "u1/1", PLAIN_KEY: "u2/1"}


def test_condition_follows_the_reports(api: WritableApi, writer: ConditionWriter, clock: Clock) -> None:
    """False until each node that needs the policy proves it; True then, once; a node that needs nothing has no part in it."""
    writer.round(view(), reports(("n1", IN_FORCE)))
    assert (condition(api)["status"], condition(api)["reason"]) == ("False", "NoReport")
    assert "on 1 of 2 nodes" in condition(api)["message"]
    since = condition(api)["lastTransitionTime"]
    clock.now_s += 1
    both = reports(("n1", IN_FORCE), ("n2", IN_FORCE))
    writer.round(view(), both)
    found = condition(api)
    assert (found["type"], found["status"], found["reason"], found["observedGeneration"]) == (
        "Programmed",
        "True",
        "Programmed",
        1,
    )
    assert found["lastTransitionTime"] > since
    writes = len(api.writes)
    same = view()
    for _ in range(100):
        clock.now_s += 2
        writer.round(same, {node: replace(one, renewed_s=NOW_S + clock.now_s) for node, one in both.items()})
    assert len(api.writes) == writes
    assert "status" not in api.objects[PLAIN], "Kubernetes has none for this kind"


def test_condition_is_of_one_generation(api: WritableApi, writer: ConditionWriter, clock: Clock) -> None:
    """A new generation is not programmed before it is reported, and its message is written rarely."""
    writer.round(view(), reports(("n1", IN_FORCE), ("n2", IN_FORCE)))
    newer = OBJECTS.replace("uid: u1, generation: 1", "uid: u1, generation: 2")
    writer.round(view(newer), reports(("n1", IN_FORCE), ("n2", IN_FORCE)))
    assert (condition(api)["status"], condition(api)["observedGeneration"], condition(api)["reason"]) == (
        "False",
        2,
        "Pending",
    )
    writes = len(api.writes)
    some = reports(("n1", {**IN_FORCE, KEY: "u1/2"}), ("n2", IN_FORCE))
    writer.round(view(newer), some)
    assert len(api.writes) == writes, "the text alone can wait"
    clock.now_s += TEXT_S
    writer.round(view(newer), some)
    assert len(api.writes) == writes + 1
    assert "on 1 of 2 nodes" in condition(api)["message"]


def test_lost_workload_is_found_by_the_next_sweep(api: WritableApi, writer: ConditionWriter, clock: Clock) -> None:
    """A policy that was in force everywhere is looked at again, also when its node falls silent."""
    writer.round(view(), reports(("n1", IN_FORCE), ("n2", IN_FORCE)))
    short = (Shortfall("NotEnforced", "Pod/shop/b: no interface", (KEY, PLAIN_KEY)),)
    later = {**reports(("n1", IN_FORCE)), **reports(("n2", {}), short=short)}
    clock.now_s += SWEEP_S
    writer.round(view(), later)
    assert (condition(api)["status"], condition(api)["reason"]) == ("False", "NotEnforced")
    clock.now_s += 1000
    writer.round(view(), later)
    assert condition(api)["reason"] == "StaleReport"


def test_refused_policy_gets_one_event(api: WritableApi, writer: ConditionWriter, clock: Clock) -> None:
    """For each generation and reason, also of a kind without a status; the next leader does not repeat those it reads."""
    short = (Shortfall("MapFull", "np_verdict has no room", (KEY, PLAIN_KEY)),)
    for _ in range(5):
        clock.now_s += 2
        writer.round(view(), reports(("n1", {}), ("n2", {}), short=short))
    events = api.of("POST", "/events")
    assert {(one["regarding"]["uid"], one["reason"], one["type"]) for one in events} == {
        ("u1", "MapFull", "Warning"),
        ("u2", "MapFull", "Warning"),
    }
    assert len(events) == 2
    assert all("np_verdict" in one["note"] and one["metadata"]["namespace"] == "shop" for one in events)
    assert condition(api)["reason"] == "MapFull"
    api.objects[f"{CALICO}/networkpolicies"] = {"items": [api.objects[POLICY]], "metadata": {}}
    other = ConditionWriter(writer.sender, "n2", clock, writer.wall)
    before = len(api.writes)
    other.round(view(), reports(("n1", {}), ("n2", {}), short=short))
    assert [one for _, _, one in api.writes[before:] if one.get("regarding", {}).get("uid") == "u1"] == []
    assert len([path for path in api.objects if path.rpartition("/")[0].endswith("/events")]) == 2
    assert api.of("PATCH", "/status")[-1]["metadata"]["uid"] == "u1"


def test_events_are_few_whatever_happens(api: WritableApi, writer: ConditionWriter, clock: Clock) -> None:
    """So many in a minute; the rest follow later."""
    text = OBJECTS + "".join(
        f"---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p{at}, namespace: shop, uid: x{at}, generation: 1}}\n"
        "spec: {podSelector: {}}\n"
        for at in range(50)
    )
    names = tuple(str(key) for key in view(text).policies)
    short = (Shortfall("MapFull", "full", names),)
    many, refused = view(text), reports(("n1", {}), ("n2", {}), ("n3", {}), short=short)
    for _ in range(3):
        writer.round(many, refused)
    assert len(api.of("POST", "/events")) == EVENTS_PER_MINUTE
    clock.now_s += 60
    writer.round(many, refused)
    assert len(api.of("POST", "/events")) == 2 * EVENTS_PER_MINUTE


def test_invalid_object_is_told_by_its_own_generation(api: WritableApi, writer: ConditionWriter) -> None:
    """The agent knows its last good state alone; the server has the generation of what is not valid."""
    api.objects[POLICY]["metadata"]["generation"] = 7
    both = reports(("n1", IN_FORCE), ("n2", IN_FORCE))
    writer.round(replace(view(), faults={POLICY: "spec.selector: no selector"}), both)
    found = condition(api)
    assert (found["status"], found["reason"], found["observedGeneration"]) == ("False", "Invalid", 7)
    assert "no selector" in found["message"]
    (event,) = api.of("POST", "/events")
    assert event["reason"] == "Invalid"
    api.objects[POLICY]["metadata"]["generation"] = 8
    newer = OBJECTS.replace("uid: u1, generation: 1", "uid: u1, generation: 8")
    writer.round(view(newer), reports(("n1", {**IN_FORCE, KEY: "u1/8"}), ("n2", {**IN_FORCE, KEY: "u1/8"})))
    assert (condition(api)["status"], condition(api)["observedGeneration"]) == ("True", 8)


@pytest.mark.parametrize("code", [403, 429, 500])
def test_refused_write_is_an_error_of_the_round(api: WritableApi, writer: ConditionWriter, code: int) -> None:
    """The next round writes it."""
    both = reports(("n1", IN_FORCE), ("n2", IN_FORCE))
    api.refusals["PATCH"] = [failure(code, "no right")]
    with pytest.raises(UnreachableError, match="no right"):
        writer.round(view(), both)
    writer.round(view(), both)
    assert condition(api)["status"] == "True"


def test_invalid_object_that_cannot_be_read_is_an_error_of_the_round(api: WritableApi, writer: ConditionWriter) -> None:
    """A missing right to `get` is told, and the next round tries again."""
    faulty = replace(view(), faults={POLICY: "spec.selector: no selector"})
    api.refusals["GET"] = [failure(403, "may not get networkpolicies")]
    with pytest.raises(UnreachableError, match="may not get"):
        writer.round(faulty, {})
    writer.round(faulty, {})
    assert condition(api)["reason"] == "Invalid"


def test_refused_kind_does_not_stop_the_others(api: WritableApi, writer: ConditionWriter) -> None:
    """A right that is missing for one of them; a group that the server does not have is no error."""
    short = (Shortfall("MapFull", "np_verdict has no room", (KEY, PLAIN_KEY)),)
    api.refusals["PATCH"] = [failure(403, "may not patch networkpolicies/status")]
    with pytest.raises(UnreachableError, match="may not patch"):
        writer.round(view(), reports(("n1", {}), ("n2", {}), short=short))
    assert {one["regarding"]["uid"] for one in api.of("POST", "/events")} == {"u2"}
    del api.objects[CALICO]
    writer.forget()
    writer.round(view(), reports(("n1", IN_FORCE), ("n2", IN_FORCE)))
    assert "status" not in api.objects[POLICY]


@pytest.mark.parametrize("code", [404, 409])
def test_policy_that_went_meanwhile_is_no_error(api: WritableApi, writer: ConditionWriter, code: int) -> None:
    """It was deleted, or made anew with another UID: the new one gets its own."""
    api.refusals["PATCH"] = [failure(code)]
    writer.round(view(), reports(("n1", IN_FORCE), ("n2", IN_FORCE)))
    assert "status" not in api.objects[POLICY]
    api.objects[POLICY]["metadata"]["uid"] = "u9"
    newer = OBJECTS.replace("uid: u1, generation: 1", "uid: u9, generation: 1")
    in_force = {**IN_FORCE, KEY: "u9/1"}
    writer.round(view(newer), reports(("n1", in_force), ("n2", in_force)))
    assert condition(api)["status"] == "True"


def test_policies_without_a_revision_are_not_told(api: WritableApi, writer: ConditionWriter) -> None:
    """They are from manifests, or from a server that counts no generations."""
    writer.round(view(OBJECTS.replace("generation: 1", "generation: 0")), {})
    assert api.writes == []
    assert PolicyKey("NetworkPolicy", "shop", "db") in view().revisions


# --- who leads ----------------------------------------------------------------------------------------------------------


def election(server: FakeServer, node: str, clock: Clock) -> Election:
    return Election(Client(Cluster(server.url)), node, 1, clock, lambda: 0.5)


def test_one_leads_and_another_follows_when_it_is_gone(server: FakeServer, api: WritableApi, clock: Clock) -> None:
    """The Lease is taken when it is absent or expired by the server's clock, and an old leader stops before that."""
    one, two = election(server, "n1", clock), election(server, "n2", clock)
    one.step()
    two.step()
    assert (one.is_leading, two.is_leading) == (True, False)
    assert api.objects[f"{LEASES}/{LEASE}"]["spec"]["holderIdentity"] == "n1"
    for _ in range(10):
        clock.now_s += 15
        api.time_s += 15
        one.step()
        two.step()
    assert (one.is_leading, two.is_leading) == (True, False)
    clock.now_s += LEADS_S
    api.time_s += LEADS_S
    two.step()
    assert (one.is_leading, two.is_leading) == (False, False)
    clock.now_s += DURATION_S - LEADS_S
    api.time_s += DURATION_S - LEADS_S
    two.step()
    one.step()
    assert (one.is_leading, two.is_leading) == (False, True)


def test_two_that_take_it_at_once_are_one(server: FakeServer, api: WritableApi, clock: Clock) -> None:
    """409: the other was first."""
    one = election(server, "n1", clock)
    api.refusals["POST"] = [failure(409)]
    one.step()
    assert (one.is_leading, one.problem) == (False, "")
    one.step()
    api.refusals["PUT"] = [failure(409)]
    one.step()
    assert not one.is_leading


@pytest.mark.parametrize("code", [403, 404, 500])
def test_lease_that_cannot_be_written_is_told(server: FakeServer, api: WritableApi, clock: Clock, code: int) -> None:
    """Nobody leads, and the conditions stay as they are."""
    one = election(server, "n1", clock)
    api.refusals["POST"] = [failure(code, "no right to leases")]
    one.step()
    assert (one.is_leading, one.problem) == (False, "no right to leases")
    one.step()
    assert (one.is_leading, one.problem) == (True, "")
    api.refusals["GET"] = [ok({"metadata": {}, "spec": {"holderIdentity": "n9", "renewTime": "nonsense"}})]
    one.step()
    assert "nonsense" in one.problem
    assert one.is_leading, "it still holds the Lease"


def test_followers_of_a_large_cluster_look_rarely(server: FakeServer, clock: Clock) -> None:
    """Together they look 20 times in a second."""
    election(server, "n1", clock).step()
    two = election(server, "n2", clock)
    two.nodes = 5000
    assert two.step() == 250.0
