# SPDX-License-Identifier: Apache-2.0
"""Reports, conditions, Events and rights at a real API server, with the rights of deploy/manifests and deploy/roles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import yaml
from api_objects import DEPLOY, documents
from server import TOKEN, Server
from test_agent_rights import ROOT, give, role, without
from test_source import cluster

from netpol_ebpf.cli import can_i
from netpol_ebpf.cli.wait import wait
from netpol_ebpf.errors import InvalidInputError, PrivilegeError, UnreachableError
from netpol_ebpf.policy.translate import Derivation
from netpol_ebpf.policy.types import PolicyKey, ResourceKey
from netpol_ebpf.resources.load import parse_object
from netpol_ebpf.sources.kubernetes import watching
from netpol_ebpf.sources.kubernetes.client import Client, Cluster, Credentials
from netpol_ebpf.sources.kubernetes.watching import KindWatcher
from netpol_ebpf.status.conditions import ConditionWriter, View
from netpol_ebpf.status.election import LEASE, LEASES, Election
from netpol_ebpf.status.kinds import POLICY_KINDS
from netpol_ebpf.status.lookup import look_up
from netpol_ebpf.status.report import COLLECTION, NodeReport, NodeStatus, Shortfall
from netpol_ebpf.status.watched_reports import REPORTS, ReportStore
from netpol_ebpf.status.writer import ReportWriter

DEADLINE_S = 60.0
AGENT = "status-agent"
SHOP = "status-shop"
PODS = """\
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: status-shop, labels: {{app: {name}}}}}
spec: {{nodeName: {node}, containers: [{{name: c, image: x}}]}}
status: {{podIPs: [{{ip: 10.0.0.{last}}}], podIP: 10.0.0.{last}}}
"""
POLICIES: dict[str, dict[str, Any]] = {
    "KubernetesNetworkPolicy": {"podSelector": {"matchLabels": {"app": "db"}}},
    "NetworkPolicy": {"selector": "app == 'db'"},
    "GlobalNetworkPolicy": {"namespaceSelector": f"projectcalico.org/name == '{SHOP}'"},
    "StagedNetworkPolicy": {"selector": "app == 'db'"},
    "StagedGlobalNetworkPolicy": {"namespaceSelector": f"projectcalico.org/name == '{SHOP}'"},
    "StagedKubernetesNetworkPolicy": {"podSelector": {}},
    "AdminNetworkPolicy": {
        "priority": 7,
        "subject": {"namespaces": {"matchLabels": {"kubernetes.io/metadata.name": SHOP}}},
    },
    "BaselineAdminNetworkPolicy": {
        "subject": {"namespaces": {"matchLabels": {"kubernetes.io/metadata.name": SHOP}}},
    },
    "ClusterNetworkPolicy": {
        "tier": "Admin",
        "priority": 7,
        "subject": {"namespaces": {"matchLabels": {"kubernetes.io/metadata.name": SHOP}}},
    },
}
"""A spec of each kind. All select the pod db."""


def obj(kind: str, spec: dict[str, Any] | None = None) -> dict[str, Any]:
    of = POLICY_KINDS[kind]
    metadata = {"name": "default" if kind.startswith("Baseline") else "db"}
    metadata |= {"namespace": SHOP} if of.is_namespaced else {}
    return {"apiVersion": of.api_version, "kind": of.kind, "metadata": metadata, "spec": spec or POLICIES[kind]}


def key_of(kind: str) -> PolicyKey:
    metadata = obj(kind)["metadata"]
    return PolicyKey(kind, metadata.get("namespace", ""), metadata["name"])


def path_of(kind: str) -> str:
    key = key_of(kind)
    return POLICY_KINDS[kind].path(key.namespace, key.name)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "GRACE_S", 1.0)
    monkeypatch.setattr(watching, "LONGEST_RETRY_S", 1.0)


@pytest.fixture(scope="module")
def shop(server: Server) -> Iterator[Server]:
    """A server with a namespace, pods on two nodes, a policy of each kind, and the agent's rights."""
    server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SHOP}})
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": SHOP}}
    assert server.apply(account).status in (200, 201)
    for last, (name, node) in enumerate([("db", "n1"), ("web", "n2")], 1):
        pod = yaml.safe_load(PODS.format(name=name, node=node, last=last))
        assert server.apply(pod).status in (200, 201)
        path = f"/api/v1/namespaces/{SHOP}/pods/{name}/status"
        merge = "application/merge-patch+json"
        assert server.request("PATCH", path, {"status": pod["status"]}, content_type=merge).status == 200
    for kind in POLICIES:
        answer = server.apply(obj(kind))
        assert answer.status in (200, 201), answer.message
    give(server, AGENT, role())
    give_lease(server, AGENT)
    server.wait_for(lambda: server.get(COLLECTION, user=AGENT).status == 200, "the role")
    yield server
    for kind in POLICIES:
        server.request("DELETE", path_of(kind))


def give_lease(server: Server, user: str, verb: str = "") -> None:
    """Give a user the rights to the Lease, except one verb."""
    documents = list(yaml.safe_load_all((ROOT / "deploy" / "manifests" / "rbac.yaml").read_text(encoding="utf-8")))
    (own,) = (one for one in documents if one["kind"] == "Role")
    rules = [{**rule, "verbs": [one for one in rule["verbs"] if one != verb]} for rule in own["rules"]]
    named = {"name": user, "namespace": "kube-system"}
    rbac = "rbac.authorization.k8s.io"
    assert server.apply({**own, "metadata": named, "rules": [one for one in rules if one["verbs"]]}).status in (
        200,
        201,
    )
    binding = {
        "apiVersion": f"{rbac}/v1", "kind": "RoleBinding", "metadata": named,
        "roleRef": {"apiGroup": rbac, "kind": "Role", "name": user},
        "subjects": [{"apiGroup": rbac, "kind": "User", "name": user}],
    }  # fmt: skip
    assert server.apply(binding).status in (200, 201)


def revision(server: Server, kind: str) -> str:
    metadata = server.get(path_of(kind)).body["metadata"]
    return f"{metadata['uid']}/{metadata['generation']}"


def write(server: Server, node: str, in_force: dict[str, str], *short: Shortfall, user: str = AGENT) -> ReportWriter:
    """Write a report as the agent of a node does."""
    writer = ReportWriter(Client(cluster(server, user)), node, chance=lambda: 0.0)
    writer.offer(NodeStatus(in_force, short))
    writer.step()
    return writer


def read_reports(server: Server, user: str = AGENT) -> tuple[dict[str, NodeReport], str]:
    """The reports as the leader lists them, or the reason why it cannot."""
    store = ReportStore()
    watcher = KindWatcher(REPORTS, Client(cluster(server, user)), store, lambda: 1.0)
    until_s = time.monotonic() + DEADLINE_S
    watcher._streams = False
    while not store.is_listed and store.problem is None:
        assert time.monotonic() < until_s
        time.sleep(min(watcher.step(), 0.2))
    return store.reports(), "" if store.problem is None else store.problem.message


def view(server: Server, faults: dict[str, str] | None = None) -> View:
    """The cluster as an agent knows it."""
    derivation = Derivation()
    of = [("v1", "Namespace", "/api/v1/namespaces"), ("v1", "Pod", f"/api/v1/namespaces/{SHOP}/pods")]
    items = [
        {**one, "apiVersion": version, "kind": kind}
        for version, kind, path in of
        for one in server.get(path).body["items"]
    ]
    items += [server.get(path_of(kind)).body for kind in POLICIES]
    for item in items:
        for resource in parse_object(item, "x").resources:
            derivation.upsert(resource)
    world = derivation.world
    found = {key: derivation.get(ResourceKey(*key)) for key in world.policies}
    revisions = {key: one.meta.revision for key, one in found.items() if one is not None}
    return View(dict(world.policies), dict(world.endpoints), revisions, faults or {})


def condition(server: Server, kind: str) -> dict[str, Any]:
    conditions = server.get(path_of(kind)).body.get("status", {}).get("conditions", [])
    return next((dict(one) for one in conditions if one["type"] == "Programmed"), {})


# --- reports and conditions -------------------------------------------------------------------------------------------------


def test_report_is_made_changed_and_read(shop: Server) -> None:
    """The report is written by server-side apply with only the rights create and patch.

    The schema keeps every field.
    """
    short = Shortfall("MapFull", "np_verdict has no room", ("NetworkPolicy/shop/x",))
    shop.request("DELETE", f"{COLLECTION}/n1")
    assert shop.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}}).status in (200, 201)
    writer = write(shop, "n1", {"P/a": "u/1"}, short)
    assert (writer.problem, writer.written) == (None, 1)
    writer.offer(NodeStatus({"P/a": "u/2"}))
    writer._due_s = writer._earliest_s = 0.0
    writer.step()
    found, problem = read_reports(shop)
    assert problem == ""
    assert (found["n1"].has("u/2"), found["n1"].has("u/1"), found["n1"].shortfalls) == (True, False, ())
    (owner,) = shop.get(f"{COLLECTION}/n1").body["metadata"]["ownerReferences"]
    assert owner["uid"] == shop.get("/api/v1/nodes/n1").body["metadata"]["uid"]
    table = shop.get(COLLECTION, accept="application/json;as=Table;v=v1;g=meta.k8s.io").body
    assert [one["name"] for one in table["columnDefinitions"]] == ["Name", "Policies", "Missing", "Renewed", "Age"]


@pytest.mark.parametrize("kind", POLICIES)
def test_policy_is_programmed_when_its_nodes_say_so(shop: Server, kind: str) -> None:
    """`status --policy` and the condition (if the kind has one) say so. The condition changes no generation."""
    agent = Client(cluster(shop, AGENT))
    name, now = str(key_of(kind)), revision(shop, kind)
    shop.request("DELETE", f"{COLLECTION}/n2")
    write(shop, "n1", {name: now})
    needs_both = kind not in ("KubernetesNetworkPolicy", "NetworkPolicy", "StagedNetworkPolicy")
    writer = ConditionWriter(agent, "n1")
    writer.round(view(shop), read_reports(shop)[0])
    standing = look_up(_admin(shop), key_of(kind))
    assert (standing.is_programmed, len(standing.nodes)) == (not needs_both, 2 if needs_both else 1)
    write(shop, "n2", {name: now})
    writer.round(view(shop), read_reports(shop)[0])
    assert look_up(_admin(shop), key_of(kind)).is_programmed
    if kind == "KubernetesNetworkPolicy":
        assert condition(shop, kind) == {}
    else:
        found = condition(shop, kind)
        assert (found["status"], found["reason"], found["observedGeneration"]) == (
            "True",
            "Programmed",
            int(now.rpartition("/")[2]),
        )
    assert revision(shop, kind) == now


def _admin(server: Server) -> Client:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return Client(
        Cluster(
            f"https://127.0.0.1:{server.port}",
            authority=server._authority.read_bytes,
            credentials=lambda _refused: Credentials(headers),
        )
    )


def test_new_generation_is_awaited(shop: Server) -> None:
    """`wait` ends when the node reports the generation of the edit, and not before."""
    key = key_of("KubernetesNetworkPolicy")
    write(shop, "n1", {str(key): revision(shop, key.kind)})
    admin = _admin(shop)
    look: Callable[[PolicyKey], dict[str, Any]] = lambda one: look_up(admin, one).as_dict()  # noqa: E731
    assert wait(look, [key], 0.0)[0]["programmed"]
    assert shop.apply(obj(key.kind, {**POLICIES[key.kind], "policyTypes": ["Egress"]})).status == 200
    (found,) = wait(look, [key], 0.0)
    assert (found["programmed"], found["nodes"][0]["reason"]) == (False, "Pending")
    assert found["nodes"][0]["generation"] == found["generation"] - 1
    write(shop, "n1", {str(key): revision(shop, key.kind)})
    assert wait(look, [key], 10.0)[0]["programmed"]
    with pytest.raises(InvalidInputError, match="has no"):
        look(PolicyKey(key.kind, SHOP, "absent"))


def test_refused_and_invalid_policies_get_conditions_and_events(shop: Server) -> None:
    """The Events belong to the object, so `kubectl describe` shows them."""
    kind = "NetworkPolicy"
    name = str(key_of(kind))
    write(shop, "n1", {}, Shortfall("MapFull", "np_verdict has no room", (name,)))
    agent = Client(cluster(shop, AGENT))
    writer = ConditionWriter(agent, "n1")
    writer.round(view(shop), read_reports(shop)[0])
    assert (condition(shop, kind)["status"], condition(shop, kind)["reason"]) == ("False", "MapFull")
    events = shop.get(f"/apis/events.k8s.io/v1/namespaces/{SHOP}/events").body["items"]
    uid = revision(shop, kind).partition("/")[0]
    (event,) = (one for one in events if one["regarding"].get("uid") == uid and one["reason"] == "MapFull")
    assert (event["type"], event["regarding"]["kind"]) == ("Warning", kind)
    writer.round(replace(view(shop), faults={path_of("GlobalNetworkPolicy"): "spec.selector: wrong"}), {})
    assert condition(shop, "GlobalNetworkPolicy")["reason"] == "Invalid"
    events = shop.get("/apis/events.k8s.io/v1/namespaces/default/events").body["items"]
    assert any(one["reason"] == "Invalid" and one["regarding"]["kind"] == "GlobalNetworkPolicy" for one in events)


def test_one_agent_holds_the_lease(shop: Server) -> None:
    """The election uses the server's clock and the Lease's version."""
    shop.request("DELETE", f"{LEASES}/{LEASE}")
    one, two = (Election(Client(cluster(shop, AGENT)), node) for node in ("n1", "n2"))
    for each in (one, two, one, two):
        each.step()
        assert each.problem == ""
    assert (one.is_leading, two.is_leading) == (True, False)
    assert shop.get(f"{LEASES}/{LEASE}").body["spec"]["holderIdentity"] == "n1"


# --- rights -----------------------------------------------------------------------------------------------------------------


STATUS_RIGHTS = [
    *(("netpol-ebpf.io", "nodereports", verb) for verb in ("create", "patch", "list", "watch")),
    ("events.k8s.io", "events", "create"),
    *((one.api_version.partition("/")[0], one.plural, "get") for one in POLICY_KINDS.values()),
    *(
        (one.api_version.partition("/")[0], f"{one.plural}/status", "patch")
        for name, one in POLICY_KINDS.items()
        if name != "KubernetesNetworkPolicy"
    ),
]


@pytest.mark.parametrize("right", STATUS_RIGHTS, ids=lambda one: f"{one[2]}-{one[1].replace('/', '-')}-{one[0]}")
def test_each_right_that_is_missing_is_named(shop: Server, right: tuple[str, str, str]) -> None:
    """The problem in `netpolctl status` names the verb and the resource."""
    group, resource, verb = right
    user = f"without-{verb}-{resource.replace('/', '-')}-{group}"
    give(shop, user, without(group, resource, verb))
    shop.wait_for(lambda: shop.get("/api/v1/nodes", user=user).status == 200, "the role")
    message = problem_of(shop, user, right)
    assert verb in message
    assert resource in message


def problem_of(server: Server, user: str, right: tuple[str, str, str]) -> str:
    """The problem of an agent without one right, when it needs that right."""
    group, resource, verb = right
    if resource == "nodereports" and verb in ("create", "patch"):
        server.request("DELETE", f"{COLLECTION}/n9")
        problem = write(server, "n9", {}, user=user).problem
        assert problem is not None
        return problem.message
    if resource == "nodereports":
        store = ReportStore()
        watcher = KindWatcher(REPORTS, Client(cluster(server, user)), store, lambda: 1.0)
        watcher._streams = verb == "watch"
        until_s = time.monotonic() + DEADLINE_S
        while store.problem is None:
            assert time.monotonic() < until_s
            time.sleep(min(watcher.step(), 0.2))
        return f"nodereports: {store.problem.message}"
    writer = ConditionWriter(Client(cluster(server, user)), "n1")
    kind = next(
        name
        for name, one in POLICY_KINDS.items()
        if resource == "events" or (one.api_version.startswith(group) and one.plural == resource.partition("/")[0])
    )
    path = path_of(kind)
    whole = view(server)
    newer = f"{revision(server, kind).partition('/')[0]}/999"  # the server has no condition for this generation
    only = View({key_of(kind): whole.policies[key_of(kind)]}, whole.endpoints, {key_of(kind): newer})
    with pytest.raises(UnreachableError) as found:
        writer.round(replace(only, faults={} if resource.endswith("/status") else {path: "a fault of its own"}), {})
    return found.value.message


@pytest.mark.parametrize("verb", ["get", "create", "update"])
def test_each_right_to_the_lease_that_is_missing_is_named(shop: Server, verb: str) -> None:
    """The right is needed when the Lease is created or when it is renewed."""
    user = f"without-{verb}-lease"
    give(shop, user, role())
    give_lease(shop, user, verb)
    shop.wait_for(lambda: shop.get("/api/v1/nodes", user=user).status == 200, "the role")
    shop.request("DELETE", f"{LEASES}/{LEASE}")
    one = Election(Client(cluster(shop, user)), "n1")
    one.step()
    if verb == "update":
        assert one.problem == ""
        one.step()
    assert verb in one.problem
    assert "leases" in one.problem


def test_status_needs_rights_of_the_user(shop: Server) -> None:
    """Without the right to read reports, the answer says nothing about the policy."""
    with pytest.raises(PrivilegeError):
        look_up(Client(cluster(shop, "nobody")), key_of("KubernetesNetworkPolicy"))


# --- can-i ------------------------------------------------------------------------------------------------------------------

MEMBERS = {"security": "security", "application": "shop-developers", "tenant": "tenant-blue", "auditor": "auditors"}


@pytest.fixture(scope="module")
def guarded(server: Server) -> Iterator[Server]:
    """A server with the roles and the admission policy."""
    for name in ("shop", "blue"):
        server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    admission = documents(DEPLOY / "chart" / "admission" / "tier-rights.yaml")
    for one in (*admission, *(one for path in sorted((DEPLOY / "roles").glob("*.yaml")) for one in documents(path))):
        assert server.apply(one, fieldValidation="Strict").status in (200, 201)
    server.wait_for(lambda: ask(server, "security", "create", "globalnetworkpolicies", "security")["allowed"], "roles")
    yield server
    for one in reversed(admission):
        path = f"/apis/admissionregistration.k8s.io/v1/{one['kind'].lower()[:-1] + 'ies' if one['kind'].endswith('y') else one['kind'].lower() + 's'}"
        server.request("DELETE", f"{path}/{one['metadata']['name']}")


def ask(
    server: Server, who: str, verb: str, kind: str, tier: str, namespace: str = "", name: str = ""
) -> dict[str, Any]:
    headers = {
        "Authorization": f"Bearer {TOKEN}",
        "Impersonate-User": f"{who}-member",
        "Impersonate-Group": MEMBERS[who],
    }
    where = Cluster(
        f"https://127.0.0.1:{server.port}",
        authority=server._authority.read_bytes,
        credentials=lambda _refused: Credentials(headers),
    )
    return can_i.ask(Client(where), verb, kind, tier, namespace, name)


ROWS = [
    ("create", "globalnetworkpolicies", "security", "", {"security"}),
    ("delete", "stagedglobalnetworkpolicies", "security", "", {"security"}),
    ("patch", "networkpolicies", "security", "shop", {"security"}),
    ("create", "globalnetworkpolicies", "application", "", set()),
    ("create", "networkpolicies", "application", "shop", {"application"}),
    ("update", "stagednetworkpolicies", "application", "shop", {"application"}),
    ("create", "networkpolicies", "application", "blue", set()),
    ("create", "networkpolicies", "default", "shop", set()),
    ("create", "networkpolicies", "default", "blue", {"tenant"}),
    ("deletecollection", "networkpolicies", "default", "blue", {"tenant"}),
    ("list", "networkpolicies", "security", "", {"security", "auditor"}),
    ("list", "networkpolicies", "security", "blue", {"security", "auditor", "tenant"}),
]


@pytest.mark.parametrize(("verb", "kind", "tier", "namespace", "allowed"), ROWS)
def test_can_i_says_what_the_roles_grant(
    guarded: Server, verb: str, kind: str, tier: str, namespace: str, allowed: set[str]
) -> None:
    """The answer agrees with the writes in tests/apiserver/test_roles.py.

    Reads are plain rights, and the answer says so.
    """
    answers = {who: ask(guarded, who, verb, kind, tier, namespace) for who in MEMBERS}
    assert {who for who, one in answers.items() if one["allowed"]} == allowed
    assert all(can_i.NO_READS in one["notes"] for one in answers.values())


def test_can_i_names_what_grants_and_what_is_missing(guarded: Server) -> None:
    """The answer has RBAC's own reason, and the right to the virtual resource."""
    answer = ask(guarded, "application", "create", "networkpolicies", "application", "shop")
    assert any("netpol-application-team" in one["why"] for one in answer["checks"])
    answer = ask(guarded, "tenant", "create", "networkpolicies", "security", "blue")
    missing = {one["right"] for one in answer["checks"] if not one["allowed"]}
    assert missing == {"get tiers security", "create tier.networkpolicies security.* in namespace blue"}
