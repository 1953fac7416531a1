#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Run a command in a root, on a copy of the repository. Called by scripts/suites.sh in namespaces of its own for mounts,
# network and processes: everything that is mounted, pinned or started here ends with this process.
#
# Usage: enter.sh ROOT REPOSITORY RESULTS COMMAND...    RESULTS: a directory, /results inside
set -euo pipefail

readonly LOWER="$1" REPOSITORY="$2" RESULTS="$3"
shift 3

readonly LAYERS="$RESULTS/layers"
mkdir "$LAYERS"
mount -t tmpfs tmpfs "$LAYERS"
mkdir "$LAYERS/upper" "$LAYERS/work" "$LAYERS/root"
readonly INSIDE="$LAYERS/root"
mount -t overlay overlay -o "lowerdir=$LOWER,upperdir=$LAYERS/upper,workdir=$LAYERS/work" "$INSIDE"
mount --rbind /dev "$INSIDE/dev"
mount -t proc proc "$INSIDE/proc"
mount -t sysfs sysfs "$INSIDE/sys"
mount -t bpf bpf "$INSIDE/sys/fs/bpf" # an instance of its own: pins are nobody else's, and go with it
mount -t tmpfs tmpfs "$INSIDE/run"
mkdir "$INSIDE/results" "$INSIDE/repository"
mount --bind "$RESULTS" "$INSIDE/results"
# A copy, because the repository may be edited meanwhile, and tests write caches.
tar --create --directory="$REPOSITORY" --exclude-vcs --exclude='./.*' --exclude=__pycache__ . |
    tar --extract --no-same-owner --directory="$INSIDE/repository"
ip link set lo up

# Not exec: the first process of the namespace must reap orphaned children, as bash does.
chroot "$INSIDE" /usr/bin/env --ignore-environment --chdir=/repository PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/root LANG=C.UTF-8 PYTHONPATH=/repository:/repository/loader "$@"
