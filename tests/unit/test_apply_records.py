# SPDX-License-Identifier: Apache-2.0
"""State files with entries: written entries are read back, and damage ends neither the reader nor the valid entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from netpol_ebpf.apply.records import DAMAGED_SUFFIX, EntryFile, checked


def file_at(path: Path, *, is_keyed: bool) -> EntryFile:
    return EntryFile(path, "things", 2, 1000, is_keyed=is_keyed)


@pytest.mark.parametrize(
    ("is_keyed", "texts", "entries"),
    [(False, ["1", '"b"'], [1, "b"]), (True, ['"a": 1', '"b": 2'], [("a", 1), ("b", 2)])],
)
def test_entries_come_back_as_they_were(
    tmp_path: Path, texts: list[str], entries: list[Any], *, is_keyed: bool
) -> None:
    """The entries are a list or an object. No other file remains, and a missing file has no entries."""
    file, found = file_at(tmp_path / "file", is_keyed=is_keyed), list[Any]()
    assert file.load(found.append) == ""
    assert found == []
    file.save(texts)
    assert file.load(found.append) == ""
    assert found == entries
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    assert json.loads(file.path.read_text())["format"] == 2
    file.save([])
    assert file.load(found.append) == ""
    assert found == entries


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("[]", "it must be an object"),
        ('{"format": 1, "things": []}', "format 1 is not 2"),
        ('{"format": 2}', "things must be a list"),
        ('{"format": 2, "things": {}}', "things must be a list"),
        (" " * 1001, "larger than 1000 bytes"),
    ],
)
def test_a_damaged_file_is_set_aside(tmp_path: Path, text: str, said: str) -> None:
    """The damaged file has no entries, the reason is returned, and no program reads it again."""
    file = file_at(tmp_path / "file", is_keyed=False)
    file.path.write_text(text)
    damage = file.load(lambda entry: pytest.fail(f"{entry} was taken"))
    assert damage.startswith("damaged (")
    assert said in damage
    assert str(file.path.with_suffix(DAMAGED_SUFFIX)) in damage
    assert not file.path.exists()


def test_a_faulty_entry_stops_no_other(tmp_path: Path) -> None:
    """The valid entries are used, and the others are reported. A copy of the file is kept."""
    file, found = file_at(tmp_path / "file", is_keyed=False), list[int]()
    file.save(["1", '"two"', "3"])
    damage = file.load(lambda entry: found.append(checked(entry, int, "a thing")))
    assert (found, "a thing must be a whole number, not a text" in damage) == ([1, 3], True)
    assert '"two"' in file.path.with_suffix(DAMAGED_SUFFIX).read_text()
