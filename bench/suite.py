# SPDX-License-Identifier: Apache-2.0
"""All benchmarks in one run with one result file, which `netpolctl bench` starts.

The whole run takes about a quarter of an hour on two idle cores and makes the recorded result. *Smoke* takes two or
three minutes, for continuous integration: it shows that every part works, but its figures are few and rough.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import control_plane, end_to_end, guards, idle, loads, names, pods, scale, targets
from bench.micro import HOT_REPEAT
from bench.parts import run_part
from bench.record import LESS, ROOT, Case, Run, begin, case_id, save
from bench.site import EMPTY, NOTHING, OURS, Remote
from netpol_ebpf.errors import PrivilegeError, UsageError

MICRO = "micro"
CONTENDER = "netpol-ebpf"
MICRO_BASE = "parse only, v4"
"""The base of micro cases when runs are compared: work of the same kind, in the same rounds."""
SMOKE_LOADS = (loads.UDP_64, loads.CONNECTS)
SMOKE_RULES = (10, 1000)
SMOKE_PODS, SMOKE_NEW = 20, 3


def micro(run: Run, *, smoke: bool) -> None:
    """Add the figures of `bench/micro.py` as cases."""
    command = [sys.executable, str(ROOT / "bench" / "micro.py"), "-o", "json"]
    command += ["--quick", "--rounds", "3"] if smoke else []
    found = json.loads(run_part(command, "bench/micro.py"))
    for scale_ in found:
        add_micro(run, scale_)
    for program, count in found[0]["verified"].items():
        if count is not None:
            name = f"verified instructions, {program}"
            run.cases.append(Case(MICRO, name, CONTENDER, "instructions", LESS, (count,), exact=True, judged=False))


def add_micro(run: Run, found: Mapping[str, Any]) -> None:
    """Add one scale of `bench/micro.py`. Its ``samples`` are used by case; if it has none, the medians in ``ns``."""
    parameters = {name: value for name, value in found.items() if isinstance(value, int)}
    figures = found.get("samples") or {name: [value] for name, value in found["ns"].items()}
    for name, samples in figures.items():
        is_base = name == MICRO_BASE or name.startswith("empty")
        base = "" if is_base else case_id(MICRO, MICRO_BASE, CONTENDER, parameters)
        run.cases.append(Case(MICRO, name, CONTENDER, "ns", LESS, tuple(map(float, samples)), parameters, base))


def control(run: Run, *, smoke: bool) -> None:
    """Measure single changes and churn, pods that come and go, and the agent at rest."""
    sizes = control_plane.SMOKE_SIZES if smoke else control_plane.SIZES
    control_plane.run_suite(run, sizes=sizes, events=10 if smoke else 100, churn_s=1.0 if smoke else 5.0)
    pods.run_suite(run, pods=SMOKE_PODS if smoke else pods.PODS, new=SMOKE_NEW if smoke else pods.NEW)
    idle.run_suite(run, windows=1 if smoke else 5, seconds=1.0 if smoke else 2.0)
    try:
        from bench import api_agent
    except ModuleNotFoundError as error:
        if error.name != "msgspec":
            raise
        run.notes.append("without the extra [kubernetes]: no agent watched an API server")
        return
    if smoke:
        api_agent.run_suite(run, sizes=api_agent.SMOKE_SIZES, edits=5, churn_s=2.0, rest_s=2.0)
    else:
        api_agent.run_suite(run)


def suites(*, smoke: bool, remote: Remote | None) -> dict[str, Callable[[Run], None]]:
    """The suites: name -> function that runs the suite."""
    kinds = (NOTHING, EMPTY, OURS) if smoke else None
    return {
        "micro": lambda run: micro(run, smoke=smoke),
        "guards": lambda run: guards.run_suite(run, loads=1 if smoke else 9, rounds=20 if smoke else 300),
        "end-to-end": lambda run: end_to_end.run_suite(
            run,
            rounds=2 if smoke else 5,
            seconds=0.5 if smoke else 1.0,
            sizes=SMOKE_RULES if smoke else end_to_end.RULES,
            chosen=SMOKE_LOADS if smoke else loads.LOADS,
            kinds=kinds,
            remote=remote,
        ),
        "scale": lambda run: scale.run_suite(
            run,
            rounds=2 if smoke else 7,
            axes=scale.SMOKE_AXES if smoke else scale.AXES,
            sizes=scale.SMOKE_SIZES if smoke else targets.SIZES,
        ),
        "names": lambda run: names.run_suite(
            run,
            rounds=2 if smoke else 7,
            sizes=names.WATCHED[:1] if smoke else names.WATCHED,
            trips=20 if smoke else 300,
            repeat=10_000 if smoke else HOT_REPEAT,
        ),
        "control-plane": lambda run: control(run, smoke=smoke),
    }


def run_all(
    command: Sequence[str], output: Path, *, smoke: bool, chosen: Sequence[str] = (), remote: Remote | None = None
) -> Run:
    """Run the suites and write the result. Raises PrivilegeError without root, UsageError for an unknown suite."""
    if os.geteuid() != 0:
        raise PrivilegeError("the benchmarks load programs and make network namespaces, which needs root")
    known = suites(smoke=smoke, remote=remote)
    if unknown := [name for name in chosen if name not in known]:
        raise UsageError(f"no such suite: {unknown[0]}; there are: {', '.join(known)}")
    run = begin(command)
    if smoke:
        run.notes.append(
            "a smoke run: few rounds, sizes, loads and contenders; it shows that the parts work, and its figures are rough"
        )
    began = time.monotonic()
    for name, work in known.items():
        if not chosen or name in chosen:
            print(f"== {name}", file=sys.stderr, flush=True)
            work(run)
            run.seconds = round(time.monotonic() - began, 1)
            save(run, output)  # saved after each suite, so that a later failure loses nothing
    return run
