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
# Number of processes that run test files in parallel, whatever the number of processors: most tests wait most of the
# time, only the unit tests do not. One process runs all tests of a file, so the file's laboratory and agent are made
# once. Names of pins and namespaces differ by process.
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

# Run a step that downloads a kernel or a distribution. If the machine cannot download (exit code 5; the step prints the
# reason), the step counts as not run. The summary shows this, and it is no failure.
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

# The order of the directories: files that take long come first, so that none of them runs alone at the end.
run_pytest() {
    python -m pytest --numprocesses="$PROCESSES" --dist=loadfile --no-loadscope-reorder \
        --durations=15 --junit-xml="$reports/pytest.xml" "$@"
}

# Coverage of lines and branches doubles the time of the tests, so only nightly measures it. The report is made whatever
# the exit code of the tests is, and that exit code counts first.
run_pytest_with_coverage() {
    local code=0
    run_pytest --cov --cov-report= || code=$?
    coverage report || code=$?
    return "$code"
}

# The summary has a line for each skipped test, too, because a log may be cut where the step printed the test.
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
# The compiled file is kept for all steps below. Without it, each test process would compile for itself.
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
# tests/kernel runs the repository's cases. This step checks that the command runs them, too.
step "case files, all engines" netpolctl test examples/cases --engine all

printf '\n%s\n' "==> summary"
printf '%s\n' "${summary[@]}"
[[ ! -e "$reports/skipped" ]] || cat "$reports/skipped"
exit $((failed > 0))
