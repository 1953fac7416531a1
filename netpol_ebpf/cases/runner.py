# SPDX-License-Identifier: Apache-2.0
"""Runs cases on one engine or on several, and reports the probes with an unexpected verdict.

Invariants: every requested engine evaluates every probe of every valid case. If engines disagree on a question of a
probe's journey, the probe fails, whatever its expected verdict. The steps of a sequence are loaded one after the other,
in order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from netpol_ebpf.cases.answers import DnsAnswer, DomainName
from netpol_ebpf.cases.case import Case, InvalidCase, LoadedCases, Probe
from netpol_ebpf.cases.engines import ENGINES, Engine, open_engine
from netpol_ebpf.errors import InvalidInputError, NetpolError
from netpol_ebpf.policy.journey import (
    Finding,
    Flow,
    FlowEnd,
    FlowEndKind,
    HopReason,
    Journey,
    JourneyHop,
    Topology,
    walk,
)
from netpol_ebpf.policy.learned_names import LearnedNames
from netpol_ebpf.policy.services import ServiceAddresses, Translation
from netpol_ebpf.policy.translate import derive, key_of
from netpol_ebpf.policy.types import (
    ICMP,
    ICMPV6,
    IPV6_HEADERS,
    PORT_PROTOCOLS,
    EndpointKey,
    IPAddress,
    Packet,
    PolicySettings,
    Question,
    Verdict,
    World,
)
from netpol_ebpf.resources.types import Pod, Resource, WorkloadEndpoint

DEFAULT_SOURCE_PORT = 40000
"""The source port of a test packet for which the case gives none; an arbitrary ephemeral port."""

NOT_JUDGED = "not-judged"
"""The slug of the kernel engine's NotJudgedError. Importing the class would need BCC, which other engines do not
need."""

ECHO_REQUEST = {ICMP: 8, ICMPV6: 128}


@dataclass(frozen=True, slots=True)
class Failure:
    """A probe with an unexpected verdict, or a probe on which engines disagree.

    ``probe``: its mapping in the case file. ``got``: "allow", "deny", or a text that says why there is no common
    verdict. ``rule``: the cause of the verdict as text.
    """

    case: str
    probe: Mapping[str, Any]
    expected: str
    got: str
    rule: str
    location: str


@dataclass(frozen=True, slots=True)
class Judged:
    """The result of one probe. The fields are those of `Failure`."""

    case: str
    probe: Mapping[str, Any]
    got: str
    rule: str


@dataclass(slots=True)
class CaseResults:
    """The results of a run. ``cases``, ``probes``: the numbers of cases and probes that were run."""

    cases: int = 0
    probes: int = 0
    failed: list[Failure] = field(default_factory=list)
    invalid: list[InvalidCase] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The results as plain values for JSON. Field names never change between versions."""
        return {
            "cases": self.cases,
            "probes": self.probes,
            "failed": [
                {
                    "case": failure.case,
                    "probe": dict(failure.probe),
                    "expected": failure.expected,
                    "got": failure.got,
                    "rule": failure.rule,
                }
                for failure in self.failed
            ],
            "invalid": [{"case": invalid.case, "error": invalid.error} for invalid in self.invalid],
        }


def run_cases(loaded: LoadedCases, engine: str = "model", settings: PolicySettings | None = None) -> CaseResults:
    """Run all cases on one engine of `ENGINES`, or on all engines if ``engine`` is "all"."""
    report = CaseResults(invalid=list(loaded.invalid))
    names = ENGINES if engine == "all" else (engine,)
    with contextlib.ExitStack() as stack:
        engines = {name: stack.enter_context(open_engine(name)) for name in names}
        for case in in_order(loaded.cases):
            _run_case(case, engines, settings, report)
    return report


def in_order(cases: Sequence[Case]) -> Iterator[Case]:
    """The cases in the order in which they must run.

    The cases keep the given order, with one exception: all steps of a sequence run one after the other, by step number,
    at the position of the step that was given first.
    """
    groups: dict[str, list[Case]] = {}
    for case in cases:
        if case.sequence is not None:
            groups.setdefault(case.sequence[0], []).append(case)
    for case in cases:
        if case.sequence is None:
            yield case
        else:
            yield from sorted(groups.pop(case.sequence[0], ()), key=_step)


def _step(case: Case) -> int:
    return case.sequence[1] if case.sequence is not None else 0


def _run_case(case: Case, engines: Mapping[str, Engine], settings: PolicySettings | None, report: CaseResults) -> None:
    world = derive(case.resources, settings)
    cast = Cast(case.resources, world)
    try:
        journeys = [(probe, _journeys(cast, probe, case.answers)) for probe in case.probes]
        for engine in engines.values():
            engine.load(world, {name for answer in case.answers for name in answer.names})
    except InvalidInputError as error:
        report.invalid.append(InvalidCase(case.name, error.message))
        return
    report.cases += 1
    for probe, variants in journeys:
        report.probes += 1
        outcomes = [_judge(journey, engines) for journey in variants]
        expected = "allow" if probe.expect_allow else "deny"
        got, rule = next((outcome for outcome in outcomes if outcome[0] != expected), outcomes[0])
        report.judged.append(Judged(case.name, probe.written, got, rule))
        if got != expected:
            report.failed.append(Failure(case.name, probe.written, expected, got, rule, str(probe.location)))


def _journeys(cast: Cast, probe: Probe, answers: Sequence[DnsAnswer]) -> list[Journey]:
    """The journeys of a probe of a case, with the names that endpoints know at the time of the probe.

    A probe to a name has the journeys to all addresses of the name's answers, whoever got them and when.
    """
    learned = cast.learned(answers, probe.at_s)
    if not isinstance(probe.destination, DomainName):
        return list(cast.journeys(probe, learned))
    name = probe.destination.name
    addresses = dict.fromkeys(address for one in answers if name in one.names for address in one.addresses)
    return [journey for each in cast.resolved(probe, tuple(addresses)) for journey in cast.journeys(each, learned)]


def _judge(journey: Journey, engines: Mapping[str, Engine]) -> tuple[str, str]:
    """The verdict on a journey as text, and its cause. If engines disagree, the text has the verdict of each engine."""
    findings: dict[str, Finding] = {}
    verdicts: dict[str, list[Verdict]] = {}
    questions = list(dict.fromkeys(journey.questions()))
    for name, engine in engines.items():
        answers: dict[Question, Verdict] = {}
        try:
            for question in questions:
                answers[question] = engine.decide(question)
        except NetpolError as error:
            # The program decides some packets without policy.  A journey has no question about such packets, so this
            # is a disagreement.  Like a fault of the engine, it is reported for the probe and does not end the run.
            if error.slug not in (NOT_JUDGED, NetpolError.slug):
                raise
            return f"not judged by {name}", f"{_where(questions[len(answers)])}: {error.message}"
        findings[name] = walk(journey, answers.__getitem__)
        verdicts[name] = list(answers.values())
    first = next(iter(engines))
    if all(answers == verdicts[first] for answers in verdicts.values()):
        return _word(findings[first]), f"{findings[first]}{_backend(journey)}"
    got = ", ".join(f"{name}: {_word(finding)}" for name, finding in findings.items())
    return f"engines disagree ({got})", _disagreement(questions, verdicts)


def _backend(journey: Journey) -> str:
    """The backend of the journey as a text to append to a sentence; "" if no node translates the destination."""
    if journey.flow.dnat_to is None:
        return ""
    address, port = journey.flow.dnat_to
    return f" (to {f'[{address}]' if address.version == 6 else address}:{port})"  # noqa: PLR2004 - the IP version


def _word(finding: Finding) -> str:
    return "allow" if finding.allowed else "deny"


def _disagreement(questions: list[Question], verdicts: dict[str, list[Verdict]]) -> str:
    """Render the first question on which the engines differ, with the verdict of each engine."""
    for index, question in enumerate(questions):
        answers = {name: given[index] for name, given in verdicts.items()}
        if len({*answers.values()}) > 1:
            return f"{_where(question)}: " + "; ".join(
                f"{name}: {_in_full(verdict)}" for name, verdict in answers.items()
            )
    raise AssertionError("called only where engines differ")


def _where(question: Question) -> str:
    return f"{question.endpoint} {question.direction.value} {question.stage.value}"


def _in_full(verdict: Verdict) -> str:
    text = f"{verdict.outcome.value} by {verdict.cause}"
    if (verdict.staged_outcome, verdict.staged_cause) != (verdict.outcome, verdict.cause):
        text += f", staged {verdict.staged_outcome.value} by {verdict.staged_cause}"
    if verdict.logs:
        text += ", logged by " + " and ".join(map(str, verdict.logs))
    return text


# --- from probes to packets -------------------------------------------------------------------------------------------


class Cast:
    """Resolves the names and addresses of probes, and makes the journeys of their packets."""

    def __init__(
        self,
        resources: Collection[Resource],
        world: World,
        *,
        borrow_sources: bool = False,
        topology: Topology | None = None,
    ) -> None:
        """Resolve by the objects ``resources`` of ``world``.

        ``borrow_sources``: workloads may send from their allowed source prefixes. ``topology``: a topology with more
        facts than the world has; None: the topology of the world.
        """
        self._topology = Topology(world) if topology is None else topology
        self._borrowers = [one for one in world.endpoints.values() if borrow_sources and one.allowed_sources]
        self._services = ServiceAddresses(world.vips, resources)
        self._vips = frozenset(key.address for key in world.vips if key.address is not None)
        self._named: dict[tuple[str, str], tuple[IPAddress, ...]] = {}
        self._host_network: dict[tuple[str, str], FlowEnd] = {}
        self._host_addresses: dict[IPAddress, FlowEnd] = {}
        for resource in resources:
            if not isinstance(resource, (Pod, WorkloadEndpoint)):
                continue
            key = (resource.meta.namespace, resource.meta.name)
            if isinstance(resource, Pod) and resource.host_network:
                place = FlowEnd(FlowEndKind.HOST, node=resource.node or f"(the node of pod {key[0]}/{key[1]})")
                self._host_network[key] = place
                for address in resource.addresses:
                    self._host_addresses.setdefault(address, place)
            if isinstance(resource, Pod) or key not in self._named:
                self._named[key] = self._addresses_of(resource, world)

    @staticmethod
    def _addresses_of(resource: Pod | WorkloadEndpoint, world: World) -> tuple[IPAddress, ...]:
        """The addresses that the world gives to a workload. A contested address may belong to another workload."""
        if isinstance(resource, Pod) and resource.host_network:
            return resource.addresses
        endpoint = world.endpoints.get(EndpointKey(*key_of(resource)))
        return () if endpoint is None else endpoint.addresses

    def learners(self, client: IPAddress | tuple[str, str] | None) -> Collection[EndpointKey | None]:
        """The endpoints that learn from an answer to ``client``. (None,), which stands for all endpoints, if it is None.

        An answer to a host teaches the host endpoint of the interface to which the client's address belongs. Raises
        InvalidInputError if ``client`` is no workload and no host.
        """
        if client is None:
            return (None,)
        if isinstance(client, tuple) and client not in self._named:
            raise InvalidInputError(f"{client[0]}/{client[1]}, which asks for a name, does not exist")
        learners: set[EndpointKey | None] = set()
        for address in self._named[client] if isinstance(client, tuple) else (client,):
            place = self._place(client, address) or self._topology.locate(address)
            if place.kind is FlowEndKind.WORKLOAD:
                learners.add(place.endpoint)
            elif place.kind is FlowEndKind.HOST and place.node is not None:
                host = self._topology.uplink(place.node, address, address.version)
                learners |= set() if host is None else {host.key}
            else:
                raise InvalidInputError(f"{address}, which asks for a name, is the address of no workload and no host")
        return learners

    def is_outside(self, address: IPAddress) -> bool:
        """Whether an address is that of no workload, host, service and pod of a host's network."""
        is_known = address in self._host_addresses or self._topology.locate(address).kind is not FlowEndKind.OUTSIDE
        return not is_known and address not in self._vips

    def learned(self, answers: Iterable[DnsAnswer], at_s: float | None) -> LearnedNames:
        """The names that endpoints know at a time. ``at_s``: see `DnsAnswer.is_valid`."""
        learned = LearnedNames()
        for answer in answers:
            for learner in self.learners(answer.client) if answer.is_valid(at_s) else ():
                for address in answer.addresses:
                    learned.learn(learner, answer.names, address)
        return learned

    def resolved(self, probe: Probe, addresses: Sequence[IPAddress]) -> list[Probe]:
        """The probe to each of ``addresses`` instead of its destination, as far as the sender has their family.

        Raises InvalidInputError if no address has a family of the sender.
        """
        versions = {address.version for address in self._addresses(probe.source, probe)}
        found = [replace(probe, destination=address) for address in addresses if address.version in versions]
        if not found:
            raise InvalidInputError(
                f"{probe.location}: no DNS answer has an address for the probe's destination in a family of its sender"
            )
        return found

    def journeys(self, probe: Probe, learned: LearnedNames | None = None) -> Iterator[Journey]:
        """The journeys of a probe: one for each common address family, possible sender, and backend of the service.

        ``learned``: the names that endpoints know. A probe to a domain name must have been `resolved`.

        Raises InvalidInputError if a name does not exist, the two ends have no address family in common, the protocol
        is an IPv6 extension header, or the backends of a service are unknown.
        """
        for journey in self._journeys(probe):
            yield journey if learned is None else learned.apply_to(journey)

    def _journeys(self, probe: Probe) -> Iterator[Journey]:
        if isinstance(probe.destination, DomainName):
            raise AssertionError("the probe is not resolved")  # noqa: TRY004 - a fault of the caller
        sources, destinations = self._addresses(probe.source, probe), self._addresses(probe.destination, probe)
        versions = sorted({address.version for address in sources} & {address.version for address in destinations})
        if probe.dnat_to is not None:
            versions = [version for version in versions if version == probe.dnat_to[0].version]
        if len(versions) > 1 and probe.protocol in (ICMP, ICMPV6):
            versions = [version for version in versions if (version == 4) == (probe.protocol == ICMP)]  # noqa: PLR2004
        if not versions:
            raise InvalidInputError(f"{probe.location}: the two ends of the probe have no address family in common")
        if probe.protocol in IPV6_HEADERS:
            versions = [version for version in versions if version == 4]  # noqa: PLR2004
        if not versions:
            raise InvalidInputError(
                f"{probe.location}: protocol {probe.protocol} over IPv6 is a header before what a packet carries, so no packet "
                "can be built of it alone",
                hint="Name the protocol that the packet carries: policy judges that one.",
            )
        for version in versions:
            source = next(address for address in sources if address.version == version)
            destination = next(address for address in destinations if address.version == version)
            packet = _packet(probe, source, destination)
            flow = Flow(
                packet, _translation(probe, packet), self._place(probe.source, source), self._end(probe, destination)
            )
            service = self.service_of(flow)
            if service is not None and not service.backends:
                raise InvalidInputError(
                    f"{probe.location}: nothing is known to be behind {' and '.join(service.owners)} at {destination} port "
                    f"{packet.destination_port}",
                    hint="Name a backend, or give the EndpointSlices of the service or the pods that it selects.",
                )
            for sender in self._senders(probe.source, source):
                each = flow if sender is None else replace(flow, source=sender)
                yield from [self._topology.plan(each)] if service is None else self._journeys_to(each, service)

    def _senders(self, end: IPAddress | tuple[str, str], address: IPAddress) -> Iterator[FlowEnd | None]:
        """The possible senders of a packet from ``address``. None stands for the owner of the address.

        The other senders are workloads that have the address in their allowed source prefixes. ``end``: the source of
        the probe; a workload named there is the only sender.
        """
        yield None
        for one in self._borrowers if not isinstance(end, tuple) else ():
            if address not in one.addresses and any(address in net for net in one.allowed_sources):
                yield FlowEnd(FlowEndKind.WORKLOAD, one.key, one.node)

    def service_of(self, flow: Flow) -> Translation | None:
        """The service that translates a flow's destination, None if no service has this destination.

        The result is also None if the flow already states its backend in ``dnat_to``, or if a process of the node has bound
        the destination.
        """
        found = self._service_at(flow)
        return None if found is None or self._topology.is_bound(flow) else found

    def bound_service(self, flow: Flow) -> Translation | None:
        """The service with a flow's destination, if a process of the node has bound that address and port; else None."""
        found = self._service_at(flow)
        return found if found is not None and self._topology.is_bound(flow) else None

    def _service_at(self, flow: Flow) -> Translation | None:
        place = flow.destination or self._topology.locate(flow.packet.destination)
        if flow.dnat_to is not None or place.kind is FlowEndKind.WORKLOAD:
            return None
        return self._services.find(flow.packet, place.node if place.kind is FlowEndKind.HOST else None)

    def _journeys_to(self, flow: Flow, service: Translation) -> Iterator[Journey]:
        """One journey for each backend of a service.

        A backend can be a process of the node that translates. Then policy evaluates a packet to any other backend also
        as a packet to this process. If several backends are processes of that node, the result is
        `HopReason.LOCAL_BACKENDS`.
        """
        journeys = []
        for backend in service.backends:
            place = self._place(backend[0], backend[0])
            journeys.append(self._topology.plan(replace(flow, dnat_to=backend, destination=place)))
        ends = [self._topology.translation(journey.flow) for journey in journeys]
        own = [
            journey
            for journey, (node, end) in zip(journeys, ends, strict=True)
            if end.kind is FlowEndKind.HOST and end.node == node and self._is_policed_at(flow, node)
        ]
        for journey in journeys:
            if len(own) > 1:
                yield replace(journey, hops=(JourneyHop(reason=HopReason.LOCAL_BACKENDS),))
            elif own and journey is not own[0]:
                yield replace(journey, hops=(*own[0].hops, *journey.hops))
            else:
                yield journey

    def _is_policed_at(self, flow: Flow, node: str | None) -> bool:
        """Whether a flow passes a hook on the translating node before the translation.

        That is so if a workload of that node sends the flow, or if the flow enters the node by an interface with a host
        endpoint.
        """
        source = flow.source or self._topology.locate(flow.packet.source)
        if source.node == node:
            return source.kind is FlowEndKind.WORKLOAD
        return node is not None and self._topology.uplink(node, None, flow.packet.source.version) is not None

    def _addresses(self, end: IPAddress | tuple[str, str], probe: Probe) -> tuple[IPAddress, ...]:
        if not isinstance(end, tuple):
            return (end,)
        addresses = self._named.get(end)
        if addresses is None:
            raise InvalidInputError(
                f"{probe.location}: the probe names the pod {end[0]}/{end[1]}, which does not exist"
            )
        if not addresses:
            raise InvalidInputError(
                f"{probe.location}: the probe names the pod {end[0]}/{end[1]}, which has no address in force"
            )
        return addresses

    def _end(self, probe: Probe, destination: IPAddress) -> FlowEnd | None:
        """The flow's destination after translation. None means: the owner of the destination address."""
        if probe.dnat_to is not None:
            return self._place(probe.dnat_to[0], probe.dnat_to[0])
        return self._place(probe.destination, destination)

    def _place(self, end: IPAddress | tuple[str, str] | DomainName, address: IPAddress) -> FlowEnd | None:
        """The end of a flow if the address alone does not determine it. None means: the owner of the address."""
        if isinstance(end, tuple):
            return self._host_network.get(end)
        if self._topology.locate(address).kind is FlowEndKind.OUTSIDE:
            return self._host_addresses.get(address)
        return None


def _packet(probe: Probe, source: IPAddress, destination: IPAddress) -> Packet:
    if probe.protocol in PORT_PROTOCOLS:
        source_port = DEFAULT_SOURCE_PORT if probe.source_port is None else probe.source_port
        return Packet(source, destination, probe.protocol, source_port, probe.port or 0)
    if (probe.protocol, source.version) in ((ICMP, 4), (ICMPV6, 6)):
        icmp_type = ECHO_REQUEST[probe.protocol] if probe.icmp_type is None else probe.icmp_type
        return Packet(source, destination, probe.protocol, icmp_type=icmp_type, icmp_code=probe.icmp_code or 0)
    return Packet(source, destination, probe.protocol)


def _translation(probe: Probe, packet: Packet) -> tuple[IPAddress, int] | None:
    if probe.dnat_to is None:
        return None
    address, port = probe.dnat_to
    return address, port or packet.destination_port
