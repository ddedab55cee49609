#!/usr/bin/env bash
# The GPU's tests side by side, one line each; with tools named, under compute-sanitizer instead and
# without their largest cases. Needs a GPU and a build with tests; `ctest -L gpu` runs the same
# tests one after the other.
#
#     scripts/test_gpu.sh [--bin build/bin] [--limit SECONDS] [--tests "ffn moe"] [TOOL ...]
#     scripts/test_gpu.sh memcheck racecheck initcheck synccheck
set -euo pipefail
cd "$(dirname "$0")/.."
bin=build/bin limit=3600 tests=""
while [ "$#" -gt 0 ]; do
    case "$1" in
    --bin | --limit | --tests)
        [ "$#" -ge 2 ] || { echo "test_gpu: $1 needs a value" >&2; exit 2; }
        declare "${1#--}=$2"
        shift 2
        ;;
    -h | --help)
        sed -n '2,7s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    -*)
        echo "test_gpu: unknown option '$1'; see --help" >&2
        exit 2
        ;;
    *) break ;;
    esac
done
[ -n "$tests" ] || tests=$(cd "$bin" && printf '%s\n' test_gpu_* | sed 's/^test_gpu_//')
logs=$(mktemp -d "${TMPDIR:-/tmp}/test-gpu-XXXXXX")
export CK_FORK=no OMP_NUM_THREADS=2 # libcheck must not fork under CUDA
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)

# One test: plain, or under a tool. Prints how it ended; a failure leaves its log.
one() {
    local name=$1 tool=$2 log=$logs/$1.$2 begin=$SECONDS code=0 words=()
    [ "$tool" = plain ] || words=("$sanitizer" --tool "$tool" --error-exitcode 99)
    # Hazards between threads are looked for in our own kernels, which are called so; among
    # cuDNN's there are reports. (Whatever is left out, racecheck fails in tests that multiply in
    # bf16 with cuBLAS: "failed to handle a hardware exception". grouped, hopper_mlp and
    # hopper_loss call the kernels of Hopper chips with no cuBLAS around.) The other two tools also
    # look at what libraries do with our memory, but initcheck does not see cuBLAS write what its
    # splitKreduce_kernel adds up.
    case "$tool" in
    racecheck | synccheck)
        words+=(--kernel-name kns=_kernel --kernel-name-exclude kns=cudnn)
        ;;
    initcheck) words+=(--kernel-name-exclude kns=splitKreduce) ;;
    esac
    timeout "$limit" "${words[@]}" "$bin/test_gpu_$name" >"$log" 2>&1 || code=$?
    local said ends="ERROR SUMMARY|RACECHECK SUMMARY|checks, |^[0-9]+%"
    said=$(grep -E "$ends" "$log" | tail -2 | tr '\n' ' ')
    printf '%-15s %-10s exit %-3s %4d s  %s\n' "$name" "$tool" "$code" $((SECONDS - begin)) "$said"
    [ "$code" -eq 0 ] || [ "$code" -eq 77 ] || echo "$log" >>"$logs/failed"
}

[ "$#" -eq 0 ] || export GPU_TEST_WORK=${GPU_TEST_WORK:-1e9}
for tool in "${@:-plain}"; do
    for name in $tests; do one "$name" "$tool" & done
    wait
done
if [ -e "$logs/failed" ]; then
    while read -r log; do
        echo "--- $log"
        grep -E "FAIL|=========|:F:|:E:" "$log" | head -30
    done <"$logs/failed"
    exit 1
fi
rm -rf "$logs"
