# SPDX-License-Identifier: Apache-2.0
"""`netpolctl can-i`: ask an API server whether the caller may write policies of a tier, and which right is missing.

The checks are those of the admission policy deploy/chart/admission/tier-rights.yaml. kubectl cannot make them, because
they concern virtual resources (``tier.networkpolicies``) with names such as ``security.*``.

Exit codes: 0 yes, 1 no, 2 wrong usage, 4 the API server does not answer.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any

from netpol_ebpf.cli.api_access import add_api_options, open_api
from netpol_ebpf.cli.output import add_output_option, print_value, render_table
from netpol_ebpf.errors import UnreachableError, UsageError
from netpol_ebpf.status.requests import Sender, request
from netpol_ebpf.terminal import paragraph, say

EXIT_NO = 1
GROUP = "projectcalico.org"
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
ADMISSION = "/apis/admissionregistration.k8s.io/v1"
POLICY = "tier-rights.projectcalico.org"
TIERED = {
    "networkpolicies": True,
    "globalnetworkpolicies": False,
    "stagednetworkpolicies": True,
    "stagedglobalnetworkpolicies": False,
}
"""The kinds that have a tier; the value says whether the kind is namespaced. `tests/unit/test_cli_can_i.py` compares
them with the admission policy."""
READS = ("get", "list", "watch")
WRITES = {"create": "create", "update": "update", "patch": "update", "delete": "delete", "deletecollection": "delete"}
"""Maps each verb of a write to the verb that the admission policy checks."""
NO_READS = "Admission decides no reads: who may list a kind sees the policies of all tiers, and the rights to tiers have no part in it."


@dataclass(frozen=True, slots=True)
class Right:
    """One right, and whether the caller has it. ``why``: the server's reason, such as the binding that grants it."""

    right: str
    allowed: bool
    why: str


def register(subparsers: Any) -> None:
    """Add the command to the parser of `netpolctl`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "can-i",
        help="ask whether you may write policies of a tier",
        description="Ask the API server whether you may write policies of a tier, and show each right that this needs.",
        epilog=f"{NO_READS} exit codes: 0 yes, 1 no, 2 usage, 3 no usable kubeconfig, 4 the API server does not answer",
    )
    parser.add_argument("verb", choices=(*WRITES, *READS), metavar="VERB", help=", ".join((*WRITES, *READS)))
    parser.add_argument("kind", type=parse_kind, metavar="KIND", help=", ".join(TIERED))
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="one policy (default: any of the tier)")
    parser.add_argument("--tier", default="default", metavar="NAME", help="tier of the policy (default: default)")
    parser.add_argument(
        "-n", "--namespace", default="", metavar="NAME", help="namespace of the policy (default: all namespaces)"
    )
    add_api_options(parser)
    add_output_option(parser)
    parser.set_defaults(run=run)


def parse_kind(text: str) -> str:
    """Parse a kind, given as its plural, singular or name, with or without its group. Raises ArgumentTypeError."""
    name, _, group = text.lower().partition(".")
    plural = f"{name[:-1]}ies" if name.endswith("policy") else name
    if plural not in TIERED or group not in ("", GROUP):
        raise argparse.ArgumentTypeError(
            f"{text!r} has no tier: `kubectl auth can-i` answers for it; kinds with a tier: {', '.join(TIERED)}"
        )
    return plural


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if arguments.namespace and not TIERED[arguments.kind]:
        raise UsageError(f"{arguments.kind} belong to no namespace", hint="Leave out --namespace.")
    answer = ask(
        open_api(arguments), arguments.verb, arguments.kind, arguments.tier, arguments.namespace, arguments.name
    )
    if not print_value(arguments.output, answer):
        say("yes" if answer["allowed"] else "no")
        rows = [(one["right"], "yes" if one["allowed"] else "NO", one["why"] or "-") for one in answer["checks"]]
        say(render_table(("right", "granted", "by"), rows))
        for note in answer["notes"]:
            say(paragraph(note))
    return 0 if answer["allowed"] else EXIT_NO


def ask(sender: Sender, verb: str, kind: str, tier: str, namespace: str, name: str) -> dict[str, Any]:
    """Check all rights that a write needs. ``namespace``, ``name``: "" for all. Raises UnreachableError."""
    plain = check(sender, verb, kind, namespace, name)
    if verb in READS:
        return {"allowed": plain.allowed, "checks": [asdict(plain)], "notes": [NO_READS]}
    tier_verb = WRITES[verb]
    see = check(sender, "get", "tiers", "", tier)
    in_tier = [check(sender, tier_verb, f"tier.{kind}", namespace, f"{tier}.*")]
    if name:
        in_tier.append(check(sender, tier_verb, f"tier.{kind}", namespace, name))
    is_bound, note = admission(sender)
    has_rights = see.allowed and any(one.allowed for one in in_tier)
    notes = [note, NO_READS]
    if name:
        notes.insert(0, f"One of the rights to tier.{kind} is enough.")
    if tier_verb == "update":
        notes.insert(0, "A policy that changes its tier needs these rights for both tiers: ask for each.")
    return {
        "allowed": plain.allowed and (has_rights or not is_bound),
        "checks": [asdict(one) for one in (plain, see, *in_tier)],
        "notes": notes,
    }


def check(sender: Sender, verb: str, resource: str, namespace: str, name: str) -> Right:
    """Ask the API server for one right of the caller. Raises UnreachableError."""
    attributes = {"group": GROUP, "resource": resource, "verb": verb, "namespace": namespace, "name": name}
    spec = {"resourceAttributes": {key: text for key, text in attributes.items() if text}}
    body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": spec}
    answer = request(sender, "POST", REVIEWS, body)
    status = answer.body.get("status")
    if not answer.is_done or not isinstance(status, dict):
        raise UnreachableError(
            f"the API server does not say what you may do ({answer.message})",
            hint="See whether your credentials are valid.",
        )
    where = f" in namespace {namespace}" if namespace else ""
    named = f" {name}" if name else ""
    return Right(f"{verb} {resource}{named}{where}", bool(status.get("allowed")), str(status.get("reason") or ""))


def admission(sender: Sender) -> tuple[bool, str]:
    """Whether to assume that the API server enforces rights to tiers, and a sentence with the reason.

    The result is also True if the caller may not read the admission policy, because the policy may exist.
    """
    kinds = ("validatingadmissionpolicies", "validatingadmissionpolicybindings")
    found = [request(sender, "GET", f"{ADMISSION}/{kind}/{POLICY}").status for kind in kinds]
    if HTTPStatus.NOT_FOUND in found:
        return (
            False,
            "Rights to tiers are NOT in force: the cluster lacks deploy/chart/admission/tier-rights.yaml, so plain rights alone decide.",
        )
    if all(one == HTTPStatus.OK for one in found):
        return True, "Rights to tiers are in force: the admission policy and its binding are there."
    return (
        True,
        "You may not read admission policies: this answer supposes that deploy/chart/admission/tier-rights.yaml is in force.",
    )
