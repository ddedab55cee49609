#!/usr/bin/env python3
"""Tokens per second on 1, 2, 4, ... GPUs of one host, and PyTorch DDP beside it, as a table.

A step has the same 524,288 tokens on any number of GPUs: each has its share, in 16 micro-batches
(--micro-batches; 6 GPUs want 18) of 32,768, which are 16 x 2048 unless --length says otherwise. Our
trainer starts its ranks itself (train --gpus N); the peer is scripts/bench_gpu_peer.py under
torchrun, on the largest number of GPUs only (bench_gpu.py has one GPU). Everything runs one after
the other on the same machine; medians over the steps after a warm-up. For the largest number of
GPUs --profile and --saves say how long a step waits for communication that no computation hides,
and how long training stands still for a save, and --restart how long a run that loses a rank takes
to go on. --each says what each GPU makes alone while the others do the same: ranks wait for the
slowest, and the first need not be it. The last column is ours after the last step that counts: what
only makes a run faster changes it by rounding at most.

    scripts/bench_scaling.py --build build                        # 1, 2, 4, ... up to all GPUs
    scripts/bench_scaling.py --build build --gpus 1,4 --cases lfuc --no-peer
    scripts/bench_scaling.py --build build --set parallel.zero=2
    scripts/bench_scaling.py --build build --gpus 6 --micro-batches 18 --set parallel.expert=3
    scripts/bench_scaling.py --build build --gpus 4 --cases dense --length 1024

Needs what bench_gpu.py needs. NCCL's variables are handed on.
"""
import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_gpu
import bench_gpu_shapes as shapes

SCRIPTS = Path(__file__).resolve().parent
MICRO_TOKENS = 1 << 15
AT_LEAST = {2: 1.94, 4: 3.85, 8: 7.7}  # times one GPU
SAVE_AT, RESTART_AT = 60, 8            # the step of the first checkpoint


def step_tokens(arguments):
    return arguments.micro_batches * MICRO_TOKENS


def count_gpus():
    done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
                          capture_output=True, text=True, check=False)
    return len(done.stdout.strip().splitlines())


def case_of(arguments, model, gpus, micro_batches=None, settings=()):
    batch = MICRO_TOKENS // arguments.length
    micro_batches = micro_batches or arguments.micro_batches
    return bench_gpu.Case(model, batch, arguments.length, settings=(
        f"train.global_batch={micro_batches * batch}", f"parallel.processes={gpus}", *settings))


def run_ours(arguments, model, gpus, work):
    case = case_of(arguments, model, gpus)
    result = bench_gpu.run_ours(arguments, f"{model}-{gpus}", case, work)
    result.tokens_per_second *= arguments.micro_batches  # bench_gpu counts one micro-batch a step
    return result


def optimizer_memory(arguments, model, gpus, work):
    """GB of AdamW's moments and fp32 weights of a rank, as text: both are shared out."""
    words = bench_gpu.command(arguments, f"{model}-{gpus}", case_of(arguments, model, gpus), work)
    done = subprocess.run([*words, "--dry-run"], capture_output=True, text=True, check=False)
    units = {"kB": 1e-6, "MB": 1e-3, "GB": 1}
    found = re.findall(r"^  (?:optimizer state|master weights) +([0-9.]+) (kB|MB|GB)$", done.stdout,
                       re.MULTILINE)
    return f"{sum(float(n) * units[unit] for n, unit in found):.2f}" if found else "-"


def profile(arguments, model, gpus, work):
    """Exposed communication as text."""
    name = f"{model}-{gpus}-profile"
    case = case_of(arguments, model, gpus)
    words = bench_gpu.command(arguments, f"{model}-{gpus}", case, work)
    with open(work / f"{name}.log", "wb") as file:
        done = subprocess.run([*words, "--profile", "4"], stdout=file, stderr=file,
                              timeout=arguments.timeout, check=False)
    path = work / "runs" / name / "profile.json"
    if done.returncode != 0 or not path.exists():
        return f"failed; see {file.name}"
    found = json.loads(path.read_text())
    exposed, step = found["exposed_communication_ms"], found["step_ms"]
    return f"{exposed:.1f} of {step:.1f} ms a step = {100 * exposed / step:.2f} %"


def saves(arguments, model, gpus, work):
    """How long a save holds up training, as text: what the steps from the save on take more than
    as many usual ones, while its files are written. Steps are shorter here to have many of them."""
    micro_batches = max(4, gpus)
    case = case_of(arguments, model, gpus, micro_batches, (f"checkpoint.every={SAVE_AT}",))
    steps = argparse.Namespace(**{**vars(arguments), "warmup": SAVE_AT - 1, "steps": SAVE_AT})
    result = bench_gpu.run_ours(steps, f"{model}-{gpus}-saves", case, work)
    if result.problem:
        return result.problem
    seconds = result.details["step_seconds"]
    usual = statistics.median(seconds)
    stall = sum(seconds) - usual * len(seconds)
    hundred = 100 * usual * arguments.micro_batches / micro_batches
    return f"{stall:.2f} s a save (slowest step {max(seconds):.2f} s, usual {usual:.2f} s) = " \
           f"{100 * stall / hundred:.2f} % of 100 steps of {step_tokens(arguments)} tokens"


def last_child(process):
    """The newest of a process's children: the trainer starts its ranks in their order."""
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return max(int(child) for child in text.split())


def wait_for(arguments, process, found):
    """What `found` returns, once it is something; None when the process ends or takes too long."""
    begin = time.monotonic()
    while time.monotonic() - begin < arguments.timeout and process.poll() is None:
        if result := found():
            return result
        time.sleep(0.1)
    return None


def restart(arguments, model, gpus, work):
    """One rank is killed once there is a checkpoint: how long until a step is made again, as text.
    The program itself starts all ranks once more."""
    name = f"{model}-{gpus}-restart"
    case = case_of(arguments, model, gpus, settings=(f"checkpoint.every={RESTART_AT}",))
    words = [*bench_gpu.command(arguments, name, case, work), "--max-restarts", "1"]
    run, output = work / "runs" / name, work / f"{name}.log"
    shutil.rmtree(run, ignore_errors=True)
    with open(output, "wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)
        try:
            if not wait_for(arguments, process, lambda: list(
                    (run / "checkpoints").glob("step_*/manifest.json"))):
                return f"no checkpoint; see {output}"
            last = bench_gpu.step_records(run / "log.jsonl")[-1]["step"]
            os.kill(last_child(process.pid), signal.SIGKILL)
            killed = time.time()
            again = wait_for(arguments, process, lambda: [
                record for record in bench_gpu.step_records(run / "log.jsonl")
                if record["time"] > killed and record["step"] <= last])
        except (IndexError, OSError, ValueError) as error:
            again, last = None, error
        finally:
            bench_gpu.kill_session(process.pid)
            process.wait()
    if not again:
        return f"failed ({last}); see {output}"
    return f"{again[0]['time'] - killed:.1f} s from the kill after step {last} until step " \
           f"{again[0]['step']} has been made again"


def each_alone(arguments, model, there, work):
    """What this script finds for one GPU, on all of them at once, as text."""
    running = []
    for gpu in range(there):
        own = work / f"gpu{gpu}"
        own.mkdir(exist_ok=True)
        for shared in ("shards", "seed"):
            if (work / shared).exists() and not (own / shared).exists():
                (own / shared).symlink_to(work / shared)
        words = [sys.executable, Path(__file__).resolve(), "--build", arguments.build, "--gpus",
                 "1", "--cases", model, "--no-peer", "--length", arguments.length,
                 "--micro-batches", arguments.micro_batches, "--warmup", arguments.warmup,
                 "--steps", arguments.steps, "--timeout", arguments.timeout, "--work", own]
        words += [word for setting in arguments.set for word in ("--set", setting)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
        running.append(subprocess.Popen([str(word) for word in words], env=environment, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    line = re.compile(rf"^{model}  1 .*?([0-9.]+) k  1.00", re.MULTILINE)
    found = [line.search(process.communicate()[0]) for process in running]
    if not all(found):
        return "failed"
    rates = [float(rate[1]) for rate in found]
    slowest = min(rates) / rates[0]
    return f"{', '.join(f'{rate:.1f}' for rate in rates)} k tok/s; the slowest makes " \
           f"{slowest:.3f} of the first, so that all make {slowest * there:.2f} times it at most"


def run_peer(arguments, model, gpus):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
             str(gpus), SCRIPTS / "bench_gpu_peer.py", "--model", model, "--batch",
             str(MICRO_TOKENS // arguments.length), "--length", str(arguments.length),
             "--micro-batches", str(arguments.micro_batches // gpus),
             "--warmup", str(arguments.warmup), "--steps", str(arguments.steps)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(words, capture_output=True, text=True, env=environment,
                              timeout=arguments.timeout, check=False)
    except subprocess.TimeoutExpired:
        return bench_gpu.Result(problem=f"longer than {arguments.timeout} s")
    if done.returncode != 0:
        return bench_gpu.Result(problem=" | ".join(done.stderr.strip().splitlines()[-3:]))
    details = json.loads(done.stdout.strip().splitlines()[-1])
    return bench_gpu.Result(details["tokens_per_second"], details["peak_allocated"],
                            details=details)


def row(model, gpus, ours, single, peer, optimizer):
    """`single`: tokens per second of ours on one GPU, or None; `optimizer`: GB of a rank."""
    times = ours.tokens_per_second / single if single and ours.tokens_per_second else None
    goal = AT_LEAST.get(gpus)
    cells = [model, str(gpus), bench_gpu.gigabytes(ours.peak_bytes), optimizer,
             f"{ours.tokens_per_second / 1e3:.1f} k" if ours.tokens_per_second else "failed",
             f"{times:.2f}" if times else "-", f"{100 * times / gpus:.1f} %" if times else "-",
             f"{goal}" if goal else "-",
             "-" if not goal or not times else "yes" if times >= goal else "NO"]
    if peer:
        rate = peer.tokens_per_second
        cells += [f"{rate / 1e3:.1f} k" if rate else "failed",
                  f"{ours.tokens_per_second / rate:.2f}x" if rate else "-"]
    else:
        cells += ["-", "-"]
    loss = ours.details.get("loss")
    return [*cells, f"{loss:.6f}" if loss else "-"]


HEAD = ["model", "GPUs", "GB a GPU", "AdamW's", "ours tok/s", "times one", "of linear", "at least",
        "met", "DDP tok/s", "ratio", "loss"]


def run_all(arguments, asked, there, work):
    """The rows of the table, each printed when it is known."""
    if not (work / "shards" / "shards.json").exists():
        bench_gpu.write_shards(work / "shards", shapes.SHAPES["dense"].vocab)
    rows = []
    for model in arguments.cases.split(","):
        single = None
        for gpus in asked:
            ours = run_ours(arguments, model, gpus, work)
            single = ours.tokens_per_second if gpus == 1 else single
            beside = gpus == asked[-1] and not arguments.no_peer
            peer = run_peer(arguments, model, gpus) if beside else None
            for side, result in (("ours", ours), ("peer", peer)):
                if result and result.problem:
                    print(f"{model} on {gpus}, {side}: {result.problem}", flush=True)
            optimizer = optimizer_memory(arguments, model, gpus, work)
            rows.append(row(model, gpus, ours, single, peer, optimizer))
            print("  ".join(rows[-1]), flush=True)
        if arguments.each:
            print(f"{model} on each alone: {each_alone(arguments, model, there, work)}", flush=True)
        if arguments.profile:
            print(f"{model} on {gpus}, exposed communication: "
                  f"{profile(arguments, model, gpus, work)}", flush=True)
        if arguments.saves:
            print(f"{model} on {gpus}, a save: {saves(arguments, model, gpus, work)}", flush=True)
        if arguments.restart:
            print(f"{model} on {gpus}, a rank killed: {restart(arguments, model, gpus, work)}",
                  flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--build", default="build", help="folder with bin/train")
    parser.add_argument("--gpus", help="comma-separated; default: 1, 2, 4, ... up to all")
    parser.add_argument("--cases", default="dense,lfuc", help="default: both")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--micro-batches", type=int, default=16, help="of a step, on all GPUs")
    parser.add_argument("--warmup", type=int, default=4, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value",
                        help="for our trainer; may be repeated")
    parser.add_argument("--profile", action="store_true", help="exposed communication, too")
    parser.add_argument("--saves", action="store_true", help="the cost of a save, too")
    parser.add_argument("--restart", action="store_true", help="a rank killed, too")
    parser.add_argument("--each", action="store_true", help="each GPU alone, too")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--timeout", type=int, default=500, help="seconds for one side of a case")
    parser.add_argument("--work", help="folder for shards, weights and logs (default: temporary)")
    arguments = parser.parse_args()
    there = count_gpus()
    asked = sorted(int(n) for n in arguments.gpus.split(",")) if arguments.gpus else \
        [n for n in (1, 2, 4, 8) if n <= there]
    wrong = [n for n in asked if n < 1 or n > there or arguments.micro_batches % n]
    if wrong:
        parser.error(f"--gpus: {wrong[0]}, but there are {there} GPUs and a step has "
                     f"{arguments.micro_batches} micro-batches to divide")
    if arguments.length < 1 or MICRO_TOKENS % arguments.length:
        parser.error(f"--length must divide the {MICRO_TOKENS} tokens of a micro-batch")

    name = bench_gpu.query("name") or "unknown GPU"
    print(f"{there} x {name}; {step_tokens(arguments)} tokens a step, sequences of "
          f"{arguments.length}, median of {arguments.steps} steps after {arguments.warmup}",
          flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as temporary:
        work = Path(arguments.work or temporary).resolve()
        work.mkdir(parents=True, exist_ok=True)
        rows = run_all(arguments, asked, there, work)
    print()
    bench_gpu.print_table(HEAD, rows)


if __name__ == "__main__":
    main()
