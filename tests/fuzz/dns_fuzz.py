# SPDX-License-Identifier: Apache-2.0
"""Send random DNS exchanges through the loaded programs and through dnspython; print the first one that differs.

    python -m tests.fuzz.dns_fuzz [--seconds 60 | --messages N] [--seed N] [--first EXCHANGE]

Needs root and bpffs, but no interface. Exit code 1: a difference.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from ipaddress import ip_address
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernel"), str(HERE.parents[1]), str(HERE.parents[1] / "loader")]

import dns.name  # noqa: E402  # the same
import dns_messages as d  # noqa: E402  # the path comes first
import packets as p  # noqa: E402  # the same
from dns_generate import PATTERNS, Exchange, exchange  # noqa: E402  # the same
from dns_oracle import REFUSED, Lesson, class_of, expected  # noqa: E402  # the same
from dns_scene import DnsScene, answer, question, stream_answer, stream_question  # noqa: E402  # the same
from rig import ELSEWHERE, ENDPOINT, POD4, POD6, Rig  # noqa: E402  # the same

from netpol_loader.kernel.hook import Hook  # noqa: E402  # the same
from netpol_loader.pins.dataplane import Dataplane  # noqa: E402  # the same

SIZES = {
    "np_endpoint": 16, "np_addr4": 64, "np_addr6": 64, "np_cidr4": 64, "np_cidr6": 64, "np_peer_class": 256,
    "np_l4_col": 256, "np_verdict": 1024, "np_rule": 16, "np_rule_count": 512, "np_conn4": 4096, "np_conn6": 4096,
    "np_frag4": 64, "np_frag6": 64, "np_log_limit": 16, "np_event": 65536, "np_learned4": 4096, "np_learned6": 4096,
    "np_name": 64, "np_unlearned4": 64, "np_unlearned6": 64, "np_domain": 64,
}  # fmt: skip
SLACK_S = 2.0
RENEWED = 20
"""Exchanges between two renewals of the endpoint's tokens."""


class DnsFuzz:
    """Both sides. ``messages``: number of answers that were compared; ``seen``: what they taught, by kind."""

    def __init__(self, dataplane: Dataplane) -> None:
        rig = Rig(dataplane)
        rig.reset()
        self.scene = DnsScene(rig)
        self.messages = 0
        self.seen: Counter[str] = Counter()
        names = rig.map("np_name")
        names.delete_many([key for key, _ in names.items()])
        for text, number in PATTERNS.items():
            self.scene.pattern(text, number)
            bare = text.removeprefix("*.")
            if bare not in PATTERNS:  # otherwise the wildcard's row would match the bare name
                self.scene.pattern(bare, class_of(dns.name.from_text(bare)))
        for net in REFUSED:
            if str(net) != "::ffff:0:0/96":  # the program itself refuses these
                self.scene.refuse(str(net))
        for client in (POD4, POD6):
            rig.out(stream_question(b"", client=client, flags=p.SYN))
            rig.into(stream_answer(b"", client=client, flags=p.SYN | p.ACK))

    def close(self) -> None:
        """Close the readers."""
        self.scene.close()
        self.scene.rig.reader.close()

    def difference(self, number: int, one: Exchange) -> str | None:
        """Run one exchange through both. Returns what differs, or None."""
        self._start(number)
        client = POD6 if number % 3 == 0 else POD4
        dataplane = self.scene.rig.dataplane
        if one.stream:
            frames = [stream_question(d.prefixed(*one.asked), client=client)]
            replies = [stream_answer(d.prefixed(*one.messages) + one.tail, client=client)]
        else:
            frames = [question(message, client=client) for message in one.asked]
            replies = [answer(message, client=client) for message in one.messages]
        for frame in frames:
            dataplane.test_run(Hook.TC_INGRESS, frame)
        verdicts = [dataplane.test_run(Hook.TC_EGRESS, frame, ingress_ifindex=ELSEWHERE).passed for frame in replies]
        self.messages += len(one.messages)
        lesson = expected(one)
        if not all(verdicts):
            return "an answer was dropped"
        return self._compare(lesson)

    def _start(self, number: int) -> None:
        for name in ("np_learned4", "np_learned6"):
            rows = self.scene.rig.map(name)
            rows.delete_many([key for key, _ in rows.items()])
        if number % RENEWED == 0:
            self.scene.asks()

    def _compare(self, lesson: Lesson) -> str | None:
        learned = {
            str(ip_address(address)): classes for (number, address), classes in self.scene.learned().items()
            if number == ENDPOINT
        }  # fmt: skip
        reports = self.scene.take_reports()
        self.seen["learned" if learned else "reported" if reports else "nothing"] += 1
        lives = {address: ways.used() for address, ways in lesson.rows.items()}
        if {one: set(classes) for one, classes in learned.items()} != {
            one: set(classes) for one, classes in lives.items()
        }:
            return f"learned {learned}, and not {lives}"
        for address, classes in lives.items():
            for number, seconds in classes.items():
                if abs(learned[address][number] - seconds) > SLACK_S:
                    return f"{address} lives {learned[address][number]} s under class {number}, and not {seconds} s"
        if reports != lesson.reports:
            return f"reported {reports}, and not {lesson.reports}"
        return None


def main() -> int:
    """Run exchanges until the time is over or two answers differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.dns_fuzz", description=(__doc__ or "").splitlines()[0])
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    limit.add_argument("--messages", type=int, help="how many answers, instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first exchange: repeats a failure")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the working memory is per CPU
    dataplane = Dataplane.open(Path(f"/sys/fs/bpf/netpol-dns-fuzz-{os.getpid()}"), sizes=SIZES)
    try:
        fuzz = DnsFuzz(dataplane)
        try:
            return _run(fuzz, arguments)
        finally:
            fuzz.close()
    finally:
        dataplane.remove()


def _run(fuzz: DnsFuzz, arguments: argparse.Namespace) -> int:
    began, number = time.monotonic(), arguments.first
    while True:
        seconds = time.monotonic() - began
        if fuzz.messages >= arguments.messages if arguments.messages is not None else seconds >= arguments.seconds:
            break
        one = exchange(arguments.seed, number)
        found = fuzz.difference(number, one)
        if found is not None:
            print(f"seed {arguments.seed} exchange {number}: {found}")
            for message in one.asked:
                print(f"  asked    {message.hex()}")
            for message in one.messages:
                print(f"  answered {message.hex()}")
            return 1
        number += 1
    print(
        f"{fuzz.messages} answers, exchanges {arguments.first} to {number - 1} of seed {arguments.seed}, {seconds:.1f} s: "
        f"no difference ({', '.join(f'{count} {what}' for what, count in fuzz.seen.most_common())})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
