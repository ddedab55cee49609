#!/usr/bin/env bash
# The true Qwen2.5-0.5B shape through the whole job on a CPU, with random weights (slow: label
# `slow`; about 25 GB of disk, 20 GB of memory, 10 minutes on 2 cores).
#
#   tests/test_full_shape.sh BUILD_BIN PYTHON
#
#   surgery alone, N = 6 (1.66 B parameters), file to file    within 8 GiB
#   similarity, N = 2 (0.67 B), one step, save, resume for a second step, export  within 24 GiB
set -euo pipefail
bin=$(realpath "$1")
python=$(realpath -s "$2")
source_dir=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/d2m-full-XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$work"

# Runs a command and fails when its peak resident memory passes the limit in GiB.
within() {
    "$python" - "$@" <<'PYTHON'
import resource, subprocess, sys, time
limit, command = float(sys.argv[1]), sys.argv[2:]
start = time.monotonic()
code = subprocess.call(command)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
print(f"-- {time.monotonic() - start:.0f} s, peak memory {peak:.2f} GiB (limit {limit:g})",
      flush=True)
sys.exit(code or peak > limit)
PYTHON
}

echo "== a random checkpoint of the true layout, shards =="
"$python" "$source_dir/scripts/make_random_checkpoint.py" --shape qwen2.5-0.5b seed
"$python" "$source_dir/scripts/prepare_data.py" --tokenizer bytes --valid-every 10 \
    --output shards "$source_dir/data/prose/haggard.jsonl.xz"

recipe=(--recipe "$source_dir/recipes/lfuc_qwen0.5b.ini" --set run.directory="$work/runs"
    --set model.source="$work/seed" --set data.train=shards/train --set data.valid=shards/valid
    --set data.sequence_length=512 --set lfuc.calibration_sequences=2 --set train.micro_batch=1
    --set train.global_batch=1 --set train.tokens=0 --set train.steps=1 --set train.eval_every=0
    --set train.eval_sequences=1 --set checkpoint.keep_every=0 --set checkpoint.keep_last=2)

echo "== surgery alone, N = 6 =="
"$bin/train" "${recipe[@]}" --set run.name=six --dry-run | grep -E -i 'total|fit|active'
within 8 "$bin/train" "${recipe[@]}" --set run.name=six --surgery-only
"$python" - runs/six/surgery <<'PYTHON'
import json, sys
total = json.load(open(sys.argv[1] + "/config.json"))
assert (total["num_hidden_layers"], total["num_experts"]) == (19, 6), total
PYTHON
rm -rf runs/six

echo "== N = 2: similarity, surgery, one step, save =="
two=("${recipe[@]}" --set run.name=two --set lfuc.num_experts=2 --set lfuc.follower_copies=1
    --set checkpoint.every=1)
within 24 "$bin/train" "${two[@]}" --set train.steps=1
echo "== resume for a second step, export =="
within 24 "$bin/train" "${two[@]}" --set train.steps=2
"$bin/evaluate" --model runs/two/export --data shards/valid --sequence-length 512 --sequences 1 \
    --batch 1
echo "full shape: ok"
