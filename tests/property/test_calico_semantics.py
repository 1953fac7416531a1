# SPDX-License-Identifier: Apache-2.0
"""Manifests to verdicts: reading, translation and the model against an oracle that judges Calico policy from the YAML."""

from __future__ import annotations

from ipaddress import ip_address

import hypothesis.strategies as st
import yaml
from calico_manifests import calico_clusters, calico_pairs, calico_probes_between
from calico_oracle import NUMBERS, CalicoCluster, Probe
from hypothesis import given, settings
from manifests import Manifest

from netpol_ebpf.model import ReferenceModel
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import Cause, CauseKind, Direction, EndpointKey, Packet, Question, Stage
from netpol_ebpf.resources.load import parse_documents


def _probe(drawn: tuple[str, str, str, int, int]) -> Probe:
    source, destination, protocol, source_port, destination_port = drawn
    if protocol == "ICMP":
        number, icmp_type = (58, 128) if ":" in source else (1, 8)
        return Probe(source, destination, number, 0, 0, icmp_type)
    return Probe(source, destination, NUMBERS.get(protocol, 47), source_port, destination_port)


def _packet(probe: Probe) -> Packet:
    return Packet(
        ip_address(probe.source),
        ip_address(probe.destination),
        probe.protocol,
        probe.source_port,
        probe.destination_port,
        icmp_type=probe.icmp_type,
    )


def _decided_by(cause: Cause) -> str:
    if cause.kind is CauseKind.RULE and cause.policy is not None:
        return f"{cause.policy.name}/{cause.index}"
    if cause.kind is CauseKind.TIER_END:
        return f"{cause.tier}/end"
    if cause.kind is CauseKind.PROFILE:
        return f"{cause.profile}/{cause.index}"
    return ""


@settings(max_examples=2 * settings().max_examples)
@given(calico_clusters(), st.lists(calico_pairs(), min_size=2, max_size=2))
def test_calico_policy(manifests: list[Manifest], between: list[tuple[str, str, int]]) -> None:
    """Every endpoint judges every packet as the semantics say, by the rule, tier or profile they say."""
    resources = parse_documents(yaml.safe_dump_all(manifests, sort_keys=False), "cluster.yaml").check()
    model, cluster = ReferenceModel(derive(resources)), CalicoCluster(manifests)
    for probe in (_probe(drawn) for pair in between for drawn in calico_probes_between(*pair)):
        for owner in (*cluster.pods, *cluster.hosts):
            key = EndpointKey(owner.kind, owner.namespace, owner.name)
            # A host's traffic may be between any two others; a pod's is its own.
            stages = Stage if owner.kind == "HostEndpoint" else (Stage.NORMAL,)
            for direction, own in ((Direction.INGRESS, probe.destination), (Direction.EGRESS, probe.source)):
                if owner.kind == "Pod" and not owner.owns(own):
                    continue
                for stage in stages:
                    verdict = model.decide(Question(key, direction, stage, _packet(probe)))
                    seen = verdict.outcome.value, _decided_by(verdict.cause)
                    assert seen == cluster.decide(owner, direction.value, stage.value, probe), (probe, owner, stage)
