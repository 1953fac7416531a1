# SPDX-License-Identifier: Apache-2.0
"""The one factor of the laboratory's time limits."""

from __future__ import annotations

import pytest

from netpol_ebpf.errors import UsageError
from netpol_ebpf.lab.patience import VARIABLE, scaled


@pytest.mark.parametrize(("text", "expected"), [(None, 0.4), ("", 0.4), ("1", 0.4), ("2.5", 1.0), ("10", 4.0)])
def test_a_limit_is_multiplied(text: str | None, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variable limits are as written."""
    if text is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, text)
    assert scaled(0.4) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["fast", "0", "0.5", "-3", "nan", "inf", "1001"])
def test_what_is_no_factor_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor below one would turn a slow answer into a denial."""
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(UsageError, match=VARIABLE):
        scaled(1.0)
