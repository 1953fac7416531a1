# SPDX-License-Identifier: Apache-2.0
"""Tests the project with the packages of one suite.

The suite's Python runs it in a root of the suite (scripts/suites.sh).

    python3 -m tests.suites.in_suite SUITE [--compile-only]

Writes results to /results/result.json and compiled files to /results/compiled after each step, so that a failing step
loses nothing of the earlier ones. Exit code 1 if a program is rejected or is too costly to verify, or if a probe or a
test fails.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path
from typing import Any

from netpol_ebpf.errors import LoadError
from netpol_loader.kernel import syscall
from netpol_loader.pins import build, compilation
from netpol_loader.pins.compiled import CACHE_DIR, Compiled, encode_compiled, save_compiled
from netpol_loader.pins.programs import ProgramSet

RESULTS = Path("/results")
MOST_VERIFIED = 250_000
"""Largest number of instructions that the verifier may process for a program. The kernel's limit is a million."""
MANY_VERIFIED = 150_000
"""Number of instructions from which a remark is printed."""
OTHER_MACHINE = "aarch64"
"""Another architecture for which the program is compiled and verified. BPF has the same instructions on every machine,
but one flag differs."""
PROCESSES = 2
ACCEPTED_SKIPS = frozenset({"clang-format is not installed", "systemd-analyze is not installed"})
"""Reasons of accepted skips: only one version of clang-format and one of systemd check the sources and the unit, in
CI."""
WARNINGS = (
    # Structures of pyroute2 0.8 on Python 3.14, at its import.  Python shows users nothing of it, and 3.19 refuses them.
    "ignore:Due to '_pack_':DeprecationWarning",
)


OF_KUBERNETES_EXTRA = re.compile(r"\b(apiserver_traces|fake_apiserver|writable_api|sources\.kubernetes)\b")
"""A test file that names one of these needs the extra ``[kubernetes]``. A suite need not have its packages, and the
core must work without them."""
OF_DNSPYTHON = re.compile(r"^(import|from) dns\b", re.MULTILINE)
"""A test file that imports dnspython, which is of the extra ``[dev]`` and which nothing of the product needs."""


def main() -> int:
    """Run the steps. Failures are printed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("suite")
    parser.add_argument("--compile-only", action="store_true")
    arguments = parser.parse_args()

    seen: dict[str, Any] = {
        "suite": arguments.suite,
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "kernel": platform.release().partition("-")[0],
        "versions": versions(),
        "failed": [],
    }
    try:
        compiled, seen["compile_s"] = timed(lambda: compile_both(seen["versions"]["llvm"]))
        seen["verified"] = {machine: verify(one, seen["failed"]) for machine, one in compiled.items()}
        if not arguments.compile_only:
            save_compiled(compiled[platform.machine()], CACHE_DIR)  # the steps below would compile again
            seen["cases"], seen["cases_s"] = timed(lambda: run_cases(seen["failed"]))
            seen["tests"], seen["tests_s"] = timed(lambda: run_tests(seen["failed"]))
    except LoadError as error:
        seen["failed"].append(error.message)
    (RESULTS / "result.json").write_text(json.dumps(seen, indent=1) + "\n")
    for failure in seen["failed"]:
        print(f"{arguments.suite}: FAILED: {failure}", file=sys.stderr)
    return 1 if seen["failed"] else 0


def timed(step: Any) -> tuple[Any, float]:
    """The result of a step, and its seconds."""
    began = time.monotonic()
    return step(), round(time.monotonic() - began, 1)


def versions() -> dict[str, str]:
    """The versions of the suite's packages. The version of a library is that of the package with the loaded file."""
    importlib.import_module("bcc")  # loads libbcc, and so LLVM and libbpf
    loaded = {Path(path) for path in re.findall(r"(/\S+\.so\S*)", Path("/proc/self/maps").read_text())}

    def package_of(pattern: str) -> str:
        (path,) = (path for path in loaded if re.match(pattern, path.name))
        for name in (path, *Path("/").glob(f"usr/lib/*/{path.name}")):  # /lib is a link to /usr/lib
            owner = subprocess.run(["dpkg-query", "--search", str(name)], capture_output=True, text=True, check=False)
            if owner.returncode == 0:
                package = owner.stdout.split(": ")[0]
                break
        shown = subprocess.run(
            ["dpkg-query", "--show", "--showformat=${Version}", package], capture_output=True, text=True, check=True
        )
        return re.sub(r"^\d+:|[+~-].*", "", shown.stdout)

    return {
        "python": platform.python_version(),
        "bcc": package_of(r"libbcc\.so"),
        "llvm": package_of(r"libLLVM"),
        "pyroute2": version("pyroute2"),
        "libbpf": package_of(r"libbpf\.so"),
        "pytest": version("pytest"),
    }


def compile_both(llvm: str) -> dict[str, Compiled]:
    """The product compiled for each machine; stored as LLVM.json and LLVM-MACHINE.json with LLVM's major version."""
    directory = RESULTS / "compiled"
    directory.mkdir()
    compiled = {}
    for machine in (platform.machine(), OTHER_MACHINE):
        compiled[machine] = compilation.compile_program(machine=machine)
        name = llvm.partition(".")[0] + ("" if machine == platform.machine() else f"-{machine}")
        (directory / f"{name}.json").write_bytes(encode_compiled(compiled[machine]))
    return compiled


def verify(compiled: Compiled, failed: list[str]) -> dict[str, int]:
    """The number of instructions that the verifier processed, by program."""
    with tempfile.TemporaryDirectory(dir="/sys/fs/bpf", prefix="netpol-suite-") as pins:
        maps = build.make_maps(Path(pins), {})
        programs = ProgramSet.load(compiled, maps)
        verified = {name: syscall.prog_info(fd).verified for name, fd in programs.programs()}
        programs.close()
        for one in maps.values():
            one.close()
        for path in Path(pins).iterdir():
            path.unlink()
    for name, count in verified.items():
        print(f"{compiled.machine:8} {name:16} {count:8} instructions verified", flush=True)
        if count > MOST_VERIFIED:
            failed.append(f"{name} for {compiled.machine}: {count} instructions verified, over {MOST_VERIFIED}")
        elif count > MANY_VERIFIED:
            print(f"remark: {name} for {compiled.machine} is over {MANY_VERIFIED}", flush=True)
    return verified


def run_cases(failed: list[str]) -> dict[str, int]:
    """Run the case files on the kernel engine."""
    command = [sys.executable, "-m", "netpol_ebpf.cli.main", "test", "tests/cases", "examples/cases"]
    done = subprocess.run([*command, "--engine", "kernel", "--output", "json"], capture_output=True, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        failed.append(f"case files: exit code {done.returncode}: {done.stderr.decode(errors='replace')[-2000:]}")
        return {}
    wrong = [*report["failed"], *report["invalid"]]
    failed += [f"case: {one}" for one in wrong]
    if done.returncode != 0 and not wrong:
        failed.append(f"case files: exit code {done.returncode}")
    print(f"{report['cases']} cases, {report['probes']} probes, {len(wrong)} failed", flush=True)
    return {"cases": report["cases"], "probes": report["probes"], "failed": len(wrong)}


def run_tests(failed: list[str]) -> dict[str, int]:
    """Run the tests of the directories unit, abi and kernel.

    A test that is skipped for an unexpected reason counts as failed.
    """
    report = RESULTS / "pytest.xml"
    command = [sys.executable, "-m", "pytest", "--quiet", f"--numprocesses={PROCESSES}", "--dist=loadfile"]
    command += ["--durations=5", f"--junit-xml={report}", "tests/unit", "tests/abi", "tests/kernel"]
    command += ["--ignore=tests/unit/test_docs_commands.py"]  # it needs scapy, and depends on no versions
    if importlib.util.find_spec("msgspec") is None:
        files = sorted(Path("tests/unit").glob("test_*.py"))
        command += [f"--ignore={one}" for one in files if OF_KUBERNETES_EXTRA.search(one.read_text(encoding="utf-8"))]
    if importlib.util.find_spec("dns") is None:
        files = sorted(Path("tests").glob("[uk]*/test_*.py"))  # tests/unit and tests/kernel
        command += [f"--ignore={one}" for one in files if OF_DNSPYTHON.search(one.read_text(encoding="utf-8"))]
    options = " ".join(f'-W "{warning}"' for warning in WARNINGS)  # some tests run pytest, too
    done = subprocess.run(command, env={**os.environ, "PYTEST_ADDOPTS": options}, check=False)
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    if not report.exists():
        failed.append(f"pytest: exit code {done.returncode}, no report")
        return counts
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - pytest has just written it
        name = f"{case.get('classname')}.{case.get('name')}"
        marks = {mark.tag: mark.get("message") or "" for mark in case}
        if "failure" in marks or "error" in marks:
            counts["failed"] += 1
            message = marks.get("failure") or marks.get("error") or ""
            failed.append(f"{name}: {message.splitlines()[0][:300] if message else 'no message'}")
        elif "skipped" in marks:
            counts["skipped"] += 1
            if marks["skipped"] not in ACCEPTED_SKIPS:
                failed.append(f"{name}: skipped: {marks['skipped']}")
        else:
            counts["passed"] += 1
    if done.returncode != 0 and not counts["failed"]:
        failed.append(f"pytest: exit code {done.returncode}")
    return counts


if __name__ == "__main__":
    sys.exit(main())
