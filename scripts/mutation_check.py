#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Check that the tests detect mistakes in the semantics. Each mistake below is made in a copy, and a test must fail.

A *slip* is a plausible mistake: in one module, one piece of text is replaced by another. For each slip, a fast part of
the tests runs on the copy (unit tests of the policy packages, then the case files with the model, then properties with
a fixed seed) until a test fails. If no test fails, the slip *survives*, and a test is missing.

Invariants: the working tree is never changed. The tests must first pass on the unchanged copy. If the text of a slip is
not in the module, or is there more than once, that is an error and never a success.

Usage: mutation_check.py [--jobs N] [--list] [NAME...]

Exit code: 0 all slips were detected, 1 a slip survived or no longer applies, 2 the tests fail without any slip.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("netpol_ebpf", "tests/unit", "tests/property", "tests/data", "tests/cases", "pyproject.toml")
TIMEOUT_S = 600
"""Time limit of a stage in seconds. A stage takes a few seconds, but a slip may make it hang. The limit suits machines
under load."""


PYTEST_UNUSABLE = (3, 4, 5)
"""Exit codes of pytest without a test result: internal error, wrong usage, no tests."""


PROPERTIES = (
    "port_ranges", "kubernetes_semantics", "calico_semantics", "derivation_order", "engines_agree", "event_order", "changes",
    "shadows", "table_reader",
)  # fmt: skip


@dataclass(frozen=True)
class Slip:
    """A mistake: ``old`` is replaced by ``new`` in ``module`` (a path below netpol_ebpf)."""

    name: str
    module: str
    old: str
    new: str


@dataclass(frozen=True)
class Stage:
    """A command that must succeed on the unchanged copy. ``{python}``: the interpreter."""

    name: str
    command: tuple[str, ...]


def _pytest(*arguments: str) -> tuple[str, ...]:
    return ("{python}", "-m", "pytest", "-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", *arguments)


def stages(directory: Path) -> tuple[Stage, ...]:
    """All stages, the cheapest first.

    Unit tests are those of selectors, resources, policy, model and compiler in the copy.
    """
    wanted = ("selector", "resources", "policy", "translate", "derivation", "model", "journey", "compiler")
    unit = sorted(
        str(path.relative_to(directory))
        for word in wanted
        for path in (directory / "tests" / "unit").glob(f"test_{word}*.py")
    )
    return (
        Stage("unit", _pytest(*unit)),
        Stage("cases", ("{python}", "-m", "netpol_ebpf.cli.main", "test", "tests/cases", "--engine", "model")),
        *(Stage(f"property {name}", _pytest(f"tests/property/test_{name}.py")) for name in PROPERTIES),
    )


MATCHING, REFERENCE, TYPES = "model/matching.py", "model/reference.py", "policy/types.py"
KUBERNETES, CALICO = "policy/translate/kubernetes.py", "policy/translate/calico.py"
COMPOSITION, ENDPOINTS, SIG = (
    "policy/translate/composition.py", "policy/translate/endpoints.py", "policy/translate/signetwork.py",
)  # fmt: skip
TREE = "selector/tree.py"
ENTRIES, RULE_LISTS, COMMIT = "compiler/entries.py", "compiler/rule_lists.py", "compiler/commit.py"
READER = "compiler/reader.py"

SLIPS = (
    # selectors
    Slip("!= is false on a missing key", TREE,
         "return labels.get(self.key) != self.value", "return labels.get(self.key, self.value) != self.value"),
    Slip("not in is false on a missing key", TREE,
         "return labels.get(self.key) not in self.members", "return self.key in labels and labels[self.key] not in self.members"),
    Slip("has() is false on an empty value", TREE, "return self.key in labels\n", "return bool(labels.get(self.key))\n"),
    Slip("starts with means contains", TREE, "actual.startswith(self.value)", "self.value in actual"),
    Slip("a prefix spares has()", "selector/expression.py", "return Has(prefix + leaf.key)", "return Has(leaf.key)"),
    Slip("! binds to the whole conjunction", "selector/parser.py",
         "primary = self._primary()", "primary = self._and() if negate else self._primary()"),
    # reading
    Slip("policyTypes default ignores egress rules", "resources/kubernetes.py",
         "has_egress=bool(egress)", "has_egress=False"),
    Slip("Calico types default as in Kubernetes", "resources/calico.py",
         'return _DIRECTIONS if spec.list("ingress") else _DIRECTIONS[1:]', "return _DIRECTIONS"),
    Slip("ports of init containers do not count", "resources/core.py",
         'for containers in ("initContainers", "containers"):', 'for containers in ("containers",):'),
    Slip("a finished pod keeps its addresses", "resources/core.py",
         "addresses=() if finished else addresses", "addresses=addresses"),
    # Kubernetes policies
    Slip("a podSelector reaches every namespace", KUBERNETES, "    namespaces = own\n", "    namespaces = from_label_selector(LabelSelector())\n"),
    Slip("except is ignored", KUBERNETES, "not_nets=peer.ip_block.excepts", "not_nets=()"),
    Slip("endPort is off by one", KUBERNETES,
         "port.port if port.end_port is None else port.end_port", "port.port if port.end_port is None else port.end_port - 1"),
    Slip("endPort is ignored", KUBERNETES, "port.port if port.end_port is None else port.end_port", "port.port"),
    Slip("a port without number is no port", KUBERNETES, "unlimited.add(port.protocol)", "pass"),
    Slip("ports one apart are merged", COMPOSITION, "first <= merged[-1][1] + 1", "first <= merged[-1][1] + 2"),
    # endpoints and labels
    Slip("a host-network pod is an endpoint", ENDPOINTS, "if pod.host_network or pod.finished:", "if pod.finished:"),
    Slip("pods may claim inherited labels", ENDPOINTS, "own = _without_inherited(pod.meta.labels)", "own = dict(pod.meta.labels)"),
    Slip("later profiles' labels win", ENDPOINTS, "for profile in reversed(tuple(profiles)):", "for profile in profiles:"),
    # Calico policies
    Slip("no order is order zero", CALICO, "order=math.inf if spec.order is None", "order=0.0 if spec.order is None"),
    Slip("a tier without order is last", CALICO,
         "UNORDERED_TIER if tier.order is None else tier.order", "math.inf if tier.order is None else tier.order"),
    Slip("a NetworkPolicy's notSelector is not confined", CALICO,
         "elif namespace and (parts or entity.not_selector is not None):", "elif namespace and parts:"),
    Slip("notSelector beside a selector is ignored", CALICO,
         "selector, not_selector = all_of(selector, negate(not_selector)), None", "not_selector = None"),
    Slip("all() beside a serviceAccountSelector matches hosts", CALICO,
         "(spec.service_account_selector, SERVICE_ACCOUNT_PREFIX, HAS_SERVICE_ACCOUNT)",
         "(spec.service_account_selector, SERVICE_ACCOUNT_PREFIX, EVERYTHING)"),
    Slip("global() means every namespace", CALICO, "parts.insert(0, NO_NAMESPACE)", "pass"),
    Slip("all() of a namespaceSelector matches hosts", COMPOSITION,
         "return selector.prefixed(NAMESPACE_PREFIX).with_all_as(HAS_NAMESPACE)", "return selector.prefixed(NAMESPACE_PREFIX)"),
    Slip("names of service accounts are ignored", CALICO, "if match.names:", "if not match.names:"),
    Slip("a negated net tells no family", CALICO,
         "nets = (*rule.source.nets, *rule.source.not_nets, *rule.destination.nets, *rule.destination.not_nets)",
         "nets = (*rule.source.nets, *rule.destination.nets)"),
    Slip("a service's ports do not count on egress", CALICO, "service_ports=direction is Direction.EGRESS", "service_ports=False"),
    Slip("a staged policy is enforced", CALICO,
         "return _policy(key, policy.meta, policy.spec, Staged.SET, replaces)",
         "return _policy(key, policy.meta, policy.spec, Staged.NO, replaces)"),
    # SIG-network policies
    Slip("a baseline policy is in the admin tier", SIG,
         'KUBE_BASELINE if policy.tier == "Baseline" else KUBE_ADMIN', "KUBE_ADMIN"),
    Slip("an unknown peer in a Deny rule matches nothing", SIG,
         "if action is not Action.ALLOW and (unknown", "if action is Action.ALLOW and (unknown"),
    Slip("known peers beside an unknown one are accepted", SIG,
         "        if unknown:\n            yield replace(base, source=Entity(impossible=True))\n            continue\n", ""),
    Slip("the end of kube-admin denies", SIG,
         'KUBE_ADMIN = PolicyTier("kube-admin", 1000.0, Action.PASS)', 'KUBE_ADMIN = PolicyTier("kube-admin", 1000.0, Action.DENY)'),
    # order
    Slip("ties in order go by arrival", TYPES,
         'return (self.order, f"{self.key.name}/{self.key.namespace}/{self.key.kind}")', 'return (self.order, "")'),
    Slip("ties in order go by namespace first", TYPES,
         'return (self.order, f"{self.key.name}/{self.key.namespace}/{self.key.kind}")',
         'return (self.order, f"{self.key.namespace}/{self.key.name}/{self.key.kind}")'),
    Slip("ties between tiers go against the name", TYPES,
         "return (not self.exists, self.order, self.follows or self.name, bool(self.follows))", 'return (not self.exists, self.order, "".join(chr(255 - ord(c)) for c in self.name))'),
    Slip("a missing tier comes first", TYPES,
         "return (not self.exists, self.order, self.follows or self.name, bool(self.follows))", "return (self.exists, self.order, self.name)"),
    Slip("a tier that follows another one is ordered by its own name", TYPES,
         "self.follows or self.name, bool(self.follows)", "self.name, bool(self.follows)"),
    # matching
    Slip("a named port matches whatever its protocol", MATCHING,
         "named.name in ports.names and named.protocol == protocol and", "named.name in ports.names and"),
    Slip("a named port is looked up without the selector", MATCHING,
         "if selector is None or selector.matches(endpoint.labels)", "if True"),
    Slip("notPorts is ignored", MATCHING, "if entity.not_ports is not None and", "if entity.not_ports is None and False and"),
    Slip("notNets is ignored", MATCHING, "if any(address in net for net in entity.not_nets):", "if False:"),
    Slip("the end of a port range is left out", MATCHING,
         "first <= side.port <= last", "first <= side.port < max(last, first + 1)"),
    Slip("network sets are not selected", MATCHING,
         "owners = [*(endpoint.labels for endpoint in side.endpoints), *(held.labels for held in side.network_sets)]",
         "owners = [endpoint.labels for endpoint in side.endpoints]"),
    Slip("all owners of an address must match", MATCHING,
         "return any(selector.matches(labels) for labels in owners)",
         "return bool(owners) and all(selector.matches(labels) for labels in owners)"),
    Slip("the ICMP code is ignored", MATCHING, "and icmp.code in (None, packet.icmp_code)", ""),
    Slip("notICMP needs an ICMP packet", MATCHING,
         "if rule.not_icmp is not None and _icmp_matches(rule.not_icmp, packet):",
         "if rule.not_icmp is not None and (packet.protocol not in (ICMP, ICMPV6) or _icmp_matches(rule.not_icmp, packet)):"),
    Slip("ports match protocols without ports", MATCHING, "    if protocol not in PORT_PROTOCOLS:\n        return False\n", ""),
    Slip("ICMP matches in the other family", MATCHING,
         "if (rule.protocol, version) in ((ICMP, 6), (ICMPV6, 4)):", "if False:"),
    Slip("source and destination are swapped", MATCHING,
         "_entity_matches(world, rule.source, packet, source)", "_entity_matches(world, rule.source, packet, destination)"),
    # evaluation
    Slip("Pass goes on within the tier", REFERENCE,
         "elif rule.action is Action.PASS:\n                    return None", "elif rule.action is Action.PASS:\n                    continue"),
    Slip("Log ends the evaluation", REFERENCE, "if rule.action is Action.LOG:\n                    self.logs.append(cause)",
         "if rule.action is Action.LOG:\n                    return Outcome.DENY, cause"),
    Slip("a staged policy ends its tier", REFERENCE,
         "for policy in self._world.policies.values() if policy.staged is Staged.NO]", "for policy in self._world.policies.values()]"),
    Slip("a staged copy stands beside its twin", REFERENCE,
         "policy.staged is not Staged.DELETE and policy.key not in replaced", "policy.staged is not Staged.DELETE"),
    Slip("a policy without a matching rule does not end its tier", REFERENCE,
         "return Outcome.DENY, Cause(CauseKind.TIER_END, self.direction, tier.name, policies[-1].key)", "return None"),
    Slip("every tier ends in deny", REFERENCE, "if tier.default_action is Action.PASS or self.stage", "if self.stage"),
    Slip("the end of a preDNAT tier denies", REFERENCE, "in (Stage.PRE_DNAT, Stage.UNTRACKED):\n            return None\n        return Outcome.DENY, Cause(CauseKind.TIER_END",
         "in (Stage.UNTRACKED,):\n            return None\n        return Outcome.DENY, Cause(CauseKind.TIER_END"),
    Slip("profiles are asked in reverse", REFERENCE, "for name in self.endpoint.profiles:", "for name in reversed(self.endpoint.profiles):"),
    Slip("Pass in a profile allows", REFERENCE,
         "action = Action.DENY if rule.action is Action.PASS else rule.action", "action = Action.ALLOW if rule.action is Action.PASS else rule.action"),
    Slip("a missing profile is skipped", REFERENCE,
         "return Outcome.DENY, Cause(CauseKind.PROFILE, self.direction, profile=name)", "continue"),
    Slip("types are ignored", REFERENCE, "and self.direction in policy.types", ""),
    Slip("every host policy acts on forwarded traffic", REFERENCE,
         "return kind is EndpointKind.HOST and policy.apply_on_forward", "return kind is EndpointKind.HOST"),
    Slip("failsafes protect forwarded traffic too", REFERENCE,
         "or self.stage not in (Stage.NORMAL, Stage.UNTRACKED)", ""),
    Slip("there are no failsafes", REFERENCE, "for index, failsafe in enumerate(own):", "for index, failsafe in enumerate(()):"),
    Slip("tunnels pass from anyone", REFERENCE,
         "self._remote in node.addresses for node in self.world.nodes.values()", "node for node in self.world.nodes"),
    Slip("a node has no failsafes of its own", "policy/types.py",
         'return self.node_failsafes.get((node or "", direction), of_all)', "return of_all"),
    Slip("an address claims before a name", "policy/journey.py",
         "rank = 1 if endpoint.interface is None else 2 if endpoint.interface == WILDCARD else 0",
         "rank = 0 if endpoint.interface is None else 2 if endpoint.interface == WILDCARD else 1"),
    Slip("what another node translates is judged translated", "policy/journey.py",
         "self.sent = self.original if is_sent_on else self.final", "self.sent = self.final"),
    Slip("check: a Pass of an earlier tier hands nothing on", "policy/shadows.py",
         "yield _Before(other, rule, tuple(passes))", "yield _Before(other, rule)"),
    Slip("check: what is staged is held against what it replaces", "policy/shadows.py",
         "if policy.staged is Staged.NO else (other.key in self._replaced)", "if policy.staged is Staged.NO else False"),
    Slip("an automatic host endpoint hides one that is written", "policy/translate/derivation.py",
         "elif key in self._automatic:  # one", "if key in self._automatic:  # one"),
    Slip("a host is open when nothing decides", REFERENCE,
         "return Outcome.DENY, Cause(CauseKind.NO_MATCH, direction, action=Action.DENY)",
         "return Outcome.ALLOW, Cause(CauseKind.NO_MATCH, direction, action=Action.DENY)"),
    # compiled tables, against the model
    Slip("tables: notProtocol is ignored", ENTRIES,
         "l4 = difference(l4, protocol(rule.not_protocol))", "l4 = difference(l4, ())"),
    Slip("tables: ICMP has no family", ENTRIES, "if rule.protocol in (ICMP, ICMPV6):", "if False:"),
    Slip("tables: default routes among notNets are ignored", ENTRIES,
         "return (_Clause(family=10 - families.pop() if families else 0, negative=negative),)", "return (_Clause(negative=negative),)"),
    Slip("tables: notPorts by name exclude everyone's ports", ENTRIES,
         "    for pair, names in sorted(named.items()):\n", "    for pair, names in ():\n"),
    Slip("tables: Pass in a profile allows", RULE_LISTS,
         "action = Action.DENY if rule.action is Action.PASS else rule.action",
         "action = Action.ALLOW if rule.action is Action.PASS else rule.action"),
    Slip("tables: a staged policy is enforced", RULE_LISTS,
         "enforced, pending = policy.staged is Staged.NO, policy.key not in replaced", "enforced, pending = True, policy.key not in replaced"),
    Slip("tables: a replaced policy is pending", RULE_LISTS,
         "enforced, pending = policy.staged is Staged.NO, policy.key not in replaced", "enforced, pending = policy.staged is Staged.NO, True"),
    Slip("tables: the end of a preDNAT tier denies", RULE_LISTS,
         "and stage not in (Stage.PRE_DNAT, Stage.UNTRACKED)", "and stage is not Stage.UNTRACKED"),
    Slip("tables: the last of a port range goes to the next atom", "compiler/l4.py",
         "toggles[last + 1] = toggles.get(last + 1, 0) ^ mask", "toggles[max(last, 1)] = toggles.get(max(last, 1), 0) ^ mask"),
    Slip("tables: a workload's addresses are all alike", COMMIT,
         "if (kept ^ holding) & decided & applicable:", "if False:"),
    Slip("reader: protocols without ports have source ports", READER,
         "possible = positions if contains(ports, 0) else intersection(positions, WITH_PORTS)", "possible = positions"),
    Slip("reader: the families share a default class", READER, "defaults[version])", "defaults[4])"),
    Slip("reader: two classes of ports are one", READER, "if classes > 1 else 0", "if classes > 2 else 0"),
    Slip("tables: a lost allow is not announced", COMMIT, "draft.revokes = self._revokes()", "draft.revokes = False"),
)  # fmt: skip


class Copy:
    """A copy of the package and its tests, in which one slip at a time is made."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        for name in COPIED:
            source, target = ROOT / name, directory / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy(source, target)
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(directory),
            "PYTHONDONTWRITEBYTECODE": "1",  # a slip of equal length within a second would run stale bytecode
            "NETPOL_HYPOTHESIS": "fixed",
        }

    def stages(self) -> tuple[Stage, ...]:
        """The stages that run on this copy."""
        return stages(self._directory)

    def failure(self, stage: Stage) -> str:
        """The name of a stage that fails, with the most useful line of its output; "" if it succeeds."""
        command = [part.format(python=sys.executable) for part in stage.command]
        try:
            done = subprocess.run(
                command, cwd=self._directory, env=self._environment, capture_output=True, text=True,
                timeout=TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"{stage.name}: no end after {TIMEOUT_S} s"
        if done.returncode in PYTEST_UNUSABLE and "pytest" in command:
            raise ValueError(f"stage {stage.name} could not run: {_last_word(done.stderr) or _last_word(done.stdout)}")
        if done.returncode != 0:
            return f"{stage.name}: {_last_word(done.stdout) or _last_word(done.stderr)}"
        return ""

    def caught_by(self, slip: Slip) -> str:
        """The failure that detects the slip; "" if there is none. Raises ValueError if the slip does not apply."""
        path = self._directory / "netpol_ebpf" / slip.module
        text = path.read_text(encoding="utf-8")
        if text.count(slip.old) != 1:
            raise ValueError(
                f"stale: its text is {text.count(slip.old)} times in {slip.module}, must be once; bring it up to date"
            )
        slipped = text.replace(slip.old, slip.new)
        compile(slipped, str(path), "exec")
        try:
            path.write_text(slipped, encoding="utf-8")
            return next(filter(None, map(self.failure, self.stages())), "")
        finally:
            path.write_text(text, encoding="utf-8")


def _last_word(output: str) -> str:
    """The most useful line of a failure: pytest's FAILED or ERROR line, otherwise the first line of the output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in lines:
        if line.startswith(("FAILED ", "ERROR ")):
            return line.split(" - ")[0].removeprefix("FAILED ").removeprefix("ERROR ")
    return lines[0] if lines else ""


def _results(slips: list[Slip], copies: list[Copy]) -> Iterator[tuple[Slip, bool, str]]:
    """Each slip, whether it was detected, and by which failure; or why it was not."""
    free: SimpleQueue[Copy] = SimpleQueue()
    for copy in copies:
        free.put(copy)

    def judge(slip: Slip) -> tuple[Slip, bool, str]:
        copy = free.get()
        try:
            caught = copy.caught_by(slip)
        except ValueError as error:
            return slip, False, str(error).upper()[:1] + str(error)[1:]
        finally:
            free.put(copy)
        return slip, bool(caught), caught or "SURVIVED"

    with ThreadPoolExecutor(len(copies)) as pool:
        yield from pool.map(judge, slips)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Put deliberate slips into a copy of the package; each must be caught."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only slips whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=2, help="how many copies to test at a time (default: 2)")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args(arguments)
    chosen = [slip for slip in SLIPS if not options.names or any(name in slip.name for name in options.names)]
    if options.list:
        print("\n".join(slip.name for slip in chosen))
        return 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="netpol-mutation-") as directory:
        copies = [Copy(Path(directory, str(number))) for number in range(max(1, options.jobs))]
        with ThreadPoolExecutor(len(copies)) as pool:
            failures = list(filter(None, pool.map(copies[0].failure, copies[0].stages())))
        if failures:
            print("the tests fail without any slip:", *failures, sep="\n  ", file=sys.stderr)
            return 2
        bad = 0
        for slip, good, remark in _results(chosen, copies):
            bad += not good
            print(f"{'caught' if good else 'NOT OK':7}  {slip.name:55}  {remark}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} slips caught, {time.monotonic() - start:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
