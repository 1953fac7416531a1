# SPDX-License-Identifier: Apache-2.0
"""The writer of the kernel's maps, with maps in memory that record the order of writes and can be full."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

import pytest
from memory_maps import MemoryMap, memory_maps

from netpol_ebpf.apply import encode
from netpol_ebpf.apply.applier import Applier, Binding
from netpol_ebpf.compiler.tables import (
    AddressRow,
    Change,
    CompiledTables,
    Delta,
    DomainRow,
    EndpointRow,
    SetRow,
    VerdictRow,
)
from netpol_ebpf.errors import MapFullError
from netpol_ebpf.policy.types import (
    Cause,
    CauseKind,
    Direction,
    EndpointKey,
    EndpointKind,
    Outcome,
    Stage,
)
from netpol_loader import abi

WEB = EndpointKey("Pod", "shop", "web")
DB = EndpointKey("Pod", "shop", "db")


@dataclass
class Kernel:
    """All maps, the order of writes to them, and an applier with its grace periods in the same order."""

    log: list[tuple[str, str, bytes]] = field(default_factory=list)
    maps: dict[str, MemoryMap] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.maps = memory_maps(self.log)
        self.applier = Applier(self.maps, lambda: self.log.append(("grace", "", b"")))

    @property
    def content(self) -> dict[str, dict[bytes, bytes]]:
        return {name: dict(one.rows) for name, one in self.maps.items() if one.rows}

    @property
    def generation(self) -> int:
        value = self.maps["np_config"].get(bytes(4))
        assert value is not None
        return abi.np_config.from_buffer_copy(value).generation

    def order(self, *names: str) -> list[str]:
        """The accesses to these maps (or "grace"), in order, without repetitions."""
        found: list[str] = []
        for operation, name, _ in self.log:
            what = name or operation
            if what in names and (not found or found[-1] != what):
                found.append(what)
        return found


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def policy_set(base: int) -> SetRow:
    return SetRow(base + 1, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 1, base)


def endpoint(number: int, base: int = 0) -> EndpointRow:
    sets = {(direction, Stage.NORMAL): policy_set(base) for direction in Direction}
    return EndpointRow(number, sets)


def some_tables() -> CompiledTables:
    tables = CompiledTables()
    tables.rules.set(1, Cause(CauseKind.NO_MATCH, Direction.INGRESS))
    tables.verdicts.set(0, VerdictRow(Outcome.DENY, 1, Outcome.DENY, 1))
    tables.l4_columns.set(0, (0,) * abi.NP_COLUMN_BLOCK)
    tables.peer_classes.set((1, 16), 0)
    tables.addresses.set(ip_address("10.0.0.1"), AddressRow(16, 5))
    tables.addresses.set(ip_address("fd00::1"), AddressRow(17, 5))
    tables.cidrs.set(ip_network("10.0.0.0/8"), 18)
    tables.domains.set((5, 40), DomainRow(0, 0, 1, 1))
    tables.names.set("*.example.com", 40)
    tables.name_classes.set(40, frozenset({frozenset({"*.example.com"})}))
    tables.log_lists.set(1, (1,))
    tables.identities.set(16, "web")
    tables.endpoints.set(WEB, endpoint(5))
    return tables


def delta(upserts: dict[object, object] | None = None, deletes: set[object] | None = None) -> Delta[object, object]:
    return Delta(upserts or {}, deletes or set())


def row_of(kernel: Kernel, ifindex: int) -> abi.np_endpoint | None:
    value = kernel.maps["np_endpoint"].rows.get(encode.endpoint_key(ifindex))
    return None if value is None else encode.decode_endpoint(value)


def test_fill_writes_what_is_referred_to_first(kernel: Kernel) -> None:
    """A first fill writes every table, domain lists before verdicts before addresses before endpoints."""
    kernel.applier.bind(WEB, Binding(42))
    kernel.applier.fill(some_tables())
    assert kernel.order("np_rule", "np_domain", "np_name", "np_verdict", "np_addr4", "np_endpoint") == [
        "np_rule", "np_domain", "np_name", "np_verdict", "np_addr4", "np_endpoint",
    ]  # fmt: skip
    row = row_of(kernel, 42)
    assert row is not None
    assert row.number == 5
    assert kernel.applier.is_enforced(WEB)
    assert kernel.applier.counts["np_addr6"] == 1


def test_endpoint_without_interface_is_written_when_it_is_found(kernel: Kernel) -> None:
    """An endpoint's row is written when both its interface and its tables are known."""
    kernel.applier.fill(some_tables())
    assert row_of(kernel, 42) is None
    assert not kernel.applier.is_enforced(WEB)
    kernel.applier.bind(WEB, Binding(42))
    assert row_of(kernel, 42) is not None
    kernel.applier.bind(DB, Binding(43))
    assert row_of(kernel, 43) is None
    kernel.applier.apply(Change(flip={"endpoints": delta({DB: endpoint(6)})}))
    row = row_of(kernel, 43)
    assert row is not None
    assert row.number == 6


def test_moved_endpoint_leaves_no_row_behind(kernel: Kernel) -> None:
    """The new interface gets its row before the old one loses it, and the program drops its cached rows."""
    kernel.applier.fill(some_tables())
    kernel.applier.bind(WEB, Binding(42, allowed_sources=(ip_network("192.0.2.0/24"),)))
    before = kernel.generation
    kernel.log.clear()
    kernel.applier.bind(WEB, Binding(43))
    assert row_of(kernel, 42) is None
    assert row_of(kernel, 43) is not None
    assert kernel.maps["np_source4"].rows == {}
    assert [operation for operation, name, _ in kernel.log if name == "np_endpoint"] == ["put", "delete"]
    assert kernel.generation != before


def test_unbound_endpoint_is_unknown_again(kernel: Kernel) -> None:
    """A removed interface leaves no row. The endpoint's tables stay, for when it is found again."""
    kernel.applier.fill(some_tables())
    kernel.applier.bind(WEB, Binding(42))
    before = kernel.generation
    kernel.applier.unbind(WEB)
    assert row_of(kernel, 42) is None
    assert kernel.generation != before
    kernel.applier.unbind(DB)
    kernel.applier.bind(WEB, Binding(44))
    assert row_of(kernel, 44) is not None


def test_allowed_sources_are_told_in_the_row(kernel: Kernel) -> None:
    """The row says whether an interface may have other sources."""
    kernel.applier.fill(some_tables())
    kernel.applier.bind(WEB, Binding(42, allowed_sources=(ip_network("192.0.2.0/24"),)))
    row = row_of(kernel, 42)
    assert row is not None
    assert row.flags == abi.NP_ENDPOINT_SOURCES
    assert len(kernel.maps["np_source4"].rows) == 1
    assert kernel.maps["np_ifindex"].rows == {(5).to_bytes(4, "little"): (42).to_bytes(4, "little")}


def test_host_endpoint_has_one_row_for_all_its_lists(kernel: Kernel) -> None:
    """A host endpoint's policy changes in one element. No interface's row is written."""
    kernel.applier.fill(some_tables())
    kernel.applier.bind(WEB, Binding(0, EndpointKind.HOST))
    (value,) = kernel.maps["np_host"].rows.values()
    row = abi.np_host.from_buffer_copy(value)
    assert (row.number, row.present) == (5, 0b11)
    assert row.version != 0
    assert kernel.maps["np_endpoint"].rows == {}


def a_change() -> Change:
    """The web pod gets another policy set with a new range of verdicts and a new rule. The old ones are removed."""
    return Change(
        grow={
            "verdicts": delta({100: VerdictRow(Outcome.ALLOW, 2, Outcome.ALLOW, 2)}),
            "rules": delta({2: Cause(CauseKind.NO_MATCH, Direction.EGRESS)}),
            "peer_classes": delta({(101, 16): 0}),
        },
        flip={
            "endpoints": delta({WEB: endpoint(5, 100)}),
            "addresses": delta({ip_address("10.0.0.1"): AddressRow(20, 5)}),
        },
        shrink={"verdicts": delta(deletes={0}), "peer_classes": delta(deletes={(1, 16)}), "rules": delta(deletes={1})},
        revokes=True,
    )


def test_change_grows_flips_and_shrinks_after_a_grace_period(kernel: Kernel) -> None:
    """First the new rows, then the flip, the new generation, a grace period, and the removal of unreferenced rows."""
    kernel.applier.bind(WEB, Binding(42))
    kernel.applier.fill(some_tables())
    before = kernel.generation
    kernel.log.clear()
    kernel.applier.apply(a_change())
    assert kernel.order("np_rule", "np_verdict", "np_addr4", "np_endpoint", "np_config", "grace") == [
        "np_rule", "np_verdict", "np_addr4", "np_endpoint", "np_config", "grace", "np_verdict", "np_rule",
    ]  # fmt: skip
    row = row_of(kernel, 42)
    assert row is not None
    assert row.ingress.verdict_base == 100
    assert kernel.generation != before
    assert kernel.maps["np_verdict"].rows[bytes(4)] == bytes(abi.MAP_SPECS["np_verdict"].value_size)
    assert len(kernel.maps["np_peer_class"].rows) == len(kernel.maps["np_rule"].rows) == 1


def test_change_of_domain_lists_writes_classes_before_names(kernel: Kernel) -> None:
    """A name gets its class after the rows of the class, and the old rows go after a grace period."""
    kernel.applier.fill(some_tables())
    kernel.log.clear()
    grow = {"domains": delta({(5, 41): DomainRow(1, 1, 1, 1)})}
    flip = {"names": delta({"www.example.com": 41, "*.org": 41}, {"*.example.com"})}
    kernel.applier.apply(Change(grow=grow, flip=flip, shrink={"domains": delta(deletes={(5, 40)})}, revokes=True))
    order = kernel.order("np_domain", "np_name", "np_config", "grace")
    assert order == ["np_domain", "np_name", "np_config", "grace", "np_domain"]
    assert kernel.maps["np_name"].rows.keys() == {encode.name_key("www.example.com"), encode.name_key("*.org")}
    assert kernel.maps["np_domain"].rows.keys() == {encode.map_and_key("domains", (5, 41))[1]}
    assert (kernel.applier.counts["np_name"], kernel.applier.counts["np_domain"]) == (2, 1)


def learned_by(kernel: Kernel) -> set[int]:
    """The numbers of the endpoints that learned addresses."""
    maps = [kernel.maps[name] for name in ("np_learned4", "np_learned6")]
    return {encode.endpoint_of_learned(key) for one in maps for key, _ in one.items()}


def learn(kernel: Kernel, *numbers: int) -> None:
    """Write what endpoints learned, as the program does."""
    for number in numbers:
        for address in ("192.0.2.1", "2001:db8::1"):
            name, key, value = encode.learned_element(number, ip_address(address), {40: 9})
            kernel.maps[name].put(key, value)


@pytest.mark.parametrize("change", ["deleted", "renumbered"])
def test_number_of_an_endpoint_that_went_has_learned_nothing(kernel: Kernel, change: str) -> None:
    """What an endpoint learned is gone when its number may be given away, after a grace period; others keep theirs."""
    kernel.applier.bind(WEB, Binding(42))
    tables = some_tables()
    tables.endpoints.set(DB, endpoint(6))
    kernel.applier.fill(tables)
    kernel.applier.set_flags(on=abi.NP_CONFIG_NAMES)
    learn(kernel, 5, 6)
    kernel.log.clear()
    kernel.applier.apply(Change(flip={"endpoints": delta({DB: endpoint(6)})}))
    assert learned_by(kernel) == {5, 6}
    gone = delta(deletes={WEB}) if change == "deleted" else delta({WEB: endpoint(9)})
    kernel.applier.apply(Change(flip={"endpoints": gone}))
    assert learned_by(kernel) == {6}
    assert kernel.order("np_endpoint", "np_config", "grace", "np_learned4")[-2:] == ["grace", "np_learned4"]


def test_what_was_learned_by_nobody_is_forgotten_at_the_start(kernel: Kernel) -> None:
    """An endpoint may go while no agent runs: the next agent deletes what the endpoint learned."""
    learn(kernel, 5, 7)
    kernel.applier.fill(some_tables())
    assert learned_by(kernel) == {5}


@pytest.mark.parametrize(("name", "size"), [("np_domain", 0), ("np_name", 0)])
def test_tables_of_names_that_do_not_fit_are_refused(kernel: Kernel, name: str, size: int) -> None:
    """A first fill is refused before the first write if the names or their lists do not fit."""
    kernel.maps[name].max_entries = size
    with pytest.raises(MapFullError, match=f"map {name} has room for 0 rows; the change needs 1"):
        kernel.applier.fill(some_tables())
    assert kernel.order(name, "np_rule") == []


def test_change_that_revokes_nothing_keeps_the_generation(kernel: Kernel) -> None:
    """Open connections are not judged again, and there is no grace period."""
    kernel.applier.bind(WEB, Binding(42))
    kernel.applier.fill(some_tables())
    before = kernel.generation
    change = a_change()
    change.revokes, change.shrink = False, {}
    kernel.applier.apply(change)
    assert kernel.generation == before
    assert "grace" not in kernel.order("grace")


def test_endpoint_that_goes_or_is_renumbered_needs_a_new_generation(kernel: Kernel) -> None:
    """The program caches an interface's number for a generation."""
    kernel.applier.bind(WEB, Binding(42))
    kernel.applier.fill(some_tables())
    first = kernel.generation
    kernel.applier.apply(Change(flip={"endpoints": delta({WEB: endpoint(9)})}))
    second = kernel.generation
    kernel.applier.apply(Change(flip={"endpoints": delta(deletes={WEB})}))
    assert len({first, second, kernel.generation}) == 3
    assert row_of(kernel, 42) is None


def test_generation_is_never_zero(kernel: Kernel) -> None:
    """After the largest number follows 1."""
    kernel.maps["np_config"].put(bytes(4), bytes(abi.np_config(generation=0xFFFF_FFFF)))
    assert kernel.applier.bump_generation() == 1


def test_flags_of_the_configuration_are_switched_alone(kernel: Kernel) -> None:
    """A changed flag changes neither the generation nor the other flags."""
    kernel.applier.bump_generation()
    kernel.applier.set_flags(on=abi.NP_CONFIG_ALLOW_EVENTS | abi.NP_CONFIG_KEEP_REVOKED)
    kernel.applier.set_flags(off=abi.NP_CONFIG_ALLOW_EVENTS)
    config = abi.np_config.from_buffer_copy(kernel.maps["np_config"].rows[bytes(4)])
    assert (config.flags, config.generation) == (abi.NP_CONFIG_KEEP_REVOKED, 1)


def test_change_beyond_a_map_is_refused_before_any_write(kernel: Kernel) -> None:
    """The error names the map, its size and the needed size. Nothing is written."""
    kernel.applier.bind(WEB, Binding(42))
    kernel.applier.fill(some_tables())
    kernel.maps["np_peer_class"].max_entries = 1
    content = kernel.content
    kernel.log.clear()
    with pytest.raises(MapFullError, match=r"np_peer_class has room for 1 rows; the change needs 2"):
        kernel.applier.apply(a_change())
    assert kernel.log == []
    assert kernel.content == content


def test_room_counts_rows_that_are_there_already_once(kernel: Kernel) -> None:
    """The replacement of a row in a full map needs no room."""
    kernel.applier.fill(some_tables())
    kernel.maps["np_addr4"].max_entries = 1
    address = ip_address("10.0.0.1")
    kernel.applier.apply(Change(flip={"addresses": delta({address: AddressRow(99, 5)})}))
    ((_, value),) = kernel.maps["np_addr4"].items()
    assert abi.np_addr.from_buffer_copy(value).identity == 99


def test_row_beyond_an_array_is_refused(kernel: Kernel) -> None:
    """An index beyond the end of an array means that the map is full."""
    row = VerdictRow(Outcome.ALLOW, 2, Outcome.ALLOW, 2)
    size = kernel.maps["np_verdict"].max_entries
    with pytest.raises(MapFullError, match=f"np_verdict has {size} rows; the change needs {size + 1}"):
        kernel.applier.apply(Change(grow={"verdicts": delta({size: row})}))


@pytest.mark.parametrize("full", ["np_peer_class", "np_rule", "np_endpoint", "np_addr4"])
def test_kernel_that_refuses_midway_is_as_before(kernel: Kernel, full: str) -> None:
    """If the kernel has no memory for a row in the middle of a change, all written rows are restored."""
    kernel.applier.bind(WEB, Binding(42))
    kernel.applier.bind(DB, Binding(43))
    kernel.applier.fill(some_tables())
    change = a_change()
    change.flip["endpoints"].upserts[DB] = endpoint(6)
    change.flip["addresses"].upserts[ip_address("10.0.0.2")] = AddressRow(21, 6)
    kernel.maps[full].hard_limit = len(kernel.maps[full].rows)
    content, counts = kernel.content, dict(kernel.applier.counts)
    with pytest.raises(MapFullError):
        kernel.applier.apply(change)
    # An array element that was never written has zeros, and is the same to the program as one that was written with
    # zeros.
    zeros = bytes(abi.MAP_SPECS["np_verdict"].value_size)
    assert {key: row for key, row in kernel.content["np_verdict"].items() if row != zeros} == content["np_verdict"]
    other = {"np_verdict": {}, "np_config": {}}  # cached endpoint rows are invalid
    assert {**kernel.content, **other} == {**content, **other}
    assert dict(kernel.applier.counts) == counts
    assert not kernel.applier.is_enforced(DB)
    kernel.maps[full].hard_limit = None
    kernel.applier.apply(change)
    assert kernel.applier.is_enforced(DB)


def test_interface_that_does_not_fit_is_not_bound(kernel: Kernel) -> None:
    """An endpoint without room for its row stays unknown, and keeps its earlier binding."""
    kernel.applier.fill(some_tables())
    kernel.applier.apply(Change(flip={"endpoints": delta({DB: endpoint(6)})}))
    kernel.applier.bind(WEB, Binding(42))
    kernel.maps["np_endpoint"].max_entries = 1
    with pytest.raises(MapFullError):
        kernel.applier.bind(DB, Binding(43))
    assert set(kernel.applier.bindings) == {WEB}
    assert row_of(kernel, 42) is not None


def epoch(kernel: Kernel) -> int:
    value = kernel.maps["np_config"].get(bytes(4))
    assert value is not None
    return abi.np_config.from_buffer_copy(value).epoch


@pytest.mark.parametrize(
    ("flip", "is_new"),
    [
        ({"endpoints": {WEB: endpoint(5, 100)}}, True),
        ({"addresses": {ip_address("10.0.0.1"): AddressRow(20, 5)}}, True),
        ({"cidrs": {ip_network("10.0.0.0/9"): 18}}, False),
    ],
    ids=["endpoint", "address", "prefix"],
)
def test_what_the_program_remembers_is_void_after_a_change_of_it(
    kernel: Kernel, flip: dict[str, dict[object, object]], *, is_new: bool
) -> None:
    """A new epoch follows the flip, before the grace period after which rows are removed."""
    kernel.applier.bind(WEB, Binding(42))
    kernel.applier.fill(some_tables())
    before, generation = epoch(kernel), kernel.generation
    kernel.log.clear()
    shrink = {"rules": delta(deletes={1})}
    kernel.applier.apply(Change(flip={name: delta(rows) for name, rows in flip.items()}, shrink=shrink))
    assert (epoch(kernel) != before) is is_new
    assert kernel.generation == generation
    assert kernel.order("np_config", "grace", "np_rule") == [*(["np_config"] if is_new else []), "grace", "np_rule"]


def test_set_that_moves_is_left_before_anything_grows(kernel: Kernel) -> None:
    """Between the rows of a moved set and the rows that grow for it, there are a new epoch and a grace period."""
    kernel.applier.bind(WEB, Binding(42))
    kernel.applier.fill(some_tables())
    kernel.log.clear()
    kernel.applier.apply(
        Change(prepare={"endpoints": delta({WEB: endpoint(5, 100)})}, grow={"peer_classes": delta({(1, 30): 1})})
    )
    order = kernel.order("np_endpoint", "np_config", "grace", "np_peer_class")
    assert order == ["np_endpoint", "np_config", "grace", "np_peer_class"]


def test_roll_back_leaves_new_rows_before_it_removes_what_they_refer_to(kernel: Kernel) -> None:
    """Endpoint rows are restored first. When no packet has the newer ones any more, the other rows are restored."""
    kernel.applier.bind(WEB, Binding(42))
    kernel.applier.fill(some_tables())
    change = a_change()
    change.flip["endpoints"].upserts[DB] = endpoint(6)
    kernel.applier.bind(DB, Binding(43))
    kernel.maps["np_endpoint"].hard_limit = 1
    kernel.log.clear()
    with pytest.raises(MapFullError):
        kernel.applier.apply(change)
    after = kernel.log[[name for _, name, _ in kernel.log].index("np_endpoint") :]
    names = list(dict.fromkeys(name or operation for operation, name, _ in after))
    assert names[:3] == ["np_endpoint", "np_config", "grace"]
    assert set(names[3:]) >= {"np_rule", "np_verdict", "np_peer_class"}


def test_roll_back_of_addresses_alone_makes_void_what_was_remembered_of_them(kernel: Kernel) -> None:
    """An address that belonged to a workload for a moment is not cached as its own afterwards."""
    kernel.applier.bind(WEB, Binding(42))
    kernel.applier.fill(some_tables())
    kernel.maps["np_addr4"].hard_limit = 2
    before = epoch(kernel)
    kernel.log.clear()
    rows = {ip_address(f"10.0.0.{last}"): AddressRow(20, 5) for last in (2, 3)}
    with pytest.raises(MapFullError):
        kernel.applier.apply(Change(flip={"addresses": delta(rows)}))
    assert epoch(kernel) != before
    assert [name for _, name, _ in kernel.log][-1] == "np_config"
