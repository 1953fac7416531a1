# SPDX-License-Identifier: Apache-2.0
"""Measure connections: throughput, rates, latency and processor time, beside other ways to enforce the same policies.

    sudo .venv/bin/python -m bench.end_to_end [--rounds 5] [--rules 10,100,1000,10000] [-o FILE]

The traffic goes from a pod through a node to a pod (network namespaces, veth, routed). The contenders are: nothing
attached; an empty tcx program at the hooks of our programs; our programs; nftables and iptables with ipset, each in two
forms (`bench/netfilter.py`). All enforce the same policies (`bench/policies.py`), and `bench/verdicts.py` checks that
they give the same verdicts before anything is timed. In each of the following rounds, every contender runs every load
once, in an order that rotates from round to round.

With two machines, run on the other one

    .venv/bin/python -m bench.end_to_end --serve 192.0.2.1

and on this one, with a network card that has no other use and an address that is free in that network,

    sudo .venv/bin/python -m bench.end_to_end --peer 192.0.2.1 --device eth1 --address 192.0.2.77

The measured pod is then on this machine, behind its node. Its egress policy decides whether it reaches the other
machine.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Address
from pathlib import Path

from bench import loads, verdicts
from bench.loads import LOADS, Figure, Load, Traffic
from bench.progress import Progress
from bench.record import Case, Run, begin, case_id, save, this_command
from bench.site import (
    EMPTY,
    IPTABLES_RULES,
    IPTABLES_SET,
    MEASURED_ADDRESS,
    NFT_MAP,
    NFT_RULES,
    NOTHING,
    OURS,
    OURS_BARRIER,
    OURS_CLSACT,
    PEER_ADDRESS,
    Card,
    Contender,
    Remote,
    Scenario,
    Site,
    sites,
)
from netpol_ebpf.ending import ended_by_signals
from netpol_ebpf.errors import NetpolError, UsageError
from netpol_ebpf.policy.types import Direction

SUITE = "end to end"
RULES = (10, 100, 1000, 10_000)
NEEDS: Mapping[str, Sequence[str]] = {
    NFT_RULES: ("nft",),
    NFT_MAP: ("nft",),
    IPTABLES_RULES: ("iptables-restore", "ipset"),
    IPTABLES_SET: ("iptables-restore", "ipset"),
}
Key = tuple[str, Contender, str, str, bool]
"""(load and figure, contender, unit, `Case.better`, `Case.judged`)."""


def contenders_for(sizes: Sequence[int]) -> list[Contender]:
    """All contenders. The folded forms walk no rules, so they are measured only with the fewest and the most rules."""
    ends = sorted({min(sizes), max(sizes)})
    found = [Contender(NOTHING), Contender(EMPTY)]
    found += [Contender(kind, size) for kind in (OURS, NFT_RULES, IPTABLES_RULES) for size in sizes]
    found += [Contender(kind, size) for kind in (OURS_CLSACT, OURS_BARRIER, NFT_MAP, IPTABLES_SET) for size in ends]
    return found


def measured_by(load: Load, contender: Contender, sizes: Sequence[int], *, everything: bool) -> bool:
    """Whether a load is measured for a contender.

    Rules cost time when a connection is opened, so opening is measured for all contenders. A packet of an open
    connection passes every contender without a look at its rules. So this load is measured only for the fewest and the
    most rules, and not for the folded forms.
    """
    if everything or load is loads.CONNECTS or not contender.rules:
        return True
    return contender.rules in (min(sizes), max(sizes)) and contender.kind not in (NFT_MAP, IPTABLES_SET)


def run_suite(
    run: Run, *, rounds: int, seconds: float, sizes: Sequence[int], chosen: Sequence[Load] = LOADS,
    kinds: Sequence[str] | None = None, remote: Remote | None = None, everything: bool = False,
) -> None:  # fmt: skip
    """Measure, and add the cases to the run. Raises NetpolError if a contender does not enforce the policies."""
    listed = [one for one in contenders_for(sizes) if kinds is None or one.kind in kinds]
    listed = _present(run, listed)
    usable = _present_loads(run, chosen)
    direction = Direction.INGRESS if remote is None else Direction.EGRESS
    own = PEER_ADDRESS if remote is None else remote.peer
    measured = MEASURED_ADDRESS if remote is None else remote.address
    bare = Scenario(direction, measured, (own,))
    wanted = sorted({one.rules for one in listed if one.rules})
    local = Scenario(direction, measured, verdicts.choose_peers(bare, wanted, own))
    examination = verdicts.Examination(local, wanted)

    progress = Progress("setting up", len(listed))
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(sites(listed, local, lambda one: progress.step(str(one))))
        progress.end()
        _examine(run, examination, made)
        if remote is not None:
            stack.pop_all().close()
            away = Scenario(direction, measured, local.peers, remote)
            made = stack.enter_context(sites(listed, away, lambda _: None))
        tools = stack.enter_context(loads.workshop())
        card = stack.enter_context(Card(remote)) if remote is not None else None
        samples = _measure(made, usable, sizes, rounds, seconds, tools, card, everything=everything)
    _record(run, samples)


def _examine(run: Run, examination: verdicts.Examination, made: Mapping[Contender, Site]) -> None:
    progress = Progress("comparing verdicts", len(made))
    counts = {}
    for contender, site in made.items():
        progress.step(str(contender))
        counts[contender] = examination.examine(site)
        site.borrow_addresses(allowed=False)
    progress.end()
    run.notes.append(verdicts.describe(counts))


def _measure(
    made: Mapping[Contender, Site], usable: Sequence[Load], sizes: Sequence[int], rounds: int, seconds: float,
    tools: Path, card: Card | None, *, everything: bool,
) -> dict[Key, list[float]]:  # fmt: skip
    """Measure all rounds.

    Each round begins with another contender, and runs the loads one by one for all contenders.
    """
    traffic = {contender: Traffic(site, tools) for contender, site in made.items()}
    plan = {load: [one for one in made if measured_by(load, one, sizes, everything=everything)] for load in usable}
    samples: dict[Key, list[float]] = {}
    progress = Progress("measuring", rounds * sum(len(listed) for listed in plan.values()))
    for turn in range(rounds):
        for load, listed in plan.items():
            shift = turn * len(listed) // rounds
            for contender in [*listed[shift:], *listed[:shift]]:
                progress.step(f"round {turn + 1}: {load.name}: {contender}")
                if card is not None:
                    card.move_to(made[contender])
                for figure in traffic[contender].measure(load, seconds):
                    samples.setdefault(_key(load, contender, figure), []).append(figure.value)
    progress.end()
    return samples


def _key(load: Load, contender: Contender, figure: Figure) -> Key:
    name = f"{load.name}: {figure.name}" if figure.name else load.name
    return (name, contender, figure.unit, figure.better, figure.judged)


def _record(run: Run, samples: Mapping[Key, Sequence[float]]) -> None:
    for (name, contender, unit, better, judged), values in samples.items():
        parameters = {"rules": contender.rules} if contender.rules else {}
        base = "" if contender.kind == NOTHING else case_id(SUITE, name, NOTHING)
        run.cases.append(
            Case(SUITE, name, contender.kind, unit, better, tuple(values), parameters, base, judged=judged)
        )


def _present(run: Run, listed: Sequence[Contender]) -> list[Contender]:
    """The contenders that have all their tools. A note names the others."""
    missing = {kind: tool for kind, tools in NEEDS.items() for tool in tools if shutil.which(tool) is None}
    for kind in sorted({one.kind for one in listed} & missing.keys()):
        run.notes.append(f"not measured: {kind}: {missing[kind]} is not installed")
    return [one for one in listed if one.kind not in missing]


def _present_loads(run: Run, chosen: Sequence[Load]) -> list[Load]:
    for load in chosen:
        if shutil.which(load.tool) is None:
            run.notes.append(f"not measured: {load.name}: {load.tool} is not installed")
    return [load for load in chosen if shutil.which(load.tool) is not None]


def serve(address: IPv4Address) -> None:
    """Run the servers of the tools on the other machine, until Ctrl-C."""
    with loads.workshop() as tools:
        commands = loads.servers(address, tools).values()
        running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
        try:
            print(f"serving on {address}; Ctrl-C ends it", file=sys.stderr)
            for process in running:
                process.wait()
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose what is measured."""
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--rules", default=",".join(map(str, RULES)), help="numbers of rules, by commas")
    parser.add_argument("--loads", default="", help="names of loads, by semicolons; without it all")
    parser.add_argument("--contenders", default="", help="names of contenders, by semicolons; without it all")
    parser.add_argument("--everything", action="store_true", help="every load for every contender; takes long")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("--serve", type=IPv4Address, metavar="ADDRESS", help="be the other machine")
    parser.add_argument("--peer", type=IPv4Address, metavar="ADDRESS", help="the other machine")
    parser.add_argument("--device", help="the card towards it; it is taken away for the time of the measurement")
    parser.add_argument("--address", type=IPv4Address, help="a free address there, for the measured pod")
    parser.add_argument("-o", "--output", type=Path, default=Path("end_to_end.json"))
    options = parser.parse_args(argv)
    if options.serve is not None:
        with contextlib.suppress(KeyboardInterrupt):
            serve(options.serve)
        return 0
    given = (options.peer, options.device, options.address)
    if any(given) and not all(given):
        raise UsageError("a run between two machines needs all of --peer, --device and --address")
    remote = Remote(options.peer, options.device, options.address) if all(given) else None
    run = begin(this_command())
    began = time.monotonic()
    run_suite(
        run,
        rounds=options.rounds,
        seconds=options.seconds,
        sizes=[int(one) for one in options.rules.split(",")],
        chosen=choose(options.loads, {load.name: load for load in LOADS}) or LOADS,
        kinds=[one.strip() for one in options.contenders.split(";")] if options.contenders else None,
        remote=remote,
        everything=options.everything,
    )
    run.seconds = round(time.monotonic() - began, 1)
    save(run, options.output)
    print(f"{len(run.cases)} cases in {options.output}", file=sys.stderr)
    return 0


def choose(text: str, known: Mapping[str, Load]) -> list[Load]:
    """Parse a list of loads. Raises UsageError for an unknown load."""
    names = [one.strip() for one in text.split(";") if one.strip()]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"no such load: {unknown[0]}; there are: {'; '.join(known)}")
    return [known[name] for name in names]


def ended_by(main_function: Callable[[], int]) -> int:
    """Run a program of this directory.

    An error becomes one line and the exit code; after SIGTERM everything is removed.
    """
    try:
        with ended_by_signals():
            return main_function()
    except NetpolError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(ended_by(main))
