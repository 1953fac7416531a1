# SPDX-License-Identifier: Apache-2.0
"""The second barrier: two nf_tables tables that drop packets of workloads which bypassed the program at the TC hook.

The program sets one bit of the packet's mark (the *sign*) on each packet that it lets into the node.  The tables clear
the sign at once.  They drop a packet without it that arrived on a workload's interface: the interface has lost its
program, or never had one, or the packet skipped the hook.  A workload cannot forge the sign, because the kernel zeroes
the mark at every change of network namespace.  An interface is *new* if its name is like a workload's and its index is
not yet known.

    table inet np_barrier
      prerouting (-450)   a packet with the sign: clear the sign, accept
                          any other packet from a workload's or a new interface: count, drop
      input (225)         a packet with the due mark, which no process of the node may receive: count, drop
      output (300)        a packet of the node's own processes: set the node mark
      postrouting (250)   a packet to a new interface without the node mark: count, drop
    table bridge np_barrier
      prerouting, postrouting: the same for the ports of bridges, which the inet table does not see

Invariants: a change is one transaction, so a packet meets either all old or all new rules of a chain.  (Only while a
table is written anew, a packet can meet neither, and passes.)  A table is never changed if its comment names another
owner, or if the socket of another process owns it.  Counters are kept when a table is rewritten.  The module must not
decide which interfaces are workloads'.
"""

from __future__ import annotations

import errno
import hashlib
import re
import struct
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import lru_cache

from netpol_ebpf.errors import PlatformError
from netpol_loader.host import nftables
from netpol_loader.host.netlink import NetlinkError
from netpol_loader.host.nftables import BRIDGE, INET, Nftables, NftChain, NftMessage, NftTable

TABLE = "np_barrier"
FAMILIES: Mapping[int, str] = {INET: "inet", BRIDGE: "bridge"}
WORKLOADS, KNOWN = "workloads", "known"
"""Names of sets. WORKLOADS: the names of workloads' interfaces. KNOWN: the indices of interfaces that are not new."""
UNSIGNED, NEWBORN, DUE = "unsigned", "newborn", "due"
"""Names of counters of dropped packets. UNSIGNED: without the sign. NEWBORN: to a new interface.

DUE: with the due mark.
"""

BEFORE_ALL, AFTER_IPVS, BEHIND_MANGLE, BEFORE_LAST = -450, 225, 300, 250
"""Priorities of the chains prerouting, input, output and postrouting.

prerouting is before defragmentation (-400), and so before other programs set marks. input is after IPVS (98 to 102),
which may redirect the packet. output is after mangle and NAT, whose rules may overwrite the whole mark. postrouting is
after NAT (100).
"""
ARP = 0x0806
LONGEST_REMARK = 120
"""Longest comment of a table, in bytes; `nft` shows up to 128."""


@dataclass(frozen=True, slots=True)
class Marks:
    """Bits of the packet mark, as in `struct np_config` of bpf/np_abi.h; 0: the bit is unused."""

    seen: int = 0
    node: int = 0
    due: int = 0


@dataclass(frozen=True, slots=True)
class BarrierSpec:
    """The desired content of the tables.

    ``marks.seen`` 0: no packet is dropped for lack of the sign. ``also_seen``: an older bit that also counts as the
    sign, while interfaces change from old programs to new ones. ``patterns``: names of interfaces, or prefixes such as
    ``cali*``; an interface with such a name is closed until its index is in ``known``. ``workloads``: names of
    interfaces whose programs set the sign.
    """

    marks: Marks
    also_seen: int = 0
    patterns: tuple[str, ...] = ()
    workloads: frozenset[str] = frozenset()
    known: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference between a table and its desired content.

    ``where``: the object; ``was``: missing, changed or foreign.
    """

    where: str
    was: str


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of dropped packets. ``by_counter``: by name of the counter, then by table family.

    ``by_interface``: only packets without the sign, by name of the workload's interface.
    """

    by_counter: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    by_interface: Mapping[str, int] = field(default_factory=dict)


class TakenError(PlatformError):
    """The table exists, but its comment names another owner."""


class HeldError(TakenError):
    """The table's comment names our owner, but the socket of another process owns the table."""


@dataclass(frozen=True, slots=True)
class _BarrierRule:
    remark: str
    expressions: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class _Content:
    """The desired content of a table.

    ``rules``: (chain, rules) by the chain's name. ``sets``: keys by the set's name. ``counters``: their names.
    """

    rules: Mapping[str, tuple[NftChain, tuple[_BarrierRule, ...]]]
    sets: Mapping[str, frozenset[bytes]]
    counters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    table: NftTable | None
    chains: Mapping[str, NftChain] = field(default_factory=dict)
    rules: Mapping[str, list[str]] = field(default_factory=dict)
    sets: Mapping[str, dict[bytes, int]] = field(default_factory=dict)
    counters: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class BarrierTables:
    """The tables of one owner, in the network namespace of this process.

    `open`, or else the first use, opens the netlink socket; `close` closes the socket. What `write` wrote stays in
    force until `remove`, even after the process has ended. From Linux 6.9 on, no other process can change the tables
    while this process lives. All methods but `close` raise PlatformError. They raise its subclass TakenError if a table
    belongs to another owner.
    """

    def __init__(self, owner: str) -> None:
        """``owner``: a text that must be the same in all processes that may take over these tables."""
        self._remark = remark_of(owner)
        self._socket: Nftables | None = None
        self._news: nftables.TableNotifications | None = None
        self._is_news = False
        self._flags = 0
        self._families: tuple[int, ...] = ()
        self._verified: int | None = None  # generation at which the tables had the desired content
        self._written = BarrierSpec(Marks())  # the desired content at that time

    # --- opening ----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Find out which features the kernel has. Does nothing if that is known."""
        if self._socket is not None:
            return
        channel = Nftables()
        try:
            self._flags = (
                nftables.OWNER | nftables.PERSIST
                if _is_possible(channel, INET, nftables.OWNER | nftables.PERSIST)
                else 0
            )
            families = [INET]
            if not self._flags:
                channel.commit([nftables.new_table(INET, f"{TABLE}_trial", 0, "")], is_trial=True)
            if _is_possible(channel, BRIDGE, self._flags):
                families.append(BRIDGE)
            self._families = tuple(families)
            if not self._flags and self._news is None:  # otherwise no other process can change the tables
                self._news = nftables.TableNotifications()
        except BaseException:
            channel.close()
            raise
        self._socket = channel

    def close(self) -> None:
        """Close the sockets. The tables stay in force."""
        for one in (self._socket, self._news):
            if one is not None:
                one.close()
        self._socket = self._news = None
        self._verified = None

    def part(self) -> None:
        """Replace the inherited socket by a new one, in a fork of the process that opened the tables.

        The parent continues to use the socket, which owns the tables.
        """
        if self._socket is not None:
            self._socket.close()
            self._socket = Nftables()

    @property
    def families(self) -> tuple[str, ...]:
        """The names of the table families that the kernel supports."""
        return tuple(FAMILIES[family] for family in self._families)

    @property
    def is_held(self) -> bool:
        """Whether the kernel keeps other processes from changing the tables (from Linux 6.9 on)."""
        return bool(self._flags)

    def fileno(self) -> int | None:
        """A descriptor that is readable after a change of any table. None if no other process can change our tables."""
        return None if self._news is None else self._news.fileno()

    def note_news(self) -> None:
        """Read the notifications that wait at `fileno`."""
        self._is_news = (self._news is not None and self._news.clear()) or self._is_news

    def has_news(self) -> bool:
        """Whether any table changed since the last call of this method."""
        self.note_news()
        is_news, self._is_news = self._is_news, False
        return is_news

    def has_changed(self) -> bool:
        """Whether our tables may have changed since they last had the desired content.

        The cost is one short request.
        """
        return self._verified is None or self._verified != self._channel().generation()

    # --- reading ----------------------------------------------------------------------------------------------------

    def is_there(self) -> bool:
        """Whether our table exists in any family."""
        return bool(self.present())

    def present(self) -> list[str]:
        """The names of the families in which our table exists."""
        return [FAMILIES[family] for family, found in self._read().items() if found.table is not None]

    def members(self) -> tuple[frozenset[str], frozenset[int]]:
        """The names of workloads' interfaces and the indices of known interfaces that the tables have."""
        names: set[str] = set()
        numbers: set[int] = set()
        for found in self._read().values():
            names |= {_name_of(key) for key in found.sets.get(WORKLOADS, ())}
            numbers |= {struct.unpack("=I", key)[0] for key in found.sets.get(KNOWN, ())}
        return frozenset(names), frozenset(numbers)

    def counts(self) -> Counts:
        """The numbers of packets dropped so far."""
        by_counter: dict[str, dict[str, int]] = {}
        by_interface: dict[str, int] = {}
        channel = self._channel()
        for family in self._families:
            for name, (packets, _) in channel.counters(family, TABLE).items():
                by_counter.setdefault(name, {})[FAMILIES[family]] = packets
            for key, packets in (channel.elements(family, TABLE, WORKLOADS) or {}).items():
                by_interface[_name_of(key)] = by_interface.get(_name_of(key), 0) + packets
        return Counts(by_counter, by_interface)

    def unsigned(self) -> int:
        """The number of packets that were dropped without the sign, in all families. The cost is one short request."""
        channel = self._channel()
        found = [channel.counters(family, TABLE).get(UNSIGNED, (0, 0)) for family in self._families]
        return sum(packets for packets, _ in found)

    def _read(self) -> dict[int, _Found]:
        channel = self._channel()
        found = {}
        for family in self._families:
            table = channel.table(family, TABLE)
            self._require_ours(family, table)
            if table is None:
                found[family] = _Found(None)
                continue
            sets = {name: channel.elements(family, TABLE, name) for name in (WORKLOADS, KNOWN)}
            found[family] = _Found(
                table,
                channel.chains(family, TABLE),
                channel.rules(family, TABLE),
                {name: elements for name, elements in sets.items() if elements is not None},
                channel.counters(family, TABLE),
            )
        return found

    def _require_ours(self, family: int, table: NftTable | None) -> None:
        if table is None:
            return
        where = f"table {FAMILIES[family]} {TABLE}"
        if table.remark != self._remark:
            raise TakenError(
                f"{where} belongs to another owner ({table.remark or 'without a comment'}) and is left as it is",
                hint="If an agent with another pin root made it, `netpolctl cleanup --pin-root DIR` removes it.",
            )
        if table.flags & nftables.OWNER and table.owner != self._channel().port:
            raise HeldError(
                f"{where} is held by a process (netlink port {table.owner})",
                hint="Stop the other agent, or wait until it has ended.",
            )

    def _channel(self) -> Nftables:
        if self._socket is None:
            self.open()
        if self._socket is None:
            raise AssertionError("opened, and not open")
        return self._socket

    # --- writing ----------------------------------------------------------------------------------------------------

    def write(self, layout: BarrierSpec) -> list[Difference]:
        """Give the tables the desired content in one transaction, and keep the counters.

        Returns the differences that were found.
        """
        channel = self._channel()
        generation = channel.generation()
        known = self._changes(layout) if generation == self._verified else None
        messages, differences = self._compared(layout) if known is None else known
        if messages:
            channel.commit(messages)
        after = channel.generation()
        is_undisturbed = after in (generation, generation + 1) if messages else after == generation
        self._verified, self._written = after if is_undisturbed else None, layout
        return differences

    def _compared(self, layout: BarrierSpec) -> tuple[list[NftMessage], list[Difference]]:
        """The changes that turn the actual tables into the desired ones, and the differences between them."""
        messages: list[NftMessage] = []
        differences: list[Difference] = []
        for family, found in self._read().items():
            content = _content(layout, family)
            apart = list(_differences(found, content, FAMILIES[family]))
            differences += apart
            messages += self._repair(family, found, content, apart)
        return messages, differences

    def _changes(self, layout: BarrierSpec) -> tuple[list[NftMessage], list[Difference]] | None:
        """Compute what `_compared` returns from the last written content, without a slow read of the tables.

        The tables must be unchanged since the last write. Returns None if more than the elements of sets must change.
        """
        messages: list[NftMessage] = []
        differences: list[Difference] = []
        for family in self._families:
            before, content = _content(self._written, family), _content(layout, family)
            if before is None and content is None:
                continue
            if before is None or content is None or replace(before, sets=content.sets) != content:
                return None
            if before.sets.keys() != content.sets.keys():
                return None
            for name, keys in content.sets.items():
                if keys != before.sets[name]:
                    differences.append(Difference(f"set {name} of table {FAMILIES[family]} {TABLE}", "changed"))
                    messages += _set_changes(family, name, before.sets[name], keys)
        return messages, differences

    def _repair(
        self, family: int, found: _Found, content: _Content | None, apart: list[Difference]
    ) -> Iterator[NftMessage]:
        if content is None:
            if found.table is not None:
                yield nftables.delete_table(family, TABLE)
            return
        if found.table is None or any(not one.where.startswith("set ") for one in apart):
            if found.table is not None:
                yield nftables.delete_table(family, TABLE)
            yield from self._whole(family, found, content)
            return
        if self._flags and not found.table.flags & nftables.OWNER and found.table.flags & nftables.PERSIST:
            yield nftables.new_table(family, TABLE, self._flags, self._remark)  # the process that owned it has ended
        for name, keys in content.sets.items():
            yield from _set_changes(family, name, found.sets[name].keys(), keys)

    def _whole(self, family: int, found: _Found, content: _Content) -> Iterator[NftMessage]:
        """Write a table anew.

        While the transaction replaces a chain, a packet can meet neither the old nor the new rules. Such a packet
        passes.
        """
        yield nftables.new_table(family, TABLE, self._flags, self._remark)
        for name in content.counters:
            yield nftables.new_counter(family, TABLE, name, *found.counters.get(name, (0, 0)))
        for place, (name, keys) in enumerate(content.sets.items(), 1):
            key = (
                (nftables.NAME_TYPE, nftables.NAME_BYTES)
                if name == WORKLOADS
                else (nftables.INDEX_TYPE, nftables.INDEX_BYTES)
            )
            yield nftables.new_set(family, TABLE, name, *key, place)
            yield from nftables.change_elements(nftables.NEW_ELEMENTS, family, TABLE, name, sorted(keys))
        for name, (chain, rules) in content.rules.items():
            yield nftables.new_chain(family, TABLE, name, chain.hook, chain.priority)
            for rule in rules:
                yield nftables.new_rule(family, TABLE, name, rule.expressions, rule.remark)

    def remove(self, family: str) -> None:
        """Delete our table of the family with this name, if the table exists."""
        number = next(number for number, name in FAMILIES.items() if name == family)
        if family in self.present():
            self._channel().commit([nftables.delete_table(number, TABLE)])
        self._verified = None


def remark_of(owner: str) -> str:
    """The comment of our tables, which names their owner. `nft list tables` shows the comment."""
    remark = f"netpol-ebpf {owner}"
    if len(remark.encode()) > LONGEST_REMARK:
        remark = f"netpol-ebpf {hashlib.sha256(owner.encode()).hexdigest()}"
    return remark


def _is_possible(channel: Nftables, family: int, flags: int) -> bool:
    """Whether the kernel supports tables of ``family`` with these flags."""
    try:
        channel.commit([nftables.new_table(family, f"{TABLE}_trial", flags, "")], is_trial=True)
    except NetlinkError as error:
        if error.code in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.EINVAL):
            return False
        raise
    return True


# --- what a table holds ---------------------------------------------------------------------------------------------


def _content(layout: BarrierSpec, family: int) -> _Content | None:
    """The desired content of a family's table; None: the table must not exist."""
    marks, patterns = layout.marks, layout.patterns
    rules: dict[str, tuple[NftChain, tuple[_BarrierRule, ...]]] = {}
    sets: dict[str, frozenset[bytes]] = {}
    counters: list[str] = []
    if marks.seen:
        rules["prerouting"] = (_chain(nftables.PREROUTING, BEFORE_ALL), tuple(_prerouting(layout)))
        sets[WORKLOADS] = frozenset(raw_name(name) for name in layout.workloads)
        counters.append(UNSIGNED)
    if marks.seen and patterns:
        rules["postrouting"] = (_chain(nftables.POSTROUTING, BEFORE_LAST), tuple(_postrouting(layout, family)))
        sets[KNOWN] = frozenset(struct.pack("=I", number) for number in layout.known)
        counters.append(NEWBORN)
    if family == INET and marks.due:
        look = (nftables.load_meta(nftables.MARK), nftables.bitwise(marks.due), _is_not_zero())
        drop = _rule("no process of the node may receive it", *look, *_drop(DUE))
        rules["input"] = (_chain(nftables.INPUT, AFTER_IPVS), (drop,))
        counters.append(DUE)
    if family == INET and marks.node:
        put = (
            nftables.load_meta(nftables.MARK),
            nftables.bitwise(_without(marks.node), marks.node),
            nftables.store_mark(),
        )
        rules["output"] = (_chain(nftables.OUTPUT, BEHIND_MANGLE), (_rule("the node sends it", *put),))
    return _Content(rules, sets, tuple(counters)) if rules else None


def _set_changes(family: int, name: str, before: AbstractSet[bytes], keys: AbstractSet[bytes]) -> Iterator[NftMessage]:
    for kind, some in (
        (nftables.DELETE_ELEMENTS, sorted(before - keys)),
        (nftables.NEW_ELEMENTS, sorted(keys - before)),
    ):
        yield from nftables.change_elements(kind, family, TABLE, name, some)


def _prerouting(layout: BarrierSpec) -> Iterator[_BarrierRule]:
    for sign in (layout.marks.seen, layout.also_seen):
        if sign:
            look = (
                nftables.load_meta(nftables.MARK),
                nftables.bitwise(sign),
                nftables.compare(struct.pack("=I", sign)),
            )
            take_off = (nftables.load_meta(nftables.MARK), nftables.bitwise(_without(sign)), nftables.store_mark())
            yield _rule("the program saw it", *look, *take_off, nftables.verdict(nftables.ACCEPT))
    bound = (nftables.load_meta(nftables.IN_NAME), nftables.look_up(WORKLOADS))
    yield _rule("from a workload, past its program", *bound, *_drop(UNSIGNED))
    for pattern in layout.patterns:
        new = (*_matches(nftables.IN_NAME, pattern), *_is_new(nftables.IN_INDEX))
        yield _rule(f"from a new interface {pattern}", *new, *_drop(UNSIGNED))


def _postrouting(layout: BarrierSpec, family: int) -> Iterator[_BarrierRule]:
    for pattern in layout.patterns:
        look = [*_matches(nftables.OUT_NAME, pattern), *_is_new(nftables.OUT_INDEX)]
        look += [nftables.load_meta(nftables.MARK), nftables.bitwise(layout.marks.node), nftables.compare(bytes(4))]
        if family == BRIDGE:  # the node's ARP passes no hook that could mark it; ARP reveals only addresses
            arp = struct.pack("!H", ARP)
            look += [nftables.load_meta(nftables.PROTOCOL), nftables.compare(arp, nftables.UNEQUAL)]
        yield _rule(f"to a new interface {pattern}", *look, *_drop(NEWBORN))


def _chain(hook: int, priority: int) -> NftChain:
    return NftChain(hook, priority, nftables.ACCEPT, "filter")


def _rule(what: str, *expressions: bytes) -> _BarrierRule:
    """A rule whose comment is unique: ``what`` the rule does, and a hash of the rule's expressions."""
    digest = hashlib.sha256(b"".join(expressions)).hexdigest()[:8]
    return _BarrierRule(f"{what} [{digest}]", expressions)


def _drop(counter: str) -> tuple[bytes, bytes]:
    return nftables.count(counter), nftables.verdict(nftables.DROP)


def _without(bit: int) -> int:
    """The mask of all bits of the mark except ``bit``."""
    return ~bit & 0xFFFF_FFFF


def _is_not_zero() -> bytes:
    return nftables.compare(bytes(4), nftables.UNEQUAL)


def _matches(key: int, pattern: str) -> tuple[bytes, bytes]:
    is_prefix = pattern.endswith("*")
    return nftables.load_meta(key), nftables.compare(pattern[:-1].encode() if is_prefix else raw_name(pattern))


def _is_new(key: int) -> tuple[bytes, bytes]:
    return nftables.load_meta(key), nftables.look_up(KNOWN, is_absent=True)


@lru_cache(maxsize=4096)
def raw_name(name: str) -> bytes:
    r"""The bytes of an interface's name, in which ``\xNN`` stands for a byte that is not UTF-8 (`read_text`)."""
    raw = re.sub(rb"\\x([0-9a-f]{2})", lambda one: bytes.fromhex(one[1].decode()), name.encode())
    return raw[: nftables.NAME_BYTES - 1].ljust(nftables.NAME_BYTES, b"\0")


def _name_of(key: bytes) -> str:
    return key.split(b"\0")[0].decode(errors="backslashreplace")


def _differences(found: _Found, content: _Content | None, family: str) -> Iterator[Difference]:
    """The differences between desired and actual.

    Of rules only the comments are compared, which contain a hash of the expressions.
    """
    table = f"table {family} {TABLE}"
    if content is None:
        if found.table is not None:
            yield Difference(table, "foreign")
        return
    if found.table is None:
        yield Difference(table, "missing")
        return
    if found.table.flags & nftables.DORMANT:
        yield Difference(table, "changed")
    for name in sorted(content.rules.keys() | found.chains.keys()):
        where = f"chain {name} of {table}"
        if name not in content.rules:
            yield Difference(where, "foreign")
            continue
        chain, rules = content.rules[name]
        if name not in found.chains:
            yield Difference(where, "missing")
        elif found.chains[name] != chain or found.rules.get(name, []) != [rule.remark for rule in rules]:
            yield Difference(where, "changed")
    for name in sorted(content.sets.keys() | found.sets.keys()):
        where = f"set {name} of {table}"
        if name not in content.sets or name not in found.sets:
            yield Difference(table, "changed")
        elif content.sets[name] != found.sets[name].keys():
            yield Difference(where, "changed")
    for name in content.counters:
        if name not in found.counters:
            yield Difference(f"counter {name} of {table}", "missing")


def without_sign(layout: BarrierSpec) -> BarrierSpec:
    """The desired content ``layout`` without two kinds of rules.

    These rules drop packets without the sign, and packets to a new interface.
    """
    return replace(layout, marks=replace(layout.marks, seen=0), also_seen=0, patterns=(), workloads=frozenset())
