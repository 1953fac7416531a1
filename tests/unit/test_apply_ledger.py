# SPDX-License-Identifier: Apache-2.0
"""Numbers that outlive the agent: written before use, read back by the next, whatever instruction it died at."""

from __future__ import annotations

from pathlib import Path

import pytest

from netpol_ebpf.apply.ledger import Ledger, Numbers
from netpol_ebpf.errors import PlatformError
from netpol_ebpf.policy.types import Action, Cause, CauseKind, Direction, EndpointKey, PolicyKey

WEB = EndpointKey("Pod", "shop", "web")
DB = EndpointKey("Pod", "shop", "db")
RULE = Cause(
    CauseKind.RULE, Direction.EGRESS, "default", PolicyKey("NetworkPolicy", "shop", 'a "b"\n'), "", 3, Action.ALLOW
)
END = Cause(CauseKind.TIER_END, Direction.INGRESS, "default", PolicyKey("NetworkPolicy", "shop", "x"))
PROFILE = Cause(CauseKind.PROFILE, Direction.INGRESS, profile="kns.shop", index=0, action=Action.ALLOW)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "numbers"


def recorded(path: Path) -> Ledger:
    ledger = Ledger(path)
    ledger.open()
    ledger.record("rule", {RULE: 1, END: 2, PROFILE: 3})
    ledger.record("endpoint", {WEB: 7, DB: 8})
    ledger.record("identity", {"ab12": 16})
    return ledger


def read(path: Path) -> Numbers:
    ledger = Ledger(path)
    numbers = ledger.open()
    ledger.close()
    return numbers


def test_numbers_come_back_as_they_were(path: Path) -> None:
    """Causes of every kind, endpoints and identities are read back equal, without the first ledger being closed."""
    first = recorded(path)
    assert read(path) == Numbers({RULE: 1, END: 2, PROFILE: 3}, {WEB: 7, DB: 8}, {"ab12": 16})
    first.close()


def test_what_went_does_not_come_back(path: Path) -> None:
    """A forgotten number is free for the next agent; a changed one has its last value."""
    ledger = recorded(path)
    ledger.forget("endpoint", [DB, DB])
    ledger.record("endpoint", {WEB: 9})
    ledger.close()
    assert read(path).endpoints == {WEB: 9}
    assert DB.name not in path.read_text()


def test_released_number_frees_what_had_it(path: Path) -> None:
    """A number that went takes its owner along, unless that has another number by now; unknown numbers are nobody's."""
    recorded(path).close()
    ledger = Ledger(path)
    ledger.open()
    ledger.record("rule", {END: 9})
    ledger.release("rule", [1, 2, 77])
    ledger.close()
    assert read(path).rules == {END: 9, PROFILE: 3}


def test_known_number_is_not_written_again(path: Path) -> None:
    """Recording what is recorded costs no line."""
    ledger = recorded(path)
    size = path.stat().st_size
    ledger.record("endpoint", {WEB: 7})
    assert path.stat().st_size == size
    ledger.close()


def test_any_prefix_of_the_file_is_a_state(path: Path) -> None:
    """Wherever the writer died, the file reads as all lines that were completed."""
    recorded(path).close()
    whole = path.read_bytes()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        numbers = read(path)
        assert sum(1 for _ in numbers.entries()) == max(whole[:end].count(b"\n") - 1, 0)


def test_another_format_is_refused(path: Path) -> None:
    """A file this program cannot read is not guessed at."""
    path.parent.mkdir()
    path.write_text('{"format": 99}\n["rule", [], 1]\n')
    with pytest.raises(PlatformError, match="format 99"):
        Ledger(path).open()


@pytest.mark.parametrize("line", ["x", "[]", '["rule"]', '["wish", [], 1]', '["rule", [1, 2], 3]', "null", "5"])
def test_damage_is_named_by_its_line(path: Path, line: str) -> None:
    """A line in the middle that nobody wrote so is an error of the machine, told with its place, not a bug."""
    recorded(path).close()
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(PlatformError, match=f"{path.name}:2 is damaged"):
        Ledger(path).open()
