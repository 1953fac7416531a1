# SPDX-License-Identifier: Apache-2.0
"""Encodes rows of the compiled tables as map keys and values, in the layout of `netpol_loader.abi`.

Invariants: sizes, offsets and field names come from `netpol_loader.abi`.  If a field is renamed there, the import of
this module fails.  One row is one element of one map.  A shortened name has a visible mark.

This module must not write to maps; `netpol_ebpf.apply.applier` writes them.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network
from typing import Any

from netpol_ebpf.compiler.tables import AddressRow, DomainRow, EndpointRow, SetRow, VerdictRow
from netpol_ebpf.errors import NetpolError
from netpol_ebpf.policy.types import Cause, Direction, IPAddress, IPNetwork, Outcome, Stage, Vip, VipKey
from netpol_loader import abi
from netpol_loader.tables.buckets import vip_filter_bit
from netpol_loader.tables.seal import fold, seal_endpoint, seal_host

Element = tuple[str, bytes, bytes]
"""(map name, key, value)."""

LOCAL_ROWS = 1 << 14
"""How many encoded rows of addresses of the node are cached; arbitrary, more than a full node has."""

LABEL_BYTES = 63
"""The longest label of a domain name (RFC 1035)."""

ACTION: Mapping[Outcome, int] = {
    Outcome.ALLOW: abi.NP_ACTION_ALLOW,
    Outcome.DENY: abi.NP_ACTION_DENY,
    Outcome.CONTINUE: abi.NP_ACTION_CONTINUE,
}
OUTCOME: Mapping[int, Outcome] = {number: outcome for outcome, number in ACTION.items()}

DIRECTION: Mapping[int, Direction] = {
    abi.NP_DIRECTION_INGRESS: Direction.INGRESS,
    abi.NP_DIRECTION_EGRESS: Direction.EGRESS,
}

_CODES: Mapping[Any, str] = {
    ctypes.c_uint8: "B",
    ctypes.c_uint16: "H",
    ctypes.c_uint32: "I",
    ctypes.c_uint64: "Q",
}


def layout(structure: type[ctypes.Structure], *names: str) -> struct.Struct:
    """A packer for a flat structure that has exactly the fields ``names``, in this order.

    A byte array takes ``bytes``.  A field ``pad`` is not among ``names`` and is packed as zeros.  Raises NetpolError if
    the structure has other fields.
    """
    codes, found = "=", []
    for name, kind, *_ in structure._fields_:
        length = getattr(kind, "_length_", 0)
        element = getattr(kind, "_type_", None) if length else kind
        if name == "pad":
            codes += f"{ctypes.sizeof(kind)}x"
            continue
        found.append(name)
        if not length:
            codes += _CODES[element]
        elif element in (ctypes.c_uint8, ctypes.c_char):
            codes += f"{length}s"
        else:
            codes += f"{length}{_CODES[element]}"
    packer = struct.Struct(codes)
    if tuple(found) != names or packer.size != ctypes.sizeof(structure):
        raise NetpolError(f"{structure.__name__} has the fields {', '.join(found)}; expected {', '.join(names)}")
    return packer


_INDEX = struct.Struct("=I")
_ADDR4_KEY = layout(abi.np_addr4_key, "address")
_ADDR6_KEY = layout(abi.np_addr6_key, "address")
_ADDR = layout(abi.np_addr, "identity", "holder")
_CIDR4_KEY = layout(abi.np_cidr4_key, "prefix_bits", "address")
_CIDR6_KEY = layout(abi.np_cidr6_key, "prefix_bits", "address")
_CIDR = layout(abi.np_cidr, "identity")
_SOURCE4_KEY = layout(abi.np_source4_key, "prefix_bits", "endpoint", "address")
_SOURCE6_KEY = layout(abi.np_source6_key, "prefix_bits", "endpoint", "address")
_SOURCE = layout(abi.np_source, "allowed")
_PEER_CLASS_KEY = layout(abi.np_peer_class_key, "set", "identity")
_PEER_CLASS = layout(abi.np_peer_class, "peer_class")
_L4_ATOM = layout(abi.np_l4_atom, "atom")
_L4_COL = layout(abi.np_l4_col, "l4_class")
_VERDICT = layout(abi.np_verdict, "rule", "staged_rule", "log_list", "action", "staged_action", "flags")
_DOMAIN_KEY = layout(abi.np_domain_key, "list", "name_class")
_DOMAIN = layout(abi.np_domain, "rank", "staged_rank", "rule", "staged_rule", "log_list")
_NAME_KEY = layout(abi.np_name_key, "prefix_bits", "labels")
_NAME = layout(abi.np_name, "name_class")
_LEARNED4_KEY = layout(abi.np_learned4_key, "endpoint", "address")
_LEARNED6_KEY = layout(abi.np_learned6_key, "endpoint", "address")
_LEARNED = layout(abi.np_learned, "name_class", "until")
_RULE_KEY = layout(abi.np_rule_key, "rule")
_RULE = layout(abi.np_rule, "name")
_ENDPOINT_KEY = layout(abi.np_endpoint_key, "ifindex")
_NUMBER_KEY = layout(abi.np_number_key, "number")
_PLACE = layout(abi.np_ifindex, "ifindex")
_LOCAL = layout(abi.np_local, "flags", "ifindex", "node")
_TUNNEL_KEY = layout(abi.np_tunnel_key, "port", "protocol")
_TUNNEL = layout(abi.np_tunnel, "taken")
_SPECIAL = layout(abi.np_vip_filter, "bits")
_VIP4_KEY = layout(abi.np_vip4_key, "address", "port", "protocol")
_VIP6_KEY = layout(abi.np_vip6_key, "address", "port", "protocol")
_RESOLVER4_KEY = layout(abi.np_resolver4_key, "address", "port")
_RESOLVER6_KEY = layout(abi.np_resolver6_key, "address", "port")
_RESOLVER = layout(abi.np_resolver, "trusted")
_UNLEARNED = layout(abi.np_unlearned, "refused")
_VIP = layout(abi.np_vip, "flags", "local_port", "local")


def render_rule_name(cause: Cause) -> bytes:
    """The name that `bpftool` shows for a rule, in the encoding and length of the map's field.

    If a name is too long, ``~``, a hash of the whole name and ``~`` replace its middle.
    """
    name = str(cause).encode()
    room = abi.NP_RULE_NAME_BYTES - 1
    if len(name) <= room:
        return name
    mark = b"~" + hashlib.sha256(name).hexdigest()[:8].encode() + b"~"
    tail = room // 2
    head = room - tail - len(mark)
    # Cutting bytes does not split characters, because the API allows only ASCII in names.
    return name[:head] + mark + name[-tail:]


def _address(address: IPAddress, row: AddressRow) -> Element:
    name, key = address_key(address)
    return name, key, _ADDR.pack(row.identity, row.endpoint or row.node)


def address_key(address: IPAddress) -> tuple[str, bytes]:
    """The map of addresses of the address's family, and the key of the address in that map."""
    if isinstance(address, IPv4Address):
        return "np_addr4", _ADDR4_KEY.pack(address.packed)
    return "np_addr6", _ADDR6_KEY.pack(address.packed)


def cidr_key(net: IPNetwork) -> tuple[str, bytes]:
    """The map of prefixes of the net's family, and the key of the net in that map."""
    if isinstance(net, IPv4Network):
        return "np_cidr4", _CIDR4_KEY.pack(net.prefixlen, net.network_address.packed)
    return "np_cidr6", _CIDR6_KEY.pack(net.prefixlen, net.network_address.packed)


def _cidr(net: IPNetwork, identity: int) -> Element:
    name, key = cidr_key(net)
    return name, key, _CIDR.pack(identity)


def source_element(endpoint: int, net: IPNetwork) -> Element:
    """The element that allows the endpoint with the number ``endpoint`` to send from addresses in ``net``."""
    bits = 32 + net.prefixlen  # the key begins with the endpoint's number, 32 bits
    if isinstance(net, IPv4Network):
        return "np_source4", _SOURCE4_KEY.pack(bits, endpoint, net.network_address.packed), _SOURCE.pack(1)
    return "np_source6", _SOURCE6_KEY.pack(bits, endpoint, net.network_address.packed), _SOURCE.pack(1)


def _peer_class(key: tuple[int, int], peer_class: int) -> Element:
    return "np_peer_class", _PEER_CLASS_KEY.pack(*key), _PEER_CLASS.pack(peer_class)


def _l4_atoms(block: int, atoms: tuple[int, ...]) -> Element:
    return "np_l4_atom", _INDEX.pack(block), _L4_ATOM.pack(*atoms)


def _l4_columns(block: int, classes: tuple[int, ...]) -> Element:
    return "np_l4_col", _INDEX.pack(block), _L4_COL.pack(*classes)


def _verdict(index: int, row: VerdictRow) -> Element:
    flags = (abi.NP_VERDICT_FAILSAFE if row.failsafe else 0) | row.domain_list << abi.NP_VERDICT_DOMAIN_SHIFT
    value = _VERDICT.pack(
        row.rule, row.staged_rule, row.log_list, ACTION[row.outcome], ACTION[row.staged_outcome], flags
    )  # fmt: skip
    return "np_verdict", _INDEX.pack(index), value


def _domain(key: tuple[int, int], row: DomainRow) -> Element:
    value = _DOMAIN.pack(row.rank, row.staged_rank, row.rule, row.staged_rule, row.log_list)
    return "np_domain", _DOMAIN_KEY.pack(*key), value


def name_key(pattern: str) -> bytes:
    """The key of a pattern of domain names in np_name.

    ``pattern``: a name, or a wildcard: ``*.`` and a name, or ``*`` alone.  The row of ``*.example.com`` also matches the
    key of the name ``example.com``.  So the table needs a row for that name, too; class 0 if no pattern matches it.
    Raises NetpolError if the pattern has an asterisk in another place, or is no valid domain name.
    """
    labels = pattern.split(".")
    is_wildcard = labels[0] == "*"
    encoded = [label.encode() for label in reversed(labels[is_wildcard:])]
    is_valid = all(0 < len(label) <= LABEL_BYTES and b"*" not in label for label in encoded)
    parts = [bytes([len(label)]) + label for label in encoded] if is_valid else []
    key = b"".join(parts) + (b"" if is_wildcard else b"\0")
    if not is_valid or len(key) >= abi.NP_NAME_BYTES:
        raise NetpolError(f"np_name can have no row for the pattern {pattern!r}")
    return _NAME_KEY.pack(len(key) * 8, key)


def name_of_key(key: bytes) -> str | None:
    """The pattern of a key of np_name; None if the key is that of no pattern."""
    bits, labels = _NAME_KEY.unpack(key)
    left, found = labels[: bits // 8], []
    while left and left[0]:
        found.append(left[1 : left[0] + 1].decode(errors="replace"))
        left = left[left[0] + 1 :]
    pattern = ".".join(reversed([*found, *([] if left else ["*"])]))
    try:
        return pattern if name_key(pattern) == key else None
    except NetpolError:
        return None


def _name(pattern: str, name_class: int) -> Element:
    return "np_name", name_key(pattern), _NAME.pack(name_class)


def learned_key(endpoint: int, address: IPAddress) -> tuple[str, bytes]:
    """The map of learned addresses of the address's family, and the key for an endpoint's number and the address."""
    packer = _LEARNED4_KEY if isinstance(address, IPv4Address) else _LEARNED6_KEY
    return f"np_learned{address.version}", packer.pack(endpoint, address.packed)


def endpoint_of_learned(key: bytes) -> int:
    """The number of the endpoint in a key of np_learned4 or np_learned6."""
    number: int = _INDEX.unpack_from(key)[0]
    return number


def learned_element(endpoint: int, address: IPAddress, classes: Mapping[int, int]) -> Element:
    """The element that gives an endpoint the classes of names for which it learned an address.

    ``classes``: maps at most NP_LEARNED_CLASSES classes to the times when they expire, in units of NP_LEARNED_JIFFIES
    jiffies.
    """
    name, key = learned_key(endpoint, address)
    unused = (0,) * (abi.NP_LEARNED_CLASSES - len(classes))
    times = (until & 0xFFFFFFFF for until in classes.values())
    return name, key, _LEARNED.pack(*classes, *unused, *times, *unused)


def resolver_element(address: IPAddress, port: int) -> Element:
    """The element that makes the program believe a DNS server."""
    if isinstance(address, IPv4Address):
        return "np_resolver4", _RESOLVER4_KEY.pack(address.packed, port), _RESOLVER.pack(1)
    return "np_resolver6", _RESOLVER6_KEY.pack(address.packed, port), _RESOLVER.pack(1)


def unlearned_element(address: IPAddress, prefix_bits: int) -> Element:
    """The element that keeps the program from learning addresses of a prefix. ``address``: the first one."""
    if isinstance(address, IPv4Address):
        return "np_unlearned4", _CIDR4_KEY.pack(prefix_bits, address.packed), _UNLEARNED.pack(1)
    return "np_unlearned6", _CIDR6_KEY.pack(prefix_bits, address.packed), _UNLEARNED.pack(1)


def _rule(number: int, cause: Cause) -> Element:
    return "np_rule", _RULE_KEY.pack(number), _RULE.pack(render_rule_name(cause))


ENCODERS: Mapping[str, Callable[[Any, Any], Element]] = {
    "addresses": _address,
    "cidrs": _cidr,
    "peer_classes": _peer_class,
    "l4_atoms": _l4_atoms,
    "l4_columns": _l4_columns,
    "verdicts": _verdict,
    "domains": _domain,
    "names": _name,
    "rules": _rule,
}
"""Maps a table's name to the function that encodes one row of the table.

Endpoint rows are not here, because they also need an interface (see `endpoint_element`).  Log lists, identities and the
contents of name classes are not written to the kernel, because the program does not need them.
"""


def map_and_key(table: str, key: Any) -> tuple[str, bytes]:
    """The map of ``table``, and the map key of the row with the table's key ``key``."""
    if table == "addresses":
        return address_key(key)
    if table == "cidrs":
        return cidr_key(key)
    if table == "peer_classes":
        return "np_peer_class", _PEER_CLASS_KEY.pack(*key)
    if table == "domains":
        return "np_domain", _DOMAIN_KEY.pack(*key)
    if table == "names":
        return "np_name", name_key(key)
    return {"l4_atoms": "np_l4_atom", "l4_columns": "np_l4_col", "verdicts": "np_verdict", "rules": "np_rule"}[
        table
    ], _INDEX.pack(key)


def decode_key(name: str, key: bytes) -> tuple[str, Any]:
    """The table and table key of the element ``key`` of map ``name``.

    This is the inverse of `map_and_key`, but not for arrays.  The table key is None if no table can have the element.
    """
    if name in ("np_addr4", "np_addr6"):
        return "addresses", ip_address(key)
    if name in ("np_cidr4", "np_cidr6"):
        bits, packed = (_CIDR4_KEY if name == "np_cidr4" else _CIDR6_KEY).unpack(key)
        return "cidrs", ip_network((packed, bits), strict=False)
    if name == "np_peer_class":
        return "peer_classes", _PEER_CLASS_KEY.unpack(key)
    if name == "np_domain":
        return "domains", _DOMAIN_KEY.unpack(key)
    if name == "np_name":
        return "names", name_of_key(key)
    return {"np_rule": "rules"}[name], _RULE_KEY.unpack(key)[0]


class EndpointFlag(enum.IntFlag):
    """Flags of an endpoint row: NP_ENDPOINT_* in bpf/np_abi.h."""

    NONE = 0
    HOST = abi.NP_ENDPOINT_HOST
    SOURCES = abi.NP_ENDPOINT_SOURCES
    UPLINK = abi.NP_ENDPOINT_UPLINK
    ROUTES = abi.NP_ENDPOINT_ROUTES
    LAYER3 = abi.NP_ENDPOINT_LAYER3
    UNREADABLE = abi.NP_ENDPOINT_UNREADABLE
    OUTSIDE = abi.NP_ENDPOINT_OUTSIDE
    EXTERNAL = abi.NP_ENDPOINT_EXTERNAL


class LocalFlag(enum.IntFlag):
    """Properties of an address of this node or of another node: NP_LOCAL_* in bpf/np_abi.h."""

    OWN = abi.NP_LOCAL_OWN
    MANY = abi.NP_LOCAL_MANY
    GROUP = abi.NP_LOCAL_GROUP
    NODE = abi.NP_LOCAL_NODE


@dataclass(frozen=True, slots=True)
class Meaning:
    """What the node knows of an address: its own address, another node's address, a multicast group, or the like.

    ``ifindex``: the interface to which the address belongs; 0 if it belongs to no particular interface.
    ``node``: the number of the other node that has the address; 0 if no other node has it, or if that node has no
    number.
    """

    flags: LocalFlag
    ifindex: int = 0
    node: int = 0


@dataclass(frozen=True, slots=True)
class EndpointSets:
    """The two policy sets of an endpoint row.

    Without a policy set, the program denies every packet in that direction.
    """

    ingress: SetRow | None
    egress: SetRow | None

    @classmethod
    def of(cls, row: EndpointRow, stage: Stage = Stage.NORMAL) -> EndpointSets:
        """The policy sets of ``row`` in ``stage``."""
        return cls(row.sets.get((Direction.INGRESS, stage)), row.sets.get((Direction.EGRESS, stage)))


def endpoint_key(ifindex: int) -> bytes:
    """The key of an interface in np_endpoint."""
    return _ENDPOINT_KEY.pack(ifindex)


def endpoint_element(ifindex: int, number: int, sets: EndpointSets, flags: EndpointFlag, link: int = 0) -> Element:
    """The element of an endpoint on an interface.

    ``number``: the endpoint's number.
    ``link``: the ifindex of the bridge of which the interface is a port; 0 if it is not a bridge port.
    """
    row = abi.np_endpoint(number=number, ifindex=ifindex, flags=int(flags), link=link or ifindex)
    _fill_set(row.ingress, sets.ingress)
    _fill_set(row.egress, sets.egress)
    return "np_endpoint", endpoint_key(ifindex), bytes(seal_endpoint(row))


NO_SETS = EndpointSets(None, None)
"""No policy sets. This is the value for an own interface of the node in np_endpoint.

If the interface has a host endpoint, the policy sets of that endpoint are in its row of another map, np_host.
"""


def place_element(number: int, ifindex: int) -> Element:
    """The element that maps a workload's number to its interface, for packets with a sender tag."""
    return "np_ifindex", _NUMBER_KEY.pack(number), _PLACE.pack(ifindex)


STAGE: Mapping[Stage, int] = {
    Stage.NORMAL: abi.NP_STAGE_NORMAL,
    Stage.FORWARD: abi.NP_STAGE_FORWARD,
    Stage.PRE_DNAT: abi.NP_STAGE_PRE_DNAT,
    Stage.UNTRACKED: abi.NP_STAGE_UNTRACKED,
}
_DIRECTION_NUMBER = {direction: number for number, direction in DIRECTION.items()}


def host_key(number: int) -> bytes:
    """The key of a host endpoint's number in np_host."""
    return _NUMBER_KEY.pack(number)


def host_element(number: int, sets: Mapping[tuple[Direction, Stage], SetRow]) -> Element:
    """The element of a host endpoint with all its policy sets. A stage without a policy set decides nothing."""
    row = abi.np_host(number=number)
    for (direction, stage), one in sets.items():
        index = STAGE[stage] * 2 + _DIRECTION_NUMBER[direction]
        _fill_set(row.sets[index], one)
        row.present |= 1 << index
    words = [getattr(one, name) for one in row.sets for name in _SET_FIELDS]
    row.version = fold([row.present, *words]) or 1  # a hash of the content, which must not be 0
    return "np_host", host_key(number), bytes(seal_host(row))


@lru_cache(maxsize=LOCAL_ROWS)
def local_element(address: IPAddress, meaning: Meaning) -> Element:
    """The element of an address that belongs to this node or another node.

    The results are cached, because a node with hundreds of pods has hundreds of such addresses and few of them change.
    """
    return f"np_local{address.version}", address.packed, _LOCAL.pack(int(meaning.flags), meaning.ifindex, meaning.node)


def local_net_element(net: IPNetwork) -> Element:
    """The element of a prefix in which all addresses are the node's own."""
    _, key = cidr_key(net)
    return f"np_local{net.version}_net", key, _LOCAL.pack(int(LocalFlag.OWN), 0, 0)


def tunnel_element(protocol: int, port: int) -> Element:
    """The element of an encapsulation that nodes accept from any sender. ``port``: 0 for protocols without ports."""
    return "np_tunnel", _TUNNEL_KEY.pack(port, protocol), _TUNNEL.pack(1)


NO_BITS = _SPECIAL.pack(0)


@lru_cache(maxsize=LOCAL_ROWS)
def _filter_bit(address: IPAddress) -> tuple[int, int]:
    return vip_filter_bit(address.packed)


def vip_filter_elements(addresses: Iterable[IPAddress]) -> Iterator[Element]:
    """The elements of np_vip_filter with a bit for each of ``addresses`` (addresses of nodes and of services)."""
    words: dict[int, int] = {}
    for address in addresses:
        row, bit = _filter_bit(address)
        words[row] = words.get(row, 0) | 1 << bit
    for row, bits in words.items():
        yield "np_vip_filter", _INDEX.pack(row), _SPECIAL.pack(bits)


def either(one: bytes, other: bytes) -> bytes:
    """The union of two rows of np_vip_filter."""
    return _SPECIAL.pack(_SPECIAL.unpack(one)[0] | _SPECIAL.unpack(other)[0])


def vip_elements(vip: Vip, is_own: Callable[[IPAddress], bool]) -> Iterator[Element]:
    """The elements of a destination that nodes translate: one element, but for a node port one for each family.

    ``is_own``: returns whether an address is the node's own. A backend with such an address is a process of the node,
    which gets the packets although they pass no further hook.
    """
    versions = (4, 6) if vip.key.address is None else (vip.key.address.version,)
    for version in versions:
        behind = sorted({one for one in vip.backends if one[0].version == version and is_own(one[0])})
        flags, address, port = 0, b"", 0
        if len(behind) == 1:
            flags, address, port = abi.NP_VIP_LOCAL, behind[0][0].packed, behind[0][1]
        elif behind:
            flags = abi.NP_VIP_MANY
        name, key = vip_key(vip.key, version)
        yield name, key, _VIP.pack(flags, port, address)


def vip_key(key: VipKey, version: int) -> tuple[str, bytes]:
    """The map of service addresses of IP version ``version``, and the map key for ``key``."""
    packer, size = (_VIP4_KEY, 4) if version == 4 else (_VIP6_KEY, 16)  # noqa: PLR2004 - the IP version
    address = bytes(size) if key.address is None else key.address.packed
    return f"np_vip{version}", packer.pack(address, key.port, key.protocol)


_SET_FIELDS = (
    "number", "default_class4", "default_class6", "peer_classes", "own_set", "own_default_class4", "own_default_class6",
    "own_classes", "l4_base", "l4_classes", "asks_source", "source_base", "source_classes", "verdict_base",
)  # fmt: skip


def _fill_set(target: Any, row: SetRow | None) -> None:
    """Copy a policy set into the C structure ``target``.

    If ``row`` is None, the structure stays all zeros.  Then every class is out of range, so the program denies each
    packet and counts it.
    """
    if row is not None:
        for name in _SET_FIELDS:
            setattr(target, name, getattr(row, name))


def decode_endpoint(value: bytes) -> abi.np_endpoint:
    """Decode the value of an element of np_endpoint."""
    return abi.np_endpoint.from_buffer_copy(value)


def elements(table: str, rows: Mapping[Any, Any]) -> Iterator[Element]:
    """Encode rows of one table. Empty for tables without a map in the kernel."""
    encoder = ENCODERS.get(table)
    if encoder is not None:
        for key, row in rows.items():
            yield encoder(key, row)
