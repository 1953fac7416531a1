# SPDX-License-Identifier: Apache-2.0
"""`netpolctl uninstall`: the two steps of an uninstallation from a cluster that need the API server.

The chart's pre-delete hooks run them. ``agents-gone`` deletes the agents' DaemonSet and waits for the end of its pods.
``nodes-clean`` waits until the cleanup DaemonSet is ready on every node, which means that every node is clean.

Exit codes: 0 done, 2 usage, 3 no usable kubeconfig, 4 the API server cannot be reached or rejects the request.
"""

from __future__ import annotations

import argparse
import http
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from netpol_ebpf.cli.api_access import add_api_options, open_api
from netpol_ebpf.cli.output import add_output_option, print_value
from netpol_ebpf.errors import UnreachableError
from netpol_ebpf.sources.kubernetes.client import Client, HttpAnswer
from netpol_ebpf.terminal import escaped, say

AGENTS, CLEANUP = "netpol-agent", "netpol-cleanup"
"""Names of the DaemonSets in deploy/chart: that of the agents, and that which removes their traces from nodes."""
LOOK_S = 2.0
"""Seconds between two requests. The number is arbitrary."""
ANSWER_S = 30.0
"""Time limit in seconds for an answer of the API server."""


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "uninstall",
        help="the steps of an uninstallation from a cluster that need its API server",
        description="The two steps of an uninstallation that need the API server; `helm uninstall` runs them. agents-gone: "
        f"delete the DaemonSet {AGENTS}, and wait until its pods have ended; enforcement goes on. nodes-clean: wait until the "
        f"DaemonSet {CLEANUP} has ended enforcement on every node.",
        epilog="exit codes: 0 done, 2 usage, 3 no usable kubeconfig, 4 the API server cannot be reached or refuses",
    )
    parser.add_argument("step", choices=STEPS, help="the step")
    parser.add_argument(
        "--namespace", default="kube-system", metavar="NAME", help="namespace of the DaemonSets (default: %(default)s)"
    )
    add_api_options(parser)
    add_output_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    state = STEPS[arguments.step](DaemonSets(open_api(arguments), arguments.namespace))
    if not print_value(arguments.output, {"step": arguments.step, "state": state}):
        say(escaped(state))
    return 0


class DaemonSets:
    """Access to the DaemonSets of one namespace."""

    def __init__(self, client: Client, namespace: str) -> None:
        self._client = client
        self._path = f"/apis/apps/v1/namespaces/{namespace}/daemonsets/"

    def read(self, name: str) -> dict[str, Any] | None:
        """Get a DaemonSet; None if it does not exist. Raises UnreachableError."""
        return self._answer(name, self._client.get(self._path + name, head_s=ANSWER_S, idle_s=ANSWER_S))

    def delete(self, name: str) -> bool:
        """Begin to delete a DaemonSet; returns whether it existed. Raises UnreachableError.

        The object disappears when all its pods have ended.
        """
        target = f"{self._path}{name}?propagationPolicy=Foreground"
        return (
            self._answer(name, self._client.send("DELETE", target, b"", head_s=ANSWER_S, idle_s=ANSWER_S)) is not None
        )

    def _answer(self, name: str, answer: HttpAnswer) -> dict[str, Any] | None:
        try:
            raw = answer.body()
        finally:
            answer.close()
        try:
            body = json.loads(raw)
        except ValueError as error:
            raise UnreachableError(f"DaemonSet {name}: the answer is not JSON ({error})", hint="Try again.") from error
        if answer.status == http.HTTPStatus.NOT_FOUND:
            return None
        if answer.status not in (http.HTTPStatus.OK, http.HTTPStatus.ACCEPTED):
            message = body.get("message", "") if isinstance(body, dict) else ""
            raise UnreachableError(
                f"DaemonSet {name}: the API server answers {answer.status}: {message}", hint="Nothing was changed."
            )
        return dict(body)


def end_agents(daemonsets: DaemonSets, pause: Callable[[float], None] = time.sleep) -> str:
    """Delete the agents' DaemonSet, and wait until its pods have ended; returns the final state as a text.

    Progress is printed to stderr. ``pause``: sleeps the given seconds.
    """
    if daemonsets.delete(AGENTS):
        say(f"DaemonSet {AGENTS}: deleted; waiting for its pods to end", file=sys.stderr)
    while daemonsets.read(AGENTS) is not None:
        pause(LOOK_S)
    return f"DaemonSet {AGENTS}: gone; what is pinned on the nodes stays in force"


def await_clean(daemonsets: DaemonSets, pause: Callable[[float], None] = time.sleep) -> str:
    """Wait until the cleanup DaemonSet is ready on every node; returns the final state as a text.

    The number of ready nodes is printed to stderr at each change. ``pause``: sleeps the given seconds.
    """
    told = ""
    while True:
        found = daemonsets.read(CLEANUP)
        if found is None:
            raise UnreachableError(
                f"DaemonSet {CLEANUP}: there is none", hint="Create it first (deploy/manifests/cleanup.yaml)."
            )
        status = found.get("status", {})
        is_seen = status.get("observedGeneration", 0) >= found["metadata"]["generation"]
        wanted, ready = status.get("desiredNumberScheduled", 0), status.get("numberReady", 0)
        state = f"{ready} of {wanted} nodes are clean" if is_seen else "no node was asked yet"
        if is_seen and ready >= wanted:
            return f"DaemonSet {CLEANUP}: {state}"
        if state != told:
            say(escaped(f"DaemonSet {CLEANUP}: {state}"), file=sys.stderr)
            told = state
        pause(LOOK_S)


STEPS = {"agents-gone": end_agents, "nodes-clean": await_clean}
