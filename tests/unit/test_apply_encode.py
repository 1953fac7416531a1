# SPDX-License-Identifier: Apache-2.0
"""Rows as the bytes of the kernel's maps.

The tests decode them with the declared structures, and not with the packers.
"""

from __future__ import annotations

import ctypes
from ipaddress import ip_address, ip_network

import pytest

from netpol_ebpf.apply import encode
from netpol_ebpf.compiler.limits import Limits
from netpol_ebpf.compiler.tables import FIRST_NODE, NO_RANK, AddressRow, DomainRow, EndpointRow, SetRow, VerdictRow
from netpol_ebpf.errors import NetpolError
from netpol_ebpf.policy.types import Action, Cause, CauseKind, Direction, Outcome, PolicyKey, Stage
from netpol_loader import abi
from netpol_loader.tables.seal import seal_endpoint

SET = SetRow(
    number=3, default_class4=1, default_class6=11, peer_classes=5, own_set=9, own_default_class4=2, own_default_class6=12,
    own_classes=4, l4_base=6, l4_classes=7, asks_source=1, source_base=8, source_classes=10, verdict_base=4096,
)  # fmt: skip


def read(structure: type[ctypes.Structure], raw: bytes) -> dict[str, object]:
    """A structure's fields as plain values, arrays as lists."""
    assert len(raw) == ctypes.sizeof(structure)
    value = structure.from_buffer_copy(raw)
    plain: dict[str, object] = {}
    for name, *_ in structure._fields_:
        one = getattr(value, name)
        plain[name] = list(one) if isinstance(one, ctypes.Array) else one
    return plain


def encoded(table: str, key: object, row: object) -> tuple[str, dict[str, object], dict[str, object]]:
    """(map, key, value) of one row, decoded by the structures."""
    ((name, raw_key, raw_value),) = encode.elements(table, {key: row})
    spec = abi.MAP_SPECS[abi.OVERFLOW_MAPS.get(name, name)]
    assert (len(raw_key), len(raw_value)) == (spec.key_size, spec.value_size)
    assert encode.map_and_key(table, key) == (name, raw_key)
    assert spec.value is not None
    fields = read(spec.key, raw_key) if spec.key else {"index": int.from_bytes(raw_key, "little")}
    return name, fields, read(spec.value, raw_value)


def test_addresses_go_to_the_map_of_their_family() -> None:
    """The key of a known address is in network order. The row has its identity and owner."""
    name, key, value = encoded("addresses", ip_address("10.1.2.3"), AddressRow(77, 5))
    assert (name, key, value) == ("np_addr4", {"address": [10, 1, 2, 3]}, {"identity": 77, "holder": 5})
    name, key, value = encoded("addresses", ip_address("fd00::7"), AddressRow(78))
    assert (name, key["address"]) == ("np_addr6", [0xFD, *[0] * 14, 7])
    assert value == {"identity": 78, "holder": 0}


def test_address_elsewhere_is_held_by_its_node() -> None:
    """The numbers of nodes begin after those of endpoints."""
    assert FIRST_NODE == abi.NP_NODE_FIRST > Limits().endpoints
    _, _, value = encoded("addresses", ip_address("10.1.2.3"), AddressRow(77, node=FIRST_NODE + 3))
    assert value == {"identity": 77, "holder": abi.NP_NODE_FIRST + 3}
    _, _, raw = encode.local_element(ip_address("10.1.2.3"), encode.Meaning(encode.LocalFlag.NODE, node=FIRST_NODE + 3))
    assert read(abi.np_local, raw) == {"flags": abi.NP_LOCAL_NODE, "ifindex": 0, "node": FIRST_NODE + 3}


def test_prefixes_go_to_the_trie_of_their_family() -> None:
    """The key of a prefix is its length in bits and its address."""
    name, key, value = encoded("cidrs", ip_network("10.1.0.0/16"), 30)
    assert (name, key, value) == ("np_cidr4", {"prefix_bits": 16, "address": [10, 1, 0, 0]}, {"identity": 30})
    name, key, _ = encoded("cidrs", ip_network("fd00::/8"), 31)
    assert (name, key["prefix_bits"], key["address"]) == ("np_cidr6", 8, [0xFD, *[0] * 15])


def test_allowed_source_has_the_endpoint_before_the_prefix() -> None:
    """The prefix from which an endpoint may send follows the 32 bits of the endpoint."""
    name, key, value = encode.source_element(5, ip_network("192.0.2.0/24"))
    assert name == "np_source4"
    assert read(abi.np_source4_key, key) == {"prefix_bits": 56, "endpoint": 5, "address": [192, 0, 2, 0]}
    assert read(abi.np_source, value) == {"allowed": 1}
    name, key, _ = encode.source_element(5, ip_network("fd00::/16"))
    assert (name, read(abi.np_source6_key, key)["prefix_bits"]) == ("np_source6", 48)


def test_peer_class_is_keyed_by_set_and_identity() -> None:
    """The parts of the key are in this order."""
    assert encoded("peer_classes", (3, 77), 2) == ("np_peer_class", {"set": 3, "identity": 77}, {"peer_class": 2})


def test_blocks_keep_their_cells_in_order() -> None:
    """Atom and column blocks are arrays of 16-bit numbers."""
    atoms = tuple(range(abi.NP_ATOM_BLOCK))
    name, key, value = encoded("l4_atoms", 1536, atoms)
    assert (name, key, value) == ("np_l4_atom", {"index": 1536}, {"atom": list(atoms)})
    classes = tuple(range(65000, 65000 + abi.NP_COLUMN_BLOCK))
    name, key, value = encoded("l4_columns", 4, classes)
    assert (name, key, value) == ("np_l4_col", {"index": 4}, {"l4_class": list(classes)})


def test_verdict_tells_actions_and_rules_of_both_evaluations() -> None:
    """Every outcome has a code other than 0, which means that the entry was never written."""
    row = VerdictRow(Outcome.ALLOW, 11, Outcome.DENY, 12, 13)
    name, key, value = encoded("verdicts", 70000, row)
    assert (name, key) == ("np_verdict", {"index": 70000})
    assert value == {
        "rule": 11, "staged_rule": 12, "log_list": 13, "flags": 0,
        "action": abi.NP_ACTION_ALLOW, "staged_action": abi.NP_ACTION_DENY,
    }  # fmt: skip
    assert set(encode.ACTION) == set(Outcome)
    assert abi.NP_ACTION_NONE not in encode.ACTION.values()


def test_rule_is_readable() -> None:
    """A rule's name is the text of its cause."""
    cause = Cause(CauseKind.RULE, Direction.INGRESS, "default", PolicyKey("NetworkPolicy", "shop", "web"), index=2)
    name, key, value = encoded("rules", 11, cause)
    assert (name, key) == ("np_rule", {"rule": 11})
    assert value["name"] == b"default|NetworkPolicy/shop/web|ingress|2|deny"


def test_long_rule_name_shows_that_it_was_shortened() -> None:
    """A name that is too long keeps both ends and gets a hash, so that two long names stay different."""
    causes = [
        Cause(CauseKind.RULE, Direction.EGRESS, "t", PolicyKey("NetworkPolicy", "n" * 63, "a" * 100 + middle), index=7)
        for middle in ("x" * 40, "y" * 40)
    ]
    names = [encode.render_rule_name(cause) for cause in causes]
    assert names[0] != names[1]
    for name in names:
        assert len(name) == abi.NP_RULE_NAME_BYTES - 1
        assert b"~" in name
        assert name.startswith(b"t|NetworkPolicy/nnn")
        assert name.endswith(b"|egress|7|deny")


def test_exact_fit_of_a_rule_name_is_not_shortened() -> None:
    """The longest name that fits with its terminating zero is kept."""
    cause = Cause(CauseKind.PROFILE, Direction.EGRESS, profile="p" * 96, index=0, action=Action.ALLOW)
    assert encode.render_rule_name(cause) == str(cause).encode()
    assert len(str(cause)) == abi.NP_RULE_NAME_BYTES - 1


def test_endpoint_carries_both_sets_and_their_check() -> None:
    """The row has its interface twice and both sets in their places, and its check words are set."""
    row = EndpointRow(5, {(Direction.EGRESS, Stage.NORMAL): SET})
    sets = encode.EndpointSets.of(row)
    name, key, value = encode.endpoint_element(42, 5, sets, encode.EndpointFlag.SOURCES)
    assert (name, read(abi.np_endpoint_key, key)) == ("np_endpoint", {"ifindex": 42})
    endpoint = encode.decode_endpoint(value)
    assert (endpoint.number, endpoint.ifindex, endpoint.flags) == (5, 42, abi.NP_ENDPOINT_SOURCES)
    for field in SET.__slots__:
        assert getattr(endpoint.egress, field) == getattr(SET, field)
        assert getattr(endpoint.ingress, field) == 0
    assert bytes(seal_endpoint(encode.decode_endpoint(value))) == value


def test_stage_selects_the_sets_of_a_host() -> None:
    """The sets of the requested stage are taken."""
    row = EndpointRow(5, {(Direction.INGRESS, Stage.PRE_DNAT): SET})
    assert encode.EndpointSets.of(row, Stage.PRE_DNAT) == encode.EndpointSets(SET, None)
    assert encode.EndpointSets.of(row) == encode.EndpointSets(None, None)


@pytest.mark.parametrize("table", ["log_lists", "identities", "endpoints"])
def test_tables_without_a_map_yield_no_element(table: str) -> None:
    """Tables without a map, or whose rows need an interface, are not written by table."""
    assert list(encode.elements(table, {1: object()})) == []


def test_changed_layout_is_an_error() -> None:
    """A structure with unexpected fields is an error, and is not filled in another order."""
    assert encode.layout(abi.np_addr, "identity", "holder").size == 8
    with pytest.raises(NetpolError, match="np_addr has the fields identity, holder"):
        encode.layout(abi.np_addr, "holder", "identity")


NAMES = [
    ("www.example.com", b"\x03com\x07example\x03www\0"),
    ("*.example.com", b"\x03com\x07example"),
    ("com", b"\x03com\0"),
    ("*", b""),
    (f"*.{'a' * 63}.com", b"\x03com\x3f" + b"a" * 63),
    ("_srv._tcp.a-b.org", b"\x03org\x03a-b\x04_tcp\x04_srv\0"),
]


@pytest.mark.parametrize(("pattern", "labels"), NAMES, ids=[pattern[:20] for pattern, _ in NAMES])
def test_name_has_its_labels_in_reverse_order(pattern: str, labels: bytes) -> None:
    """The key of a name ends with a zero byte, that of a wildcard does not; decoding a key gives the pattern."""
    name, key, value = encoded("names", pattern, 9)
    assert (name, key["prefix_bits"], value) == ("np_name", len(labels) * 8, {"name_class": 9})
    assert key["labels"] == list(labels.ljust(abi.NP_NAME_BYTES, b"\0"))
    assert encode.decode_key("np_name", encode.name_key(pattern)) == ("names", pattern)


LONGEST = ".".join(["a" * 63] * 3 + ["b" * 61])
"""The longest name: with lengths and the final zero, 255 bytes."""


def test_longest_name_fits() -> None:
    """A name of 253 characters has a key; one character more is rejected."""
    assert len(LONGEST) == 253
    assert encode.decode_key("np_name", encode.name_key(LONGEST)) == ("names", LONGEST)
    with pytest.raises(NetpolError, match="no row for the pattern"):
        encode.name_key(f"{LONGEST}bb")


@pytest.mark.parametrize("pattern", ["", "a..b", "a.", ".a", "x.*.com", "*x.com", "a.*", f"{'a' * 64}.com"])
def test_pattern_that_the_trie_cannot_match_is_rejected(pattern: str) -> None:
    """An asterisk inside, an empty label and a long one have no key."""
    with pytest.raises(NetpolError, match="no row for the pattern"):
        encode.name_key(pattern)


@pytest.mark.parametrize(
    ("bits", "labels"),
    [(8, b"\0"), (24, b"\x03co"), (33, b"\x03com\0"), (2048, b"\xff" * 256), (32, b"\x03com\1"), (40, b"\x03c*m\0")],
)
def test_foreign_key_of_a_name_is_no_pattern(bits: int, labels: bytes) -> None:
    """A key that no pattern has is none, so that the audit removes its row."""
    key = bytes(abi.np_name_key(prefix_bits=bits, labels=(ctypes.c_uint8 * 256)(*labels)))
    assert encode.decode_key("np_name", key) == ("names", None)


def test_domain_row_is_keyed_by_list_and_class() -> None:
    """Ranks and rules of both evaluations keep their places."""
    name, key, value = encoded("domains", (5, 40), DomainRow(3, NO_RANK, 30, 0, 70))
    assert (name, key) == ("np_domain", {"list": 5, "name_class": 40})
    assert value == {"rank": 3, "staged_rank": abi.NP_RANK_LAST, "rule": 30, "staged_rule": 0, "log_list": 70}
    assert encode.decode_key("np_domain", encode.map_and_key("domains", (5, 40))[1]) == ("domains", (5, 40))


def test_verdict_has_its_domain_list_above_the_flags() -> None:
    """List and flag do not overlap, up to the greatest list number."""
    for failsafe in (False, True):
        row = VerdictRow(Outcome.DENY, 11, Outcome.DENY, 11, failsafe=failsafe, domain_list=32767)
        _, _, value = encoded("verdicts", 1, row)
        assert value["flags"] == 0xFFFE + failsafe


def test_learned_address_has_its_classes_and_their_times() -> None:
    """Unused classes are 0; a time has 32 bits."""
    name, key, value = encode.learned_element(7, ip_address("192.0.2.1"), {40: 5, 41: (1 << 32) + 6})
    assert (name, read(abi.np_learned4_key, key)) == ("np_learned4", {"endpoint": 7, "address": [192, 0, 2, 1]})
    assert read(abi.np_learned, value) == {"name_class": [40, 41, 0, 0], "until": [5, 6, 0, 0]}
    name, key, _ = encode.learned_element(7, ip_address("2001:db8::1"), {})
    assert (name, read(abi.np_learned6_key, key)["endpoint"]) == ("np_learned6", 7)
