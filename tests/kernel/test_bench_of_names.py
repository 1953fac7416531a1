# SPDX-License-Identifier: Apache-2.0
"""The benchmark of domain names makes every case on the real programs; it checks verdicts and what was learned."""

from __future__ import annotations

import pytest

from bench import names

pytestmark = pytest.mark.kernel


def test_every_packet_case_is_measured() -> None:
    """One short round has each case once, also that with watched names."""
    figures = names.measure_packets(1, [120], repeat=1_000)
    watched = [names.watched_case(120, how) for how in ("hot", "changing")]
    assert set(figures) == {*names.case_names(), *watched}
    assert all(len(samples) == 1 for samples in figures.values())
