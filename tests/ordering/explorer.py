# SPDX-License-Identifier: Apache-2.0
"""Finds all executions of a few threads on a machine that reorders loads and stores, to detect wrong outcomes.

A thread is a list of operations. An operation takes effect at one instant for all threads (arm64 and x86-64 are
multi-copy atomic). The machine determines which operations of one thread may take effect in another order than the
program's:

    TSO    x86-64: a load may overtake stores to other locations; nothing else is reordered.
    WEAK   arm64 or weaker: any operation may overtake any other. Exceptions: accesses to one location, full barriers,
           release stores, and dependencies, which exist if the address or value of an access is computed from a loaded
           value, or if a loaded value decides whether a *store* is executed. A branch does not delay a load.

On both machines a load may take its value from a store of its own thread that has not taken effect yet; on WEAK even
from a store that a branch may still cancel. Exchange and compare-and-swap are full barriers, and so is a failed
compare-and-swap. The last one is stronger than on arm64, so no model may rely on it.

A grace period is that of RCU: it ends when every read-side section has ended that had begun before it, and it is a full
barrier. A section represents the time from one quiescent state of a processor to the next, so every access of a packet
is within it. The search tries every place for its ends.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

Values = Mapping[str, Any]
State = tuple[tuple[int, ...], tuple[tuple[Any, ...], ...], tuple[Any, ...], frozenset[tuple[int, int]]]
"""(operations done by each thread, as bits; their results; memory; stores whose value a load took before they took
effect)."""


class Machine(enum.Enum):
    """The rule for which operations of a thread may be reordered."""

    TSO = "x86-64"
    WEAK = "arm64"


@dataclass(frozen=True)
class Op:
    """One operation.

    ``into``: the register of the result. ``uses``: the registers from which address and value are computed. ``at``: a
    location, or a function of the registers; then ``among`` has its possible results. ``when``: a condition on the
    registers ``asks``; if it is false, a store, exchange or compare-and-swap does nothing.
    """

    kind: str
    at: str | Callable[[Values], str] = ""
    value: Any = None
    expected: Any = None
    into: str = ""
    uses: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()
    when: Callable[[Values], bool] | None = None
    among: tuple[str, ...] = ()
    release: bool = False

    @property
    def is_barrier(self) -> bool:
        """Whether no operation may move across this one in either direction."""
        return self.kind not in ("load", "store")

    @property
    def places(self) -> frozenset[str]:
        """The locations that the operation may access."""
        return frozenset(self.among or ((self.at,) if isinstance(self.at, str) and self.at else ()))


def load(into: str, at: str | Callable[[Values], str], **how: Any) -> Op:
    """Read a location."""
    return Op("load", at, into=into, **how)


def store(at: str | Callable[[Values], str], value: Any, **how: Any) -> Op:
    """Write a value, or the result of a function of the registers."""
    return Op("store", at, value, **how)


def exchange(at: str | Callable[[Values], str], value: Any, **how: Any) -> Op:
    """Write as `store` does, with a full barrier before and after."""
    return Op("exchange", at, value, **how)


def compare_and_swap(into: str, at: str, expected: Any, value: Any, **how: Any) -> Op:
    """Write if the location has the value ``expected``. The register gets the value that it had."""
    return Op("cas", at, value, expected, into, **how)


def grace(*, wanted: bool = True) -> list[Op]:
    """A grace period."""
    return [Op("begin"), Op("end")] if wanted else []


def section(*operations: Op) -> list[Op]:
    """A read-side section: the run of a program for one packet."""
    return [Op("enter"), *operations, Op("leave")]


FENCE = Op("fence")


@dataclass
class Scene:
    """The threads, the initial memory, and the wrong outcomes, as a function of memory and of each thread's registers.

    The register ``register`` of thread t is called ``t.register``. Registers of cancelled or unused loads exist, too.
    """

    threads: Mapping[str, Sequence[Op]]
    memory: Mapping[str, Any]
    wrong: Callable[[Values], bool]


@dataclass
class _Search:
    scene: Scene
    machine: Machine
    names: list[str] = field(init=False)
    places: dict[str, int] = field(init=False)
    needs: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.names = list(self.scene.threads)
        self.threads = [list(self.scene.threads[name]) for name in self.names]
        self.places = {place: index for index, place in enumerate(self.scene.memory)}
        self.needs = [
            [sum(1 << j for j in range(i) if self._is_ordered(ops[j], op)) for i, op in enumerate(ops)]
            for ops in self.threads
        ]

    def _is_ordered(self, first: Op, then: Op) -> bool:
        """Whether ``first``, which is first in the program, also takes effect first, whatever their locations are."""
        if first.is_barrier or then.is_barrier or then.release or first.into and first.into in then.uses:
            return True
        if then.kind == "store" and first.into and first.into in then.asks:
            return True
        if self.machine is Machine.TSO:
            return (first.kind, then.kind) != ("store", "load")
        return False

    def registers(self, state: State, thread: int) -> dict[str, Any]:
        """The results of a thread's operations that are done."""
        ops, results = self.threads[thread], state[1][thread]
        return {op.into: results[i] for i, op in enumerate(ops) if op.into and state[0][thread] >> i & 1}

    def _place(self, op: Op, registers: Values) -> str | None:
        """The location of an operation; None while it is not known."""
        if isinstance(op.at, str):
            return op.at
        return op.at(registers) if all(name in registers for name in op.uses) else None

    def successors(self, state: State) -> Iterator[tuple[str, State]]:
        """Every possible next step, with its description."""
        for thread, ops in enumerate(self.threads):
            done, registers = state[0][thread], self.registers(state, thread)
            for i in range(len(ops)):
                if not done >> i & 1 and not self.needs[thread][i] & ~done:
                    for what, following in self._take(state, thread, i, registers):
                        yield f"{self.names[thread]}: {what}", following

    def _take(self, state: State, thread: int, i: int, registers: Values) -> Iterator[tuple[str, State]]:
        """Let an operation take effect, if it may overtake the unfinished operations before it in the program."""
        op = self.threads[thread][i]
        place = self._place(op, registers)
        ahead = self._ahead(state, thread, i, place, registers)
        if op.kind == "begin":
            yield op.kind, self._after(state, thread, i, frozenset(self._sections(state)))
        elif op.kind == "end":
            if all(state[0][other] >> leave & 1 for other, leave in state[1][thread][i - 1]):
                yield op.kind, self._after(state, thread, i)
        elif not op.places:
            yield op.kind, self._after(state, thread, i)
        elif place is None or ahead and (op.kind != "load" or self.threads[thread][ahead[-1]].kind != "store"):
            pass
        elif ahead:
            yield from self._forward(state, thread, i, ahead[-1], registers)
        else:
            yield from self._access(state, thread, i, place, registers)

    def _ahead(self, state: State, thread: int, i: int, place: str | None, registers: Values) -> list[int]:
        """The unfinished operations before an operation in the program that access, or may access, its location."""
        ops, done = self.threads[thread], state[0][thread]
        left = [j for j in range(i) if not done >> j & 1 and ops[j].places & ops[i].places]
        return [j for j in left if place is None or self._place(ops[j], registers) in (place, None)]

    def _forward(
        self, state: State, thread: int, i: int, source: int, registers: Values
    ) -> Iterator[tuple[str, State]]:
        """A load takes its value from an unfinished store of its own thread, which a branch may still cancel."""
        op = self.threads[thread][source]
        if self._place(op, registers) is None or not all(name in registers for name in op.uses):
            return
        is_certain = all(name in registers for name in op.asks)
        if is_certain and op.when is not None and not op.when(registers):
            return  # the store will do nothing, so the load must wait until it has done so
        value = _value(op.value, registers)
        what = f"load {self._place(op, registers)} = {value}, ahead of its own store"
        yield what, self._after(state, thread, i, value, assumed=set() if is_certain else {(thread, source)})

    def _access(self, state: State, thread: int, i: int, place: str, registers: Values) -> Iterator[tuple[str, State]]:
        """A load, store, exchange or compare-and-swap accesses memory."""
        op, memory = self.threads[thread][i], list(state[2])
        held = memory[self.places[place]]
        happens = op.when is None or op.when(registers)
        if op.kind == "load":
            what = f"= {held}"
        elif happens and (op.kind != "cas" or held == _value(op.expected, registers)):
            memory[self.places[place]] = _value(op.value, registers)
            what = f":= {memory[self.places[place]]}"
        else:
            what = "not done"
        if happens or (thread, i) not in state[3]:  # otherwise a load took the value of a store that was cancelled
            yield f"{op.kind} {place} {what}", self._after(state, thread, i, held if op.into else None, memory)

    @staticmethod
    def _after(
        state: State,
        thread: int,
        i: int,
        result: Any = None,
        memory: Sequence[Any] | None = None,
        assumed: AbstractSet[tuple[int, int]] = frozenset(),
    ) -> State:
        dones, results = list(state[0]), list(state[1])
        dones[thread] |= 1 << i
        results[thread] = (*results[thread][:i], result, *results[thread][i + 1 :])
        return tuple(dones), tuple(results), state[2] if memory is None else tuple(memory), state[3] | assumed

    def _sections(self, state: State) -> Iterator[tuple[int, int]]:
        """The read-side sections that have begun and not ended, each as (thread, index of its end)."""
        for thread, ops in enumerate(self.threads):
            begun: int | None = None
            for i, op in enumerate(ops):
                if op.kind == "enter":
                    begun = i
                elif op.kind == "leave" and begun is not None:
                    if state[0][thread] >> begun & 1 and not state[0][thread] >> i & 1:
                        yield thread, i
                    begun = None

    def outcome(self, state: State) -> dict[str, Any]:
        """The final memory and registers."""
        found = {place: state[2][index] for place, index in self.places.items()}
        for thread, name in enumerate(self.names):
            found |= {f"{name}.{register}": value for register, value in self.registers(state, thread).items()}
        return found

    def is_over(self, state: State) -> bool:
        """Whether every thread has done all its operations."""
        return all(done == (1 << len(ops)) - 1 for done, ops in zip(state[0], self.threads, strict=True))


def _value(value: Any, registers: Values) -> Any:
    return value(registers) if callable(value) else value


def executions(scene: Scene, machine: Machine) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Every reachable outcome once, with one execution that leads to it."""
    search = _Search(scene, machine)
    start: State = (
        tuple(0 for _ in search.threads),
        tuple(tuple(None for _ in ops) for ops in search.threads),
        tuple(scene.memory.values()),
        frozenset(),
    )
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    waiting = [start]
    while waiting:
        state = waiting.pop()
        if search.is_over(state):
            yield search.outcome(state), _way(came_from, state)
        for what, following in search.successors(state):
            if following not in came_from:
                came_from[following] = (state, what)
                waiting.append(following)


def _way(came_from: Mapping[State, tuple[State, str] | None], state: State) -> list[str]:
    steps: list[str] = []
    while (step := came_from[state]) is not None:
        state, what = step
        steps.append(what)
    return steps[::-1]


def find_wrong(scene: Scene, machine: Machine) -> list[str] | None:
    """An execution with a wrong outcome, step by step; None if there is none.

    Raises AssertionError if no execution can end, because a model in which everything waits proves nothing.
    """
    count = 0
    for found, steps in executions(scene, machine):
        count += 1
        if scene.wrong(found):
            return [*steps, f"wrong: {found}"]
    assert count, "no execution comes to its end"
    return None
