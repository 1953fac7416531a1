# SPDX-License-Identifier: Apache-2.0
"""deploy/chart/admission decides as SEMANTICS 8.1 says who may write enforced and staged policies of a tier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from api_objects import CHART, documents
from server import Answer, Server, collection

VERSION = "projectcalico.org/v3"
GROUP = "projectcalico.org"
PLAIN = (
    *("networkpolicies", "globalnetworkpolicies", "stagednetworkpolicies", "stagedglobalnetworkpolicies"),
    "stagedkubernetesnetworkpolicies",
)
TIERED = tuple(f"tier.{resource}" for resource in PLAIN[:4])
ALL = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")


@dataclass(frozen=True)
class Right:
    """One rule of a role. ``namespace``: the rule is bound in this namespace; "": in the whole cluster."""

    resources: tuple[str, ...]
    names: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ALL
    namespace: str = ""


def tier_get(*names: str) -> Right:
    return Right(("tiers",), names, ("get",))


USERS: Mapping[str, tuple[Right, ...]] = {
    "none": (),
    "viewer": (tier_get("guard"),),
    "owner": (tier_get("guard"), Right(TIERED, ("guard.*",))),
    "nsowner": (tier_get("guard"), Right(TIERED, ("guard.*",), namespace="dev")),
    "nogettier": (Right(TIERED, ("guard.*",)),),
    "onename": (tier_get("guard"), Right(("tier.networkpolicies", "tier.stagednetworkpolicies"), ("p-one", "p-new"))),
    "onenameup": (
        tier_get("guard"),
        Right(("tier.networkpolicies", "tier.stagednetworkpolicies"), ("p-one", "p-new"), ("get", "update")),
    ),
    "gnpname": (
        tier_get("guard"),
        Right(("tier.globalnetworkpolicies", "tier.stagedglobalnetworkpolicies"), ("g-one",)),
    ),
    "alltiers": (tier_get(), Right(TIERED)),
    "apponly": (tier_get("app", "default"), Right(TIERED, ("app.*",))),
    "both": (tier_get("guard", "app"), Right(TIERED, ("guard.*", "app.*"))),
    "dev": (
        tier_get("default"),
        Right(("tier.networkpolicies", "tier.stagednetworkpolicies"), ("default.*",), namespace="dev"),
    ),
    "wild": (Right(("*",)),),
    "enforced-only": (tier_get("guard"), Right(TIERED[:2], ("guard.*",))),
    "staged-only": (tier_get("guard"), Right(TIERED[2:], ("guard.*",))),
}
"""The users. Each also has the plain rights on all policies."""


def policy(kind: str, name: str, tier: object = None, namespace: str = "dev") -> dict[str, Any]:
    """A policy. Without a tier it has no spec at all."""
    metadata = {"name": name} | ({} if "Global" in kind else {"namespace": namespace})
    return {"apiVersion": VERSION, "kind": kind, "metadata": metadata} | (
        {} if tier is None else {"spec": {"tier": tier}}
    )


@dataclass(frozen=True)
class Case:
    """One request, and its result for each user. ``is_global``: the request is for the kind without namespaces."""

    about: str
    verb: str
    name: str
    answers: Mapping[str, bool]
    tier: object = None
    is_global: bool = False
    namespace: str = "dev"
    body: Mapping[str, Any] | None = None
    query: Mapping[str, str] = field(default_factory=dict)

    def send(self, server: Server, kind: str, user: str | None) -> Answer:
        """Send the request as a dry run."""
        obj = policy(kind, self.name, self.tier, self.namespace)
        path = collection(obj)
        query = {"dryRun": "All", **self.query}
        if self.verb == "create":
            if self.body is not None:
                obj |= self.body
            return server.request("POST", path, obj, user=user, **query)
        if self.verb == "replace":
            obj["metadata"]["resourceVersion"] = server.get(f"{path}/{self.name}").body["metadata"]["resourceVersion"]
            return server.request("PUT", f"{path}/{self.name}", obj, user=user, **query)
        if self.verb == "apply":
            return server.apply(obj, user=user, **query)
        if self.verb == "patch":
            patch = "application/merge-patch+json"
            return server.request("PATCH", f"{path}/{self.name}", self.body, user=user, content_type=patch, **query)
        if self.verb == "status":
            patch = "application/merge-patch+json"
            where = f"{path}/{self.name}/status"
            return server.request("PATCH", where, {"status": {}}, user=user, content_type=patch, **query)
        if self.verb == "delete":
            return server.request("DELETE", f"{path}/{self.name}", user=user, **query)
        if self.verb == "deletecollection":
            return server.request("DELETE", path, user=user, **query)
        return server.get(path if self.verb == "list" else f"{path}/{self.name}", user=user)


def users(*, may: str = "", may_not: str = "") -> dict[str, bool]:
    return dict.fromkeys(may.split(), True) | dict.fromkeys(may_not.split(), False)


CASES = (
    Case(
        "create in guard, namespace dev",
        "create",
        "x",
        users(may="owner nsowner alltiers both wild", may_not="none viewer nogettier onename apponly dev"),
        tier="guard",
    ),
    Case(
        "create in guard, namespace prod",
        "create",
        "x",
        users(may="owner", may_not="nsowner onename"),
        tier="guard",
        namespace="prod",
    ),
    Case(
        "create p-new, named by the right", "create", "p-new", users(may="onename", may_not="onenameup"), tier="guard"
    ),
    Case(
        "create a global one in guard",
        "create",
        "g",
        users(may="owner alltiers wild", may_not="nsowner nogettier onename gnpname"),
        tier="guard",
        is_global=True,
    ),
    Case("create g-one in guard", "create", "g-one", users(may="gnpname"), tier="guard", is_global=True),
    Case("create in tier default", "create", "x", users(may="dev alltiers", may_not="owner"), body={"spec": {}}),
    Case(
        "create in tier default, namespace prod",
        "create",
        "x",
        users(may_not="dev"),
        namespace="prod",
        body={"spec": {}},
    ),
    Case("create a global one in tier default", "create", "g", users(may_not="dev"), is_global=True, body={"spec": {}}),
    Case("create with tier null", "create", "x", users(may="dev"), body={"spec": {"tier": None}}),
    Case("create without spec", "create", "x", users(may="dev")),
    Case(
        "create with generateName in guard",
        "create",
        "",
        users(may="owner"),
        body={"metadata": {"generateName": "made-", "namespace": "dev"}, "spec": {"tier": "guard"}},
    ),
    Case(
        "create with generateName of the one name",
        "create",
        "",
        users(may_not="onename"),
        body={"metadata": {"generateName": "p-one", "namespace": "dev"}, "spec": {"tier": "guard"}},
    ),
    Case("create guard.x in guard", "create", "guard.x", users(may="owner"), tier="guard"),
    Case("a prefix of the name gives no right", "create", "guard.x", users(may_not="owner"), tier="app"),
    Case("create in a tier that does not exist", "create", "x", users(may="alltiers"), tier="nowhere"),
    Case(
        "replace, stays in guard",
        "replace",
        "p-guard",
        users(may="owner nsowner", may_not="nogettier viewer apponly onename"),
        tier="guard",
    ),
    Case("replace p-one", "replace", "p-one", users(may="onename onenameup"), tier="guard"),
    Case("patch counts as update", "patch", "p-one", users(may="onenameup"), body={"spec": {"order": 5}}),
    Case(
        "replace moves it from guard to app",
        "replace",
        "p-guard",
        users(may="both alltiers", may_not="owner apponly nsowner"),
        tier="app",
    ),
    Case(
        "merge patch moves it from app to guard",
        "patch",
        "p-app",
        users(may="both", may_not="owner apponly"),
        body={"spec": {"tier": "guard"}},
    ),
    Case(
        "merge patch removes the tier: to default",
        "patch",
        "p-guard",
        users(may="alltiers", may_not="apponly owner"),
        body={"spec": {"tier": None}},
    ),
    Case("from app to default", "patch", "p-app", users(may_not="apponly"), body={"spec": {"tier": None}}),
    Case("server-side apply creates", "apply", "new", users(may="owner", may_not="viewer apponly"), tier="guard"),
    Case("server-side apply moves it to app", "apply", "p-guard", users(may="both", may_not="owner"), tier="app"),
    Case(
        "delete",
        "delete",
        "p-guard",
        users(may="owner nsowner alltiers", may_not="viewer nogettier apponly"),
    ),
    Case("delete a global one", "delete", "g-guard", users(may="owner", may_not="nsowner"), is_global=True),
    Case("delete p-one", "delete", "p-one", users(may="onename", may_not="onenameup")),
    Case("delete all of a namespace", "deletecollection", "", users(may="alltiers", may_not="owner none")),
    Case(
        "delete those of guard",
        "deletecollection",
        "",
        users(may="owner", may_not="apponly"),
        query={"fieldSelector": "spec.tier=guard"},
    ),
    Case("status is plain rights", "status", "p-guard", users(may="none")),
    Case("a label alone", "patch", "p-guard", users(may_not="viewer"), body={"metadata": {"labels": {"a": "b"}}}),
    Case("read is not filtered", "get", "p-guard", users(may="none")),
    Case("list is not filtered", "list", "", users(may="none")),
)


def rows() -> Iterator[Any]:
    """Each combination of case, kind and user."""
    for staged in ("", "Staged"):
        for case in CASES:
            kind = f"{staged}{'Global' if case.is_global else ''}NetworkPolicy"
            for user, allowed in case.answers.items():
                yield pytest.param(case, kind, user, allowed, id=f"{kind}-{case.about}-{user}".replace(" ", "_"))


def role(user: str, right: Right, number: int) -> list[dict[str, Any]]:
    """A role and its binding."""
    name, api = f"{user}-{number}", "rbac.authorization.k8s.io/v1"
    one = {"apiGroups": [GROUP], "resources": list(right.resources), "verbs": list(right.verbs)}
    if right.names:
        one["resourceNames"] = list(right.names)
    scope = {"namespace": right.namespace} if right.namespace else {}
    binding = "RoleBinding" if right.namespace else "ClusterRoleBinding"
    return [
        {"apiVersion": api, "kind": "ClusterRole", "metadata": {"name": name}, "rules": [one]},
        {
            "apiVersion": api,
            "kind": binding,
            "metadata": {"name": name, **scope},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
        },
    ]


def applied(server: Server, *objects: Mapping[str, Any]) -> None:
    for obj in objects:
        answer = server.apply(obj, fieldValidation="Strict")
        assert answer.status in (200, 201), (obj, answer.message)


@pytest.fixture(scope="module")
def guarded(server: Server) -> Iterator[Server]:
    """A server with tiers, users, policies of each tier, and the admission policies in force."""
    applied(
        server, *({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}} for name in ("dev", "prod"))
    )
    for name, order in (("guard", 10), ("app", 20), ("default", 1_000_000)):
        applied(server, {"apiVersion": VERSION, "kind": "Tier", "metadata": {"name": name}, "spec": {"order": order}})
    for user, rights in USERS.items():
        for number, right in enumerate((Right((*PLAIN, *(f"{one}/status" for one in PLAIN))), *rights)):
            applied(server, *role(user, right, number))
    for kind in ("NetworkPolicy", "StagedNetworkPolicy"):
        for name, tier in (("p-guard", "guard"), ("p-app", "app"), ("p-one", "guard"), ("p-zero", None)):
            applied(server, policy(kind, name, tier))
    for kind in ("GlobalNetworkPolicy", "StagedGlobalNetworkPolicy"):
        applied(server, policy(kind, "g-guard", "guard"))
    admission = [
        obj for name in ("tier-rights", "built-in-tiers") for obj in documents(CHART / "admission" / f"{name}.yaml")
    ]
    applied(server, *admission)
    # Roles and admission policies are in force a moment after their creation.
    for staged, only in (("", "enforced-only"), ("Staged", "staged-only")):
        for is_global in (False, True):
            kind = f"{staged}{'Global' if is_global else ''}NetworkPolicy"
            case = Case("", "create", "probe", {}, tier="guard", is_global=is_global)
            asks = {"none": False, "owner": True, "nsowner": not is_global, "both": True, "wild": True, only: True}
            for user, allowed in asks.items():
                server.wait_for(
                    lambda kind=kind, case=case, user=user, allowed=allowed: (
                        (case.send(server, kind, user).status == 201) == allowed
                    ),
                    f"{user} {kind}",
                )
    yield server
    for obj in reversed(admission):
        server.request("DELETE", f"{collection(obj)}/{obj['metadata']['name']}")
    case = Case("", "create", "probe", {}, tier="guard")
    server.wait_for(lambda: case.send(server, "NetworkPolicy", "none").status == 201, "the policies are gone")


@pytest.mark.parametrize(("case", "kind", "user", "allowed"), list(rows()))
def test_a_row_of_the_table(guarded: Server, case: Case, kind: str, user: str, allowed: bool) -> None:  # noqa: FBT001
    """The server's answer is that of the table in SEMANTICS 8.1."""
    answer = case.send(guarded, kind, user)
    assert answer.status in ((200, 201) if allowed else (403,)), answer.message
    if not allowed:
        assert "no right to" in answer.message


def test_an_administrator_writes_every_tier(guarded: Server) -> None:
    """The group system:masters has every right."""
    for kind in ("NetworkPolicy", "StagedGlobalNetworkPolicy"):
        answer = Case("", "create", "x", {}, tier="guard", is_global="Global" in kind).send(guarded, kind, None)
        assert answer.status == 201, answer.message


@pytest.mark.parametrize("staged", [False, True])
def test_a_staged_kind_has_rights_of_its_own(guarded: Server, staged: bool) -> None:  # noqa: FBT001
    """Rights on tier.networkpolicies and on tier.stagednetworkpolicies are independent."""
    user = "staged-only" if staged else "enforced-only"
    case = Case("", "create", "x", {}, tier="guard")
    assert (case.send(guarded, "StagedNetworkPolicy", user).status == 201) is staged
    assert (case.send(guarded, "NetworkPolicy", user).status == 201) is not staged


def test_a_staged_kubernetes_policy_is_plain_rights(guarded: Server) -> None:
    """The kind has no tier, so plain rights suffice."""
    answer = Case("", "create", "x", {}).send(guarded, "StagedKubernetesNetworkPolicy", "none")
    assert answer.status == 201, answer.message


@pytest.mark.usefixtures("takes_an_empty_tier")
def test_an_empty_tier_is_the_default_one(guarded: Server) -> None:
    """An empty tier does not evade the rights, whichever definition is installed."""
    case = Case("", "create", "x", {}, tier="")
    assert {
        user: case.send(guarded, "StagedNetworkPolicy", user).status for user in ("none", "owner", "alltiers", "dev")
    } == {
        "none": 403,
        "owner": 403,
        "alltiers": 201,
        "dev": 201,
    }


def test_a_built_in_tier_cannot_be_deleted(guarded: Server) -> None:
    """Even an administrator cannot delete it. Another tier can be deleted."""
    tiers = f"/apis/{VERSION}/tiers"
    guarded.wait_for(
        lambda: guarded.request("DELETE", f"{tiers}/default", dryRun="All").status == 403, "the guard of tiers acts"
    )
    assert "is built in" in guarded.request("DELETE", f"{tiers}/default", dryRun="All").message
    assert guarded.request("DELETE", f"{tiers}/app", dryRun="All").status == 200
