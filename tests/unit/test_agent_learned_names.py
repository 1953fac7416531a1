# SPDX-License-Identifier: Apache-2.0
"""Domain names that endpoints learned: what the agent keeps of the program's reports, and what it writes for later patterns."""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import pytest
from memory_maps import MemoryMap

from netpol_ebpf.agent import learned_names
from netpol_ebpf.agent.learned_names import LearnedName, NameStore, classes_in_use, names_in_kernel, teach
from netpol_ebpf.apply.encode import learned_element
from netpol_ebpf.apply.events import LearnedAddress, decode_labels
from netpol_ebpf.compiler.tables import CompiledTables, EndpointRow
from netpol_ebpf.policy.types import EndpointKey
from netpol_loader import abi

WEB, DB = EndpointKey("Pod", "shop", "web"), EndpointKey("Pod", "shop", "db")
ADDRESS, SERVER = ip_address("203.0.113.5"), ip_address("10.96.0.10")


@dataclass
class Clock:
    """A wall clock that tests set."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    """A clock at 1000 s."""
    return Clock()


def make(clock: Clock, file: Path | None = None, boot: str = "this") -> NameStore:
    """Names with a floor of 30 s and no extra time."""
    return NameStore(clock, file, boot=boot, floor_s=30, extra_s=0)


def event(name: str = "api.example.com", endpoint: EndpointKey | None = WEB, ttl_s: int = 60) -> LearnedAddress:
    """A report of the program."""
    return LearnedAddress(endpoint, name, ADDRESS, SERVER, ttl_s, 0)


def test_a_name_counts_for_its_endpoint_until_it_expires(clock: Clock) -> None:
    """Another endpoint does not know the name, and nobody knows it after its time."""
    names = make(clock)
    assert names.take([event()]) == [LearnedName(WEB, ADDRESS, "api.example.com")]
    assert names.names_of(WEB, ADDRESS) == {"api.example.com"}
    assert not names.names_of(DB, ADDRESS)
    clock.now_s += 60
    assert not names.names_of(WEB, ADDRESS)
    assert not list(names)


def test_a_short_life_is_raised_to_the_floor(clock: Clock) -> None:
    """An answer with a TTL of 0 counts for 30 seconds, as in the program."""
    names = make(clock)
    names.take([event(ttl_s=0)])
    clock.now_s += 29
    assert names.names_of(WEB, ADDRESS)


def test_a_report_that_waited_has_less_time_left(clock: Clock) -> None:
    """What expired while no agent read reports is not known."""
    names = make(clock)
    names.take([event(ttl_s=60)], lambda _: 50.0)
    assert names.names_of(WEB, ADDRESS)
    clock.now_s += 11
    assert not names.names_of(WEB, ADDRESS)
    names.take([event(ttl_s=60)], lambda _: 3600.0)
    assert not list(names)


def test_a_second_report_is_no_news_and_never_shortens(clock: Clock) -> None:
    """Only a name that was not known, or had expired, is new."""
    names = make(clock)
    names.take([event(ttl_s=600)])
    assert not names.take([event(ttl_s=30)])
    clock.now_s += 500
    assert names.names_of(WEB, ADDRESS)
    clock.now_s += 101
    assert names.take([event()])


def test_a_report_of_a_gone_endpoint_is_left_out(clock: Clock) -> None:
    """Its number means nothing any more."""
    names = make(clock)
    assert not names.take([event(endpoint=None)])
    assert len(names) == 0


def test_names_of_gone_endpoints_are_removed(clock: Clock) -> None:
    """The names of the others stay."""
    names = make(clock)
    names.take([event(), event(endpoint=DB)])
    names.keep_only({DB})
    assert [key.endpoint for key, _ in names] == [DB]


def test_one_endpoint_does_not_evict_the_names_of_another(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its limit an endpoint loses its own oldest name, which is counted and reported."""
    monkeypatch.setattr(learned_names, "MOST_OF_ENDPOINT", 3)
    names = make(clock)
    names.take([event(endpoint=DB)])
    names.take([event(f"n{number}.example.com") for number in range(5)])
    assert sorted(key.name for key, _ in names if key.endpoint == WEB) == [
        f"n{number}.example.com" for number in (2, 3, 4)
    ]
    assert names.names_of(DB, ADDRESS)
    assert names.evicted == 2
    assert "2 learned names were dropped" in names.problems[0].message


def test_a_name_beyond_the_limit_of_its_endpoint_costs_no_look_at_the_names_of_others(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer can bring many such names, and the agent must not stand still meanwhile."""
    compared = 0

    class Counted(EndpointKey):
        """A key that counts how often it is compared."""

        __hash__ = EndpointKey.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return tuple(self) == other

    monkeypatch.setattr(learned_names, "MOST_OF_ENDPOINT", 100)
    names = make(clock)
    for number in range(10):
        other = Counted("Pod", "shop", f"other-{number}")
        names.take([event(f"n{name}.example.com", other) for name in range(100)])
    names.take([event(f"n{name}.example.com") for name in range(100)])
    compared = 0
    names.take([event(f"more{name}.example.com") for name in range(10)])
    assert names.evicted == 10
    assert compared < 100


def test_names_survive_a_restart(clock: Clock, tmp_path: Path) -> None:
    """The next agent reads what has not expired, of endpoints that are still here."""
    names = make(clock, tmp_path / "names")
    names.take([event(ttl_s=600), event("old.example.com", ttl_s=30), event(endpoint=DB, ttl_s=600)])
    names.save()
    clock.now_s += 100
    again = make(clock, tmp_path / "names")
    again.load({WEB}.__contains__)
    assert [key for key, _ in again] == [LearnedName(WEB, ADDRESS, "api.example.com")]
    assert not again.problems


def test_names_of_another_boot_are_not_read(clock: Clock, tmp_path: Path) -> None:
    """Their times are those of another clock, and the kernel has lost the addresses."""
    names = make(clock, tmp_path / "names")
    names.take([event(ttl_s=600)])
    names.save()
    again = make(clock, tmp_path / "names", boot="another")
    again.load(lambda _: True)
    assert not list(again)
    assert not again.problems


def test_a_refused_address_is_not_taught(clock: Clock) -> None:
    """It may have become one of a node or service since the answer."""
    names, maps = make(clock), Maps()
    names.take([event()])
    tables = tables_with("*.example.com", 3)
    done = teach(
        maps.maps,  # type: ignore[arg-type]
        tables,
        names,
        now_s=1000.0,
        now_jiffies=64_000,
        jiffies_per_second=250,
        is_refused=ADDRESS.__eq__,
    )
    assert done == 0
    assert not maps.maps["np_learned4"].rows


@pytest.mark.parametrize(
    "entry",
    [
        '["Pod", 3]',
        "[]",
        '["Pod", "a", "b", "192.0.2.1", "x.com", "10.96.0.10", "this"]',
        '["Pod", "a", "b", "192.0.2.1", "x.com", 5]',
    ],
)
def test_a_damaged_file_is_a_problem_and_is_set_aside(clock: Clock, tmp_path: Path, entry: str) -> None:
    """The agent goes on without the names."""
    (tmp_path / "names").write_text(f'{{"format": 1, "names": [{entry}]}}')
    names = make(clock, tmp_path / "names")
    names.load(lambda _: True)
    assert "damaged" in names.problems[0].message
    assert not list(names)


def test_a_time_that_no_clock_reaches_is_read(clock: Clock, tmp_path: Path) -> None:
    """It counts as a late one, and the file can be written again."""
    entry = json.dumps(["Pod", "shop", "web", str(ADDRESS), "x.com", str(SERVER), "this", 10**400])
    (tmp_path / "names").write_text(f'{{"format": 1, "names": [{entry}]}}')
    names = make(clock, tmp_path / "names")
    names.load(lambda _: True)
    names.save()
    assert names.names_of(WEB, ADDRESS) == {"x.com"}
    assert not names.problems


def tables_with(pattern: str, class_: int) -> CompiledTables:
    """Tables in which one pattern has a class, and the endpoint has the number 7."""
    tables = CompiledTables()
    tables.names.set(pattern, class_)
    tables.endpoints.set(WEB, EndpointRow(7, {}))
    return tables


@dataclass
class Maps:
    """The maps of learned addresses in memory."""

    maps: dict[str, MemoryMap] = field(
        default_factory=lambda: {
            name: MemoryMap(name, 64, ctypes.sizeof(abi.np_learned), [])
            for name in ("np_learned4", "np_learned6", "np_conn4", "np_conn6")
        }
    )

    def teach(self, names: NameStore, tables: CompiledTables, now_s: float = 1000.0) -> int:
        """Teach at 250 jiffies a second; the jiffies are 64 * 1000."""
        return teach(self.maps, tables, names, now_s=now_s, now_jiffies=64_000, jiffies_per_second=250)  # type: ignore[arg-type]

    def row(self) -> dict[int, int]:
        """The classes of the row of the address, with their times."""
        (value,) = self.maps["np_learned4"].rows.values()
        row = abi.np_learned.from_buffer_copy(value)
        return {class_: until for class_, until in zip(row.name_class, row.until, strict=True) if class_}


def test_an_address_gets_the_class_of_a_later_pattern(clock: Clock) -> None:
    """The class expires when the answer does: 60 s of 250 jiffies are 234 units."""
    names, maps = make(clock), Maps()
    names.take([event()])
    assert maps.teach(names, tables_with("*.example.com", 3)) == 1
    assert maps.row() == {3: 1000 + 234}
    assert maps.teach(names, tables_with("*.example.com", 3)) == 0


def test_a_name_that_no_pattern_matches_gets_no_row(clock: Clock) -> None:
    """Nothing is written for it."""
    names, maps = make(clock), Maps()
    names.take([event()])
    assert maps.teach(names, tables_with("example.com", 3)) == 0
    assert not maps.maps["np_learned4"].rows


def test_classes_that_the_program_wrote_are_kept(clock: Clock) -> None:
    """Of more than four classes those with the most time left stay; expired ones go."""
    names, maps = make(clock), Maps()
    names.take([event(ttl_s=600)])
    name, key, value = learned_element(7, ADDRESS, {1: 1100, 2: 1200, 8: 900, 9: 1300})
    maps.maps[name].put(key, value)
    maps.teach(names, tables_with("*.example.com", 3))
    assert maps.row().keys() == {1, 2, 3, 9}
    assert classes_in_use(maps.maps) == {1, 2, 3, 9}  # type: ignore[arg-type]


def test_patterns_stand_for_the_names_that_only_the_kernel_knows() -> None:
    """A name of a CNAME chain is in no report, but its class is in the row, and the class has the patterns that match it."""
    maps, tables = Maps(), tables_with("*.cdn.net", 3)
    tables.name_classes.set(3, frozenset({frozenset({"*.cdn.net", "x.*.org"}), frozenset({"*.net"})}))
    name, key, value = learned_element(7, ADDRESS, {3: 1100, 4: 900})
    maps.maps[name].put(key, value)
    ((endpoint, address, names),) = names_in_kernel(maps.maps, tables, now_jiffies=64_000)  # type: ignore[arg-type]
    assert (endpoint, address) == (WEB, ADDRESS)
    assert names == {"*.cdn.net", "x.any.org", "*.net"}


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        (b"\x03com\x07example\x03www\0", "www.example.com"),
        (b"\x03com\x03a.b\0", "a\\046b.com"),
        (b"\0", ""),
        (b"\x03com\x04\xc3\xa9-_", "\\195\\169-_.com"),
    ],
)
def test_labels_are_read_in_reverse(labels: bytes, name: str) -> None:
    """A dot or another byte inside a label does not look like a separator."""
    assert decode_labels(labels) == name
