# SPDX-License-Identifier: Apache-2.0
"""If another program removes or changes our objects, they are restored and counted, and policy holds again."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from agent_scene import NODE, Scene, to_db

from netpol_loader import abi
from netpol_loader.kernel import syscall
from netpol_loader.kernel.maps import Map
from netpol_loader.pins import layouts
from netpol_loader.pins.compilation import PROGRAMS
from netpol_loader.pins.programs import CALL_MAP, CURRENT
from netpol_loader.tables.buckets import open_map

pytestmark = pytest.mark.netns


def pins(scene: Scene) -> Path:
    (found,) = scene.pin_root.glob("v*")
    return found


def opened(path: Path) -> Map:
    return open_map(path.parent, path.name)


def remove_directory(scene: Scene, path: Path) -> None:
    """Move the directory away in one step, because during a file-by-file removal the agent restores missing files."""
    gone = scene.pin_root.with_name(f"{scene.pin_root.name}-gone")
    path.rename(gone)
    shutil.rmtree(gone)


def detach(scene: Scene) -> None:
    """Detach every link of every interface; the pins stay."""
    for pin in (pins(scene) / "links").iterdir():
        fd = syscall.obj_get(pin)
        syscall.link_detach(fd)
        os.close(fd)


def unpin_links(scene: Scene) -> None:
    """Remove the pins of the links, and their directory."""
    remove_directory(scene, pins(scene) / "links")


def exchange_program(scene: Scene) -> None:
    """Make the links run another program, which lets every packet pass."""
    mov_r0_minus_1, leave = b"\xb7\0\0\0\xff\xff\xff\xff", b"\x95\0\0\0\0\0\0\0"
    program = syscall.prog_load(mov_r0_minus_1 + leave)
    for pin in (pins(scene) / "links").iterdir():
        fd = syscall.obj_get(pin)
        syscall.link_update(fd, program)
        os.close(fd)
    os.close(program)


def unpin_maps(scene: Scene) -> None:
    """Unpin half of the maps and of the program set; replace one pin by that of another map."""
    for name in ("np_addr4", "np_verdict", "np_conn4", "np_event"):
        (pins(scene) / name).unlink()
    for name in ("np_tc_ingress", "np_tc_judge", CALL_MAP):
        (pins(scene) / CURRENT / name).unlink()
    (pins(scene) / "np_config").rename(pins(scene) / "np_event")


def unpin_everything(scene: Scene) -> None:
    """Remove the whole directory."""
    remove_directory(scene, pins(scene))


def empty_calls(scene: Scene) -> None:
    """Remove the called programs from the program array, so that every new flow is dropped."""
    calls = opened(pins(scene) / CURRENT / CALL_MAP)
    for slot in abi.CALLS:
        calls.delete(struct.pack("=I", slot))
    calls.close()


def forget_addresses(scene: Scene) -> None:
    """Remove the addresses of all pods."""
    addresses = opened(pins(scene) / "np_addr4")
    addresses.clear()
    addresses.close()


def clear_buckets(scene: Scene) -> None:
    """Set the buckets of addresses and classes to zero, as raw memory."""
    for name in ("np_addr4", "np_peer_class"):
        buckets = Map(syscall.obj_get(pins(scene) / name))
        buckets.put_many([(key, bytes(buckets.value_size)) for key, value in buckets.items() if any(value)])
        buckets.close()


def forget_vip_filter(scene: Scene) -> None:
    """Clear the bits of the node's addresses."""
    special = opened(pins(scene) / "np_vip_filter")
    special.put_many([(key, bytes(8)) for key, value in special.items() if any(value)])
    special.close()


def give_away_address(scene: Scene) -> None:
    """Give the denied pod the identity of the allowed pod."""
    addresses = opened(pins(scene) / "np_addr4")
    other = ip_address("10.1.0.3").packed
    value = addresses.get(ip_address("10.1.0.1").packed)
    assert value is not None
    addresses.put(other, value[:4] + (addresses.get(other) or b"")[4:])
    addresses.close()


def unknown_interfaces(scene: Scene) -> None:
    """Remove the rows of all interfaces."""
    endpoints = opened(pins(scene) / "np_endpoint")
    endpoints.clear()
    endpoints.close()


def clear_verdicts(scene: Scene) -> None:
    """Set all verdicts to zero."""
    verdicts = opened(pins(scene) / "np_verdict")
    verdicts.put_many([(key, bytes(verdicts.value_size)) for key, value in verdicts.items() if any(value)])
    verdicts.close()


def reset_configuration(scene: Scene) -> None:
    """Set generation, flags and time-outs to zero."""
    config = opened(pins(scene) / "np_config")
    config.put(bytes(4), bytes(abi.np_config()))
    config.close()


FAULTS = (
    detach, unpin_links, exchange_program, empty_calls, unpin_maps, unpin_everything, forget_addresses, clear_buckets, forget_vip_filter,
    give_away_address, unknown_interfaces, clear_verdicts, reset_configuration,
)  # fmt: skip


def pinned(scene: Scene) -> dict[str, int]:
    """Every pinned map and program with its id in the kernel; 0 for the layouts, which are made anew."""
    found = {}
    for path in [*pins(scene).iterdir(), *(pins(scene) / CURRENT).iterdir()]:
        if not path.is_dir():
            fd = syscall.obj_get(path)
            is_program = path.name in PROGRAMS
            number = syscall.prog_info(fd).id if is_program else syscall.map_info(fd).id
            found[path.name] = 0 if path.name == layouts.NAME else number
            os.close(fd)
    return found


@pytest.fixture
def whole(scene: Scene) -> Iterator[Scene]:
    """Check after the test that pins and links are the same objects as before."""
    before, attached = pinned(scene), scene.attached()
    yield scene
    assert pinned(scene) == before
    assert scene.attached() == attached


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_others_change_is_put_back(whole: Scene, fault: Callable[[Scene], None]) -> None:
    """After each fault the status counts what was restored, and policy and an open connection are as before."""
    scene = whole
    held = scene.lab.prober.hold(to_db("shop/web"))
    assert held is not None
    before = sum(scene.state()["drift"]["put_back"].values())
    fault(scene)
    scene.await_status(lambda state: sum(state["drift"]["put_back"].values()) > before, "something was put back")
    scene.await_reached(to_db("shop/web"), expected=True)
    scene.await_reached(to_db("shop/other"), expected=False)
    scene.await_reached(to_db("shop/other", 6), expected=False)
    assert held.exchange(5.0)
    held.close()
    state = scene.state()
    assert state["in_force"]
    assert state["drift"]["recent"]


def test_mended_node_is_left_alone(scene: Scene) -> None:
    """If there is no difference, the rounds of the audit restore nothing."""
    before = scene.state()["drift"]["put_back"]
    rounds = scene.state()["drift"]["rounds"]
    state = scene.await_status(lambda state: state["drift"]["rounds"] >= rounds + 2, "two rounds")
    assert state["drift"]["put_back"] == before


def test_what_was_put_back_outlives_the_agent(scene: Scene) -> None:
    """All pins are removed and restored.

    Then the agent is killed, and its successor takes over without a difference.
    """
    held = scene.lab.prober.hold(to_db("shop/web"))
    assert held is not None
    before = sum(scene.state()["drift"]["put_back"].values())
    unpin_everything(scene)
    scene.await_status(lambda state: sum(state["drift"]["put_back"].values()) > before, "the pins are back")
    scene.kill()
    assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]
    scene.start()
    assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]
    assert held.exchange(5.0)
    held.close()
    interfaces = {child.parent_interface for child in scene.lab.plan.children(NODE)} | {"eth0"}
    assert {interface: len(hooks) for interface, hooks in scene.attached().items()} == dict.fromkeys(interfaces, 2)
