# SPDX-License-Identifier: Apache-2.0
"""Whatever a file holds, reading it ends in resources and problems, never in an exception."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from netpol_ebpf.resources.load import LoadResult, load_paths, parse_documents, parse_object

SEEDS = """
apiVersion: v1
kind: Pod
metadata: {name: p, namespace: 'n', labels: {a: b}, annotations: {cni.projectcalico.org/allowedSourcePrefixes: '["10.0.0.0/8"]'}}
spec: {nodeName: 'n', hostNetwork: false, containers: [{name: c, ports: [{name: http, containerPort: 80, protocol: TCP}]}]}
status: {phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: v1
kind: Service
metadata: {name: s}
spec: {selector: {a: b}, clusterIPs: [10.96.0.1], ports: [{port: 80, targetPort: http}]}
---
apiVersion: v1
kind: Node
metadata: {name: 'n'}
status: {addresses: [{type: InternalIP, address: 10.0.0.9}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: e}
addressType: IPv4
endpoints: [{addresses: [10.0.0.1]}]
ports: [{port: 80}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: k}
spec:
  podSelector: {matchLabels: {a: b}, matchExpressions: [{key: a, operator: In, values: [b]}]}
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [{podSelector: {}}, {ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}]
    ports: [{protocol: UDP, port: 1, endPort: 2}, {port: http}]
  egress: [{to: [{namespaceSelector: {}}]}]
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: g}
spec:
  tier: t
  order: 1.5
  selector: a == 'b'
  types: [Ingress, Egress]
  ingress:
  - action: Allow
    protocol: TCP
    source: {nets: [10.0.0.0/8], notPorts: [http, '1:2'], serviceAccounts: {names: [x]}, namespaceSelector: global()}
    http: {methods: [GET], paths: [{exact: /a}], headers: [{header: h, operator: In, values: [v]}]}
    metadata: {annotations: {a: b}}
  - {action: Deny, protocol: ICMP, icmp: {type: 8, code: 0}, source: {services: {name: s, namespace: 'n'}}}
  egress: [{action: Allow, destination: {domains: [a.b]}}]
---
apiVersion: projectcalico.org/v3
kind: StagedKubernetesNetworkPolicy
metadata: {name: k}
spec: {stagedAction: Set, podSelector: {}, ingress: [{}]}
---
apiVersion: projectcalico.org/v3
kind: Tier
metadata: {name: t}
spec: {order: 5, defaultAction: Pass}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkSet
metadata: {name: s}
spec: {nets: [10.0.0.1], allowedEgressDomains: [a.b]}
---
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: h}
spec: {node: 'n', interfaceName: eth0, expectedIPs: [10.0.0.1], profiles: [p], ports: [{name: a, protocol: TCP, port: 1}]}
---
apiVersion: projectcalico.org/v3
kind: WorkloadEndpoint
metadata: {name: w}
spec: {interfaceName: tap0, ipNetworks: [10.0.0.1/32], ipNATs: [{internalIP: 10.0.0.1, externalIP: 10.0.0.2}], mac: 'ee:ee:ee:ee:ee:ee'}
---
apiVersion: projectcalico.org/v3
kind: Profile
metadata: {name: p}
spec: {ingress: [{action: Pass}], labelsToApply: {a: b}}
---
apiVersion: policy.networking.k8s.io/v1alpha1
kind: AdminNetworkPolicy
metadata: {name: a}
spec:
  priority: 1
  subject: {pods: {namespaceSelector: {}, podSelector: {}}}
  ingress: [{action: Pass, from: [{namespaces: {sameLabels: [x]}}], ports: [{portRange: {start: 1, end: 2}}]}]
---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: c}
spec:
  tier: Admin
  priority: 1
  subject: {namespaces: {}}
  egress: [{action: Accept, to: [{networks: [10.0.0.0/8]}, {domainNames: [a.b]}], protocols: [{tcp: {destinationPort: {number: 1}}}]}]
---
apiVersion: v1
kind: List
items: [{apiVersion: v1, kind: Namespace, metadata: {name: 'n'}}]
"""
DOCUMENTS: list[Any] = list(yaml.safe_load_all(SEEDS))

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["global()", "::/0", "10.0.0.0/0", "1:2", "80", "*", "*.a", "a" * 300, "\U0001f600", "\ud800", "\x00"]
    ),
    st.just([]),
    st.just({}),
    st.lists(st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3) | st.integers(), st.text(max_size=3) | st.integers(), max_size=3),
)


def _containers(value: Any) -> list[Any]:
    """All mappings and lists in a value that have something in them."""
    found = [value] if isinstance(value, (dict, list)) and value else []
    for below in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        found.extend(_containers(below))
    return found


@st.composite
def _mutants(draw: st.DrawFn) -> Any:
    """An object in which a few parts are replaced, removed, added or renamed."""
    obj = json.loads(json.dumps(draw(st.sampled_from(DOCUMENTS))))
    for _ in range(draw(st.integers(1, 3))):
        containers = _containers(obj)
        if not containers:
            break
        target = containers[draw(st.integers(0, len(containers) - 1))]
        key = (
            draw(st.sampled_from(sorted(target, key=str)))
            if isinstance(target, dict)
            else draw(st.integers(0, len(target) - 1))
        )
        change = draw(st.sampled_from(["replace", "replace", "remove", "add", "rename"]))
        if change == "replace":
            target[key] = draw(ODD)
        elif change == "remove":
            del target[key]
        elif isinstance(target, list):
            target.append(draw(ODD))
        elif change == "add":
            target[draw(st.text(max_size=6))] = draw(ODD)
        else:
            target[f"{key}x"] = target.pop(key)
    return obj


def _sound(result: LoadResult) -> None:
    """Problems are printable and in order; an object is either a resource or has an error."""
    for problem in result.problems:
        assert str(problem)
        assert problem.severity in ("error", "warning")
    lines = [problem.location.line for problem in result.problems]
    assert lines == sorted(lines)


@given(obj=_mutants())
def test_mutated_objects(obj: Any) -> None:
    """Wrong types, missing and unknown fields, odd values in every place."""
    _sound(parse_object(obj, "f"))


@given(obj=_mutants())
def test_mutated_objects_as_text_give_the_same(obj: Any) -> None:
    """Through text and positions the same messages come out as from the parsed object."""
    text = json.dumps(obj, indent=1, ensure_ascii=False)
    result = parse_documents(text, "f")
    _sound(result)
    if obj is not None and _plain(obj) and not any(problem.slug == "yaml" for problem in result.problems):
        direct = parse_object(obj, "f")
        assert sorted(problem.message for problem in result.problems) == sorted(
            problem.message for problem in direct.problems
        )


def _plain(value: Any) -> bool:
    """Whether a value survives text as it is: keys are text, numbers are whole and not huge."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(below) for key, below in value.items())
    if isinstance(value, list):
        return all(_plain(below) for below in value)
    return not isinstance(value, float) and not (isinstance(value, int) and abs(value) > 2**31)


@given(
    number=st.integers(0, len(SEEDS) - 1),
    length=st.integers(0, 12),
    insert=st.text(alphabet="{}[]:-,&*!|>'\"%@`#? \n\tab0\ud800\x00\x85\u2028", max_size=6) | st.text(max_size=4),
)
def test_mutated_text(number: int, length: int, insert: str) -> None:
    """Cuts and insertions anywhere in a file."""
    _sound(parse_documents(SEEDS[:number] + insert + SEEDS[number + length :], "f"))


@given(data=st.binary(max_size=200) | st.text(alphabet="{}[]:-,&*!|>'\"\n ab\t", max_size=60).map(str.encode))
def test_any_bytes(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A file of anything."""
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(data)
    _sound(load_paths([Path(path)]))


FORMS = ("yaml", "marked json", "json", "indented json", "same line", "list", "yaml list")


@given(forms=st.lists(st.sampled_from(FORMS), min_size=1, max_size=8))
def test_any_mixture_of_yaml_and_json(forms: list[str]) -> None:
    """Documents and JSON values in a row give the same objects in the same order, each with its line and column.

    Only what is not JSON needs a mark before and behind it.
    """
    text = ""
    places = []
    for number, form in enumerate(forms):
        value = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"a{number}"}}
        compact = json.dumps(value)
        opening = {"yaml": "---\n", "marked json": "--- ", "yaml list": "---\n"}.get(form, "")
        if not opening and number and forms[number - 1] in ("yaml", "yaml list"):
            opening = "---\n"
        elif form == "same line" and text.endswith("\n"):
            text = f"{text[:-1]} "
        text += opening
        body = {
            "yaml": yaml.safe_dump(value), "indented json": f"{json.dumps(value, indent=1)}\n", "list": f"[{compact}]\n",
            "yaml list": f"- {compact}\n",
        }.get(form, f"{compact}\n")  # fmt: skip
        inside = {"list": 1, "yaml list": 2}.get(form, 0)
        places.append((f"a{number}", text.count("\n") + 1, len(text) - text.rfind("\n") + inside))
        text += body
    result = parse_documents(text, "f")
    assert result.problems == []
    assert result.documents == len(forms)
    found = [(one.meta.name, one.meta.location.line, one.meta.location.column) for one in result.resources]
    assert found == places


def test_the_seeds_are_valid() -> None:
    """The mutations start from objects that are accepted."""
    assert len(parse_documents(SEEDS, "f").check()) == len(DOCUMENTS)
