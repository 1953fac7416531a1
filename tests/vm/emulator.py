# SPDX-License-Identifier: Apache-2.0
"""An emulated virtual machine: QEMU without KVM, with this machine's root file system. It runs a program and reports.

The report is a sequence of lines on the guest's second serial port, each with a checksum; the first port is the
console. A serial port needs no module, exists in every kernel, and keeps the text that was written before a crash.

Invariants: on this machine, only the scratch directory is written. QEMU and virtiofsd end with this process however it
ends (a signal at their parent's death kills them), and only by their own process ids.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from netpol_ebpf.errors import PlatformError, PrivilegeError
from tests.vm.initramfs import ROOT_TAG, render_initramfs
from tests.vm.kernels import Kernel
from tests.vm.report import parse_report

QEMU = "qemu-system-x86_64"
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
"""The C program of Debian 12's qemu-system-common. Its successor in Rust has other options and was not tried."""

MEMORY = "2G"
CPUS = 2
SOCKET_DEADLINE_S = 10.0
STOP_DEADLINE_S = 5.0
POLL_S = 0.05
CONSOLE_LINES = 25

COMMAND_LINE = "console=ttyS0 quiet loglevel=4 panic=-1 clocksource=hpet random.trust_cpu=on net.ifnames=0"
"""The kernel's command line. ``panic=-1``: after a panic the guest reboots at once, and QEMU ends instead of rebooting.
``clocksource=hpet``: on a busy machine the kernel measures the frequency of the time stamp counter wrongly (a clock was
seen that ran three times too fast), but the HPET states its own."""


class Machine:
    """One guest, from boot to its end. A context manager.

    ``tree``: the copy of the repository that the guest runs. ``task``: the file for `tests.vm.guest`. Both have the
    same paths in the guest. ``network``: further options of QEMU, for network devices. ``stop``: ends the run when it
    is set. Raises PrivilegeError without root, because the whole root file system is shared. Raises PlatformError if a
    tool is missing, or if the guest ends without its last record.
    """

    def __init__(
        self,
        kernel: Kernel,
        tree: Path,
        task: Path,
        scratch: Path,
        *,
        network: Sequence[str] = (),
        stop: threading.Event | None = None,
    ) -> None:
        self.kernel = kernel
        self._tree = tree
        self._task = task
        self._scratch = scratch
        self._network = tuple(network)
        self._stop = stop or threading.Event()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._console = scratch / "console.log"
        self._report = scratch / "report.log"

    def __enter__(self) -> Machine:  # noqa: PYI034 - typing.Self comes with Python 3.11
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End QEMU and virtiofsd. Calling it again has no effect."""
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def records(self, timeout_s: float) -> Iterator[dict[str, Any]]:
        """The guest's records as they arrive, until the last one.

        Each also has QEMU's processor seconds so far, ``cpu_s``.

        Raises PlatformError with the end of the console if the guest ends earlier or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        seen = 0
        while True:
            ended = (
                self._processes[-1].poll() is not None
            )  # checked before the read, so that everything it wrote before its end is then in the file
            records = parse_report(self._report.read_bytes()) if self._report.exists() else []
            cpu_s = self._cpu_s()
            for record in records[seen:]:
                yield {**record, "cpu_s": cpu_s}
                if record["step"] == "end":
                    return
            seen = len(records)
            if ended:
                raise PlatformError(f"the guest ended before it had reported everything:\n{self.console_tail()}")
            if self._stop.is_set():
                raise PlatformError("the run was given up")
            if time.monotonic() > deadline:
                raise PlatformError(f"the guest was not done after {timeout_s:.0f} s:\n{self.console_tail()}")
            time.sleep(POLL_S)

    def _cpu_s(self) -> float:
        """The processor time of QEMU, which is the cost of a run whatever else the machine does."""
        try:
            fields = Path(f"/proc/{self._processes[-1].pid}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            return 0.0
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")  # utime and stime, proc(5)

    def console_tail(self) -> str:
        """The last lines of the guest's console."""
        if not self._console.exists():
            return ""
        lines = self._console.read_text(errors="replace").splitlines()
        return "\n".join(line.rstrip() for line in lines[-CONSOLE_LINES:])

    # --- starting ---------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        require_tools()
        initramfs = self._scratch / "initramfs"
        initramfs.write_bytes(render_initramfs(self.kernel))
        socket = self._scratch / "root.socket"
        with (self._scratch / "virtiofsd.log").open("wb") as log:
            # The host's kernel caches for both. If a file changes while the guest reads it, the guest may see either
            # content.
            self._spawn(
                [str(VIRTIOFSD), f"--socket-path={socket}", "-o", "source=/,cache=always,sandbox=chroot"], log, log
            )
            deadline = time.monotonic() + SOCKET_DEADLINE_S
            while not socket.exists():
                if self._processes[-1].poll() is not None or time.monotonic() > deadline:
                    raise PlatformError(f"virtiofsd does not serve: {(self._scratch / 'virtiofsd.log').read_text()}")
                time.sleep(POLL_S)
        with (self._scratch / "qemu.log").open("wb") as log:
            self._spawn(self._qemu(initramfs, socket), log, log)

    def _spawn(self, command: list[str], stdout: Any, stderr: Any) -> None:
        self._processes.append(
            subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,  # a Ctrl-C at the terminal reaches only this process, which then ends them
            )
        )

    def _qemu(self, initramfs: Path, socket: Path) -> list[str]:
        settings = {
            "root": self._tree,
            "python": sys.executable,
            "task": self._task,
            "modules": self.kernel.modules or "",
        }
        append = [COMMAND_LINE, *(f"netpol_{name}={value}" for name, value in settings.items())]
        return [
            QEMU, "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
            "-machine", "q35,memory-backend=memory",  # the machine type microvm does not boot these kernels
            "-accel", "tcg,thread=multi", "-cpu", "max,la57=off", "-smp", str(CPUS), "-m", MEMORY,
            "-object", f"memory-backend-memfd,id=memory,size={MEMORY},share=on",  # virtiofsd reads this memory
            "-chardev", f"socket,id=root,path={socket}",
            "-device", f"vhost-user-fs-pci,chardev=root,tag={ROOT_TAG}",
            "-serial", f"file:{self._console}", "-serial", f"file:{self._report}",
            "-kernel", str(self.kernel.vmlinux), "-initrd", str(initramfs), "-append", " ".join(append),
            *self._network,
        ]  # fmt: skip


def require_tools() -> None:
    """Raise PrivilegeError or PlatformError for the first thing that is missing."""
    if os.geteuid() != 0:
        raise PrivilegeError("a guest shares this machine's root file system, which needs root")
    if shutil.which(QEMU) is None:
        raise PlatformError(f"{QEMU} is not installed", hint="apt install qemu-system-x86")
    if not VIRTIOFSD.exists():
        raise PlatformError(f"{VIRTIOFSD} is missing", hint="apt install qemu-system-common (of Debian 12)")
