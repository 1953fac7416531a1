#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Run the project with the Python, BCC (and its LLVM), pyroute2 and libbpf of Debian's suites, on this machine's kernel.
#
# Usage: scripts/suites.sh [--record] [SUITE...]       bookworm, trixie, sid; without a name all three
#        scripts/suites.sh --compile DIR [SUITE...]    compile and load only: DIR/LLVM.json, DIR/LLVM-aarch64.json
#
# --record writes the table of docs/versions.md. Needs root and, where a suite is not in the cache, a network.
# The packages come from the Debian mirror that this machine's apt uses, into a minimal root of the suite, which is kept for
# a week in NETPOL_SUITE_CACHE (~/.cache/netpol-suites). A suite runs on a copy of the repository, with mounts, network
# interfaces and processes of its own, so that a run that is killed leaves nothing behind but a temporary directory.
set -euo pipefail

readonly ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly CACHE="${NETPOL_SUITE_CACHE:-$HOME/.cache/netpol-suites}"
readonly SUITES=(bookworm trixie sid) # oldest first
readonly PACKAGES="python3,python3-bpfcc,python3-pyroute2,python3-yaml,iproute2,bpftool,clang,gcc,libc6-dev,make,\
python3-prometheus-client,python3-pytest,python3-pytest-xdist,python3-hypothesis"
readonly AGE_DAYS=7 # arbitrary: sid changes daily, and a developer runs this several times a day
readonly EXIT_USAGE=2 EXIT_PLATFORM=5

usage() { sed -n '3,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
say() { printf '==> %s\n' "$*" >&2; }
fail() { printf 'suites.sh: %s\n' "$@" >&2; exit "$EXIT_PLATFORM"; }

record=no compile=""
suites=()
while (($#)); do
    case "$1" in
        --record) record=yes ;;
        --compile) compile="${2:?suites.sh: --compile needs a directory}"; shift ;;
        -h | --help) usage; exit 0 ;;
        *)
            [[ " ${SUITES[*]} " == *" $1 "* ]] || { echo "suites.sh: $1 is no suite known here; see --help" >&2; exit "$EXIT_USAGE"; }
            suites+=("$1") ;;
    esac
    shift
done
((${#suites[@]})) || suites=("${SUITES[@]}")
[[ "$(id -u)" == 0 ]] || fail "this needs root: run it with sudo"

# The address of the Debian archive that is first in apt's lists: this machine's mirror.
find_mirror() {
    apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)' 'Created-By: Packages' |
        sed -n 's/^Debian|Debian|//p' | head -n 1
}

# This machine's settings for downloads by apt (proxies, certificates, age of lists), for the apt of a suite's root.
download_options() { apt-config dump --format '%F "%v";%n' Acquire | grep -E '^[^"]+ ".+";$'; }

# Make a root directory of a suite, atomically. One that is too old, or has other packages, is replaced.
make_root() { # SUITE
    local root="$CACHE/$1" mirror
    if [[ -n "$(find "$root/packages" -mtime "-$AGE_DAYS" 2>/dev/null)" && "$(<"$root/packages")" == "$PACKAGES" ]]; then
        return
    fi
    if ! command -v mmdebstrap >/dev/null; then
        say "packages: installing mmdebstrap"
        DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet=2 --no-install-recommends mmdebstrap >/dev/null ||
            fail "apt-get could not install mmdebstrap: is there a network?"
    fi
    mirror="$(find_mirror)"
    [[ -n "$mirror" ]] || fail "apt of this machine has no list of a Debian mirror: run apt-get update"
    say "$1: making a root of it"
    rm -rf --one-file-system "$root.unfinished"
    mkdir -p "$root.unfinished"
    download_options >"$root.unfinished/apt.conf"
    mmdebstrap --quiet --variant=minbase --format=directory --include="$PACKAGES" \
        --aptopt="$root.unfinished/apt.conf" --aptopt='APT::Install-Recommends "false"' \
        --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        "$1" "$root.unfinished/root" "$mirror" || fail "the root of $1 could not be made"
    echo "$PACKAGES" >"$root.unfinished/packages"
    rm -rf --one-file-system "$root"
    mv "$root.unfinished" "$root"
}

mkdir -p "$CACHE"
exec {lock}>"$CACHE/lock"
flock "$lock" # two runs would replace each other's roots
work="$(mktemp -d)"
trap 'rm -rf --one-file-system "$work"' EXIT

status=0
for suite in "${suites[@]}"; do
    make_root "$suite"
    mkdir "$work/$suite"
    say "$suite: running"
    unshare --mount --propagation private --net --pid --fork --kill-child \
        "$ROOT/tests/suites/enter.sh" "$CACHE/$suite/root" "$ROOT" "$work/$suite" \
        /usr/bin/python3 -m tests.suites.in_suite "$suite" ${compile:+--compile-only} || status=1
done

if [[ -n "$compile" ]]; then
    mkdir -p "$compile"
    cp "$work"/*/compiled/*.json "$compile"
    ls "$compile"
else
    render=()
    [[ "$record" == no ]] || render+=(--record "$ROOT/docs/versions.md")
    (cd "$ROOT" && /usr/bin/python3 -m tests.suites.suite_table "${render[@]}" "$work"/*/result.json) || status=1
fi
exit "$status"
