# SPDX-License-Identifier: Apache-2.0
"""The node's addresses and services: each has its bit in the filter as long as it has its row."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from ipaddress import ip_address

import pytest
from memory_maps import MemoryMap, memory_maps

from netpol_ebpf.apply.encode import LocalFlag, Meaning
from netpol_ebpf.apply.surroundings import OwnInterface, Surroundings, SurroundingsWriter
from netpol_ebpf.errors import MapFullError
from netpol_ebpf.policy.types import IPAddress, Vip, VipKey
from netpol_loader.tables.buckets import vip_filter_bit

OWN = Meaning(LocalFlag.OWN)
NODE, OTHER, SERVICE = ip_address("192.0.2.1"), ip_address("fd00::1"), ip_address("10.96.0.1")


def surroundings(*addresses: IPAddress, vips: tuple[Vip, ...] = ()) -> Surroundings:
    return Surroundings(addresses=dict.fromkeys(addresses, OWN), vips=vips)


def bits(maps: Mapping[str, MemoryMap]) -> set[tuple[int, int]]:
    rows = maps["np_vip_filter"].rows.items()
    return {
        (struct.unpack("=I", key)[0], bit)
        for key, value in rows for bit in range(64) if struct.unpack("=Q", value)[0] >> bit & 1
    }  # fmt: skip


def test_addresses_and_services_have_their_bits() -> None:
    """Addresses of both families and services have bits, and none after their removal.

    Node ports have no bit of their own.
    """
    maps = memory_maps([])
    writer = SurroundingsWriter(maps, lambda: None)
    service = Vip(VipKey(SERVICE, 6, 443), frozenset({(NODE, 6443)}))
    node_port = Vip(VipKey(None, 6, 30_000))
    writer.write(surroundings(NODE, OTHER, vips=(service, node_port)))
    assert bits(maps) == {vip_filter_bit(one.packed) for one in (NODE, OTHER, SERVICE)}
    writer.write(surroundings(NODE))
    assert bits(maps) == {vip_filter_bit(NODE.packed)}
    writer.write(surroundings())
    assert not bits(maps)


def test_bit_is_there_before_the_row_and_goes_after_it() -> None:
    """So no packet treats an address with a row as one without."""
    log: list[tuple[str, str, bytes]] = []
    writer = SurroundingsWriter(memory_maps(log), lambda: None)
    writer.write(surroundings(NODE))
    assert [name for _, name, _ in log] == ["np_vip_filter", "np_local4"]
    log.clear()
    writer.write(surroundings(OTHER))
    names = [(operation, name) for operation, name, _ in log]
    assert names.index(("put", "np_vip_filter")) < names.index(("put", "np_local6"))
    assert names[-2:] == [("delete", "np_local4"), ("put", "np_vip_filter")]


def test_bits_of_neighbours_are_kept() -> None:
    """If two addresses have bits in one row, the removal of one keeps the other's bit."""
    one = NODE
    row, bit = vip_filter_bit(one.packed)
    neighbours = (ip_address(number) for number in range(int(ip_address("10.0.0.1")), int(ip_address("10.9.0.1"))))
    other = next(
        each for each in neighbours if vip_filter_bit(each.packed)[0] == row and vip_filter_bit(each.packed)[1] != bit
    )
    maps = memory_maps([])
    writer = SurroundingsWriter(maps, lambda: None)
    writer.write(surroundings(one, other))
    writer.write(surroundings(other))
    assert bits(maps) == {vip_filter_bit(other.packed)}


def test_what_does_not_fit_changes_nothing() -> None:
    """If an interface has no room midway, the addresses written before it are removed again, and so are their bits."""
    maps = memory_maps([])
    renewed: list[int] = []
    writer = SurroundingsWriter(maps, lambda: renewed.append(1))
    writer.write(surroundings(NODE))
    before = {name: dict(one.rows) for name, one in maps.items()}
    maps["np_endpoint"].hard_limit = 1
    wanted = Surroundings(addresses={OTHER: OWN}, interfaces={5: OwnInterface(), 6: OwnInterface()})
    with pytest.raises(MapFullError):
        writer.write(wanted)
    zeros = bytes(8)
    after = {name: {key: row for key, row in one.rows.items() if row != zeros} for name, one in maps.items()}
    assert after == before
    assert renewed, "a packet may have seen an interface's row"
    maps["np_endpoint"].hard_limit = None
    writer.write(wanted)
    assert len(maps["np_endpoint"].rows) == 2
    assert not maps["np_local4"].rows


@pytest.mark.parametrize(
    ("name", "size", "wanted"),
    [
        ("np_local4", 1, surroundings(ip_address("192.0.2.2"))),
        ("np_local6", 0, surroundings(OTHER)),
        ("np_vip4", 0, surroundings(NODE, vips=(Vip(VipKey(SERVICE, 6, 443)),))),
        ("np_vip6", 0, surroundings(NODE, vips=(Vip(VipKey(None, 6, 30_000)),))),
        ("np_endpoint", 2, Surroundings(addresses={NODE: OWN}, interfaces={5: OwnInterface(), 6: OwnInterface()})),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_write(name: str, size: int, wanted: Surroundings) -> None:
    """Rows that are removed last count, and so do workloads' rows in the same map."""
    log: list[tuple[str, str, bytes]] = []
    maps = memory_maps(log)
    writer = SurroundingsWriter(maps, lambda: None)
    writer.write(surroundings(NODE))
    maps["np_endpoint"].put(bytes(4), bytes(maps["np_endpoint"].value_size))
    maps[name].max_entries = size
    log.clear()
    for attempt in (writer.write, writer.require_room):
        with pytest.raises(MapFullError, match=f"map {name} has room for {size} rows; the change needs {size + 1}"):
            attempt(wanted)
    assert log == []
