# SPDX-License-Identifier: Apache-2.0
"""Compiles the policy model into tables that give each packet its verdict in constant time."""

from netpol_ebpf.compiler.compiler import Compiler
from netpol_ebpf.compiler.interpreter import Interpreter
from netpol_ebpf.compiler.limits import Limits
from netpol_ebpf.compiler.reader import TableReader
from netpol_ebpf.compiler.state import KnownNumbers
from netpol_ebpf.compiler.tables import Change, CompiledTables

__all__ = ["Change", "CompiledTables", "Compiler", "Interpreter", "KnownNumbers", "Limits", "TableReader"]
