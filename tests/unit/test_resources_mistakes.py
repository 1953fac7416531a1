# SPDX-License-Identifier: Apache-2.0
"""The classic slip: ``ports:`` at the wrong indentation level, in every place where people put it."""

from __future__ import annotations

import pytest

from netpol_ebpf.resources.load import parse_documents

FRONT_END = """\
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata:
  name: front-end
  namespace: staging
spec:
  podSelector:
    matchLabels:
      app: back-end
  ingress:
    - from:
      - podSelector:
          matchLabels:
            app: front-end
    ports:
    - protocol: TCP
      port: 443
  egress:
    - to:
      - podSelector:
          matchLabels:
            app: database
    ports:
    - protocol: TCP
      port: 27017
"""


def test_ports_beside_the_dash_of_from() -> None:
    """Both slips of the document are named with file, line, field and object, and where the field belongs."""
    result = parse_documents(FRONT_END, "front-end.yaml")
    assert result.resources == []
    first, second = result.problems
    assert str(first) == (
        "front-end.yaml:15: error: NetworkPolicy/staging/front-end: spec.ingress.ports: `ports:` is at the wrong indentation level: "
        "beside the `- from:` item of line 11, at the level of its dash, instead of inside the item. Move `ports:` and the "
        "lines that belong to it 2 columns to the right, inside the `- from:` item, so that `ports:` stands under `from:`"
    )
    assert second.location.line == 23
    assert second.path == "spec.egress.ports"
    assert "inside the `- to:` item" in second.message
    assert {first.slug, second.slug} == {"wrong-depth"}


def test_moving_it_as_told_makes_the_policy_valid() -> None:
    """Following the message word by word ends in a valid policy."""
    lines = FRONT_END.split("\n")
    for number in (14, 15, 16, 22, 23, 24):
        lines[number] = "  " + lines[number]
    result = parse_documents("\n".join(lines), "front-end.yaml")
    assert result.problems == []
    assert result.resources[0].spec.ingress[0].ports[0].port == 443  # type: ignore[union-attr]


_HEAD = "kind: NetworkPolicy\napiVersion: networking.k8s.io/v1\nmetadata:\n  name: p\nspec:\n  podSelector: {}\n"


@pytest.mark.parametrize(
    ("spec", "line", "path", "words"),
    [
        (
            "  ingress:\n  - from:\n    - podSelector: {}\n  ports:\n  - port: 80\n",
            10,
            "spec.ports",
            "directly under `spec:`",
        ),
        (
            "  ingress:\n    from:\n    - podSelector: {}\n    ports:\n    - port: 80\n",
            10,
            "spec.ingress.ports",
            "directly under `ingress:`",
        ),
        (
            "  ingress:\n  - from:\n    - podSelector: {}\n      ports:\n      - port: 80\n",
            10,
            "spec.ingress[0].from[0].ports",
            "inside a peer of `from:`",
        ),
        (
            "  egress:\n  - to:\n    - podSelector: {}\n    - ports:\n      - port: 80\n",
            10,
            "spec.egress[0].to[1].ports",
            "inside a peer of `to:`",
        ),
        ("  from:\n  - podSelector: {}\n", 7, "spec.from", "inside an item (`- from:`)"),
        (
            "  ingress:\n  - podSelector: {}\n",
            8,
            "spec.ingress[0].podSelector",
            "inside an item of the list under `from:`",
        ),
        ("  ingress:\n  - port: 80\n", 8, "spec.ingress[0].port", "inside an item of the list under `ports:`"),
    ],
)
def test_wrong_depth_in_text_that_is_valid_yaml(spec: str, line: int, path: str, words: str) -> None:
    """Slips that YAML accepts are found as fields in the wrong place, in the same words."""
    result = parse_documents(_HEAD + spec, "p.yaml")
    problem = next(problem for problem in result.problems if problem.slug == "wrong-depth")
    assert "is at the wrong indentation level" in problem.message
    assert (problem.location.line, problem.path) == (line, path)
    assert words in problem.message
    assert result.resources == []


def test_another_field_beside_the_dash_is_plain_bad_yaml() -> None:
    """Only fields of a rule get the words about depth."""
    result = parse_documents(_HEAD + "  ingress:\n    - from: []\n    other: 1\n", "p.yaml")
    (problem,) = result.problems
    assert problem.slug == "yaml"
    assert problem.location.line == 9
    assert problem.obj == "NetworkPolicy/p"


def test_a_sibling_of_the_list_is_no_slip() -> None:
    """Where dashes stand under their key, `ports:` beside them is in place; another error is not blamed on it."""
    text = "kind: Service\nspec:\n  clusterIPs:\n  - 10.0.0.1\n  ports:\n  - port: 80\n  x: 'open\n"
    (problem,) = parse_documents(text, "s.yaml").problems
    assert problem.slug == "yaml"


def test_ports_and_from_both_beside_the_dash() -> None:
    """Each of the fields that slipped is named."""
    text = _HEAD + "  ingress:\n    - ports:\n      - port: 80\n    from:\n    - podSelector: {}\n"
    (problem,) = parse_documents(text, "p.yaml").problems
    assert (problem.slug, problem.location.line, problem.path) == ("wrong-depth", 10, "spec.ingress.from")
    assert "inside the `- ports:` item" in problem.message


def test_calico_ports_directly_in_the_rule() -> None:
    """In a Calico rule ports belong to source or destination."""
    text = (
        "kind: NetworkPolicy\napiVersion: projectcalico.org/v3\nmetadata: {name: p}\n"
        "spec:\n  ingress:\n  - action: Allow\n    protocol: TCP\n    ports: [80]\n"
    )
    (problem,) = parse_documents(text, "p.yaml").problems
    assert problem.slug == "wrong-depth"
    assert (problem.location.line, problem.path) == (8, "spec.ingress[0].ports")
    assert "inside `source:` or `destination:`" in problem.message
