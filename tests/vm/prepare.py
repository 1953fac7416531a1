# SPDX-License-Identifier: Apache-2.0
"""Prepares on this machine what a guest needs besides a kernel: copies of the repository and compiled programs.

A copy is used because runs take minutes and the repository is edited meanwhile. The programs are compiled here, because
that takes minutes under emulation; and a node without a compiler is the purpose of the compiled file. This module must
not write outside the given directory and the cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from netpol_ebpf.errors import NetpolError
from tests.vm.kernels import cache_dir

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("netpol_ebpf", "loader", "bpf", "scripts", "tests", "bench", "examples", "docs", "pyproject.toml")
IGNORED = shutil.ignore_patterns(".*_cache", "results")
TIMEOUT_S = 600.0

MAKE_OLDER = """
import sys
from pathlib import Path
from other_version import WIDER_CONFIG, WIDER_ENDPOINT, make_version, schema
make_version(Path(sys.argv[1]), [schema(-1), WIDER_CONFIG, WIDER_ENDPOINT])
"""
COMPILE = """
import platform, sys
from pathlib import Path
from netpol_loader.pins import compilation, compiled
directory, digest = Path(sys.argv[1]), compilation.source_digest(compilation.source_dir()).hex()
name = compilation.compiler_name()
if name is None or compiled.find_compiled(digest, platform.machine(), name, [directory]) is None:
    compiled.save_compiled(compilation.compile_program(), directory)
print(directory / compiled.file_name(digest, platform.machine()))
"""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The prepared directories.

    ``tree``: the copy. ``older``: the source of an older version. ``compiled``: a directory with the compiled files of
    both. ``empty``: an empty directory. ``compiler``: the compiler of the file of ``tree``.
    """

    tree: Path
    older: Path
    compiled: Path
    empty: Path
    compiler: str


def prepare(scratch: Path, compiled: Path | None = None) -> Prepared:
    """Prepare everything in ``scratch``. ``compiled``: a file to use for ``tree`` instead of compiling.

    Raises NetpolError if something does not compile. Its subclass PlatformError is only for what the machine lacks.
    """
    tree, older = scratch / "tree", scratch / "older"
    tree.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tree / part, ignore=IGNORED, symlinks=True)
        else:
            shutil.copy2(ROOT / part, tree / part)
    run_python(tree, MAKE_OLDER, older)
    kept = cache_dir() / "compiled"
    kept.mkdir(mode=0o755, parents=True, exist_ok=True)
    files = [Path(run_python(one, COMPILE, kept)) for one in (tree, older)]
    directory = scratch / "compiled"
    directory.mkdir(mode=0o755)
    for file in files:
        shutil.copy(file, directory)
    if compiled is not None:
        shutil.copy(compiled, directory / files[0].name)
    # The bytecode is made here, because an emulated processor would otherwise compile every module at each start of an
    # agent.
    subprocess.run(
        [sys.executable, "-m", "compileall", "-q", str(tree), str(older)], check=True, stdout=subprocess.DEVNULL
    )
    empty = scratch / "empty"
    empty.mkdir()
    made = json.loads((directory / files[0].name).read_text())
    return Prepared(tree, older, directory, empty, made["compiler"])


def run_python(tree: Path, program: str, argument: Path) -> str:
    """Run a program with the modules of a source tree. Returns its output."""
    path = os.pathsep.join(str(tree / part) for part in ("", "loader", "tests/netns"))
    done = subprocess.run(
        [sys.executable, "-c", program, str(argument)],
        cwd=tree, env={**os.environ, "PYTHONPATH": path}, check=False, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    if done.returncode != 0:
        raise NetpolError(f"the guest's program cannot be prepared:\n{done.stderr.strip()[-2000:]}")
    return done.stdout.strip()
