# SPDX-License-Identifier: Apache-2.0
"""Measure the control plane: a cold start, single changes, a thousand changes a second, and the memory for all this.

    sudo .venv/bin/python -m bench.control_plane [--sizes 1000x100,10000x1000,100000x10000] [-o FILE]

Each size of cluster (pods x policies, `bench/cluster.py`) is measured in a process of its own, because memory is
measured too. An event takes the same way as in the agent: the object is parsed and checked, translated into the policy
model, compiled, and written to the kernel's maps. The time is measured from the plain object to the last write, grace
periods included. A cold start does the same for all objects. It is measured twice: from plain objects, and from a
directory of manifests, which the agent reads. The memory figures include the objects that the agent's source keeps.

Together with each event a fixed piece of Python is timed, the *yardstick*. Comparisons between machines and runs use
the ratio to the yardstick. Without root no maps are written, and the result notes this.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.cluster import ELSEWHERE, HERE, Object, Size, namespace, objects, pod, policy, write_manifests
from bench.end_to_end import ended_by
from bench.parts import run_part
from bench.progress import Progress
from bench.record import LESS, MORE, Case, Run, begin, case_id, save, this_command
from bench.site import BPFFS
from netpol_ebpf.agent import footprint
from netpol_ebpf.agent.claims import AddressClaims
from netpol_ebpf.apply.applier import Applier, Binding
from netpol_ebpf.compiler import Compiler
from netpol_ebpf.errors import PlatformError
from netpol_ebpf.policy.translate import Derivation, key_of
from netpol_ebpf.policy.types import (
    Changes,
    ClusterNode,
    Endpoint,
    EndpointKey,
    LabelledNets,
    Policy,
    PolicyTier,
    ProfileRules,
    ServiceBackends,
)
from netpol_ebpf.resources.load import parse_object
from netpol_ebpf.resources.types import Resource
from netpol_ebpf.sources.copies import LastGoodCopies
from netpol_ebpf.sources.files import ManifestDirectory

SUITE = "control plane"
CONTENDER = "netpol-ebpf"
SIZES = (
    Size(1000, 100, 100),
    Size(10_000, 100, 100),
    Size(10_000, 1000, 100),
    Size(10_000, 10_000, 100),
    Size(100_000, 10_000, 250),
)
SMOKE_SIZES = (Size(1000, 100, 50),)
STAGES = ("parse", "derive", "compile", "write")
CHURN_PER_S = 1000
WINDOW_S = 0.25
"""Length in seconds of the windows over which the latencies of churn are summarised."""
MAP_SIZES = {"np_peer_class": 1 << 22, "np_verdict": 1 << 22, "np_l4_col": 1 << 16}
KINDS: Sequence[tuple[str, type[Any]]] = (
    ("tiers", PolicyTier), ("policies", Policy), ("profiles", ProfileRules), ("endpoints", Endpoint), ("network_sets", LabelledNets),
    ("nodes", ClusterNode), ("services", ServiceBackends),
)  # fmt: skip


@dataclass(slots=True)
class Timing:
    """The seconds that one event takes in each stage."""

    stages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @property
    def total(self) -> float:
        """The sum of all stages."""
        return sum(self.stages.values())


class ControlPlane:
    """The agent's way from objects to maps, stage by stage. ``applier`` None: no maps are written."""

    def __init__(self, applier: Applier | None) -> None:
        self._derivation = Derivation()
        self._claims = AddressClaims(self._derivation.world)
        self._compiler = Compiler(lambda endpoint: endpoint.node == HERE)
        self._applier = applier
        self._bound: dict[EndpointKey, int] = {}
        self._interfaces = 0

    def start(self, given: Iterator[Object], source: ManifestDirectory) -> tuple[Timing, float]:
        """Take all objects at once.

        Returns the times, and the seconds of reading them from files, which replaces parsing.

        ``given`` and ``source`` have the same objects. Those of the source stay in memory, as in the agent.
        """
        timing, count = Timing(), 0
        for one in given:
            _timed(timing, "parse", lambda one=one: _parse(one))  # type: ignore[misc]
            count += 1
        read_s = self._read(timing, source, count)
        _timed(timing, "derive", self._take_changes)

        def compile_all() -> None:
            self._compiler.replace(self._claims.effective_world())
            self._compiler.commit()

        _timed(timing, "compile", compile_all)
        if self._applier is not None:
            applier = self._applier
            for key in self._compiler.tables.endpoints:
                self._interfaces += 1
                self._bound[key] = self._interfaces
                applier.bind(key, Binding(self._interfaces))
            _timed(timing, "write", lambda: applier.fill(self._compiler.tables))
        return timing, read_s

    def _read(self, timing: Timing, source: ManifestDirectory, count: int) -> float:
        """Read the directory, which must have ``count`` objects. Returns the seconds. Nothing of the batch is kept."""
        began = time.perf_counter()
        batch = source.step()
        read_s = time.perf_counter() - began
        if batch is None or batch.problems or len(batch.events) != count:
            raise PlatformError(f"{source.root} does not have the {count} objects that were written there")
        for event in batch.events:
            _timed(timing, "derive", lambda event=event: self._derivation.upsert(event.resource, event.key))  # type: ignore[misc]
        return read_s

    def change(self, upserts: Sequence[Object] = (), removals: Sequence[Resource] = ()) -> Timing:
        """Bring some events into force together."""
        timing = Timing()
        for one in upserts:
            resource = _timed(timing, "parse", lambda one=one: _parse(one))  # type: ignore[misc]
            _timed(timing, "derive", lambda resource=resource: self._derivation.upsert(resource))  # type: ignore[misc]
        for resource in removals:
            _timed(timing, "derive", lambda resource=resource: self._derivation.remove(*key_of(resource)))  # type: ignore[misc]
        changes = _timed(timing, "derive", self._take_changes)
        change = _timed(timing, "compile", lambda: self._compile(changes))
        if self._applier is not None:
            applier = self._applier
            _timed(timing, "write", lambda: applier.apply(change))
            _timed(timing, "write", lambda: self._bind(applier, changes))
        return timing

    def _take_changes(self) -> Changes:
        changes = self._derivation.take_changes()
        self._claims.apply_changes(changes)
        return changes

    def _bind(self, applier: Applier, changes: Changes) -> None:
        """Bind each added local pod to an interface with the pod's number, and unbind each removed one."""
        for key, new in changes.endpoints.items():
            if new is not None and new.node == HERE and key not in self._bound:
                self._interfaces += 1
                self._bound[key] = self._interfaces
                applier.bind(key, Binding(self._interfaces))
            elif new is None and self._bound.pop(key, None) is not None:
                applier.unbind(key)

    def _compile(self, changes: Changes) -> Any:
        for name, kind in KINDS:
            for key, new in getattr(changes, name).items():
                if new is None:
                    self._compiler.remove(kind, key)
                else:
                    self._compiler.upsert(new)
        return self._compiler.commit()

    def live_policies(self) -> list[int]:
        """The numbers of the policies that apply to a local pod."""
        world = self._derivation.world
        labels = [endpoint.labels for endpoint in world.endpoints.values() if endpoint.node == HERE]
        return [
            int(key.name.removeprefix("policy-"))
            for key, one in world.policies.items()
            if any(one.subject.matches(each) for each in labels)
        ]

    @property
    def rows(self) -> dict[str, int]:
        """The number of rows of each table."""
        return {table.name: len(table) for table in self._compiler.tables.all()}


def _timed(timing: Timing, stage: str, step: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    try:
        return step()
    finally:
        timing.stages[stage] += time.perf_counter() - start


def _parse(one: Object) -> Resource:
    return parse_object(one, "cluster").check()[0]


def yardstick() -> float:
    """The seconds of a fixed piece of work of the control plane's kind, with dictionaries, tuples and strings."""
    start = time.perf_counter()
    table: dict[tuple[int, str], list[int]] = {}
    for number in range(2000):
        table.setdefault((number % 97, str(number % 53)), []).append(number)
    sorted(table.items())
    return time.perf_counter() - start


# --- one size, in a process of its own ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Findings:
    """The results of a child process. The values are in seconds, unless the name states another unit."""

    cold: dict[str, float] = field(default_factory=dict)
    events: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    stages: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    yardsticks: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    memory: dict[str, int] = field(default_factory=dict)
    churn: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    rows: dict[str, int] = field(default_factory=dict)
    note: str = ""


def measure_size(size: Size, manifests: Path, events: int, churn_s: float) -> Findings:
    """Measure a cold start, single events and churn.

    ``manifests``: the directory to which `write_manifests` wrote this size. Copies of it are created beside it.
    """
    found = Findings()
    source = ManifestDirectory(manifests, LastGoodCopies(manifests.with_name("copies")))
    footprint.give_back_large_blocks()  # the agent makes this call and `freeze`, too
    with contextlib.ExitStack() as stack:
        applier = _open_maps(stack, found)
        plane = ControlPlane(applier)
        found.memory["before the cluster"] = resident_bytes()
        found.yardsticks["cold start"] = [yardstick() for _ in range(20)]
        cold, read_s = plane.start(objects(size), source)
        found.cold = {**cold.stages, "total": cold.total, "read manifests": read_s}
        found.cold["from manifests"] = cold.total - cold.stages["parse"] + read_s
        found.rows = plane.rows
        footprint.freeze()
        found.memory["after the start"] = resident_bytes()
        _single_events(plane, size, events, found)
        found.memory["after single changes"] = resident_bytes()
        if churn_s:
            _churn(plane, size, churn_s, found)
        found.memory["at most"] = peak_bytes()
        found.memory["of maps, mapped"] = mapped_bytes()
    return found


def _open_maps(stack: contextlib.ExitStack, found: Findings) -> Applier | None:
    if os.geteuid() != 0:
        found.note = "without root: compiled, but not written to any map"
        return None
    from netpol_loader.pins.dataplane import Dataplane

    dataplane = stack.enter_context(Dataplane.open(BPFFS / f"netpol-bench-{os.getpid()}", sizes=MAP_SIZES))
    stack.callback(dataplane.remove)
    return Applier(dataplane.maps)


def _single_events(plane: ControlPlane, size: Size, count: int, found: Findings) -> None:
    live = plane.live_policies()
    for turn in range(count):
        number = size.pods + turn
        twin = turn * 37 % size.pods
        known, unseen = pod(number, like=twin), pod(number, like=twin, labels={"unique": str(turn)})
        steps: list[tuple[str, Callable[[], Timing]]] = [
            ("pod added elsewhere", lambda known=known: plane.change([known])),  # type: ignore[misc]
            ("pod relabelled elsewhere, labels never seen", lambda unseen=unseen: plane.change([unseen])),  # type: ignore[misc]
            ("pod removed elsewhere", lambda known=known: plane.change(removals=[_parse(known)])),  # type: ignore[misc]
            ("pod added here", lambda number=number, twin=twin: plane.change([pod(number, node=HERE, like=twin)])),  # type: ignore[misc]
            ("pod removed here", lambda known=known: plane.change(removals=[_parse(known)])),  # type: ignore[misc]
        ]
        if live:
            changed = policy(live[turn % len(live)], size, port=20_000 + turn)
            steps.append(("policy changed", lambda changed=changed: plane.change([changed])))  # type: ignore[misc]
        if turn % 10 == 0:
            space = namespace(turn % size.namespaces, {"turn": str(turn)})
            steps.append(("namespace relabelled", lambda space=space: plane.change([space])))  # type: ignore[misc]
        for name, step in steps:
            found.yardsticks[name].append(yardstick())
            timing = step()
            found.events[name].append(timing.total)
            for stage, seconds in timing.stages.items():
                found.stages.setdefault(name, defaultdict(list))[stage].append(seconds)


def _churn(plane: ControlPlane, size: Size, seconds: float, found: Findings) -> None:
    """Make CHURN_PER_S changes a second.

    All that are due are applied together as soon as the previous ones are in force.

    The latency of a change begins when the change is due.
    """
    live = plane.live_policies()
    total = int(seconds * CHURN_PER_S)
    latencies: list[tuple[float, float]] = []
    processor = time.process_time()
    began = time.perf_counter()
    done = 0
    while done < total:
        now = time.perf_counter() - began
        due = min(total, int(now * CHURN_PER_S) + 1)
        if due <= done:
            time.sleep(max(0.0, done / CHURN_PER_S - now))
            continue
        upserts, removals = _arrivals(range(done, due), size, live)
        plane.change(upserts, removals)
        after = time.perf_counter() - began
        latencies += [(number / CHURN_PER_S, after - number / CHURN_PER_S) for number in range(done, due)]
        done = due
    elapsed = time.perf_counter() - began
    windows: dict[int, list[float]] = defaultdict(list)
    for at, latency in latencies:
        windows[int(at / WINDOW_S)].append(latency)
    for window in windows.values():
        window.sort()
        found.churn["latency p50"].append(window[len(window) // 2])
        found.churn["latency p99"].append(window[int(len(window) * 0.99)])
    found.churn["rate"] = [total / elapsed]
    found.churn["processor share"] = [(time.process_time() - processor) / elapsed]


def _arrivals(numbers: range, size: Size, live: Sequence[int]) -> tuple[list[Object], list[Resource]]:
    """Make a hundred changes.

    On other nodes, 48 pods are added and 48 removed; on this node, one is added and one removed; two policies change.
    """
    upserts: dict[str, Object] = {}
    removals: dict[str, Resource] = {}
    for number in numbers:
        kind, generation = number % 100, number // 100
        if kind in (98, 99) and live:
            one = policy(live[(generation * 2 + kind) % len(live)], size, port=30_000 + generation % 1000)
            upserts[one["metadata"]["name"]] = one
            continue
        place = size.pods + 10_000 + generation * 50 + kind // 2
        node = HERE if kind // 2 == 48 else ELSEWHERE
        one = pod(place, node=node, like=place * 37 % size.pods)
        name = one["metadata"]["name"]
        if kind % 2 == 0:
            upserts[name] = one
        elif name in upserts:
            del upserts[name]  # added and removed in the same batch, so there is no event
        else:
            removals[name] = _parse(one)
    return list(upserts.values()), list(removals.values())


def resident_bytes(process: int | str = "self") -> int:
    """Resident memory of a process in bytes, without mapped maps."""
    return _status_bytes("VmRSS:", process) - mapped_bytes(process)


def peak_bytes(process: int | str = "self") -> int:
    """The largest resident memory that a process had, in bytes, without mapped maps."""
    return _status_bytes("VmHWM:", process) - mapped_bytes(process)


def mapped_bytes(process: int | str = "self") -> int:
    """Bytes of mapped maps. They are the kernel's memory wherever they are mapped, and stay when the agent ends."""
    areas = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{process}/smaps").read_text(encoding="utf-8"))
    resident = (
        re.search(r"^Rss: +(\d+) kB", area, re.MULTILINE) for area in areas if "bpf-map" in area.partition("\n")[0]
    )
    return sum(int(found[1]) for found in resident if found) * 1024


def _status_bytes(name: str, process: int | str) -> int:
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise PlatformError(f"/proc/{process}/status has no {name}")


# --- all sizes ---------------------------------------------------------------------------------------------------------------


def run_suite(run: Run, *, sizes: Sequence[Size], events: int, churn_s: float) -> None:
    """Measure all sizes, and add the cases to the run. A size that fails is an error."""
    progress = Progress("control plane", len(sizes))
    for size in sizes:
        progress.step(f"{size.pods} pods, {size.policies} policies, {size.local} of the pods here")
        written = f"{size.pods}x{size.policies}x{size.local}"
        with tempfile.TemporaryDirectory(prefix="netpol-bench-") as home:
            manifests = Path(home) / "manifests"
            write_manifests(size, manifests)
            command = [sys.executable, "-m", "bench.control_plane", "--child", written, "--manifests", str(manifests)]
            command += ["--events", str(events), "--churn", str(churn_s)]
            said = run_part(command, f"the control plane at {written}")
        _record(run, size, json.loads(said))
    progress.end()


def _record(run: Run, size: Size, found: dict[str, Any]) -> None:
    parameters = {"pods": size.pods, "policies": size.policies, "local": size.local}
    if found["note"] and found["note"] not in run.notes:
        run.notes.append(found["note"])

    def add(
        name: str, unit: str, samples: Sequence[float], *, base: str = "", better: str = LESS, exact: bool = False,
        judged: bool = True,
    ) -> str:  # fmt: skip
        run.cases.append(
            Case(SUITE, name, CONTENDER, unit, better, tuple(samples), parameters, base, exact=exact, judged=judged)
        )
        return case_id(SUITE, name, CONTENDER, parameters)

    def in_ms(samples: Sequence[float]) -> list[float]:
        return [1e3 * sample for sample in samples]

    for name, samples in found["yardsticks"].items():
        add(f"yardstick: {name}", "ms", in_ms(samples))
    base = case_id(SUITE, "yardstick: cold start", CONTENDER, parameters)
    for stage, seconds in found["cold"].items():
        add("cold start" if stage == "total" else f"cold start: {stage}", "ms", in_ms([seconds]), base=base)
    for name, samples in found["events"].items():
        base = case_id(SUITE, f"yardstick: {name}", CONTENDER, parameters)
        add(name, "ms", in_ms(samples), base=base)
        for stage, seconds in found["stages"][name].items():
            if any(seconds):  # a removed object is not parsed
                add(f"{name}: {stage}", "ms", in_ms(seconds), base=base, judged=False)
    for name, figure in found["memory"].items():
        add(f"memory {name}", "bytes", [figure])
    for name, samples in found["churn"].items():
        label = f"churn of {CHURN_PER_S} a second: {name}"
        if name.startswith("latency"):
            add(label, "ms", in_ms(samples), judged=False)
        else:
            add(label, "1/s" if name == "rate" else "", samples, better=MORE if name == "rate" else LESS, judged=False)
    for table, rows in found["rows"].items():
        add(f"rows of {table}", "rows", [rows], exact=True)


def parse_size(text: str) -> Size:
    """Parse PODSxPOLICIES or PODSxPOLICIESxLOCAL."""
    numbers = [int(part) for part in text.split("x")]
    return Size(numbers[0], numbers[1], numbers[2] if len(numbers) > 2 else min(250, max(10, numbers[0] // 10)))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="", help="PODSxPOLICIES[xLOCAL] by commas")
    parser.add_argument("--events", type=int, default=100, help="how many of each single change")
    parser.add_argument("--churn", type=float, default=5.0, metavar="SECONDS", help="how long; 0: not at all")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--manifests", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=Path("control_plane.json"))
    options = parser.parse_args(argv)
    if options.child:
        found = measure_size(parse_size(options.child), options.manifests, options.events, options.churn)
        print(json.dumps({name: getattr(found, name) for name in Findings.__slots__}))
        return 0
    run = begin(this_command())
    began = time.monotonic()
    sizes = [parse_size(one) for one in options.sizes.split(",")] if options.sizes else SIZES
    run_suite(run, sizes=sizes, events=options.events, churn_s=options.churn)
    run.seconds = round(time.monotonic() - began, 1)
    save(run, options.output)
    print(f"{len(run.cases)} cases in {options.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(ended_by(main))
