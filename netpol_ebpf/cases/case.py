# SPDX-License-Identifier: Apache-2.0
"""Parser of case files: the manifests of a cluster, and test packets (probes) with their expected verdicts.

Invariant: a case with any fault (in the YAML, a manifest or a probe) becomes one `InvalidCase` that lists all faults;
no engine runs such a case. `netpol_ebpf.cases.runner` resolves the names in probes and runs the cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netpol_ebpf.cases.answers import DnsAnswer, DomainName, parse_answers, parse_name, parse_time
from netpol_ebpf.errors import Location, Problem
from netpol_ebpf.policy.types import ICMP, ICMPV6, PORT_PROTOCOLS, UDPLITE, IPAddress
from netpol_ebpf.resources.load import parse_objects
from netpol_ebpf.resources.manifest_files import find_manifests, read_regular
from netpol_ebpf.resources.reader import ProblemReport, Reader
from netpol_ebpf.resources.syntax import parse_address
from netpol_ebpf.resources.types import Meta, Namespace, NetworkSet, Pod, Resource, WorkloadEndpoint
from netpol_ebpf.resources.workloads import as_cluster
from netpol_ebpf.resources.yamltree import Document, read_documents

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132, "UDPLITE": UDPLITE, "ICMP": ICMP, "ICMPV6": ICMPV6}

MAX_PROTOCOL = 255
MAX_PORT = 65535
MAX_ICMP = 255

_REMARKS = ("source", "notes", "tags", "confidence", "optional", "derived")
_PROBE_REMARKS = ("notes", "confidence", "optional", "derived", "tags")


@dataclass(frozen=True, slots=True)
class Probe:
    """A test packet, the first of a connection, and its expected verdict.

    ``source``, ``destination``: an address, or the (namespace, name) of a workload. ``port`` and the later fields are
    None if the file does not give them. ``dnat_to``: the backend's address and port after destination translation; port
    0: translation keeps the port. ``at_s``: seconds since the case began; None: after all DNS answers, none of which has
    expired. ``written``: the probe's mapping in the file.
    """

    source: IPAddress | tuple[str, str]
    destination: IPAddress | tuple[str, str] | DomainName
    protocol: int
    expect_allow: bool
    port: int | None = None
    source_port: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None
    dnat_to: tuple[IPAddress, int] | None = None
    at_s: float | None = None
    written: Mapping[str, Any] = field(default_factory=dict, hash=False)
    location: Location = Location("")


@dataclass(frozen=True, slots=True)
class Case:
    """A valid case.

    ``sequence``: (name, step number) if the case is one of several successive states of a cluster. ``answers``: the DNS
    answers that endpoints got.
    """

    name: str
    resources: tuple[Resource, ...]
    probes: tuple[Probe, ...]
    location: Location
    sequence: tuple[str, int] | None = None
    answers: tuple[DnsAnswer, ...] = ()


@dataclass(frozen=True, slots=True)
class InvalidCase:
    """A case that cannot be run. ``case``: the name of the case, or the name of its file if the case has no name."""

    case: str
    error: str


@dataclass(slots=True)
class LoadedCases:
    """The cases of files and directories. ``skipped``: paths of files, found in a directory, that contain no case."""

    cases: list[Case] = field(default_factory=list)
    invalid: list[InvalidCase] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def load_cases(paths: Iterable[Path]) -> LoadedCases:
    """Load the cases of each path in the given order. A directory stands for its YAML and JSON files by name.

    Hidden files in a directory are left out. A file that several paths lead to is loaded once.
    """
    loaded = LoadedCases()
    seen: set[Path] = set()
    for path in paths:
        is_searched = path.is_dir()
        for file in _files(path, loaded) if is_searched else [path]:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                _load_file(file, loaded, must_be_case=not is_searched)
    return loaded


def _files(directory: Path, loaded: LoadedCases) -> list[Path]:
    """The YAML and JSON files in a directory, sorted. A file that cannot be read becomes an `InvalidCase`."""
    try:
        names, refused = find_manifests(directory).readable()
    except OSError as error:
        names, refused = [], {"": error.strerror or str(error)}
    for name, reason in refused.items():
        file = str(directory / name)
        loaded.invalid.append(InvalidCase(file, f"{file}: cannot be read: {reason}"))
    return sorted(directory / name for name in names)


def _load_file(file: Path, loaded: LoadedCases, *, must_be_case: bool) -> None:
    try:
        text = (read_regular(file) if file.is_file() else file.read_bytes()).decode("utf-8")
    except (OSError, ValueError) as error:
        loaded.invalid.append(InvalidCase(str(file), f"{file}: cannot be read: {error}"))
        return
    parse_cases(text, str(file), loaded, must_be_case=must_be_case)


def parse_cases(text: str, file: str, loaded: LoadedCases, *, must_be_case: bool = True) -> None:
    """Add the cases in ``text`` to ``loaded``. ``must_be_case``: a text without a case is an error, not skipped."""
    problems: list[Problem] = []
    documents = list(read_documents(text, file, problems))
    if problems:
        loaded.invalid.append(InvalidCase(_name(documents) or file, _render(problems)))
        return
    if not must_be_case and not any(_is_case_like(document.value) for document in documents):
        loaded.skipped.append(file)
        return
    if not documents:
        loaded.invalid.append(InvalidCase(file, f"{file}: the file is empty"))
    for document in documents:
        problems = []
        case = _parse_case(document, problems)
        errors = [problem for problem in problems if problem.severity == "error"]
        if case is not None and not errors:
            loaded.cases.append(case)
        else:
            loaded.invalid.append(InvalidCase(_name([document]) or file, _render(errors)))


def _is_case_like(value: Any) -> bool:
    """Whether the author probably meant a document as a case: it has a field ``manifests`` or ``probes``."""
    return isinstance(value, Mapping) and ("manifests" in value or "probes" in value)


def _name(documents: list[Document]) -> str:
    values = [document.value for document in documents if isinstance(document.value, Mapping)]
    names = [value["name"] for value in values if isinstance(value.get("name"), str)]
    return names[0] if names else ""


def _render(problems: list[Problem]) -> str:
    return "\n".join(str(problem) for problem in problems)


def _parse_case(document: Document, problems: list[Problem]) -> Case | None:
    report = ProblemReport(document.positions, problems=problems)
    if not isinstance(document.value, Mapping):
        report.error((), "must be a case: a mapping with name, manifests and probes", slug="type")
        return None
    case = Reader(document.value, (), report)
    name = case.required_string("name")
    case.ignore(*_REMARKS)
    objects = case.list("manifests")
    parsed = parse_objects(
        ((value, document.positions.child(("manifests", index))) for index, value in enumerate(objects)), lenient=True
    )
    problems.extend(parsed.problems)
    if not case.has("manifests"):
        case.missing("manifests")
    answers = tuple(parse_answers(case))
    probes = tuple(probe for probe in _parse_probes(case) if probe is not None)
    if not case.list("probes"):
        case.error("probes", "a case needs at least one probe", slug="required")
    sequence = _parse_sequence(case)
    case.done()
    given = as_cluster(parsed.resources, addressed=True)
    resources = (*given, *_implied_namespaces(given))
    return Case(name, resources, probes, document.positions.location(), sequence, answers)


def _parse_sequence(case: Reader) -> tuple[str, int] | None:
    sequence = case.mapping("sequence")
    if sequence is None:
        return None
    group, step = sequence.required_string("group"), sequence.integer("step", 0, 1_000_000)
    if step is None:
        if not sequence.has("step"):
            sequence.missing("step")
        return None
    return group, step


def _implied_namespaces(resources: Iterable[Resource]) -> Iterator[Namespace]:
    """The namespaces of a case's pods and network sets for which the case has no Namespace object.

    The only label of each is ``kubernetes.io/metadata.name``.
    """
    given = {resource.meta.name for resource in resources if isinstance(resource, Namespace)}
    for resource in resources:
        namespace = resource.meta.namespace
        if isinstance(resource, (Pod, WorkloadEndpoint, NetworkSet)) and namespace and namespace not in given:
            given.add(namespace)
            labels = {"kubernetes.io/metadata.name": namespace}
            yield Namespace(Meta(namespace, "", labels, resource.meta.location))


# --- probes ---------------------------------------------------------------------------------------------------------


def _parse_probes(case: Reader) -> Iterator[Probe | None]:
    for index, value in enumerate(case.list("probes")):
        path = ("probes", index)
        if isinstance(value, Mapping):
            yield _parse_probe(Reader(value, path, case.report), dict(value))
        else:
            case.report.error(path, "must be a mapping with from, to, protocol and expect", slug="type")


def _parse_probe(probe: Reader, written: Mapping[str, Any]) -> Probe | None:
    source, destination = _parse_end(probe, "from"), _parse_destination(probe)
    protocol = _parse_protocol(probe)
    expect = probe.enum("expect", ("allow", "deny"), required=True)
    port, source_port = probe.integer("port", 0, MAX_PORT), probe.integer("srcPort", 0, MAX_PORT)
    icmp_type, icmp_code = probe.integer("icmpType", 0, MAX_ICMP), probe.integer("icmpCode", 0, MAX_ICMP)
    dnat_to, at_s = _parse_translation(probe), parse_time(probe)
    probe.ignore(*_PROBE_REMARKS)
    probe.done()
    if protocol is None or source is None or destination is None or expect is None:
        return None
    if protocol in PORT_PROTOCOLS and not probe.has("port"):
        probe.error("port", "TCP, UDP and SCTP probes need a destination port", slug="required")
    if protocol not in PORT_PROTOCOLS and protocol != UDPLITE:
        for name in ("port", "srcPort"):
            if probe.has(name):
                probe.error(name, f"protocol {protocol} has no ports; remove it", slug="inert")
    if protocol not in (ICMP, ICMPV6):
        for name in ("icmpType", "icmpCode"):
            if probe.has(name):
                probe.error(name, "only ICMP and ICMPv6 probes have it; remove it", slug="inert")
    return Probe(
        source=source,
        destination=destination,
        protocol=protocol,
        expect_allow=expect == "allow",
        port=port,
        source_port=source_port,
        icmp_type=icmp_type,
        icmp_code=icmp_code,
        dnat_to=dnat_to,
        at_s=at_s,
        written=written,
        location=probe.report.location(probe.path),
    )


def _parse_end(probe: Reader, key: str, other: str = "") -> IPAddress | tuple[str, str] | None:
    text = probe.required_string(key)
    namespace, slash, name = text.partition("/")
    if slash and namespace and name and "/" not in name:
        return namespace, name
    if text:
        try:
            return parse_address(text)
        except ValueError:
            probe.error(key, f'must be a pod as namespace/name or an IP address{other}; is "{text}"')
    return None


def _parse_destination(probe: Reader) -> IPAddress | tuple[str, str] | DomainName | None:
    """Parse the field ``to``, which may also be a domain name. A domain name needs a dot, so that a typo is no name."""
    text = probe.peek("to")
    name = parse_name(text) if isinstance(text, str) and "." in text.removesuffix(".") else None
    if name is None:
        return _parse_end(probe, "to", " or a domain name")
    probe.raw("to")
    return DomainName(name)


def _parse_protocol(probe: Reader) -> int | None:
    value = probe.raw("protocol")
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_PROTOCOL:
        return value
    if isinstance(value, str):
        if value.upper() in PROTOCOLS:
            return PROTOCOLS[value.upper()]
        if value.isascii() and value.isdigit() and len(value) < 4 and int(value) <= MAX_PROTOCOL:  # noqa: PLR2004 - 255
            return int(value)
    if value is None:
        probe.missing("protocol")
    else:
        seen = probe.report.describe((*probe.path, "protocol"), value)
        probe.error("protocol", f"must be TCP, UDP, SCTP, UDPLite, ICMP, ICMPv6 or 0 to {MAX_PROTOCOL}; is {seen}")
    return None


def _parse_translation(probe: Reader) -> tuple[IPAddress, int] | None:
    """Parse the field ``dnatTo``, such as ``{ip, port}``; None if it is absent or invalid.

    Without ``port`` the returned port is 0: the packet keeps its destination port.
    """
    translation = probe.mapping("dnatTo")
    if translation is None:
        return None
    text, port = translation.required_string("ip"), translation.integer("port", 1, MAX_PORT)
    translation.done()
    try:
        address = parse_address(text)
    except ValueError as error:
        if text:
            translation.error("ip", str(error), slug="address")
        return None
    return address, port or 0
