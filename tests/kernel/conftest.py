# SPDX-License-Identifier: Apache-2.0
"""One loaded dataplane for all kernel tests, in a pin directory of its own that is removed at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from netpol_loader.pins.dataplane import Dataplane

sys.path.insert(0, str(Path(__file__).parent))

from map_sizes import SIZES
from one_cpu import on_one_cpu
from rig import Rig


@pytest.fixture(scope="session")
def pin_root() -> Path:
    return Path(f"/sys/fs/bpf/netpol-test-{os.getpid()}")


@pytest.fixture(scope="session")
def dataplane(pin_root: Path) -> Iterator[Dataplane]:
    one = Dataplane.open(pin_root, sizes=SIZES)
    yield one
    one.remove()


@pytest.fixture(scope="session")
def loaded_rig(dataplane: Dataplane) -> Iterator[Rig]:
    rig = Rig(dataplane)
    yield rig
    rig.reader.close()


@pytest.fixture
def rig(loaded_rig: Rig) -> Iterator[Rig]:
    """An empty dataplane, and one CPU, because the program's per-CPU caches are part of what is tested.

    The pinning to one CPU lasts only as long as the test: agents and compilers of other tests would inherit it and wait
    for each other.
    """
    with on_one_cpu():
        loaded_rig.reset()
        yield loaded_rig
