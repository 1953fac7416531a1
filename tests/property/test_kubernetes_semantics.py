# SPDX-License-Identifier: Apache-2.0
"""Manifests to verdicts: reading, translation and the model against an oracle that judges NetworkPolicy from the YAML alone."""

from __future__ import annotations

from ipaddress import ip_address

import hypothesis.strategies as st
import yaml
from hypothesis import given, settings
from kubernetes_oracle import Cluster
from manifests import Manifest, clusters, pairs, probes_between

from netpol_ebpf.model import ReferenceModel
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import (
    ICMP,
    ICMPV6,
    SCTP,
    TCP,
    UDP,
    CauseKind,
    Direction,
    EndpointKey,
    Outcome,
    Packet,
    Question,
    Stage,
)  # fmt: skip
from netpol_ebpf.resources.load import parse_documents

PROTOCOLS = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}


def _packet(probe: tuple[str, str, str, int]) -> Packet:
    source, destination, protocol, port = probe
    if protocol == "ICMP":
        number = ICMPV6 if ":" in source else ICMP
        return Packet(ip_address(source), ip_address(destination), number, icmp_type=128 if ":" in source else 8)
    return Packet(ip_address(source), ip_address(destination), PROTOCOLS[protocol], 40000, port)


@settings(max_examples=3 * settings().max_examples)
@given(clusters(), st.lists(pairs(), min_size=3, max_size=3))
def test_network_policy(manifests: list[Manifest], between: list[tuple[str, str]]) -> None:
    """Both ends of every connection are judged as the API documentation says, and the cause is of the right sort."""
    resources = parse_documents(yaml.safe_dump_all(manifests, sort_keys=False), "cluster.yaml").check()
    model, cluster = ReferenceModel(derive(resources)), Cluster(manifests)
    for pair in between:
        for direction, address in ((Direction.EGRESS, pair[0]), (Direction.INGRESS, pair[1])):
            pod = cluster.pod_at(address)
            if pod is None:
                continue
            key = EndpointKey("Pod", pod["metadata"]["namespace"], pod["metadata"]["name"])
            for probe in probes_between(*pair):
                verdict = model.decide(Question(key, direction, Stage.NORMAL, _packet(probe)))
                allowed = cluster.is_allowed(pod, direction.value.capitalize(), probe)
                assert verdict.outcome is (Outcome.ALLOW if allowed else Outcome.DENY), (probe, direction, verdict)
                kinds = {CauseKind.RULE, CauseKind.PROFILE} if allowed else {CauseKind.TIER_END}
                assert verdict.cause.kind in kinds
