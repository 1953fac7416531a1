# SPDX-License-Identifier: Apache-2.0
"""`netpolctl check`: report every error in manifests, and warn of valid policies whose effect is probably unintended.

Exit codes: 0 valid, 3 some input is not valid. Warnings do not change the exit code without ``--strict``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from netpol_ebpf.agent.configuration import add_config_option
from netpol_ebpf.cli.agent_access import manifests_dir
from netpol_ebpf.cli.output import add_output_option, counted, print_value
from netpol_ebpf.errors import InvalidInputError, Problem
from netpol_ebpf.policy.lint import lint
from netpol_ebpf.resources.load import load_paths
from netpol_ebpf.resources.workloads import as_cluster
from netpol_ebpf.terminal import escaped, paragraph, say

EXIT_INVALID = 3


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "check",
        help="report what is wrong or suspicious in manifests",
        description="Validate manifests as the API servers do, and warn of what is legal but probably not meant. The command "
        "reports all problems of all files at once. It skips and counts objects of other kinds (a Service of Knative, a "
        "ConfigMap). Some warnings need the whole cluster (a policy that selects nothing, a rule that is never reached) and judge by "
        "the objects given: give pods, or Deployments and other workloads, and namespaces too.",
        epilog="exit codes: 0 valid, 3 some input is not valid",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="PATH",
        help="a file, a directory (searched for *.yaml, *.yml and *.json), or - for standard input; default: the manifests of the agent "
        "of this node",
    )
    add_config_option(parser)
    parser.add_argument("--strict", action="store_true", help="exit with 3 for warnings, too")
    add_output_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    given = arguments.paths or [manifests_dir(arguments.config)]
    loaded = load_paths(given)
    if not loaded.documents and not loaded.problems:
        paths = " ".join(map(str, given))
        raise InvalidInputError(f"no object found in {paths}", hint="Manifests end in .yaml, .yml or .json.")
    problems = list(loaded.problems)
    linted = not loaded.errors  # checks of all objects together need objects without errors
    if linted:
        problems.extend(lint(as_cluster(loaded.resources)))
        problems = _in_file_order(problems)
    errors = sum(problem.severity == "error" for problem in problems)
    warnings = len(problems) - errors
    value = {
        "objects": len(loaded.resources),
        "errors": errors,
        "warnings": warnings,
        "skipped": dict(loaded.skipped),
        "clusterChecks": linted,
        "problems": [_as_dict(problem) for problem in problems],
    }
    if not print_value(arguments.output, value):
        for problem in problems:
            say(paragraph(str(problem)))
        say(f"{len(loaded.resources)} objects valid: {errors} errors, {warnings} warnings")
        if loaded.skipped:
            say(escaped(f"Skipped objects of other kinds: {counted(loaded.skipped)}"))
        if not linted:
            say("Checks that need all objects together did not run; they run once there are no errors.")
    return EXIT_INVALID if errors or (warnings and arguments.strict) else 0


def _in_file_order(problems: Sequence[Problem]) -> list[Problem]:
    """Sort the problems of each file by line. Files come in the order of their first problem."""
    files = {file: number for number, file in enumerate(dict.fromkeys(one.location.file for one in problems))}
    return sorted(problems, key=lambda problem: (files[problem.location.file], problem.location.line))


def _as_dict(problem: Problem) -> dict[str, Any]:
    return {
        "file": problem.location.file,
        "line": problem.location.line,
        "column": problem.location.column,
        "severity": problem.severity,
        "slug": problem.slug,
        "object": problem.obj,
        "path": problem.path,
        "message": problem.message,
    }
