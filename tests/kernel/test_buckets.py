# SPDX-License-Identifier: Apache-2.0
"""Bucketed tables: Python sees maps, and the program finds the same rows."""

from __future__ import annotations

import random
import struct
from ipaddress import ip_address

import packets as p
import pytest
from rig import ALLOW, DENY, PEER4, PEER6, POD4, POD6, PolicySet, Rig, Verdict, everything

from netpol_ebpf.errors import MapFullError
from netpol_loader import abi
from netpol_loader.kernel import syscall
from netpol_loader.kernel.maps import Map
from netpol_loader.tables.buckets import BucketMap, PeerClassMap, bucketed, buckets_for

pytestmark = pytest.mark.kernel

NAMES = tuple(abi.OVERFLOW_MAPS)
FAMILIES = pytest.mark.parametrize(("pod", "peer"), [(POD4, PEER4), (POD6, PEER6)], ids=["ipv4", "ipv6"])


def table(rig: Rig, name: str) -> BucketMap:
    one = rig.map(name)
    assert isinstance(one, BucketMap)
    return one


def key_of(name: str, number: int) -> bytes:
    if name == "np_peer_class":
        return struct.pack("=II", 1 + number % 3, 1000 + number)
    return number.to_bytes(4, "big").rjust(table_key_bytes(name), b"\xfd")


def table_key_bytes(name: str) -> int:
    return 4 if name == "np_addr4" else 16


def value_of(name: str, number: int) -> bytes:
    return struct.pack("=I", number % 60_000) if name == "np_peer_class" else struct.pack("=II", number, number // 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_a_map_whatever_happens(rig: Rig, name: str, seed: int) -> None:
    """After thousands of random writes and removals a table equals a dict, for its writer and when opened afresh."""
    one, chance, wanted = table(rig, name), random.Random(seed), dict[bytes, bytes]()
    for turn in range(6000):
        key = key_of(name, chance.randrange(900 if name == "np_peer_class" else 4000))
        if chance.random() < 0.7:
            wanted[key] = value_of(name, turn)
            one.put(key, wanted[key])
        else:
            assert one.delete(key) == (wanted.pop(key, None) is not None)
        if chance.random() < 0.01:
            one.end_grace_period()
    assert dict(one.items()) == wanted
    assert all(one.get(key) == value for key, value in wanted.items())
    again = reopened(rig)[name]
    assert dict(again.items()) == wanted
    again.delete_many(list(wanted))
    assert not dict(one.items())
    # One writer at a time: what the earlier one counted is no longer so, and the tests that follow use the later one.
    rig.dataplane.maps = {**rig.dataplane.maps, name: again}
    assert not any(word for _, value in raw(rig, name).items() for word in used_words(name, value))


def raw(rig: Rig, name: str) -> Map:
    return Map(syscall.obj_get(rig.dataplane.pin_dir / name))


def reopened(rig: Rig) -> dict[str, Map]:
    return bucketed({name: raw(rig, name) for name in (*NAMES, *abi.OVERFLOW_MAPS.values())})


def used_words(name: str, value: bytes) -> list[int]:
    """The words of a bucket that say which slots are in use."""
    if name == "np_addr4":
        return [abi.np_addr4_bucket.from_buffer_copy(value).used]
    if name == "np_addr6":
        return [abi.np_addr6_bucket.from_buffer_copy(value).used]
    return [word for line in abi.np_peer_bucket.from_buffer_copy(value).line for word in (line.set, line.flags)]


@pytest.mark.parametrize("name", NAMES)
def test_place_that_became_free_rests(rig: Rig, name: str) -> None:
    """A slot is reused only after a grace period, because a packet may still be reading it."""
    one = table(rig, name)
    one.put(key_of(name, 1), value_of(name, 1))
    one.delete(key_of(name, 1))
    others = same_bucket(one, name, 1, count=9)
    for number in others:
        one.put(key_of(name, number), value_of(name, number))
    assert len(dict(raw(rig, name.replace("_class", "") + "_more").items())) > len(others) - free_places(name)
    for number in others:
        one.delete(key_of(name, number))
    one.end_grace_period()
    one.put(key_of(name, others[0]), value_of(name, others[0]))
    assert not dict(raw(rig, name.replace("_class", "") + "_more").items())


def free_places(name: str) -> int:
    return abi.NP_BUCKET_LINES if name == "np_peer_class" else abi.NP_BUCKET_ROWS


def same_bucket(one: BucketMap, name: str, first: int, count: int) -> list[int]:
    """Identities that hash to the bucket of the first, each in a line of its own."""
    place = one._place if isinstance(one, PeerClassMap) else one._bucket  # type: ignore[attr-defined]
    where = (lambda key: place(key)[1]) if isinstance(one, PeerClassMap) else place
    bucket = where(key_of(name, first))
    candidates = range(100, 4_000_000, abi.NP_LINE_CLASSES * 3)
    found = [number for number in candidates if where(key_of(name, number)) == bucket][:count]
    assert len(found) == count
    return found


@FAMILIES
def test_program_finds_what_found_no_place(rig: Rig, pod: str, peer: str) -> None:
    """Of far more addresses than fit into a bucket, each has its identity, and an unknown address has none."""
    name = "np_addr4" if pod == POD4 else "np_addr6"
    one = table(rig, name)
    rig.pod(everything(1, DENY, 11), everything(2, DENY, 12))
    base, chance = ip_address(peer), random.Random(1)
    addresses = [base + number for number in chance.sample(range(1000, 1 << 23), 3 * one.max_entries // 4)]
    one.put_many([(address.packed, bytes(abi.np_addr(identity=500 + n))) for n, address in enumerate(addresses)])
    assert dict(raw(rig, f"{name}_more").items()), "some found their bucket full"
    elsewhere = [ip_address(key) for key, _ in raw(rig, f"{name}_more").items()]
    for address in (*elsewhere[:50], *addresses[:50]):
        (event,) = rig.out(p.frame(pod, str(address), p.TCP, p.tcp(1, 2))).events
        assert event.peer_identity == 500 + addresses.index(address)
    (event,) = rig.out(p.frame(pod, str(base + 500), p.TCP, p.tcp(1, 2))).events
    assert event.peer_identity == (abi.NP_IDENTITY_WORLD_V4 if pod == POD4 else abi.NP_IDENTITY_WORLD_V6)


def test_program_finds_every_class(rig: Rig) -> None:
    """The program finds classes in lines and in the overflow map, and the default class of an identity without a row."""
    one = table(rig, "np_peer_class")
    sets = [
        PolicySet(number, [Verdict(DENY, 10 + number), Verdict(ALLOW, 20 + number)], peer_classes=2)
        for number in (1, 2)
    ]
    rig.pod(*sets)
    for identity in range(2000):
        one.put(struct.pack("=II", 2, identity), struct.pack("=I", identity % 2))
        one.put(struct.pack("=II", 1, identity), struct.pack("=I", 1 - identity % 2))
    found_none = [struct.unpack("=II", key) for key, _ in raw(rig, "np_peer_more").items()]
    assert found_none
    identities = [identity for policy_set, identity in found_none if policy_set == 2]
    for identity in (*identities[:40], *range(100, 150), 2000):
        rig.address(PEER4, identity)
        expected = 20 + 2 if identity % 2 else 10 + 2
        seen = rig.out(p.frame(POD4, PEER4, p.TCP, p.tcp(1, 2)))
        assert seen.rules == {expected: 1}, identity


@pytest.mark.parametrize(
    ("name", "rows", "buckets"),
    [("np_addr4", 1, 1), ("np_addr4", 4, 1), ("np_addr4", 5, 2), ("np_addr6", 262_144, 65_536), ("np_peer_class", 1 << 20, 65_536)],
)  # fmt: skip
def test_sizes(name: str, rows: int, buckets: int) -> None:
    """The number of rows of a table decides its number of buckets, also for the default sizes."""
    assert buckets_for(name, rows) == buckets


def test_default_sizes_agree() -> None:
    """The sizes that the C sources declare are those that the loader would choose."""
    for name, more in abi.OVERFLOW_MAPS.items():
        assert abi.MAP_SPECS[name].max_entries == buckets_for(name, abi.MAP_SPECS[more].max_entries)


def test_full_table_is_named(rig: Rig) -> None:
    """If the bucket and the overflow map are full, the error names the map, and the table keeps its earlier rows."""
    one = table(rig, "np_peer_class")
    rows = [(struct.pack("=II", number + 1, 5), struct.pack("=I", 1)) for number in range(100_000)]
    with pytest.raises(MapFullError, match="np_peer"):
        one.put_many(rows)
    assert len(dict(one.items())) >= one.max_entries


def test_wrong_sizes_never_reach_memory(rig: Rig) -> None:
    """A key or value of another length is an error of the caller."""
    for name in NAMES:
        one = table(rig, name)
        with pytest.raises(ValueError, match="a key has"):
            one.get(b"12345")
        with pytest.raises((ValueError, struct.error)):
            one.put(key_of(name, 1), b"12345")
