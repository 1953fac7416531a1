# SPDX-License-Identifier: Apache-2.0
"""The rights that deploy/manifests/rbac.yaml gives are those that the source of a cluster and the status use, and no others."""

from __future__ import annotations

from pathlib import Path

import yaml

from netpol_ebpf.resources import schema_status
from netpol_ebpf.sources.kubernetes.decoding import KINDS
from netpol_ebpf.status.election import LEASE, LEASES
from netpol_ebpf.status.kinds import POLICY_KINDS

FILE = Path(__file__).resolve().parents[2] / "deploy" / "manifests" / "rbac.yaml"


def test_roles_name_what_is_used_and_no_more() -> None:
    """Each kind with `list` and `watch`, `get` on definitions, and what status needs; every part is of the one account."""
    account, role, binding, own_role, own_binding = yaml.safe_load_all(FILE.read_text(encoding="utf-8"))
    given = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    groups = {kind: kind.api_version.rpartition("/")[0] for kind in KINDS}
    used = {(groups[kind], kind.plural, verb) for kind in KINDS for verb in ("list", "watch")}
    used |= {("apiextensions.k8s.io", "customresourcedefinitions", "get"), ("events.k8s.io", "events", "create")}
    used |= {("netpol-ebpf.io", schema_status.PLURAL, verb) for verb in ("create", "patch", "list", "watch")}
    policies = [(one.api_version.partition("/")[0], one.plural) for one in POLICY_KINDS.values()]
    used |= {(group, plural, "get") for group, plural in policies}
    used |= {(group, f"{plural}/status", "patch") for group, plural in policies if group != "networking.k8s.io"}
    assert given == used
    assert [(tuple(one["verbs"]), one.get("resourceNames")) for one in own_role["rules"]] == [
        (("create",), None),
        (("get", "update"), [LEASE]),
    ]
    assert own_role["metadata"]["namespace"] == LEASES.split("/")[-2]
    for one, of in ((binding, role), (own_binding, own_role)):
        assert (one["roleRef"]["kind"], one["roleRef"]["name"]) == (of["kind"], of["metadata"]["name"])
        (subject,) = one["subjects"]
        name = account["metadata"]
        assert (subject["name"], subject["namespace"]) == (name["name"], name["namespace"])
