# SPDX-License-Identifier: Apache-2.0
"""The agent's work on the second barrier: the order of its changes, and the reports of failures."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from memory_barrier import MemoryMarks, MemoryTables

from netpol_ebpf.agent.barrier import ASKED_A_LOOK, RETRY_S, TOLD_S, Barrier, BarrierSettings, parse_barrier
from netpol_ebpf.agent.wiring import Interface, Wiring
from netpol_ebpf.errors import UsageError
from netpol_loader.host.barrier import BarrierSpec, Marks

ALL = Marks(0x20, 0x40, 0x10)
OPEN = Marks(0, 0x40, 0x10)
LINKS = {
    one.ifindex: one
    for one in (
        Interface(1, "lo"),
        Interface(2, "eth0"),
        Interface(5, "cali1"),
        Interface(6, "cali2"),
        Interface(7, "br0", "bridge"),
    )
}
WIRING = Wiring(links=LINKS)


@dataclass
class Bench:
    """Barriers of successive agents, on the same tables and programs."""

    tables: MemoryTables = field(default_factory=MemoryTables)
    now_s: float = 100.0
    writer: MemoryMarks = field(init=False)

    def __post_init__(self) -> None:
        self.writer = MemoryMarks(self.tables.log)

    def barrier(self, settings: BarrierSettings | None = None) -> Barrier:
        """A barrier after the start of an agent."""
        one = Barrier(
            settings or BarrierSettings(), self.tables, lambda: self.now_s, lambda number: [f"program at {number}"]
        )
        one.sign(self.writer)
        one.reconcile(WIRING, {5, 6}, {2, 5, 6})
        return one

    def slugs(self, barrier: Barrier) -> list[str]:
        return [one.slug for one in barrier.problems]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def full(*names: str, marks: Marks = ALL) -> BarrierSpec:
    return BarrierSpec(marks, workloads=frozenset(names))


def test_programs_sign_before_the_table_closes(bench: Bench) -> None:
    """First a test that tables can be made, then the marks, then the names."""
    barrier = bench.barrier()
    assert bench.tables.log == [BarrierSpec(OPEN), ALL, full("cali1", "cali2")]
    assert barrier.problems == []
    assert barrier.is_installed


def test_what_an_earlier_agent_left_stays_closed(bench: Bench) -> None:
    """The next agent lets the programs set the same sign, and writes the present names."""
    bench.barrier()
    bench.tables.log.clear()
    bench.barrier()
    assert bench.tables.log == [ALL, full("cali1", "cali2")]


def test_the_sign_ends_after_the_table(bench: Bench) -> None:
    """If nothing must be closed any more, the tables change before the programs stop setting the sign."""
    bench.barrier()
    bench.tables.log.clear()
    barrier = bench.barrier(BarrierSettings(is_on=False))
    assert bench.tables.log == [BarrierSpec(OPEN), OPEN, BarrierSpec(OPEN)]
    assert barrier.is_installed
    assert any("--barrier off" in one for one in barrier.report()["open"])


def test_another_sign_takes_over(bench: Bench) -> None:
    """While programs change from one bit to the other, both count, for the names that were closed before."""
    bench.barrier()
    bench.tables.log.clear()
    other = Marks(0x100, 0x40, 0x10)
    bench.barrier(BarrierSettings(marks=other))
    between = BarrierSpec(other, 0x20, (), frozenset({"cali1", "cali2"}))
    assert bench.tables.log == [between, other, full("cali1", "cali2", marks=other)]


def test_without_tables_nothing_signs_and_it_is_told(bench: Bench) -> None:
    """The bits are not used, a problem names what is open, and the agent tries again after a while."""
    bench.tables.refuses = "no nf_tables"
    barrier = bench.barrier()
    assert bench.writer.marks == Marks()
    (told,) = barrier.problems
    assert (told.slug, told.severity) == ("barrier", "warning")
    assert "no nf_tables" in told.message
    assert "skip a workload's program" in told.message
    assert barrier.look() == []
    assert not barrier.report()["installed"]
    bench.tables.refuses = ""
    assert barrier.look() == []
    assert barrier.problems != []
    bench.now_s += RETRY_S
    barrier.look()
    assert barrier.problems == []
    assert bench.writer.marks == ALL
    assert bench.tables.layout == full("cali1", "cali2")


def test_the_sign_stays_while_an_older_table_may_want_it(bench: Bench) -> None:
    """If the next agent cannot reach the tables, it keeps the marks: without the sign, pods would be cut off."""
    bench.barrier()
    bench.tables.refuses = "no permission"
    barrier = bench.barrier(BarrierSettings(marks=Marks(0x100, 0x200, 0x400)))
    assert bench.writer.marks == ALL
    assert bench.slugs(barrier) == ["barrier"]


def test_names_follow_the_interfaces(bench: Bench) -> None:
    """Workloads' interfaces with programs are named, and no others. An unchanged set is not written."""
    barrier = bench.barrier()
    bench.tables.log.clear()
    barrier.reconcile(WIRING, {5, 6}, {2, 5, 6})
    assert bench.tables.log == []
    barrier.reconcile(WIRING, {5, 6}, {2, 5})
    assert bench.tables.layout == full("cali1")


def test_with_patterns_interfaces_are_known_that_have_programs_or_are_the_nodes(bench: Bench) -> None:
    """A workload's interface to which no program could be attached is treated as new."""
    barrier = bench.barrier(BarrierSettings(patterns=("cali*",)))
    barrier.reconcile(WIRING, {5, 6}, {2, 5})
    assert bench.tables.layout == BarrierSpec(ALL, 0, ("cali*",), frozenset({"cali1"}), frozenset({1, 2, 5, 7}))
    assert barrier.report()["open"] == []


def test_a_failing_change_is_told_and_tried_again(bench: Bench) -> None:
    """The programs continue to set the sign meanwhile."""
    barrier = bench.barrier()
    bench.tables.refuses = "no memory"
    barrier.reconcile(WIRING, {5}, {2, 5})
    assert bench.slugs(barrier) == ["barrier"]
    assert bench.writer.marks == ALL
    bench.tables.refuses = ""
    bench.now_s += RETRY_S
    barrier.look()
    assert barrier.problems == []
    assert bench.tables.layout == full("cali1")


def test_what_others_changed_is_put_back_and_told(bench: Bench) -> None:
    """At once after a notification, or at the next check."""
    barrier = bench.barrier()
    assert barrier.restore_reported() == barrier.look() == []
    bench.tables.is_spoiled = bench.tables.news = True
    assert [str(one) for one in barrier.restore_reported()] == ["barrier table inet np_barrier was changed"]
    bench.tables.is_spoiled = True
    assert barrier.restore_reported() == []
    assert [one.kind for one in barrier.look()] == ["barrier"]


def test_unsigned_packets_of_an_interface_are_told_for_a_while(bench: Bench) -> None:
    """The problem has their number, and other programs on the interface's hook.

    Packets that were counted before do not count.
    """
    bench.tables.by_interface = {"cali1": 7}
    barrier = bench.barrier()
    barrier.look()
    assert barrier.problems == []
    for packets in (9, 12):
        bench.tables.by_interface["cali1"] = packets
        barrier.look()
    (told,) = barrier.problems
    assert (told.slug, told.severity) == ("unsigned", "warning")
    assert "5 packets of interface cali1" in told.message
    assert "program at 5" in told.message
    assert barrier.report()["unsigned"] == {"cali1": 12}
    bench.now_s += TOLD_S
    barrier.look()
    assert barrier.problems == []


def test_many_interfaces_are_told_and_few_are_asked_about(bench: Bench) -> None:
    """All interfaces are problems. Other programs are only looked up for some of them, because that takes time."""
    links = {number: Interface(number, f"cali{number}") for number in range(10, 30)}
    barrier = bench.barrier()
    asked: list[int] = []
    barrier.others = lambda number: asked.append(number) or []  # type: ignore[func-returns-value]
    barrier.reconcile(Wiring(links=links), set(links), set(links))
    barrier.look()
    bench.tables.by_interface = {link.name: 1 for link in links.values()}
    barrier.look()
    assert len(barrier.problems) == len(links)
    assert len(asked) == ASKED_A_LOOK


def test_what_a_new_interface_sent_before_its_program_is_no_problem(bench: Bench) -> None:
    """This includes an interface with the name of an earlier one."""
    barrier = bench.barrier()
    barrier.look()
    again = Wiring(links={**LINKS, 9: Interface(9, "cali1")})
    bench.tables.by_interface = {"cali1": 3}
    barrier.reconcile(again, {6, 9}, {2, 6, 9})
    barrier.look()
    assert barrier.problems == []
    bench.tables.by_interface = {"cali1": 4}
    barrier.look()
    assert bench.slugs(barrier) == ["unsigned"]


def test_new_interfaces_are_not_counted_while_nothing_is_dropped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes long to count all, and new ones have nothing to count. Later drops are reported."""
    barrier = bench.barrier()
    bench.tables.by_interface = {"cali1": 7}
    barrier.look()
    asked = []
    counts = bench.tables.counts
    monkeypatch.setattr(bench.tables, "counts", lambda: asked.append(1) or counts())
    barrier.reconcile(Wiring(links={**LINKS, 9: Interface(9, "cali9")}), {5, 6, 9}, {2, 5, 6, 9})
    barrier.look()
    assert asked == []
    assert barrier.problems == []
    bench.tables.by_interface = {"cali1": 7, "cali9": 1}
    barrier.look()
    assert asked
    (told,) = barrier.problems
    assert "1 packets of interface cali9" in told.message


def test_what_stays_open_is_reported(bench: Bench) -> None:
    """Without patterns these are new interfaces; on a kernel without such tables, bridges."""
    bench.tables.families = ("inet",)
    found = bench.barrier().report()["open"]
    assert [one.split(":")[0] for one in found] == [
        "packets that a bridge passes on",
        "interfaces that are born while no agent runs",
    ]


@pytest.mark.parametrize(
    ("marks", "shift"),
    [
        ("0x20,0x40", 0), ("0x20,0x40,0x40", 0), ("0x20,0x40,0x30", 0), ("0x20,0x40,0", 0), ("a,b,c", 0),
        ("0x20,0x40,0x100000000", 0), ("0x20,0x40,0x10", 5), ("0x10000,0x40,0x10", 16), ("-1,0x40,0x10", 0),
    ],
)  # fmt: skip
def test_marks_that_cannot_be(marks: str, shift: int) -> None:
    """The marks must be three different single bits of 32, outside the mark of services."""
    with pytest.raises(UsageError, match="barrier-marks"):
        parse_barrier("nft", [], marks, shift)


@pytest.mark.parametrize("pattern", ["", "*", "l*", "lo", "lo*", "ca*li", "cali?", "a" * 16, "a b", "a/b", "[ab]"])
def test_patterns_that_cannot_be(pattern: str) -> None:
    """A pattern must be a name or its beginning, and never match the loopback."""
    with pytest.raises(UsageError, match="barrier-interfaces"):
        parse_barrier("nft", [pattern], "0x20,0x40,0x10", 0)


def test_options() -> None:
    """The settings are as given."""
    found = parse_barrier("off", ["cali*", "tap0", "local*"], "0x1,2,0x80000000", 4)
    assert found == BarrierSettings(is_on=False, patterns=("cali*", "tap0", "local*"), marks=Marks(1, 2, 0x80000000))
    assert found.in_force == Marks(0, 2, 0x80000000)
