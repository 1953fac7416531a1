# SPDX-License-Identifier: Apache-2.0
"""Maps from Python: single elements, batches, per-CPU values, full maps, and bpftool's view of them."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess

import pytest
from rig import Rig

from netpol_ebpf.errors import MapFullError, PlatformError
from netpol_loader import abi
from netpol_loader.kernel import maps, syscall

pytestmark = pytest.mark.kernel


def keys4(count: int) -> list[bytes]:
    return [struct.pack("!I", 0x0A000000 + number) for number in range(count)]


@pytest.mark.parametrize(
    "name", ["np_addr4", "np_addr6", "np_addr4_more", "np_cidr4", "np_cidr6", "np_source4", "np_peer_class", "np_conn4"]
)
@pytest.mark.parametrize("count", [1, 900])
def test_round_trip_in_batches(rig: Rig, name: str, count: int) -> None:
    """Every kind of map returns what a batch wrote; a batch of deletions ignores absent keys.

    The keys are no sequence, because under one secret in many a sequence fills some buckets and leaves others empty.
    """
    one = rig.map(name)
    prefix = struct.pack("=I", (one.key_size - 4) * 8) if one.type == "lpm_trie" else b""
    pairs = {
        prefix + hashlib.sha256(b"%d" % number).digest()[:4].rjust(one.key_size - len(prefix), b"\1"):
            struct.pack("=I", number).ljust(one.value_size, b"\2")
        for number in range(count)
    }  # fmt: skip
    one.put_many(list(pairs.items()))
    assert dict(one.items()) == pairs
    some, rest = list(pairs)[: count // 2], list(pairs)[count // 2 :]
    one.delete_many(some)
    one.delete_many([*some[:3], *rest, *some[3:6]])
    assert dict(one.items()) == {}


def test_one_by_one(rig: Rig) -> None:
    """get, put and delete of one element."""
    one = rig.map("np_addr4_more")
    (key,) = keys4(1)
    assert one.get(key) is None
    assert not one.delete(key)
    one.put(key, b"12345678")
    assert one.get(key) == b"12345678"
    one.put(key, b"87654321")
    assert one.get(key) == b"87654321"
    assert one.delete(key)
    assert one.get(key) is None


def test_wrong_sizes_never_reach_the_kernel(rig: Rig) -> None:
    """A key or value of another length is an error of the caller."""
    one = rig.map("np_addr4_more")
    with pytest.raises(ValueError, match="key has 4 bytes"):
        one.get(b"123")
    with pytest.raises(ValueError, match="value has 8 bytes"):
        one.put(b"1234", b"1")
    with pytest.raises(ValueError, match="value has 8 bytes"):
        one.put_many([(b"1234", b"12345678"), (b"1235", b"1234567")])


def test_full_map_is_named(rig: Rig) -> None:
    """The error of a full map names the map, its size, and how far a batch got."""
    one = rig.map("np_endpoint")
    pairs = [(struct.pack("=I", number), bytes(one.value_size)) for number in range(one.max_entries + 1)]
    with pytest.raises(MapFullError, match=r"np_endpoint is full: it holds at most 64 .*64 of 65") as caught:
        one.put_many(pairs)
    assert caught.value.exit_code == 5
    with pytest.raises(MapFullError, match="np_endpoint"):
        one.put(struct.pack("=I", 1 << 20), bytes(one.value_size))


def test_array_row_cannot_be_deleted(rig: Rig) -> None:
    """Any other rejection by the kernel is a PlatformError that names the map."""
    with pytest.raises(PlatformError, match="np_verdict"):
        rig.map("np_verdict").delete(bytes(4))


def test_per_cpu_values(rig: Rig) -> None:
    """A per-CPU element has one value for each possible CPU, each padded to a multiple of 8 bytes."""
    one = rig.map("np_rule_count")
    assert one.is_per_cpu
    assert one.cell_bytes == 16 * maps.possible_cpus()
    value = b"".join(struct.pack("=QQ", cpu + 1, 7) for cpu in range(maps.possible_cpus()))
    one.put(struct.pack("=I", 200), value)
    assert one.get(struct.pack("=I", 200)) == value
    assert dict(one.items())[struct.pack("=I", 200)] == value
    one.put(struct.pack("=I", 200), bytes(len(value)))


def test_items_without_batches(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a batch command of the kernel the results are the same."""
    one = rig.map("np_addr4_more")
    monkeypatch.setattr(syscall, "map_batch", lambda *_args, **_kwargs: (0, 524))
    pairs = {key: key + key for key in keys4(20)}
    one.put_many(list(pairs.items()))
    assert dict(one.items()) == pairs
    one.delete_many(list(pairs))
    assert dict(one.items()) == {}


def test_buckets_larger_than_a_batch(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is smaller than a bucket is tried again with more room."""
    monkeypatch.setattr(maps, "BATCH", 1)
    one = rig.map("np_addr4_more")
    pairs = {key: key + key for key in keys4(900)}
    one.put_many(list(pairs.items()))
    try:
        assert dict(one.items()) == pairs
    finally:
        one.delete_many(list(pairs))  # the tests that follow find no rows that no bucket speaks of


@pytest.mark.parametrize("spec", abi.MAP_SPECS.values(), ids=abi.MAP_SPECS.keys())
def test_kernel_agrees_with_the_layout(rig: Rig, spec: abi.MapSpec) -> None:
    """Each map is pinned under its name with the declared kind and sizes, and has BTF (except the ring buffer)."""
    one = maps.Map(syscall.obj_get(rig.dataplane.pin_dir / spec.name))
    assert (one.name, one.type, one.key_size, one.value_size) == (
        spec.name, spec.kind, spec.key_size, spec.value_size)  # fmt: skip
    assert one.has_btf == (spec.kind != "ringbuf")
    one.close()


@pytest.mark.skipif(shutil.which("bpftool") is None, reason="bpftool is not installed")
def test_bpftool_shows_names(rig: Rig) -> None:
    """A dump has the field names of the layout."""
    rig.address("10.0.0.7", 100, 7)
    done = subprocess.run(
        ["bpftool", "-j", "map", "dump", "pinned", str(rig.dataplane.pin_dir / "np_addr4")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    (bucket,) = (one["formatted"]["value"] for one in json.loads(done.stdout) if one["formatted"]["value"]["used"])
    assert bucket["used"] == 1
    assert (bucket["key"][0], bucket["row"][0]) == ({"address": [10, 0, 0, 7]}, {"identity": 100, "holder": 7})
