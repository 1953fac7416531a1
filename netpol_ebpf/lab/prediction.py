# SPDX-License-Identifier: Apache-2.0
"""The predicted outcome of an attempt: the reference model's verdict on the packet of the attempt.

Invariant: this module shares no code with the compiler, the tables or the eBPF program, so an error there does not
appear in the prediction. If a laboratory's connections agree with the prediction, they follow the policies of the
manifests.
"""

from __future__ import annotations

from collections.abc import Iterable

from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.topology import ICMP, ICMPV6, Plan
from netpol_ebpf.model.reference import ReferenceModel
from netpol_ebpf.policy.journey import Finding, Flow, Topology, walk
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import Direction, EndpointKey, Packet, Policy, Staged
from netpol_ebpf.resources.types import Resource

SOURCE_PORT = 40000  # arbitrary, because the kernel chooses the port; so rules on source ports cannot be predicted
ECHO_REQUEST = {ICMP: 8, ICMPV6: 128}


class Prediction:
    """Predicts which connection attempts succeed between the hosts of a laboratory with given manifests and plan."""

    def __init__(self, resources: Iterable[Resource], plan: Plan) -> None:
        self._world = derive(resources)
        self._plan = plan
        self._model = ReferenceModel(self._world)
        self._topology = Topology(self._world)

    def reached(self, attempt: Attempt) -> bool:
        """Whether policy allows the attempt at every endpoint that its packets pass."""
        return self.finding(attempt).allowed

    def finding(self, attempt: Attempt) -> Finding:
        """The reference model's verdict on the attempt, with its cause.

        Raises StopIteration if the source has no address of the destination's family.
        """
        return walk(self._topology.plan(Flow(self._packet(attempt))), self._model.decide)

    def policies_at(self, endpoint: EndpointKey, direction: Direction) -> list[Policy]:
        """The enforced policies that apply to an endpoint in ``direction``, in evaluation order."""
        labels = self._world.endpoints[endpoint].labels
        tiers = {tier.name: place for place, tier in enumerate(self._world.sorted_tiers())}
        found = [
            policy
            for policy in self._world.policies.values()
            if policy.staged is Staged.NO and direction in policy.types and policy.subject.matches(labels)
        ]
        return sorted(found, key=lambda policy: (tiers[policy.tier], policy.sort_key))

    def _packet(self, attempt: Attempt) -> Packet:
        destination = attempt.destination
        addresses = self._plan.hosts[attempt.source].addresses
        source = next(address for address in addresses if address.version == destination.version)
        if attempt.protocol in ECHO_REQUEST:
            return Packet(source, destination, attempt.protocol, icmp_type=ECHO_REQUEST[attempt.protocol])
        source_port = attempt.source_port or SOURCE_PORT
        return Packet(source, destination, attempt.protocol, source_port, attempt.port)
