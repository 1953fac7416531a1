# SPDX-License-Identifier: Apache-2.0
"""The common interface of the three engines: the reference model, the compiled tables, and the program in the kernel.

Invariant: an engine's verdicts depend only on the world that was loaded last, not on earlier worlds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Protocol

from netpol_ebpf.model import ReferenceModel
from netpol_ebpf.policy.types import Question, Verdict, World

ENGINES = ("model", "tables", "kernel")


class Engine(Protocol):
    """An evaluator of policy: it decides the packets of one world."""

    def load(self, world: World, names: Collection[str] = ()) -> None:
        """Replace the present world by ``world``. Engines that keep compiled state apply only the difference.

        ``names``: the domain names that endpoints ask for, as the agent of a node sees them. Compiled engines need them
        for patterns with a wildcard inside a name.
        """

    def decide(self, question: Question) -> Verdict:
        """The verdict of the loaded world's policy on ``question``."""


class ModelEngine:
    """The engine ``model``: the reference model of `netpol_ebpf.model`."""

    def __init__(self) -> None:
        self._model = ReferenceModel(World())

    def load(self, world: World, names: Collection[str] = ()) -> None:  # noqa: ARG002 - the model needs no rows
        """See `Engine`."""
        self._model = ReferenceModel(world)

    def decide(self, question: Question) -> Verdict:
        """See `Engine`."""
        return self._model.decide(question)


@contextlib.contextmanager
def open_engine(name: str) -> Iterator[Engine]:
    """Open an engine by its name in `ENGINES`. Raises PlatformError if the kernel engine cannot run here."""
    if name == "model":
        yield ModelEngine()
    elif name == "tables":
        from netpol_ebpf.cases.tables import TablesEngine

        yield TablesEngine()
    else:
        # Imported here, because the other engines must work without BCC and privileges.
        from netpol_ebpf.apply.kernel_engine import KernelEngine

        with KernelEngine() as engine:
            yield engine
