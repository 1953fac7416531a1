# SPDX-License-Identifier: Apache-2.0
"""The steps of an uninstallation, with a server that answers like an API server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from apiserver_traces import Reply
from fake_apiserver import FakeServer, Request, Wire

from netpol_ebpf.cli.uninstall import DaemonSets, await_clean, end_agents
from netpol_ebpf.errors import UnreachableError
from netpol_ebpf.sources.kubernetes.client import Client, Cluster

PATH = "/apis/apps/v1/namespaces/kube-system/daemonsets/"
GONE = (404, {"kind": "Status", "code": 404, "message": 'daemonsets.apps "netpol-agent" not found'})


def seen(generation: int, *, observed: int, wanted: int = 0, ready: int = 0) -> tuple[int, dict[str, Any]]:
    """A DaemonSet. One that its controller has not seen has no status."""
    status = (
        {"observedGeneration": observed, "desiredNumberScheduled": wanted, "numberReady": ready} if observed else {}
    )
    return 200, {"kind": "DaemonSet", "metadata": {"generation": generation}, "status": status}


def run(step: Any, *answers: tuple[int, Any]) -> tuple[list[str], int]:
    """Run a step with these answers in order. Returns the requests, and the number of pauses."""
    left = list(answers)
    pauses: list[float] = []

    def answer(_request: Request) -> Wire:
        status, body = left.pop(0)
        return Wire(Reply(status, [(0.0, body if isinstance(body, bytes) else json.dumps(body).encode())]))

    with FakeServer(answer) as server:
        step(DaemonSets(Client(Cluster(server.url)), "kube-system"), pauses.append)
        targets = [f"{one.method} {one.target}" for one in server.requests]
    assert not left
    return targets, len(pauses)


def test_agents_are_gone_when_the_api_server_has_them_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    """The deletion is a foreground one, so the object exists until its last pod has ended."""
    targets, pauses = run(end_agents, seen(2, observed=2), seen(2, observed=2), seen(2, observed=2), GONE)
    assert targets == [f"DELETE {PATH}netpol-agent?propagationPolicy=Foreground", *[f"GET {PATH}netpol-agent"] * 3]
    assert pauses == 2
    assert "deleted; waiting" in capsys.readouterr().err


def test_agents_that_are_gone_already(capsys: pytest.CaptureFixture[str]) -> None:
    """The second attempt finds nothing to delete."""
    assert run(end_agents, GONE, GONE)[1] == 0
    assert not capsys.readouterr().err


def test_nodes_are_clean_when_all_are_ready(capsys: pytest.CaptureFixture[str]) -> None:
    """A status that the controller wrote before it saw the object does not count."""
    answers = (
        seen(1, observed=0),
        seen(1, observed=1, wanted=2),
        seen(1, observed=1, wanted=2, ready=1),
        seen(1, observed=1, wanted=2, ready=1),
        seen(1, observed=1, wanted=2, ready=2),
    )
    targets, pauses = run(await_clean, *answers)
    assert targets == [f"GET {PATH}netpol-cleanup"] * 5
    assert pauses == 4
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "no node was asked yet",
        "0 of 2 nodes are clean",
        "1 of 2 nodes are clean",
    ]


@pytest.mark.parametrize(
    ("step", "answer", "words"),
    [
        (end_agents, (403, {"message": "forbidden: no right"}), "the API server answers 403: forbidden: no right"),
        (await_clean, GONE, "DaemonSet netpol-cleanup: there is none"),
        (await_clean, (200, b"<html>"), "the answer is not JSON"),
    ],
)
def test_what_ends_a_step(step: Any, answer: tuple[int, Any], words: str) -> None:
    """The exit code is 4, and the reason is printed."""
    with pytest.raises(UnreachableError, match=words) as caught:
        run(step, answer)
    assert caught.value.exit_code == 4
