#!/usr/bin/env bash
# The main job in a few minutes on a laptop: text -> token shards -> a small dense model ->
# similarity, plan, surgery, continual pre-training -> Hugging Face export.
#
#   scripts/quickstart.sh                          bundled prose, a small model trained here
#   scripts/quickstart.sh --model DIR --text FILE  your Hugging Face model and your text
#   ... --set section.key=value                    handed on to the fusion run (repeatable)
#
# Everything it makes is under .quickstart/, which it empties first.
set -euo pipefail
cd "$(dirname "$0")/.."
here=.quickstart

model="" text="" more=()
while [ "$#" -gt 0 ]; do
    case "$1" in
    --model | --text | --set)
        [ "$#" -ge 2 ] || { echo "quickstart: $1 needs a value" >&2; exit 2; }
        case "$1" in
        --model) model=$(realpath -- "$2") ;;
        --text) text=$(realpath -- "$2") ;;
        --set) more+=(--set "$2") ;;
        esac
        shift 2
        ;;
    -h | --help)
        sed -n '2,9s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    *)
        echo "quickstart: unknown argument '$1'; see --help" >&2
        exit 2
        ;;
    esac
done
if [ -n "$model" ] && [ -z "$text" ]; then
    echo "quickstart: --model needs --text FILE to train on" >&2
    exit 2
fi

step() { printf '\n[%4d s] %s\n' "$SECONDS" "$1"; }
# Perplexity of the evaluation called $2 in run $1.
perplexity() { .venv/bin/python scripts/plot_run.py --perplexity "$2" "$here/runs/$1"; }

step "set-up and build"
scripts/setup.sh
options=()
[ -f build/CMakeCache.txt ] || options=(-DD2M_TESTS=OFF)
scripts/build.sh build "${options[@]}"

step "token shards"
rm -rf "$here"
tokenizer=bytes
[ -z "$model" ] || tokenizer=$model
.venv/bin/python scripts/prepare_data.py --tokenizer "$tokenizer" --valid-every 10 \
    --output "$here/shards" "${text:-data/prose/haggard.jsonl.xz}"

if [ -z "$model" ]; then
    step "a small dense model from random weights"
    build/bin/train --recipe recipes/quickstart_dense.ini
    run=quickstart_lfuc
    seed=$(perplexity quickstart_dense end)
else
    step "perplexity of $model"
    run=own_lfuc
    more=(--set run.name="$run" --set model.source="$model" --set lfuc.prune_layers=1
        --set lfuc.num_experts=2 --set lfuc.follower_copies=1 --set optim.lr=1e-4
        --set optim.min_lr=1e-5 --set train.steps=30 --set train.micro_batch=2
        --set train.global_batch=4 --set train.eval_sequences=16 --set train.log_every=1
        --set lfuc.calibration_sequences=4 "${more[@]}")
    seed=$(build/bin/evaluate --model "$model" --data "$here/shards/valid" \
        --sequence-length 256 --sequences 16 --batch 2 --json |
        .venv/bin/python -c 'import json, sys; print("%.2f" % json.load(sys.stdin)["perplexity"])')
fi

step "similarity, plan, surgery, continual pre-training"
build/bin/train --recipe recipes/quickstart_lfuc.ini "${more[@]}"
.venv/bin/python scripts/plot_run.py "$here/runs/$run"

after_surgery=$(perplexity "$run" start)
after_training=$(perplexity "$run" end)
step "done"
echo "held-out perplexity: seed $seed, after surgery $after_surgery," \
    "after continual pre-training $after_training"
echo "shards: $here/shards  run: $here/runs/$run (log.jsonl, plots, plan/, checkpoints/)" \
    " model: $here/runs/$run/export"
# The point of the whole: training must repair most of what surgery broke.
.venv/bin/python - "$after_surgery" "$after_training" <<'PYTHON'
import sys
before, after = map(float, sys.argv[1:])
if not after < 0.9 * before:
    sys.exit("quickstart: continual pre-training did not repair the model")
PYTHON
