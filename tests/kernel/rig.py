# SPDX-License-Identifier: Apache-2.0
"""A dataplane under test: hand-written rows and one packet in; verdict, reason, counters and events out."""

from __future__ import annotations

import ctypes
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from netpol_ebpf.apply.encode import learned_element
from netpol_loader import abi
from netpol_loader.kernel.clock import read_jiffies
from netpol_loader.kernel.hook import Hook
from netpol_loader.kernel.maps import Map
from netpol_loader.pins.dataplane import Dataplane, default_config
from netpol_loader.tables.buckets import vip_filter_bit
from netpol_loader.tables.connections import ConnectionMap
from netpol_loader.tables.seal import seal_endpoint, seal_host

LO = 1
"""lo: every machine has it, and test runs need an interface that exists."""
IN, OUT = abi.NP_DIRECTION_INGRESS, abi.NP_DIRECTION_EGRESS
MARK_SHIFT = 16
"""The sender tag is in the mark, because a test run has no tc_index."""
ELSEWHERE = 77
"""The interface by which packets to a workload entered the node; it need not exist."""
CONNECTIONS = (*abi.maps_with_rows(abi.MapRole.CONNECTION), *abi.UNREPLIED_VIEWS.values())
EMPTIED = (*abi.maps_with_rows(abi.MapRole.ENDPOINT, abi.MapRole.NODE, abi.MapRole.TABLE), *CONNECTIONS)
ALLOW, DENY, CONTINUE = abi.NP_ACTION_ALLOW, abi.NP_ACTION_DENY, abi.NP_ACTION_CONTINUE

ENDPOINT = 7
POD4, PEER4 = "10.0.0.7", "10.0.0.9"
POD6, PEER6 = "fd00::7", "fd00::9"
POD_IDENTITY, PEER_IDENTITY = 100, 101


@dataclass(frozen=True)
class Verdict:
    """A verdict row. ``staged`` None: the same as enforced."""

    action: int
    rule: int
    staged: int | None = None
    staged_rule: int | None = None
    log_list: int = 0
    failsafe: bool = False
    domain_list: int = 0

    def row(self) -> bytes:
        """The row as the map has it."""
        return bytes(
            abi.np_verdict(
                rule=self.rule,
                staged_rule=self.rule if self.staged_rule is None else self.staged_rule,
                log_list=self.log_list,
                flags=(abi.NP_VERDICT_FAILSAFE if self.failsafe else 0)
                | self.domain_list << abi.NP_VERDICT_DOMAIN_SHIFT,
                action=self.action,
                staged_action=self.action if self.staged is None else self.staged,
            )
        )


@dataclass
class PolicySet:
    """The verdicts of a policy set, in the order of the index: peer, own, L4, source class."""

    number: int
    verdicts: list[Verdict]
    peer_classes: int = 1
    default_class: int = 0
    default_class6: int | None = None
    """None: the same as for IPv4."""
    own_set: int = 0
    own_default_class: int = 0
    own_default_class6: int | None = None
    own_classes: int = 1
    l4_classes: int = 1
    asks_source: int = 0
    source_classes: int = 1

    def row(self) -> abi.np_set:
        """The set as the endpoint row has it; each set has 64 verdicts and one block of each column."""
        return abi.np_set(
            number=self.number, peer_classes=self.peer_classes, default_class4=self.default_class,
            default_class6=self.default_class if self.default_class6 is None else self.default_class6,
            own_set=self.own_set, own_classes=self.own_classes, own_default_class4=self.own_default_class,
            own_default_class6=self.own_default_class if self.own_default_class6 is None else self.own_default_class6,
            l4_base=self.number * 2, l4_classes=self.l4_classes, asks_source=self.asks_source,
            source_base=self.number * 2 + 1, source_classes=self.source_classes, verdict_base=self.number * 64,
        )  # fmt: skip


def everything(number: int, action: int, rule: int) -> PolicySet:
    """A policy set with one verdict for all traffic."""
    return PolicySet(number, [Verdict(action, rule)])


@dataclass(frozen=True)
class Seen:
    """The result for a packet. ``reasons`` and ``rules``: packets counted, by reason slug and rule number."""

    passed: bool
    reasons: Mapping[str, int]
    rules: Mapping[int, int]
    events: list[abi.np_event] = field(compare=False)
    carries: int = 0

    @property
    def reason(self) -> str:
        """The one reason counted; a packet of an established connection is counted by rule alone."""
        if not self.reasons:
            return "established" if self.passed and self.rules else "none"
        assert len(self.reasons) == 1, self.reasons
        return next(iter(self.reasons))


class Rig:
    """Writes rows, sends packets."""

    def __init__(self, dataplane: Dataplane) -> None:
        self.dataplane = dataplane
        self.events: list[abi.np_event] = []
        self._written: set[tuple[str, bytes]] = set()  # rows of arrays
        self.reader = dataplane.events(self.events.append)

    def map(self, name: str) -> Map:
        """A map."""
        return self.dataplane.maps[name]

    def reset(self) -> None:
        """Empty the dataplane: no rows, no connections, all array rows 0, next generation.

        Counters keep their values.
        """
        for name in EMPTIED:
            one = self.map(name)
            one.delete_many([key for key, _ in one.items()])
            one.end_grace_period()
        for name, key in self._written:
            self.map(name).put(key, bytes(self.map(name).value_size))
        self._written.clear()
        limits = self.map("np_log_limit")
        limits.put_many([(key, bytes(limits.value_size)) for key, _ in limits.items()])
        before = self.dataplane.config()
        config = default_config(before.jiffies_per_second)
        config.generation, config.epoch = before.generation + 1, before.epoch + 1
        self.dataplane.set_config(config)
        self.reader.consume()
        self.events.clear()

    def flags(self, flags: int) -> None:
        """Set the configuration's flags."""
        config = self.dataplane.config()
        config.flags = flags
        self.dataplane.set_config(config)

    def epoch(self) -> None:
        """Raise the epoch, so that the endpoint cache is invalid."""
        config = self.dataplane.config()
        config.epoch += 1
        self.dataplane.set_config(config)

    def policy(self, one: PolicySet) -> abi.np_set:
        """Write the verdicts of a policy set."""
        for index, verdict in enumerate(one.verdicts):
            self._row("np_verdict", one.number * 64 + index, verdict.row())
        return one.row()

    def endpoint(
        self, ingress: PolicySet, egress: PolicySet, *, number: int = ENDPOINT, ifindex: int = LO, flags: int = 0,
        link: int = 0,
    ) -> None:  # fmt: skip
        """Write an endpoint's row and its policy sets. ``link``: its bridge; 0: none."""
        row = abi.np_endpoint(number=number, ifindex=ifindex, flags=flags, link=link or ifindex)
        if flags & abi.NP_ENDPOINT_HOST:
            # The same for its processes and for what passes through.
            stages = (abi.NP_STAGE_NORMAL, abi.NP_STAGE_FORWARD)
            self.host({(one, way): of for one in stages for way, of in ((IN, ingress), (OUT, egress))}, number=number)
        else:
            row.ingress, row.egress = self.policy(ingress), self.policy(egress)
            self.map("np_ifindex").put(struct.pack("=I", number), struct.pack("=I", ifindex))
        self.map("np_endpoint").put(struct.pack("=I", ifindex), bytes(seal_endpoint(row)))

    def host(self, sets: Mapping[tuple[int, int], PolicySet], *, number: int = ENDPOINT, version: int = 1) -> None:
        """Write a host endpoint's policy sets, by (NP_STAGE_*, NP_DIRECTION_*)."""
        row = abi.np_host(number=number, version=version)
        for (stage, direction), one in sets.items():
            row.sets[stage * 2 + direction] = self.policy(one)
            row.present |= 1 << stage * 2 + direction
        self.map("np_host").put(struct.pack("=I", number), bytes(seal_host(row)))

    def local(self, *addresses: str, flags: int = abi.NP_LOCAL_OWN, ifindex: int = 0, node: int = 0) -> None:
        """Write addresses into np_local. ``ifindex``: the interface that has them; ``node``: number of another node."""
        for text in addresses:
            packed = ip_address(text).packed
            self._special(packed)
            row = abi.np_local(flags=flags, ifindex=ifindex, node=node)
            self.map("np_local4" if len(packed) == 4 else "np_local6").put(packed, bytes(row))

    def vip(
        self, address: str, protocol: int, port: int, *, local: tuple[str, int] | None = None, flags: int = 0
    ) -> None:
        """Write a service's row. ``local``: the process of this node that is its backend."""
        packed = ip_address(address).packed
        row = abi.np_vip(flags=flags)
        if local is not None:
            row.flags |= abi.NP_VIP_LOCAL
            row.local_port = local[1]
            row.local[: len(packed)] = ip_address(local[0]).packed
        key = packed + struct.pack("=HBx", port, protocol)
        self._special(packed)
        self.map("np_vip4" if len(packed) == 4 else "np_vip6").put(key, bytes(row))

    def defer(self) -> None:
        """Put the sender tag of packets to services into the upper half of the mark."""
        config = self.dataplane.config()
        config.flags |= abi.NP_CONFIG_DEFER
        config.mark_shift = MARK_SHIFT
        self.dataplane.set_config(config)

    def pod(self, ingress: PolicySet, egress: PolicySet, flags: int = 0) -> None:
        """The usual endpoint on lo, with its own and its peer's addresses."""
        self.endpoint(ingress, egress, flags=flags)
        for own, peer in ((POD4, PEER4), (POD6, PEER6)):
            self.address(own, POD_IDENTITY, ENDPOINT)
            self.address(peer, PEER_IDENTITY)

    def address(self, address: str, identity: int, holder: int = 0) -> None:
        """Write an address row. ``holder``: number of the endpoint that owns it, or of the node that has it."""
        packed = ip_address(address).packed
        name = "np_addr4" if len(packed) == 4 else "np_addr6"
        self.map(name).put(packed, bytes(abi.np_addr(identity=identity, holder=holder)))

    def cidr(self, text: str, identity: int) -> None:
        """Write a row of a trie."""
        net = ip_network(text)
        key = struct.pack("=I", net.prefixlen) + net.network_address.packed
        self.map(f"np_cidr{net.version}").put(key, struct.pack("=I", identity))

    def source(self, text: str, endpoint: int = ENDPOINT) -> None:
        """Let an endpoint borrow source addresses."""
        net = ip_network(text)
        key = struct.pack("=II", 32 + net.prefixlen, endpoint) + net.network_address.packed
        self.map(f"np_source{net.version}").put(key, struct.pack("=I", 1))

    def peer_class(self, policy_set: int, identity: int, peer_class: int) -> None:
        """Write a row of a class table."""
        self.map("np_peer_class").put(struct.pack("=II", policy_set, identity), struct.pack("=I", peer_class))

    def domain(
        self, domain_list: int, name_class: int, rule: int, *, rank: int = 0, staged_rank: int | None = None,
        staged_rule: int | None = None, log_list: int = 0,
    ) -> None:  # fmt: skip
        """Write a rule of a domain list. ``staged_rank``, ``staged_rule`` None: the same as enforced."""
        key = abi.np_domain_key(list=domain_list, name_class=name_class)
        row = abi.np_domain(
            rank=rank, staged_rank=rank if staged_rank is None else staged_rank, rule=rule,
            staged_rule=rule if staged_rule is None else staged_rule, log_list=log_list,
        )  # fmt: skip
        self.map("np_domain").put(bytes(key), bytes(row))

    def learned(self, address: str, classes: Mapping[int, int], *, endpoint: int = ENDPOINT) -> None:
        """Let an endpoint know names of an address. ``classes``: by name class, in how many units of time it expires."""
        now = read_jiffies() // abi.NP_LEARNED_JIFFIES
        until = {name_class: now + left for name_class, left in classes.items()}
        name, key, row = learned_element(endpoint, ip_address(address), until)
        self.map(name).put(key, row)

    def name_classes(self) -> set[int]:
        """The name classes by which connections of any state were allowed."""
        found: set[int] = set()
        for name in abi.UNREPLIED_VIEWS:
            table = self.map(name)
            assert isinstance(table, ConnectionMap)
            found |= table.name_classes()
        return found

    def atom(self, block: int, index: int, atom: int) -> None:
        """Write one atom."""
        self._element("np_l4_atom", block, index, atom)

    def l4_class(self, policy_set: int, atom: int, l4_class: int, *, source: bool = False) -> None:
        """Write one class of a set's column for destinations (or source ports)."""
        self._element("np_l4_col", policy_set * 2 + source, atom, l4_class)

    def _special(self, address: bytes) -> None:
        """Set the address's bit in np_vip_filter."""
        row, bit = vip_filter_bit(address)
        found = self.map("np_vip_filter").get(struct.pack("=I", row)) or b""
        self._row("np_vip_filter", row, struct.pack("=Q", struct.unpack("=Q", found)[0] | 1 << bit))

    def _element(self, name: str, block: int, index: int, number: int) -> None:
        row = bytearray(self.map(name).get(struct.pack("=I", block)) or b"")
        struct.pack_into("=H", row, index * 2, number)
        self._row(name, block, bytes(row))

    def _row(self, name: str, index: int, row: bytes) -> None:
        key = struct.pack("=I", index)
        self._written.add((name, key))
        self.map(name).put(key, row)

    def send(self, hook: Hook, packet: bytes, *, ingress: int | None = None, carries: int = 0) -> Seen:
        """Run one packet; a packet to a workload comes from elsewhere unless ``ingress`` says otherwise."""
        reasons, rules = self._counts("np_reason_count"), self._counts("np_rule_count")
        if ingress is None:
            ingress = ELSEWHERE if hook is Hook.TC_EGRESS else 0
        run = self.dataplane.test_run(hook, packet, ingress_ifindex=ingress, ifindex=LO, mark=carries << MARK_SHIFT)
        assert run.verdict in (-1, 2), run
        self.events.clear()
        self.reader.consume()
        return Seen(
            run.passed,
            {abi.REASONS[number].slug: n for number, n in (self._counts("np_reason_count") - reasons).items()},
            dict(self._counts("np_rule_count") - rules),
            list(self.events),
            run.mark >> MARK_SHIFT,
        )

    def out(self, packet: bytes) -> Seen:
        """Run a packet from the workload."""
        return self.send(Hook.TC_INGRESS, packet)

    def into(self, packet: bytes, *, ingress: int | None = None, carries: int = 0) -> Seen:
        """Run a packet to the workload; ``carries``: its sender tag."""
        return self.send(Hook.TC_EGRESS, packet, ingress=ingress, carries=carries)

    def staged_packets(self, rule: int) -> int:
        """Packets counted for a rule in the staged evaluation."""
        value = self.map("np_staged_count").get(struct.pack("=I", rule)) or b""
        size = ctypes.sizeof(abi.np_count)
        return sum(abi.np_count.from_buffer_copy(value, at).packets for at in range(0, len(value), size))

    def _counts(self, name: str) -> Counter[int]:
        counts: Counter[int] = Counter()
        for key, value in self.map(name).items():
            cells = [
                abi.np_count.from_buffer_copy(value, at) for at in range(0, len(value), ctypes.sizeof(abi.np_count))
            ]
            packets = sum(cell.packets for cell in cells)
            if packets:
                counts[struct.unpack("=I", key)[0]] = packets
        return counts

    def connections(self, name: str) -> dict[bytes, abi.np_conn]:
        """The rows of a connection table."""
        return {key: abi.np_conn.from_buffer_copy(value) for key, value in self.map(name).items()}

    def forget_flow_cache(self) -> None:
        """Empty the flow cache, so that the program reads the connection tables."""
        for name in ("np_flow_cache4", "np_flow_cache6"):
            recent = self.map(name)
            zero = bytes(recent.cell_bytes)
            recent.put_many([(key, zero) for key, value in recent.items() if value != zero])

    def age(self, name: str, seconds: float) -> None:
        """Age every row of a table by that time."""
        self.forget_flow_cache()
        back = int(seconds * self.dataplane.config().jiffies_per_second)
        for key, value in self.map(name).items():
            seen = struct.unpack_from("=Q", value)[0]
            self.map(name).put(key, struct.pack("=Q", seen - back) + value[8:])
