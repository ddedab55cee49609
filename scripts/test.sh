#!/usr/bin/env bash
# The whole test suite, twice: as released (warnings are errors), then under AddressSanitizer and
# UndefinedBehaviorSanitizer. Installs what it needs. Slow tests (label `slow`) run with --slow.
set -euo pipefail
cd "$(dirname "$0")/.."
select=(-LE slow)
[ "${1:-}" = "--slow" ] && select=()

scripts/setup.sh --dev

echo "== release build: -Wall -Wextra -Werror =="
scripts/build.sh build -DD2M_WERROR=ON -DD2M_TESTS=ON
ctest --test-dir build --output-on-failure -j "$(nproc)" "${select[@]}"

echo "== AddressSanitizer + UndefinedBehaviorSanitizer =="
scripts/build.sh build-asan -DD2M_WERROR=ON -DD2M_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DD2M_SANITIZE=address,undefined
ctest --test-dir build-asan --output-on-failure -j "$(nproc)" "${select[@]}"
