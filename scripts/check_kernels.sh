#!/usr/bin/env bash
# Compiles every kernel for sm_87 (or the architectures named) and fails when one spills registers.
# Kernels of Hopper's own instructions, cuda/hopper_*.cu, are compiled for sm_90a.
# Needs nvcc, no GPU. With --verbose first, the registers of each kernel are listed, too.
#
#     scripts/check_kernels.sh [--verbose] [ARCHITECTURE ...]     # e.g. 87 90
set -euo pipefail
cd "$(dirname "$0")/.."
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
if [ ! -x "$nvcc" ]; then
    echo "check_kernels: nvcc not found: put it on PATH" >&2
    exit 2
fi

if [ "${1:-}" = "--compile" ]; then # one file, for xargs below: --compile FOLDER ARCHITECTURE FILE
    report=$2/sm_$3.$(basename "$4")
    "$nvcc" -std=c++17 -O3 --expt-relaxed-constexpr -D_GNU_SOURCE -DD2M_HAVE_HOPPER=1 -I . \
        -gencode="arch=compute_$3,code=sm_$3" -Xptxas -v \
        -c "$4" -o "$report.o" >"$report.txt" 2>&1 && exit 0
    cat "$report.txt" >&2
    exit 255 # xargs stops
fi

verbose=false
if [ "${1:-}" = "--verbose" ]; then
    verbose=true
    shift
fi
work=$(mktemp -d "${TMPDIR:-/tmp}/check-kernels-XXXXXX")
trap 'rm -rf "$work"' EXIT
for file in cuda/*.cu; do
    case "$file" in
    cuda/hopper_*) echo "90a $file" ;;
    *) for architecture in "${@:-87}"; do echo "$architecture $file"; done ;;
    esac
done | xargs -P "$(nproc)" -L 1 scripts/check_kernels.sh --compile "$work"

# ptxas says a kernel's name first, then its stack and spills, then its registers.
cat "$work"/*.txt | awk -v verbose="$verbose" '
    /Compiling entry function/ { split($0, part, "\047"); name = part[2]; target = part[4] }
    /bytes spill stores/ { spills = !/ 0 bytes spill stores, 0 bytes spill loads/; stack = $0 }
    /Used [0-9]+ registers/ {
        kernels++
        spilled += spills
        if (spills) print target, name ":" stack
        else if (verbose == "true") { sub(/.*: /, ""); print target, name ": " $0 }
        spills = 0
    }
    END {
        printf "check_kernels: %d kernels, %d of them spill registers\n", kernels, spilled
        exit kernels == 0 || spilled > 0
    }' | c++filt
