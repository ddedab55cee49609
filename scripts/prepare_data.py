#!/usr/bin/env python3
"""Text to token shards.

    scripts/prepare_data.py --tokenizer DIR --output shards books/ reviews.jsonl.xz
    scripts/prepare_data.py --tokenizer bytes --valid-every 12 --output shards prose.jsonl.xz

Inputs are files or directories: plain text (.txt, .md, others), JSON lines (.jsonl), both also
compressed (.xz, .gz), and parquet where pyarrow is installed. A text file is one document unless
--separator says otherwise; a line of JSON lines is one; a row of parquet is one. Documents end with
the tokenizer's end token. Special tokens in the text are encoded as special tokens, as Hugging Face
tokenizers do; none are added but the end token.

With --valid-every or --valid-fraction the shards go to OUTPUT/train and OUTPUT/valid, else to
OUTPUT. The result depends on the input and the options only, not on the number of processes.
Exit codes: 0 done, 2 usage, 65 bad data, 66 missing input, 73 cannot write, 74 input or output
failed.
"""

import argparse
import codecs
import json
import multiprocessing
import os
import resource
import sys
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import numpy as np

from text_inputs import Reader, find_inputs
from token_shards import EXIT_USAGE, Failure, Progress, ShardSetWriter, run_main
from tokenizing import make_encoder

PROGRAM = "prepare_data"
TASK_BYTES = 1 << 20       # of input per unit of work
SMALL_INPUT_BYTES = 4 << 20  # not worth starting processes


# --- In the worker processes ---------------------------------------------------------------------

encoder = None


def start_worker(arguments):
    global encoder
    encoder = make_encoder(*arguments)


def text_of(record, field):
    """The record's document, as what the encoder takes."""
    if not record.is_json:
        return encoder.decode(record.data, record.where)
    try:
        value = json.loads(record.data)
    except ValueError as error:  # bad JSON or bad UTF-8
        raise Failure(f"{record.where}: not valid JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        found = f"fields {', '.join(map(repr, value))}" if isinstance(value, dict) else "no object"
        raise Failure(f"{record.where}: no text in field {field!r}, found {found}; choose one with "
                      "--field")
    try:
        return encoder.decode(value[field].encode(), record.where)
    except UnicodeEncodeError:
        raise Failure(f"{record.where}: field {field!r} has half a surrogate pair") from None


def encode_records(records, field):
    """The ids of all records, joined, and how many each has. A document without text gives none."""
    arrays = encoder.encode([text_of(record, field) for record in records])
    eos = encoder.info.eos_id
    end = np.array([eos] if eos >= 0 else [], dtype=np.uint32)
    parts, sizes = [], []
    for record, ids in zip(records, arrays):
        closes = record.ends and (len(ids) > 0 or not record.starts)
        parts += [ids, end] if closes else [ids]
        sizes.append(len(ids) + (len(end) if closes else 0))
    return np.concatenate(parts), np.array(sizes, dtype=np.int64)


# --- In the main process -------------------------------------------------------------------------

def make_tasks(reader):
    """Lists of records of about TASK_BYTES."""
    task, size = [], 0
    for record in reader:
        task.append(record)
        size += len(record.data)
        if size >= TASK_BYTES:
            yield task
            task, size = [], 0
    if task:
        yield task


class InProcess:
    """Stands in for a pool of one."""

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, **_):
        pass


def in_order(pool, tasks, field, depth):
    """(records, their result) in the order of tasks, with at most `depth` tasks under way."""
    waiting = deque()
    for task in tasks:
        flags = np.array([(record.held_out, record.ends) for record in task], dtype=bool)
        waiting.append((flags, pool.submit(encode_records, task, field)))
        if len(waiting) > depth:
            flags, future = waiting.popleft()
            yield flags, *future.result()
    for flags, future in waiting:
        yield flags, *future.result()


def write_records(flags, ids, sizes, writers):
    """Hands the records of a task to the training or validation writer, in runs."""
    held_out, closes = flags[:, 0], flags[:, 1]
    places = np.concatenate([[0], np.cumsum(sizes)])
    borders = np.flatnonzero(np.diff(held_out)) + 1
    for first, last in zip([0, *borders], [*borders, len(sizes)]):
        begin = places[first]
        ends = places[first + 1:last + 1][closes[first:last]] - begin
        writers[bool(held_out[first])].append(ids[begin:places[last]], ends)


def parse_arguments():
    parser = argparse.ArgumentParser(prog="prepare_data.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files or directories of text")
    add("--output", required=True, type=Path, metavar="DIR", help="where the shards go")
    add("--tokenizer", required=True, metavar="NAME",
        help="'bytes', a Hugging Face directory (tokenizer.json, or vocab.json and merges.txt), or "
             "a tokenizer.json")
    add("--field", default="text", help="JSON field or parquet column of the text [text]")
    add("--separator", metavar="TEXT",
        help=r"between documents of a text file, with escapes: '\f', '\n\n\n', '<|endoftext|>'")
    add("--eos", metavar="TOKEN",
        help="end of document: token, id or 'none' [<|endoftext|>, else the tokenizer's eos_token]")
    add("--vocab-size", type=int, metavar="N", help="a larger vocabulary than the tokenizer's")
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--valid-every", type=int, metavar="N", help="hold out every Nth document")
    split.add_argument("--valid-fraction", type=Fraction, metavar="F",
                       help="hold out this share of documents; of a single text document, its end")
    add("--max-docs", type=int, metavar="N", help="stop after N documents")
    add("--max-bytes", type=float, metavar="N", help="stop with the document that reaches N bytes")
    add("--shard-tokens", type=float, default=1 << 27, metavar="N",
        help="tokens per shard [134217728, 512 MB]")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
        help="processes [all CPUs]")
    add("--source", default="", help="note on the text's origin, kept in the shards")
    add("--overwrite", action="store_true", help="replace shards that are there already")
    arguments = parser.parse_args()

    if arguments.valid_every is not None:
        if arguments.valid_every < 2:
            parser.error("--valid-every must be at least 2")
        arguments.valid_fraction = Fraction(1, arguments.valid_every)
    if arguments.valid_fraction is not None and not 0 < arguments.valid_fraction < 1:
        parser.error("--valid-fraction must lie between 0 and 1")
    for name in ("max_docs", "max_bytes", "shard_tokens", "workers"):
        value = getattr(arguments, name)
        if value is not None and not value >= 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.separator is not None:
        escaped = arguments.separator.encode("latin-1", "backslashreplace")
        arguments.separator = codecs.decode(escaped, "unicode_escape").encode()
        if not arguments.separator:
            parser.error("--separator is empty")
    return arguments


def open_writers(arguments, info, stack):
    """By `held out`."""
    source = arguments.source or ", ".join(Path(name).name for name in arguments.inputs)
    names = {False: "train", True: "valid"} if arguments.valid_fraction else {False: "."}
    return {held_out: stack.enter_context(
                ShardSetWriter(arguments.output / name, info, source, int(arguments.shard_tokens),
                               arguments.overwrite))
            for held_out, name in names.items()}


def open_pool(arguments, reader, tokenizer):
    if reader.total_disk_bytes < SMALL_INPUT_BYTES:
        arguments.workers = 1
    if arguments.workers == 1:
        return InProcess()
    return ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn"),
                               start_worker, (tokenizer,))


def convert(arguments, reader, pool, writers):
    progress = Progress(PROGRAM)
    tokens = documents = 0
    tasks = in_order(pool, make_tasks(reader), arguments.field, 2 * arguments.workers + 1)
    for flags, ids, sizes in tasks:
        write_records(flags, ids, sizes, writers)
        tokens += len(ids)
        documents += np.count_nonzero(flags[:, 1])
        megabytes = reader.bytes / 1e6
        progress.show(reader.progress(),
                      f"{megabytes:.1f} MB read ({megabytes / progress.seconds():.1f} MB/s), "
                      f"{tokens:,} tokens, {documents:,} documents")
    progress.clear()
    check_not_empty(writers, reader)
    return progress.seconds()


def cpu_seconds():
    """Of all processes so far, their start included."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def check_not_empty(writers, reader):
    for held_out, writer in writers.items():
        if writer.tokens + writer.part_tokens > 0:
            continue
        if held_out:
            raise Failure(f"no document was held out: there are {reader.documents}; ask for a "
                          "larger share, or split the text with --separator")
        raise Failure("the input holds no text to train on")


def main():
    arguments = parse_arguments()
    tokenizer = (arguments.tokenizer, arguments.eos, arguments.vocab_size)
    start_worker(tokenizer)
    reader = Reader(find_inputs(arguments.inputs), arguments.field, arguments.separator,
                    arguments.valid_fraction or 0, encoder.cut, arguments.max_docs or float("inf"),
                    arguments.max_bytes or float("inf"))
    with ExitStack() as stack:
        writers = open_writers(arguments, encoder.info, stack)
        pool = open_pool(arguments, reader, tokenizer)
        try:
            seconds = convert(arguments, reader, pool, writers)
        except BrokenProcessPool:
            raise Failure("a worker process was killed, perhaps for memory: try fewer --workers",
                          EXIT_USAGE) from None
        finally:
            pool.shutdown(cancel_futures=True)
        for writer in writers.values():
            writer.finish()
            print(f"{PROGRAM}: {writer.summary()}")
    megabytes, cpu = reader.bytes / 1e6, cpu_seconds()
    print(f"{PROGRAM}: {megabytes:.1f} MB in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s), "
          f"{cpu:.1f} s of CPU time ({megabytes / cpu:.1f} MB/s per core)", file=sys.stderr)


if __name__ == "__main__":
    run_main(PROGRAM, main)
