# SPDX-License-Identifier: Apache-2.0
"""The three engines behind one protocol: the reference model, the compiled tables, the program in the kernel.

Invariant: an engine answers questions about the world it was given last; nothing of an earlier world shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from netpol_ebpf.model import ReferenceModel
from netpol_ebpf.policy.types import Question, Verdict, World

ENGINES = ("model", "tables", "kernel")


class Engine(Protocol):
    """Judges packets."""

    def load(self, world: World) -> None:
        """Replace the present world by this one, as an incremental change."""

    def decide(self, question: Question) -> Verdict:
        """The verdict of policy on a packet."""


class ModelEngine:
    """The reference model."""

    def __init__(self) -> None:
        self._model = ReferenceModel(World())

    def load(self, world: World) -> None:
        """See `Engine`."""
        self._model = ReferenceModel(world)

    def decide(self, question: Question) -> Verdict:
        """See `Engine`."""
        return self._model.decide(question)


@contextlib.contextmanager
def open_engine(name: str) -> Iterator[Engine]:
    """Open an engine by its name in `ENGINES`. The kernel's raises PlatformError where it cannot run."""
    if name == "model":
        yield ModelEngine()
    elif name == "tables":
        from netpol_ebpf.cases.tables import TablesEngine

        yield TablesEngine()
    else:
        # The kernel's engine needs bcc and privileges; the other two must work without.
        from netpol_ebpf.apply.kernel_engine import KernelEngine

        with KernelEngine() as engine:
            yield engine
