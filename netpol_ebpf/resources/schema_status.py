# SPDX-License-Identifier: Apache-2.0
"""The custom resource in which each node's agent reports which policies are in force on the node (ADR 20).

`netpol_ebpf.status.report` writes and reads its objects.  Users write none.
"""

from __future__ import annotations

from netpol_ebpf.resources.schema import CustomResource, Schema, integer, list_of, struct, text, word

VERSION = "netpol-ebpf.io/v1alpha1"
KIND = "NodeReport"
PLURAL = "nodereports"
REASONS = ("MapFull", "LimitExceeded", "NotEnforced")
MAX_SHORTFALLS = 32
MAX_NAMED = 100
"""How many shortfalls a report has, and how many policies each names, at most; arbitrary. Counts give the rest."""
MAX_MESSAGE = 1024
MAX_PERIOD_S = 86_400
BASE64 = "^[A-Za-z0-9+/]*={0,2}$"
"""The pattern of base64 text. The OpenAPI format `byte` is not used, because an API server rejects its empty text."""


def _count(about: str) -> Schema:
    return integer(about, 0, 2**31 - 1)


_SHORTFALL = struct(
    "Policies whose newest generation is not in force on the node, for one reason.",
    {
        "reason": word("The reason.", REASONS),
        "message": text("The reason, for people.", longest=MAX_MESSAGE),
        "policies": list_of("Policies, as KIND/NAMESPACE/NAME.", text("A policy.", longest=512), MAX_NAMED),
        "more": _count("How many more policies there are."),
    },
    required=("reason", "message", "policies"),
)

RESOURCES: tuple[CustomResource, ...] = (
    CustomResource(
        VERSION,
        KIND,
        PLURAL,
        (),
        namespaced=False,
        spec=struct(
            "What the agent of the node with this name last reported.",
            {
                "agentVersion": text("The agent's version.", longest=64),
                "renewTime": text("When the report was written, by the node's clock.", form="date-time"),
                "periodSeconds": integer("The longest time between two reports of a working agent.", 1, MAX_PERIOD_S),
                "policies": _count("How many policies select endpoints of the node."),
                "missing": _count("On how many of them the shortfalls bear."),
                "programmed": text(
                    "Base64 of the sorted fingerprints of the policies in force (ADR 20).", pattern=BASE64
                ),
                "shortfalls": list_of("Why other policies are not in force.", _SHORTFALL, MAX_SHORTFALLS),
                "moreShortfalls": _count("How many more shortfalls there are."),
            },
            required=("renewTime", "periodSeconds", "programmed"),
        ),
        columns=(
            ("Policies", "integer", ".spec.policies"),
            ("Missing", "integer", ".spec.missing"),
            ("Renewed", "date", ".spec.renewTime"),
        ),
        spec_default=False,
        has_status=False,
    ),
)
