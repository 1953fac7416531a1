# SPDX-License-Identifier: Apache-2.0
"""Pins: made whole, adopted untouched, replaced if they differ, rejected if they are another version's, removed."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import packets as p
import pytest
from map_sizes import SIZES
from rig import ALLOW, DENY, PEER4, POD4, Rig, everything

from netpol_ebpf.errors import LoadError, PlatformError, PrivilegeError
from netpol_loader import abi
from netpol_loader.kernel import btf, clock, syscall
from netpol_loader.kernel.hook import Hook
from netpol_loader.pins import build, compilation, doctor, layouts
from netpol_loader.pins.compiled import decode_compiled
from netpol_loader.pins.dataplane import TIMEOUTS_S, Dataplane, schema_dir

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).resolve().parents[2]
LARGE_BYTES, SIGNAL_EVERY_S, MOST_SIGNALS = 100_000, 0.01, 4
"""A program that the verifier needs longer for than the interval of the signals, which are fewer than the tries."""


@pytest.fixture
def root() -> Iterator[Path]:
    """A pin root of its own, removed afterwards."""
    path = Path(f"/sys/fs/bpf/netpol-own-{os.getpid()}")
    doctor.require_bpffs(path)
    yield path
    if path.exists():
        shutil.rmtree(path)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the C sources that a test may change, and that is built instead of the original."""
    copy = tmp_path / "bpf"
    shutil.copytree(ROOT / "bpf", copy)
    monkeypatch.setattr(compilation, "source_dir", lambda: copy)
    return copy


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def program_ids(dataplane: Dataplane) -> list[int]:
    return [syscall.prog_info(dataplane.program_fd(hook)).id for hook in Hook]


def test_new_dataplane(dataplane: Dataplane) -> None:
    """Every declared map is pinned, and the configuration has its defaults."""
    names = {path.name for path in dataplane.pin_dir.iterdir()}
    assert names == {*abi.MAP_SPECS, layouts.NAME, "programs", "links"}
    assert {path.name for path in (dataplane.pin_dir / "programs").iterdir()} == {*compilation.PROGRAMS, "np_call"}
    assert [path.name for path in dataplane.pin_root.iterdir()] == [f"v{abi.SCHEMA_VERSION}"]
    config = dataplane.config()
    assert config.generation >= 1
    assert config.jiffies_per_second in clock.KNOWN_RATES
    assert config.timeout_jiffies[abi.NP_CONN_UDP] == TIMEOUTS_S[abi.NP_CONN_UDP] * config.jiffies_per_second
    assert dataplane.maps["np_endpoint"].max_entries == SIZES["np_endpoint"]
    assert dataplane.maps["np_frag4"].max_entries == SIZES["np_frag4"]


def test_layouts_are_saved_beside_the_maps(dataplane: Dataplane, pin_root: Path) -> None:
    """They are what the kernel says of every map, and they come back at the next start if they are missing."""
    saved = layouts.load_layouts(dataplane.pin_dir)
    assert saved is not None
    known = {name for name, spec in abi.MAP_SPECS.items() if spec.value is not None}
    assert saved == {name: btf.layouts(syscall.map_info(dataplane.pinned[name].fd)) for name in known}
    (dataplane.pin_dir / layouts.NAME).unlink()
    assert layouts.load_layouts(dataplane.pin_dir) is None
    with Dataplane.open(pin_root):
        assert layouts.load_layouts(dataplane.pin_dir) == saved


def test_jiffies_rate_is_the_kernels_own() -> None:
    """Two measurements agree with each other, and with the kernel's configuration if it is readable."""
    rate = clock.measure_jiffies_per_second()
    assert rate == clock.measure_jiffies_per_second()


def test_adoption_touches_nothing(dataplane: Dataplane, pin_root: Path) -> None:
    """Opening the pins of this build finds the same programs and maps with their content."""
    dataplane.maps["np_addr4"].put(b"\1\2\3\4", b"12345678")
    with Dataplane.open(pin_root) as again:
        assert program_ids(again) == program_ids(dataplane)
        assert again.maps["np_addr4"].get(b"\1\2\3\4") == b"12345678"
    dataplane.maps["np_addr4"].delete(b"\1\2\3\4")


def test_sizes_of_existing_maps_stay(dataplane: Dataplane, pin_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An existing map keeps its size, with a warning."""
    with caplog.at_level(logging.WARNING), Dataplane.open(pin_root, sizes={"np_addr4": 1 << 17}) as again:
        assert again.maps["np_addr4"].max_entries == dataplane.maps["np_addr4"].max_entries
    assert "np_addr4 keeps its size" in caplog.text


def test_same_program_from_other_sources_is_kept(root: Path, sources: Path) -> None:
    """Other sources with the same instructions leave the pinned program alone."""
    with Dataplane.open(root, sizes=SIZES) as before:
        ids = program_ids(before)
        change(sources / "np_count.h", "// Counters for each rule", "// counters for each rule")
        with Dataplane.open(root) as after:
            assert program_ids(after) == ids
        assert not list(schema_dir(root).glob("*_new"))


def test_changed_program_replaces_its_predecessor(root: Path, sources: Path) -> None:
    """A changed program replaces the pinned one; maps and their content stay."""
    with Dataplane.open(root, sizes=SIZES) as before:
        rig = Rig(before)
        rig.pod(everything(1, DENY, 11), everything(2, ALLOW, 12))
        assert rig.out(p.frame(POD4, PEER4, p.TCP, p.tcp(1, 2, p.SYN))).reason == "policy-allow"
        assert rig.into(p.frame(PEER4, POD4, p.TCP, p.tcp(2, 1, p.SYN | p.ACK))).passed  # one that lives for hours
        rig.reader.close()
        ids, tags = program_ids(before), [before.program_tag(hook) for hook in Hook]
    change(sources / "np_endpoint.h", "NP_ENDPOINT_TRIES 4", "NP_ENDPOINT_TRIES 3")
    with Dataplane.open(root) as after:
        assert not set(program_ids(after)) & set(ids)
        assert not {after.program_tag(hook) for hook in Hook} & set(tags)
        rig = Rig(after)
        answer = p.frame(POD4, PEER4, p.TCP, p.tcp(1, 2, p.ACK))
        assert rig.out(answer).reason == "established", "the connection is still there"
        assert after.maps["np_endpoint"].max_entries == SIZES["np_endpoint"]
        assert not list(after.pin_dir.glob("*_new"))
        rig.reader.close()


def test_source_that_does_not_compile(root: Path, sources: Path) -> None:
    """The error has clang's message with file and line; nothing is pinned and nothing is left behind."""
    change(sources / "np_parse.h", "packet->version = 4;", "packet->version = four;")
    with pytest.raises(LoadError, match=r"np_parse.h:\d+:\d+: error: use of undeclared identifier 'four'"):
        Dataplane.open(root)
    assert not root.exists()


def test_program_that_does_not_verify(root: Path, sources: Path) -> None:
    """The error has the end of the verifier's log; the pinned predecessor is untouched."""
    with Dataplane.open(root, sizes=SIZES) as before:
        ids = program_ids(before)
        change(sources / "np_parse.h", "if ((void *)(eth + 1) > bytes->end)", "if (0)")
        with pytest.raises(LoadError, match="invalid access to packet"):
            Dataplane.open(root)
        change(sources / "np_parse.h", "if (0)", "if ((void *)(eth + 1) > bytes->end)")
        with Dataplane.open(root) as after:
            assert program_ids(after) == ids


def test_signals_while_it_is_verified(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal makes the kernel abort a verification; the loader starts it again."""
    came, load = 0, syscall.prog_load

    def count(*_: object) -> None:
        nonlocal came
        came += 1
        if came == MOST_SIGNALS:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def load_under_signals(instructions: bytes, **options: Any) -> int:
        if came < MOST_SIGNALS and len(instructions) > LARGE_BYTES:
            signal.setitimer(signal.ITIMER_REAL, SIGNAL_EVERY_S, SIGNAL_EVERY_S)
        return load(instructions, **options)

    before = signal.signal(signal.SIGALRM, count)
    monkeypatch.setattr(syscall, "prog_load", load_under_signals)
    try:
        with Dataplane.open(root, sizes=SIZES) as dataplane:
            assert program_ids(dataplane)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came == MOST_SIGNALS


@pytest.mark.parametrize(("step", "words"), [(1, "made by a newer version"), (-1, "an older schema")])
def test_other_schema_is_refused(root: Path, step: int, words: str) -> None:
    """Nobody uses or touches a newer version's directory, and only the agent an older one's."""
    other = root / f"v{abi.SCHEMA_VERSION + step}"
    other.mkdir(parents=True)
    with pytest.raises(PlatformError, match=words) as refused:
        Dataplane.open(root)
    assert f"speaks schema {abi.SCHEMA_VERSION}" in refused.value.message
    assert "netpolctl cleanup" in (refused.value.hint or "")
    assert [path.name for path in root.iterdir()] == [other.name]


def test_damaged_directory_is_refused(root: Path) -> None:
    """The error names the missing pin."""
    with Dataplane.open(root, sizes=SIZES) as one:
        (one.pin_dir / "np_verdict").unlink()
    with pytest.raises(PlatformError, match="np_verdict cannot be opened"):
        Dataplane.open(root)


def test_leftovers_of_a_dead_builder_go(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A half-made directory does not count, and is removed."""
    (root / "new-1" / "links").mkdir(parents=True)
    with caplog.at_level(logging.WARNING), Dataplane.open(root, sizes=SIZES) as one:
        assert [path.name for path in root.iterdir()] == [one.pin_dir.name]
    assert "left by a process that died" in caplog.text


def test_removal_leaves_nothing(root: Path) -> None:
    """Removal leaves neither the directory nor its parent."""
    Dataplane.open(root, sizes=SIZES).remove()
    assert not root.exists()


def test_generation_is_never_zero(rig: Rig) -> None:
    """A generation wraps to 1, because 0 marks unused rows."""
    config = rig.dataplane.config()
    config.generation = 0xFFFF_FFFF
    rig.dataplane.set_config(config)
    assert rig.dataplane.bump_generation() == 1
    assert rig.dataplane.config().generation == 1


def test_unknown_map_size(root: Path) -> None:
    """A size for a map that does not exist is an error."""
    with pytest.raises(PlatformError, match="no such map: np_nonsense"):
        Dataplane.open(root, sizes={"np_nonsense": 1})
    assert not root.exists()


def test_place_that_is_not_bpffs(tmp_path: Path) -> None:
    """Pins need a BPF file system."""
    with pytest.raises(PlatformError, match="not on a BPF file system"):
        Dataplane.open(tmp_path / "pins")
    assert not (tmp_path / "pins").exists()


def test_neither_compiled_nor_a_compiler(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiled file and without BCC the error says what to install or bring."""
    monkeypatch.setattr(compilation, "compiler_name", lambda: None)
    monkeypatch.setattr(build, "DIRECTORIES", (tmp_path,))
    with pytest.raises(PlatformError, match="not compiled for this version, and BCC.* is missing") as caught:
        Dataplane.open(root)
    assert "python3-bpfcc" in (caught.value.hint or "")
    assert not root.exists()


def test_without_privilege() -> None:
    """The error tells an ordinary user so in one line."""
    code = "from netpol_loader.pins import doctor; doctor.require_bpffs(doctor.BPFFS)"
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT / "loader"), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code], user=65534, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert PrivilegeError.__name__ in done.stderr.splitlines()[-1]


def test_doctor_is_content_here() -> None:
    """The doctor finds nothing missing where the kernel tests run."""
    assert [check for check in doctor.check_all() if check.error] == []


MOUNTS = {
    "the node's, handed down": ("true", ""),
    "nothing": ("umount /sys/fs/bpf", "would be gone when this process ends"),
    "one of its own": ("umount /sys/fs/bpf && mount -t bpf bpf /sys/fs/bpf", "not on the node"),
}


@pytest.mark.parametrize(("before", "complaint"), MOUNTS.values(), ids=MOUNTS)
def test_pins_are_made_where_the_node_keeps_them(before: str, complaint: str) -> None:
    """In another mount namespace only the node's BPF file system is used; for any other, one line says why not."""
    if complaint == "not on the node" and doctor.mounts_of_node() is None:
        return  # process 1 here is not the node's: what the node has mounted cannot be seen, and is not asked for
    code = "from netpol_loader.pins import doctor; doctor.require_bpffs(doctor.BPFFS / 'netpol')"
    script = f'set -e\n{before}\nset +e\n{sys.executable} -c "{code}"\nended=$?\n'
    script += "grep -c ' /sys/fs/bpf ' /proc/self/mountinfo\nexit $ended\n"
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT / "loader"), str(ROOT)]), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == (not complaint), done.stderr
    if complaint:
        assert complaint in done.stderr.splitlines()[-1]
    assert int(done.stdout) == (0 if before.endswith("umount /sys/fs/bpf") else 1), "nothing was mounted"


def test_it_compiles_without_any_header() -> None:
    """With /usr/include, /usr/src and /lib/modules hidden, the program compiles from the shim alone."""
    hidden = [path for path in ("/usr/include", "/usr/src", "/lib/modules") if Path(path).is_dir()]
    assert hidden, "nothing to hide: this would prove nothing"
    script = "set -e\n" + "".join(f"mount -t tmpfs none {path}\n" for path in hidden)
    script += f"test -z \"$(find {' '.join(hidden)} -name '*.h')\"\n"
    script += f"exec {sys.executable} -m netpol_loader.pins.compilation --sources {ROOT / 'bpf'} --machine {platform.machine()}"
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT / "loader"), str(ROOT)]), "PATH": os.environ["PATH"]}
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(decode_compiled(done.stdout, "output").programs) == set(compilation.PROGRAMS)


def test_schema_row(dataplane: Dataplane) -> None:
    """The schema map describes the pins."""
    row = abi.np_schema.from_buffer_copy(dataplane.maps["np_schema"].get(bytes(4)) or b"")
    assert row.version == abi.SCHEMA_VERSION
    assert bytes(row.source_digest) == compilation.source_digest(ROOT / "bpf")
    assert ctypes.sizeof(row) == dataplane.maps["np_schema"].value_size
