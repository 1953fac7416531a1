# SPDX-License-Identifier: Apache-2.0
"""The pairs of stores and loads on which policy relies, each as a model for the explorer.

A model names the orderings that the product has, and the machines on which each is needed. The agent is the thread
``agent``; a program's run for a packet is a section. Locations and operations are those of the code, in the order of
the code; those that do not matter for the pair are left out. ADR 10 and 11 have the argument for each pair.

An agent's writes through bpf(2) count as plain stores, because the system call is no barrier on arm64. There is one
exception: the kernel publishes a new element of a hash table or a trie with release.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from explorer import FENCE, Machine, Op, Scene, Values, compare_and_swap, exchange, grace, load, section, store

TSO, WEAK = Machine.TSO, Machine.WEAK
BOTH = frozenset(Machine)
NONE: frozenset[Machine] = frozenset()
STRONG_ONLY, WEAK_ONLY = frozenset({TSO}), frozenset({WEAK})


@dataclass(frozen=True)
class Ordering:
    """An ordering.

    ``there``: machines on which the product has it. ``needed``: machines on which an outcome is wrong without it.

    An ordering may be there without being needed if both machines run the same code. An example is the order of a
    program's loads on a machine where a grace period has the same effect.
    """

    name: str
    there: frozenset[Machine]
    needed: frozenset[Machine]


Has = Callable[[str], bool]


@dataclass(frozen=True)
class Model:
    """A model.

    ``build``: gets a function that says for an ordering's name whether it is kept. ``wrong``: the wrong outcome, as
    text.
    """

    name: str
    wrong: str
    orderings: tuple[Ordering, ...]
    build: Callable[[Has], Scene]


def ordered(kept: bool, *parts: Sequence[Op]) -> list[Op]:  # noqa: FBT001 - reads as: ordered(has("..."), first, then)
    """The parts in order; in the reverse order if their order is not kept."""
    return [op for part in (parts if kept else parts[::-1]) for op in part]


def behind(name: str, register: str, *, kept: bool = True) -> Op:
    """A load with an address that is computed from a register."""
    return load(name, (lambda _: name) if kept else name, uses=(register,) if kept else (), among=(name,))


# --- names that occur in several models ---------------------------------------------------------------------------------

DATA_FIRST = Ordering("the agent writes the data before the flag", BOTH, BOTH)
GRACE_BEFORE_FLAG = Ordering("grace period before the flag", WEAK_ONLY, WEAK_ONLY)
FLAG_LOADED_FIRST = Ordering("the program loads the flag before the data", BOTH, STRONG_ONLY)
SETTLED = Ordering("grace period between removal and reuse", BOTH, BOTH)
PUBLISHED = Ordering("the program publishes by an exchange", WEAK_ONLY, WEAK_ONLY)
ENTRY_FIRST = Ordering("the program writes the entry before the tag", BOTH, BOTH)
FROM_TAG = Ordering("the entry's address is made of the tag", BOTH, WEAK_ONLY)
OWNED = Ordering("a slot is owned by compare-and-swap", BOTH, BOTH)


def publish(data: Sequence[Op], flag: Sequence[Op], has: Has) -> list[Op]:
    """The agent's usual sequence: data; on weakly ordered machines a grace period; flag."""
    return ordered(has(DATA_FIRST.name), data, grace(wanted=has(GRACE_BEFORE_FLAG.name)), flag)


# --- addresses and classes (ADR 10) --------------------------------------------------------------------------------------


def _address(has: Has) -> Scene:
    """A bucket's row that had another address before; `AddressMap.put`, `np_addr4_seek`."""
    flag, data = [load("used", "used")], [load("key", "key"), load("row", "row")]
    return Scene(
        {
            "agent": publish([store("key", "new"), store("row", "of new")], [store("used", 1)], has),
            "packet": section(*ordered(has(FLAG_LOADED_FIRST.name), flag, data)),
        },
        {"used": 0, "key": "old", "row": "of old"},
        lambda end: end["packet.used"] == 1 and end["packet.key"] == "new" and end["packet.row"] != "of new",
    )


def _address6(has: Has) -> Scene:
    """A key of several words: half of the old key and half of the new one are together the key of a third address."""
    flag, data = [load("used", "used")], [load("low", "low"), load("high", "high")]
    return Scene(
        {
            "agent": publish([store("low", 2), store("high", 2)], [store("used", 1)], has),
            "packet": section(*ordered(has(FLAG_LOADED_FIRST.name), flag, data)),
        },
        {"used": 0, "low": 1, "high": 1},
        lambda end: end["packet.used"] == 1 and end["packet.low"] != end["packet.high"],
    )


def _address_reuse(has: Has) -> Scene:
    """A row is removed, and another one takes its place; `AddressMap.delete`, `end_grace_period`, `put`."""
    return Scene(
        {
            "agent": [
                store("used", 0),
                *grace(wanted=has(SETTLED.name)),
                *publish([store("key", "new"), store("row", "of new")], [store("used", 1)], has),
            ],
            "packet": section(load("used", "used"), load("key", "key"), load("row", "row")),
        },
        {"used": 1, "key": "old", "row": "of old"},
        lambda end: end["packet.used"] == 1 and end["packet.row"] != f"of {end['packet.key']}",
    )


def _class_line(has: Has) -> Scene:
    """A line of classes gets its policy set; `ClassMap._claim`, `np_class_seek`."""
    flag, data = [load("set", "set")], [load("block", "block"), load("class", "class")]
    return Scene(
        {
            "agent": publish([store("class", "of new"), store("block", "new")], [store("set", 1)], has),
            "packet": section(*ordered(has(FLAG_LOADED_FIRST.name), flag, data)),
        },
        {"set": 0, "block": "old", "class": "of old"},
        lambda end: end["packet.set"] == 1 and (end["packet.block"], end["packet.class"]) != ("new", "of new"),
    )


def _class_line_reuse(has: Has) -> Scene:
    """The last class of a line is removed; another set takes the line.

    `ClassMap.delete`, `end_grace_period`, `_claim`.
    """
    return Scene(
        {
            "agent": [
                store("class", "none"),
                store("set", 0),
                *grace(wanted=has(SETTLED.name)),
                *publish([store("class", "of new")], [store("set", "new")], has),
            ],
            "packet": section(load("set", "set"), load("class", "class")),
        },
        {"set": "old", "class": "of old"},
        lambda end: (end["packet.set"], end["packet.class"]) in {("old", "of new"), ("new", "of old"), ("new", "none")},
    )


def _class_before_identity(has: Has) -> Scene:
    """A new identity has its class in the sets in force before an address has the identity; `Applier.apply`."""
    return Scene(
        {
            "agent": publish([store("class", "of identity")], [store("address", "identity")], has),
            "packet": section(load("identity", "address"), behind("class", "identity")),
        },
        {"address": "world", "class": "none"},
        lambda end: end["packet.identity"] == "identity" and end["packet.class"] == "none",
    )


def _column_before_atom(has: Has) -> Scene:
    """A new atom has its class in all columns before a port has the atom; `Applier.apply`, `np_column_class`."""
    return Scene(
        {
            "agent": publish([store("column", "of atom")], [store("port", "atom")], has),
            "packet": section(load("atom", "port"), behind("column", "atom")),
        },
        {"port": "old atom", "column": "empty"},
        lambda end: end["packet.atom"] == "atom" and end["packet.column"] == "empty",
    )


SET_LOADED_FIRST = Ordering("the program loads the endpoint's row before the atom", BOTH, STRONG_ONLY)
GRACE_BEFORE_FLIP = Ordering("grace period between what grows and what flips", WEAK_ONLY, WEAK_ONLY)


def _atom_before_set(has: Has) -> Scene:
    """A new policy set distinguishes a new atom.

    Its endpoint's row is published with release, but the reader has no acquire.
    """
    row, atom = [load("set", "endpoint")], [load("atom", "port")]
    return Scene(
        {
            "agent": ordered(
                has(DATA_FIRST.name),
                [store("port", "atom")],
                grace(wanted=has(GRACE_BEFORE_FLIP.name)),
                [store("endpoint", "new", release=True)],
            ),
            "packet": section(*ordered(has(SET_LOADED_FIRST.name), row, atom)),
        },
        {"port": "old atom", "endpoint": "old"},
        lambda end: end["packet.set"] == "new" and end["packet.atom"] == "old atom",
    )


KERNEL_RELEASES = Ordering("the kernel publishes a row with release", BOTH, WEAK_ONLY)
FROM_ROW = Ordering("the verdict's address is made of the row", BOTH, WEAK_ONLY)


def _verdict_before_endpoint(has: Has) -> Scene:
    """An endpoint's row points at verdicts, so a packet reads them after it. This pair needs no grace period."""
    return Scene(
        {
            "agent": ordered(
                has(DATA_FIRST.name),
                [store("range", "written")],
                [store("endpoint", 1, release=has(KERNEL_RELEASES.name))],
            ),
            "packet": section(load("row", "endpoint"), behind("range", "row", kept=has(FROM_ROW.name))),
        },
        {"range": "of another set", "endpoint": 0},
        lambda end: end["packet.row"] == 1 and end["packet.range"] != "written",
    )


ANY_ORDER = Ordering("a bit is set before its row is written", BOTH, NONE)


def _special(has: Has) -> Scene:
    """An address becomes the node's own; `SurroundingsWriter.write`, `np_is_local`.

    The program reads both bit and row.
    """
    data = ordered(has(ANY_ORDER.name), [store("bit", 1)], [store("row", 1, release=True)])
    return Scene(
        {
            "agent": publish(data, [store("generation", 2)], has),
            "packet": section(
                *ordered(
                    has(FLAG_LOADED_FIRST.name),
                    [load("generation", "generation")],
                    [load("bit", "bit"), load("row", "row")],
                )
            ),
        },
        {"bit": 0, "row": 0, "generation": 1},
        lambda end: end["packet.generation"] == 2 and not (end["packet.bit"] and end["packet.row"]),
    )


# --- endpoints, generation, epoch -----------------------------------------------------------------------------------------


def _generation(has: Has) -> Scene:
    """A verdict is recorded under the generation that the program loaded; `Applier.bump_generation`, `np_tc`."""
    flag, data = [load("generation", "generation")], [load("row", "row")]
    return Scene(
        {
            "agent": publish([store("row", "denies")], [store("generation", 2)], has),
            "packet": section(*ordered(has(FLAG_LOADED_FIRST.name), flag, data)),
        },
        {"generation": 1, "row": "allows"},
        lambda end: end["packet.generation"] == 2 and end["packet.row"] == "allows",
    )


ONE_WORD = Ordering("generation and epoch are loaded as one word", BOTH, BOTH)
EPOCH_FIRST = Ordering("the epoch is stored before the generation", BOTH, BOTH)


def _epoch(has: Has) -> Scene:
    """The same through the endpoint cache, which keeps a row for an epoch: two packets on one processor.

    The kernel copies a row of an array in any order, so two values in one row (generation, epoch) are not written at
    once. The compiler may also exchange two loads, and so may a weakly ordered processor.
    """
    config = [load("generation", "config")]
    if not has(ONE_WORD.name):
        config = [load("epoch", "config"), *config]
    epoch = "generation" if has(ONE_WORD.name) else "epoch"

    def is_old(end: Values) -> bool:
        cached_epoch, cached = end["cpu.cached"]
        row = cached if cached_epoch == end[f"cpu.{epoch}"][1] else end["cpu.row"]
        return bool(end["cpu.generation"][0] == 2 and row == "allows")

    return Scene(
        {
            "agent": publish(
                [store("row", "denies")],
                [store("config", (1, 2) if has(EPOCH_FIRST.name) else (2, 1)), store("config", (2, 2))],
                has,
            ),
            "cpu": [
                *section(
                    *ordered(
                        has(FLAG_LOADED_FIRST.name),
                        [load("then", "config")],
                        [load("filled", "row")],
                    ),
                    store("cache", lambda has: (has["then"][1], has["filled"]), uses=("then", "filled")),
                ),
                *section(*config, load("cached", "cache"), load("row", "row")),
            ],
        },
        {"config": (1, 1), "row": "allows", "cache": (0, "")},
        is_old,
    )


EPOCH_BEFORE_SHRINK = Ordering("grace period between the epoch and what shrinks", BOTH, BOTH)
FLIP_BEFORE_EPOCH = Ordering("endpoint rows flip before the epoch", BOTH, BOTH)
GRACE_BEFORE_EPOCH = Ordering("grace period before the epoch", WEAK_ONLY, WEAK_ONLY)


def _range_reuse(has: Has) -> Scene:
    """A range of verdicts is reused when no packet has the old endpoint row that points at it (also in the cache)."""

    def at(has: Values) -> str:
        epoch, row = has["cached"]
        return str(row if epoch == has["epoch"] else has["row"])

    return Scene(
        {
            "agent": [
                *ordered(
                    has(FLIP_BEFORE_EPOCH.name),
                    [store("endpoint", "b", release=True)],
                    grace(wanted=has(GRACE_BEFORE_EPOCH.name)),
                    [store("epoch", 2)],
                ),
                *grace(wanted=has(EPOCH_BEFORE_SHRINK.name)),
                store("a", "of another set"),
            ],
            "cpu": [
                *section(
                    load("then", "epoch"),
                    load("filled", "endpoint"),
                    store("cache", lambda has: (has["then"], has["filled"]), uses=("then", "filled")),
                ),
                *section(
                    load("epoch", "epoch"),
                    load("cached", "cache"),
                    load("row", "endpoint"),
                    load("verdict", at, uses=("epoch", "cached", "row"), among=("a", "b")),
                ),
            ],
        },
        {"epoch": 1, "endpoint": "a", "a": "of the set", "b": "of the set", "cache": (0, "")},
        lambda end: end["cpu.verdict"] != "of the set",
    )


CHECKED = Ordering("the check covers every word of the row", BOTH, BOTH)
KEY_CHECKED = Ordering("the check covers the row's key", BOTH, BOTH)
READ_ONCE = Ordering("what was checked is what is used", BOTH, BOTH)


def _check_words(has: Has) -> Scene:
    """A host endpoint's row is removed, and the kernel reuses its memory for another row at once; `np_host_read`."""

    def written(key: str, word: int) -> list[Op]:
        check = (key if has(KEY_CHECKED.name) else "", word, word if has(CHECKED.name) else 0)
        return [store("one", word), store("two", word), store("check", check)]

    loads = [load("one", "one"), load("two", "two"), load("check", "check")]
    used = "one" if has(READ_ONCE.name) else "again"
    if not has(READ_ONCE.name):
        loads.append(load("again", "one"))

    def wrong(end: Values) -> bool:
        one, two = end["packet.one"], end["packet.two"]
        key = "mine" if has(KEY_CHECKED.name) else ""
        is_taken = end["packet.check"] == (key, one, two if has(CHECKED.name) else 0)
        return is_taken and (end[f"packet.{used}"], two) != (1, 1)

    first = {str(op.at): op.value for op in written("mine", 1)}
    return Scene({"agent": written("another", 2), "packet": section(*loads)}, first, wrong)


# --- connections (ADR 11) --------------------------------------------------------------------------------------------------


def _own(name: str, has: Has, *, only: str = "") -> list[Op]:
    """A program reserves a slot, writes the entry, publishes it; `np_ct_reserve`, `np_conn_open`, `np_ct_commit`.

    ``only``: the one tag that it would replace; "": any tag that is not a reservation.
    """

    def is_taken(was: object) -> bool:
        return was == only if only else was not in ("owned", "marked")

    def if_owned(kind: Callable[..., Op], at: str) -> Op:
        return kind(at, name, asks=("was", "held"), when=lambda has: is_taken(has["was"]) and has["held"] == has["was"])

    own = compare_and_swap(
        "held",
        "tag",
        lambda has: has["was"],
        "owned",
        uses=("was",),
        asks=("was",),
        when=lambda has: is_taken(has["was"]),
    )
    if not has(OWNED.name):
        own = load("held", "tag", uses=("was",))
    entry = [if_owned(store, "key"), if_owned(store, "conn")]
    tag = [if_owned(exchange if has(PUBLISHED.name) else store, "tag")]
    return section(load("was", "tag"), own, *ordered(has(ENTRY_FIRST.name), entry, tag))


def _find(has: Has) -> list[Op]:
    """A program looks up a connection; `np_ct_probe`, `np_ct_lookup`."""
    kept = has(FROM_TAG.name)
    return section(load("tag", "tag"), behind("key", "tag", kept=kept), behind("conn", "tag", kept=kept))


def _is_mixed(end: Values) -> bool:
    """Whether a packet found its own tag and key with the entry of another connection."""
    tag, key, conn = (end[f"packet.{one}"] for one in ("tag", "key", "conn"))
    return tag in ("one", "two", "agent") and tag == key != conn


def _publish(has: Has) -> Scene:
    """A new connection becomes visible to other processors."""
    return Scene(
        {"program": _own("one", has), "packet": _find(has)},
        {"tag": "free", "key": "old", "conn": "old"},
        _is_mixed,
    )


def _own_twice(has: Has) -> Scene:
    """Two processors reserve the same slot. At the end, the slot has one whole connection."""

    def wrong(end: Values) -> bool:
        return end["tag"] in ("one", "two") and not end["tag"] == end["key"] == end["conn"]

    threads = {"first": _own("one", has), "second": _own("two", has)}
    return Scene(threads, {"tag": "free", "key": "old", "conn": "old"}, wrong)


MARKED = Ordering("the agent marks a slot and waits a grace period before it writes", BOTH, BOTH)
MARK_CHECKED = Ordering("the agent gives up a slot that lost its mark", BOTH, BOTH)
GRACE_BEFORE_TAG = Ordering("grace period before the tag", WEAK_ONLY, WEAK_ONLY)


def _agent_adds(has: Has) -> Scene:
    """The agent adds a connection while a program reserves the slot; `ConnectionMap.put_many`."""
    asks = {"asks": ("seen",), "when": lambda has: has["seen"] == "marked"} if has(MARK_CHECKED.name) else {}
    return Scene(
        {
            "agent": [
                store("tag", "marked"),
                *grace(wanted=has(MARKED.name)),
                load("seen", "tag"),
                store("key", "agent", **asks),
                store("conn", "agent", **asks),
                *grace(wanted=has(GRACE_BEFORE_TAG.name)),
                store("tag", "agent", **asks),
            ],
            "program": _own("one", has, only="free"),
            "packet": _find(has),
        },
        {"tag": "free", "key": "old", "conn": "old"},
        lambda end: _is_mixed(end) or (end["tag"] in ("one", "agent") and not end["tag"] == end["key"] == end["conn"]),
    )


# --- programs -------------------------------------------------------------------------------------------------------------

OWN_ARRAY = Ordering("each program set has a program array of its own", BOTH, BOTH)
SLOTS_FIRST = Ordering("slots and rows are filled before the hooks are exchanged", BOTH, BOTH)
GRACE_BEFORE_HOOKS = Ordering("grace period before the hooks are exchanged", WEAK_ONLY, WEAK_ONLY)
GRACE_BEFORE_OLD_GO = Ordering("grace period before the old array's pin goes", BOTH, BOTH)


def _program_set(has: Has) -> Scene:
    """Hooks and the programs that they call are exchanged as one.

    The jump into a program is no dependency of its loads.
    """
    new = "slot 2" if has(OWN_ARRAY.name) else "slot 1"
    fill = [store("rows 2", 2), store(new, 2)]

    def slot(found: Values) -> str:
        return f"slot {found['hook']}" if has(OWN_ARRAY.name) else "slot 1"

    return Scene(
        {
            "agent": [
                *ordered(has(SLOTS_FIRST.name), fill, grace(wanted=has(GRACE_BEFORE_HOOKS.name)), [store("hook", 2)]),
                *grace(wanted=has(GRACE_BEFORE_OLD_GO.name)),
                *([store("slot 1", "cleared")] if has(OWN_ARRAY.name) else []),
            ],
            "packet": section(
                load("hook", "hook"), load("slot 1", "slot 1"), load("slot 2", "slot 2"), load("rows", "rows 2")
            ),
        },
        {"hook": 1, "slot 1": 1, "slot 2": "empty", "rows 2": "empty"},
        lambda end: end[f"packet.{slot({'hook': end['packet.hook']})}"] != end["packet.hook"]
        or (end["packet.hook"] == 2 and end["packet.rows"] == "empty"),
    )


# --- what is proposed, or stays open ----------------------------------------------------------------------------------------

TAG_READ_AGAIN = Ordering("the tag is read again behind the entry", BOTH, BOTH)
AGAIN_BEHIND = Ordering("its address is made of what the entry gave", WEAK_ONLY, WEAK_ONLY)


def _given_away(has: Has) -> Scene:
    """A packet's slot is given to another connection while the packet reads the entry."""
    again = [load("again", (lambda _: "tag") if has(AGAIN_BEHIND.name) else "tag", among=("tag",),
                  uses=("key", "conn") if has(AGAIN_BEHIND.name) else ())]  # fmt: skip

    def wrong(end: Values) -> bool:
        is_found = end["packet.tag"] == end["packet.key"] == "old"
        if has(TAG_READ_AGAIN.name):
            is_found = is_found and end["packet.again"] == "old"
        return bool(is_found and end["packet.conn"] != "old")

    find = _find(lambda _: True)
    return Scene(
        {
            "program": _own("one", lambda _: True),
            "packet": [*find[:-1], *(again if has(TAG_READ_AGAIN.name) else []), find[-1]],
        },
        {"tag": "old", "key": "old", "conn": "old"},
        wrong,
    )


FLAGS_FIRST = Ordering("rule and flags are written before the connection's generation", BOTH, BOTH)
BY_EXCHANGE = Ordering("the connection's generation is written by an exchange", WEAK_ONLY, WEAK_ONLY)
GENERATION_FIRST = Ordering("the program loads the generation before the flags", BOTH, BOTH)
FLAGS_BEHIND = Ordering("the flags' address is made of the generation that was read", WEAK_ONLY, WEAK_ONLY)


def _judged_again(has: Has) -> Scene:
    """A connection is evaluated again, and its flags change; `np_ip_again`, `np_ip_known`, `np_ip`."""
    generation = exchange("generation", 2) if has(BY_EXCHANGE.name) else store("generation", 2)
    is_behind = has(FLAGS_BEHIND.name) and has(GENERATION_FIRST.name)
    return Scene(
        {
            "program": section(*ordered(has(FLAGS_FIRST.name), [store("flags", "tagged")], [generation])),
            "packet": section(
                *ordered(
                    has(GENERATION_FIRST.name),
                    [load("generation", "generation")],
                    [behind("flags", "generation", kept=is_behind)],
                )
            ),
        },
        {"generation": 1, "flags": ""},
        lambda end: end["packet.generation"] == 2 and end["packet.flags"] != "tagged",
    )


BARRIER = Ordering("the agent's barrier before the flag", WEAK_ONLY, WEAK_ONLY)
DATA_BEHIND = Ordering("the data's address is made of the flag", WEAK_ONLY, WEAK_ONLY)


def _without_grace(has: Has) -> Scene:
    """A barrier of the agent and an artificial dependency of the program, in place of a grace period."""
    kept = has(DATA_BEHIND.name)
    return Scene(
        {
            "agent": [
                store("key", "new"),
                store("row", "of new"),
                *([FENCE] if has(BARRIER.name) else []),
                store("used", 1),
            ],
            "packet": section(load("used", "used"), behind("key", "used", kept=kept), behind("row", "used", kept=kept)),
        },
        {"used": 0, "key": "old", "row": "of old"},
        lambda end: end["packet.used"] == 1 and end["packet.key"] == "new" and end["packet.row"] != "of new",
    )


FLAGGED = (DATA_FIRST, GRACE_BEFORE_FLAG, FLAG_LOADED_FIRST)
MODELS = (
    Model("address row", "a packet takes a new address's row for what another address had", FLAGGED, _address),
    Model("IPv6 key", "a packet meets an address that was never there", FLAGGED, _address6),
    Model(
        "address row reused",
        "an address has another one's row",
        (SETTLED, DATA_FIRST, GRACE_BEFORE_FLAG),
        _address_reuse,
    ),
    Model("class line", "a line is a set's before its classes are", FLAGGED, _class_line),
    Model(
        "class line reused",
        "a set has another one's classes",
        (SETTLED, DATA_FIRST, GRACE_BEFORE_FLAG),
        _class_line_reuse,
    ),
    Model(
        "class before identity",
        "a new identity is judged as one of the world",
        (DATA_FIRST, GRACE_BEFORE_FLAG),
        _class_before_identity,
    ),
    Model(
        "column before atom",
        "a port is judged by an empty column",
        (DATA_FIRST, GRACE_BEFORE_FLAG),
        _column_before_atom,
    ),
    Model(
        "atom before policy set",
        "a new set judges a port as what it was",
        (DATA_FIRST, GRACE_BEFORE_FLIP, SET_LOADED_FIRST),
        _atom_before_set,
    ),
    Model(
        "verdicts before endpoint row",
        "a row points at verdicts of another set",
        (DATA_FIRST, KERNEL_RELEASES, FROM_ROW),
        _verdict_before_endpoint,
    ),
    Model(
        "special address",
        "under the new generation an address is not yet the node's",
        (*FLAGGED, ANY_ORDER),
        _special,
    ),
    Model("generation", "a verdict of old rows is recorded under the new generation", FLAGGED, _generation),
    Model(
        "epoch", "the endpoint cache gives old rows under the new generation", (*FLAGGED, EPOCH_FIRST, ONE_WORD), _epoch
    ),
    Model(
        "range reused",
        "a packet reads verdicts of another set",
        (FLIP_BEFORE_EPOCH, GRACE_BEFORE_EPOCH, EPOCH_BEFORE_SHRINK),
        _range_reuse,
    ),
    Model(
        "check words",
        "a packet takes a mixture of two rows, or another's, for its row",
        (CHECKED, KEY_CHECKED, READ_ONCE),
        _check_words,
    ),
    Model(
        "connection published",
        "a packet finds a new connection's key and an older one's verdict",
        (ENTRY_FIRST, PUBLISHED, FROM_TAG),
        _publish,
    ),
    Model("slot owned", "an entry is a mixture of two connections", (OWNED, ENTRY_FIRST, PUBLISHED), _own_twice),
    Model(
        "connection added by the agent",
        "an entry is a mixture of the agent's connection and a program's",
        (MARKED, MARK_CHECKED, GRACE_BEFORE_TAG, PUBLISHED, ENTRY_FIRST, FROM_TAG),
        _agent_adds,
    ),
    Model(
        "program set",
        "a hook calls a program of another set, or none, or meets empty tables",
        (OWN_ARRAY, SLOTS_FIRST, GRACE_BEFORE_HOOKS, GRACE_BEFORE_OLD_GO),
        _program_set,
    ),
    Model(
        "slot given away",
        "a packet takes another connection's verdict for its own",
        (TAG_READ_AGAIN, AGAIN_BEHIND),
        _given_away,
    ),
    Model(
        "connection judged again",
        "a packet of a connection has the new generation and the old flags",
        (FLAGS_FIRST, BY_EXCHANGE, GENERATION_FIRST, FLAGS_BEHIND),
        _judged_again,
    ),
    Model(
        "barrier instead of a grace period",
        "a packet takes a new address's row for what another address had",
        (BARRIER, DATA_BEHIND),
        _without_grace,
    ),
)
