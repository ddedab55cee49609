#!/usr/bin/env bash
# Ranks on two nodes with networks of their own (namespaces and a cable between them): they meet
# wherever the master's name leads from each node, and a pulled cable ends all of them in time.
# Usage: test_nodes.sh BIN_FOLDER SOURCE_TREE PYTHON. Exit code 77: skipped.
set -euo pipefail
bin=$(realpath "$1") tree=$(realpath "$2") python=$3

skip() { echo "skipped: $*"; exit 77; }
[ "$(id -u)" -eq 0 ] || skip "network namespaces need root"
command -v ip >/dev/null || skip "no ip (package iproute2)"

work=$(mktemp -d "${TMPDIR:-/tmp}/d2m-nodes-XXXXXX")
node1=d2m-$$-1 node2=d2m-$$-2
clean_up() {
    # shellcheck disable=SC2046 # one word per process
    kill -9 $(ip netns pids "$node1" 2>/dev/null) $(ip netns pids "$node2" 2>/dev/null) \
        2>/dev/null || true
    ip netns del "$node1" 2>/dev/null || true
    ip netns del "$node2" 2>/dev/null || true
    rm -rf "$work" "/etc/netns/$node1" "/etc/netns/$node2"
}
trap clean_up EXIT
cd "$work"
{
    ip netns add "$node1" && ip netns add "$node2" &&
        ip link add d2m1 netns "$node1" type veth peer name d2m2 netns "$node2"
} 2>err || skip "no network namespaces here: $(cat err)"
ip -n "$node1" addr add 10.77.0.1/24 dev d2m1
ip -n "$node2" addr add 10.77.0.2/24 dev d2m2
for node in "$node1" "$node2"; do ip -n "$node" link set lo up; done
ip -n "$node1" link set d2m1 up
ip -n "$node2" link set d2m2 up
# As Debian's installer writes it: a host knows itself by an address that nobody else can reach.
mkdir -p "/etc/netns/$node1" "/etc/netns/$node2"
printf '127.0.0.1 localhost\n127.0.1.1 master\n' >"/etc/netns/$node1/hosts"
printf '127.0.0.1 localhost\n10.77.0.1 master\n' >"/etc/netns/$node2/hosts"
for _ in $(seq 50); do
    ip netns exec "$node2" bash -c 'exec 3<>/dev/tcp/10.77.0.1/9' 2>&1 | grep -q refused && break
    sleep 0.1
done

failures=0
fail() {
    echo "FAILED: $*"
    [ "$failures" -gt 0 ] || tail -n 5 out? || true
    failures=$((failures + 1))
}
"$python" "$tree/scripts/prepare_data.py" --tokenizer bytes --valid-every 10 --output shards \
    "$tree/data/prose/haggard.jsonl.xz" &>prepare
cat >run.ini <<END
[run]
device = cpu
threads = 1
[model]
hidden_size = 32
num_layers = 2
num_heads = 4
num_kv_heads = 2
intermediate_size = 48
[data]
train = shards/train
sequence_length = 32
[train]
micro_batch = 1
global_batch = 3
[parallel]
hang_seconds = 2
start_seconds = 6
[export]
hf = false
END
# start MASTER_ADDR STEPS NAME: ranks 0 and 1 on the first node, rank 2 on the second.
start() {
    pids=()
    for rank in 0 1 2; do
        node=$node1
        [ "$rank" -lt 2 ] || node=$node2
        ip netns exec "$node" env RANK="$rank" WORLD_SIZE=3 LOCAL_RANK="$rank" MASTER_ADDR="$1" \
            MASTER_PORT=29511 "$bin/train" --recipe run.ini --set train.steps="$2" \
            --set run.name="$3" &>"out$rank" &
        pids+=($!)
    done
}
# codes EXPECTED: of all three.
codes() {
    local rank code
    for rank in 0 1 2; do
        code=0
        wait "${pids[$rank]}" || code=$?
        [ "$code" -eq "$1" ] || fail "rank $rank ended with $code, expected $1"
    done
}

for address in 10.77.0.1 master; do
    start "$address" 20 "$address"
    codes 0
    grep -q "done: 20 steps" out0 || fail "the run through $address did not end"
done

start master 100000 pulled
for _ in $(seq 200); do
    grep -q "info: step .0/" out0 && break
    sleep 0.1
done
ip -n "$node2" link set d2m2 down
SECONDS=0
codes 76
[ "$SECONDS" -le 20 ] || fail "a pulled cable was noticed after $SECONDS s"
grep -q "rank 2 (.*has not moved a byte" out0 || fail "rank 0 does not name rank 2"
grep -qE "rank [01] \(.*has not moved a byte" out2 || fail "rank 2 does not name the others"

# The cable is still out: rank 2 cannot come.
start master 20 away
codes 76
grep -q "have not come: rank 2" out0 || fail "the missing rank is not named"
grep -q "cannot be reached" out2 || fail "rank 2 does not say that it cannot reach the master"

echo "nodes: $failures failures"
[ "$failures" -eq 0 ]
