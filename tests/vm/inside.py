# SPDX-License-Identifier: Apache-2.0
"""The steps inside a guest's kernel. Each function is one step: it prints one JSON document and returns an exit code.

Only this module of the harness knows the project's commands. Invariant: if the observation is not as required, a
function raises an error or returns another code than 0. It never reports "skipped".
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from netpol_ebpf.agent.main import main as agent_main
from netpol_ebpf.cases.runner import run_cases  # noqa: F401 - imported here once, for every step that needs it
from netpol_ebpf.cli.main import main as netpolctl_main
from netpol_ebpf.errors import PlatformError
from netpol_loader.kernel import syscall
from netpol_loader.kernel.facts import kernel_facts
from netpol_loader.kernel.hook import Hook
from netpol_loader.kernel.relocation import link
from netpol_loader.pins import attach
from netpol_loader.pins.build import compiled_program
from netpol_loader.pins.dataplane import Dataplane
from netpol_loader.pins.programs import CALL_MAP

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests/netns"))  # agent_scene, other_version

PIN_ROOT = Path("/sys/fs/bpf/netpol-vm")
EXIT_UNSUPPORTED = 5
REFUSING = {"doctor": "MISSING", "agent": "error:"}
"""For each program, the text in the line with its reason."""


def system() -> int:
    """Print facts about the machine."""
    found = os.uname()
    return _print({"release": found.release, "version": found.version, "machine": found.machine, "cpus": os.cpu_count(),
                   "python": platform.python_version(), "command_line": Path("/proc/cmdline").read_text().split()[:6]})  # fmt: skip


def load() -> int:
    """Load the program set as an agent does.

    Prints the verifier's and the JIT's numbers, and the mechanism of attachment.
    """
    began = time.monotonic()
    dataplane = Dataplane.open(PIN_ROOT)
    seconds = time.monotonic() - began
    try:
        programs = {}
        for name, fd in dataplane.programs.named():
            if name != CALL_MAP:
                seen = syscall.prog_info(fd)
                programs[name] = {
                    "verified": seen.verified or _verified_by_log(name, dataplane),
                    "jited_bytes": seen.jited_bytes,
                    "xlated_bytes": seen.xlated_bytes,
                }
        features = {
            "tcx": attach.preferred_mechanism(dataplane) is attach.Mechanism.TCX,
            "test run names an interface": _test_run_names_interface(dataplane),
        }
        return _print({"seconds": round(seconds, 2), "programs": programs, "features": features})
    finally:
        dataplane.remove()


def _verified_by_log(name: str, dataplane: Dataplane) -> int:
    """The number of instructions that the verifier processes in a program, from its log.

    Kernels before 5.16 do not report it.
    """
    compiled = compiled_program(keep=False)
    fds = {each: one.fd for each, one in (dataplane.maps | {CALL_MAP: dataplane.programs.calls}).items()}
    log = syscall.empty(syscall.LOG_BYTES)
    code = link(compiled.programs[name], compiled.maps, fds, kernel_facts())
    os.close(syscall.prog_load(code, name=name, log=log, log_level=syscall.LOG_COUNTS))
    told = re.search(rb"^processed (\d+) insns", log.value, re.MULTILINE)
    if told is None:
        raise AssertionError(f"the verifier's log does not count: {log.value[:200]!r}")
    return int(told[1])


def _test_run_names_interface(dataplane: Dataplane) -> bool:
    """Whether the context of a BPF_PROG_TEST_RUN may name the packet's interface."""
    try:
        dataplane.test_run(Hook.TC_INGRESS, bytes(64), ingress_ifindex=1)
    except PlatformError:
        return False
    return True


def netpolctl(*arguments: str) -> int:
    """Run a command of netpolctl."""
    return netpolctl_main(list(arguments))


def refusal() -> int:
    """On an unsupported kernel, doctor and agent each report this in one line, and exit with 5."""
    seen: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home:
        agent = [
            "--manifests",
            home,
            "--node",
            "node",
            "--pin-root",
            str(PIN_ROOT),
            "--state-dir",
            f"{home}/state",
            "--once",
        ]
        for name, run in (("doctor", lambda: netpolctl_main(["doctor"])), ("agent", lambda: agent_main(agent))):
            seen[name] = _said(run)
    lines = {name: [line for line in one["said"] if REFUSING[name] in line] for name, one in seen.items()}
    _print({name: {"code": one["code"], "line": " ".join(lines[name])} for name, one in seen.items()})
    is_clear = all(len(one) == 1 for one in lines.values()) and len(seen["agent"]["said"]) <= 2  # the line and its hint
    return 0 if is_clear and all(one["code"] == EXIT_UNSUPPORTED for one in seen.values()) else 1


def _said(run: Callable[[], int]) -> dict[str, Any]:
    """The exit code and the output lines of a main function."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = run()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
    return {"code": code, "said": output.getvalue().splitlines()}


def succession(older: str) -> int:
    """An agent of an older version is replaced by one of this version, which is killed and followed by another one.

    ``older``: the source of the older version. During all this an open connection lives, allowed connections are
    answered, denied ones are not, and endpoints keep their numbers.
    """
    from agent_scene import lab_for, scene_in
    from other_version import VersionedScene

    with tempfile.TemporaryDirectory() as directory, lab_for() as lab:
        home = Path(directory) / "home"
        with scene_in(lab, home, kind=VersionedScene, tree=Path(older)) as scene:
            try:
                return _succession(scene)
            except BaseException:
                log = home / "agent.log"
                print(log.read_text()[-2000:] if log.exists() else "the agent wrote nothing", file=sys.stderr)
                raise


def _succession(scene: Any) -> int:
    from agent_scene import to_db

    def started() -> tuple[dict[str, Any], float]:
        began = time.monotonic()
        scene.launch()
        state = scene.await_status(lambda state: state["in_force"], "the manifests are in force")
        return state, round(time.monotonic() - began, 1)

    def judged() -> dict[str, bool]:
        allowed, denied = scene.reached(to_db("shop/web"), to_db("shop/other"))
        return {"connection lives": held.exchange(5.0), "allowed is reached": allowed, "denied is silent": not denied}

    before, _ = started()
    held = scene.lab.prober.hold(to_db("shop/web"))
    if held is None:
        raise AssertionError("what policy allows cannot be opened")
    numbers = {one["endpoint"]: one["number"] for one in before["endpoints"]}
    seen: dict[str, dict[str, Any]] = {}
    scene.stop()
    scene.tree = None
    for name, end in (("upgrade", lambda: None), ("kill", scene.kill)):
        end()
        between = judged()
        after, seconds = started()
        same = {one["endpoint"]: one["number"] for one in after["endpoints"]} == numbers
        seen[name] = {"without an agent": between, "with the next one": judged(), "numbers are kept": same,
                      "said": after["upgrade"], "start_s": seconds}  # fmt: skip
    held.close()
    _print(seen)
    return 0 if all(_facts(seen)) and "connections kept" in seen["upgrade"]["said"] else 1


class Kept:
    """A plugin of pytest: the outcome of each test, and the rows that tests of networks record."""

    def __init__(self) -> None:
        self.outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
        self.rows: list[Any] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest for each phase of each test."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome].append(report.nodeid.rpartition("/")[2])
        if report.when == "call" and report.outcome == "passed":
            self.rows += [value for name, value in report.user_properties if name == "row"]


def _run_tests(*arguments: str) -> tuple[Kept, int]:
    """Run pytest. Returns the outcomes of the tests, and pytest's exit code."""
    import pytest

    kept = Kept()
    os.chdir(ROOT)
    with contextlib.redirect_stdout(sys.stderr):
        code = pytest.main(["-q", "-p", "no:cacheprovider", "--tb=line", *arguments], plugins=[kept])
    return kept, int(code)


def border(name: str) -> int:
    """Run the tests of tests/netns/test_NAME.py."""
    # Nothing loads this module by itself. If it is built in or not available, the tests see that by its settings.
    subprocess.run(["modprobe", "-q", "br_netfilter"], check=False)
    kept, code = _run_tests(f"tests/netns/test_{name}.py", "--maxfail=5", "--durations=10")
    _print(kept.outcomes)
    return code


def networks(*worlds: str) -> int:
    """Run the tests of network plugins and layouts.

    Prints their rows, including those for which this kernel has no devices.

    ``worlds``: names from test_networks.WORLDS; none: all of them.
    """
    kept, code = _run_tests("tests/netns/test_networks.py", "-k", " or ".join(f"{one}-" for one in worlds))
    _print({**{outcome: len(names) for outcome, names in kept.outcomes.items()}, "rows": kept.rows})
    return code


def _facts(seen: Any) -> Iterator[bool]:
    """Every boolean value in a document."""
    if isinstance(seen, bool):
        yield seen
    elif isinstance(seen, dict):
        for one in seen.values():
            yield from _facts(one)


def _print(document: Any) -> int:
    print(json.dumps(document))
    return 0
