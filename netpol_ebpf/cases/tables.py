# SPDX-License-Identifier: Apache-2.0
"""The compiled tables as an engine: compiles a world and interprets the resulting tables.

Invariant: each world is compiled as a change of the previous world, as in the agent, so a run over several worlds also
tests incremental compilation.
"""

from __future__ import annotations

from collections.abc import Collection

from netpol_ebpf.compiler import Compiler
from netpol_ebpf.compiler.interpreter import Interpreter
from netpol_ebpf.policy.types import Question, Verdict, World


class TablesEngine:
    """The engine `tables`: see `netpol_ebpf.cases.engines.Engine`."""

    def __init__(self) -> None:
        self._compiler = Compiler()

    def load(self, world: World, names: Collection[str] = ()) -> None:
        """See `Engine`."""
        self._compiler.replace(world)
        self._compiler.see_names(names)
        self._compiler.commit()

    def decide(self, question: Question) -> Verdict:
        """See `Engine`."""
        return Interpreter(self._compiler.tables).decide(question)
