# SPDX-License-Identifier: Apache-2.0
"""Scalars of another type than meant, and texts with line breaks: what is said quotes what was written."""

from __future__ import annotations

import pytest

from netpol_ebpf.errors import Problem
from netpol_ebpf.resources.load import parse_documents


def _problems(text: str) -> list[Problem]:
    return parse_documents(text, "f.yaml").problems


def _kubernetes(spec: str) -> list[Problem]:
    return _problems(f"apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: a}}\nspec: {spec}\n")


def _calico(spec: str, kind: str = "GlobalNetworkPolicy") -> list[Problem]:
    return _problems(f"apiVersion: projectcalico.org/v3\nkind: {kind}\nmetadata: {{name: a}}\nspec:\n{spec}")


@pytest.mark.parametrize(
    ("written", "reading"),
    [
        ("1.10", "1.1"),
        ("0755", "493"),
        ("1e3", "1000"),
        ("80.0", "80"),
        ("08", "8"),
        ("1_000", "1000"),
        ("0x1F", "31"),
        ("yes", "true"),
        ("y", "true"),
        ("N", "false"),
        ("TRUE", "true"),
        ("Null", "nothing"),
        ("~", "nothing"),
    ],
)
@pytest.mark.parametrize(
    "spec",
    [
        "{podSelector: {matchLabels: {a: %s}}}",
        "{podSelector: {matchExpressions: [{key: a, operator: In, values: [%s]}]}}",
    ],
)
def test_a_label_is_quoted_as_written(spec: str, written: str, reading: str) -> None:
    """The text in quotes is the one that makes the label that was meant; the reading is said beside it."""
    (problem,) = _kubernetes(spec % written)
    assert problem.message == (
        f'must be text, is the value {written}, which is read as {reading}; put it in quotes: "{written}"'
    )


def test_a_value_that_tells_itself_is_quoted_once() -> None:
    """No word of how it is read where that is how it is written."""
    messages = [
        problem.message
        for problem in _kubernetes("{podSelector: {matchLabels: {a: true, b: 80, c: -1.5, d: , e: null}}}")
    ]
    assert messages == [
        'must be text, is the value true; put it in quotes: "true"',
        'must be text, is the value 80; put it in quotes: "80"',
        'must be text, is the value -1.5; put it in quotes: "-1.5"',
        *['must be text, is nothing; write "" for an empty text, "null" for the word'] * 2,
    ]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("  order: yes\n", "must be a number (without quotes), is yes, which is read as true"),
        ("  preDNAT: 0x1\n", "must be true or false (without quotes), is 0x1, which is read as 1"),
        ("  tier: 010\n", 'is the value 010, which is read as 8; put it in quotes: "010"'),
        ("  types: [on]\n", 'is the value on, which is read as true; put it in quotes: "on"'),
        ("  ingress: no\n", "must be a list (each item begins with `- `), is no, which is read as false"),
        ("  ingress: [off]\n", "must be a mapping, is off, which is read as false"),
        (
            "  ingress: [{action: Allow, ipVersion: 0o5}]\n",
            "must be 4 or 6 (without quotes), is 0o5, which is read as 5",
        ),
        ("  ingress: [{action: Allow, protocol: 0x100}]\n", "from 1 to 255, is 0x100, which is read as 256"),
        ("  ingress: [{action: Allow, protocol: y}]\n", "is y, which is read as true"),
        (
            "  ingress: [{action: Allow, protocol: TCP, destination: {ports: [0b0]}}]\n",
            "must be a port from 1 to 65535, is 0b0, which is read as 0",
        ),
        (
            "  ingress: [{action: Allow, protocol: TCP, destination: {ports: [80.50]}}]\n",
            "or a port name; is 80.50, which is read as 80.5",
        ),
        ("  ingress: [{action: Allow, protocol: ICMP, icmp: {type: 0777}}]\n", "is 0777, which is read as 511"),
    ],
)
def test_other_values_are_quoted_as_written(spec: str, words: str) -> None:
    """Every message that names a scalar of the wrong type or size."""
    assert any(words in problem.message for problem in _calico(spec))


def test_numbers_of_other_forms_are_numbers() -> None:
    """As the API server gets them: octal, without their fraction, in decimal with a leading zero."""
    ports = "[{port: 0120}, {port: 80.0}, {port: 8e1}, {port: 080}]"
    (policy,) = parse_documents(
        f"apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: a}}\nspec: {{ingress: [{{ports: {ports}}}]}}\n",
        "f",
    ).check()
    assert {port.port for port in policy.spec.ingress[0].ports} == {80}  # type: ignore[union-attr]


FOLDED = "a block that begins with `>` or `|` keeps the line break at its end; begin it with `>-`, or write one line"


@pytest.mark.parametrize(
    "block", [">\n    app == 'x'\n", "|\n    app == 'x'\n", ">+\n    app == 'x'\n\n", "\"app == 'x'\\n\"\n"]
)
@pytest.mark.parametrize("field", ["selector", "namespaceSelector", "serviceAccountSelector"])
def test_a_selector_with_a_line_break(field: str, block: str) -> None:
    """It is refused as Calico refuses it, and the message says how to write it."""
    (problem,) = _calico(f"  {field}: {block}")
    assert (problem.path, problem.message) == (
        f"spec.{field}",
        f"holds a line break, which a selector cannot have; {FOLDED}",
    )


@pytest.mark.parametrize("block", [">-\n    app == 'x'\n    && has(y)\n", "|-\n    app == 'x'\n"])
def test_blocks_without_a_line_break_are_selectors(block: str) -> None:
    """The message's recommendation is correct."""
    assert _calico(f"  selector: {block}") == []


def test_a_selector_with_a_line_break_and_another_mistake() -> None:
    """Both are said."""
    line_break, other = _calico("  selector: |\n    app = 'x'\n")
    assert "line break" in line_break.message
    assert "line break" not in other.message


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        (
            "  ingress:\n  - action: Allow\n    source:\n      selector: >\n        a == 'b'\n",
            "spec.ingress[0].source.selector",
        ),
        (
            "  ingress:\n  - action: Allow\n    source:\n      notSelector: |\n        a == 'b'\n",
            "spec.ingress[0].source.notSelector",
        ),
        (
            "  ingress:\n  - action: Allow\n    source:\n      serviceAccounts:\n        selector: >\n          has(a)\n",
            "spec.ingress[0].source.serviceAccounts.selector",
        ),
        (
            "  ingress:\n  - action: Allow\n    source:\n      serviceAccounts:\n        names:\n        - >\n          a\n",
            "spec.ingress[0].source.serviceAccounts.names[0]",
        ),
        (
            "  ingress:\n  - action: Allow\n    source:\n      nets:\n      - |\n        10.0.0.0/8\n",
            "spec.ingress[0].source.nets[0]",
        ),
        (
            "  ingress:\n  - action: Allow\n    protocol: TCP\n    destination:\n      ports:\n      - >\n        1:2\n",
            "spec.ingress[0].destination.ports[0]",
        ),
        (
            "  ingress:\n  - action: Allow\n    http:\n      methods:\n      - >\n        GET\n",
            "spec.ingress[0].http.methods[0]",
        ),
        (
            "  ingress:\n  - action: Allow\n    http:\n      paths:\n      - exact: >\n          /a\n",
            "spec.ingress[0].http.paths[0].exact",
        ),
        (
            "  ingress:\n  - action: Allow\n    http:\n      headers:\n      - header: h\n        operator: MatchesRegex\n"
            "        values:\n        - >\n          a.*\n",
            "spec.ingress[0].http.headers[0].values[0]",
        ),
        (
            "  egress:\n  - action: Allow\n    destination:\n      domains:\n      - >\n        a.b\n",
            "spec.egress[0].destination.domains[0]",
        ),
        ("  tier: >\n    a\n", "spec.tier"),
        ("  types:\n  - >\n    Ingress\n", "spec.types[0]"),
    ],
)
def test_a_line_break_anywhere(spec: str, path: str) -> None:
    """A value that cannot hold a line break is refused with the same advice, on one line."""
    problems = [problem for problem in _calico(spec) if problem.path == path]
    assert len(problems) == 1
    assert FOLDED in problems[0].message
    assert "\n" not in problems[0].message


def test_a_line_break_in_a_label() -> None:
    """The line break is shown, since it is what is wrong."""
    (problem,) = _kubernetes("\n  podSelector:\n    matchLabels:\n      app: |\n        web\n")
    assert '"web\\n" is no label value' in problem.message
    assert problem.message.endswith(FOLDED)


def test_a_line_break_in_an_interface_pattern() -> None:
    """It would match no interface, in silence."""
    (problem,) = _problems(
        "apiVersion: projectcalico.org/v3\nkind: KubeControllersConfiguration\nmetadata: {name: default}\nspec:\n  controllers:\n"
        "    node:\n      hostEndpoint:\n        templates:\n        - generateName: a\n          interfacePattern: >\n"
        "            eth.*\n"
    )
    assert "holds a line break, so it matches no interface" in problem.message


@pytest.mark.parametrize(
    ("port", "hint"),
    [
        ("30000-32767", '; a range is written "30000:32767"'),
        ("80..90", '; a range is written "80:90"'),
        ("80_90", '; a range is written "80:90"'),
        ("'80-'", ""),
        ("'-80'", ""),
        ("80-90-100", ""),
    ],
)
@pytest.mark.parametrize("field", ["ports", "notPorts"])
def test_a_port_name_without_a_letter(field: str, port: str, hint: str) -> None:
    """It is legal, and the name of no pod's port: a range with the wrong sign between its ends, or a slip."""
    # YAML takes 80_90 without quotes for a number
    (problem,) = _calico(
        f"  ingress: [{{action: Deny, protocol: TCP, destination: {{{field}: ['{port.strip(chr(39))}']}}}}]\n"
    )
    assert (problem.severity, problem.slug, problem.path) == (
        "warning", "port-range", f"spec.ingress[0].destination.{field}[0]",
    )  # fmt: skip
    assert problem.message.endswith(f"so it matches no pod{hint}")


@pytest.mark.parametrize("port", ["http", "80-a", "8080", "'1:2'"])
def test_ports_that_are_meant(port: str) -> None:
    """No warning of a name with a letter, a number or a range."""
    assert _calico(f"  ingress: [{{action: Deny, protocol: TCP, destination: {{ports: [{port}]}}}}]\n") == []


@pytest.mark.parametrize("port", ["8000-8080", "'8000:8080'"])
def test_a_range_in_a_kubernetes_port(port: str) -> None:
    """It is refused, and `endPort` is named."""
    (problem,) = _kubernetes(f"{{ingress: [{{ports: [{{port: {port}}}]}}]}}")
    assert problem.message.endswith("a range has its first port here and its last, 8080, in `endPort`")
