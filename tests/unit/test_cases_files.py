# SPDX-License-Identifier: Apache-2.0
"""Case files: what is parsed, and that all their errors are reported."""

from __future__ import annotations

import textwrap
from ipaddress import ip_address
from pathlib import Path

import pytest

from netpol_ebpf.cases.case import LoadedCases, load_cases, parse_cases
from netpol_ebpf.resources.types import Namespace

GOOD = """\
name: good
manifests:
- {apiVersion: v1, kind: Pod, metadata: {name: p, namespace: ns}, status: {podIPs: [{ip: 10.0.0.1}]}}
probes:
- {from: ns/p, to: 10.0.0.9, protocol: TCP, port: 80, expect: allow}
"""


def parse(text: str) -> LoadedCases:
    loaded = LoadedCases()
    parse_cases(textwrap.dedent(text), "c.yaml", loaded)
    return loaded


def error(text: str) -> str:
    loaded = parse(text)
    assert not loaded.cases
    (invalid,) = loaded.invalid
    return invalid.error


def test_a_case() -> None:
    """A case has a name, objects with an implied namespace, and probes with their place in the file."""
    (case,) = parse(GOOD).cases
    assert (case.name, case.sequence) == ("good", None)
    (probe,) = case.probes
    assert (probe.source, probe.destination) == (("ns", "p"), ip_address("10.0.0.9"))
    assert (probe.protocol, probe.port, probe.expect_allow) == (6, 80, True)
    assert str(probe.location) == "c.yaml:5"
    assert probe.written == {"from": "ns/p", "to": "10.0.0.9", "protocol": "TCP", "port": 80, "expect": "allow"}
    (namespace,) = [resource for resource in case.resources if isinstance(resource, Namespace)]
    assert namespace.meta.name == "ns"
    assert namespace.meta.labels == {"kubernetes.io/metadata.name": "ns"}


def test_remarks_are_accepted() -> None:
    """They mean nothing to the runner; a sequence does."""
    remarks = "source: {repo: x}\nnotes: 'n'\ntags: [a]\nconfidence: low\noptional: true\nderived: 'y'\n"
    (case,) = parse(GOOD + remarks + "sequence: {group: g, step: 2, of: 3}\n").cases
    assert case.sequence == ("g", 2)


@pytest.mark.parametrize(
    ("written", "protocol"),
    [("TCP", 6), ("udp", 17), ("SCTP", 132), ("UDPLite", 136), ("ICMP", 1), ("ICMPv6", 58), ("47", 47), ("'253'", 253)],
)
def test_protocols(written: str, protocol: int) -> None:
    """A protocol is given by name, in any case, or by number."""
    port = ", port: 1" if protocol in (6, 17, 132) else ""
    text = GOOD.replace("protocol: TCP, port: 80", f"protocol: {written}{port}")
    assert parse(text).cases[0].probes[0].protocol == protocol


def test_all_probe_fields() -> None:
    """A probe may have a source port, ICMP type and code, and a translation with or without a port."""
    text = GOOD + (
        "- {from: 10.0.0.9, to: ns/p, protocol: UDP, port: 53, srcPort: 5353, expect: deny, "
        "dnatTo: {ip: 10.0.0.1, port: 99}}\n"
        "- {from: 10.0.0.9, to: ns/p, protocol: 1, icmpType: 3, icmpCode: 4, expect: deny, dnatTo: {ip: 10.0.0.1}}\n"
    )
    _, udp, icmp = parse(text).cases[0].probes
    assert (udp.source_port, udp.dnat_to, udp.expect_allow) == (5353, (ip_address("10.0.0.1"), 99), False)
    assert (icmp.icmp_type, icmp.icmp_code, icmp.dnat_to) == (3, 4, (ip_address("10.0.0.1"), 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("to: 10.0.0.9", "to: nowhere"),
            'c.yaml:5: error: probes[0].to: must be a pod as namespace/name or an IP address or a domain name; is "nowhere"',
        ),
        (("protocol: TCP", "protocol: TPC"), "probes[0].protocol: must be TCP, UDP"),
        (("protocol: TCP", "protocol: 256"), "probes[0].protocol: must be TCP, UDP"),
        ((", port: 80", ""), "probes[0].port: TCP, UDP and SCTP probes need a destination port"),
        (("port: 80", "port: 65536"), "probes[0].port: must be from 0 to 65535"),
        (("protocol: TCP", "protocol: ICMP"), "probes[0].port: protocol 1 has no ports"),
        (("port: 80", "port: 80, icmpType: 8"), "probes[0].icmpType: only ICMP and ICMPv6"),
        (("expect: allow", "expect: maybe"), "probes[0].expect: "),
        (("expect: allow", "expects: allow"), "unknown field `expects`"),
        (("port: 80", "port: 80, dnatTo: {ip: x}"), "probes[0].dnatTo.ip: must be an IP address"),
        (("manifests:", "manifest:"), "the field `manifests` is required"),
        (("probes:", "probe:"), "a case needs at least one probe"),
        (("name: good", "name: ''"), "the field `name` is required"),
        (("kind: Pod", "kind: Prod"), "c.yaml:3: error: Prod/ns/p: kind: unknown kind Prod"),
        (("name: good", "name: good\nsequence: {group: g}"), "the field `step` is required"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(change: tuple[str, str], message: str) -> None:
    """There is one message for each mistake, and the case is not run."""
    assert message in error(GOOD.replace(*change))


def test_all_that_is_wrong_is_said_at_once() -> None:
    """A wrong manifest does not hide a wrong probe."""
    text = error(GOOD.replace("kind: Pod", "kind: Prod").replace("expect: allow", "expect: maybe"))
    assert "Prod" in text
    assert "expect" in text


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", "", "a: [\n"])
def test_what_is_no_case_is_invalid(text: str) -> None:
    """A file that is given as a case must be one."""
    loaded = parse(text)
    assert not loaded.cases
    assert [invalid.case for invalid in loaded.invalid] == ["c.yaml"]


def test_directories_are_searched(tmp_path: Path) -> None:
    """Files are sorted by name, without hidden ones. Other YAML is skipped with a note, broken YAML is an error."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.yml").write_text(GOOD.replace("good", "two"))
    (tmp_path / "a.yaml").write_text(GOOD.replace("good", "one"))
    (tmp_path / "c.json").write_text('{"name": "three", "manifests": [], "probes": []}')
    (tmp_path / "d.yaml").write_text("apiVersion: v1\nkind: Namespace\n")
    (tmp_path / "e.yaml").write_text("probes: [")
    (tmp_path / ".hidden.yaml").write_text("probes: [")
    (tmp_path / "notes.txt").write_text("no case")
    loaded = load_cases([tmp_path, tmp_path / "a.yaml"])
    assert [case.name for case in loaded.cases] == ["one", "two"]
    assert [invalid.case for invalid in loaded.invalid] == ["three", str(tmp_path / "e.yaml")]
    assert loaded.skipped == [str(tmp_path / "d.yaml")]


def test_case_that_cannot_be_looked_at_is_invalid(tmp_path: Path) -> None:
    """A link to a missing file counts as a case that was not run, and is reported."""
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "b.yaml").symlink_to("nowhere.yaml")
    loaded = load_cases([tmp_path])
    assert len(loaded.cases) == 1
    assert [invalid.case for invalid in loaded.invalid] == [str(tmp_path / "b.yaml")]


def test_a_file_that_is_not_there_is_invalid(tmp_path: Path) -> None:
    """The error names the file."""
    (invalid,) = load_cases([tmp_path / "none.yaml"]).invalid
    assert "none.yaml: cannot be read" in invalid.error
