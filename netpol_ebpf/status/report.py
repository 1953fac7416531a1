# SPDX-License-Identifier: Apache-2.0
"""The report of one node: which policies are in force there, as one fingerprint for each policy.

A fingerprint is a short hash of a policy's UID and generation. A reader knows UID and generation of the policy in
question and computes the fingerprint itself, so the report needs neither names nor generations. If the report has the
fingerprint, this generation is in force on the node.

Invariant: if a policy has a shortfall, the report does not have the fingerprint of its newest generation. That also
holds if the report leaves out the policy's name because it has too many names.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from typing import Any

from netpol_ebpf import __version__
from netpol_ebpf.errors import InvalidInputError
from netpol_ebpf.resources import schema_status as schema

FINGERPRINT_BYTES = 6
"""Size of a fingerprint in bytes. A wrong match among 10 000 fingerprints has a probability of 4e-11."""
STALE_PERIODS = 3
"""Number of periods without a renewal after which a report is stale: it no longer proves what is in force."""
COLLECTION = f"/apis/{schema.VERSION}/{schema.PLURAL}"


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Policies whose newest generation is not in force on a node.

    ``reason``: one of `schema_status.REASONS`. ``message``: the reason in full. ``policies``: their names.
    """

    reason: str
    message: str
    policies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """What an agent knows of its node.

    ``in_force``: the revision in force (`Meta.revision`) of each policy that selects an endpoint of the node, by the
    policy's name. ``nodes``: the number of nodes in the cluster.
    """

    in_force: Mapping[str, str]
    shortfalls: tuple[Shortfall, ...] = ()
    nodes: int = 1


@dataclass(frozen=True, slots=True)
class NodeReport:
    """A node's report as read from the server.

    ``renewed_s``: when it was written, in seconds since 1970 by the node's clock.
    """

    node: str
    renewed_s: float
    period_s: float
    fingerprints: frozenset[bytes]
    shortfalls: tuple[Shortfall, ...] = ()

    def is_stale(self, now_s: float) -> bool:
        """Whether the report is too old: the agent should have renewed it several times since."""
        return now_s - self.renewed_s > STALE_PERIODS * self.period_s

    def has(self, revision: str) -> bool:
        """Whether this revision of a policy is in force on the node."""
        return fingerprint(revision) in self.fingerprints

    def shortfall_of(self, policy: str) -> Shortfall | None:
        """The shortfall that names a policy; None if there is none."""
        return next((one for one in self.shortfalls if policy in one.policies), None)


def fingerprint(revision: str) -> bytes:
    """The fingerprint of one revision of a policy."""
    return sha256(revision.encode()).digest()[:FINGERPRINT_BYTES]


def render_report(
    node: str, status: NodeStatus, renewed_s: float, period_s: float, node_uid: str = ""
) -> dict[str, Any]:
    """The NodeReport object that a node's agent writes. ``renewed_s``: seconds since 1970.

    ``node_uid``: the UID of the Node object; the report is deleted together with this object. "": the report is not
    deleted with a Node object.
    """
    fingerprints = sorted(fingerprint(one) for one in status.in_force.values())
    spec: dict[str, Any] = {
        "agentVersion": __version__,
        "renewTime": render_time(renewed_s),
        "periodSeconds": min(max(1, round(period_s)), schema.MAX_PERIOD_S),
        "programmed": base64.b64encode(b"".join(fingerprints)).decode("ascii"),
        "shortfalls": [_render_shortfall(one) for one in status.shortfalls[: schema.MAX_SHORTFALLS]],
        "moreShortfalls": max(0, len(status.shortfalls) - schema.MAX_SHORTFALLS),
    }
    missing = {policy for one in status.shortfalls for policy in one.policies}
    spec |= {"policies": len(status.in_force.keys() | missing), "missing": len(missing)}
    metadata: dict[str, Any] = {"name": node}
    if node_uid:
        metadata["ownerReferences"] = [{"apiVersion": "v1", "kind": "Node", "name": node, "uid": node_uid}]
    return {"apiVersion": schema.VERSION, "kind": schema.KIND, "metadata": metadata, "spec": spec}


def _render_shortfall(one: Shortfall) -> dict[str, Any]:
    named = one.policies[: schema.MAX_NAMED]
    return {
        "reason": one.reason,
        "message": one.message[: schema.MAX_MESSAGE],
        "policies": list(named),
        "more": len(one.policies) - len(named),
    }


def parse_report(obj: Mapping[str, Any]) -> NodeReport:
    """Parse a NodeReport object. Raises InvalidInputError if an agent would not have written it."""
    try:
        node, spec = obj["metadata"]["name"], obj["spec"]
        packed = base64.b64decode(spec["programmed"], validate=True)
        starts = range(0, len(packed), FINGERPRINT_BYTES)
        return NodeReport(
            str(node),
            parse_time(spec["renewTime"]),
            float(spec["periodSeconds"]),
            frozenset(packed[at : at + FINGERPRINT_BYTES] for at in starts),  # a shorter rest matches no fingerprint
            tuple(_parse_shortfall(one) for one in spec.get("shortfalls", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        name = obj.get("metadata", {}).get("name", "?") if isinstance(obj.get("metadata"), Mapping) else "?"
        raise InvalidInputError(f"{schema.KIND}/{name} is not as an agent writes it ({error})") from error


def _parse_shortfall(one: Mapping[str, Any]) -> Shortfall:
    return Shortfall(str(one["reason"]), str(one["message"]), tuple(map(str, one["policies"])))


def parse_reports(items: Iterable[Mapping[str, Any]]) -> dict[str, NodeReport]:
    """Parse NodeReport objects; returns the reports by node. An object that no agent would have written is left out."""
    return {one.node: one for one in map(try_report, items) if one is not None}


def try_report(obj: Mapping[str, Any]) -> NodeReport | None:
    """Parse a NodeReport object; None if an agent would not have written it."""
    try:
        return parse_report(obj)
    except InvalidInputError:
        return None


def render_time(seconds: float) -> str:
    """Format a time in seconds since 1970 as the API writes it: in UTC, to the second."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> float:
    """Parse a time as the API writes it; returns the seconds since 1970. Raises ValueError."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
