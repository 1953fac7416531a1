# SPDX-License-Identifier: Apache-2.0
"""Write docs/networks.md: in which networks pods are enforced, and in which they are reported as not enforced.

    python -m tests.netns.networks --write [KERNEL...]      run tests/netns/test_networks.py here and in guests with these
                                                            kernels (names as `python -m tests.vm` takes them), keep the rows
    python -m tests.netns.networks --check                  whether the page is the recorded one

Invariants: every cell of the page comes from a row that a passed test recorded. What was not run says so, and why. A
new run of a kernel replaces only the rows of that kernel.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from netpol_ebpf.agent.cni import UNSEEN_TYPES
from netpol_ebpf.errors import InvalidInputError, NetpolError, PlatformError
from tests.vm import kernels
from tests.vm.prepare import prepare
from tests.vm.record import ROOT, current_commit, series_of, today
from tests.vm.run import run_kernel

PAGE = ROOT / "docs" / "networks.md"
RECORD = ROOT / "tests" / "netns" / "results" / "networks.json"
FORMAT = 1
STEP = "networks"
NOT_RUN = "not run"
RUN = "import sys; from tests.vm import inside; sys.exit(inside.networks())"

HEAD = """\
# Networks

<!-- Written by `python -m tests.netns.networks --write` from what its tests left; not edited by hand. -->

In each of these networks stand two pods of one node, and the world outside. Policy lets each open and take TCP connections to one port and to no other. What is
asked: is the denied port silent, from the neighbour and from outside (*ingress denied*) and towards the world (*egress denied*); is the allowed
port reached, all ways (*allowed passes*). Without policy everything is reached, which is tried first. *Evidence* is how the agent
[knows the pod's interface](agent.md#interfaces). Each row holds under an agent that was there before the pods and under one that came after them; in a VM,
with results under the former and without under the latter.

Plugins (*bridge* to *ptp*, *macvlan* to *host-device*, and *flannel*'s delegate) are those of Debian's `containernetworking-plugins`, run as a runtime runs them. *Result kept*: whether the runtime keeps
plugins' results (`--cni-results`), as containerd and CRI-O do. Layouts *by hand* have the interfaces, addresses and routes that the
network is known for, without its software.

*bridge-vlan*: ports of one VLAN of a bridge that filters them. *bridge-inner*: the gateway is on a pair of the node's own, one end of which is a port of the bridge; *bridge-macvlan*: on a macvlan device on top of it. *aws-vpc-groups*: AWS's pods with security groups of their own, whose routes are in tables of
their own. *macvlan-lan*: on a further link where the node has an address, with a macvlan device of the node and a host route to one of the pods.

A pod that is *named as not enforced* is an error of `netpolctl status` (`not-found`; with the plugin's result also `further-interface`), and its exit code is 1. These are
the pods whose packets pass no interface of the node that is theirs alone. Every other network must be enforced: the tests fail else.
"""
COLUMNS = (
    "network",
    "IPAM",
    "result kept",
    "evidence",
    "ingress denied",
    "egress denied",
    "allowed passes",
    "verdict",
    "run on",
)
FIELDS = ("network", "ipam", "result", "evidence", "ingress_denied", "egress_denied", "allowed", "verdict")


@dataclass(frozen=True, slots=True)
class Ran:
    """The rows of one kernel.

    ``guest``: whether it was emulated. ``rows``: as tests/netns/test_networks.py records them.
    """

    release: str
    guest: bool
    date: str
    commit: str
    rows: Sequence[Mapping[str, Any]]

    @property
    def label(self) -> str:
        """The kernel's name in the page."""
        return f"{series_of(self.release)}{' (VM)' if self.guest else ''}"


def read_record(path: Path = RECORD) -> list[Ran]:
    """The record, by kernel; empty if the file does not exist. Raises InvalidInputError if it is not a record."""
    if not path.exists():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    if document.get("format") != FORMAT:
        raise InvalidInputError(f"{path}: is no record of format {FORMAT}")
    return [Ran(**one) for one in document["kernels"]]


def keep(ran: Ran, path: Path = RECORD) -> None:
    """Record a kernel's rows in place of its earlier ones."""
    by_label = {one.label: one for one in (*read_record(path), ran)}
    ordered = [asdict(by_label[label]) for label in sorted(by_label)]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"format": FORMAT, "kernels": ordered}, indent=1) + "\n", encoding="utf-8")


def render(found: Sequence[Ran]) -> str:
    """Render the page."""
    ran: dict[tuple[str, ...], dict[str, None]] = {}
    lacking: dict[str, dict[str, str]] = {}
    for one in found:
        for row in one.rows:
            if row["verdict"] == NOT_RUN:
                lacking.setdefault(row["network"], {})[one.label] = row["why"]
            else:
                ran.setdefault(tuple(_cell(row[name]) for name in FIELDS), {})[one.label] = None
    names = list(dict.fromkeys(row["network"] for one in found for row in one.rows))
    lines = [(*cells, ", ".join(ran[cells])) for cells in sorted(ran, key=lambda cells: names.index(cells[0]))]
    never = [name for name in lacking if name not in {cells[0] for cells in ran}]
    lines += [(name, *["-"] * 6, f"{NOT_RUN}: {why}", "-") for name in never for why in set(lacking[name].values())]
    types = {row["plugin"] for one in found for row in one.rows}
    lines += [
        (name, *["-"] * 6, f"{NOT_RUN}: no such plugin or hardware; with its result named as not enforced", "-")
        for name in sorted(UNSEEN_TYPES - types)
    ]
    table = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *lines)]
    runs = [
        f"- {one.label}: `{one.release}`, commit {one.commit}, {one.date}"
        + "".join(f"; {why}" for why in dict.fromkeys(row["why"] for row in one.rows if row["why"]))
        for one in found
    ]
    tests = "    pytest tests/netns/test_networks.py tests/unit/test_agent_assignments.py tests/unit/test_agent_cni.py"
    return "\n".join([HEAD, *table, "", "## Where it was run", "", *runs, "", tests]) + "\n"


def _cell(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def run_here() -> Ran:
    """Run the tests on this machine's kernel. Raises PlatformError if one fails."""
    done = subprocess.run([sys.executable, "-c", RUN], cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise PlatformError(f"the tests of networks failed here:\n{done.stderr[-4000:]}")
    return Ran(
        platform.release(), guest=False, date=today(), commit=current_commit(), rows=json.loads(done.stdout)["rows"]
    )


def run_in(name: str) -> Ran:
    """Run the tests in a guest with this kernel. Raises PlatformError if one fails."""
    with tempfile.TemporaryDirectory(prefix="netpol-networks-") as scratch:
        result = run_kernel(kernels.find(name), prepare(Path(scratch)), print, steps=(STEP,))
    if not result.is_ok:
        raise PlatformError(f"the tests of networks failed on {name}: {result.failure or 'see above'}")
    rows = result.steps[STEP]["result"]["rows"]
    return Ran(result.release, guest=True, date=result.date, commit=result.commit, rows=rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and write; with --check, only report whether the page is fresh."""
    parser = argparse.ArgumentParser(prog="python -m tests.netns.networks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=", ".join(kernels.NAMES))
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--write", action="store_true", help="run the tests here and with these kernels, write the page")
    group.add_argument("--check", action="store_true", help="run nothing; exit code 1 when the page is stale")
    options = parser.parse_args(argv)
    try:
        if options.write:
            keep(run_here())
            for name in options.kernels:
                keep(run_in(name))
            PAGE.write_text(render(read_record()), encoding="utf-8")
            return 0
        text = render(read_record())
    except NetpolError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.relative_to(ROOT)} is stale: run python -m tests.netns.networks --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
