#!/usr/bin/env bash
# scripts/slurm/train.sbatch under a real Slurm: two nodes on this machine, without cgroups. A job
# that runs through, ones that are asked to make room (USR1), one that loses a task, and ones that
# must not be requeued. Usage: test_slurm.sh BIN_FOLDER SOURCE_TREE PYTHON. Exit code 77: skipped.
set -euo pipefail
bin=$(realpath "$1") tree=$(realpath "$2") python=$3

skip() { echo "skipped: $*"; exit 77; }
[ "$(id -u)" -eq 0 ] || skip "Slurm's daemons need root here"
for program in munged slurmctld slurmd sbatch; do
    PATH=$PATH:/usr/sbin command -v "$program" >/dev/null ||
        skip "no $program; scripts/setup.sh --dev installs slurm-wlm and munge"
done
PATH=$PATH:/usr/sbin

work=$(mktemp -d "${TMPDIR:-/tmp}/d2m-slurm-XXXXXX")
chmod 755 "$work"
daemons=()
clean_up() {
    scancel --user=root 2>/dev/null || true
    [ "${#daemons[@]}" -eq 0 ] || kill "${daemons[@]}" 2>/dev/null || true
    sleep 1
    [ "${#daemons[@]}" -eq 0 ] || kill -9 "${daemons[@]}" 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT
cd "$work"
failures=0
fail() {
    echo "FAILED: $*"
    tail -n 6 ./*.log log/slurmctld log/lab? 2>/dev/null || true
    failures=$((failures + 1))
}
# until_true SECONDS COMMAND...
until_true() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.2
    done
}

# --- The cluster ---------------------------------------------------------------------------------
port=$((20000 + RANDOM % 10000))
mkdir -p munge log state spool/lab1 spool/lab2
chmod 700 munge
dd if=/dev/urandom of=munge/key bs=1024 count=1 status=none
chmod 400 munge/key
munged --foreground --force --key-file "$work/munge/key" --socket "$work/munge/socket" \
    --pid-file "$work/munge/pid" --log-file "$work/log/munged" \
    --seed-file "$work/munge/seed" &>log/munged.out &
daemons+=($!)
cat >slurm.conf <<END
ClusterName=lab
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket,cred_expire=5
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool/%n
SlurmctldPidFile=$work/state/slurmctld.pid
SlurmdPidFile=$work/spool/%n.pid
SlurmctldLogFile=$work/log/slurmctld
SlurmdLogFile=$work/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0
SelectType=select/linear
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=300
KillWait=5
NodeName=lab1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2
NodeName=lab2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2
PartitionName=all Nodes=lab[1-2] Default=YES MaxTime=INFINITE State=UP
END
export SLURM_CONF=$work/slurm.conf
until_true 10 [ -S munge/socket ] || skip "munged does not start: $(cat log/munged.out)"
slurmctld -D &>log/slurmctld.out &
daemons+=($!)
for node in lab1 lab2; do
    slurmd -D -N "$node" &>"log/$node.out" &
    daemons+=($!)
done
both_idle() { [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | wc -l)" -eq 2 ]; }
until_true 20 both_idle ||
    skip "Slurm does not start here: $(tail -n 5 log/slurmctld.out log/lab1.out)"

# --- Runs ----------------------------------------------------------------------------------------
"$python" "$tree/scripts/prepare_data.py" --tokenizer bytes --valid-every 10 --output shards \
    "$tree/data/prose/haggard.jsonl.xz" >log/prepare
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
train = $work/shards/train
sequence_length = 32
[train]
steps = 1500
micro_batch = 4
global_batch = 8
log_every = 10
[checkpoint]
every = 100
[parallel]
hang_seconds = 5
start_seconds = 30
[export]
hf = false
END
export TRAIN=$bin/train MASTER_ADDR=127.0.0.1 SBATCH_TIMELIMIT=10
submit() { # name [options of train]
    local name=$1
    shift
    sbatch --parsable --nodes 2 --output "$name.log" \
        "$tree/scripts/slurm/train.sbatch" run.ini --set "run.name=$name" "$@"
}
state() { scontrol --oneliner show job "$1" | sed 's/.* JobState=\([A-Z]*\).*/\1/'; }
restarts() { scontrol --oneliner show job "$1" | sed 's/.* Restarts=\([0-9]*\).*/\1/'; }
has_ended() { [[ $(state "$1") =~ ^(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)$ ]]; }
finish() { # job, expected state and exit code
    until_true 150 has_ended "$1" || fail "job $1 has not ended: $(scontrol show job "$1")"
    local got
    got="$(state "$1") $(scontrol --oneliner show job "$1" | sed 's/.* ExitCode=\([0-9:]*\).*/\1/')"
    [ "$got" = "$2 $3" ] || fail "job $1 ended with $got, expected $2 $3"
}
weights() { sha256sum "runs/$1/checkpoints/step_00001500/model.safetensors" | cut -d ' ' -f 1; }
works() { grep -q 'info: step [0-9]*0/' "$1.log" 2>/dev/null; }

echo "[$SECONDS s] the same run without Slurm"
"$TRAIN" --recipe run.ini --set run.name=whole --processes 2 2>log/whole || fail "no reference"

echo "[$SECONDS s] two nodes, to the end"
job=$(submit plain)
finish "$job" COMPLETED 0:0
grep -q "2 nodes with 1 ranks each (lab\[1-2\])" plain.log || fail "the job's first line"
[ "$(weights plain)" = "$(weights whole)" ] || fail "weights differ from those without Slurm"

echo "[$SECONDS s] two nodes with two ranks each"
job=$(TASKS_PER_NODE=2 submit wide --set train.steps=20 --set train.global_batch=16)
finish "$job" COMPLETED 0:0
grep -q "2 nodes with 2 ranks each (lab\[1-2\])" wide.log || fail "the job's first line"
grep -q "ranks: 4" wide.log || fail "there were not four ranks"

echo "[$SECONDS s] asked to make room: saved, requeued, continued"
job=$(submit asked)
until_true 60 works asked || fail "no step of job $job"
scancel --signal=USR1 "$job"
finish "$job" COMPLETED 0:0
[ "$(restarts "$job")" -eq 1 ] || fail "job $job had $(restarts "$job") restarts, expected 1"
grep -q "stopped by SIGUSR1" asked.log || fail "USR1 did not arrive"
grep -q "continuing .* at step" asked.log || fail "the second start did not continue"
[ "$(weights asked)" = "$(weights whole)" ] || fail "weights differ after a requeue"

echo "[$SECONDS s] a task is killed: the others end, the job is requeued and continues"
job=$(submit killed)
until_true 60 works killed || fail "no step of job $job"
for environment in /proc/[0-9]*/environ; do
    grep -qzx "SLURM_JOB_ID=$job" "$environment" 2>/dev/null || continue
    grep -qzx "SLURM_PROCID=1" "$environment" || continue
    process=${environment%/environ}
    [ "$(cat "$process/comm")" = train ] && kill -9 "${process#/proc/}"
done
finish "$job" COMPLETED 0:0
[ "$(restarts "$job")" -eq 1 ] || fail "job $job had $(restarts "$job") restarts, expected 1"
[ "$(weights killed)" = "$(weights whole)" ] || fail "weights differ after a lost task"

# Rank 1 is late, and deaf until it is there; rank 0 waits for it.
cat >late <<'END'
#!/usr/bin/env bash
if [ "${SLURM_STEP_ID:-}${SLURM_PROCID:-}${SLURM_RESTART_COUNT:-0}" = 010 ]; then
    trap '' USR1
    sleep 6
    trap - USR1
fi
exec "$LATE_TRAIN" "$@"
END
# A process that is hit before its main.
cat >hit <<'END'
#!/usr/bin/env bash
[ "${SLURM_STEP_ID:-}${SLURM_RESTART_COUNT:-0}" != 00 ] || kill -USR1 $$
exec "$LATE_TRAIN" "$@"
END
# Asked to make room at every start, while rank 0 waits for rank 1.
cat >hasty <<'END'
#!/usr/bin/env bash
case "${SLURM_STEP_ID:-}${SLURM_PROCID:-}" in
00) (sleep 1; exec kill -USR1 $$) & ;;
01) sleep 3 ;;
esac
exec "$LATE_TRAIN" "$@"
END
chmod +x late hit hasty
export LATE_TRAIN=$TRAIN

echo "[$SECONDS s] asked to make room before the ranks have met: requeued, begun"
job=$(TRAIN=$work/late submit early)
until_true 60 pgrep -f "^$TRAIN .*run.name=early" >/dev/null || fail "no rank of job $job"
sleep 1
scancel --signal=USR1 "$job"
finish "$job" COMPLETED 0:0
[ "$(restarts "$job")" -eq 1 ] || fail "job $job had $(restarts "$job") restarts, expected 1"
grep -q "as 'preempted' with code 75 at step 0" early.log || fail "the run was not asked early"
[ "$(weights early)" = "$(weights whole)" ] || fail "weights differ after an early requeue"

echo "[$SECONDS s] asked to make room before the program runs: requeued, begun"
job=$(TRAIN=$work/hit submit hit)
finish "$job" COMPLETED 0:0
[ "$(restarts "$job")" -eq 1 ] || fail "job $job had $(restarts "$job") restarts, expected 1"
grep -q "the run did not begin" hit.log || fail "the first start of job $job began"

echo "[$SECONDS s] asked to make room before the first step of every start: not requeued for ever"
job=$(TRAIN=$work/hasty submit hasty)
finish "$job" FAILED 93:0
[ "$(restarts "$job")" -eq 3 ] || fail "job $job had $(restarts "$job") restarts, expected 3"
grep -q "3 attempts in a row made no progress" hasty.log || fail "job $job does not say why"

# The controller looks at time limits every 30 s and signals at the last look before the time that
# was asked for: with 20 s before a minute is up, 10 to 40 s after the start, when there are tasks.
# The run is longer than any machine's minute; once it has continued, somebody wants it to stop.
echo "[$SECONDS s] the time is nearly up: Slurm's own --signal"
job=$(SBATCH_SIGNAL=USR1@20 SBATCH_TIMELIMIT=1 submit limited --set train.steps=100000000 \
    --set checkpoint.every=1000)
until_true 60 works limited || fail "no step of job $job"
until_true 90 grep -q "stopped by SIGUSR1" limited.log || fail "--signal did not arrive"
until_true 60 grep -q "continuing .* at step" limited.log || fail "job $job did not continue"
[ "$(restarts "$job")" -ge 1 ] || fail "job $job had no restart"
scancel --signal=TERM "$job"
finish "$job" FAILED 75:0

echo "[$SECONDS s] what no repetition mends is not requeued"
job=$(submit wrong --set optim.schedule=wsd)
finish "$job" FAILED 2:0
[ "$(restarts "$job")" -eq 0 ] || fail "job $job was requeued"
job=$(submit plain --set run.seed=2 --set train.steps=1600) # not this run's recipe any more
finish "$job" FAILED 78:0
[ "$(restarts "$job")" -eq 0 ] || fail "job $job was requeued"

echo "[$SECONDS s] slurm: $failures failures"
[ "$failures" -eq 0 ]
