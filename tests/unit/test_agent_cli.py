# SPDX-License-Identifier: Apache-2.0
"""The commands about an agent and its node, with an agent of canned answers; and the agent's own command line."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from netpol_ebpf.agent import loop as agent_loop
from netpol_ebpf.agent import main as agent_main
from netpol_ebpf.agent.control_socket import SOCKET_NAME, connect
from netpol_ebpf.agent.source_options import COPIES_NAME
from netpol_ebpf.cli import main as cli
from netpol_ebpf.cli.main import main
from netpol_ebpf.errors import PlatformError, UsageError
from netpol_loader.pins import doctor
from netpol_loader.pins.lock import held, locked

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
"""Of the threads of a test runner."""

CLUSTER = """\
apiVersion: v1
kind: Node
metadata: {name: 'n'}
status: {addresses: [{type: InternalIP, address: 172.30.0.10}]}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: 'n', containers: [{name: c, image: x}]}
status: {podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
spec: {nodeName: 'n', containers: [{name: c, image: x}]}
status: {podIPs: [{ip: 10.0.0.2}, {ip: "fd00::2"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: other, namespace: shop, labels: {app: other}}
spec: {nodeName: 'n', containers: [{name: c, image: x}]}
status: {podIPs: [{ip: 10.0.0.3}]}
"""
POLICY = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: web}}}]
    ports: [{port: 5432}]
"""
STATE: dict[str, Any] = {
    "version": "1", "pid": 7, "node": None, "manifests": "/m", "pin_dir": "/p", "in_force": True, "generation": 3,
    "changes_applied": 1, "packets": {"policy-deny": 4}, "problems": [],
    "objects": {
        "policies": 1, "endpoints": 2, "local_endpoints": 2, "enforced_endpoints": 1, "skipped": {"v1 ConfigMap": 2}, "learned_names": 3,
    },
    "endpoints": [
        {"endpoint": "Pod/shop/web", "addresses": ["10.0.0.1"], "number": 1, "ifindex": 5, "interface": "cali1", "state": "enforced",
         "evidence": "route", "isolated_by": {"ingress": [], "egress": []}},
        {"endpoint": "Pod/shop/db", "addresses": ["10.0.0.2"], "number": 2, "ifindex": None, "interface": None, "state": "waiting",
         "evidence": None, "isolated_by": {"ingress": ["KubernetesNetworkPolicy/shop/db"], "egress": []}},
    ],
    "interfaces": [
        {"ifindex": 2, "interface": "eth0", "endpoint": None, "state": "own"},
        {"ifindex": 5, "interface": "cali1", "endpoint": "Pod/shop/web", "state": "enforced"},
        {"ifindex": 9, "interface": "cali9", "endpoint": None, "state": "closed"},
    ],
    "maps": {"np_rule": {"entries": 8, "size": 65536}},
    "timeouts": {"tcp-open": 3600.0, "udp": 180.0},
    "refused": {"changes": 0, "by_map": {}, "map": "", "waiting": []},
    "listed_again": {"messages were lost": 2},
    "drift": {"put_back": {"pin": 2}, "rounds": 6, "recent": []},
    "barrier": {
        "mode": "nft", "installed": True, "families": ["inet", "bridge"], "held": True, "patterns": [],
        "marks": {"seen": "0x20", "node": "0x40", "due": "0x10"}, "interfaces": 2,
        "packets": {"unsigned": {"inet": 3}}, "unsigned": {"cali1": 3}, "open": [],
    },
}  # fmt: skip
PROBLEM = {
    "severity": "error", "slug": "invalid", "file": "a.yaml", "line": 3, "object": "Pod/x/y", "path": "spec", "message": "is wrong",
}  # fmt: skip
FLOW: dict[str, Any] = {
    "kind": "deny", "reason": "policy-deny", "direction": "ingress", "endpoint": "Pod/shop/db", "ifindex": 5, "frame_bytes": 74,
    "source": "10.0.0.3", "destination": "10.0.0.2", "protocol": 6, "source_port": 40000, "destination_port": 5432,
    "source_name": "Pod/shop/other", "destination_name": "Pod/shop/db",
    "decided_by": {"sentence": "denied at the end of tier default", "file": "db.yaml", "line": 1},
}  # fmt: skip


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    directory = tmp_path / "manifests"
    directory.mkdir()
    (directory / "cluster.yaml").write_text(CLUSTER)
    (directory / "policy.yaml").write_text(POLICY)
    return directory


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """An agent's socket, at which a thread gives canned answers. Tests may change the answers."""
    answers: dict[str, Any] = {"status": dict(STATE), "rules": [], "identities": [], "connections": {}}
    flows = [FLOW, {**FLOW, "decided_by": None, "reason": "spoofed", "source": "fd00::3", "source_name": None}]

    def serve() -> None:
        while True:
            channel, _ = listener.accept()
            with channel, channel.makefile("rwb") as lines:
                line = lines.readline()
                if not line:
                    return
                operation = json.loads(line)["op"]
                for value in flows if operation == "flows" else [answers[operation]]:
                    lines.write(json.dumps(value).encode() + b"\n")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / SOCKET_NAME))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield answers
        with connect(tmp_path / SOCKET_NAME):
            pass
        thread.join()


def run(tmp_path: Path, *arguments: str) -> int:
    return main([*arguments, "--state-dir", str(tmp_path)])


# --- explain --------------------------------------------------------------------------------------------------------


def explain(manifests: Path, source: str, destination: str, *more: str) -> int:
    return main(["explain", "--manifests", str(manifests), "--from", source, "--to", destination, *more])


def test_explain_names_the_rule_and_its_line(manifests: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An allowed connection: the verdict of each endpoint, for each family, with tier, policy, rule, file and line."""
    assert explain(manifests, "shop/web", "shop/db", "--port", "5432") == 0
    shown = capsys.readouterr().out
    assert shown.count("ALLOWED") == 2
    assert "1. egress of Pod/shop/web: allow" in shown
    assert "2. ingress of Pod/shop/db: allow" in shown
    assert "allowed by ingress rule 0 of KubernetesNetworkPolicy/shop/db in tier default" in shown
    assert f"{manifests}/policy.yaml:7" in shown


@pytest.mark.parametrize("engine", ["model", "tables"])
def test_explain_says_no_by_its_exit_code(manifests: Path, capsys: pytest.CaptureFixture[str], engine: str) -> None:
    """A denied connection: exit code 1, and the end of the tier with the policy that isolates."""
    assert explain(manifests, "shop/other", "10.0.0.2", "--port", "5432", "--engine", engine, "-o", "json") == 1
    (way,) = json.loads(capsys.readouterr().out)
    assert (way["allowed"], way["staged_allowed"]) == (False, False)
    assert way["decided_by"]["kind"] == "end of tier"
    assert way["decided_by"]["line"] == 1
    assert [step["endpoint"] for step in way["steps"]] == ["Pod/shop/other", "Pod/shop/db"]


def test_explain_tells_what_no_policy_decides(manifests: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The node reaches its pods, ICMP has a default, and a staged policy is shown if its verdict differs."""
    assert explain(manifests, "172.30.0.10", "shop/db", "--protocol", "icmp") == 0
    assert "a host always reaches its own workloads" in capsys.readouterr().out
    (manifests / "staged.yaml").write_text(
        "apiVersion: projectcalico.org/v3\nkind: StagedGlobalNetworkPolicy\nmetadata: {name: s}\n"
        "spec: {selector: app == 'other', types: [Egress]}\n"
    )
    assert explain(manifests, "shop/other", "192.0.2.1", "--protocol", "17", "--port", "53") == 0
    shown = capsys.readouterr().out
    assert "staged: denied at the end of tier default" in shown
    assert "With staged policies enforced: denied" in shown


def test_hostile_names_make_no_lines_of_their_own(manifests: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file name with line breaks and control characters changes neither the number of lines nor the terminal."""
    assert explain(manifests, "shop/other", "10.0.0.2", "--port", "5432") == 1
    before = capsys.readouterr().out.splitlines()
    (manifests / "policy.yaml").rename(manifests / "x\nALLOWED\x1b[2J\u202e.yaml")
    assert explain(manifests, "shop/other", "10.0.0.2", "--port", "5432") == 1
    after = capsys.readouterr().out.splitlines()
    assert len(after) == len(before)
    assert all(line.isprintable() for line in after)
    (manifests / "y\n\rerror: z.yaml").write_text("kind: [")
    assert main(["check", str(manifests)]) == 3
    shown = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in shown)
    assert not any(line.startswith("error: z") for line in shown)


def test_explain_refuses_what_it_cannot_answer(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown pods and broken manifests are invalid input, a missing port is wrong usage.

    Without an agent it is unreachable.
    """
    assert explain(manifests, "shop/ghost", "shop/db", "--port", "1") == 3
    assert explain(manifests, "shop/web", "shop/db") == 2
    assert explain(manifests, "shop/web", "shop/db", "--protocol", "icmp", "--port", "1") == 2
    assert run(tmp_path, "explain", "--from", "shop/web", "--to", "shop/db", "--port", "1") == 4
    (manifests / "broken.yaml").write_text("kind: [")
    assert explain(manifests, "shop/web", "shop/db", "--port", "1") == 3
    assert "broken.yaml:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--from", "web", "--to", "10.0.0.1"], ["--from", "a/b", "--to", "a/b/c"], ["--from", "/b", "--to", "a/b"]],
)
def test_explain_reads_ends_strictly(arguments: list[str]) -> None:
    """An end that is neither an address nor NAMESPACE/NAME is wrong usage."""
    with pytest.raises(SystemExit) as caught:
        main(["explain", *arguments, "--port", "1"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "arguments", [["--port", "0"], ["--port", "65536"], ["--protocol", "256"], ["--protocol", "tpc"]]
)
def test_explain_reads_numbers_strictly(arguments: list[str]) -> None:
    """Ports and protocols outside their ranges are wrong usage."""
    with pytest.raises(SystemExit) as caught:
        main(["explain", "--from", "a/b", "--to", "a/b", *arguments])
    assert caught.value.code == 2


def test_explain_asks_the_agent_unless_files_are_named(
    agent: dict[str, Any], manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --manifests the agent answers for the policy in force.

    With it the files count, and the output says so.
    """
    assert explain(manifests, "shop/web", "shop/db", "--port", "5432", "-o", "json") == 0
    by_files = capsys.readouterr()
    assert "for the files named" in by_files.err
    ways = json.loads(by_files.out)
    agent["explain"] = {"node": "n", "ways": [{**ways[0], "allowed": False}]}
    assert run(tmp_path, "explain", "--from", "shop/web", "--to", "shop/db", "--port", "5432") == 1
    asked = capsys.readouterr()
    assert asked.out.startswith("DENIED  10.0.0.1 -> 10.0.0.2 TCP port 5432\n")
    assert asked.err == ""


SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: 10.96.0.5, selector: {app: db}, ports: [{port: 80, targetPort: 5432}]}
"""
TO_SERVICE_ALONE = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Egress], egress: [{to: [PEER]}]}
"""


def test_explain_answers_as_the_backend_of_a_service(manifests: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is allowed if policy allows the backend.

    If policy allows only the service's own address, it is denied, with a note.
    """
    (manifests / "service.yaml").write_text(SERVICE)
    policy = manifests / "web.yaml"
    policy.write_text(TO_SERVICE_ALONE.replace("PEER", "{podSelector: {matchLabels: {app: db}}}"))
    assert explain(manifests, "shop/web", "10.96.0.5", "--port", "80") == 0
    assert "10.96.0.5 TCP port 80, through Service/shop/db to 10.0.0.2 port 5432" in capsys.readouterr().out
    policy.write_text(TO_SERVICE_ALONE.replace("PEER", "{ipBlock: {cidr: 10.96.0.5/32}}"))
    assert explain(manifests, "shop/web", "10.96.0.5", "--port", "80") == 1
    shown = capsys.readouterr().out
    assert (
        "policy allows 10.96.0.5 port 80, the service's own address; what is judged is the backend, 10.0.0.2 port 5432"
        in shown
    )


# --- status, flows, get ---------------------------------------------------------------------------------------------


def test_status_shows_interfaces_known_and_closed(
    agent: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Enforced, waiting and closed are distinguished. Without a problem the exit code is 0."""
    assert agent
    assert run(tmp_path, "status") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cali1", "Pod/shop/web", "enforced", "10.0.0.1", "route", "open", "open"] in lines
    assert ["eth0", "-", "the", "node's", "own"] in lines
    assert ["skipped", "objects", "of", "other", "kinds:", "2", "v1", "ConfigMap"] in lines
    assert ["-", "Pod/shop/db", "waiting", "10.0.0.2", "-", "isolated", "(1)", "open"] in lines
    assert ["cali9", "-", "closed", "(no", "known", "endpoint)"] in lines
    assert run(tmp_path, "status", "-o", "wide") == 0
    shown = capsys.readouterr().out
    assert "np_rule  8        65536" in shown
    assert "tcp-open          3600 s" in shown


def test_status_with_problems_is_exit_1(
    agent: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Problems are shown with place and object, and as plain values."""
    agent["status"] |= {"in_force": False, "problems": [PROBLEM]}
    assert run(tmp_path, "status") == 1
    assert "error: a.yaml:3: Pod/x/y: spec: is wrong" in capsys.readouterr().out
    assert run(tmp_path, "status", "-o", "yaml") == 1
    assert yaml.safe_load(capsys.readouterr().out)["problems"] == [PROBLEM]


SOURCES: list[dict[str, Any]] = [
    {"source": "https://api:6443", "type": "kubernetes", "synced": True, "waiting_for": [], "restored": False, "confirmed": "2026-01-02T03:04:05Z",
     "cut_off": False, "stale_since": None, "kinds": [
        {"kind": "pods", "state": "watching", "is_synced": True, "objects": 7, "kept": 0, "resource_version": "99"},
        {"kind": "tiers.projectcalico.org", "state": "definition deleted", "is_synced": True, "objects": 3, "kept": 2, "resource_version": ""},
        {"kind": "nodes", "state": "waiting to retry", "is_synced": True, "objects": 2, "kept": 0, "resource_version": "98"},
     ]},
    {"source": "/m", "type": "manifests", "synced": True, "waiting_for": []},
]  # fmt: skip


def test_status_shows_each_source_and_what_is_not_followed(
    agent: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only -o wide names watched kinds. Deleted definitions are shown with the number of kept objects."""
    agent["status"]["sources"] = SOURCES
    assert run(tmp_path, "status") == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert "source     kubernetes https://api:6443: synced; confirmed at 2026-01-02T03:04:05Z" in lines
    assert "source     manifests /m: synced" in lines
    cells = [line.split() for line in lines]
    assert ["tiers.projectcalico.org", "definition", "deleted", "3", "2", "-"] in cells
    assert ["nodes", "waiting", "to", "retry", "2", "-", "98"] in cells
    assert "pods" not in shown
    assert run(tmp_path, "status", "-o", "wide") == 0
    assert ["pods", "watching", "7", "-", "99"] in [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"synced": False, "waiting_for": ["pods", "nodes"]}, "waits for pods, nodes"),
        ({"cut_off": True, "stale_since": "2026-01-02T03:04:05Z"}, "CUT OFF, later changes than of 2026-01-02T03:04:05Z may be missing"),
        ({"cut_off": True, "confirmed": None}, "CUT OFF, later changes than of the start may be missing"),
        ({"went_back_at": "2026-01-01T00:00:00Z"}, "WENT BACK to an older state at 2026-01-01T00:00:00Z"),
        ({"kinds": [{**SOURCES[0]["kinds"][0], "kind": "pods", "gaps": 2}]}, "events lost and listed again: pods 2 times"),
        ({"restored": True, "stale_since": "2025-12-31T00:00:00Z"}, "NOT READ, the state saved at 2025-12-31T00:00:00Z is in force"),
    ],
)  # fmt: skip
def test_status_says_since_when_a_cluster_is_stale(
    agent: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], said: str
) -> None:
    """The text is in one line with the source's name."""
    agent["status"]["sources"] = [{**SOURCES[0], **changed}]
    run(tmp_path, "status")
    (line,) = (one for one in capsys.readouterr().out.splitlines() if one.startswith("source"))
    assert said in line


def test_status_of_an_agent_that_waits_is_exit_1(
    agent: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output has only sources and problems."""
    missing = {**SOURCES[0], "synced": False, "waiting_for": ["nodes"], "cut_off": True}
    agent["status"] = {
        "version": "1", "pid": 7, "node": "n", "manifests": None, "pin_dir": "/p", "upgrade": "", "in_force": False, "waiting": "it waits",
        "sources": [missing], "problems": [{**PROBLEM, "file": "", "line": 0, "object": "", "path": "", "slug": "not-synced"}],
    }  # fmt: skip
    assert run(tmp_path, "status") == 1
    shown = capsys.readouterr().out
    assert "waits for nodes" in shown
    assert "error: is wrong" in shown
    assert run(tmp_path, "status", "-o", "json") == 1
    assert json.loads(capsys.readouterr().out)["waiting"] == "it waits"


def test_no_agent_is_exit_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command that needs an agent reports that none answers."""
    for command in (["status"], ["flows"], ["get", "rules"]):
        assert run(tmp_path, *command) == 4
        assert "no agent answers" in capsys.readouterr().err


def test_flows_are_lines_with_names_and_rules(
    agent: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flow is one line: the verdict, source and destination, the reason, and its place in a file."""
    assert agent
    assert run(tmp_path, "flows") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        "deny  ingress TCP shop/other 10.0.0.3:40000 -> shop/db 10.0.0.2:5432  "
        "denied at the end of tier default (db.yaml:1)"
    )
    assert second == "deny  ingress TCP [fd00::3]:40000 -> shop/db 10.0.0.2:5432  spoofed"
    assert run(tmp_path, "flows", "-o", "json") == 0
    assert [json.loads(line)["reason"] for line in capsys.readouterr().out.splitlines()] == ["policy-deny", "spoofed"]


def test_get_lists(agent: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each list has a table, a wide table, and plain values."""
    agent["rules"] = [{"number": 5, "rule": "a|b", "packets": 2, "bytes": 99, "staged_packets": 3}]
    agent["identities"] = [{"number": 16, "digest": "d", "members": [f"10.0.0.{last}" for last in range(6)]}]
    assert run(tmp_path, "get", "rules") == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["5", "2", "99", "3", "a|b"]
    assert run(tmp_path, "get", "identities") == 0
    assert "10.0.0.3 and 2 more" in capsys.readouterr().out
    assert run(tmp_path, "get", "identities", "-o", "wide") == 0
    assert "10.0.0.5" in capsys.readouterr().out
    assert run(tmp_path, "get", "maps", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out) == [{"map": "np_rule", "entries": 8, "size": 65536}]
    assert run(tmp_path, "get", "endpoints") == 0
    assert "Pod/shop/db" in capsys.readouterr().out
    one = {
        "endpoint": "Pod/shop/db", "direction": "ingress", "protocol": 6, "source": "fd00::3", "source_port": 40000,
        "destination": "fd00::2", "destination_port": 5432, "form": "unreplied", "state": "tcp-new", "generation": 2, "rule": None,
    }  # fmt: skip
    agent["connections"] = {"connections": [one], "more": 7}
    assert run(tmp_path, "get", "connections") == 0
    shown = capsys.readouterr()
    assert "TCP [fd00::3]:40000 -> [fd00::2]:5432  tcp-new, no reply yet  -" in shown.out
    assert shown.err == "and 7 more\n"


def test_refused_object_is_named_with_its_map(
    tmp_path: Path, agent: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Status names the object that does not fit, and the map."""
    agent["status"]["refused"] = {"changes": 3, "by_map": {"np_rule": 3}, "map": "np_rule", "waiting": ["Pod/shop/db"]}
    assert run(tmp_path, "status") == 0
    assert "rejected   Pod/shop/db: no room in np_rule" in capsys.readouterr().out


def test_the_second_barrier_is_shown(tmp_path: Path, agent: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The output says whether it is in force, what it dropped, and what it leaves open."""
    assert run(tmp_path, "status") == 0
    assert "barrier    inet and bridge, 2 interfaces; 3 packets dropped" in capsys.readouterr().out
    agent["status"]["barrier"] = {**STATE["barrier"], "patterns": ["cali*"], "open": ["what a bridge passes on"]}
    assert run(tmp_path, "status", "-o", "wide") == 0
    shown = capsys.readouterr().out
    assert "3 packets dropped; closed while no agent runs: cali*" in shown
    assert "           NOT closed: what a bridge passes on" in shown
    assert re.search(r"^unsigned +inet +3$", shown, re.MULTILINE)
    for change, text in (({"installed": False}, "NOT IN FORCE"), ({"mode": "off"}, "off")):
        agent["status"]["barrier"] = {**STATE["barrier"], **change}
        assert run(tmp_path, "status") == 0
        assert f"barrier    {text}" in capsys.readouterr().out


FAMILIES: list[dict[str, Any]] = [
    {"name": "netpol_in_force", "kind": "gauge", "meaning": "Whether.", "samples": [{"labels": {}, "value": 1}]},
    {"name": "netpol_packets_total", "kind": "counter", "meaning": "Packets.", "samples": [{"labels": {"reason": "policy-deny"}, "value": 4}]},
]  # fmt: skip


def test_metrics_are_those_that_the_agent_answers(
    tmp_path: Path, agent: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """As Prometheus' text, and as plain values."""
    pytest.importorskip("prometheus_client", reason="the extra [metrics] is not installed")
    agent["metrics"] = FAMILIES
    assert run(tmp_path, "metrics") == 0
    assert 'netpol_packets_total{reason="policy-deny"} 4.0' in capsys.readouterr().out.splitlines()
    assert run(tmp_path, "metrics", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out) == FAMILIES


def test_metrics_as_text_need_the_extra(
    tmp_path: Path, agent: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the package the text is refused with the package's name. Plain values need no package."""
    agent["metrics"] = FAMILIES
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert run(tmp_path, "metrics") == 5
    assert "netpol-ebpf[metrics]" in capsys.readouterr().err
    assert run(tmp_path, "metrics", "-o", "json") == 0


# --- doctor, cleanup ------------------------------------------------------------------------------------------------


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each check is a line. A failed one has a hint, and makes the exit code 5."""
    checks = [doctor.Check("kernel", "6.1")]
    monkeypatch.setattr(doctor, "check_all", lambda _root: checks)
    monkeypatch.setattr(doctor, "try_to_load", lambda: doctor.Check("load", "5 programs"))
    assert main(["doctor"]) == 0
    assert "ok      load" in capsys.readouterr().out
    checks.append(doctor.Check("bcc", "it is missing", PlatformError("it is missing", hint="apt install it")))
    assert main(["doctor"]) == 5
    shown = capsys.readouterr().out
    assert "MISSING bcc" in shown
    assert "-> apt install it" in shown
    assert main(["doctor", "-o", "json"]) == 5
    assert [one["ok"] for one in json.loads(capsys.readouterr().out)] == [True, False]


@pytest.mark.parametrize("gone", doctor.CAPABILITIES)
def test_missing_capability_is_named(gone: doctor.Capability) -> None:
    """Without one of the capabilities, exactly that one is reported as missing."""
    effective = sum(1 << one.number for one in doctor.CAPABILITIES)
    assert doctor.missing_capabilities(effective) == []
    assert doctor.missing_capabilities(effective & ~(1 << gone.number)) == [gone]


def test_old_all_embracing_capability_stands_for_two() -> None:
    """CAP_SYS_ADMIN includes CAP_BPF and CAP_PERFMON, but not CAP_NET_ADMIN."""
    assert [one.name for one in doctor.missing_capabilities(1 << doctor.CAP_SYS_ADMIN)] == ["CAP_NET_ADMIN"]


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.mark.usefixtures("as_root")
def test_cleanup_removes_the_agent_s_state_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The agent's files are removed by name. A file of others stays, and so does its directory."""
    state = tmp_path / "state"
    (state / COPIES_NAME).mkdir(parents=True)
    (state / COPIES_NAME / "copy").touch()
    (state / agent_main.LEDGER_NAME).touch()
    (state / "mine").touch()
    arguments = ["cleanup", "--pin-root", str(tmp_path / "no-pins"), "--state-dir", str(state)]
    assert main([*arguments, "--dry-run"]) == 0
    assert f"would remove state {state}/{agent_main.LEDGER_NAME}" in capsys.readouterr().out
    assert (state / agent_main.LEDGER_NAME).exists()
    assert main([*arguments, "-o", "json"]) == 0
    assert {Path(one["name"]).name for one in json.loads(capsys.readouterr().out)} == {
        COPIES_NAME, agent_main.LEDGER_NAME, agent_main.LOCK_NAME,
    }  # fmt: skip
    assert [path.name for path in state.iterdir()] == ["mine"]
    (state / "mine").unlink()
    assert main(arguments) == 0
    assert not state.exists()
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out == "nothing to remove\n"


@pytest.mark.usefixtures("as_root")
def test_cleanup_removes_the_saved_state_of_the_cluster(tmp_path: Path) -> None:
    """This includes the file of an interrupted write. The directory belongs to the user and stays."""
    for name in ("cluster", "cluster.draft", "mine"):
        (tmp_path / "kept" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "kept" / name).touch()
    options = ["--pin-root", str(tmp_path / "no-pins"), "--state-dir", str(tmp_path / "state")]
    assert main(["cleanup", *options, "--saved-state", str(tmp_path / "kept" / "cluster")]) == 0
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["mine"]


IN_THE_WAY = {
    "an agent of the same state directory": ("pins", "state"),
    "an agent of another state directory": ("pins", "other-state"),
    "an agent of another pin root": ("other-pins", "state"),
}


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(("pins", "state"), IN_THE_WAY.values(), ids=IN_THE_WAY)
@pytest.mark.parametrize("is_dry", [False, True])
def test_cleanup_refuses_while_an_agent_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pins: str, state: str, *, is_dry: bool
) -> None:
    """A running agent would restore everything.

    Each of the two directories suffices to detect it, and the hint is no way around.
    """
    for name in ("pins", "other-pins", "state", "other-state"):
        (tmp_path / name).mkdir()
    (tmp_path / "state" / agent_main.LEDGER_NAME).touch()
    arguments = ["cleanup", "--pin-root", str(tmp_path / "pins"), "--state-dir", str(tmp_path / "state")]
    with agent_main.exclusive(tmp_path / state), held(tmp_path / pins, hint=""):
        # in another process, as a real agent
        process = os.fork()
        if process == 0:
            os._exit(main([*arguments, "--dry-run"] if is_dry else arguments))
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) == 5
    assert (tmp_path / "state" / agent_main.LEDGER_NAME).exists()
    assert main(arguments) == 0
    assert not (tmp_path / "pins").exists()
    capsys.readouterr()


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("guard", ["state", "pins"])
def test_hint_of_cleanup_is_to_stop_the_agent(tmp_path: Path, capfd: pytest.CaptureFixture[str], guard: str) -> None:
    """The hint names no option, because another directory would evade the check."""
    for name in ("state", "pins"):
        (tmp_path / name).mkdir()
    with agent_main.exclusive(tmp_path / "state") if guard == "state" else held(tmp_path / "pins", hint=""):
        process = os.fork()
        if process == 0:
            code = main(["cleanup", "--pin-root", str(tmp_path / "pins"), "--state-dir", str(tmp_path / "state")])
            sys.stderr.flush()
            os._exit(code)
        os.waitpid(process, 0)
    (hint,) = [line for line in capfd.readouterr().err.splitlines() if "hint:" in line]
    assert "Stop the agent first" in hint
    assert "--" not in hint


def test_pin_root_is_held_by_one_process(tmp_path: Path) -> None:
    """A second process fails at once with its own hint until the first one has ended, also in a new directory."""
    root = tmp_path / "pins"
    for _ in range(2):
        root.mkdir()
        with held(root, hint="first"), locked(root):
            process = os.fork()
            if process == 0:
                code = 0
                try:
                    with held(root, hint="second"):
                        pass
                except PlatformError as error:
                    code = 5 if error.hint == "second" else 1
                os._exit(code)
            _, status = os.waitpid(process, 0)
            assert os.waitstatus_to_exitcode(status) == 5
            root.rmdir()


def test_cleanup_needs_root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without root: one line, exit 5."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["cleanup"]) == 5
    assert "belong to root" in capsys.readouterr().err


# --- netpol-agent ---------------------------------------------------------------------------------------------------


def test_agent_s_wrong_arguments_are_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing manifests, unknown maps and wrong sizes are errors before anything is changed."""
    assert agent_main.main(["--manifests", str(tmp_path / "none")]) == 3
    for size in ("np_addr4", "np_addr4=x", "np_addr4=0", "np_addr4=4294967297", "np_addr4=²", "nonsense=1"):
        assert agent_main.main(["--manifests", str(tmp_path), "--map-size", size]) == 2
    assert "a map of np_endpoint" in capsys.readouterr().err
    for timeout in ("udp", "udp=", "udp=1.5", "udp=1", "udp=-5", "udp=²", f"udp={10**400}", "tcp=60"):
        assert agent_main.main(["--manifests", str(tmp_path), "--timeout", timeout]) == 2, timeout
    assert "a state of tcp-new, tcp-open" in capsys.readouterr().err
    with pytest.raises(UsageError):
        agent_main.parse_sizes(["np_rule=-1"])
    assert agent_main.parse_sizes(["np_rule=5", "np_addr4=7"]) == {"np_rule": 5, "np_addr4": 7}


@pytest.mark.parametrize("name", ["no-such-group", "4294967294", "9" * 30])
def test_unknown_group_is_usage(tmp_path: Path, name: str) -> None:
    """The group is given by name, or by number of any size."""
    assert agent_main.main(["--manifests", str(tmp_path), "--group", name]) == 2


def test_state_directory_that_cannot_be_made_is_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If a file is at the path, the error names the path, with exit code 5."""
    monkeypatch.setattr(doctor, "require_all", lambda _root: None)
    (tmp_path / "file").touch()
    assert agent_main.main(["--manifests", str(tmp_path), "--state-dir", str(tmp_path / "file" / "state")]) == 5
    assert f"{tmp_path}/file/state: Not a directory" in capsys.readouterr().err


def test_agent_s_failure_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A platform's lack is exit 5 with its hint, a bug exit 70 with its place; a traceback only with --debug."""

    def fail(error: Exception) -> None:
        def require_all(_root: Path) -> None:
            raise error

        monkeypatch.setattr(doctor, "require_all", require_all)

    fail(PlatformError("no bpffs", hint="mount it"))
    arguments = ["--manifests", str(tmp_path), "--state-dir", str(tmp_path)]
    assert agent_main.main(arguments) == 5
    shown = capsys.readouterr().err
    assert "netpol-agent: error: no bpffs\nnetpol-agent: hint: mount it\n" in shown
    assert "Traceback" not in shown
    fail(OSError(28, "No space left on device", "/run/netpol-ebpf/numbers"))
    assert agent_main.main(arguments) == 5
    assert "netpol-agent: error: /run/netpol-ebpf/numbers: No space left on device; " in capsys.readouterr().err
    fail(ValueError("oops"))
    assert agent_main.main(arguments) == 70
    assert "bug: ValueError: oops" in capsys.readouterr().err
    assert agent_main.main([*arguments, "--debug"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_signal_wakes_and_is_noted() -> None:
    """A signal is added to the list and makes the descriptor readable.

    Afterwards the old handler is installed again.
    """
    before = signal.getsignal(signal.SIGUSR1)
    with agent_loop.wakened_by(signal.SIGUSR1) as (received, wake):
        assert received == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert received == [signal.SIGUSR1]
        assert os.read(wake, 16)
    assert signal.getsignal(signal.SIGUSR1) == before


def test_one_agent_per_state_directory(tmp_path: Path) -> None:
    """A second agent is refused while the first one has the directory, and not afterwards."""
    for _ in range(2):
        with (
            agent_main.exclusive(tmp_path / "state"),
            pytest.raises(PlatformError, match="another netpol-agent uses"),
            agent_main.exclusive(tmp_path / "state"),
        ):
            pytest.fail("two agents hold one directory")


def test_tunnels_and_routers_are_read_or_refused() -> None:
    """A misspelt value would otherwise close nothing, or open nothing, without a message."""
    parse = agent_main.parse_tunnel
    assert [parse(text) for text in ("udp:8472", "ipip", "IP6", "gre")] == [(17, 8472), (4, 0), (41, 0), (47, 0)]
    for text in ("udp", "udp:0", "udp:65536", "gre:1", "vxlan", ""):
        with pytest.raises(UsageError, match="--tunnel"):
            parse(text)
    assert agent_main.parse_router("network/*") == "network/*"
    for text in ("router", "/router", "network/", "a/b/c", ""):
        with pytest.raises(UsageError, match="--router"):
            agent_main.parse_router(text)


# --- the tools' own words -------------------------------------------------------------------------------------------


def test_every_command_there_is_is_found_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of commands names each module with a command. A missing module is a bug, and fails at once."""
    directory = Path(str(cli.__file__)).parent
    found = {path.stem for path in directory.glob("*.py") if "\ndef register(" in path.read_text()}
    assert {name.rpartition(".")[2] for name in cli.COMMANDS} == found
    monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, "netpol_ebpf.cli.ststus"))
    with pytest.raises(ModuleNotFoundError, match="ststus"):
        cli.build_parser()


def test_every_command_prints_json_as_the_readme_says() -> None:
    """Every command has -o json, except that of the benchmarks, in which -o names a JSON file."""
    parser = cli.build_parser()
    (commands,) = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    choices = {name: one._option_string_actions["-o"].choices for name, one in commands.items()}
    assert choices.pop("bench") is None
    assert [name for name, known in choices.items() if "json" not in known] == []


def test_doctor_says_of_the_jit_whether_it_is_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The result follows the kernel's switch, or its absence."""
    switch = tmp_path / "bpf_jit_enable"
    monkeypatch.setattr(doctor, "JIT_SWITCH", switch)
    assert doctor._look_at_jit() == "on, and cannot be switched off"
    switch.write_text("1\n")
    assert doctor._look_at_jit() == "on (net.core.bpf_jit_enable is 1)"
    switch.write_text("0\n")
    with pytest.raises(PlatformError, match="switched off"):
        doctor._look_at_jit()
