# SPDX-License-Identifier: Apache-2.0
"""The way in: documents, files, lists, metadata, duplicates, unknown kinds, order of problems."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import get_args

import pytest

from netpol_ebpf.errors import ValidationError
from netpol_ebpf.resources.load import KINDS, load_paths, parse_documents, parse_object, parse_objects
from netpol_ebpf.resources.types import (
    CalicoNetworkPolicy,
    KubernetesNetworkPolicy,
    Meta,
    Resource,
)
from netpol_ebpf.resources.yamltree import MAX_JSON_COLUMN, Positions, read_documents

SA = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: %s, namespace: 'n'}\n"
ACCOUNTS = [{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}} for name in "ab"]


def _metas(text: str) -> list[Meta]:
    result = parse_documents(text, "f.yaml")
    assert result.problems == []
    return [resource.meta for resource in result.resources]


def test_resources_come_in_the_order_written_with_their_lines() -> None:
    """Each object knows the line at which it begins."""
    metas = _metas(f"# list of accounts\n{SA % 'b'}---\n{SA % 'a'}")
    assert [(meta.name, meta.location.line) for meta in metas] == [("b", 2), ("a", 6)]


def test_namespace_defaults() -> None:
    """Namespaced objects without a namespace are in "default"; others have none."""
    metas = _metas(
        "{apiVersion: v1, kind: Pod, metadata: {name: p}}\n---\n{apiVersion: v1, kind: Node, metadata: {name: 'n'}}\n---\n"
        "{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: x}}\n"
    )
    assert [meta.namespace for meta in metas] == ["default", "", "x"]


def test_namespace_on_a_cluster_scoped_object_is_a_warning() -> None:
    """It has no effect, which the user should know."""
    result = parse_documents(
        "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata:\n  name: g\n  namespace: x\nspec: {}\n",
        "f",
    )
    (problem,) = result.problems
    assert (problem.severity, problem.slug, problem.location.line) == ("warning", "inert-namespace", 5)
    assert result.resources[0].meta.namespace == ""


def test_lists_of_all_forms() -> None:
    """Kind List, typed lists with items that carry no kind, and lists inside lists give their items."""
    text = json.dumps(
        {
            "apiVersion": "v1",
            "kind": "List",
            "metadata": {"resourceVersion": ""},
            "items": [
                {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "a"}},
                {
                    "apiVersion": "v1",
                    "kind": "ServiceAccountList",
                    "items": [{"metadata": {"name": "b"}}, {"metadata": {"name": "c"}}],
                },
            ],
        }
    )
    assert [meta.name for meta in _metas(text)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "text",
    [
        f"- {json.dumps(ACCOUNTS[0])}\n- {json.dumps(ACCOUNTS[1])}\n",
        json.dumps(ACCOUNTS),
        json.dumps(ACCOUNTS, indent=2),
        f"[{json.dumps(ACCOUNTS[0])}]\n[[{json.dumps(ACCOUNTS[1])}]]\n",
        "\n".join(map(json.dumps, ACCOUNTS)),
        "".join(map(json.dumps, ACCOUNTS)),
        " ".join(json.dumps(account, indent=2) for account in ACCOUNTS),
        f"{json.dumps(ACCOUNTS[0])}\n---\n{json.dumps(ACCOUNTS[1])}\n",
        f"{json.dumps(ACCOUNTS[0])}\n---\n{SA % 'b'}",
        f"{json.dumps(ACCOUNTS[0])}\n...\n---\n{SA % 'b'}---\n",
        f"# first\n{json.dumps(ACCOUNTS[0])} # one\n# then\n{json.dumps(ACCOUNTS[1])}\n# end\n",
        f"{SA % 'a'}---\n{json.dumps(ACCOUNTS[1])}\n",
        f"---\n{json.dumps(ACCOUNTS[0])}\n{json.dumps(ACCOUNTS[1])}\n",
        f"\ufeff{json.dumps(ACCOUNTS[0])}\r\n{json.dumps(ACCOUNTS[1])}\r\n",
    ],
)
def test_several_objects_in_every_form(text: str) -> None:
    """Lists at the top as of calicoctl, JSON objects in a row as of `jq -c`, and both mixed with YAML documents."""
    assert [meta.name for meta in _metas(text)] == ["a", "b"]


def test_objects_in_a_row_keep_their_lines() -> None:
    """Each problem names its own line and column, whatever stands before."""
    pod = '{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "%s"}, "status": {"podIP": "ten"}}'
    text = f"{SA % 'a'}---\n{pod % 'b'}\n{pod % 'c'} {pod % 'd'}\n---\n{SA % 'a'}"
    places = [(problem.location.line, problem.location.column) for problem in parse_documents(text, "f").problems]
    assert places == [(5, 75), (6, 75), (6, 75 + len(pod)), (8, 1)]


def test_objects_in_a_row_after_other_characters() -> None:
    """Places are those of characters, whatever their size, and whatever ends the lines."""
    text = "a: \U0001f600\u00e4\r\n---\r\n" + '{"b": "\U0001f600"} {"c": \t1}\r\n{"d": 1}'
    found = [
        (document.value, document.positions.location().line, document.positions.location().column)
        for document in read_documents(text, "f", [])
    ]
    assert found == [
        ({"a": "\U0001f600\u00e4"}, 1, 1), ({"b": "\U0001f600"}, 3, 1), ({"c": 1}, 3, 12), ({"d": 1}, 4, 1),
    ]  # fmt: skip


def test_many_objects_in_one_line() -> None:
    """The work for each does not grow with what stands before it, and all are read."""
    result = parse_documents(
        "".join(f'{{"apiVersion": "v1", "kind": "Namespace", "metadata": {{"name": "a{n}"}}}}' for n in range(500)), "f"
    )
    assert [resource.meta.name for resource in result.resources] == [f"a{n}" for n in range(500)]
    assert max(resource.meta.location.column for resource in result.resources) == MAX_JSON_COLUMN + 1


def test_what_follows_json_and_is_none() -> None:
    """A YAML document needs its mark; without one it is a problem, and reading goes on at the next mark."""
    result = parse_documents(f"{json.dumps(ACCOUNTS[0])}\n{SA % 'x'}---\n{SA % 'b'}", "f")
    assert [resource.meta.name for resource in result.resources] == ["a", "b"]
    assert [(problem.location.line, problem.message) for problem in result.problems] == [
        (2, "not valid YAML: a document that is not JSON begins here; write `---` in a line before it")
    ]


def test_what_only_begins_like_json() -> None:
    """A flow mapping is YAML; JSON with something behind it is none."""
    assert [meta.name for meta in _metas("{apiVersion: v1, kind: Namespace, metadata: {name: a}}\n")] == ["a"]
    result = parse_documents(f"{json.dumps(ACCOUNTS[0])} x\n---\n{SA % 'b'}", "f")
    assert [problem.slug for problem in result.problems] == ["yaml"]
    assert result.resources[-1].meta.name == "b"


def test_problem_in_a_list_names_the_line_of_its_item() -> None:
    """Paths are those inside the item; positions those of the file."""
    text = "apiVersion: v1\nkind: List\nitems:\n- kind: Pod\n  apiVersion: v1\n  metadata:\n    name: p\n  status:\n    podIP: ten\n"
    (problem,) = parse_documents(text, "f.yaml").problems
    assert str(problem).startswith("f.yaml:9: error: Pod/default/p: status.podIP: must be an IP address")


def test_what_kubectl_prints_is_accepted() -> None:
    """Metadata and status that the server writes are no unknown fields."""
    text = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  annotations:
    kubectl.kubernetes.io/last-applied-configuration: |
      {"apiVersion":"networking.k8s.io/v1"}
  creationTimestamp: "2026-01-01T00:00:00Z"
  deletionTimestamp: 2026-01-01T00:00:00Z
  deletionGracePeriodSeconds: 30
  finalizers: [x/y]
  generation: 1
  managedFields: [{manager: kubectl, operation: Update}]
  name: p
  namespace: 'n'
  ownerReferences: []
  resourceVersion: "12"
  selfLink: /apis
  uid: 7d0b
spec: {podSelector: {}, policyTypes: [Ingress]}
status: {}
"""
    (policy,) = parse_documents(text, "f").check()
    assert isinstance(policy, KubernetesNetworkPolicy)


def test_same_name_in_two_groups_or_kinds_is_no_duplicate() -> None:
    """Kubernetes and Calico have a NetworkPolicy each."""
    policy = "kind: NetworkPolicy\nmetadata: {name: p, namespace: 'n'}\nspec: {}\n"
    result = parse_documents(
        f"apiVersion: networking.k8s.io/v1\n{policy}---\napiVersion: projectcalico.org/v3\n{policy}", "f"
    )
    assert [type(resource) for resource in result.resources] == [KubernetesNetworkPolicy, CalicoNetworkPolicy]


def test_duplicates_name_both_places(tmp_path: Path) -> None:
    """The second one is the problem; it names the first."""
    (tmp_path / "a.yaml").write_text(SA % "x", encoding="utf-8")
    (tmp_path / "b.yaml").write_text(f"---\n{SA % 'w'}---\n{SA % 'x'}", encoding="utf-8")
    result = load_paths([tmp_path])
    (problem,) = result.problems
    assert problem.slug == "duplicate"
    assert problem.obj == "ServiceAccount/n/x"
    assert str(problem.location) == f"{tmp_path}/b.yaml:6"
    assert f"first at {tmp_path}/a.yaml:1" in problem.message
    assert [resource.meta.name for resource in result.resources] == ["x", "w"]


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("apiVersion: v1\nkind: Namepsace\n", "did you mean `Namespace`?"),
        (
            "apiVersion: networking.k8s.io/v1beta1\nkind: NetworkPolicy\n",
            'unknown apiVersion "networking.k8s.io/v1beta1" of NetworkPolicy; write networking.k8s.io/v1',
        ),
        ("apiVersion: networking.k8s.io/v1\nkind: NetworkPolcy\n", "did you mean `NetworkPolicy`?"),
        ("apiVersion: projectcalico.org/v3\nkind: GlobalNetworkpolicy\n", "did you mean `GlobalNetworkPolicy`?"),
        (
            "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolices\n",
            "mean `ClusterNetworkPolicy`?",
        ),
        ("apiVersion: networking.k8s.io/v1\nkind: Nonsense\n", "; what is read: networking.k8s.io/v1: NetworkPolicy"),
        ("apiVersion: v1\nkind: Deployment\n", "unknown kind Deployment of v1; what is read: v1: Namespace"),
        ("apiVersion: extensions/v1beta1\nkind: NetworkPolicy\n", "write networking.k8s.io/v1 or projectcalico.org/v3"),
        ("apiVersion: networking.k8s.io\nkind: NetworkPolicy\n", "write networking.k8s.io/v1 or projectcalico.org/v3"),
        ("apiVersion: v1\nkind: GlobalNetworkPolicy\n", "of GlobalNetworkPolicy; write projectcalico.org/v3$"),
        ("apiVersion: crd.projectcalico.org/v3\nkind: Tier\n", "of Tier; write crd.projectcalico.org/v1$"),
        ("apiVersion: networking.k8s.io/v1\nkind: GlobalNetworkPolicy\n", "write projectcalico.org/v3"),
        (
            "apiVersion: networking.k8s.oi/v1\nkind: NetworkPolicy\n",
            "; write networking.k8s.io/v1",
        ),
        ("apiVersion: projectcalico.com/v3\nkind: Teir\n", "did you mean `Tier`?"),
        ("apiVersion: projectcalico.org/v4\nkind: Tier\n", "write projectcalico.org/v3"),
        (
            "apiVersion: policy.networking.x-k8s.io/v1alpha1\nkind: AdminNetworkPolicy\n",
            "write policy.networking.k8s.io/",
        ),
    ],
)
def test_unknown_kinds_and_versions(head: str, words: str) -> None:
    """Unread kinds are reported with the kinds that are read; the object is named."""
    (problem,) = parse_documents(f"{head}metadata: {{name: d}}\n", "f").problems
    assert problem.slug == "unknown-kind"
    assert words in f"{problem.message}$"
    assert problem.obj.endswith("/d")


@pytest.mark.parametrize(
    ("api_version", "kind"),
    [
        ("apps/v1", "Deployment"),
        ("v1", "ConfigMap"),
        ("v1", "Secret"),
        ("networking.k8s.io/v1", "Ingress"),
        ("networking.istio.io/v1", "Gateway"),
        ("networking.istio.io/v1", "ServiceEntry"),
        ("gateway.networking.k8s.io/v1", "HTTPRoute"),
        ("projectcalico.org/v3", "IPPool"),
        ("serving.knative.dev/v1", "Service"),
        ("management.cattle.io/v3", "Node"),
        ("metrics.k8s.io/v1beta1", "PodMetrics"),
        ("apiextensions.k8s.io/v1", "CustomResourceDefinition"),
        ("kustomize.config.k8s.io/v1beta1", "Kustomization"),
        ("policy/v1", "PodDisruptionBudget"),
        ("example.com/v1", "AccessList"),
    ],
)
def test_objects_of_other_programs_are_skipped(api_version: str, kind: str) -> None:
    """They are counted, in lists too; nothing of them is checked, and the policy beside them is read."""
    other = f"apiVersion: {api_version}\nkind: {kind}\nspec: {{x: [1]}}\n"
    listed = json.dumps({"apiVersion": api_version, "kind": f"{kind}List", "items": [{"metadata": {}}]})
    policy = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec: {}\n"
    result = parse_documents(f"{other}---\n{policy}---\n{listed}\n", "f")
    assert [resource.meta.name for resource in result.resources] == ["p"]
    assert result.problems == []
    assert result.skipped == {f"{api_version} {kind}": 2}


@pytest.mark.parametrize("name", ["kustomization.yaml", "dir/kustomization.yml"])
def test_a_kustomization_without_its_kind(name: str) -> None:
    """It lies beside manifests, and may leave out what it is; elsewhere such a mapping is no object."""
    text = "resources: [policy.yaml]\n"
    result = parse_documents(text, name)
    assert (result.problems, result.skipped) == ([], {"kustomize.config.k8s.io/v1beta1 Kustomization": 1})
    assert {problem.slug for problem in parse_documents(text, "policy.yaml").problems} == {"required"}
    assert {problem.slug for problem in parse_documents("kind: Pod\n", name).problems} == {"required"}


@pytest.mark.parametrize(
    ("api_version", "kind"),
    [
        ("cilium.io/v2", "CiliumNetworkPolicy"),
        ("cilium.io/v2", "CiliumClusterwideNetworkPolicy"),
        ("crd.antrea.io/v1beta1", "NetworkPolicy"),
        ("crd.antrea.io/v1beta1", "ClusterNetworkPolicy"),
        ("k8s.cni.cncf.io/v1beta1", "MultiNetworkPolicy"),
    ],
)
def test_policies_of_other_programs_are_named(api_version: str, kind: str) -> None:
    """They are skipped, and a warning names each, since nobody enforces it here."""
    text = f"---\napiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: c, namespace: x}}\n"
    result = parse_documents(text, "f")
    assert result.skipped == {f"{api_version} {kind}": 1}
    assert [(problem.severity, problem.slug, problem.obj, problem.location.line) for problem in result.problems] == [
        ("warning", "not-enforced", f"{kind}/x/c", 2)
    ]
    assert f"a {kind} of {api_version} is not enforced here" in result.problems[0].message


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("- 1\n", ["must be a Kubernetes object (a mapping with apiVersion and kind), is 1"]),
        ("- \n", ["must be a Kubernetes object (a mapping with apiVersion and kind), is nothing"]),
        ("[]\n", []),
        ("kind: PodList\napiVersion: v1\nitems: null\n", []),
        ("kind: PodList\napiVersion: v1\nitems: {}\n", ["must be a list (each item begins with `- `), is a mapping"]),
        ("hello\n", ['must be a Kubernetes object (a mapping with apiVersion and kind), is "hello"']),
        ("{}\n", ["the field `apiVersion` is required", "the field `kind` is required"]),
        ("kind: Pod\n", ["the field `apiVersion` is required"]),
        ("kind: 3\napiVersion: v1\n", ['must be text, is the value 3; put it in quotes: "3"']),
        ("kind: Pod\napiVersion: v1\n", ["the field `metadata` is required"]),
        ("kind: Pod\napiVersion: v1\nmetadata: []\n", ["must be a mapping, is a list"]),
        ("kind: Pod\napiVersion: v1\nmetadata: {namespace: x}\n", ["the field `name` is required"]),
        ("kind: List\napiVersion: v1\nitems: {}\n", ["must be a list (each item begins with `- `), is a mapping"]),
        ("kind: List\napiVersion: v1\n", []),
        (
            "kind: Pod\napiVersion: v1\nmetadata: {name: x, lables: {}}\n",
            ["unknown field `lables` (did you mean `labels`?)"],
        ),
        ("kind: Pod\napiVersion: v1\nmetadata: {name: x, anything: {}}\n", []),
        (
            "kind: Pod\napiVersion: v1\nmetadata: {name: x, labels: {a: true, b: 1, c: [x]}}\n",
            [
                'must be text, is the value true; put it in quotes: "true"',
                'must be text, is the value 1; put it in quotes: "1"',
                "must be text, is a list",
            ],
        ),
        (
            "kind: NetworkPolicy\napiVersion: networking.k8s.io/v1\nmetadata: {name: x, owner: me}\nselector: {}\nspec: {}\n",
            ["unknown field `owner`; the fields here are", "unknown field `selector`; it belongs inside `spec:`"],
        ),
    ],
)
def test_objects_that_are_none(text: str, messages: list[str]) -> None:
    """Each thing wrong with the outside of an object is one problem."""
    problems = parse_documents(text, "f").problems
    assert len(problems) == len(messages)
    for problem, message in zip(problems, messages, strict=True):
        assert message in problem.message


@pytest.mark.parametrize(
    ("metadata", "path", "words"),
    [
        ("{name: Upper}", "metadata.name", "lower-case"),
        ("{name: x, namespace: a.b}", "metadata.namespace", "lower-case"),
        ("{name: x, labels: {a/b/c: d}}", "metadata.labels[a/b/c]", "DNS name"),
        ("{name: x, labels: {a: -}}", "metadata.labels.a", "no label value"),
        ("{name: x, annotations: {...: d}}", "metadata.annotations", "no annotation name"),
        (f"{{name: x, annotations: {{a: {'x' * 262144}}}}}", "metadata.annotations", "at most 262144 bytes"),
    ],
)
def test_metadata_of_a_policy_is_what_the_server_accepts(metadata: str, path: str, words: str) -> None:
    """Names, labels and annotations follow the API server's rules; a lenient reading tolerates names and labels."""
    text = f"apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {metadata}\nspec: {{}}\n"
    (problem,) = parse_documents(text, "f").problems
    assert (problem.path, problem.severity) == (path, "error")
    assert words in problem.message


def test_lenient_reading_of_fixtures() -> None:
    """What unit-test fixtures hold and no server accepts is a warning there, when its meaning is clear."""
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "allow-ipBlock", "labels": {"a": "!"}},
        "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": 30000, "endPort": 65537}]}]},
    }
    strict = parse_object(policy, "f")
    assert [problem.severity for problem in strict.problems] == ["error"] * 3
    assert strict.resources == []
    lenient = parse_objects([(policy, Positions("f"))], lenient=True)
    assert [problem.severity for problem in lenient.problems] == ["warning"] * 3
    (read,) = lenient.resources
    assert isinstance(read, KubernetesNetworkPolicy)
    assert read.spec.ingress[0].ports[0].end_port == 65535


def test_all_problems_of_all_files_in_file_and_line_order(tmp_path: Path) -> None:
    """Files in the order given, sorted within a directory; lines ascending; errors and warnings together."""
    below = tmp_path / "dir"
    (below / "deep").mkdir(parents=True)
    (below / ".hidden").mkdir()
    (below / "b.yml").write_text("kind: Pod\n---\nb: [\n", encoding="utf-8")
    (below / "deep" / "a.json").write_text('{"kind": "X", "apiVersion": "y"}', encoding="utf-8")
    (below / ".hidden" / "c.yaml").write_text("c: 1\n", encoding="utf-8")
    (below / ".d.yaml").write_text("d: 1\n", encoding="utf-8")
    (below / "notes.txt").write_text("no manifest", encoding="utf-8")
    (below / "e.yaml").write_bytes(b"a: 1\nb: \xff\n")
    single = tmp_path / "single.conf"
    single.write_text("- 1\n", encoding="utf-8")
    result = load_paths([single, below, below / "b.yml", tmp_path / "absent"])
    places = [str(problem.location).replace(str(tmp_path) + os.sep, "") for problem in result.problems]
    assert places == [
        str(tmp_path / "absent").replace(str(tmp_path) + os.sep, ""),
        "single.conf:1",
        "dir/b.yml:1",
        "dir/b.yml:4",
        "dir/deep/a.json:1",
        "dir/e.yaml:2",
    ]
    assert "save the file as UTF-8" in result.problems[-1].message
    with pytest.raises(ValidationError) as raised:
        result.check()
    assert raised.value.problems == result.problems
    assert raised.value.exit_code == 3


def test_unreadable_file(tmp_path: Path) -> None:
    """A name that cannot be opened is a problem of its own."""
    target = tmp_path / "loop.yaml"
    target.symlink_to(target)
    (problem,) = load_paths([target]).problems
    assert problem.slug == "file"


def test_directory_is_searched_as_the_agent_does(tmp_path: Path) -> None:
    """Linked directories are searched; links to nothing or to themselves, and pipes, are problems, not silence; a circle ends."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "b.yaml").write_text("kind: Namespace\napiVersion: v1\nmetadata: {name: b}\n", encoding="utf-8")
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(root)
    (root / "gone.yaml").symlink_to("nowhere.yaml")
    (root / "team").symlink_to("nowhere")
    (root / "self").symlink_to("self")
    os.mkfifo(root / "pipe.yaml")
    result = load_paths([root])
    assert [one.meta.name for one in result.resources] == ["b"]
    assert {(Path(one.location.file).name, one.slug) for one in result.errors} == {
        ("gone.yaml", "file"), ("team", "file"), ("self", "file"), ("pipe.yaml", "file"),
    }  # fmt: skip


def test_parsed_objects_without_positions_still_name_their_file() -> None:
    """Line 0 is left out of the text."""
    (problem,) = parse_object({"kind": "Pod", "apiVersion": "v1"}, "case.yaml").problems
    assert str(problem) == "case.yaml: error: Pod: the field `metadata` is required"


def test_check_returns_resources_when_there_are_only_warnings() -> None:
    """Warnings do not make input invalid."""
    text = "kind: NetworkPolicy\napiVersion: networking.k8s.io/v1\nmetadata: {name: x}\n"
    result = parse_documents(text, "f")
    assert [problem.slug for problem in result.problems] == ["empty-policy"]
    assert len(result.check()) == 1


def test_every_kind_of_the_contract_is_read() -> None:
    """No kind is declared in the types and forgotten in the loader."""
    declared = {kind.__name__ for kind in get_args(Resource)} - {"KubernetesNetworkPolicy", "CalicoNetworkPolicy"}
    assert {kind for _, kind in KINDS} == declared | {"NetworkPolicy", "GlobalNetworkSet"}
