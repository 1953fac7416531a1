# SPDX-License-Identifier: Apache-2.0
"""The explorer agrees with published outcomes for x86-64, arm64 and RCU: it finds the allowed ones and no others."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from explorer import FENCE, Machine, Op, Scene, Values, exchange, executions, find_wrong, grace, load, section, store

TSO, WEAK = Machine.TSO, Machine.WEAK


def flag_seen(end: Values) -> bool:
    return bool(end["b.flag"] == 1 and end["b.data"] == 0)


def message_passing(writer: Sequence[Op], reader: Sequence[Op]) -> Scene:
    return Scene({"a": writer, "b": reader}, {"data": 0, "flag": 0}, flag_seen)


def plain(name: str, *, uses: tuple[str, ...] = ()) -> Op:
    """A load. ``uses``: registers from which its address is computed."""
    return load(name, (lambda _: name) if uses else name, uses=uses, among=(name,))


WRITE, READ = [store("data", 1), store("flag", 1)], [plain("flag"), plain("data")]
READ_IN_TURN = [plain("flag"), plain("data", uses=("flag",))]
LITMUS: dict[str, tuple[Scene, set[Machine]]] = {
    "MP": (message_passing(WRITE, READ), {WEAK}),
    "MP, stores in order only": (message_passing([WRITE[0], FENCE, WRITE[1]], READ), {WEAK}),
    "MP, loads in order only": (message_passing(WRITE, READ_IN_TURN), {WEAK}),
    "MP, barrier and address": (message_passing([WRITE[0], FENCE, WRITE[1]], READ_IN_TURN), set()),
    "MP, exchange and address": (message_passing([WRITE[0], exchange("flag", 1)], READ_IN_TURN), set()),
    "MP, release and address": (message_passing([WRITE[0], store("flag", 1, release=True)], READ_IN_TURN), set()),
    "MP, a store behind the release": (
        message_passing([store("other", 1, release=True), store("data", 1), store("flag", 1)], READ_IN_TURN),
        {WEAK},
    ),
    "SB": (
        Scene(
            {"a": [store("x", 1), load("y", "y")], "b": [store("y", 1), load("x", "x")]},
            {"x": 0, "y": 0},
            lambda end: end["a.y"] == end["b.x"] == 0,
        ),
        {TSO, WEAK},
    ),
    "SB, barriers": (
        Scene(
            {"a": [store("x", 1), FENCE, load("y", "y")], "b": [exchange("y", 1), load("x", "x")]},
            {"x": 0, "y": 0},
            lambda end: end["a.y"] == end["b.x"] == 0,
        ),
        set(),
    ),
    "SB, each reads its own store first": (
        Scene(
            {
                "a": [store("x", 1), load("own", "x"), load("y", "y")],
                "b": [store("y", 1), load("own", "y"), load("x", "x")],
            },
            {"x": 0, "y": 0},
            lambda end: end["a.own"] == end["b.own"] == 1 and end["a.y"] == end["b.x"] == 0,
        ),
        {TSO, WEAK},
    ),
    "LB": (
        Scene(
            {"a": [load("x", "x"), store("y", 1)], "b": [load("y", "y"), store("x", 1)]},
            {"x": 0, "y": 0},
            lambda end: end["a.x"] == end["b.y"] == 1,
        ),
        {WEAK},
    ),
    "LB, stores behind branches": (
        Scene(
            {
                "a": [load("x", "x"), store("y", 1, asks=("x",), when=lambda has: has["x"] == 1)],
                "b": [load("y", "y"), store("x", 1)],
            },
            {"x": 0, "y": 0},
            lambda end: end["a.x"] == end["b.y"] == 1,
        ),
        {WEAK},
    ),
    "LB, both behind branches": (
        Scene(
            {
                "a": [load("x", "x"), store("y", 1, asks=("x",), when=lambda has: has["x"] == 1)],
                "b": [load("y", "y"), store("x", 1, asks=("y",), when=lambda has: has["y"] == 1)],
            },
            {"x": 0, "y": 0},
            lambda end: end["a.x"] == end["b.y"] == 1,
        ),
        set(),
    ),
    "CoRR": (
        Scene(
            {"a": [store("x", 1)], "b": [load("first", "x"), load("then", "x")]},
            {"x": 0},
            lambda end: end["b.first"] > end["b.then"],
        ),
        set(),
    ),
    "IRIW, address": (
        Scene(
            {
                "a": [store("x", 1)],
                "b": [store("y", 1)],
                "c": [load("x", "x"), load("y", lambda _: "y", uses=("x",), among=("y",))],
                "d": [load("y", "y"), load("x", lambda _: "x", uses=("y",), among=("x",))],
            },
            {"x": 0, "y": 0},
            lambda end: (end["c.x"], end["c.y"], end["d.y"], end["d.x"]) == (1, 0, 1, 0),
        ),
        set(),
    ),
    "2+2W": (
        Scene(
            {"a": [store("x", 1), store("y", 2)], "b": [store("y", 1), store("x", 2)]},
            {"x": 0, "y": 0},
            lambda end: end["x"] == end["y"] == 1,
        ),
        {WEAK},
    ),
    "PPOCA: from a store that a branch may still cancel": (
        message_passing(
            [WRITE[0], FENCE, WRITE[1]],
            [
                plain("flag"),
                store("mine", 1, asks=("flag",), when=lambda has: has["flag"] == 1),
                load("mine", "mine"),
                plain("data", uses=("mine",)),
            ],
        ),
        {WEAK},
    ),
    "RCU: publish after a grace period": (
        message_passing([WRITE[0], *grace(), WRITE[1]], section(*READ[::-1])),
        set(),
    ),
    "RCU: the same without a section": (message_passing([WRITE[0], *grace(), WRITE[1]], READ[::-1]), {TSO, WEAK}),
    "RCU: the grace period comes first": (message_passing([*grace(), *WRITE], section(*READ)), {WEAK}),
    "RCU: taken back, waited for, reused": (
        Scene(
            {"a": [store("flag", 0), *grace(), store("data", 2)], "b": section(*READ)},
            {"data": 1, "flag": 1},
            lambda end: end["b.flag"] == 1 and end["b.data"] == 2,
        ),
        set(),
    ),
    "RCU: taken back and reused": (
        Scene(
            {"a": [store("flag", 0), store("data", 2)], "b": section(*READ)},
            {"data": 1, "flag": 1},
            lambda end: end["b.flag"] == 1 and end["b.data"] == 2,
        ),
        {TSO, WEAK},
    ),
    "RCU: two grace periods, two sections": (
        Scene(
            {
                "a": [store("x", 1), *grace(), load("y", "y")],
                "b": [store("y", 1), *grace(), load("z", "z")],
                "c": section(store("z", 1), load("x", "x")),
            },
            {"x": 0, "y": 0, "z": 0},
            lambda end: end["a.y"] == end["b.z"] == end["c.x"] == 0,
        ),
        set(),
    ),
    "RCU: one grace period, two sections": (
        Scene(
            {
                "a": [store("x", 1), *grace(), load("y", "y")],
                "b": section(store("y", 1), load("z", "z")),
                "c": section(store("z", 1), load("x", "x")),
            },
            {"x": 0, "y": 0, "z": 0},
            lambda end: end["a.y"] == end["b.z"] == end["c.x"] == 0,
        ),
        {TSO, WEAK},
    ),
}
for _scene, _ in LITMUS.values():
    _scene.memory = {"other": 0, "mine": 0, **_scene.memory}


@pytest.mark.parametrize("machine", Machine)
@pytest.mark.parametrize("name", LITMUS)
def test_published_outcomes(name: str, machine: Machine) -> None:
    """The explorer finds the outcomes that a machine allows, and none that it forbids."""
    scene, allowed = LITMUS[name]
    assert (find_wrong(scene, machine) is not None) is (machine in allowed)


def test_way_is_told_step_by_step() -> None:
    """A wrong outcome comes with its execution: every operation once, and then what is wrong."""
    way = find_wrong(message_passing(WRITE, READ), WEAK)
    assert way is not None
    assert sorted(way[:-1]) == ["a: store data := 1", "a: store flag := 1", "b: load data = 0", "b: load flag = 1"]
    assert way[-1].startswith("wrong: ")


def test_model_in_which_everything_waits_is_refused() -> None:
    """A grace period inside a section waits for itself. Such a model would find nothing and prove nothing."""
    scene = Scene({"a": section(*grace(), store("x", 1))}, {"x": 0}, lambda end: end["x"] == 0)
    assert not list(executions(scene, WEAK))
    with pytest.raises(AssertionError, match="comes to its end"):
        find_wrong(scene, WEAK)
