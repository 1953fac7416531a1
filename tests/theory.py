# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/theory.md, made from the demonstration's manifests by the compiler.

    python -m tests.theory [--check]

Invariant: every number on the page that depends on the example stands between two markers and is written here.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path

from netpol_ebpf.apply.encode import elements
from netpol_ebpf.compiler import Compiler
from netpol_ebpf.compiler.sets import LiveSet
from netpol_ebpf.compiler.tables import ATOM_BLOCK, COLUMN_BLOCK, PROTOCOL_SLOT, WORLD_V4, SetRow
from netpol_ebpf.compiler.terms import AddressMatch, SelectorTerm
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import TCP, Direction, EndpointKey, Stage
from netpol_ebpf.resources.load import load_paths
from netpol_loader import abi

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/theory.md"
DEMO = ROOT / "examples/demo"
FILES = ("cluster.yaml", "pods.yaml", "database.yaml", "metrics.yaml", "default-deny.yaml")
DATABASE = EndpointKey("Pod", "shop", "database")
PEERS = {
    "back-end": "10.244.1.11",
    "prometheus": "10.244.1.20",
    "front-end": "10.244.1.10",
    "an unknown host": "192.0.2.9",
}
PORTS = (5432, 5433, 9187, 80)
PEER, PORT = "back-end", 5432
"""The packet that is followed."""
MARKER = re.compile(r"(<!-- example: ([a-z0-9-]+) -->\n).*?(?=<!-- end of example -->)", re.DOTALL)


class Example:
    """The database's ingress, compiled."""

    def __init__(self) -> None:
        compiler = Compiler(lambda endpoint: endpoint.node == "node-1")
        compiler.replace(derive(load_paths([DEMO / name for name in FILES]).check()))
        compiler.commit()
        self.tables = compiler.tables
        self.row: SetRow = self.tables.endpoints[DATABASE].sets[Direction.INGRESS, Stage.NORMAL]
        sets: Iterable[LiveSet] = compiler._state.sets._sets.values()
        (self.live,) = (one for one in sets if one.row == self.row and one.base == self.row.verdict_base)

    # --- what the compiler knows of the set -------------------------------------------------------------------------

    def entries(self) -> str:
        """The rules as entries, each a bit."""
        entries = self.live._entries
        rows = []
        for bit, (effect, cause) in enumerate(zip(entries.effects, entries.causes, strict=True)):
            peers = [record.match for record, vector in entries.peers.items() if vector >> bit & 1]
            ports = [_ports(predicate) for predicate, vector in entries.l4.items() if vector >> bit & 1]
            policy = cause.policy.name if cause.policy is not None else ""
            kind = "end of the tier" if not ports else f"rule {cause.index}"
            rows.append((bit, policy, kind, _match(peers), ", ".join(ports) or "any", effect.value))
        return _table(("bit", "policy", "from", "peer", "port", "effect"), rows)

    def peer_classes(self) -> str:
        """Who is told apart, and the vector of each class."""
        rows = []
        for number, vector in sorted(self.live.peer.vectors.items()):
            members = [name for name, address in PEERS.items() if self.peer_class(address) == number]
            rows.append((number, self._bits(vector), ", ".join(members)))
        return _table(("peer class", "vector", "who, for example"), rows)

    def l4_classes(self) -> str:
        """Which ports are told apart, and the vector of each class."""
        rows = []
        for number, vector in enumerate(self.live._l4.vectors):
            members = [str(port) for port in PORTS if self.l4_class(port) == number]
            rows.append((number, self._bits(vector), ", ".join(members)))
        return _table(("L4 class", "vector", "TCP port, for example"), rows)

    def verdicts(self) -> str:
        """The product: for each pair the AND of the vectors, whose lowest bit decides."""
        rows = []
        for peer, peer_vector in sorted(self.live.peer.vectors.items()):
            for l4, l4_vector in enumerate(self.live._l4.vectors):
                index = self.row.verdict_index(peer, 0, l4, 0)
                verdict, both = self.tables.verdicts[index], peer_vector & l4_vector
                lowest = (both & -both).bit_length() - 1
                rows.append((index, peer, l4, self._bits(both), lowest, verdict.outcome.value, verdict.rule))
        return _table(("row of `np_verdict`", "peer class", "L4 class", "AND", "lowest bit", "action", "rule"), rows)

    def _bits(self, vector: int) -> str:
        return f"`{vector:0{len(self.live._entries.effects)}b}`"

    # --- as a dump of the maps shows it -----------------------------------------------------------------------------

    def policy_set(self) -> str:
        """The set as it is in the endpoint's row."""
        shown = {name: getattr(self.row, name) for name, *_ in abi.np_set._fields_ if name != "check"}
        return _code(json.dumps({"ingress": shown}))

    def lookups(self) -> str:
        """The rows that one packet meets, in order."""
        address = ip_address(PEERS[PEER])
        identity = self.identity(PEERS[PEER])
        block = PROTOCOL_SLOT[TCP] * ATOM_BLOCK + (PORT >> 8)
        atom = self.tables.l4_atoms[block][PORT & 255]
        column = self.row.l4_base + atom // COLUMN_BLOCK
        index = self.verdict_index(PEERS[PEER], PORT)
        verdict = self.tables.verdicts[index]
        (entry,) = elements("verdicts", {index: verdict})
        (name,) = elements("rules", {verdict.rule: self.tables.rules[verdict.rule]})
        peer, l4 = self.peer_class(PEERS[PEER]), self.l4_class(PORT)
        steps = (
            ("1. np_addr4", f"{address}", f"identity {identity}"),
            ("2. np_peer_class", f"set {self.row.number}, identity {identity}", f"peer class {peer}"),
            ("3. np_l4_atom", f"row {block}, index {PORT & 255}", f"atom {atom}"),
            ("   np_l4_col", f"row {column}, index {atom % COLUMN_BLOCK}", f"L4 class {l4}"),
            ("4. np_verdict", f"{self.row.verdict_base} + {peer} * {self.row.l4_classes} + {l4} = {index}", _fields(abi.np_verdict, entry[2])),
            ("   np_rule", f"{verdict.rule}", name[2].rstrip(bytes(1)).decode()),
        )  # fmt: skip
        return _code("\n".join(f"{table:<16} {key:<18} -> {found}" for table, key, found in steps))

    # --- the steps of a look-up -------------------------------------------------------------------------------------

    def identity(self, address: str) -> int:
        """Step 1. IPv4; without a row the world."""
        row = self.tables.addresses.get(ip_address(address))
        return WORLD_V4 if row is None else row.identity

    def peer_class(self, address: str) -> int:
        """Step 2."""
        found = self.tables.peer_classes.get((self.row.number, self.identity(address)))
        return self.row.default_class4 if found is None else found

    def l4_class(self, port: int) -> int:
        """Step 3. Of TCP."""
        block = self.tables.l4_atoms.get(PROTOCOL_SLOT[TCP] * ATOM_BLOCK + (port >> 8))
        atom = 0 if block is None else block[port & 255]
        return self.tables.class_of_atom(self.row.l4_base, atom)

    def verdict_index(self, address: str, port: int) -> int:
        """Step 4: the row, of TCP."""
        return self.row.verdict_index(self.peer_class(address), 0, self.l4_class(port), 0)


BLOCKS: dict[str, Callable[[Example], str]] = {
    "entries": Example.entries, "peer-classes": Example.peer_classes, "l4-classes": Example.l4_classes,
    "verdicts": Example.verdicts, "set": Example.policy_set, "lookups": Example.lookups,
}  # fmt: skip


def _ports(predicate: Iterable[tuple[int, int]]) -> str:
    return ", ".join(
        str(first & 0xFFFF) if first == last else f"{first & 0xFFFF}-{last & 0xFFFF}" for first, last in predicate
    )


def _match(matches: Sequence[AddressMatch]) -> str:
    terms = [term for match in matches for term in match.positive if isinstance(term, SelectorTerm)]
    return " or ".join(f"`{term.selector}`" for term in terms) or "anyone"


def _fields(structure: type[ctypes.Structure], raw: bytes) -> str:
    value = structure.from_buffer_copy(raw)
    return json.dumps({name: getattr(value, name) for name, *_ in structure._fields_})


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _code(text: str) -> str:
    return f"```\n{text}\n```\n"


def render(page: str) -> str:
    """The page with its blocks made anew. Raises KeyError for a block that is not known."""
    example = Example()
    return MARKER.sub(lambda found: found[1] + BLOCKS[found[2]](example), page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or say whether it is fresh; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.theory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when the page is stale")
    page = PAGE.read_text(encoding="utf-8")
    fresh = render(page)
    if parser.parse_args(arguments).check:
        if page != fresh:
            print(f"{PAGE.relative_to(ROOT)} is stale: run python -m tests.theory", file=sys.stderr)
        return int(page != fresh)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
