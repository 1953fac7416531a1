# SPDX-License-Identifier: Apache-2.0
"""The DNS programs by test runs: what answers teach, and what no answer may teach."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import dns_messages as d
import packets as p
import pytest
from dns_scene import (
    CLIENT_PORT,
    EXACT,
    OTHER_SERVER4,
    SERVER4,
    SERVER6,
    WILD,
    DnsScene,
    answer,
    question,
    server_of,
    stream_answer,
    stream_question,
)
from rig import ALLOW, DENY, ENDPOINT, POD4, POD6, Rig, everything

from netpol_loader import abi
from netpol_loader.kernel.hook import Hook

pytestmark = pytest.mark.kernel

ASKED = d.Message()
ASKED6 = d.Message(kind=d.AAAA)
WEB, WEB6 = "203.0.113.5", "2001:db8::5"
SLACK_S = 2.0
"""Difference allowed between an expiry and the clock: rounding to units, and a slow machine."""


@pytest.fixture
def scene(rig: Rig) -> Iterator[DnsScene]:
    """An endpoint that learns names."""
    one = DnsScene(rig)
    yield one
    one.close()


# --- what answers teach -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", [POD4, POD6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize(("asked", "address"), [(ASKED, WEB), (ASKED6, WEB6)], ids=["A", "AAAA"])
def test_an_answer_teaches_its_addresses(scene: DnsScene, client: str, asked: d.Message, address: str) -> None:
    """An answer to a pending question teaches the address under the class of the name, in both families."""
    seen = scene.exchange(asked, d.address(address), client=client)
    assert (seen.passed, seen.reasons) == (True, {"dns-learned": 1})
    assert scene.addresses() == {address: {EXACT}}
    assert scene.take_reports() == [("www.example.com", address, EXACT, 60)]
    assert scene.pending() == 0


def test_a_wildcard_gives_its_class_to_every_name_below(scene: DnsScene) -> None:
    """The longest pattern decides the class; the bare name of a wildcard has a row of its own, without a class."""
    scene.pattern("a.cdn.net", 11)
    scene.pattern("cdn.net", 0)
    scene.exchange(d.Message("cdn.net"), d.address(WEB))
    scene.exchange(d.Message("xcdn.net"), d.address(WEB))
    assert scene.addresses() == {}
    for number, (name, expected) in enumerate(
        {"x.cdn.net": {WILD}, "y.x.cdn.net": {WILD}, "a.cdn.net": {11}, "b.a.cdn.net": {WILD}}.items(), 1
    ):
        scene.exchange(d.Message(name), d.address(f"203.0.113.{number}"))
        assert scene.addresses()[f"203.0.113.{number}"] == expected


def test_a_name_of_no_pattern_is_reported_only(scene: DnsScene) -> None:
    """An address of a name without a class gets no row, but the agent hears of it."""
    seen = scene.exchange(d.Message("other.example.com"), d.address(WEB))
    assert seen.reasons == {}
    assert scene.addresses() == {}
    assert scene.take_reports() == [("other.example.com", WEB, 0, 60)]


def test_all_names_of_a_chain_have_its_addresses(scene: DnsScene) -> None:
    """Each name of a CNAME chain gives its class, with the least time to live from that name on."""
    scene.exchange(
        ASKED,
        d.cname("a.cdn.net", ttl=900),
        d.cname("edge.example.org", owner="a.cdn.net", ttl=100),
        d.address(WEB, owner="edge.example.org", ttl=5000),
        d.address("203.0.113.6", owner="EDGE.example.org", ttl=50),
    )
    rows = scene.learned()
    assert rows[ENDPOINT, WEB] == pytest.approx({EXACT: 100, WILD: 100}, abs=SLACK_S)
    assert rows[ENDPOINT, "203.0.113.6"] == pytest.approx({EXACT: 50, WILD: 50}, abs=SLACK_S)


def test_a_later_name_of_the_chain_lives_longer(scene: DnsScene) -> None:
    """The time to live of a CNAME record limits the names before it, and not its target."""
    scene.exchange(ASKED, d.cname("a.cdn.net", ttl=40), d.address(WEB, owner="a.cdn.net", ttl=500))
    assert scene.learned()[ENDPOINT, WEB] == pytest.approx({EXACT: 40, WILD: 500}, abs=SLACK_S)


@pytest.mark.parametrize(
    ("ttl", "floor", "extra", "expected"),
    [(60, 30, 0, 60), (5, 30, 0, 30), (0, 30, 0, 30), (-1, 30, 0, 30), (60, 30, 15, 75), (5, 0, 7, 12),
     (0x7FFFFFFF, 30, 10, 604810)],
)  # fmt: skip
def test_floor_and_extra_time(scene: DnsScene, ttl: int, floor: int, extra: int, expected: int) -> None:
    """A life is at least the floor, at most a week, and then gets the extra time; a negative one counts as 0."""
    scene.configure(name_floor_s=floor, name_extra_s=extra)
    scene.exchange(ASKED, d.address(WEB, ttl=ttl))
    assert scene.learned()[ENDPOINT, WEB][EXACT] == pytest.approx(expected, abs=SLACK_S)


def test_the_later_expiry_holds(scene: DnsScene) -> None:
    """A second answer prolongs a life, and never shortens it."""
    for ttl, expected in ((100, 100), (40, 100), (400, 400)):
        scene.exchange(ASKED, d.address(WEB, ttl=ttl))
        assert scene.learned()[ENDPOINT, WEB][EXACT] == pytest.approx(expected, abs=SLACK_S)


def test_an_address_has_several_classes(scene: DnsScene) -> None:
    """Names of several classes may have one address; the fifth class replaces the first to expire, and is counted."""
    for number in range(4):
        scene.pattern(f"n{number}.example.com", 20 + number)
        seen = scene.exchange(d.Message(f"n{number}.example.com"), d.address(WEB, ttl=100 + 100 * (number ^ 1)))
        assert seen.reasons == {"dns-learned": 1}
    assert scene.addresses() == {WEB: {20, 21, 22, 23}}
    seen = scene.exchange(ASKED, d.address(WEB))
    assert seen.reasons == {"dns-learned": 1, "dns-full": 1}
    assert scene.addresses() == {WEB: {20, 22, 23, EXACT}}


def test_an_expired_class_makes_room(scene: DnsScene) -> None:
    """A class that has expired is replaced before any other, and that is not counted."""
    key = struct.pack("=I", ENDPOINT) + bytes([203, 0, 113, 5])
    now = scene.now_units()
    row = abi.np_learned()
    for way, (one, left) in enumerate(((31, 1000), (32, -5), (33, 10), (34, 2000))):
        row.name_class[way], row.until[way] = one, (now + left) & 0xFFFFFFFF
    scene.rig.map("np_learned4").put(key, bytes(row))
    assert scene.exchange(ASKED, d.address(WEB)).reasons == {"dns-learned": 1}
    assert scene.addresses() == {WEB: {31, 33, 34, EXACT}}


@pytest.mark.parametrize("count", [2, 28, 64, 65, 128])
def test_many_addresses(scene: DnsScene, count: int) -> None:
    """One answer teaches up to 128 addresses."""
    addresses = [f"203.0.{number // 250}.{number % 250 + 1}" for number in range(count)]
    seen = scene.exchange(ASKED, *(d.address(one) for one in addresses))
    assert seen.reasons == {"dns-learned": count}
    assert scene.addresses() == {one: {EXACT} for one in addresses}


def test_only_128_addresses_count(scene: DnsScene) -> None:
    """Further addresses are not learned, which is counted."""
    addresses = [f"203.0.{number // 250}.{number % 250 + 1}" for number in range(200)]
    seen = scene.exchange(ASKED, *(d.address(one) for one in addresses))
    assert seen.reasons == {"dns-learned": 128, "dns-too-long": 1}
    assert scene.addresses() == {one: {EXACT} for one in addresses[:128]}


def test_many_addresses_of_many_classes(scene: DnsScene) -> None:
    """A chain of four classes and 128 addresses stays within the budget of tail calls."""
    chain = ["www.example.com", "a.cdn.net", "n0.example.com", "n1.example.com"]
    scene.pattern(chain[2], 20)
    scene.pattern(chain[3], 21)
    targets = [d.cname(after, owner=before) for before, after in pairwise(chain)]
    addresses = [f"203.0.113.{number}" for number in range(128)]
    last = d.pointer(len(ASKED.answer(*targets).wire()) - len(targets[-1].data))
    seen = scene.exchange(ASKED, *targets, *(d.address(one, owner=last) for one in addresses))
    assert seen.reasons == {"dns-learned": 128}
    assert scene.addresses() == {one: {EXACT, WILD, 20, 21} for one in addresses}


def test_more_classes_than_a_row_has_room_for(scene: DnsScene) -> None:
    """Of a chain with five classes, four are learned, and the loss is counted."""
    chain = ["www.example.com", *(f"n{number}.example.com" for number in range(4))]
    for number, name in enumerate(chain[1:]):
        scene.pattern(name, 20 + number)
    targets = [d.cname(after, owner=before) for before, after in pairwise(chain)]
    seen = scene.exchange(ASKED, *targets, d.address(WEB, owner=chain[-1]))
    assert seen.reasons == {"dns-learned": 1, "dns-full": 1}
    assert scene.addresses() == {WEB: {20, 21, 22, 23}}


LONG = ".".join(["x" * 63, "y" * 63, "z" * 63, "w" * 61])
"""255 bytes on the wire."""


@pytest.mark.parametrize(
    "name", ["a.b", "x" * 15 + ".b", "x" * 16 + ".b", "X" * 63 + ".cDn", LONG, ".".join("a" * 127), "[@Z`{.az"]
)
def test_names_of_every_length(scene: DnsScene, name: str) -> None:
    """Names up to 255 bytes and 127 labels are learned, in any case of letters."""
    scene.pattern(name, 50)
    scene.exchange(d.Message(name.swapcase()), d.address(WEB))
    assert scene.addresses() == {WEB: {50}}
    assert scene.take_reports() == [(name.lower(), WEB, 50, 60)]


@pytest.mark.parametrize(
    "owner",
    ["www.example.com", "WWW.example.COM", b"\x03www" + d.pointer(16), b"\x03www\x07example" + d.pointer(24)],
    ids=["whole", "case", "pointer", "later pointer"],
)
def test_owner_names_are_compared_whole(scene: DnsScene, owner: str | bytes) -> None:
    """An owner counts whether it is compressed or not, and whatever the case of its letters."""
    scene.exchange(ASKED, d.address(WEB, owner=owner))
    assert scene.addresses() == {WEB: {EXACT}}


def test_records_of_other_names_are_skipped(scene: DnsScene) -> None:
    """Records of other owners, types and classes between the others teach nothing and do no harm."""
    scene.exchange(
        ASKED,
        d.address("203.0.113.9", owner="evil.example.net"),
        d.cname("a.cdn.net", owner="evil.example.net"),
        d.Record(b"\x04text", d.TXT),
        d.Record(bytes(4), d.A, family=d.CHAOS),
        d.Record(bytes(3), 4711),
        d.address(WEB),
    )
    assert scene.addresses() == {WEB: {EXACT}}


def test_stream_answers(scene: DnsScene) -> None:
    """TCP carries several questions in one segment, and several answers."""
    second = replace(ASKED6, identification=2)
    scene.rig.out(stream_question(b"", flags=p.SYN))
    scene.rig.into(stream_answer(b"", flags=p.SYN | p.ACK))
    scene.rig.out(stream_question(d.prefixed(ASKED.wire(), second.wire())))
    assert scene.pending() == 2
    both = (ASKED.answer(d.address(WEB)).wire(), second.answer(d.address(WEB6)).wire())
    seen = scene.rig.into(stream_answer(d.prefixed(*both)))
    assert seen.reasons == {"dns-learned": 2}
    assert scene.addresses() == {WEB: {EXACT}, WEB6: {EXACT}}
    assert scene.rig.into(stream_answer(b"")).reasons == {}


def test_a_stream_answer_in_two_segments_is_not_read(scene: DnsScene) -> None:
    """A message that the segment does not hold whole is counted, passes, and teaches nothing."""
    scene.rig.out(stream_question(b"", flags=p.SYN))
    scene.rig.into(stream_answer(b"", flags=p.SYN | p.ACK))
    scene.rig.out(stream_question(d.prefixed(ASKED.wire())))
    whole = d.prefixed(ASKED.answer(d.address(WEB), d.address("203.0.113.6")).wire())
    first = scene.rig.into(stream_answer(whole[:-4]))
    assert (first.passed, first.reasons) == (True, {"dns-too-long": 1})
    assert scene.rig.into(stream_answer(whole[-4:])).passed
    assert scene.addresses() == {}


def test_packets_of_known_connections_are_read(scene: DnsScene) -> None:
    """The flow cache never has a flow of a DNS server, so each of its answers is read."""
    for number in range(5):
        asked = replace(ASKED, identification=number)
        assert scene.exchange(asked, d.address(f"203.0.113.{number}")).reasons == {"dns-learned": 1}
    assert len(scene.addresses()) == 5


def test_other_ports_of_servers(scene: DnsScene) -> None:
    """A server at another port is read if the configuration names the port and the server is trusted there."""
    scene.trust(SERVER4, 5353)

    def exchange() -> None:
        scene.rig.out(question(ASKED.wire(), to=5353))
        scene.rig.into(answer(ASKED.answer(d.address(WEB)).wire(), by=5353))

    exchange()
    assert scene.addresses() == {}
    scene.configure(dns_ports=1053 | 5353 << 32)
    scene.rig.forget_flow_cache()
    exchange()
    assert scene.addresses() == {WEB: {EXACT}}


def test_host_endpoints_learn_at_the_other_hooks(scene: DnsScene) -> None:
    """A process of the node asks at TC egress of the node's interface, and gets the answer at TC ingress."""
    scene.rig.endpoint(everything(3, ALLOW, 13), everything(4, ALLOW, 14), flags=abi.NP_ENDPOINT_HOST)
    scene.rig.local(POD4)
    scene.rig.epoch()
    scene.rig.send(Hook.TC_EGRESS, question(ASKED.wire()), ingress=0)
    seen = scene.rig.send(Hook.TC_INGRESS, answer(ASKED.answer(d.address(WEB)).wire()))
    assert "dns-learned" in seen.reasons
    assert scene.addresses() == {WEB: {EXACT}}


# --- what pays nothing and what is dropped ----------------------------------------------------------------------------


def test_nothing_is_read_without_the_flag(scene: DnsScene) -> None:
    """Without NP_CONFIG_NAMES, DNS packets take the fast path like all others."""
    config = scene.rig.dataplane.config()
    scene.rig.flags(config.flags & ~abi.NP_CONFIG_NAMES)
    assert scene.exchange(ASKED, d.address(WEB)).reasons == {}
    assert scene.pending() == 0
    assert scene.addresses() == {}


def test_a_denied_packet_teaches_nothing(scene: DnsScene) -> None:
    """A question that policy denies is not pending, and a denied answer teaches nothing."""
    scene.rig.pod(everything(1, ALLOW, 11), everything(2, DENY, 12))
    scene.rig.epoch()
    assert not scene.rig.out(question(ASKED.wire())).passed
    assert scene.pending() == 0


MISSING = ["np_tc_question", "np_tc_answer", "np_tc_records", "np_tc_learn"]


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_program_teaches_nothing(scene: DnsScene, name: str) -> None:
    """If the call of a DNS program fails, the packet passes, nothing is learned, and the failure is counted."""
    calls = scene.rig.dataplane.programs.calls
    slot = next(slot for slot, one in abi.CALLS.items() if one == name)
    try:
        assert calls.delete(struct.pack("=I", slot))
        asked = scene.rig.out(question(ASKED.wire()))
        seen = scene.rig.into(answer(ASKED.answer(d.address(WEB)).wire()))
    finally:
        scene.rig.dataplane.programs.mend_calls()
    assert asked.passed
    assert seen.passed
    both = {**asked.reasons, **seen.reasons}
    assert both["dns-call-missing"] == 1
    assert scene.addresses() == {}


def test_a_limited_endpoint_learns_no_new_address(scene: DnsScene) -> None:
    """An endpoint without tokens learns no new address, but still renews those that it has."""
    scene.exchange(ASKED, d.address(WEB))
    key = struct.pack("=I", ENDPOINT)
    row = abi.np_asked.from_buffer_copy(scene.rig.map("np_asked").get(key) or b"")
    assert row.tokens > 0
    row.tokens = 1
    scene.rig.map("np_asked").put(key, bytes(row))
    seen = scene.exchange(ASKED, d.address(WEB), d.address("203.0.113.6"), d.address("203.0.113.7"))
    assert seen.reasons == {"dns-learned": 2, "dns-limited": 1}
    assert set(scene.addresses()) == {WEB, "203.0.113.6"}


def test_lost_reports_are_counted(scene: DnsScene) -> None:
    """A full ring buffer loses reports, not addresses."""
    ring = scene.rig.map("np_dns_event")
    asked = tuple(d.address(f"203.0.113.{number}") for number in range(100))
    lost = 0
    for _ in range(ring.max_entries // (320 * 100) + 2):
        seen = scene.exchange(ASKED, *asked)
        lost += seen.reasons.get("dns-event-lost", 0)
    assert lost > 0
    assert len(scene.addresses()) == 100


# --- the hostile list -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hostile:
    """An exchange that teaches nothing. ``reasons``: what is counted for the answer."""

    name: str
    reason: str | None
    answered: Callable[[], bytes]
    """The frame of the answer."""
    asked: Callable[[], bytes | None] = lambda: question(ASKED.wire())


GOOD = ASKED.answer(d.address(WEB))
WIRE = GOOD.wire()
END = len(ASKED.wire())
"""Where the answer section begins."""


def altered(at: int, data: bytes) -> Callable[[], bytes]:
    """The good answer with other bytes."""
    return lambda: answer(WIRE[:at] + data + WIRE[at + len(data) :])


def records(*some: d.Record, **fields: int) -> Callable[[], bytes]:
    """An answer with other records."""
    return lambda: answer(replace(GOOD, answers=some, **fields).wire())  # type: ignore[arg-type]


def owned(owner: str | bytes) -> Callable[[], bytes]:
    """An answer with another owner."""
    return records(d.address(WEB, owner=owner))


NOT_ASKED, MALFORMED, REFUSED = "dns-not-asked", "dns-malformed", "dns-refused"
HOSTILE = [
    Hostile("wrong id", NOT_ASKED, altered(0, b"\xff\xff")),
    Hostile("wrong name", NOT_ASKED, lambda: answer(replace(GOOD, asked="ww2.example.com").wire())),
    Hostile("wrong case", NOT_ASKED, lambda: answer(replace(GOOD, asked="Www.example.com").wire())),
    Hostile("wrong type", NOT_ASKED, lambda: answer(replace(GOOD, kind=d.AAAA).wire())),
    Hostile("wrong class", NOT_ASKED, lambda: answer(replace(GOOD, family=d.CHAOS).wire())),
    Hostile("wrong client port", NOT_ASKED, lambda: answer(WIRE, port=CLIENT_PORT + 1)),
    Hostile("wrong server port", None, lambda: answer(WIRE, by=54)),
    Hostile("another trusted server", NOT_ASKED, lambda: answer(WIRE, server=OTHER_SERVER4)),
    Hostile("a server that is not trusted", None, lambda: answer(WIRE, server="192.0.2.1")),
    Hostile("a question to a server that is not trusted", NOT_ASKED, lambda: answer(WIRE),
            lambda: question(ASKED.wire(), server="192.0.2.1")),
    Hostile("unsolicited", NOT_ASKED, lambda: answer(WIRE), lambda: None),
    Hostile("by TCP to a question by UDP", NOT_ASKED, lambda: stream_answer(d.prefixed(WIRE))),
    Hostile("no answer", MALFORMED, altered(2, b"\x01")),
    Hostile("opcode", MALFORMED, altered(2, b"\x89")),
    *(Hostile(f"response code {code}", None, altered(3, bytes([0x80 | code]))) for code in (1, 2, 3, 5)),
    Hostile("no question", MALFORMED, altered(4, b"\0\0")),
    Hostile("two questions", MALFORMED, altered(4, b"\0\2")),
    Hostile("more answers than there are", MALFORMED, altered(6, b"\0\2")),
    Hostile("no answers", None, altered(6, b"\0\0")),
    Hostile("cut in the header", MALFORMED, lambda: answer(WIRE[:11])),
    Hostile("cut in the question", MALFORMED, lambda: answer(WIRE[: END - 1])),
    Hostile("cut in the owner", MALFORMED, lambda: answer(WIRE[: END + 1])),
    Hostile("cut in the fixed part", MALFORMED, lambda: answer(WIRE[: END + 11])),
    Hostile("cut in the address", MALFORMED, lambda: answer(WIRE[:-1])),
    Hostile("UDP length beyond the packet", "dns-too-long",
            lambda: p.frame(SERVER4, POD4, p.UDP, struct.pack("!HHHH", 53, CLIENT_PORT, 8 + len(WIRE) + 1, 0) + WIRE)),
    Hostile("UDP length of a header", MALFORMED,
            lambda: p.frame(SERVER4, POD4, p.UDP, struct.pack("!HHHH", 53, CLIENT_PORT, 8, 0) + WIRE)),
    Hostile("UDP length below its header", MALFORMED,
            lambda: p.frame(SERVER4, POD4, p.UDP, struct.pack("!HHHH", 53, CLIENT_PORT, 7, 0) + WIRE)),
    Hostile("long A", MALFORMED, records(d.Record(bytes([203, 0, 113, 5, 0])))),
    Hostile("short A", MALFORMED, records(d.Record(bytes([203, 0, 113])))),
    Hostile("AAAA of 4 bytes", MALFORMED, records(d.Record(bytes([203, 0, 113, 5]), d.AAAA))),
    Hostile("length beyond the message", MALFORMED, records(d.Record(bytes([203, 0, 113, 5]), length=5))),
    Hostile("pointer to itself", MALFORMED, owned(d.pointer(END))),
    Hostile("pointer forward", MALFORMED, owned(d.pointer(END + 2))),
    Hostile("pointer beyond the message", MALFORMED, owned(d.pointer(0x3FFF))),
    Hostile("pointer into the header", MALFORMED, owned(d.pointer(4))),
    Hostile("pointer to a pointer to itself", MALFORMED, owned(b"\1a" + d.pointer(END))),
    Hostile("pointer to a label that reaches into the name", MALFORMED, records(
        d.Record(b"\x14", 4711), d.address(WEB, owner=d.pointer(END + 12)), d.Record(bytes(30), 4711))),
    Hostile("pointer as question", MALFORMED,
            lambda: answer(replace(GOOD, asked=d.pointer(12)).wire()), lambda: question(replace(ASKED, asked=d.pointer(12)).wire())),
    Hostile("label type 64", MALFORMED, owned(b"\x41a\0")),
    Hostile("label type 128", MALFORMED, owned(b"\x81a\0")),
    Hostile("name of 256 bytes", MALFORMED, owned("a." + LONG)),
    Hostile("another owner", None, owned("evil.example.net")),
    Hostile("a child as owner", None, owned("a.www.example.com")),
    Hostile("the parent as owner", None, owned(d.pointer(16))),
    Hostile("authority section", None, lambda: answer(replace(GOOD, answers=(), authority=GOOD.answers).wire())),
    Hostile("additional section", None, lambda: answer(replace(GOOD, answers=(), additional=GOOD.answers).wire())),
    Hostile("chain with a gap", None, records(d.cname("a.cdn.net"), d.address(WEB, owner="b.cdn.net"))),
    Hostile("chain in the wrong order", None, records(d.address(WEB, owner="a.cdn.net"), d.cname("a.cdn.net"))),
    Hostile("address of a name before the chain's end", None, records(d.cname("a.cdn.net"), d.address(WEB))),
    Hostile("loop", None, records(d.cname("a.cdn.net"), d.cname("www.example.com", owner="a.cdn.net"))),
    Hostile("chain of 17", "dns-too-long", records(
        *(d.cname(f"n{number + 1}", owner=f"n{number}" if number else None) for number in range(17)),
        d.address(WEB, owner="n17"))),
    Hostile("CNAME beside an address", MALFORMED, records(d.address(WEB), d.cname("a.cdn.net"))),
    Hostile("bytes behind the target", MALFORMED, records(d.cname(d.name("a.cdn.net") + b"\0"), d.address(WEB, owner="a.cdn.net"))),
    Hostile("target beyond its record", MALFORMED, records(
        replace(d.cname("a.cdn.net"), length=5), d.address(WEB, owner="a.cdn.net"))),
    Hostile("DNAME", None, records(d.Record(d.name("cdn.net"), d.DNAME), d.address(WEB, owner="www.cdn.net"))),
    *(Hostile(f"rebinding to {one}", REFUSED, records(d.address(one))) for one in (
        "127.0.0.1", "169.254.169.254", "10.0.0.9", "0.0.0.0", "224.0.0.1", "::1", "fe80::1", "::ffff:203.0.113.5")),
]  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda one: one.name)
def test_hostile_answers_teach_nothing(scene: DnsScene, hostile: Hostile) -> None:
    """Every such answer passes, teaches nothing, and is counted as what it is."""
    for net in ("127.0.0.0/8", "169.254.0.0/16", "10.0.0.0/8", "0.0.0.0/8", "224.0.0.0/4", "::1/128", "fe80::/10"):
        scene.refuse(net)
    asked = hostile.asked()
    if asked is not None:
        assert scene.rig.out(asked).passed
    scene.rig.out(stream_question(b"", flags=p.SYN))
    seen = scene.rig.into(hostile.answered())
    assert seen.passed
    assert {name: count for name, count in seen.reasons.items() if name.startswith("dns")} == (
        {hostile.reason: 1} if hostile.reason else {}
    )
    assert scene.addresses() == {}
    assert [one for one in scene.take_reports() if one[2]] == []


def test_the_good_answer_of_the_hostile_list_teaches(scene: DnsScene) -> None:
    """The answer that the hostile ones are made from is good."""
    scene.rig.out(question(ASKED.wire()))
    scene.rig.into(answer(WIRE))
    assert scene.addresses() == {WEB: {EXACT}}


def test_a_question_is_answered_once(scene: DnsScene) -> None:
    """The first answer ends the question, so a second one teaches nothing."""
    scene.exchange(ASKED, d.address(WEB))
    seen = scene.rig.into(answer(ASKED.answer(d.address("203.0.113.66")).wire()))
    assert seen.reasons == {"dns-not-asked": 1}
    assert set(scene.addresses()) == {WEB}


def test_a_late_answer_teaches_nothing(scene: DnsScene) -> None:
    """A question waits 15 seconds for its answer."""
    units = 15 * scene.hertz // abi.NP_LEARNED_JIFFIES
    for age, expected in ((units + 3, "dns-not-asked"), (units - 3, "dns-learned")):
        scene.rig.out(question(ASKED.wire()))
        scene.age_questions(age)
        assert scene.rig.into(answer(WIRE)).reasons == {expected: 1}


def test_a_workload_cannot_answer_itself(scene: DnsScene) -> None:
    """An answer that the workload sends teaches nothing, and is no question either."""
    scene.rig.out(question(ASKED.wire()))
    scene.rig.out(question(WIRE))
    scene.rig.out(p.frame(POD4, SERVER4, p.UDP, p.udp(53, CLIENT_PORT, WIRE)))
    assert scene.addresses() == {}
    assert scene.pending() == 1


def test_only_the_endpoint_that_asked_learns(scene: DnsScene) -> None:
    """An answer teaches the endpoint to which it goes, and an endpoint without a row of questions learns nothing."""
    scene.exchange(ASKED, d.address(WEB))
    assert set(scene.learned()) == {(ENDPOINT, WEB)}
    scene.rig.map("np_asked").delete(struct.pack("=I", ENDPOINT))
    assert scene.exchange(ASKED, d.address("203.0.113.6")).reasons == {}
    assert set(scene.learned()) == {(ENDPOINT, WEB)}


def test_many_questions_at_once(scene: DnsScene) -> None:
    """Up to four questions that share slots are pending at once; hundreds of different ones mostly find room."""
    asked = [replace(ASKED, identification=number) for number in range(128)]
    for one in asked:
        scene.rig.out(question(one.wire()))
    assert scene.pending() > 110
    for _ in range(3):
        scene.rig.out(question(asked[-1].wire()))
    before = scene.pending()
    assert scene.rig.into(answer(asked[-1].answer(d.address(WEB)).wire())).reasons == {"dns-learned": 1}
    assert scene.pending() == before - 1


# --- answers that are not read ----------------------------------------------------------------------------------------


UNREAD = {"cut": altered(6, b"\0\2"), "pointer": owned(d.pointer(END))}


@pytest.mark.parametrize("name", UNREAD)
def test_unread_answers_may_be_dropped(scene: DnsScene, name: str) -> None:
    """If the configuration says so, an unread answer is dropped, with every copy of it; other answers pass."""
    scene.configure(unread_dns=abi.NP_UNREAD_DNS_DROP)
    scene.rig.out(question(ASKED.wire()))
    for _ in range(2):
        seen = scene.rig.into(UNREAD[name]())
        assert (seen.passed, seen.reasons) == (False, {"dns-malformed": 1, "dns-unread": 1})
        assert [event.reason for event in seen.events] == [abi.NP_REASON_DNS_UNREAD]
    assert scene.rig.into(answer(WIRE)).reasons == {"dns-learned": 1}


def test_packets_that_answer_no_question_are_never_dropped(scene: DnsScene) -> None:
    """Even if unread answers are dropped, what belongs to no pending question passes."""
    scene.configure(unread_dns=abi.NP_UNREAD_DNS_DROP)
    scene.rig.out(stream_question(b"", flags=p.SYN))
    scene.rig.into(stream_answer(b"", flags=p.SYN | p.ACK))
    for data in (b"", b"\0", bytes(2), bytes(40), b"\xff" * 200, d.prefixed(WIRE)):
        assert scene.rig.into(stream_answer(data)).passed
    for data in (b"", b"x", bytes(12), WIRE, WIRE[:20]):
        assert scene.rig.into(answer(data)).passed


# --- fragments --------------------------------------------------------------------------------------------------------


def ones_complement(data: bytes) -> int:
    """The sum of 16-bit words; 0xffff if the checksum in the data is right."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) // 2 * 2]))
    if len(data) % 2:
        total += data[-1] << 8
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@pytest.mark.parametrize("asked", ["www.example.com", "ww.example.com", "w.example.com", LONG])
@pytest.mark.parametrize("client", [POD4, POD6], ids=["IPv4", "IPv6"])
def test_an_answer_in_fragments_is_cut(scene: DnsScene, client: str, asked: str) -> None:
    """The first fragment becomes a whole packet with a truncated answer and right checksums; later ones are dropped."""
    message = replace(ASKED, asked=asked)
    wire = message.answer(*(d.address(f"203.0.113.{number}") for number in range(100))).wire()
    datagram = p.udp(53, CLIENT_PORT, wire)
    server = server_of(client)
    parts = (datagram[:1200], datagram[1200:])
    if client == POD4:
        with_sum = [bytearray(p.ip4(server, client, p.UDP, part, offset=1200 * index, more=not index))
                    for index, part in enumerate(parts)]  # fmt: skip
        for one in with_sum:
            one[10:12] = struct.pack("!H", 0xFFFF ^ ones_complement(bytes(one[:20])))
        frames = [p.eth(bytes(one), p.IP4) for one in with_sum]
    else:
        frames = [
            p.eth(p.ip6(server, client, 44, p.fragment6(p.UDP, part, offset=1200 * index, more=not index)), p.IP6)
            for index, part in enumerate(parts)
        ]
    scene.rig.out(question(message.wire(), client=client))
    verdict, left = scene.changed(frames[0])
    assert verdict == abi.NP_PASS
    at = 14 + (20 if client == POD4 else 48)
    cut = left[at + 8 :]
    assert cut[:12] == wire[:2] + bytes([wire[2] | 2]) + wire[3:6] + bytes(6)
    assert cut[12:] == message.wire()[12:]
    header = left[14:at]
    if client == POD4:
        assert ones_complement(header) == 0xFFFF
        assert struct.unpack("!H", header[2:4])[0] == len(left) - 14
        assert header[6:8] == bytes(2)
        pseudo = header[12:20]
    else:
        assert struct.unpack("!H", header[4:6])[0] == len(left) - 54
        assert header[42:44] == bytes(2)
        pseudo = header[8:40]
    length = len(left) - at
    assert struct.unpack("!H", left[at + 4 : at + 6])[0] == length
    assert ones_complement(pseudo + struct.pack("!HH", 17, length) + left[at:]) == 0xFFFF
    later = scene.rig.into(frames[1])
    assert (later.passed, later.reasons) == (False, {"dns-fragment": 1})
    assert scene.addresses() == {}


def test_fragments_that_answer_no_question_pass(scene: DnsScene) -> None:
    """Fragments of a packet that belongs to no pending question are left as they are."""
    datagram = p.udp(53, CLIENT_PORT, ASKED.answer(*(d.address(WEB) for _ in range(100))).wire())
    first = p.eth(p.ip4(SERVER4, POD4, p.UDP, datagram[:1200], more=True), p.IP4)
    later = p.eth(p.ip4(SERVER4, POD4, p.UDP, datagram[1200:], offset=1200), p.IP4)
    assert scene.changed(first) == (abi.NP_PASS, first)
    assert scene.rig.into(later).passed


def test_servers_of_both_families_are_trusted_by_address(scene: DnsScene) -> None:
    """A server that is no longer trusted teaches nothing, also to a pending question."""
    scene.rig.out(question(ASKED.wire(), client=POD6))
    scene.rig.map("np_resolver6").delete(bytes.fromhex("fd000096") + bytes(11) + b"\x0a" + struct.pack("=Hxx", 53))
    assert server_of(POD6) == SERVER6
    assert scene.rig.into(answer(WIRE, client=POD6)).reasons == {}
    assert scene.addresses() == {}
