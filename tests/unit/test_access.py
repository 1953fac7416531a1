# SPDX-License-Identifier: Apache-2.0
"""Modes of pins: what the group may open, and what only the owner may open."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from netpol_loader import abi
from netpol_loader.pins import access
from netpol_loader.pins.attach import LINKS
from netpol_loader.pins.programs import CURRENT


@dataclass
class Pins:
    """Files in place of pins, whose modes any user may set."""

    pin_root: Path

    @property
    def pin_dir(self) -> Path:
        return self.pin_root / "v1"

    @property
    def pinned(self) -> dict[str, Any]:
        return dict.fromkeys(abi.MAP_SPECS)

    def mode(self, name: str) -> int:
        return stat.S_IMODE((self.pin_dir / name).stat().st_mode)


@pytest.fixture
def pins(tmp_path: Path) -> Pins:
    one = Pins(tmp_path / "root")
    for directory in (LINKS, CURRENT):
        (one.pin_dir / directory).mkdir(parents=True)
    for name in one.pinned:
        (one.pin_dir / name).touch(0o666)
    return one


def test_group_gets_neither_the_secret_nor_what_tells_it(pins: Pins) -> None:
    """Only the owner can read the secret of the connection tables, and the tables whose order reveals it.

    The group reads all others.
    """
    access.grant(pins, os.getegid())  # type: ignore[arg-type]
    private = {
        "np_secret", "np_conn4", "np_conn6", "np_conn4_tag", "np_conn6_tag", "np_scratch", "np_dns_scratch", "np_asked",
    }  # fmt: skip
    assert {name for name in pins.pinned if pins.mode(name) == 0o600} == private
    assert {name for name in pins.pinned if pins.mode(name) == 0o640} == set(pins.pinned) - private
    assert {pins.mode(LINKS), pins.mode(CURRENT)} == {0o700}


def test_secret_that_a_group_could_read_is_taken_back(pins: Pins) -> None:
    """A permission that an earlier agent gave is removed and reported. A second call changes nothing."""
    access.grant(pins, os.getegid())  # type: ignore[arg-type]
    (pins.pin_dir / "np_secret").chmod(0o640)
    assert access.grant(pins, os.getegid()) == [pins.pin_dir / "np_secret"]  # type: ignore[arg-type]
    assert access.grant(pins, os.getegid()) == []  # type: ignore[arg-type]


def test_without_a_group_everything_is_the_owner_s(pins: Pins) -> None:
    """No mode gives others any permission."""
    access.grant(pins, None)  # type: ignore[arg-type]
    assert {pins.mode(name) & 0o077 for name in pins.pinned} == {0}
