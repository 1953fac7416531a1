# SPDX-License-Identifier: Apache-2.0
"""`netpolctl wait` and `netpolctl status --policy`: from the objects of a cluster and the reports of its nodes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from apiserver_traces import failure
from fake_apiserver import FakeServer, write_kubeconfig
from test_status_conditions import KUBERNETES, OBJECTS, PLAIN_KEY
from writable_api import WritableApi

from netpol_ebpf.cli.main import main
from netpol_ebpf.cli.wait import parse_seconds, wait
from netpol_ebpf.errors import UnreachableError
from netpol_ebpf.policy.types import PolicyKey
from netpol_ebpf.status.report import COLLECTION, NodeStatus, Shortfall, render_report

PATH = f"{KUBERNETES}/namespaces/shop/networkpolicies/db"
PODS = "/api/v1/namespaces/shop/pods"


@pytest.fixture
def api() -> WritableApi:
    """The namespace with its pods on two nodes that need the policy, and one that does not."""
    found = WritableApi()
    for one in yaml.safe_load_all(OBJECTS):
        metadata = one["metadata"]
        if one["kind"] == "Pod":
            found.objects[f"{PODS}/{metadata['name']}"] = one
        elif one["kind"] == "Namespace":
            found.objects["/api/v1/namespaces/shop"] = one
        elif one["apiVersion"].startswith("networking"):
            found.objects[PATH] = one
    found.objects["/api/v1/namespaces/shop/serviceaccounts"] = {"items": [], "metadata": {}}
    return found


@pytest.fixture
def kubeconfig(api: WritableApi, tmp_path: Path) -> Iterator[str]:
    with FakeServer(api) as server:
        yield str(write_kubeconfig(tmp_path / "config", server.url))


def report(api: WritableApi, node: str, revision: str = "", short: tuple[Shortfall, ...] = ()) -> None:
    status = NodeStatus({PLAIN_KEY: revision} if revision else {}, short)
    api.objects[f"{COLLECTION}/{node}"] = render_report(node, status, time.time(), 60.0)


def status(kubeconfig: str, capsys: pytest.CaptureFixture[str], policy: str = "shop/db") -> tuple[int, Any]:
    code = main(["status", "--policy", policy, "--kubeconfig", kubeconfig, "-o", "json"])
    return code, json.loads(capsys.readouterr().out or "[{}]")[0]


def test_status_tells_of_each_node_that_needs_the_policy(
    api: WritableApi, kubeconfig: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node without a report counts as not in force. A node that does not need the policy is left out."""
    report(api, "n1", "u2/1")
    report(api, "n3")
    code, found = status(kubeconfig, capsys)
    assert (code, found["programmed"], found["nodes_in_force"], found["nodes_needing"]) == (1, False, 1, 2)
    assert {one["node"]: one["reason"] for one in found["nodes"]} == {"n1": "Programmed", "n2": "NoReport"}
    report(api, "n2", "", (Shortfall("MapFull", "np_verdict has no room", (PLAIN_KEY,)),))
    code, found = status(kubeconfig, capsys)
    assert (code, found["reason"]) == (1, "MapFull")
    report(api, "n2", "u2/1")
    code, found = status(kubeconfig, capsys)
    assert (code, found["programmed"], found["generation"]) == (0, True, 1)
    api.objects[PATH]["metadata"]["generation"] = 2
    code, found = status(kubeconfig, capsys)
    assert (code, [one["generation"] for one in found["nodes"]]) == (1, [1, 1])


def test_status_prints_what_is_missing(api: WritableApi, kubeconfig: str, capsys: pytest.CaptureFixture[str]) -> None:
    """There is a line for the policy, and a row for each node that is behind."""
    report(api, "n1", "u2/1")
    assert main(["status", "--policy", "shop/db", "--kubeconfig", kubeconfig]) == 1
    text = capsys.readouterr().out
    assert "KubernetesNetworkPolicy/shop/db: NOT in force: generation 1 is in force on 1 of 2 nodes" in text
    assert "n2" in text
    assert "Programmed" not in text


def test_invalid_policy_is_told_without_reports(
    api: WritableApi, kubeconfig: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command parses the object by the agent's own parser."""
    api.objects[PATH]["spec"]["podSelector"] = {"matchExpressions": [{"key": "a", "operator": "Near"}]}
    code, found = status(kubeconfig, capsys)
    assert (code, found["reason"]) == (1, "Invalid")
    assert "Near" in found["message"]


@pytest.mark.parametrize(
    ("path", "code", "expected"),
    [(PATH, 404, 3), (PATH, 403, 5), (PODS, 403, 5), (PODS, 500, 4), (f"{COLLECTION}/n1", 403, 5)],
)
def test_what_cannot_be_read_is_an_exit_code(
    api: WritableApi, kubeconfig: str, capsys: pytest.CaptureFixture[str], path: str, code: int, expected: int
) -> None:
    """Without a complete list there is no answer."""
    report(api, "n1", "u2/1")
    report(api, "n2", "u2/1")
    answer = api._read
    api._read = lambda where: failure(code) if where == path else answer(where)  # type: ignore[method-assign]
    assert main(["status", "--policy", "shop/db", "--kubeconfig", kubeconfig]) == expected
    assert capsys.readouterr().out == ""


def test_policy_without_a_generation_is_refused(
    api: WritableApi, kubeconfig: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some aggregated servers have no generations."""
    del api.objects[PATH]["metadata"]["generation"]
    assert main(["status", "--policy", "shop/db", "--kubeconfig", kubeconfig]) == 3
    assert "generations" in capsys.readouterr().err


def test_wait_ends_when_the_policy_is_in_force(
    api: WritableApi, kubeconfig: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit codes 0 and 1 are those of the README."""
    report(api, "n1", "u2/1")
    command = ["wait", "--for=programmed", "shop/db", "--kubeconfig", kubeconfig]
    assert main([*command, "--timeout", "0"]) == 1
    assert "not in force in 0 s: KubernetesNetworkPolicy/shop/db" in capsys.readouterr().out
    report(api, "n2", "u2/1")
    assert main([*command, "--timeout", "20s", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["programmed"]


A, B = (PolicyKey("NetworkPolicy", "shop", name) for name in "ab")


def test_wait_looks_at_the_missing_policies_alone() -> None:
    """The pauses grow with the cost of a query, and failed queries are repeated."""
    now_s, asked, pauses = 0.0, [], []

    def look(key: PolicyKey) -> dict[str, Any]:
        nonlocal now_s
        asked.append(key.name)
        now_s += 1.0
        if len(asked) == 3:
            raise UnreachableError("away")
        return {"policy": str(key), "programmed": key is A or len(asked) > 4}

    def sleep(seconds: float) -> None:
        nonlocal now_s
        pauses.append(seconds)
        now_s += seconds

    found = wait(look, [A, B], 100.0, lambda: now_s, sleep)
    assert [one["programmed"] for one in found] == [True, True]
    assert asked == ["a", "b", "b", "b", "b"]
    assert pauses == [8.0, 4.0, 4.0]


def test_wait_ends_with_the_last_failure() -> None:
    """The exit code is 4 and not 1, because no server answers."""

    def look(_key: PolicyKey) -> dict[str, Any]:
        raise UnreachableError("away")

    with pytest.raises(UnreachableError):
        wait(look, [A], 0.0)


def test_times_are_read_as_kubectl_reads_them() -> None:
    """A time has a unit, or is in seconds."""
    assert [parse_seconds(text) for text in ("0", "30", "30s", "5m", "1h")] == [0, 30, 30, 300, 3600]
    for text in ("", "s", "-1", "1.5", "ten"):
        with pytest.raises(Exception, match="no time"):
            parse_seconds(text)


def test_options_of_a_cluster_go_with_a_policy() -> None:
    """`status` without a policy queries the agent of this node."""
    assert main(["status", "--kubeconfig", "x"]) == 2
    assert main(["status", "--local"]) == 2
