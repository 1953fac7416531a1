# SPDX-License-Identifier: Apache-2.0
"""Reads the compiled tables back from the kernel's maps and the ledger, as packets are judged by them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from netpol_ebpf.apply.encode import OUTCOME, decode_endpoint, decode_key
from netpol_ebpf.apply.ledger import Ledger
from netpol_ebpf.compiler.tables import FIRST_NODE, AddressRow, CompiledTables, EndpointRow, SetRow, VerdictRow
from netpol_ebpf.policy.types import ClusterNode, Direction, Stage
from netpol_loader import abi
from netpol_loader.kernel.maps import Map
from netpol_loader.tables.buckets import open_map

SET_FIELDS = (
    "number", "default_class4", "default_class6", "peer_classes", "own_set", "own_default_class4", "own_default_class6",
    "own_classes", "l4_base", "l4_classes", "asks_source", "source_base", "source_classes", "verdict_base",
)  # fmt: skip


@contextmanager
def opened(path: Path) -> Iterator[Map]:
    """A pinned map."""
    one = open_map(path.parent, path.name)
    try:
        yield one
    finally:
        one.close()


def rows(pins: Path, name: str) -> dict[bytes, bytes]:
    """All rows of a map. For an array, all rows that are not zero."""
    with opened(pins / name) as one:
        return {key: value for key, value in one.items() if any(value) or not one.type.endswith("array")}


def read_tables(pins: Path, ledger: Path, scratch: Path, nodes: Mapping[str, ClusterNode]) -> CompiledTables:
    """The tables in force.

    ``scratch``: a directory for a copy of the ledger. ``nodes``: the nodes, with the numbers that no map has.
    """
    scratch.write_bytes(ledger.read_bytes())
    book = Ledger(scratch)
    numbers = book.open()
    book.close()
    tables = CompiledTables()
    tables.rules.write({number: cause for cause, number in numbers.rules.items() if _is_rule(pins, number)})
    tables.identities.write({number: digest for digest, number in numbers.identities.items()})
    for name in ("np_addr4", "np_addr6"):
        for key, value in rows(pins, name).items():
            address = abi.np_addr.from_buffer_copy(value)
            holder = (0, address.holder) if address.holder >= FIRST_NODE else (address.holder, 0)
            tables.addresses.set(decode_key(name, key)[1], AddressRow(address.identity, *holder))
    for name, node in nodes.items():
        for row in filter(None, map(tables.addresses.get, node.addresses)):
            if row.node:
                tables.nodes.set(name, row.node)
    for name in ("np_cidr4", "np_cidr6"):
        for key, value in rows(pins, name).items():
            tables.cidrs.set(decode_key(name, key)[1], struct.unpack("=I", value)[0])
    for key, value in rows(pins, "np_peer_class").items():
        tables.peer_classes.set(decode_key("np_peer_class", key)[1], struct.unpack("=I", value)[0])
    for key, value in rows(pins, "np_l4_atom").items():
        tables.l4_atoms.set(_index(key), struct.unpack(f"={len(value) // 2}H", value))
    with opened(pins / "np_l4_col") as columns:
        for key, value in columns.items():
            tables.l4_columns.set(_index(key), struct.unpack(f"={len(value) // 2}H", value))
    for key, value in rows(pins, "np_verdict").items():
        row = abi.np_verdict.from_buffer_copy(value)
        tables.verdicts.set(
            _index(key),
            VerdictRow(
                OUTCOME[row.action],
                row.rule,
                OUTCOME[row.staged_action],
                row.staged_rule,
                row.log_list,
                bool(row.flags & abi.NP_VERDICT_FAILSAFE),
            ),
        )
    names = {number: key for key, number in numbers.endpoints.items()}
    for value in rows(pins, "np_endpoint").values():
        endpoint = decode_endpoint(value)
        if endpoint.flags & abi.NP_ENDPOINT_HOST:
            continue  # an own interface of the node
        sets = {
            (direction, Stage.NORMAL): SetRow(**{name: getattr(one, name) for name in SET_FIELDS})
            for direction, one in ((Direction.INGRESS, endpoint.ingress), (Direction.EGRESS, endpoint.egress))
        }
        tables.endpoints.set(names[endpoint.number], EndpointRow(endpoint.number, sets))
    return tables


def _is_rule(pins: Path, number: int) -> bool:
    with opened(pins / "np_rule") as one:
        return one.get(struct.pack("=I", number)) is not None


def _index(key: bytes) -> int:
    return int(struct.unpack("=I", key)[0])
