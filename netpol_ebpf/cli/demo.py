# SPDX-License-Identifier: Apache-2.0
"""``netpolctl demo``: demonstrate enforcement in network namespaces, in under two minutes.

The demonstration builds a small cluster from manifests, and shows which hosts reach each other before and after
enforcement. It explains one denial, changes a policy while traffic flows, compares the throughput of two pods with that
of two pods without enforcement, and prints a map with bpftool.

Invariants: all printed results are observed (real connections, the agent's own output) and compared with the reference
model's verdicts for the same manifests; if they differ, the command fails. However the command ends, the laboratory's
guard removes its namespaces, processes, pins and copies of files.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from netpol_ebpf.agent.control_socket import CLIENT_TIMEOUT_S, SOCKET_NAME, ask
from netpol_ebpf.cli.output import print_value
from netpol_ebpf.ending import ended_by_signals
from netpol_ebpf.errors import InvalidInputError, Location, PlatformError, PrivilegeError, UnreachableError
from netpol_ebpf.lab import shop
from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.matrix import BOLD, DIM, GREEN, RED, RESET, Matrix, Observation
from netpol_ebpf.lab.patience import scaled
from netpol_ebpf.lab.prediction import Prediction
from netpol_ebpf.lab.throughput import Pair, compare
from netpol_ebpf.policy.types import Cause
from netpol_ebpf.resources.load import load_paths
from netpol_ebpf.resources.types import KubernetesNetworkPolicy, Resource
from netpol_ebpf.terminal import escaped

READY_DEADLINE_S = 120.0  # a busy machine may compile for half a minute
CHANGE_DEADLINE_S = 10.0
CHANGE_ATTEMPT_S = 0.1  # how long one attempt waits for an answer, until a policy change has taken effect
POLL_S = 0.02
MAP_SHOWN = "np_rule"
MAP_LINES = 14
MISMATCHES_SHOWN = 10
LOG_LINES_SHOWN = 10
PIN_PARENT = Path("/sys/fs/bpf")
EXIT_DIFFERS = 1


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="show enforcement on real connections between network namespaces",
        description="Build a small cluster of network namespaces, enforce policies in it, and show who reaches whom. "
        "Needs root. Does not touch the machine's own network. Leaves nothing behind.",
        epilog="exit codes: 0 all as the reference model predicts, 1 something differed, 3 no manifests, 5 the machine "
        "lacks something; environment: NETPOL_TIMEOUT_FACTOR multiplies every time limit, for an emulated or overloaded machine",
    )
    parser.add_argument(
        "--manifests", type=Path, metavar="DIR", help="manifests to enforce, where the installation lacks examples/demo"
    )
    parser.add_argument("--keep", action="store_true", help="keep the cluster running at the end, until Ctrl-C")
    parser.add_argument("--no-iperf", action="store_true", help="do not measure throughput")
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="colour the output (default: auto)"
    )
    parser.add_argument(
        "-o",
        "--output",
        choices=("text", "json"),
        default="text",
        help="output format; json: one summary at the end (default: text)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    manifests = arguments.manifests or shop.manifests_dir()
    if not manifests.is_dir():
        raise InvalidInputError(f"--manifests {manifests}: there is no such directory")
    _require_machine(with_iperf=not arguments.no_iperf)
    stage = DemoOutput(quiet=arguments.output == "json", colour=_wants_colour(arguments.color))
    began = time.monotonic()
    with ended_by_signals(), _workshop() as workshop:
        shutil.copytree(manifests, workshop / "manifests")
        with Demo(stage, workshop) as demo:
            summary = demo.play(with_iperf=not arguments.no_iperf)
            if arguments.keep:
                demo.keep()
    summary["seconds"] = round(time.monotonic() - began, 1)
    stage.headline("Removed: namespaces, interfaces, processes, pinned maps, copies of the manifests")
    result = "all as predicted" if summary["ok"] else "NOT as predicted"
    stage.verdict(f"{summary['seconds']:.0f} seconds; {result}", good=summary["ok"])
    if arguments.output == "json":
        print_value("json", summary)
    return 0 if summary["ok"] else EXIT_DIFFERS


class DemoOutput:
    """Prints the demonstration: headlines, text and tables. ``quiet``: print nothing."""

    def __init__(self, *, quiet: bool, colour: bool) -> None:
        self.quiet = quiet
        self.colour = colour
        self.ascii_only = not _can_encode("✓✗·", sys.stdout.encoding)
        self._number = 0

    def headline(self, text: str) -> None:
        """Print the numbered headline of the next part."""
        self._number += 1
        self._print(f"\n{self._paint(f'{self._number}. {escaped(text)}', BOLD)}")

    def say(self, text: str) -> None:
        """Print ``text``, indented."""
        self._print(f"   {escaped(text)}")

    def detail(self, text: str) -> None:
        """Print ``text`` indented, in a less prominent colour."""
        self._print(f"   {self._paint(escaped(text), DIM)}")

    def verdict(self, text: str, *, good: bool) -> None:
        """Print ``text`` in green (``good``) or red."""
        self._print(f"   {self._paint(escaped(text), GREEN if good else RED)}")

    def table(self, observation: Observation, earlier: Observation | None = None) -> None:
        """Print the connectivity matrix of an observation.

        ``earlier``: mark the cells that differ from that observation.
        """
        table = observation.render(colour=self.colour, earlier=earlier, ascii_only=self.ascii_only)
        for line in table.splitlines():
            self._print(f"   {line}")

    def _print(self, text: str) -> None:
        """Print ``text``, unless quiet. The caller has escaped names in it; other control characters are colours."""
        if not self.quiet:
            print(text, flush=True)

    def _paint(self, text: str, code: str) -> str:
        return f"{code}{text}{RESET}" if self.colour else text


class Demo:
    """One run of the demonstration; a context manager that builds the laboratory and removes it."""

    def __init__(self, stage: DemoOutput, workshop: Path) -> None:
        self.stage = stage
        self.manifests = workshop / "manifests"
        self.state = workshop / "state"
        self.log = workshop / "agent.log"
        self.pins = PIN_PARENT / workshop.name
        self.plan = shop.shop_plan(self.resources())
        self.lab = Lab(self.plan, directories=[self.pins, workshop])
        self.matrix = Matrix(self.plan, shop.SOURCES, shop.SERVICES, shop.NAMES)
        self.agent: subprocess.Popen[bytes] | None = None
        self.summary: dict[str, Any] = {"ok": True, "laboratory": self.lab.token, "pins": str(self.pins)}

    def __enter__(self) -> Demo:  # noqa: PYI034 - typing.Self comes with Python 3.11
        self.stage.headline("A cluster, in network namespaces")
        began = time.monotonic()
        self.lab.build()
        self.stage.say(
            f"{len(self.plan.hosts)} namespaces, routed, IPv4 and IPv6, built in {time.monotonic() - began:.1f} s: "
            f"{len(self.plan.children(shop.NODE))} pods on {shop.NODE}, hosts outside"
        )
        self.stage.detail(
            f"names of namespaces begin with {self.lab.token}; the agent will pin its maps in {self.pins}"
        )
        self.stage.detail("the machine's own interfaces and addresses stay as they are")
        return self

    def __exit__(self, *_: object) -> None:
        self.lab.close()

    def resources(self) -> list[Resource]:
        """Parse the manifests as they are now."""
        return load_paths([self.manifests]).check()

    def play(self, *, with_iperf: bool) -> dict[str, Any]:
        """Run all parts in order. Returns the summary; its field ``ok``: all results were as predicted."""
        before = self._show_before()
        enforced = self._show_enforced(before)
        self._explain_denial()
        self._change_policy(enforced)
        self.summary["throughput"] = self._measure() if with_iperf else None
        self.summary["map"] = self._show_map()
        return self.summary

    def keep(self) -> None:
        """Print commands with which the user can inspect the demonstration, then wait for Ctrl-C."""
        self.stage.headline("Kept, until Ctrl-C")
        inside = f"nsenter --net=/run/netns/{self.lab.namespace_of['shop/debug']}"
        self.stage.say(f"edit the manifests:  {self.manifests}")
        self.stage.say(f"the agent's log:     {self.log}")
        self.stage.say(f"the agent's state:   netpolctl status --state-dir {self.state}")
        self.stage.say(f"denied, as it comes: netpolctl flows --follow --state-dir {self.state}")
        self.stage.say(f"pinned maps:         {self.pins}")
        self.stage.say(f"inside a pod:        {inside} ping -c 1 10.244.1.53")
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                signal.pause()

    # --- the parts --------------------------------------------------------------------------------------------------

    def _show_before(self) -> Observation:
        self.stage.headline("Who reaches whom before enforcement")
        observation = self.matrix.observe(self.lab)
        self.stage.table(observation)
        self._judge("before", observation, lambda _: True, "as without any policy")
        return observation

    def _show_enforced(self, before: Observation) -> Observation:
        policies = [resource for resource in self.resources() if isinstance(resource, KubernetesNetworkPolicy)]
        self.stage.headline(f"netpol-agent enforces {len(policies)} NetworkPolicies")
        took = self._start_agent()
        self.summary["agent_start_s"] = round(took, 2)
        self.stage.say(f"program loaded and attached, policy in force after {took:.1f} s")
        observation = self.matrix.observe(self.lab)
        self.stage.table(observation)
        self._judge("after", observation, self._prediction().reached)
        self.stage.detail(f"{before.reached - observation.reached} connections fewer than before")
        return observation

    def _prediction(self) -> Prediction:
        return Prediction(self.resources(), self.plan)

    def _judge(
        self,
        part: str,
        observation: Observation,
        predict: Callable[[Attempt], bool],
        good: str = "each as the reference model predicts",
    ) -> None:
        """Compare an observation with the prediction, and print the result.

        The result is also stored in the summary under ``part``. ``good``: the text to print if all results were as
        predicted.
        """
        mismatches = observation.mismatches(predict)
        total = len(observation.results)
        self.summary[part] = {
            "attempts": total,
            "reached": observation.reached,
            "mismatches": [str(mismatch) for mismatch in mismatches],
            "matrix": observation.as_rows(),
        }
        self.summary["ok"] = self.summary["ok"] and not mismatches
        said = f"{total} connections tried (TCP, UDP, ICMP; IPv4, IPv6): {observation.reached} answered, "
        if not mismatches:
            self.stage.verdict(said + good, good=True)
            return
        self.stage.verdict(f"{said}{len(mismatches)} NOT as predicted:", good=False)
        for mismatch in mismatches[:MISMATCHES_SHOWN]:
            self.stage.verdict(f"  {mismatch}", good=False)

    def _explain_denial(self) -> None:
        attempt = shop.EXPLAINED
        self.stage.headline(f"Why does {attempt.source} not reach the database?")
        prediction = self._prediction()
        finding = prediction.finding(attempt)
        result = self.lab.attempt([attempt], rounds=1)[0]
        flow = self._reported_flow(attempt)
        self.stage.say(
            f"{attempt.source} to {attempt.destination} TCP {attempt.port}: {result.outcome.value}; "
            f"the kernel reports: {flow['verdict']} at {flow['endpoint']}, {flow['direction']}"
        )
        cause = finding.cause
        agrees = flow["rule"] == str(cause)
        explained = {"verdict": flow["verdict"], "endpoint": flow["endpoint"], "rule": flow["rule"]}
        if isinstance(cause, Cause) and finding.question is not None:
            asked = prediction.policies_at(finding.question.endpoint, cause.direction)
            places = {f"{policy.key.namespace}/{policy.key.name}": self._place(policy.location) for policy in asked}
            explained |= {"tier": cause.tier, "policies": places}
            self.stage.say(f"tier:    {cause.tier}")
            self.stage.say(f"rule:    {cause.kind.value}: none of the policies that isolate the pod allows it:")
            for name, place in places.items():
                self.stage.say(f"policy:  {name:<20} {place}")
        self.stage.verdict(
            f"rule in the kernel's table: {flow['rule']}" + ("" if agrees else f"; the model says {cause}"), good=agrees
        )
        ends = f"--from {attempt.source} --to shop/database --port {attempt.port}"
        self.stage.detail(
            f"the same answer from the manifests alone: netpolctl explain --manifests examples/demo {ends}"
        )
        self.summary["explained"] = explained
        self.summary["ok"] = self.summary["ok"] and agrees

    def _place(self, location: Location | None) -> str:
        if location is None:
            return "?"
        return f"{Path(location.file).name}:{location.line}"

    def _reported_flow(self, attempt: Attempt) -> dict[str, Any]:
        """The flow that the agent reports for a denied attempt.

        Raises PlatformError if the agent reports none in time.
        """
        wanted = {
            "kind": "deny",
            "destination": str(attempt.destination),
            "protocol": attempt.protocol,
            "destination_port": attempt.port,
            "source": str(self.plan.hosts[attempt.source].addresses[0]),
        }
        deadline = time.monotonic() + scaled(CHANGE_DEADLINE_S)
        while time.monotonic() < deadline:
            for flow in self._ask({"op": "flows"}):
                if all(flow.get(name) == value for name, value in wanted.items()):
                    return dict(flow)
            time.sleep(scaled(POLL_S))
        raise PlatformError("the agent reported no denied packet of this connection", hint=self._log_tail())

    def _show_map(self) -> list[str]:
        pinned = next(self.pins.glob(f"*/{MAP_SHOWN}"))
        self.stage.headline(
            f"The maps are readable by any tool: bpftool map dump pinned .../{pinned.parent.name}/{MAP_SHOWN}"
        )
        done = subprocess.run(
            ["bpftool", "map", "dump", "pinned", str(pinned)], check=False, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise PlatformError(
                f"bpftool cannot read {pinned}: {done.stderr.strip()}",
                hint="Install the bpftool of the running kernel.",
            )
        lines = done.stdout.splitlines()
        for line in lines[:MAP_LINES]:
            self.stage.say(line)
        self.stage.detail(f"... {len(lines)} lines in all")
        return lines[:MAP_LINES]

    def _change_policy(self, enforced: Observation) -> None:
        self.stage.headline("A policy changes, live")
        path = self.manifests / "incident.yaml"
        self.stage.say(f"a new file, {path.name}: during an incident, {shop.INCIDENT.source} may reach the database")
        _write_whole(path, shop.INCIDENT_POLICY)
        added_s = self._seconds_until(reached=True)
        changed = self.matrix.observe(self.lab)
        self.stage.table(changed, enforced)
        self._judge("changed", changed, self._prediction().reached)
        cells = [f"{source} to {service.host}:{service.label}" for source, service in changed.changed(enforced)]
        self.stage.say(f"in force {added_s:.2f} s after the write; changed (*): {', '.join(cells)}")
        held = self.lab.prober.hold(shop.INCIDENT)
        path.unlink()
        removed_s = self._seconds_until(reached=False)
        self.stage.say(f"the file is gone; in force after {removed_s:.2f} s")
        cut = held is not None and not held.exchange()
        if held is not None:
            held.close()
        open_still = "the connection that opened meanwhile is " + ("cut, too" if cut else "NOT cut")
        self.stage.verdict(open_still, good=cut)
        self._judge("restored", self.matrix.observe(self.lab), self._prediction().reached)
        self.summary["change"] = {
            "cells": cells,
            "added_s": round(added_s, 3),
            "removed_s": round(removed_s, 3),
            "open_connection_cut": cut,
        }
        self.summary["ok"] = self.summary["ok"] and cut and bool(cells)

    def _seconds_until(self, *, reached: bool) -> float:
        """Seconds until a new connection is answered (if ``reached``) or is no longer answered (if not).

        The connection is `shop.INCIDENT`. Raises PlatformError if that takes too long.
        """
        began = time.monotonic()
        limit_s = scaled(CHANGE_DEADLINE_S)
        while time.monotonic() - began < limit_s:
            tried = time.monotonic()
            if self.lab.attempt([shop.INCIDENT], deadline_s=CHANGE_ATTEMPT_S, rounds=1)[0].reached == reached:
                return tried - began
            time.sleep(scaled(POLL_S))
        raise PlatformError(f"the change was not in force within {limit_s:.0f} s", hint=self._log_tail())

    def _measure(self) -> dict[str, Any]:
        self.stage.headline("Throughput between two pods, with and without enforcement")
        server, twin = self.plan.hosts["shop/database"], self.plan.hosts["twin/server"]
        enforced = Pair("shop/back-end", server.name, server.addresses[0], shop.BULK_PORT)
        free = Pair("twin/client", twin.name, twin.addresses[0], shop.BULK_PORT)
        result = compare(self.lab, enforced, free)
        self.stage.say(f"with:     {result.with_bps / 1e9:6.2f} Gbit/s   back-end to database")
        self.stage.say(f"without:  {result.without_bps / 1e9:6.2f} Gbit/s   two pods of a node that has no agent")
        self.stage.say(f"ratio:    {result.ratio:6.2f}")
        self.stage.detail("iperf3, TCP, medians of five, interleaved; for the cost of a packet see bench/")
        return {"with_bps": result.with_bps, "without_bps": result.without_bps, "ratio": round(result.ratio, 3)}

    # --- the agent --------------------------------------------------------------------------------------------------

    def _start_agent(self) -> float:
        """Start the agent in the node's namespace, and wait until it reports that all policy is in force.

        Returns the seconds that this took. Raises PlatformError if the agent ends or takes too long.
        """
        began = time.monotonic()
        command = [
            sys.executable, "-m", "netpol_ebpf.agent.main", "--config", "none",
            "--manifests", str(self.manifests), "--node", shop.NODE,
            "--pin-root", str(self.pins), "--state-dir", str(self.state),
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.agent = self.lab.start(shop.NODE, command, stdout=log, stderr=subprocess.STDOUT)
        limit_s = scaled(READY_DEADLINE_S)
        while not self._is_in_force():
            if self.agent.poll() is not None:
                raise PlatformError(f"netpol-agent ended with code {self.agent.returncode}", hint=self._log_tail())
            if time.monotonic() - began > limit_s:
                raise PlatformError(f"netpol-agent was not ready after {limit_s:.0f} s", hint=self._log_tail())
            time.sleep(scaled(POLL_S))
        return time.monotonic() - began

    def _is_in_force(self) -> bool:
        with contextlib.suppress(UnreachableError):  # the agent does not listen yet
            for status in self._ask({"op": "status"}):
                if not status["in_force"]:
                    return False  # before the first state is in force, the status has no objects
                objects = status["objects"]
                return bool(objects["enforced_endpoints"] == objects["local_endpoints"])
        return False

    def _ask(self, request: dict[str, Any]) -> Iterator[Any]:
        return ask(self.state / SOCKET_NAME, request, timeout_s=scaled(CLIENT_TIMEOUT_S))

    def _log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        return "Last lines of the agent's log:\n" + "\n".join(lines)


def _require_machine(*, with_iperf: bool) -> None:
    """Check that the machine has what the demonstration needs.

    Raises PrivilegeError without root, PlatformError for the first thing that is missing.
    """
    from netpol_loader.pins import doctor

    if os.geteuid() != 0:
        raise PrivilegeError("the demonstration needs root: it makes network namespaces and loads BPF programs")
    doctor.require_all(PIN_PARENT)
    for tool in ("bpftool", "iperf3") if with_iperf else ("bpftool",):
        if shutil.which(tool) is None:
            raise PlatformError(f"{tool} is not installed", hint=f"Install {tool}; scripts/setup.sh does.")


def _wants_colour(choice: str) -> bool:
    if choice == "auto":
        return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return choice == "always"


def _can_encode(text: str, encoding: str | None) -> bool:
    try:
        text.encode(encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _write_whole(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees either the whole file or none."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.rename(path)


@contextlib.contextmanager
def _workshop() -> Iterator[Path]:
    """Create a directory for the files of this run.

    It is removed at the end, if the laboratory's guard has not removed it.
    """
    path = Path(tempfile.mkdtemp(prefix="netpol-demo-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
