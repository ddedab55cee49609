#!/usr/bin/env bash
# Configures and builds into a folder: scripts/build.sh [FOLDER [CMAKE_OPTION ...]], default build/.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-build}
[ "$#" -gt 0 ] && shift
cmake -S . -B "$folder" -G Ninja -DD2M_PYTHON="$PWD/.venv/bin/python" "$@" >"$folder.log" 2>&1 || {
    cat "$folder.log" >&2
    exit 1
}
rm -f "$folder.log"
cmake --build "$folder"
