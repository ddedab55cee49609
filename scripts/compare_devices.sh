#!/usr/bin/env bash
# The quickstart's work on the CPU and on a GPU: the same bits twice on the GPU, the same curves on
# both, the same plan, the same perplexity of one model. Needs a GPU; fails where a bound is missed.
#
#   scripts/compare_devices.sh [--bin build/bin] [--python .venv/bin/python] [--work DIR]
#
# Training is chaotic: at the quickstart's own learning rate, 2e-3, a change of 0.1 % in it moves
# means of 20 steps by 1.0 % on one and the same CPU; at 5e-4, which is used here, by 0.2 %.
# Bounds: bf16 has 8 bits of mantissa, so single steps wander; means of 20 steps may be 1 % apart.
# In fp32 only the order of sums differs, which training makes grow: 0.2 %. A perplexity is the mean
# over 16,384 targets of one forward pass: 0.01 % in fp32 and 0.5 % in bf16.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/build/bin python=$PWD/.venv/bin/python work=""
while [ "$#" -gt 0 ]; do
    case "$1" in
    --bin | --python | --work)
        [ "$#" -ge 2 ] || { echo "compare_devices: $1 needs a value" >&2; exit 2; }
        declare "${1#--}=$2"
        shift 2
        ;;
    -h | --help)
        sed -n '2,5s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    *)
        echo "compare_devices: unknown argument '$1'; see --help" >&2
        exit 2
        ;;
    esac
done
if [ -z "$work" ]; then
    work=$(mktemp -d "${TMPDIR:-/tmp}/compare-devices-XXXXXX")
    trap 'rm -rf "$work"' EXIT
fi
mkdir -p "$work"
runs=$work/runs shards=$work/shards

# run NAME RECIPE DEVICE PRECISION [setting ...]: what it prints goes to a log.
run() {
    local name=$1 recipe=$2 device=$3 precision=$4
    shift 4
    local settings=(run.directory="$runs" run.name="$name" data.train="$shards/train"
        data.valid="$shards/valid" run.gpu_precision="$precision" parallel.processes=1
        optim.schedule=constant optim.lr=5e-4 train.log_every=1 checkpoint.every=0 "$@")
    "$bin/train" --recipe "recipes/$recipe.ini" --device "$device" --resume never \
        "${settings[@]/#/--set=}" >"$work/$name.log" 2>&1 ||
        { tail -5 "$work/$name.log" >&2; exit 1; }
}

# Two runs' losses, apart by at most so many percent.
curves() {
    printf '%s and %s: ' "$1" "$2"
    "$python" scripts/plot_run.py "$runs/$1" --compare "$runs/$2" --at-most "$3"
}

# Whether two runs ended with the same weights, m and v.
same_bits() {
    local a b name
    a=$(echo "$runs/$1"/checkpoints/step_*) b=$(echo "$runs/$2"/checkpoints/step_*)
    for name in model.safetensors optimizer-00000-of-00001.safetensors; do
        cmp "$a/$name" "$b/$name"
    done
    echo "$1 and $2: weights, m and v are the same, bit for bit"
}

# A number from each of two places, apart by at most so many percent.
numbers() {
    "$python" - "$@" <<'PYTHON'
import sys
what, a, b, bound = sys.argv[1], *map(float, sys.argv[2:])
apart = 100 * abs(a / b - 1)
print(f"{what}: {a:.4f} and {b:.4f}, {apart:.4f} % apart")
if not apart <= bound:
    sys.exit(f"compare_devices: {what}: more than {bound} %")
PYTHON
}
# Of the evaluation before the first step.
perplexity() {
    "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["perplexity_start"])' \
        "$runs/$1/result.json"
}
evaluated() {
    local log=$work/evaluate_$2.log
    "$bin/evaluate" --model "$runs/$1/export" --data "$shards/valid" --sequence-length 256 \
        --sequences 64 --device "$2" --json >"$log.json" 2>"$log" ||
        { tail -5 "$log" >&2; return 1; }
    "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["perplexity"])' "$log.json"
}

rm -rf "$shards"
"$python" scripts/prepare_data.py --tokenizer bytes --valid-every 10 --output "$shards" \
    data/prose/haggard.jsonl.xz >"$work/shards.log" 2>&1

steps=(train.steps=200)
run dense_cpu quickstart_dense cpu bf16 "${steps[@]}" &
run dense_fp32 quickstart_dense cuda fp32 "${steps[@]}"
run dense_bf16 quickstart_dense cuda bf16 "${steps[@]}"
run dense_again quickstart_dense cuda bf16 "${steps[@]}"
wait $!
same_bits dense_bf16 dense_again
curves dense_fp32 dense_cpu 0.2
curves dense_bf16 dense_cpu 1

# From one dense model: similarity, plan, surgery, training.
steps=(train.steps=100 model.source="$runs/dense_cpu/export")
run lfuc_cpu quickstart_lfuc cpu bf16 "${steps[@]}" &
run lfuc_fp32 quickstart_lfuc cuda fp32 "${steps[@]}"
run lfuc_bf16 quickstart_lfuc cuda bf16 "${steps[@]}"
run lfuc_again quickstart_lfuc cuda bf16 "${steps[@]}"
wait $!
same_bits lfuc_bf16 lfuc_again
for name in lfuc_fp32 lfuc_bf16; do
    "$python" - "$runs/$name/plan/plan.json" "$runs/lfuc_cpu/plan/plan.json" <<'PYTHON'
import json, sys
blocks = [[(block["base"], block["followers"]) for block in json.load(open(path))["blocks"]]
          for path in sys.argv[1:]]
if blocks[0] != blocks[1]:
    sys.exit(f"compare_devices: the plans fuse {blocks[0]} and {blocks[1]}")
print(f"{sys.argv[1]}: the CPU's blocks")
PYTHON
done
numbers "perplexity after surgery, fp32 and CPU" \
    "$(perplexity lfuc_fp32)" "$(perplexity lfuc_cpu)" 0.01
numbers "perplexity after surgery, bf16 and CPU" \
    "$(perplexity lfuc_bf16)" "$(perplexity lfuc_cpu)" 0.5
curves lfuc_fp32 lfuc_cpu 0.2
curves lfuc_bf16 lfuc_cpu 1
on_gpu=$(evaluated lfuc_cpu cuda)
on_cpu=$(evaluated lfuc_cpu cpu)
numbers "perplexity of lfuc_cpu's export by evaluate, GPU and CPU" "$on_gpu" "$on_cpu" 0.5
echo "compare_devices: all within their bounds"
