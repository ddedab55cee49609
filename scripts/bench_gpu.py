#!/usr/bin/env python3
"""Training speed on one GPU against Hugging Face transformers, as a table.

Runs our `train` and scripts/bench_gpu_peer.py one after the other on the same GPU, each in a process
of its own, on random tokens, and compares tokens per second (median over steps after a warm-up),
MFU and peak memory. What our trainer does is a whole run: it reads shards from disk, clips, logs
every step; only the end (checkpoint, export) is cut off. The peer's side says what it leaves out.

    scripts/bench_gpu.py --build build                          # all cases
    scripts/bench_gpu.py --build build --cases dense16x2048,lfuc16x2048 --json results.json
    scripts/bench_gpu.py --build build --no-peer --set train.recompute=layer

Needs torch and transformers (for the peer), h5py, numpy and xxhash; no network.
"""
import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import bench_gpu_shapes as shapes
from token_shards import UNKNOWN_TOKENIZER, ShardSetWriter, TokenizerInfo

SCRIPTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Case:
    model: str
    batch: int
    length: int
    at_least: float = 0         # ratio to the peer
    settings: tuple = ()        # beside the common ones
    tokens_at_least: int = 0    # tokens per second


CASES = {
    "dense16x2048": Case("dense", 16, 2048, 1.37),
    "dense16x2048-recompute": Case("dense", 16, 2048, 0, ("train.recompute=layer",)),
    "dense32x1024": Case("dense", 32, 1024, 0, (), 165000),
    "dense4x1024": Case("dense", 4, 1024, 1.3),
    "dense4x8192": Case("dense", 4, 8192, 1.5),
    "lfuc16x2048": Case("lfuc", 16, 2048, 1.5),
}
LFUC_BLOCKS = "2+1, 6+1, 10+1, 14+1, 18+1"


@dataclass
class Result:
    tokens_per_second: float = 0
    peak_bytes: int = 0
    problem: str = ""
    details: dict = field(default_factory=dict)


# --- The GPU -------------------------------------------------------------------------------------

def query(what):
    """One figure of the first visible GPU from nvidia-smi, as text; "" where that is not there."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    try:
        done = subprocess.run(["nvidia-smi", f"--id={gpu}", f"--query-gpu={what}",
                               "--format=csv,noheader,nounits"], capture_output=True, text=True,
                              timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0]


class MemoryWatch:
    """The most memory that was in use on the GPU, beyond what was when the watch began. Ends when
    that is free again, which can be seconds after a process is gone: the next watch would take it
    for what is always there."""

    def __enter__(self):
        self.base, self.most, self.ended = self.used(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()
        deadline = time.monotonic() + 20
        while self.used() > self.base + self.most // 10 and time.monotonic() < deadline:
            time.sleep(0.25)

    @staticmethod
    def used():
        text = query("memory.used")
        return int(text) << 20 if text.isdigit() else 0

    def watch(self):
        while not self.ended.wait(0.25):
            self.most = max(self.most, self.used() - self.base)


# --- Our side ------------------------------------------------------------------------------------

def write_shards(directory, vocab, tokens=1 << 22):
    """Random tokens in documents of 1000: nothing about speed depends on what they are."""
    random = np.random.default_rng(1)
    writer = ShardSetWriter(directory, TokenizerInfo(UNKNOWN_TOKENIZER, vocab, vocab - 1, ()),
                            "random tokens of bench_gpu.py", tokens)
    ends = np.arange(1000, tokens + 1, 1000)
    writer.append(random.integers(vocab, size=tokens, dtype=np.int64), ends)
    writer.finish()


def write_checkpoint(directory):
    """The dense model's random weights, which the fused model is made from."""
    if not directory.exists():
        subprocess.run([sys.executable, SCRIPTS / "make_random_checkpoint.py", directory],
                       check=True, stdout=subprocess.DEVNULL)


def model_settings(case, work):
    shape = shapes.SHAPES[case.model]
    if case.model == "lfuc":
        write_checkpoint(work / "seed")
        return {"model.source": work / "seed", "lfuc.enabled": "true", "lfuc.select": "manual",
                "lfuc.blocks": LFUC_BLOCKS, "lfuc.num_experts": shape.experts,
                "lfuc.follower_copies": 2, "lfuc.top_k": shape.top_k, "lfuc.elsewhere": "copies",
                "router.balance": "global"}
    return {"model.family": "qwen2", "model.hidden_size": shape.hidden,
            "model.num_layers": shape.layers, "model.num_heads": shape.heads,
            "model.num_kv_heads": shape.kv_heads, "model.intermediate_size": shape.inner}


def command(arguments, name, case, work):
    settings = {
        "run.name": name, "run.directory": work / "runs", "run.device": "cuda",
        "data.train": work / "shards", "data.sequence_length": case.length,
        "train.steps": 1000000, "train.micro_batch": case.batch, "train.global_batch": case.batch,
        "train.recompute": "swiglu", "train.log_every": 1, "optim.schedule": "constant",
        "parallel.processes": 1,
        "checkpoint.every": 0,
        "report.tensorboard": "false", "report.expert_load_every": 1000, "export.hf": "false",
        **model_settings(case, work)}
    recipe = work / f"{name}.ini"
    sections = {}
    for key, value in settings.items():
        section, word = key.split(".")
        sections.setdefault(section, []).append(f"{word} = {value}")
    recipe.write_text("".join(f"[{section}]\n" + "\n".join(lines) + "\n"
                              for section, lines in sections.items()))
    train = Path(arguments.build) / "bin" / "train"
    words = [train, "--recipe", recipe, "--resume", "never"]
    for setting in (*case.settings, *arguments.set):
        words += ["--set", setting]
    return words


def step_records(log):
    """The lines of steps."""
    if not log.exists():
        return []
    records = []
    for line in log.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break  # the last line is being written
        if record["kind"] == "step":
            records.append(record)
    return records


def session_processes(session):
    """The processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue  # it has ended
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(stat.parent.name))
    return found


def kill_session(session):
    """Ends the trainer and its ranks, which are in process groups of their own: without their
    parent they would save first, beside the next case. Waits for their end."""
    deadline = time.monotonic() + 30
    while processes := session_processes(session):
        for process in processes:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)


def run_ours(arguments, name, case, work):
    steps = arguments.warmup + arguments.steps
    log, output = work / "runs" / name / "log.jsonl", work / f"{name}.log"
    shutil.rmtree(work / "runs" / name, ignore_errors=True)
    begin, records = time.monotonic(), []
    with MemoryWatch() as memory, open(output, "wb") as file:
        process = subprocess.Popen(command(arguments, name, case, work), stdout=file, stderr=file,
                                   start_new_session=True)
        try:
            while len(records) <= steps and process.poll() is None:
                time.sleep(0.5)
                records = step_records(log)
                if time.monotonic() - begin > arguments.timeout:
                    break
        finally:  # a benchmark needs no checkpoint
            kill_session(process.pid)
            process.wait()
    if len(records) <= steps:
        tail = output.read_text(errors="replace").strip().splitlines()[-12:]
        return Result(problem=f"{len(records)} of {steps} steps; " + " | ".join(tail))
    records = records[:steps + 1]
    seconds = np.diff([record["time"] for record in records])[arguments.warmup:]
    return Result(case.batch * case.length / statistics.median(seconds), memory.most,
                  details={"step_seconds": [float(s) for s in seconds],
                           "loss": records[-1]["loss"]})


# --- The peer ------------------------------------------------------------------------------------

def run_peer(arguments, case):
    words = [sys.executable, SCRIPTS / "bench_gpu_peer.py", "--model", case.model, "--batch",
             str(case.batch), "--length", str(case.length), "--warmup", str(arguments.warmup),
             "--steps", str(arguments.steps)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with MemoryWatch() as memory:
        try:
            done = subprocess.run(words, capture_output=True, text=True, env=environment,
                                  timeout=arguments.timeout, check=False)
        except subprocess.TimeoutExpired:
            return Result(problem=f"longer than {arguments.timeout} s")
    if done.returncode != 0:
        return Result(problem=" | ".join(done.stderr.strip().splitlines()[-3:]))
    details = json.loads(done.stdout.strip().splitlines()[-1])
    # What its tensors took; nvidia-smi also sees the context and what torch keeps in reserve. Ours
    # is all that nvidia-smi sees.
    details["peak_nvidia_smi"] = memory.most
    return Result(details["tokens_per_second"], details["peak_allocated"], details=details)


# --- The table -----------------------------------------------------------------------------------

def gigabytes(count):
    return f"{count / 1e9:.1f}" if count else "n/a"


def row(name, case, ours, peer, device):
    shape = shapes.SHAPES[case.model]
    cells = [name]
    for side in (ours, peer):
        if side is None:
            cells += ["-", "-", "-"]
            continue
        rate = side.tokens_per_second
        cells += [f"{rate / 1e3:.1f} k" if rate else "failed",
                  shapes.mfu(shape, case.length, rate, device), gigabytes(side.peak_bytes)]
    both = peer is not None and ours.tokens_per_second and peer.tokens_per_second
    ratio = ours.tokens_per_second / peer.tokens_per_second if both else None
    cells.append(f"{ratio:.2f}x" if ratio else "-")
    cells.append(f"{case.at_least}x" if case.at_least else
                 f"{case.tokens_at_least / 1e3:.0f} k" if case.tokens_at_least else "-")
    met = (ratio is not None and ratio >= case.at_least) if case.at_least else \
        ours.tokens_per_second >= case.tokens_at_least if case.tokens_at_least else None
    cells.append("-" if met is None or (case.at_least and ratio is None) else
                 "yes" if met else "NO")
    cells.append(f"{ours.peak_bytes / peer.peak_bytes:.2f}x"
                 if both and ours.peak_bytes and peer.peak_bytes else "-")
    return cells


HEAD = ["case", "ours tok/s", "MFU", "GB", "peer tok/s", "MFU", "GB", "ratio", "at least", "met",
        "memory"]


def print_table(head, rows):
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    for line in [head, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--build", default="build", help="folder with bin/train")
    parser.add_argument("--cases", default=",".join(CASES), help="default: all")
    parser.add_argument("--warmup", type=int, default=10, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value",
                        help="for our trainer; may be repeated")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--timeout", type=int, default=400, help="seconds for one side of a case")
    parser.add_argument("--work", help="folder for shards, weights and logs (default: temporary)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there, too")
    arguments = parser.parse_args()
    unknown = set(arguments.cases.split(",")) - set(CASES)
    if unknown:
        parser.error(f"--cases: no case {', '.join(sorted(unknown))}; there are "
                     f"{', '.join(CASES)}")
    if arguments.steps < 1 or arguments.warmup < 1:
        parser.error("--steps and --warmup must be at least 1")

    device = query("name") or "unknown GPU"
    print(f"{device}, driver {query('driver_version') or 'unknown'}; median of {arguments.steps} "
          f"steps after {arguments.warmup}", flush=True)
    work = Path(arguments.work or tempfile.mkdtemp(prefix="bench-gpu-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    rows, record = [], {"device": device, "cases": {}}
    try:
        if not (work / "shards" / "shards.json").exists():
            write_shards(work / "shards", shapes.SHAPES["dense"].vocab)
        for name in arguments.cases.split(","):
            case = CASES[name]
            ours = run_ours(arguments, name, case, work)
            peer = None if arguments.no_peer else run_peer(arguments, case)
            for side, result in (("ours", ours), ("peer", peer)):
                if result and result.problem:
                    print(f"{name}, {side}: {result.problem}", flush=True)
            rows.append(row(name, case, ours, peer, device))
            print("  ".join(rows[-1]), flush=True)
            record["cases"][name] = {"ours": vars(ours), "peer": vars(peer) if peer else None}
            if arguments.json:
                Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n")
    finally:
        if not arguments.work:
            shutil.rmtree(work, ignore_errors=True)
    print()
    print_table(HEAD, rows)


if __name__ == "__main__":
    main()
