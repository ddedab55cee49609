#!/usr/bin/env bash
# Builds the libFuzzer targets and runs each from its seed corpus: scripts/fuzz.sh [RUNS], default
# 50000 a target (about a minute in all). Everything that parses a user's file has a target.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh --dev
CC=clang scripts/build.sh build-fuzz -DD2M_FUZZ=ON -DD2M_TESTS=OFF -DD2M_FUZZ_RUNS="${1:-50000}"
ctest --test-dir build-fuzz -L fuzz --output-on-failure -j "$(nproc)"
