# SPDX-License-Identifier: Apache-2.0
"""The initial file system of a guest: a static busybox, the modules for the root file system, and a script.

The script loads the modules, mounts a writable overlay over this machine's root file system, makes the overlay the
root, and runs the guest's program there. Nothing that the guest writes reaches this machine, because the lower layer is
read-only.

The script uses `switch_root` and not `chroot`, because `ip netns` and bpffs need a root that is a mount point.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from netpol_ebpf.errors import PlatformError
from tests.vm.kernels import Kernel, modules_in_order, read_module

ROOT_TAG = "machine"
"""The guest's name for the file system that this machine shares."""

MODULES = ("virtio_pci", "fuse", "virtiofs", "overlay")
"""The modules that the guest needs before it has a root file system. The modules that these need are included."""

APPLETS = ("sh", "mount", "mkdir", "insmod", "switch_root", "poweroff", "ip", "uname", "cp")
DIRECTORY, EXECUTABLE, REGULAR, SYMBOLIC_LINK = 0o040755, 0o100755, 0o100644, 0o120777

SCRIPT = f"""#!/bin/sh
# Process 1 of the guest.  netpol_* come from the kernel's command line: what the kernel does not know there is in the environment.
# It stays a shell to the end, which also reaps whatever lost its parent.
if [ "$1" != after ]; then
    # Ends by poweroff whatever fails: the console then has the reason.
    trap 'echo "guest: the initial file system gives up"; poweroff -f' EXIT
    set -e
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t devtmpfs devtmpfs /dev
    for module in /modules/*; do [ ! -e "$module" ] || insmod "$module"; done
    mount -t virtiofs -o ro {ROOT_TAG} /lower
    mount -t tmpfs tmpfs /writable
    mkdir /writable/upper /writable/work
    mount -t overlay -o lowerdir=/lower,upperdir=/writable/upper,workdir=/writable/work overlay /root
    mkdir -p /dev/pts /dev/shm
    mount -t devpts devpts /dev/pts
    mount -t tmpfs tmpfs /dev/shm
    mount -t bpf -o mode=0700 bpf /sys/fs/bpf
    ip link set lo up
    modules="/root/lib/modules/$(uname -r)"
    [ -z "$netpol_modules" ] || {{ mkdir -p "$modules"; mount --bind "/root$netpol_modules" "$modules"; }}
    for part in proc sys dev; do mount --move /$part /root/$part; done
    mount -t tmpfs -o mode=755 tmpfs /root/run
    cp /bin/busybox /init /root/run
    trap - EXIT
    exec switch_root /root /run/busybox sh /run/init after
fi
export PATH="${{netpol_python%/*}}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" HOME=/root LC_ALL=C.UTF-8
export PYTHONPATH="$netpol_root:$netpol_root/loader"
cd "$netpol_root" && "$netpol_python" -m tests.vm.guest "$netpol_task" </dev/null >/dev/ttyS0 2>&1
/run/busybox poweroff -f
"""


def render_initramfs(kernel: Kernel) -> bytes:
    """The archive (cpio, newc) for this kernel. Raises PlatformError without a static busybox."""
    archive = _Archive()
    for directory in ("bin", "proc", "sys", "dev", "modules", "lower", "writable", "root"):
        archive.add(directory, DIRECTORY)
    archive.add("bin/busybox", EXECUTABLE, _busybox())
    for applet in APPLETS:
        archive.add(f"bin/{applet}", SYMBOLIC_LINK, b"busybox")
    if kernel.modules is not None:
        for place, module in enumerate(modules_in_order(kernel.modules, MODULES)):
            archive.add(f"modules/{place:02}-{module.name.partition('.')[0]}.ko", REGULAR, read_module(module))
    archive.add("init", EXECUTABLE, SCRIPT.encode())
    return archive.finish()


def _busybox() -> bytes:
    found = shutil.which("busybox")
    # A dynamically linked busybox has the name of its loader in a segment.
    if found is None or b"ld-linux" in (content := Path(found).read_bytes())[:4096]:
        raise PlatformError("there is no static busybox", hint="apt install busybox-static")
    return content


class _Archive:
    """A cpio archive in the form that the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def add(self, name: str, mode: int, content: bytes = b"") -> None:
        self._count += 1
        encoded = name.encode() + b"\0"
        fields = (self._count, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields)
        self._parts += [_padded(header + encoded), _padded(content)]

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


def _padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % 4)
