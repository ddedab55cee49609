#!/usr/bin/env bash
# Format and lint: clang-format (pinned in scripts/requirements.txt), cppcheck, shellcheck, line
# length. `scripts/lint.sh --fix` formats in place.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh --dev

mapfile -t c_files < <(git ls-files '*.c' '*.h' '*.cu' '*.cuh' '*.cpp')
mapfile -t shell_files < <(git ls-files '*.sh' '*.sbatch' .ci/run)

if [ "${1:-}" = "--fix" ]; then
    .venv/bin/clang-format -i "${c_files[@]}"
    exit 0
fi
echo "lint: clang-format"
.venv/bin/clang-format --dry-run -Werror "${c_files[@]}"
echo "lint: line length"
if grep -nE '^.{101,}$' "${c_files[@]}" "${shell_files[@]}"; then
    echo "lint: lines above are longer than 100 columns" >&2
    exit 1
fi
echo "lint: cppcheck"
cppcheck --quiet --std=c11 --language=c --enable=warning,performance,portability --inline-suppr \
    --suppress=missingIncludeSystem --suppress=checkersReport --error-exitcode=1 -j "$(nproc)" \
    -D_GNU_SOURCE -D__cppcheck__ -I . base cpu data model optim train
echo "lint: shellcheck"
shellcheck "${shell_files[@]}"
echo "lint: ok"
