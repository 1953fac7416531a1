#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Check that the wheel is complete: it has the C sources, the manifests of the demonstration, and the CNI plugin, which
# it installs as an executable file. It installs into a clean environment, where `netpolctl --version` runs without root
# and without BCC. Needs no network after setup.sh --dev.
set -euo pipefail

readonly ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly VENV="${NETPOL_VENV:-$ROOT/.venv}"
readonly NOBODY=65534

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
chmod 755 "$work" # for nobody

make --silent --directory "$ROOT/cni"
pip_offline=(-m pip --quiet --disable-pip-version-check --no-input)
offline=(--no-index --find-links "$VENV/wheelhouse")
"$VENV/bin/python" "${pip_offline[@]}" wheel --no-deps "${offline[@]}" --wheel-dir "$work/dist" "$ROOT"

"$VENV/bin/python" - "$work"/dist/*.whl "$ROOT" <<'EOF'
import sys
import zipfile
from pathlib import Path

wheel, root = Path(sys.argv[1]), Path(sys.argv[2])
inside = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
wanted = {
    Path("netpol_loader/bpf") / path.relative_to(root / "bpf")
    for path in (root / "bpf").rglob("*")
    if path.suffix in {".c", ".h"}
} | {Path("netpol_ebpf/lab/demo") / path.name for path in (root / "examples/demo").glob("*.yaml")} | {Path("netpol_ebpf/cni/netpol-cni")}
missing = sorted(str(path) for path in wanted - inside)
stray = sorted(str(path) for path in inside if "tests" in path.parts or path.suffix in {".pyc", ".so"})
print(f"{wheel.name}: {len(inside)} files, {len(wanted)} of them C sources, manifests and the CNI plugin")
if missing or stray or not any(path.suffix == ".c" for path in wanted):
    sys.exit(f"missing: {missing}\nnot wanted: {stray}")
EOF

/usr/bin/python3 -m venv "$work/clean"
"$work/clean/bin/python" "${pip_offline[@]}" install "${offline[@]}" "$work"/dist/*.whl
cd / # nothing of the checkout may help
if "$work/clean/bin/python" -c 'import bcc' 2>/dev/null; then
    echo "check_wheel.sh: the clean environment sees bcc, so this proves nothing" >&2
    exit 1
fi
as_nobody=()
[[ "$(id -u)" != 0 ]] || as_nobody=(setpriv --reuid "$NOBODY" --regid "$NOBODY" --clear-groups)
for command in netpolctl netpol-agent; do
    env -i HOME=/nonexistent "${as_nobody[@]}" "$work/clean/bin/$command" --version
done
CNI_COMMAND=VERSION "${as_nobody[@]}" "$work"/clean/lib/python3*/site-packages/netpol_ebpf/cni/netpol-cni </dev/null
