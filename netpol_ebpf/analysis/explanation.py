# SPDX-License-Identifier: Apache-2.0
"""The evaluation behind `netpolctl explain`: whether policy allows one connection, and which rule decides.

The command uses this module for manifest files; the agent uses it for the objects in force. Invariant: for the same
objects both give the same result. This module needs neither root nor a kernel, and opens no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

from netpol_ebpf.analysis.names import rules_for, stand_ins
from netpol_ebpf.cases.answers import DomainName, parse_name
from netpol_ebpf.cases.case import Probe
from netpol_ebpf.cases.engines import Engine
from netpol_ebpf.cases.runner import Cast
from netpol_ebpf.errors import Location, UsageError
from netpol_ebpf.policy.journey import Finding, HopReason, Journey, walk
from netpol_ebpf.policy.learned_names import LearnedNames
from netpol_ebpf.policy.provenance import trace
from netpol_ebpf.policy.services import Translation
from netpol_ebpf.policy.types import PORT_PROTOCOLS, Direction, IPAddress, Outcome, Packet, Question, World

ENGINES = ("model", "tables")
"""The names of the engines that `explain` can use: the reference model, and the compiled tables."""
WHERE = Location("the question")
_NUMBERS = {"port": 65535, "source_port": 65535, "icmp_type": 255, "icmp_code": 255}
"""The optional numeric fields of a request. Each field name maps to its largest allowed value."""

Ways = list[dict[str, Any]]


UNKNOWN_ADDRESS = (
    "no address of this name is known here, so the answer is for an address that no endpoint and no node has and that no CIDR of a "
    "rule contains; if the real address is in such a CIDR, rules with that CIDR count too"
)


def explain(
    cast: Cast,
    world: World,
    probe: Probe,
    engine: Engine,
    check: Callable[[Journey], None] | None = None,
    learned: LearnedNames | None = None,
) -> Ways:
    """Evaluate every path that the probe's packets may take; returns a result of `describe` for each path.

    There is one path for each address family, backend and possible sender; for a probe to a domain name also for each
    address that its sender knows for the name. If the sender knows none, an address that is in no net of the policies
    stands for it. ``engine``: an engine that has loaded ``world``. ``check``: a function that raises an error if the
    objects do not determine a journey. ``learned``: the names that endpoints know. Raises InvalidInputError for unknown
    names, and for probes whose verdict the objects do not determine.
    """
    if isinstance(probe.destination, DomainName):
        return _explain_name(cast, world, probe, probe.destination.name, engine, check, learned)
    return _explain(cast, world, probe, engine, check, learned)


def _explain(
    cast: Cast,
    world: World,
    probe: Probe,
    engine: Engine,
    check: Callable[[Journey], None] | None,
    learned: LearnedNames | None,
) -> Ways:
    journeys = list(cast.journeys(probe, learned))
    for journey in journeys if check is not None else ():
        check(journey)  # type: ignore[misc]  # it is not None
    return [describe(cast, world, journey, engine) for journey in journeys]


def _explain_name(
    cast: Cast,
    world: World,
    probe: Probe,
    name: str,
    engine: Engine,
    check: Callable[[Journey], None] | None,
    learned: LearnedNames | None,
) -> Ways:
    """Evaluate the paths to a domain name: to its known addresses, else to the addresses that stand for one."""
    learners = sorted(one for one in cast.learners(probe.source) if one is not None)
    known = {} if learned is None else dict.fromkeys(a for one in learners for a in learned.addresses(one, name))
    substitutes: tuple[IPAddress, ...] = ()
    if not known:
        substitutes, learned = stand_ins(world, cast.is_outside), LearnedNames()
        for address in substitutes:
            learned.learn(None, (name,), address)
    rules = [one | {"endpoint": str(learner)} for learner in learners for one in rules_for(world, learner, name)]
    of_name = {"name": name, "address_known": bool(known), "named_rules": rules}
    probes = cast.resolved(probe, tuple(known) or substitutes)
    ways = [way | of_name for each in probes for way in _explain(cast, world, each, engine, check, learned)]
    for way in ways if substitutes else ():
        way["note"] = UNKNOWN_ADDRESS
        for part in (way, *way["steps"]):
            if part.get("destination") in map(str, substitutes):
                part["destination"] = name
    return ways


def describe(cast: Cast, world: World, journey: Journey, engine: Engine) -> dict[str, Any]:
    """Evaluate one journey with ``engine``; returns the result as plain values for JSON.

    The field ``steps`` has the verdict of each endpoint, in the order in which the packet meets the endpoints.
    """
    finding = walk(journey, engine.decide)
    flow, packet = journey.flow, journey.flow.packet
    decided, question = finding.cause, finding.question
    written = replace(flow, dnat_to=None, destination=None)
    service, bound = cast.service_of(written), cast.bound_service(written)
    return {
        "source": str(packet.source),
        "destination": str(packet.destination),
        "protocol": packet.protocol,
        "port": packet.destination_port if packet.protocol in PORT_PROTOCOLS else None,
        "backend": None if flow.dnat_to is None else {"address": str(flow.dnat_to[0]), "port": flow.dnat_to[1]},
        "service": [] if service is None else list(service.owners),
        "allowed": finding.allowed,
        "staged_allowed": finding.staged_allowed,
        "decided_by": _reason_step(decided)
        if isinstance(decided, HopReason)
        else trace(world, decided, question).as_dict(),
        "note": _note(journey, finding, engine) if bound is None else _bound_note(packet, bound),
        "steps": list(_steps(world, journey, finding)),
        "name": None,
        "address_known": True,
        "named_rules": [],
    }


def _steps(world: World, journey: Journey, finding: Finding) -> Iterator[dict[str, Any]]:
    for hop in journey.hops:
        if hop.reason is not None:
            yield _reason_step(hop.reason)
            continue
        for question, verdict in finding.answers:
            if question in hop.questions or question in hop.reply:
                yield {
                    "endpoint": str(question.endpoint),
                    "direction": question.direction.value,
                    "stage": question.stage.value,
                    "destination": str(question.packet.destination),
                    "port": question.packet.destination_port if question.packet.protocol in PORT_PROTOCOLS else None,
                    "verdict": verdict.outcome.value,
                    **trace(world, verdict.cause, question).as_dict(),
                    "logs": [trace(world, cause).as_dict() for cause in verdict.logs],
                    "staged_verdict": verdict.staged_outcome.value,
                    "staged": trace(world, verdict.staged_cause, question).as_dict(),
                }


def _reason_step(reason: HopReason) -> dict[str, Any]:
    return {
        "endpoint": None, "direction": None, "stage": None, "verdict": "allow" if reason.allows else "deny",
        "kind": "no policy", "sentence": reason.value, "file": None, "line": None, "tier": None, "policy": None,
        "rule": None, "names": [], "logs": [],
    }  # fmt: skip


def _note(journey: Journey, finding: Finding, engine: Engine) -> str | None:
    """The text of a note if the sender's policy denies the backend although it allows the service's address; else None.

    Users often expect that a rule for the service's address applies, but policy evaluates the backend's address.
    """
    question = finding.question
    written = journey.flow.packet
    if journey.flow.dnat_to is None or question is None or question.direction is not Direction.EGRESS:
        return None
    if question.packet == written:
        return None
    of_service: Question = replace(question, packet=written, names=frozenset())
    says = engine.decide(of_service).outcome
    if finding.allowed or says is not Outcome.ALLOW:
        return None
    address, port = journey.flow.dnat_to
    return (
        f"policy allows {written.destination} port {written.destination_port}, the service's own address; "
        f"what is judged is the backend, {address} port {port}"
    )


def _bound_note(packet: Packet, service: Translation) -> str:
    return (
        f"a process of this node has bound {packet.destination} port {packet.destination_port}, an address of "
        f"{', '.join(service.owners)}: what is judged is that address, and no backend"
    )


# --- questions ----------------------------------------------------------------------------------------------------------


def parse_end(text: str) -> IPAddress | tuple[str, str]:
    """Parse one end of a connection: an IP address, or ``namespace/name`` of a workload. Raises ValueError."""
    namespace, slash, name = text.partition("/")
    if slash and namespace and name and "/" not in name:
        return namespace, name
    return ip_address(text)


def parse_destination(text: str) -> IPAddress | tuple[str, str] | DomainName:
    """Parse the destination of a connection: an end as in `parse_end`, or a domain name. Raises ValueError.

    A name without a dot inside is refused, because it would be looked up in the search domains of the sender.
    """
    name = parse_name(text) if "." in text.removesuffix(".") else None
    return parse_end(text) if name is None else DomainName(name)


def names_of(probe: Probe) -> tuple[str, ...]:
    """The domain names for which an engine must be loaded to answer about ``probe`` (`Engine.load`)."""
    return (probe.destination.name,) if isinstance(probe.destination, DomainName) else ()


def as_request(probe: Probe) -> dict[str, Any]:
    """Encode a probe as the ``explain`` request that netpolctl sends to the agent."""
    to = probe.destination.name if isinstance(probe.destination, DomainName) else probe.destination
    ends = {"source": probe.source, "destination": to}
    return {
        **{name: "/".join(end) if isinstance(end, tuple) else str(end) for name, end in ends.items()},
        "protocol": probe.protocol,
        **{name: getattr(probe, name) for name in _NUMBERS},
    }


def parse_request(request: Mapping[str, Any]) -> Probe:
    """Decode a request that `as_request` encoded. Raises UsageError for any other value."""
    try:
        source, destination = parse_end(request["source"]), parse_destination(request["destination"])
    except (KeyError, ValueError, AttributeError) as error:
        raise UsageError(
            "source and destination must each be NAMESPACE/POD or an address; the destination may be a domain name"
        ) from error
    protocol = _number(request, "protocol", 255)
    port, source_port, icmp_type, icmp_code = (_number(request, name, most) for name, most in _NUMBERS.items())
    if protocol is None or (protocol in PORT_PROTOCOLS) != (port is not None):
        raise UsageError("a protocol is needed, and a port for TCP, UDP and SCTP, and only for those")
    return Probe(
        source=source, destination=destination, protocol=protocol, expect_allow=True, port=port, source_port=source_port,
        icmp_type=icmp_type, icmp_code=icmp_code, location=WHERE,
    )  # fmt: skip


def _number(request: Mapping[str, Any], name: str, most: int) -> int | None:
    """The integer in the field ``name`` of a request, None if the field is absent.

    Raises UsageError if the value is not an integer from 0 to ``most``.
    """
    number = request.get(name)
    if number is not None and not (type(number) is int and 0 <= number <= most):
        raise UsageError(f"{name} must be a number of 0 to {most}")
    return number


def parse_engine(request: Mapping[str, Any]) -> str:
    """The name of the engine in a request, "model" if the request names none. Raises UsageError for an unknown name."""
    engine = request.get("engine", ENGINES[0])
    if engine not in ENGINES:
        raise UsageError(f"engine must be one of {', '.join(ENGINES)}")
    return str(engine)
