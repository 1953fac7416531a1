# SPDX-License-Identifier: Apache-2.0
"""The rights that deploy/manifests/rbac.yaml gives are those that the source of a cluster uses, and no others."""

from __future__ import annotations

from pathlib import Path

import yaml

from netpol_ebpf.sources.kubernetes.decoding import KINDS

FILE = Path(__file__).resolve().parents[2] / "deploy" / "manifests" / "rbac.yaml"


def test_role_names_what_is_read_and_no_more() -> None:
    """Each kind with `list` and `watch`, and `get` on definitions; every part is of the one account."""
    account, role, binding = yaml.safe_load_all(FILE.read_text(encoding="utf-8"))
    given = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    groups = {kind: kind.api_version.rpartition("/")[0] for kind in KINDS}
    used = {(groups[kind], kind.plural, verb) for kind in KINDS for verb in ("list", "watch")}
    assert given == used | {("apiextensions.k8s.io", "customresourcedefinitions", "get")}
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (subject,) = binding["subjects"]
    assert (subject["name"], subject["namespace"]) == (account["metadata"]["name"], account["metadata"]["namespace"])
