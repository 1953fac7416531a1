# SPDX-License-Identifier: Apache-2.0
"""The harness that boots kernels: what of it can be tested without booting one."""

from __future__ import annotations

import dataclasses
import json
import lzma
import struct
from pathlib import Path

import pytest

from netpol_ebpf.errors import InvalidInputError, NetpolError, PlatformError, UsageError
from netpol_loader.pins import compilation
from tests.vm import alone, kernels, page, prepare
from tests.vm.record import REFUSED, RUNS, Result, read_results, series_of, write_result
from tests.vm.report import parse_report, render_record

PACKAGES = [
    "linux-image-5.10.0-46-cloud-amd64",
    "linux-image-6.1.0-0.deb11.52-cloud-amd64",
    "linux-image-6.1.0-9-cloud-amd64",
    "linux-image-6.1.0-57-cloud-amd64",
    "linux-image-6.1.0-57-cloud-amd64-dbg",
    "linux-image-6.1.0-57-rt-amd64",
    "linux-image-6.1.0-57-amd64",
    "linux-image-6.12.117+deb12-cloud-amd64",
    "linux-image-6.12.99+deb13-cloud-amd64",
    "linux-image-6.12.118+deb13-cloud-amd64",
    "linux-image-6.12.118+deb13-cloud-amd64-unsigned",
    "linux-image-7.3.4+deb13-cloud-amd64",
    "linux-image-cloud-amd64",
]


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("5.10", "linux-image-5.10.0-46-cloud-amd64"),
        ("6.1", "linux-image-6.1.0-57-cloud-amd64"),
        ("6.1-rt", "linux-image-6.1.0-57-rt-amd64"),
        ("6.12", "linux-image-6.12.118+deb13-cloud-amd64"),
        ("newest", "linux-image-7.3.4+deb13-cloud-amd64"),
    ],
)
def test_a_name_means_the_newest_package_of_its_series(name: str, package: str) -> None:
    """Numbers are compared as numbers, and a kernel rebuilt for an older Debian is not taken for that Debian's own."""
    assert kernels.choose_package(name, PACKAGES) == package


def test_a_series_without_a_package_is_an_error() -> None:
    """Never another kernel in its place."""
    with pytest.raises(PlatformError, match=r"6\.18"):
        kernels.choose_package("6.18", PACKAGES)


def test_neither_name_nor_path() -> None:
    """The error lists the names."""
    with pytest.raises(UsageError, match="no kernel known") as caught:
        kernels.find("4.19")
    assert "6.12" in caught.value.hint


def test_a_path_has_to_be_an_elf_file(tmp_path: Path) -> None:
    """A vmlinuz does not boot this way, and is refused before anything starts."""
    image = tmp_path / "vmlinux"
    image.write_bytes(b"MZ and more")
    with pytest.raises(UsageError, match="not an uncompressed vmlinux"):
        kernels.find(str(image))
    image.write_bytes(kernels.ELF + bytes(60))
    assert kernels.find(str(image)).modules is None


def bz_image(payload: bytes) -> bytes:
    """A kernel image with one sector of set-up code besides the first."""
    image = bytearray(2048)
    image[kernels.SETUP_SECTORS_AT] = 1
    struct.pack_into("<II", image, kernels.PAYLOAD_AT, 1024, len(payload))
    return bytes(image[:2048]) + payload


def test_vmlinux_is_taken_out_of_an_image() -> None:
    """The payload's last word is the length of what comes out."""
    vmlinux = kernels.ELF + bytes(range(256)) * 4
    payload = lzma.compress(vmlinux) + struct.pack("<I", len(vmlinux))
    assert kernels.extract_vmlinux(bz_image(payload)) == vmlinux


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"unknown" * 4, "compressed in an unknown way"),
        (lzma.compress(b"no ELF file") + struct.pack("<I", 11), "instead of an ELF file"),
        (lzma.compress(kernels.ELF + b"short") + struct.pack("<I", 99), "instead of an ELF file of 99"),
    ],
)
def test_a_damaged_image_is_refused(payload: bytes, message: str) -> None:
    """Rather than booted."""
    with pytest.raises(PlatformError, match=message):
        kernels.extract_vmlinux(bz_image(payload))


def test_modules_come_after_those_they_need(tmp_path: Path) -> None:
    """What this kernel has built in has no file, and is passed over."""
    (tmp_path / "modules.dep").write_text(
        "kernel/fs/fuse/virtiofs.ko.xz: kernel/fs/fuse/fuse.ko.xz kernel/drivers/virtio/virtio_ring.ko.xz\n"
        "kernel/fs/fuse/fuse.ko.xz:\n"
        "kernel/drivers/virtio/virtio_ring.ko.xz: kernel/drivers/virtio/virtio.ko.xz\n"
        "kernel/drivers/virtio/virtio.ko.xz:\n"
        "kernel/net/veth.ko.xz:\n"
    )
    found = [path.name for path in kernels.modules_in_order(tmp_path, ["overlay", "virtiofs", "fuse"])]
    assert found == ["fuse.ko.xz", "virtio.ko.xz", "virtio_ring.ko.xz", "virtiofs.ko.xz"]


def test_the_report_is_told_from_noise() -> None:
    """A kernel's dying words, a damaged line, and a line that is not finished yet are no records."""
    one, other = {"step": "load", "code": 0}, {"step": "demo", "errors": "naïve\nlines\r\n"}
    damaged = render_record({"step": "cases", "code": 0}).replace(b'"code": 0', b'"code": 1')
    content = (
        render_record(one) + b"[  1.0] Kernel panic\r\n" + damaged + render_record(other) + render_record(one)[:-3]
    )
    assert parse_report(content) == [one, other]
    assert parse_report(content.replace(b"\n", b"\r\n")) == [one, other]


PROGRAMS = {"np_tc_ingress": {"verified": 25451, "jited_bytes": 100, "xlated_bytes": 1}, "np_tc_egress": {"verified": 30642, "jited_bytes": 200, "xlated_bytes": 1}}  # fmt: skip
STEPS = {
    "load": {"code": 0, "seconds": 9.0, "result": {"programs": PROGRAMS, "features": {"tcx": False}}},
    "cases": {"code": 0, "seconds": 9.0, "result": {"files": 8, "probes": 65}},
    "demo": {"code": 1, "seconds": 9.0, "said": "NOT as predicted"},
}  # fmt: skip


def test_a_program_that_cannot_be_prepared_is_no_lack_of_the_machine(tmp_path: Path) -> None:
    """Exit code 5 would make CI count the kernels as not run."""
    with pytest.raises(NetpolError, match="cannot be prepared") as raised:
        prepare.run_python(tmp_path, "raise SystemExit('no such file')", tmp_path)
    assert raised.value.exit_code == NetpolError.exit_code


def result(**changes: object) -> Result:
    one = Result("6.1", "6.1.0-57-cloud-amd64", "linux-image 6.1.192-3", "x86_64", "BCC 0.26.0", RUNS, "2026-11-30", "c0ffee", 99.0, STEPS)  # fmt: skip
    return dataclasses.replace(one, **changes)  # type: ignore[arg-type]


def row_of(text: str, begin: str) -> str:
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {begin}")]
    return row


def test_the_page_says_what_was_seen() -> None:
    """Counts, failures, steps that were not run, and what a missing feature means."""
    text = page.render([result()])
    row = row_of(text, "6.1 | x86_64 | BCC 0.26, LLVM 14")
    assert "| yes | 30642 / 56093 | 300 | 65 probes of 8 files | FAILED | not run | not run | 2026-11-30 |" in row
    assert page.FEATURES["tcx"] in text
    assert "c0ffee" in text


def test_what_was_not_run_says_so() -> None:
    """Every wanted kernel and compiler has a row, whatever was recorded."""
    text = page.render([])
    for one in page.WANTED:
        for compiler in one.compilers:
            assert "| not run |" in row_of(text, f"{one.series} | {one.machine} | {compiler}")


def test_tests_of_the_border_have_a_table_of_their_own(tmp_path: Path) -> None:
    """Their run neither replaces the kernel's other steps nor hides a kernel on which they were not run."""
    ran = result(steps={"border barrier": {"code": 0, "seconds": 1.0, "result": {"passed": 14, "skipped": 1}}})
    text = page.render([result(), ran])
    assert "| not run | 14 passed, 1 skipped | c0ffee |" in row_of(text, "6.1 (`6.1.0-57-cloud-amd64`)")
    assert row_of(text, "5.15 | not run").count("not run") == 5
    assert "| yes | 30642 / 56093 |" in row_of(text, "6.1 | x86_64 | BCC 0.26, LLVM 14")
    assert {write_result(one, tmp_path).name for one in (result(), ran)} == {
        "6.1-x86-64-bcc-0.26.0.json",
        "6.1-x86-64-bcc-0.26.0-border.json",
    }
    write_result(result(steps={"border follow": {"code": 0}}), tmp_path)
    (joined,) = [one for one in read_results(tmp_path) if one.has_border]
    assert set(joined.steps) == {"border barrier", "border follow"}
    write_result(result(steps={"border follow": {"code": 0}}, commit="another"), tmp_path)
    assert [set(one.steps) for one in read_results(tmp_path) if one.has_border] == [{"border follow"}]


def test_a_refusal_is_shown_with_its_line() -> None:
    """Not as a kernel that runs."""
    steps = {
        "refusal": {
            "code": 0,
            "seconds": 1.0,
            "result": {"agent": {"code": 5, "line": "error: kernel 5.10 has no ..."}},
        }
    }
    text = page.render([result(series="5.10", expected=REFUSED, steps=steps)])
    assert "refused, exit code 5" in row_of(text, "5.10 | x86_64 | any")
    assert "`error: kernel 5.10 has no ...`" in text


def test_the_page_in_the_repository_is_fresh() -> None:
    """Results and page are committed together."""
    assert page.main(["--check"]) == 0


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    """A later run of the same kernel and compiler takes the earlier one's place."""
    write_result(result(date="2026-01-01"), tmp_path)
    path = write_result(result(), tmp_path)
    assert path.name == "6.1-x86-64-bcc-0.26.0.json"
    assert read_results(tmp_path) == [result()]
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))
    with pytest.raises(InvalidInputError, match="no result of format"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("steps", "failure", "is_ok"),
    [
        ({"load": {"code": 0}}, "", True),
        ({"load": {"code": 0}, "demo": {"code": 1}}, "", False),
        ({"load": {"code": 0}}, "the guest ended", False),
        ({}, "", False),
    ],
)
def test_a_run_is_good_only_when_every_step_was(steps: dict[str, dict[str, int]], failure: str, is_ok: bool) -> None:  # noqa: FBT001
    """A guest that did nothing proves nothing."""
    assert result(steps=steps, failure=failure).is_ok is is_ok


@pytest.mark.parametrize(
    ("release", "series"),
    [
        ("6.1.0-57-cloud-amd64", "6.1"),
        ("6.12.118+deb13-rt-amd64", "6.12-rt"),
        ("5.15.135", "5.15"),
        ("6.1.100-rt37", "6.1-rt"),
    ],
)
def test_series_of_a_release(release: str, series: str) -> None:
    """A real-time kernel is a series of its own."""
    assert series_of(release) == series


def alone_report(**system: object) -> list[dict[str, object]]:
    """What `tests.vm.alone` prints where it runs, a record a step."""
    digest = compilation.source_digest(compilation.source_dir(), machine="aarch64").hex()
    seen = {"release": "6.12.117+deb13-cloud-arm64", "machine": "aarch64"}
    outputs = {
        "system": seen,
        "load": {"programs": PROGRAMS, "features": {}},
        "cases": {"probes": 65, "failed": []},
        "demo": None,
    }
    records = [
        {"step": name, "code": 0, "seconds": 1.0, "output": json.dumps(one), "errors": ""}
        for name, one in outputs.items()
    ]
    return [records[0] | {"compiler": "BCC 0.26.0, LLVM 14", "digest": digest} | system, *records[1:]]


def test_a_report_from_elsewhere_becomes_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between other lines of a console; a step that said nothing has failed."""
    monkeypatch.setattr(alone, "current_commit", lambda: "c0ffee")  # there is no git in a minimal root
    console = "".join(f"[ 1.0] eth0: up\r\n\x1b[0m{alone.MARK}{json.dumps(one)}\r\n" for one in alone_report())
    found = alone.to_result(alone.read_report(console), "Debian's")
    assert (found.series, found.machine, found.expected, found.source) == ("6.12", "aarch64", RUNS, "Debian's")
    assert {name: step["code"] for name, step in found.steps.items()} == {"system": 0, "load": 0, "cases": 0, "demo": 1}
    assert not found.is_ok


@pytest.mark.parametrize(
    ("records", "said"),
    [(alone_report()[:-1], "lacks demo"), (alone_report(digest="00"), "other C sources"), ([], "lacks system")],
    ids=["a step is missing", "other sources", "nothing"],
)
def test_a_report_that_proves_nothing_is_refused(records: list[dict[str, object]], said: str) -> None:
    """Of other sources, or ended early."""
    with pytest.raises(SystemExit, match=said):
        alone.to_result(records, "")
