# SPDX-License-Identifier: Apache-2.0
"""The micro-benchmark's own programs build beside the product's maps and reach what they claim to measure."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from bench.micro import ACK, ALLOWED_PORT, DROP, FIRST4, FIRST_CIDR, PASS, POD4, ROOT, Primitives, Vary, tcp4
from netpol_loader.kernel import syscall
from netpol_loader.pins import build
from netpol_loader.pins.dataplane import SKB_BYTES, Dataplane

pytestmark = pytest.mark.kernel
FRAME = tcp4(int(POD4), FIRST4, 1, ALLOWED_PORT, ACK)


def verdict(program: int) -> int:
    return syscall.prog_test_run(program, FRAME, bytes(SKB_BYTES), 1)[0] & 0xFFFF_FFFF


@pytest.fixture(scope="module")
def primitives(dataplane: Dataplane) -> Iterator[Primitives]:
    before = set(dataplane.pin_dir.iterdir())
    yield Primitives(dataplane)
    for path in set(dataplane.pin_dir.iterdir()) - before:
        path.unlink()


def test_a_varied_frame_reaches_the_program_chosen(primitives: Primitives) -> None:
    """The varying program returns the verdict of the program that it calls."""
    for called, wanted in (("np_bare_empty", PASS), ("np_bare_lpm_10", DROP)):
        primitives.choose(Vary(1, 1, int(IPv4Address("192.0.2.1"))), primitives.fds[called])
        assert verdict(primitives.fds["np_vary"]) == wanted


def test_a_bare_access_tells_hits_from_misses(primitives: Primitives) -> None:
    """A look-up reports whether it hits, so a figure cannot be that of another access."""
    for rows in (10, 1000):
        for first, wanted in ((FIRST_CIDR, PASS), (FIRST_CIDR + 16 * rows, DROP)):
            primitives.choose(Vary(1, 1, first), primitives.fds["np_bare_empty"])
            assert verdict(primitives.fds[f"np_bare_lpm_{rows}"]) == wanted


def test_an_entry_without_the_products_maps_is_built_beside_them(dataplane: Dataplane) -> None:
    """A C file without maps of its own builds."""
    programs = build.load_entry(dataplane.pin_dir, ROOT / "bench" / "parse_only.c", ("np_parse_only",), {})
    assert verdict(programs["np_parse_only"]) == PASS
