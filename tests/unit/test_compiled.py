# SPDX-License-Identifier: Apache-2.0
"""The compiled file is read back as written. One that does not fit, or that others could write, is not used."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import stat
from pathlib import Path

import pytest

from netpol_ebpf.errors import PlatformError
from netpol_loader.pins.compiled import (
    Compiled,
    decode_compiled,
    encode_compiled,
    file_name,
    find_compiled,
    load_compiled,
    save_compiled,
)

COMPILED = Compiled("ab" * 32, "x86_64", "BCC 0.26.0", ("np_config", "np_call"), {"np_tc_ingress": bytes(range(16))})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory into which only this user can write."""
    tmp_path.chmod(0o755)
    return tmp_path


def find(directory: Path, **changes: str | None) -> Compiled | None:
    """Look for COMPILED, or with different values."""
    wanted: dict[str, str | None] = {
        "digest": COMPILED.digest,
        "machine": COMPILED.machine,
        "compiler": COMPILED.compiler,
    }
    wanted |= changes
    return find_compiled(wanted["digest"] or "", wanted["machine"] or "", wanted["compiler"], [directory])


def test_a_saved_file_is_found(directory: Path) -> None:
    """A saved file is found by its digest, with or without a compiler. Nobody else may write it."""
    path = save_compiled(COMPILED, directory)
    assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0
    assert load_compiled(path) == COMPILED
    assert find(directory) == COMPILED
    assert find(directory, compiler=None) == COMPILED
    assert [one.name for one in directory.iterdir()] == [file_name(COMPILED.digest, COMPILED.machine)]


@pytest.mark.parametrize(
    "changes",
    [{"digest": "cd" * 32}, {"machine": "aarch64"}, {"compiler": "BCC 0.31.0"}],
    ids=lambda one: next(iter(one)),
)
def test_what_differs_is_not_used(directory: Path, changes: dict[str, str]) -> None:
    """The sources, the machine or the compiler differ."""
    save_compiled(COMPILED, directory)
    assert find(directory, **changes) is None


def test_a_renamed_file_is_not_used(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The content decides, and not the name."""
    path = save_compiled(COMPILED, directory)
    path.rename(directory / file_name("cd" * 32, COMPILED.machine))
    assert find(directory, digest="cd" * 32) is None
    assert "other sources" in caplog.text


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_may_write_is_not_used(directory: Path, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    """Its instructions would be loaded into the kernel."""
    path = save_compiled(COMPILED, directory)
    path.chmod(mode)
    with pytest.raises(PlatformError, match="can be written by its group or by everybody"):
        load_compiled(path)
    with caplog.at_level(logging.WARNING):
        assert find(directory) is None
    assert str(path) in caplog.text


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_a_directory_that_others_may_write_is_not_used(directory: Path, mode: int) -> None:
    """Others could replace the file in such a directory. It is also not used for saving."""
    save_compiled(COMPILED, directory)
    directory.chmod(mode)
    assert find(directory) is None
    with pytest.raises(PlatformError, match="can be written by its group or by everybody"):
        save_compiled(COMPILED, directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_belongs_to_somebody_else_is_not_used(directory: Path, what: str) -> None:
    """The file or directory belongs neither to root nor to this user."""
    path = save_compiled(COMPILED, directory)
    os.chown(path if what == "file" else directory, 65534, 65534)
    with pytest.raises(PlatformError, match="belongs to user 65534"):
        load_compiled(path)


def test_a_pipe_is_not_waited_for(directory: Path) -> None:
    """A pipe with the name of a compiled file is rejected at once."""
    path = directory / "pipe"
    os.mkfifo(path, 0o600)
    with pytest.raises(PlatformError, match="no regular file"):
        load_compiled(path)


def test_a_symbolic_link_is_not_followed(directory: Path) -> None:
    """The target may belong to anybody."""
    path = save_compiled(COMPILED, directory)
    path.rename(directory / "elsewhere")
    path.symlink_to(directory / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        load_compiled(path)
    assert find(directory) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "no compiled packet path"),
        (lambda raw: raw.replace(b"AAEC", b"AAEB"), "damaged"),
        (lambda raw: raw.replace(b'"format": 1', b'"format": 2'), "format 2"),
        (lambda _: json.dumps({"format": 1, "sha256": ""}).encode(), "damaged"),
        (lambda _: b"[]", "no compiled packet path"),
        (lambda _: b"\xff\xfe", "no compiled packet path"),
    ],
)
def test_a_damaged_file_says_so(damage: object, message: str) -> None:
    """A changed bit, a truncated file and another format are errors with the file's name."""
    raw = damage(encode_compiled(COMPILED))  # type: ignore[operator]
    with pytest.raises(PlatformError, match=message) as caught:
        decode_compiled(raw, "the/file")
    assert "the/file" in caught.value.message


def test_encoding_loses_nothing() -> None:
    """Every field is the same after decoding."""
    other = dataclasses.replace(COMPILED, compiler="", maps=(), programs={})
    assert decode_compiled(encode_compiled(other), "") == other
