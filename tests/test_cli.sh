#!/usr/bin/env bash
# The programs' command lines: bad input gives one message, the documented exit code, and leaves
# nothing behind; good input says what it promises. Usage: test_cli.sh BIN_FOLDER SOURCE_TREE
set -euo pipefail
bin=$(realpath "$1") tree=$(realpath "$2")
work=$(mktemp -d "${TMPDIR:-/tmp}/d2m-cli-XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$work"
failures=0

complain() {
    echo "FAILED: $*"
    echo "--- stdout"; cat out
    echo "--- stderr"; cat err
    failures=$((failures + 1))
}

# expect CODE TEXT COMMAND...: exit code, one line on stderr that holds TEXT, nothing on stdout.
expect() {
    local code=$1 text=$2 got=0
    shift 2
    "$@" >out 2>err || got=$?
    [ "$got" -eq "$code" ] || complain "exit code $got, expected $code: $*"
    [ "$(wc -l <err)" -eq 1 ] || complain "not one line on stderr: $*"
    grep -qF -- "$text" err || complain "message lacks '$text': $*"
    [ ! -s out ] || complain "output on stdout: $*"
    [ ! -e runs ] || complain "a run directory was made: $*"
}

# says TEXT COMMAND...: success, and stdout holds TEXT.
says() {
    local text=$1
    shift
    "$@" >out 2>err || complain "failed: $*"
    grep -qF -- "$text" out || complain "output lacks '$text': $*"
    [ ! -s err ] || complain "output on stderr: $*"
}

# --- train: arguments --------------------------------------------------------------------------
train=$bin/train
expect 2 "no recipe given" "$train"
expect 2 "did you mean --recipe?" "$train" --recpie x
expect 2 "--set needs a value" "$train" --set
expect 2 "unexpected argument x.ini" "$train" x.ini
expect 2 "given twice" "$train" --recipe a --recipe b
expect 2 "exclude each other" "$train" --recipe quickstart_dense --dry-run --plan-only
expect 2 "exclude each other" "$train" --recipe quickstart_dense --dry-run --profile 3
expect 2 "--profile 0: expected a number of steps" "$train" --recipe quickstart_dense --profile 0
expect 2 "--profile 3x: expected a number of steps" "$train" --recipe quickstart_dense --profile 3x
expect 2 "--profile needs a value" "$train" --recipe quickstart_dense --profile
expect 2 "did you mean [train]?" "$train" --recipe quickstart_dense --set trian.steps=1
if "$train" --version | grep -q cuda; then # no device here: the rest of this file is for the CPU
    CUDA_VISIBLE_DEVICES='' expect 2 "use --device cpu" \
        "$train" --recipe quickstart_dense --device cuda
    CUDA_VISIBLE_DEVICES='' expect 2 "use --device cpu" \
        "$train" --recipe quickstart_dense --gpus 2
else
    expect 2 "no CUDA backend" "$train" --recipe quickstart_dense --device cuda
fi
expect 2 "exclude each other" "$train" --recipe quickstart_dense --gpus 2 --device cpu
expect 2 "run.directory is empty" "$train" --recipe quickstart_dense --set run.directory=
RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=1 expect 2 "RANK is set" \
    "$train" --recipe quickstart_dense --processes 2
expect 2 "run.device = 'tpu'" "$train" --recipe quickstart_dense --device tpu
expect 2 "--plan-only needs a recipe with lfuc.enabled" \
    "$train" --recipe quickstart_dense --plan-only
expect 2 "--processes 0: expected a number of ranks" "$train" --recipe quickstart_dense \
    --processes 0
expect 2 "are one choice" "$train" --recipe quickstart_dense --processes 2 --gpus 2
expect 2 "--max-restarts x: expected a number" "$train" --recipe quickstart_dense --max-restarts x
if ! "$train" --version | grep -q cuda; then
    expect 2 "no CUDA backend" "$train" --recipe quickstart_dense --gpus 2
fi
RANK=1 expect 2 "but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR" "$train" --recipe quickstart_dense
says "/quickstart_dense" "$train" --recipe quickstart_dense --print-directory
says "usage: train" "$train" --help
says "prune_layers = 5" "$train" --help
says "--profile N" "$train" --help
says "dense2moe train" "$train" --version

# --- train: recipes ----------------------------------------------------------------------------
expect 66 "no-such.ini" "$train" --recipe no-such.ini
expect 66 "no-such-shards" "$train" --recipe quickstart_dense --device cpu --profile 3 \
    --set data.train=no-such-shards
expect 66 "./quickstart_dense.ini" "$train" --recipe ./quickstart_dense.ini
printf '[train]\nsteps = 3\nstpes = 4\n' >bad.ini
expect 2 "bad.ini:3: unknown key 'stpes' in [train]; did you mean 'steps'?" "$train" --recipe bad
printf '[run]\nseed = 1\nseed = 2\n' >bad.ini
expect 2 "bad.ini:3: key 'seed' of [run] was already given in line 2" "$train" --recipe bad.ini
printf '[optim]\nbeta1 = 2\n' >bad.ini
expect 2 "bad.ini:2: optim.beta1 = 2 is out of range (expected 0 to 1)" "$train" --recipe bad.ini
printf 'include = bad.ini\n' >bad.ini
expect 2 "bad.ini:1: include goes round in a circle" "$train" --recipe bad.ini
printf '[run]\nname = \377\n' >bad.ini
expect 2 "bad.ini:2: byte 0xff is not valid UTF-8" "$train" --recipe bad.ini
printf '[data]\ntrain = shards\n' >bad.ini
expect 2 "train.steps and train.tokens are both 0" "$train" --recipe bad.ini

# --- train: models -----------------------------------------------------------------------------
lfuc=(--recipe lfuc_qwen0.5b.ini --device cpu)
expect 66 "models/Qwen2.5-0.5B" "$train" "${lfuc[@]}"
expect 66 "models/Qwen2.5-0.5B" "$train" "${lfuc[@]}" --dry-run
mkdir -p models/Qwen2.5-0.5B
expect 66 "config.json" "$train" "${lfuc[@]}" --dry-run
echo '{"model_type": "rwkv"}' >models/Qwen2.5-0.5B/config.json
expect 65 "rwkv" "$train" "${lfuc[@]}" --dry-run
echo '{"model_type": ' >models/Qwen2.5-0.5B/config.json
expect 65 "config.json" "$train" "${lfuc[@]}" --dry-run
cat >models/Qwen2.5-0.5B/config.json <<'JSON'
{"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896,
 "intermediate_size": 4864, "max_position_embeddings": 32768, "model_type": "qwen2",
 "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
 "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": true,
 "torch_dtype": "bfloat16", "use_sliding_window": false, "vocab_size": 151936}
JSON
expect 66 "model.safetensors" "$train" "${lfuc[@]}"
expect 2 "can prune at most 11" "$train" "${lfuc[@]}" --dry-run --set lfuc.prune_layers=12
expect 2 "straight_through" "$train" "${lfuc[@]}" --dry-run --set router.gate=renorm
expect 2 "not available in this version" "$train" "${lfuc[@]}" --dry-run --set lfuc.select=loss
expect 66 "plan.json" "$train" "${lfuc[@]}" --dry-run --set lfuc.plan=plan.json

# The figures of the paper's model (METHOD.md, section 4), and what its training state takes.
says "fused model              1.66 B total,    420 M active per token, 19 layers" \
    "$train" "${lfuc[@]}" --dry-run
says "training state (parameters, gradients, AdamW moments): 26.6 GB" \
    "$train" "${lfuc[@]}" --dry-run
says "training state (parameters, gradients, AdamW moments): 19.9 GB" \
    "$train" "${lfuc[@]}" --dry-run --set optim.state_dtype=bf16
expect 2 "train.grad_dtype = bf16 needs a GPU" \
    "$train" "${lfuc[@]}" --dry-run --set train.grad_dtype=bf16
says "225 B (225,037,516,800)" "$train" "${lfuc[@]}" --dry-run
says "5,723, of which 9 warm-up" "$train" "${lfuc[@]}" --dry-run
says "model                     494 M total" "$train" --recipe cpt_qwen0.5b --device cpu --dry-run

# --- train: installed recipes come from beside the program ----------------------------------------
mkdir -p prefix/bin prefix/share/dense2moe
cp "$train" prefix/bin/train
printf '[train]\nsteps = 3\n' >prefix/share/dense2moe/only_installed.ini
expect 2 "data.train is empty" prefix/bin/train --recipe only_installed
printf '[run]\nseeds = 3\n' >only_installed.ini # what lies in the current directory comes first
expect 2 "did you mean 'seed'?" prefix/bin/train --recipe only_installed.ini

# --- train: the documentation is made by the program ---------------------------------------------
"$train" --print-settings-markdown >out
cmp out "$tree/docs/recipe.md" || {
    echo "FAILED: docs/recipe.md is out of date: train --print-settings-markdown > docs/recipe.md"
    failures=$((failures + 1))
}

# --- evaluate ------------------------------------------------------------------------------------
evaluate=$bin/evaluate
expect 2 "no model given" "$evaluate"
expect 2 "give one of --data SHARDS and --text FILE" "$evaluate" --model models/Qwen2.5-0.5B
expect 2 "--batch 0: expected a whole number" "$evaluate" --batch 0
expect 2 "not a valid option" "$evaluate" --modle x
expect 66 "there is no such directory" "$evaluate" --model nowhere --data shards
mkdir empty
expect 66 "holds no model" "$evaluate" --model empty --data shards
expect 66 "model.safetensors" "$evaluate" --model models/Qwen2.5-0.5B --data shards
says "usage: evaluate" "$evaluate" --help
says "dense2moe evaluate" "$evaluate" --version

echo "cli: $failures failures"
[ "$failures" -eq 0 ]
