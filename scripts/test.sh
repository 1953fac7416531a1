#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Set up what is missing, then run every check and every test, those that load the program and make namespaces included.
#
# Usage: scripts/test.sh [PYTEST-ARGUMENT...]     the arguments narrow the pytest step only; -n 0: in one process
#        scripts/test.sh unit [PYTEST-ARGUMENT...]   the unit tests and nothing else
#        scripts/test.sh vm [KERNEL...]           boot other kernels and run the project in them: names of packaged
#                                                 kernels, or paths of a vmlinux (python -m tests.vm --help)
#        scripts/test.sh nightly [VMLINUX...]     everything: all steps, the coverage of the tests, the removal of each
#                                                 guard, all packaged kernels and these, all suites of Debian; the results
#                                                 are recorded for docs/kernels.md and docs/versions.md
#
# All steps are run whatever fails; the summary comes last and the exit code is 0 only when all passed. With CI=true a
# skipped test is a failure too, some kernels are booted, and Debian's newest suite is run.
set -uo pipefail

readonly ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly VENV="${NETPOL_VENV:-$ROOT/.venv}"
# Files of tests run side by side in so many processes, whatever the number of processors: most of them wait most of the
# time, the unit tests do not.  A file stays whole, so its laboratory and its agent are made once; names of pins and
# namespaces differ by process.
readonly PROCESSES=3 UNIT_PROCESSES=2

mode=steps
case "${1:-}" in
    unit | vm | nightly) mode="$1"; shift ;;
esac
setup=(--dev)
[[ "$mode" == unit || ( "$mode" == steps && "${CI:-}" != true ) ]] || setup+=(--vm)
"$ROOT/scripts/setup.sh" "${setup[@]}" || exit
cd "$ROOT" || exit
export PATH="$VENV/bin:$PATH"
case "$mode" in
    unit) exec python -m pytest --numprocesses="$UNIT_PROCESSES" --dist=loadfile tests/unit "$@" ;;
    vm) exec python -m tests.vm "$@" ;;
esac
reports="$(mktemp -d)"
trap 'rm -rf "$reports"' EXIT

summary=()
failed=0
step() { # NAME COMMAND...
    local name="$1" began=$SECONDS outcome=passed
    shift
    printf '\n==> %s\n' "$name"
    "$@" || { outcome=FAILED; failed=$((failed + 1)); }
    summary+=("$(printf '%-7s %4ds  %s' "$outcome" $((SECONDS - began)) "$name")")
}

# A step that downloads a kernel or a distribution: where the machine cannot (exit code 5, the step says why) it was not run,
# which the summary shows and which is no failure.
step_where_possible() { # NAME COMMAND...
    local name="$1" began=$SECONDS code=0 outcome=passed
    shift
    printf '\n==> %s\n' "$name"
    "$@" || code=$?
    case "$code" in
        0) ;;
        5) outcome="NOT RUN" ;;
        *) outcome=FAILED; failed=$((failed + 1)) ;;
    esac
    summary+=("$(printf '%-7s %4ds  %s' "$outcome" $((SECONDS - began)) "$name")")
}

# In the order of the directories: the files that take long come first, so that none of them is left alone at the end.
run_pytest() {
    python -m pytest --numprocesses="$PROCESSES" --dist=loadfile --no-loadscope-reorder \
        --durations=15 --junit-xml="$reports/pytest.xml" "$@"
}

# Counting lines and branches doubles what the tests cost, so only nightly does.  Coverage needs the tests' own exit code
# first and the report whatever it was.
run_pytest_with_coverage() {
    local code=0
    run_pytest --cov --cov-report= || code=$?
    coverage report || code=$?
    return "$code"
}

# Each skipped test is a line of the summary too: a log may be cut where this step printed it.
forbid_skips() {
    python - "$reports/pytest.xml" <<'EOF' | tee "$reports/skipped"
import sys
from xml.etree import ElementTree

skipped = [
    f"{case.get('classname')}.{case.get('name')}: {mark.get('message')}"
    for case in ElementTree.parse(sys.argv[1]).iter("testcase")
    for mark in case.iter("skipped")
]
print("\n".join(skipped) or "no test was skipped")
sys.exit(1 if skipped else 0)
EOF
}

step "ruff check" ruff check .
step "ruff format" ruff format --check .
for version in 3.10 3.11 3.12 3.13 3.14; do
    step "mypy, Python $version" mypy --python-version "$version"
done
step "import contracts" lint-imports
step "codespell" codespell
step "generated files are fresh" python scripts/generate_abi.py --check
step "generated custom resources are fresh" python scripts/generate_crds.py --check
step "Dockerfile" python scripts/check_image.py
step "rendered manifests are fresh and valid" python scripts/render_manifests.py --check
step "generated table of options is fresh" python scripts/generate_configuration.py --check
step "documented results are the recorded ones" python -m bench.page --check
step "documented kernels are the recorded ones" python -m tests.vm.page --check
step "documented networks are the recorded ones" python -m tests.netns.networks --check
step "C sources" scripts/check_c.sh
step "wheel" scripts/check_wheel.sh
# Kept for everything below: without it each process of the tests compiles for itself.
step "the packet path compiles" python -c 'from netpol_loader.pins.build import compiled_program; compiled_program()'
if [[ "$mode" == nightly ]]; then
    step "tests" run_pytest_with_coverage
    step "each guard is noticed when it goes" python -m tests.guards
    step "kernels in virtual machines" python -m tests.vm --all --record
    for vmlinux in "$@"; do
        step "kernel $vmlinux in a virtual machine" python -m tests.vm --record "$vmlinux"
    done
    step "suites of Debian" scripts/suites.sh --record
    step "the image, built without a container runtime" python scripts/check_image.py --build
else
    step "tests" run_pytest "$@"
fi
if [[ "${CI:-}" == true && "$mode" == steps ]]; then
    step "no test skipped" forbid_skips
    step_where_possible "kernels in virtual machines" python -m tests.vm --ci
    step_where_possible "Debian's newest suite" scripts/suites.sh sid
fi
step "benchmarks, smoke" netpolctl bench --smoke --output "$reports/bench.json"
# The cases of the repository are run by tests/kernel; here, that the command can be told to.
step "case files, all engines" netpolctl test examples/cases --engine all

printf '\n%s\n' "==> summary"
printf '%s\n' "${summary[@]}"
[[ ! -e "$reports/skipped" ]] || cat "$reports/skipped"
exit $((failed > 0))
