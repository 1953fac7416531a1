# SPDX-License-Identifier: Apache-2.0
"""DNS answers of a case: who asked for which name, and which addresses the answer has until when.

A case states answers as given. Whether the client's policy lets it ask a DNS server is not evaluated.

Invariant: an answer is valid from ``at_s`` until the end of its time to live, which is at least `TTL_FLOOR_S`. The end
itself does not belong to that time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from netpol_ebpf.policy.types import IPAddress
from netpol_ebpf.resources.reader import Reader
from netpol_ebpf.resources.syntax import check_domain, normal_domain, parse_address
from netpol_ebpf.resources.yamltree import Path

TTL_FLOOR_S = 30
"""The least time for which a name is valid. The agent's default is the same (docs/domain-names.md)."""

DEFAULT_TTL_S = 60
MAX_TTL_S = 2**31 - 1  # RFC 2181, section 8


@dataclass(frozen=True, slots=True)
class DomainName:
    """The destination of a probe by name: every address that the sender knows for ``name``."""

    name: str


@dataclass(frozen=True, slots=True)
class DnsAnswer:
    """One answer.

    ``client``: the workload that asked, as (namespace, name); an address of a host that asked; None: everybody asked.
    ``names``: the name of the question, then the names of the CNAME chain in order. ``at_s``, ``ttl_s``: seconds since
    the case began, and the time to live in seconds.
    """

    client: IPAddress | tuple[str, str] | None
    names: tuple[str, ...]
    addresses: tuple[IPAddress, ...]
    ttl_s: int = DEFAULT_TTL_S
    at_s: float = 0

    def is_valid(self, at_s: float | None) -> bool:
        """Whether the answer counts at a time. None: a time after all answers at which none has expired."""
        return at_s is None or self.at_s <= at_s < self.at_s + max(self.ttl_s, TTL_FLOOR_S)


def parse_answers(case: Reader) -> Iterator[DnsAnswer]:
    """Parse the field ``dns`` of a case: a list of answers, or a mapping of names to addresses for everybody."""
    written = case.raw("dns")
    if isinstance(written, Mapping):
        for name in written:
            path: Path = ("dns", str(name))
            given = _name(case, path, name)
            addresses = _addresses(case, path, written[name])
            if given and addresses:
                yield DnsAnswer(None, (given,), addresses)
        return
    for answer in case.mappings("dns"):
        parsed = _answer(answer)
        if parsed is not None:
            yield parsed


def _answer(answer: Reader) -> DnsAnswer | None:
    client = parse_client(answer) if answer.has("client") else None
    name = _name(answer, (*answer.path, "name"), answer.required_string("name"))
    cnames = [_name(answer, path, text) for path, text in answer.indexed_strings("cnames")]
    addresses = _addresses(answer, (*answer.path, "addresses"), answer.raw("addresses"))
    ttl_s, at_s = answer.integer("ttl", 0, MAX_TTL_S), parse_time(answer)
    answer.done()
    if not name or not addresses or not all(cnames) or (answer.has("client") and client is None):
        return None
    return DnsAnswer(client, (name, *map(str, cnames)), addresses, DEFAULT_TTL_S if ttl_s is None else ttl_s, at_s or 0)


def parse_client(answer: Reader) -> IPAddress | tuple[str, str] | None:
    """Parse the field ``client``: a workload as namespace/name, or an address of a host. None if it is invalid."""
    text = answer.required_string("client")
    namespace, slash, name = text.partition("/")
    if slash and namespace and name and "/" not in name:
        return namespace, name
    try:
        return parse_address(text)
    except ValueError:
        answer.error("client", f'must be a pod as namespace/name or an address of a host; is "{text}"')
        return None


def parse_time(reader: Reader) -> float | None:
    """Parse the field ``at``, a number of seconds since the case began. None if it is absent or invalid."""
    value = reader.number("at")
    if value is not None and value < 0:
        reader.error("at", f"must be a number of seconds since the case began, 0 or more; is {value:g}", slug="range")
        return None
    return value


def parse_name(text: str) -> str | None:
    """The normal form of a domain name without a wildcard; None if ``text`` is no such name.

    A text that ends in a number, such as an address, is no name.
    """
    if "*" in text or check_domain(text) is not None or text.removesuffix(".").split(".")[-1].isdigit():
        return None
    return normal_domain(text)


def _name(reader: Reader, path: Path, value: Any) -> str | None:
    name = parse_name(value) if isinstance(value, str) else None
    if name is None and value != "":  # a missing name is reported already
        reader.report.error(path, f'must be a domain name such as "example.com"; is "{value}"', slug="domain")
    return name


def _addresses(reader: Reader, path: Path, value: Any) -> tuple[IPAddress, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        reader.report.error(path, "must be a list of at least one IP address", slug="type")
        return ()
    addresses = [_address(reader, (*path, index), str(text)) for index, text in enumerate(value)]
    return tuple(address for address in addresses if address is not None)


def _address(reader: Reader, path: Path, text: str) -> IPAddress | None:
    """Parse an address. An IPv4-mapped address stays one, because no answer can teach it. None if it is invalid."""
    try:
        parse_address(text)
        return ip_address(text)
    except ValueError as error:
        reader.report.error(path, str(error), slug="address")
        return None
