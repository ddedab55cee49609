#!/usr/bin/env bash
# Speed on the CPU, measured on this machine in one run: training tokens/s of the quickstart models
# (dense and after the fusion) against PyTorch eager, peak memory against what --dry-run says, shard
# reading, and text preparation.
#
#   scripts/bench_cpu.sh [--threads N] [--rounds N] [--tokenizer DIR --text FILE]
#
# FILE should have some 100 MB: a worker needs a second to load a large tokenizer, and gets faster
# the more words it has seen. Reading is then also measured on its shards, whose ids have 32 bits.
#
# Ours and PyTorch take turns, round by round, so that both see the machine in the same state. Torch
# is looked for in $BENCH_PYTHON, .venv and the system's python3; without it that half is left out.
set -euo pipefail
cd "$(dirname "$0")/.."
here=.bench

threads=$(nproc) rounds=3 tokenizer="" text=""
while [ "$#" -gt 0 ]; do
    case "$1" in
    --threads | --rounds | --tokenizer | --text)
        [ "$#" -ge 2 ] || { echo "bench_cpu: $1 needs a value" >&2; exit 2; }
        declare "${1#--}=$2"
        shift 2
        ;;
    -h | --help)
        sed -n '2,12s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    *)
        echo "bench_cpu: unknown argument '$1'; see --help" >&2
        exit 2
        ;;
    esac
done

note() { printf 'bench_cpu: %s\n' "$1" >&2; }

scripts/setup.sh
options=()
[ -f build/CMakeCache.txt ] || options=(-DD2M_TESTS=OFF)
scripts/build.sh build "${options[@]}" >&2

torch_python=""
for python in "${BENCH_PYTHON:-}" .venv/bin/python python3; do
    if [ -n "$python" ] && "$python" -c 'import torch' 2>/dev/null; then
        torch_python=$python
        break
    fi
done
[ -n "$torch_python" ] || note "no Python with torch here: speed without a comparison"

rm -rf "$here"
mkdir -p "$here"
note "token shards"
.venv/bin/python scripts/prepare_data.py --tokenizer bytes --valid-every 10 \
    --output "$here/shards" data/prose/haggard.jsonl.xz >/dev/null

# --- Training -------------------------------------------------------------------------------------

steps=30 warmup=5 batch=8 sequence=256
# Trains recipe $1 (more arguments follow); leaves its log in $here/$1.log and peak memory beside.
ours() {
    local name=$1
    shift
    rm -rf "$here/runs/$name"
    .venv/bin/python - "$here/$name.peak" build/bin/train --recipe "recipes/$name.ini" \
        --set run.directory="$here/runs" --set run.threads="$threads" \
        --set data.train="$here/shards/train" --set data.valid="$here/shards/valid" \
        --set train.steps=$((steps + warmup)) --set train.log_every=1 \
        --set train.micro_batch=$batch --set train.global_batch=$batch \
        --set data.sequence_length=$sequence --set train.eval_sequences=8 "$@" <<'PYTHON'
import pathlib, resource, subprocess, sys
with open(sys.argv[1] + ".log", "wb") as log:
    code = subprocess.run(sys.argv[2:], stdout=log, stderr=log).returncode
if code:
    sys.stderr.write(pathlib.Path(sys.argv[1] + ".log").read_text())
    sys.exit(code)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
pathlib.Path(sys.argv[1]).write_text(str(peak))
PYTHON
    cat "$here/runs/$name/log.jsonl" >>"$here/$name.jsonl"
}
peer() {
    [ -n "$torch_python" ] || return 0
    "$torch_python" scripts/bench_cpu_peer.py --config "$here/runs/$1/export/config.json" \
        --batch $batch --sequence $sequence --threads "$threads" --steps $steps \
        --warmup $warmup >>"$here/$1.peer"
}
for ((round = 1; round <= rounds; round++)); do
    note "training, round $round of $rounds"
    ours quickstart_dense
    peer quickstart_dense
    ours quickstart_lfuc --set model.source="$here/runs/quickstart_dense/export"
    peer quickstart_lfuc
done
for name in quickstart_dense quickstart_lfuc; do
    source=()
    [ "$name" = quickstart_dense ] ||
        source=(--set model.source="$here/runs/quickstart_dense/export")
    build/bin/train --recipe "recipes/$name.ini" --set data.train="$here/shards/train" \
        --set data.valid="$here/shards/valid" --set run.threads="$threads" "${source[@]}" \
        --dry-run >"$here/$name.dry"
done

# --- Data -----------------------------------------------------------------------------------------

note "shard reading"
# 64 copies of the prose: more than the processor's caches hold, in the page cache after the check.
.venv/bin/python - "$here/prose.jsonl" <<'PYTHON'
import lzma, sys
with lzma.open("data/prose/haggard.jsonl.xz", "rb") as source, open(sys.argv[1], "wb") as out:
    text = source.read()
    for _ in range(64):
        out.write(text)
PYTHON
.venv/bin/python scripts/prepare_data.py --tokenizer bytes --output "$here/large" \
    "$here/prose.jsonl" >/dev/null
rm "$here/prose.jsonl"
build/bin/shards bench "$here/large" >"$here/reading" 2>"$here/reading.log" ||
    { cat "$here/reading.log" >&2; exit 1; }
if [ -n "$tokenizer" ] && [ -n "$text" ]; then
    note "text preparation"
    .venv/bin/python scripts/prepare_data.py --tokenizer "$tokenizer" --output "$here/tokens" \
        "$text" >"$here/preparation" 2>&1
    build/bin/shards bench "$here/tokens" >"$here/reading32" 2>"$here/reading.log" ||
        { cat "$here/reading.log" >&2; exit 1; }
fi

# --- Report ---------------------------------------------------------------------------------------

.venv/bin/python - "$here" "$threads" "$warmup" <<'PYTHON'
import json, os, pathlib, re, statistics, sys

here, threads, warmup = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with open("/proc/cpuinfo", encoding="utf-8") as file:
    cpu = next((l.split(":", 1)[1].strip() for l in file if l.startswith("model name")), "CPU")
load = os.getloadavg()[0]
print(f"{cpu}, {threads} threads; load average at the end {load:.1f}")
print(f"{'what':<46} {'ours':>12} {'PyTorch':>12} {'ratio':>7}  at least")


def line(what, ours, peer="", ratio="", bar=""):
    print(f"{what:<46} {ours:>12} {peer:>12} {ratio:>7}  {bar}")


torch = ""
for name, text in (("quickstart_dense", "dense"), ("quickstart_lfuc", "fused, experts")):
    records = map(json.loads, (here / f"{name}.jsonl").read_text().splitlines())
    ours = statistics.median(r["tokens_per_second"] for r in records
                             if r["kind"] == "step" and r["step"] > warmup)
    label = f"training, quickstart {text}, tokens/s"
    if (here / f"{name}.peer").exists():
        runs = [json.loads(l) for l in (here / f"{name}.peer").read_text().splitlines()]
        torch = runs[0]["torch"]
        peer = statistics.median(rate for run in runs for rate in run["tokens_per_second"])
        line(label, f"{ours:.0f}", f"{peer:.0f}", f"{ours / peer:.2f}", "1.00")
    else:
        line(label, f"{ours:.0f}")
for name, text in (("quickstart_dense", "dense"), ("quickstart_lfuc", "fused")):
    peak = int((here / f"{name}.peak").read_text())
    dry = (here / f"{name}.dry").read_text()
    number, unit = re.search(r"^  total +([\d.]+) (\w+)", dry, re.M).groups()
    planned = float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    line(f"peak memory, quickstart {text}, of the plan", f"{peak / 1e6:.0f} MB",
         f"({number} {unit})", f"{peak / planned:.2f}", "0.90 to 1.10")
for name, width in (("reading", 16), ("reading32", 32)):
    if (here / name).exists():
        rate = re.search(r"([\d.]+) GB/s", (here / name).read_text()).group(1)
        line(f"shard reading from the page cache, {width}-bit ids", f"{rate} GB/s", bar="1 GB/s")
if (here / "preparation").exists():
    text = (here / "preparation").read_text()
    rate = re.search(r"\(([\d.]+) MB/s per core\)", text).group(1)
    line("prepare_data.py, per core", f"{rate} MB/s", bar="5 MB/s")
if torch:
    print(f"PyTorch {torch}, eager, fp32, scaled_dot_product_attention; medians over all rounds")
PYTHON
