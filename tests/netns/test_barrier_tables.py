# SPDX-License-Identifier: Apache-2.0
"""The tables of the second barrier in a network namespace: as `nft` lists them, and after changes by other programs."""

from __future__ import annotations

import ctypes
import select
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import TypeVar

import pytest

from netpol_loader.host import nftables
from netpol_loader.host.barrier import BarrierSpec, BarrierTables, HeldError, Marks, TakenError, without_sign

pytestmark = pytest.mark.netns

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
OWNER = "/sys/fs/bpf/somewhere"
MARKS = Marks(0x20, 0x40, 0x10)
WHOLE = BarrierSpec(MARKS, 0, ("cali*", "tap0"), frozenset({"cali1", "cali2"}), frozenset({1}))
PLAIN = BarrierSpec(MARKS, workloads=frozenset({"cali1"}))

EXPECTED = """\
table inet np_barrier {
counter unsigned {
}
counter newborn {
}
counter due {
}
set workloads {
type ifname
counter
elements = { "cali1" counter,
"cali2" counter }
}
set known {
type iface_index
counter
elements = { "lo" counter }
}
chain prerouting {
type filter hook prerouting priority -450; policy accept;
meta mark & 0x00000020 == 0x00000020 meta mark set meta mark & 0xffffffdf accept
iifname @workloads counter name "unsigned" drop
iifname "cali*" iif != @known counter name "unsigned" drop
iifname "tap0" iif != @known counter name "unsigned" drop
}
chain postrouting {
type filter hook postrouting priority 250; policy accept;
oifname "cali*" oif != @known meta mark & 0x00000040 == 0x00000000 counter name "newborn" drop
oifname "tap0" oif != @known meta mark & 0x00000040 == 0x00000000 counter name "newborn" drop
}
chain input {
type filter hook input priority 225; policy accept;
meta mark & 0x00000010 != 0x00000000 counter name "due" drop
}
chain output {
type filter hook output priority 300; policy accept;
meta mark set meta mark | 0x00000040
}
}
"""


class Namespace:
    """A thread in a new network namespace. Processes that it starts are in that namespace, too."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, initializer=self._enter)

    @staticmethod
    def _enter() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare")

    def do(self, work: Callable[[], T]) -> T:
        """Call a function in the namespace."""
        return self._thread.submit(work).result()

    def nft(self, *arguments: str, check: bool = True) -> str:
        """Run nft in the namespace. Returns its output."""
        return self.do(lambda: subprocess.run(["nft", *arguments], check=check, capture_output=True, text=True)).stdout

    def close(self) -> None:
        """End the thread. The kernel removes the namespace with its last socket."""
        self._thread.shutdown()


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with closing(Namespace()) as one:
        yield one


def tables(stack: ExitStack, namespace: Namespace, owner: str = OWNER, *, is_held: bool = True) -> BarrierTables:
    """The tables of an owner. ``is_held`` False: as before Linux 6.9, other processes can change them."""
    one = stack.enter_context(closing(BarrierTables(owner)))
    namespace.do(one.open)
    if not is_held:
        one._flags = 0
        one._news = namespace.do(nftables.TableNotifications)
    elif not one.is_held:
        pytest.skip("this kernel has no tables that outlive their owner (6.9)")
    return one


def listed(namespace: Namespace) -> list[str]:
    """Both tables as nft lists them."""
    return [namespace.nft("-s", "list", "table", family, "np_barrier") for family in ("inet", "bridge")]


def wheres(found: list[object]) -> list[str]:
    return [f"{one.where} {one.was}" for one in found]  # type: ignore[attr-defined]


def test_nft_reads_what_was_meant(namespace: Namespace) -> None:
    """The output of nft has exactly the intended rules. In the bridge table, ARP to a new interface passes."""
    with ExitStack() as stack:
        one = tables(stack, namespace, is_held=False)
        namespace.do(lambda: one.write(WHOLE))
        lines = [line.strip() for line in namespace.nft("-s", "list", "table", "inet", "np_barrier").splitlines()]
        lines = [line.split(" comment ")[0] for line in lines if line and not line.startswith("comment")]
        assert "\n".join(lines) + "\n" == EXPECTED
        bridge = namespace.nft("-s", "list", "table", "bridge", "np_barrier")
        assert 'meta protocol != arp counter name "newborn" drop' in bridge
        assert "hook input" not in bridge
        namespace.do(lambda: one.write(without_sign(WHOLE)))
        assert "prerouting" not in namespace.nft("list", "ruleset")


def test_only_what_differs_is_written(namespace: Namespace) -> None:
    """A changed name changes nothing else. Counters are kept even if a table is written anew."""
    with ExitStack() as stack:
        one = tables(stack, namespace, is_held=False)
        namespace.do(lambda: one.write(PLAIN))
        assert not namespace.do(one.has_changed)
        assert namespace.do(lambda: one.write(PLAIN)) == []
        other = BarrierSpec(MARKS, workloads=frozenset({"cali2"}))
        found = namespace.do(lambda: one.write(other))
        assert wheres(found) == [f"set workloads of table {name} np_barrier changed" for name in one.families]
        assert namespace.do(one.members)[0] == {"cali2"}
        with closing(namespace.do(nftables.Nftables)) as channel:
            namespace.do(lambda: channel.commit([nftables.delete_table(nftables.INET, "np_barrier")]))
            made = [
                nftables.new_table(nftables.INET, "np_barrier", 0, "netpol-ebpf " + OWNER),
                nftables.new_counter(nftables.INET, "np_barrier", "unsigned", 7, 700),
            ]
            namespace.do(lambda: channel.commit(made))
        namespace.do(lambda: one.write(other))
        assert namespace.do(one.unsigned) == 7
        assert namespace.do(one.counts).by_counter["unsigned"]["inet"] == 7


def test_what_nobody_else_changed_is_not_read_again(namespace: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without other changes, names are written without reading.

    After any change by another process, everything is compared.
    """
    with ExitStack() as stack:
        one = tables(stack, namespace, is_held=False)
        namespace.do(lambda: one.write(PLAIN))
        reads = []
        read = one._read
        monkeypatch.setattr(one, "_read", lambda: reads.append(1) or read())
        other = BarrierSpec(MARKS, workloads=frozenset({"cali2", "cali3"}))
        found = namespace.do(lambda: one.write(other))
        assert wheres(found) == [f"set workloads of table {name} np_barrier changed" for name in one.families]
        assert namespace.do(lambda: one.write(other)) == []
        assert not reads
        assert namespace.do(one.members)[0] == {"cali2", "cali3"}
        reads.clear()
        namespace.nft("delete", "element", "inet", "np_barrier", "workloads", "{ cali3 }")
        namespace.do(lambda: one.write(PLAIN))
        assert reads
        assert namespace.do(one.members)[0] == PLAIN.workloads
        reads.clear()
        namespace.do(lambda: one.write(without_sign(PLAIN)))
        assert reads, "more than the names changes"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("flush ruleset", "table inet np_barrier missing"),
        ("delete table bridge np_barrier", "table bridge np_barrier missing"),
        ("insert rule inet np_barrier prerouting accept", "chain prerouting of table inet np_barrier changed"),
        ("flush chain inet np_barrier input", "chain input of table inet np_barrier changed"),
        ("add chain inet np_barrier more", "chain more of table inet np_barrier foreign"),
        ("delete element inet np_barrier workloads { cali1 }", "set workloads of table inet np_barrier changed"),
        ("add element bridge np_barrier workloads { eth0 }", "set workloads of table bridge np_barrier changed"),
        ("add table inet np_barrier { flags dormant ; }", "table inet np_barrier changed"),
    ],
)
def test_what_others_change_is_news_and_is_put_back(namespace: Namespace, change: str, told: str) -> None:
    """If the kernel does not prevent a change by another process, it is noticed and reverted."""
    with ExitStack() as stack:
        one = tables(stack, namespace, is_held=False)
        namespace.do(lambda: one.write(PLAIN))
        before = listed(namespace)
        one.has_news()
        assert not one.has_news()
        namespace.nft(change)
        fd = one.fileno()
        assert fd is not None
        assert select.select([fd], [], [], 10.0)[0]
        one.note_news()
        assert one.has_news()
        assert not one.has_news()
        assert namespace.do(one.has_changed)
        assert told in wheres(namespace.do(lambda: one.write(PLAIN)))
        assert listed(namespace) == before
        assert not namespace.do(one.has_changed)


def test_what_is_held_nobody_changes(namespace: Namespace) -> None:
    """Neither a flush of everything nor a command with its name changes it.

    After its owner's end it stays, and the next owner takes it over.
    """
    with ExitStack() as stack:
        first = tables(stack, namespace)
        namespace.do(lambda: first.write(PLAIN))
        before = namespace.nft("-s", "list", "ruleset")
        namespace.nft("flush", "ruleset")
        namespace.nft("delete", "table", "inet", "np_barrier", check=False)
        assert namespace.nft("-s", "list", "ruleset") == before
        second = tables(stack, namespace)
        with pytest.raises(HeldError, match="held by a process"):
            namespace.do(lambda: second.write(PLAIN))
        first.close()
        assert namespace.do(lambda: second.write(PLAIN)) == []
        namespace.nft("flush", "ruleset")
        assert namespace.nft("-s", "list", "ruleset") == before
        second.close()
        namespace.nft("flush", "ruleset")
        assert namespace.nft("list", "ruleset") == ""


@pytest.mark.parametrize("owner", ['comment "netpol-ebpf /elsewhere" ;', 'comment "firewall" ;', ""])
def test_what_is_somebody_elses_is_not_touched(namespace: Namespace, owner: str) -> None:
    """The table of another owner is neither written nor removed."""
    with ExitStack() as stack:
        namespace.nft(f"add table bridge np_barrier {{ {owner} }}")
        before = namespace.nft("list", "ruleset")
        one = tables(stack, namespace, is_held=False)
        for work in (lambda: one.write(PLAIN), one.present, lambda: one.remove("bridge"), one.members):
            with pytest.raises(TakenError, match="another owner"):
                namespace.do(work)
        assert namespace.nft("list", "ruleset") == before


def test_removal_takes_what_is_ours(namespace: Namespace) -> None:
    """Each family's table is removed. A missing table is no error."""
    with ExitStack() as stack:
        one = tables(stack, namespace, is_held=False)
        namespace.do(lambda: one.write(WHOLE))
        namespace.nft("add table ip other")
        assert namespace.do(one.present) == ["inet", "bridge"]
        for family in ("inet", "bridge", "bridge"):
            namespace.do(lambda family=family: one.remove(family))  # type: ignore[misc]
        assert namespace.do(one.present) == []
        assert namespace.nft("list", "tables") == "table ip other\n"


def test_thousands_of_interfaces(namespace: Namespace) -> None:
    """There are more elements than fit into one message, or into a socket's default buffer."""
    names = frozenset(f"cali{number:011x}" for number in range(3000))
    with ExitStack() as stack:
        one = tables(stack, namespace, is_held=False)
        namespace.do(lambda: one.write(BarrierSpec(MARKS, 0, ("cali*",), names, frozenset(range(1, 3001)))))
        found = namespace.do(one.members)
        assert (found[0], len(found[1])) == (names, 3000)
