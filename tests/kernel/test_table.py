# SPDX-License-Identifier: Apache-2.0
"""The connection table: what a full bucket evicts, and that Python and the program see the same connections."""

from __future__ import annotations

import multiprocessing
import os
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import packets as p
import pytest
from rig import ALLOW, DENY, ELSEWHERE, PEER4, PEER6, POD4, POD6, Rig, everything

from netpol_ebpf.errors import MapFullError
from netpol_loader import abi
from netpol_loader.kernel.clock import read_jiffies
from netpol_loader.kernel.hook import Hook
from netpol_loader.pins.dataplane import Dataplane
from netpol_loader.tables import connections
from netpol_loader.tables.connections import ROWS_PER_BUCKET, ConnectionMap, spreads

pytestmark = pytest.mark.kernel

PLACES = abi.NP_CONN_WAYS
FAMILIES = pytest.mark.parametrize(("pod", "peer"), [(POD4, PEER4), (POD6, PEER6)], ids=["ipv4", "ipv6"])
SMALL = {
    "np_conn4": ROWS_PER_BUCKET,
    "np_conn6": ROWS_PER_BUCKET,
    "np_verdict": 4096,
    "np_l4_col": 256,
    "np_rule_count": 64,
    "np_staged_count": 64,
}
"""One bucket of each table."""


@pytest.fixture(scope="module")
def small_dataplane(pin_root: Path) -> Iterator[Dataplane]:
    one = Dataplane.open(pin_root.with_name(f"{pin_root.name}-table"), sizes=SMALL)
    yield one
    one.remove()


@pytest.fixture(scope="module")
def small_rig(small_dataplane: Dataplane) -> Iterator[Rig]:
    rig = Rig(small_dataplane)
    yield rig
    rig.reader.close()


@pytest.fixture
def small(small_rig: Rig) -> Rig:
    """A rig with tables of one bucket each, and a workload that may send and receive everything."""
    small_rig.reset()
    small_rig.pod(everything(1, ALLOW, 11), everything(2, ALLOW, 12))
    return small_rig


def family(pod: str) -> str:
    return "4" if pod == POD4 else "6"


def begin(rig: Rig, pod: str, peer: str, port: int) -> None:
    assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(port, 80, p.SYN))).passed


def answer(rig: Rig, pod: str, peer: str, port: int) -> None:
    assert rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, port, p.SYN | p.ACK))).passed


def end(rig: Rig, pod: str, peer: str, port: int) -> None:
    for packet in (p.frame(pod, peer, p.TCP, p.tcp(port, 80, p.FIN | p.ACK)),):
        rig.out(packet)
    rig.into(p.frame(peer, pod, p.TCP, p.tcp(80, port, p.FIN | p.ACK)))


def ports(rig: Rig, pod: str, form: str) -> set[int]:
    """The workload's ports of the unreplied or the established connections."""
    kind = abi.np_conn4_key if pod == POD4 else abi.np_conn6_key
    return {kind.from_buffer_copy(key).local_port for key in rig.connections(f"np_{form}{family(pod)}")}


@FAMILIES
def test_what_is_closed_goes_first_then_what_is_young(small: Rig, pod: str, peer: str) -> None:
    """Of one closed, two unreplied and five established connections the closed one goes first, then the unreplied."""
    for port in range(1, PLACES + 1):
        begin(small, pod, peer, port)
    for port in range(3, PLACES + 1):
        answer(small, pod, peer, port)
    end(small, pod, peer, 5)
    begin(small, pod, peer, 100)
    assert (ports(small, pod, "unreplied"), ports(small, pod, "conn")) == ({1, 2, 100}, {3, 4, 6, 7, 8})
    for port in (101, 102, 103, 104):
        begin(small, pod, peer, port)
        assert ports(small, pod, "conn") == {3, 4, 6, 7, 8}
        assert port in ports(small, pod, "unreplied")
    assert len(ports(small, pod, "unreplied")) == PLACES - 5


@FAMILIES
def test_a_flood_takes_one_of_eight_open_connections_and_no_more(small: Rig, pod: str, peer: str) -> None:
    """A flood evicts only the established connection that was silent longest, and counts it."""
    for port in range(1, PLACES + 1):
        begin(small, pod, peer, port)
        answer(small, pod, peer, port)
    small.age(f"np_conn{family(pod)}", 5)
    for port in range(1, PLACES + 1):  # all but one say something
        if port != 4:
            assert small.out(p.frame(pod, peer, p.TCP, p.tcp(port, 80, p.ACK))).passed
    first = small.out(p.frame(pod, peer, p.TCP, p.tcp(200, 80, p.SYN)))
    assert first.reasons == {"policy-allow": 1, "conn-evicted": 1}
    for port in range(201, 240):
        assert small.out(p.frame(pod, peer, p.TCP, p.tcp(port, 80, p.SYN))).reasons == {"policy-allow": 1}
    assert ports(small, pod, "conn") == set(range(1, PLACES + 1)) - {4}
    assert ports(small, pod, "unreplied") == {239}


@FAMILIES
def test_what_expired_goes_before_anything_alive(small: Rig, pod: str, peer: str) -> None:
    """An expired established connection goes before any live one."""
    for port in range(1, PLACES + 1):
        begin(small, pod, peer, port)
        if port == 6:
            answer(small, pod, peer, port)
    tags = small.map(f"np_conn{family(pod)}_tag")
    words = list(struct.unpack(f"={PLACES}Q", tags.get(bytes(4)) or b""))
    place = next(i for i, word in enumerate(words) if not word >> 31 & 1)
    words[place] -= 1 << 30  # half of the time's range: past
    tags.put(bytes(4), struct.pack(f"={PLACES}Q", *words))
    begin(small, pod, peer, 100)
    assert ports(small, pod, "conn") == set()
    assert ports(small, pod, "unreplied") == {*range(1, PLACES + 1), 100} - {6}


@FAMILIES
def test_live_connections_are_counted_by_form(small: Rig, pod: str, peer: str) -> None:
    """Established and unreplied connections are counted apart; an expired one is in the table and does not count."""
    table = small.map(f"np_conn{family(pod)}")
    assert isinstance(table, ConnectionMap)
    for port in range(1, 6):
        begin(small, pod, peer, port)
    for port in (1, 2):
        answer(small, pod, peer, port)
    assert (table.count_live(), table.slots) == ((2, 3), PLACES)
    tags = small.map(f"np_conn{family(pod)}_tag")
    words = list(struct.unpack(f"={PLACES}Q", tags.get(bytes(4)) or b""))
    place = next(i for i, word in enumerate(words) if word and not word >> 31 & 1)
    words[place] ^= 1 << 30  # half of the time's range: past
    tags.put(bytes(4), struct.pack(f"={PLACES}Q", *words))
    assert table.count_live() == (1, 3)
    assert len(dict(table.items())) == 2


@FAMILIES
def test_the_same_flow_keeps_its_place(small: Rig, pod: str, peer: str) -> None:
    """A retransmitted SYN is no second connection."""
    for _ in range(PLACES + 1):
        begin(small, pod, peer, 7)
    assert ports(small, pod, "unreplied") == {7}
    answer(small, pod, peer, 7)
    assert (ports(small, pod, "unreplied"), ports(small, pod, "conn")) == (set(), {7})


@FAMILIES
def test_an_older_open_connection_lives_until_the_new_one_is_answered(small: Rig, pod: str, peer: str) -> None:
    """Unreplied and established connections with one key exist side by side until the reply."""
    begin(small, pod, peer, 7)
    answer(small, pod, peer, 7)
    begin(small, pod, peer, 7)
    assert (ports(small, pod, "unreplied"), ports(small, pod, "conn")) == ({7}, {7})
    answer(small, pod, peer, 7)
    assert (ports(small, pod, "unreplied"), ports(small, pod, "conn")) == (set(), {7})


@FAMILIES
def test_python_and_the_program_agree(rig: Rig, pod: str, peer: str) -> None:
    """Python and the program see each other's connections and removals."""
    rig.pod(everything(1, ALLOW, 11), everything(2, ALLOW, 12))
    view, unreplied = rig.map(f"np_conn{family(pod)}"), rig.map(f"np_unreplied{family(pod)}")
    for port in range(1, 400):
        begin(rig, pod, peer, port)
        if port % 2:
            answer(rig, pod, peer, port)
    assert (len(rig.connections(view.name)), len(rig.connections(unreplied.name))) == (200, 199)
    rows = dict(view.items())
    assert all(view.get(key) == row and unreplied.get(key) is None for key, row in rows.items())
    view.clear()
    rig.forget_flow_cache()
    rig.pod(everything(1, DENY, 11), everything(2, DENY, 12))
    assert not rig.out(p.frame(pod, peer, p.TCP, p.tcp(1, 80, p.ACK))).passed
    view.put_many(list(rows.items()))
    assert dict(view.items()) == rows
    for port in range(1, 400, 2):
        assert rig.out(p.frame(pod, peer, p.TCP, p.tcp(port, 80, p.ACK))).reason == "established"
    key = next(iter(rows))
    assert view.delete(key)
    assert not view.delete(key)
    assert view.get(key) is None


def test_a_full_bucket_takes_eight_rows_of_one_call(small: Rig) -> None:
    """A full bucket takes eight rows of one call; the error reports the rest, and other buckets' rows are written."""
    view = small.map("np_conn4")
    rows = [
        (struct.pack("=I4s4sHHB3x", 7, bytes(4), bytes(4), port, 80, p.TCP), bytes(view.value_size))
        for port in range(9)
    ]
    with pytest.raises(MapFullError, match="1 of 9"):
        view.put_many(rows)
    assert dict(view.items()) == dict(rows[:8])


def test_a_place_that_a_program_took_meanwhile_is_left_to_it(small: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that had chosen the slot before Python's reservation publishes afterwards: the program's entry stands."""
    view = small.map("np_conn4")
    assert isinstance(view, ConnectionMap)
    theirs = 1 << 63 | abi.NP_RANK_ESTABLISHED

    def late() -> None:
        view._tags.words[0] = theirs

    monkeypatch.setattr(connections, "wait_for_readers", late)
    with pytest.raises(MapFullError, match="1 of 1"):
        view.put(struct.pack("=I4s4sHHB3x", 7, bytes(4), bytes(4), 1, 80, p.TCP), bytes(view.value_size))
    assert view._tags.words[0] == theirs


def test_each_node_has_a_hash_of_its_own(rig: Rig, small: Rig) -> None:
    """Each node draws its own numbers, each of which spreads sequences."""
    one, other = (
        abi.np_secret.from_buffer_copy(each.map("np_secret").get(bytes(4)) or b"").number for each in (rig, small)
    )
    assert len({*one, *other}) == 2 * abi.NP_HASH_WORDS
    assert all(spreads(number, rig.map(name).max_entries) for name in abi.TAG_MAPS.values() for number in one)


@FAMILIES
def test_processors_that_write_into_one_place_never_mix_connections(small: Rig, pod: str, peer: str) -> None:
    """Two CPUs open connections in and out, and take the only slot from each other.

    The entry that is left has the direction and the rule of its own key.
    """
    bursts, runs, deadline = 20_000, 4, time.monotonic() + 300
    outwards, inwards = (pod, peer, 1000, Hook.TC_INGRESS), (peer, pod, 1001, Hook.TC_EGRESS)
    tags, unreplied = small.map(f"np_conn{family(pod)}_tag"), small.map(f"np_unreplied{family(pod)}")
    owned_long = (
        (read_jiffies() // abi.NP_TAG_JIFFIES + (1 << 20)) & ((1 << abi.NP_TAG_TIME_BITS) - 1)
    ) << abi.NP_TAG_TIME_SHIFT | abi.NP_RANK_NONE
    tags.put(bytes(4), struct.pack(f"={PLACES}Q", 0, *[owned_long] * (PLACES - 1)))
    kind = abi.np_conn4_key if pod == POD4 else abi.np_conn6_key
    fork = multiprocessing.get_context("fork")
    reached = fork.RawArray("q", 2)
    seen: Counter[tuple[bool, int, int]] = Counter()

    def meet(me: int, point: int) -> None:
        """Continue when both threads are there, so that they write at once."""
        reached[me] = point
        while reached[1 - me] < point:
            assert time.monotonic() < deadline, "the other one is not coming"

    def send(me: int, way: tuple[str, str, int, Hook]) -> None:
        source, destination, port, hook = way
        os.sched_setaffinity(0, {me % (os.cpu_count() or 1)})
        packet = p.frame(source, destination, p.TCP, p.tcp(port, 80, p.SYN))
        for burst in range(bursts):
            meet(me, 2 * burst + 1)
            small.dataplane.test_run(hook, packet, ingress_ifindex=ELSEWHERE, repeat=runs)
            meet(me, 2 * burst + 2)
            if me == 0:
                for raw, row in small.connections(unreplied.name).items():
                    seen[kind.from_buffer_copy(raw).remote_port == 80, row.direction, row.rule] += 1

    before = os.sched_getaffinity(0)
    other = fork.Process(target=send, args=(1, inwards))
    other.start()
    try:
        send(0, outwards)
    finally:
        os.sched_setaffinity(0, before)
    other.join()
    tags.put(bytes(4), bytes(tags.value_size))
    assert other.exitcode == 0
    assert set(seen) <= {(True, abi.NP_DIRECTION_EGRESS, 12), (False, abi.NP_DIRECTION_INGRESS, 11)}
    assert sum(seen.values()) == bursts, "the one place is somebody's after each burst"
    refused = small._counts("np_reason_count")[abi.NP_REASON_CONN_FULL]
    print(f"{dict(seen)} seen; {refused} of {2 * bursts * runs} times the other processor was writing")
