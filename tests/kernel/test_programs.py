# SPDX-License-Identifier: Apache-2.0
"""The program set: how much the verifier walks, what a missing program does, and one compiled file on any node."""

from __future__ import annotations

import os
import platform
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import packets as p
import pytest
from map_sizes import SIZES
from rig import ALLOW, DENY, PEER4, PEER6, POD4, POD6, Rig, everything

from netpol_ebpf.errors import LoadError
from netpol_loader import abi
from netpol_loader.kernel import relocation, syscall
from netpol_loader.kernel.facts import KernelFacts
from netpol_loader.pins import build
from netpol_loader.pins.compilation import PROGRAMS, compile_program
from netpol_loader.pins.compiled import decode_compiled
from netpol_loader.pins.dataplane import Dataplane
from netpol_loader.pins.programs import ProgramSet

ROOT = Path(__file__).resolve().parents[2]
FACTS = KernelFacts({3: 5}, cast_function=77)
MOST_VERIFIED = 250_000
"""The limit for one program; the kernel allows a million, and another kernel or compiler may need twice as much."""


def test_no_program_is_walked_too_long(dataplane: Dataplane) -> None:
    """Every program of the product leaves the verifier room on the kernels and compilers to come."""
    verified = {name: syscall.prog_info(fd).verified for name, fd in dataplane.programs.programs()}
    assert set(verified) == set(PROGRAMS)
    if not all(verified.values()):
        pytest.skip("this kernel does not tell how many instructions the verifier walked (it does from 5.16 on)")
    assert {name: count for name, count in verified.items() if count > MOST_VERIFIED} == {}


@pytest.fixture
def emptied(rig: Rig) -> Iterator[Rig]:
    """A pod with full access, and a program array from which a test may remove programs."""
    rig.pod(everything(1, ALLOW, 11), everything(2, ALLOW, 12))
    yield rig
    assert set(rig.dataplane.programs.mend_calls()) <= set(abi.CALLS.values())
    assert rig.dataplane.programs.mend_calls() == []


@pytest.mark.parametrize(("pod", "peer"), [(POD4, PEER4), (POD6, PEER6)], ids=["IPv4", "IPv6"])
def test_a_missing_program_drops_new_flows_and_is_counted(emptied: Rig, pod: str, peer: str) -> None:
    """A failed tail call drops with a reason and an event; packets of an established connection need no call and pass."""
    opening, answer = p.frame(pod, peer, p.UDP, p.udp(1000, 53)), p.frame(peer, pod, p.UDP, p.udp(53, 1000))
    assert emptied.out(opening).reason == "policy-allow"
    assert emptied.into(answer).reason == "established"
    assert emptied.dataplane.programs.calls.delete(struct.pack("=I", abi.NP_CALL_JUDGE))
    emptied.forget_flow_cache()
    assert emptied.out(opening).reason == "established"
    seen = emptied.out(p.frame(pod, peer, p.UDP, p.udp(1001, 53)))
    assert (seen.passed, seen.reason) == (False, "call-missing")
    assert [event.reason for event in seen.events] == [abi.NP_REASON_CALL_MISSING]


def test_a_missing_program_for_senders_drops(emptied: Rig) -> None:
    """A packet with a sender tag is dropped without np_tc_sender."""
    emptied.defer()
    assert emptied.dataplane.programs.calls.delete(struct.pack("=I", abi.NP_CALL_SENDER))
    emptied.endpoint(everything(3, ALLOW, 13), everything(4, ALLOW, 14), number=9, ifindex=2)
    emptied.epoch()
    seen = emptied.into(p.frame(PEER4, POD4, p.UDP, p.udp(1, 2)), carries=9)
    assert (seen.passed, seen.reason) == (False, "call-missing")


def test_sets_never_call_each_other(dataplane: Dataplane) -> None:
    """A second set on the same maps has its own program array, so emptying the first one's does not affect it."""
    second = ProgramSet.load(build.compiled_program(), dataplane.pinned)
    try:
        assert syscall.map_info(second.calls.fd).id != syscall.map_info(dataplane.programs.calls.fd).id
        ids = {syscall.prog_info(fd).id for _, fd in second.programs()}
        assert not ids & {syscall.prog_info(fd).id for _, fd in dataplane.programs.programs()}
        called = {struct.unpack("=I", second.calls.get(struct.pack("=I", slot)) or b"")[0] for slot in abi.CALLS}
        assert called == {syscall.prog_info(fd).id for fd in second.called.values()}
    finally:
        second.close()


@pytest.mark.parametrize("cpus", [2, 512])
@pytest.mark.parametrize("scale", [1, 16])
def test_one_file_serves_any_number_of_processors_and_any_size(
    cpus: int, scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same compiled file judges and records on any number of CPUs and sizes of maps."""
    root = Path(f"/sys/fs/bpf/netpol-any-{os.getpid()}-{cpus}-{scale}")
    before = build.compiled_program()
    monkeypatch.setattr(relocation, "possible_cpus", lambda: cpus)
    monkeypatch.setattr(build, "possible_cpus", lambda: cpus)
    sizes = {
        **SIZES,
        "np_flow_cache4": 1024 * scale,
        "np_flow_cache6": 512 * scale,
        "np_addr4": 100 * scale,
        "np_ep_cache": 3 * scale,
    }
    with Dataplane.open(root, sizes=sizes) as dataplane:
        try:
            assert build.compiled_program() == before
            recent = syscall.map_info(dataplane.maps["np_flow_cache4"].fd)
            assert relocation.mask_of(recent) + 1 == max(1024 * scale // cpus, 1)
            rig = Rig(dataplane)
            rig.pod(everything(1, DENY, 11), everything(2, ALLOW, 12))
            for pod, peer in ((POD4, PEER4), (POD6, PEER6)):
                for port in range(40):
                    frame = p.frame(pod, peer, p.UDP, p.udp(1000 + port, 53))
                    assert [rig.out(frame).reason for _ in range(2)] == ["policy-allow", "established"]
                    assert rig.into(p.frame(peer, pod, p.UDP, p.udp(53, 1000 + port))).reason == "established"
                assert rig.into(p.frame(peer, pod, p.UDP, p.udp(53, 999))).reason == "policy-deny"
            rig.reader.close()
        finally:
            dataplane.remove()


def test_masks_follow_from_the_kernels_sizes() -> None:
    """A bucketed table's size is in rows, its mask in buckets; a number that is no power of two is rejected."""
    fds = {size: syscall.map_create("array", "np_try", 4, 8, size) for size in (1, 8, 12)}
    try:
        assert [relocation.mask_of(syscall.map_info(fds[size])) for size in (1, 8)] == [0, 7]
        with pytest.raises(LoadError, match="np_try has 12 entries; a power of two is needed"):
            relocation.mask_of(syscall.map_info(fds[12]))
    finally:
        for fd in fds.values():
            os.close(fd)


def test_an_instruction_that_names_no_map_is_refused() -> None:
    """An instruction with an unknown map or kind of load is never handed to the kernel."""
    one = syscall.map_create("array", "np_try", 4, 8, 1)
    wide = relocation.INSTRUCTION.pack(
        relocation.LOAD_IMMEDIATE_64, relocation.packed(relocation.LOADS_MAP, 1), 0, 3
    ) + bytes(8)
    odd = relocation.INSTRUCTION.pack(relocation.LOAD_IMMEDIATE_64, relocation.packed(7, 1), 0, 0) + bytes(8)
    try:
        with pytest.raises(LoadError, match="names map 3, which was not made"):
            relocation.link(wide, ("np_a", "np_b"), {"np_a": one}, FACTS)
        with pytest.raises(LoadError, match="unknown kind 7"):
            relocation.link(odd, (), {}, FACTS)
        fact = relocation.INSTRUCTION.pack(
            relocation.LOAD_IMMEDIATE_64, relocation.packed(abi.NP_LOADS_FACT, 1), 0, 4
        ) + bytes(8)
        with pytest.raises(LoadError, match="unknown fact 4"):
            relocation.link(fact, (), {}, FACTS)
    finally:
        os.close(one)


def test_facts_of_the_kernel_are_put_in() -> None:
    """The loader fills in facts and the call of the kernel function; without that function the call is unreachable."""
    fact = relocation.INSTRUCTION.pack(
        relocation.LOAD_IMMEDIATE_64, relocation.packed(abi.NP_LOADS_FACT, 1), 0, 3
    ) + bytes(8)
    call = relocation.INSTRUCTION.pack(relocation.CALL, 0, 0, abi.NP_CALLS_CAST)
    put = relocation.INSTRUCTION.pack(relocation.LOAD_IMMEDIATE_64, relocation.packed(0, 1), 0, 5) + bytes(8)
    made = relocation.INSTRUCTION.pack(relocation.CALL, relocation.packed(relocation.CALLS_KERNEL, 0), 0, 77)
    assert relocation.link(fact + call, (), {}, FACTS) == put + made
    assert relocation.link(call, (), {}, KernelFacts({}, 0)) == call


def test_maps_have_the_field_names_of_the_headers(dataplane: Dataplane) -> None:
    """The kernel knows every map's types, and they are those of the declarations."""
    from netpol_loader.kernel import btf

    for name, spec in abi.MAP_SPECS.items():
        if spec.value is not None:
            found = btf.layouts(syscall.map_info(syscall.obj_get(dataplane.pin_dir / name)))
            assert found == (btf.declared(spec.key), btf.declared(spec.value)), name


def test_bpftool_prints_rule_names_as_text(rig: Rig) -> None:
    """`bpftool map dump` prints names, not bytes."""
    rig.map("np_rule").put(struct.pack("=I", 7), b"default|some|rule".ljust(abi.NP_RULE_NAME_BYTES, b"\0"))
    dump = ["bpftool", "map", "dump", "pinned", str(rig.dataplane.pin_dir / "np_rule")]
    printed = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    rig.map("np_rule").delete(struct.pack("=I", 7))
    assert '"name": "default|some|rule"' in printed


def test_the_trial_load_leaves_nothing(dataplane: Dataplane) -> None:
    """The trial loads the same programs on maps of its own and pins nothing."""
    before = sorted(dataplane.pin_root.rglob("*"))
    loaded = build.try_load()
    assert {one.name for one in loaded} == set(PROGRAMS)
    assert all(one.jited_bytes for one in loaded)
    assert sorted(dataplane.pin_root.rglob("*")) == before


def test_compiling_needs_no_privilege_and_is_repeatable() -> None:
    """An ordinary user's compilation gives the same instructions as root's."""
    source = ROOT / "bench" / "parse_only.c"
    ours = compile_program(entry=source, programs=("np_parse_only",))
    command = [
        sys.executable,
        "-m",
        "netpol_loader.pins.compilation",
        "--sources",
        str(ROOT / "bpf"),
        "--entry",
        str(source),
    ]
    command += ["--machine", platform.machine(), "--program", "np_parse_only"]
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all", *command],
        env={"PYTHONPATH": f"{ROOT / 'loader'}:{ROOT}", "PATH": os.environ["PATH"]}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert decode_compiled(done.stdout, "output") == ours


def test_every_map_of_the_file_is_the_products(dataplane: Dataplane) -> None:
    """The numbers of maps in the instructions are those of the declarations, np_call included."""
    compiled = build.compiled_program()
    assert set(compiled.maps) == {*abi.MAP_SPECS, dataplane.programs.calls.name}
