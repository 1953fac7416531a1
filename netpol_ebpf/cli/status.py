# SPDX-License-Identifier: Apache-2.0
"""`netpolctl status`: print what the agent of this node enforces, on which interfaces, and every problem.

With ``--policy`` it prints on which nodes one policy of a cluster is in force, from the reports of the nodes.

Exit codes: 0 all objects of the sources (or the policies) are in force, 1 some are not, 3 the policy does not exist, 4
the agent or the API server does not answer, 5 a right is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from netpol_ebpf.cli.agent_access import add_agent_options, ask_agent
from netpol_ebpf.cli.api_access import add_api_options
from netpol_ebpf.cli.output import add_output_option, counted, print_value, render_table
from netpol_ebpf.cli.policy_status import POLICY_HELP, add_local_option, policy, print_standings, reader_of
from netpol_ebpf.errors import UsageError
from netpol_ebpf.terminal import escaped, paragraph, say

EXIT_NOT_IN_FORCE = 1
FOLLOWED = frozenset({"watching", "not installed"})
"""The states of a source's kind that are no problem: the source watches the kind, or the cluster does not have it."""
_UNKNOWN = {"closed": "closed (no known endpoint)", "own": "the node's own"}


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "status",
        help="show what the agent of this node enforces, its sources, and every problem",
        description="Show what the agent of this node enforces, on which interfaces, and what keeps it from enforcing the rest.",
        epilog="exit codes: 0 everything that the sources say (or the policy) is in force, 1 something is not, 3 no such policy or no usable kubeconfig, "
        "4 no agent or API server answers, 5 no right",
    )
    parser.add_argument(
        "--policy", action="append", type=policy, default=[], metavar="POLICY",
        help=f"show on which nodes of the cluster a policy is in force, and why not elsewhere: {POLICY_HELP} (may be repeated)",
    )  # fmt: skip
    add_local_option(parser)
    add_api_options(parser)
    add_agent_options(parser, "--state-dir")
    add_output_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if arguments.policy:
        look = reader_of(arguments)
        found = [look(key) for key in arguments.policy]
        if not print_value(arguments.output, found):
            print_standings(found, wide=arguments.output == "wide")
        return 0 if all(one["programmed"] for one in found) else EXIT_NOT_IN_FORCE
    if arguments.local or arguments.kubeconfig or arguments.context:
        raise UsageError("--local, --kubeconfig and --context go with --policy", hint="Name a policy.")
    (state,) = ask_agent(arguments, "status")
    if not print_value(arguments.output, state):
        _print_text(state, wide=arguments.output == "wide")
    return 0 if state["in_force"] else EXIT_NOT_IN_FORCE


def _print_text(state: dict[str, Any], *, wide: bool) -> None:
    say(escaped(f"agent      {state['version']}, process {state['pid']}, node {state['node'] or '(any)'}"))
    for one in state.get("sources", ()):
        say(escaped(f"source     {_source(one)}"))
    if "waiting" in state:
        say(escaped(f"pinned in  {state['pin_dir']}"))
        say("in force   NO, see the problems below")
    else:
        _print_enforcement(state, wide=wide)
    for one in state.get("sources", ()):
        _print_kinds(one.get("kinds", ()), wide=wide)
    if state["problems"]:
        say()
        for one in state["problems"]:
            place = f"{one['file']}:{one['line']}: " if one["line"] else f"{one['file']}: " if one["file"] else ""
            subject = "".join(f"{part}: " for part in (one["object"], one["path"]) if part)
            say(paragraph(f"{one['severity']}: {place}{subject}{one['message']}"))


def _source(source: dict[str, Any]) -> str:
    parts = ["synced" if source["synced"] else f"waits for {', '.join(source['waiting_for'])}"]
    if source.get("restored"):
        parts = [f"NOT READ, the state saved at {source['stale_since']} is in force"]
    elif source.get("cut_off"):
        parts.append(f"CUT OFF, later changes than of {source['stale_since'] or 'the start'} may be missing")
    elif source.get("confirmed"):
        parts.append(f"confirmed at {source['confirmed']}")
    if source.get("went_back_at"):
        parts.append(f"WENT BACK to an older state at {source['went_back_at']}, all kinds were listed again")
    gaps = [f"{one['kind']} {one['gaps']} times" for one in source.get("kinds", ()) if one.get("gaps")]
    if gaps:
        parts.append(f"events lost and listed again: {', '.join(gaps)}")
    return f"{source['type']} {source['source']}: {'; '.join(parts)}"


def _print_kinds(kinds: Sequence[dict[str, Any]], *, wide: bool) -> None:
    """Print a table of the kinds of a source.

    Unless ``wide``, the table has only kinds with a problem, and kinds with objects that are in force although the
    definition of the kind was deleted.
    """
    rows = [
        (one["kind"], one["state"], one["objects"], one["kept"] or "-", one["resource_version"] or "-")
        for one in kinds
        if wide or one["kept"] or not one["is_synced"] or one["state"] not in FOLLOWED
    ]
    if rows:
        say()
        say(render_table(("kind", "state", "objects", "kept though deleted", "resourceVersion"), rows))


def _print_enforcement(state: dict[str, Any], *, wide: bool) -> None:
    objects = state["objects"]
    say(escaped(f"objects    {objects['policies']} policies, {objects['endpoints']} endpoints"))
    if objects.get("skipped"):  # absent from the response of an older agent
        say(escaped(f"skipped    objects of other kinds: {counted(objects['skipped'])}"))
    say(escaped(f"pinned in  {state['pin_dir']}, generation {state['generation']}"))
    if state.get("upgrade"):
        say(escaped(f"upgraded   {state['upgrade']}"))
    say(escaped(f"in force   {'yes' if state['in_force'] else 'NO, see the problems below'}"))
    say(escaped(f"endpoints  {objects['enforced_endpoints']} enforced of {objects['local_endpoints']} local"))
    say(escaped(f"barrier    {_barrier(state['barrier'])}"))
    for one in state["barrier"]["open"]:
        say(escaped(f"           NOT closed: {one}"))
    refused = state["refused"]
    if refused["waiting"]:
        say(escaped(f"rejected   {', '.join(refused['waiting'])}: no room in {refused['map']}"))
    say()
    rows = [
        (
            one["interface"] or "-",
            one["endpoint"],
            one["state"],
            " ".join(one["addresses"]),
            one["evidence"] or "-",
            *(_isolation(one["isolated_by"][way]) for way in ("ingress", "egress")),
        )
        for one in state["endpoints"]
    ]
    rows += [
        (one["interface"] or one["ifindex"], "-", _UNKNOWN[one["state"]], "", "", "", "")
        for one in state["interfaces"]
        if one["endpoint"] is None
    ]
    say(render_table(("interface", "endpoint", "state", "addresses", "known by", "ingress", "egress"), rows))
    if wide:
        _print_isolation(state["endpoints"])
        say()
        say(
            render_table(
                ("map", "entries", "size"), [(name, m["entries"], m["size"]) for name, m in state["maps"].items()]
            )
        )
        say()
        say(render_table(("reason", "packets"), sorted(state["packets"].items())))
        say()
        counts = state["barrier"]["packets"].items()
        say(
            render_table(
                ("dropped by the second barrier", "family", "packets"),
                [(name, family, packets) for name, one in counts for family, packets in one.items()],
            )
        )
        say()
        say(
            render_table(
                ("connection state", "time-out"), [(name, f"{one:g} s") for name, one in state["timeouts"].items()]
            )
        )


def _isolation(policies: list[str]) -> str:
    """Render whether an endpoint is isolated in a direction. ``policies``: names of the policies that isolate it."""
    return f"isolated ({len(policies)})" if policies else "open"


def _print_isolation(endpoints: list[dict[str, Any]]) -> None:
    rows = [
        (one["endpoint"], way, policy)
        for one in endpoints
        for way, policies in one["isolated_by"].items()
        for policy in policies
    ]
    say()
    say(render_table(("endpoint", "direction", "isolated by"), rows))


def _barrier(state: dict[str, Any]) -> str:
    if state["mode"] == "off":
        return "off"
    if not state["installed"]:
        return "NOT IN FORCE, see the problems below"
    unsigned = sum(state["packets"].get("unsigned", {}).values())
    names = f"; closed while no agent runs: {', '.join(state['patterns'])}" if state["patterns"] else ""
    return f"{' and '.join(state['families'])}, {state['interfaces']} interfaces; {unsigned} packets dropped{names}"
