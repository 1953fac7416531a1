# SPDX-License-Identifier: Apache-2.0
"""The tables of the second barrier in memory, with a log of the changes to them and to the programs' marks."""

from __future__ import annotations

from dataclasses import dataclass, field

from netpol_ebpf.errors import PlatformError
from netpol_loader.host.barrier import BarrierSpec, Counts, Difference, Marks


@dataclass
class MemoryTables:
    """The tables.

    ``layout``: their content; None: there are none. ``refuses``: the reason why every call fails. ``log``: all changes.
    """

    families: tuple[str, ...] = ("inet", "bridge")
    is_held: bool = True
    layout: BarrierSpec | None = None
    refuses: str = ""
    news: bool = False
    is_spoiled: bool = False
    by_interface: dict[str, int] = field(default_factory=dict)
    log: list[object] = field(default_factory=list)

    def _try(self) -> None:
        if self.refuses:
            raise PlatformError(self.refuses)

    def open(self) -> None:
        self._try()

    def has_news(self) -> bool:
        news, self.news = self.news, False
        return news

    def has_changed(self) -> bool:
        self._try()
        return self.is_spoiled

    def is_there(self) -> bool:
        self._try()
        return self.layout is not None

    def members(self) -> tuple[frozenset[str], frozenset[int]]:
        self._try()
        return (frozenset(), frozenset()) if self.layout is None else (self.layout.workloads, self.layout.known)

    def counts(self) -> Counts:
        self._try()
        return Counts({"unsigned": {"inet": self.unsigned()}}, dict(self.by_interface))

    def unsigned(self) -> int:
        self._try()
        return sum(self.by_interface.values())

    def write(self, layout: BarrierSpec) -> list[Difference]:
        self._try()
        is_other = self.layout != layout or self.is_spoiled
        self.layout, self.is_spoiled = layout, False
        self.log.append(layout)
        return [Difference("table inet np_barrier", "changed")] if is_other else []


@dataclass
class MemoryMarks:
    """The programs' marks. Each change is also in the tables' log."""

    log: list[object]
    marks: Marks = Marks()

    def set_marks(self, marks: Marks) -> None:
        self.marks = marks
        self.log.append(marks)
