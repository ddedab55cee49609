#!/usr/bin/env python3
"""Token files of other projects to token shards.

    scripts/import_tokens.py --output shards --tokenizer DIR fineweb_train_*.bin     (llm.c)
    scripts/import_tokens.py --output shards --tokenizer DIR corpus_text_document.idx (Megatron)

Ids are taken over as they are. llm.c's .bin: version 1 (uint16) or 7 (uint32); documents are found
by the end token, which llm.c writes in front of each document (--eos-position start, its default
here). Megatron's .idx and .bin of the same name: documents as the index says.

--tokenizer names the tokenizer that made the ids: a Hugging Face directory or tokenizer.json, from
which the shards take identity, vocabulary size and end token; or 'unknown', with --vocab-size.
Exit codes: 0 done, 2 usage, 65 bad data, 66 missing input, 73 cannot write, 74 input or output
failed.
"""

import argparse
import struct
from pathlib import Path

import numpy as np

from token_shards import (EXIT_MISSING, EXIT_USAGE, UNKNOWN_TOKENIZER, Failure, Progress,
                          ShardSetWriter, TokenizerInfo, run_main)
from tokenizing import make_encoder

PROGRAM = "import_tokens"
BLOCK_TOKENS = 1 << 22
LLMC_HEADER_BYTES = 1024
LLMC_KINDS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: "u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def map_array(path, dtype, count, offset):
    """`count` elements of a file at `offset`, which must be there."""
    size = path.stat().st_size
    needed = offset + count * np.dtype(dtype).itemsize
    if size < needed:
        raise Failure(f"{path}: has {size} bytes, its header asks for {needed}: truncated")
    return np.memmap(path, dtype, "r", offset, (count,)) if count else np.empty(0, dtype)


class LlmcFile:
    """karpathy/llm.c: 256 int32 {magic, version, tokens}, then the ids."""

    def __init__(self, path, eos, position):
        with open(path, "rb") as file:
            header = file.read(12).ljust(12, b"\0")
        magic, version, count = struct.unpack("<iii", header)
        if (magic, version) not in LLMC_KINDS:
            raise Failure(f"{path}: not an llm.c token file: magic and version are {magic}, "
                          f"{version}, expected one of {list(LLMC_KINDS)}")
        dtype = LLMC_KINDS[magic, version]
        size = path.stat().st_size
        if count < 0 or size != LLMC_HEADER_BYTES + count * np.dtype(dtype).itemsize:
            raise Failure(f"{path}: has {size} bytes, its header's {count} tokens need "
                          f"{LLMC_HEADER_BYTES + count * np.dtype(dtype).itemsize}")
        self.path, self.eos, self.position = path, eos, position
        self.tokens = map_array(path, dtype, count, LLMC_HEADER_BYTES)

    def blocks(self):
        """(ids, where documents end in them); a file ends a document."""
        for first in range(0, len(self.tokens), BLOCK_TOKENS):
            # One more token: whether the next begins a document decides whether this one ends one.
            ids = np.array(self.tokens[first:first + BLOCK_TOKENS + 1])
            if self.position == "start":
                ends = np.flatnonzero(ids == self.eos)
            else:
                ends = np.flatnonzero(ids[:BLOCK_TOKENS] == self.eos) + 1
            ids = ids[:BLOCK_TOKENS]
            last = first + len(ids) == len(self.tokens)
            yield ids, np.unique(np.append(ends, len(ids))) if last else ends


class MegatronFile:
    """An .idx that says where documents are in the .bin beside it."""

    def __init__(self, path):
        data = path.with_suffix(".bin")
        if not data.is_file():
            raise Failure(f"{data}: no such file; {path} is the index to it", EXIT_MISSING)
        with open(path, "rb") as file:
            header = file.read(34)
        if len(header) < 34 or not header.startswith(MEGATRON_MAGIC):
            raise Failure(f"{path}: not a Megatron index: it begins with {header[:9]!r}")
        version, kind, sequences, documents = struct.unpack("<QBQQ", header[9:])
        if version != 1 or kind not in MEGATRON_TYPES:
            raise Failure(f"{path}: version {version}, element type {kind}; expected version 1 and "
                          f"one of {sorted(MEGATRON_TYPES)}")
        self.path = path
        dtype = MEGATRON_TYPES[kind]
        lengths = map_array(path, "<i4", sequences, 34)
        pointers = map_array(path, "<i8", sequences, 34 + 4 * sequences)
        index = map_array(path, "<i8", documents, 34 + 12 * sequences)
        places = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if (lengths < 0).any() or (pointers != places[:-1] * np.dtype(dtype).itemsize).any():
            raise Failure(f"{path}: its sequences do not follow each other in {data.name}")
        if len(index) and (index[0] < 0 or index[-1] > sequences or (np.diff(index) < 0).any()):
            raise Failure(f"{path}: its document list does not rise from 0 to {sequences}")
        self.tokens = map_array(data, dtype, int(places[-1]), 0)
        self.ends = places[index]

    def blocks(self):
        for first in range(0, len(self.tokens), BLOCK_TOKENS):
            ids = np.array(self.tokens[first:first + BLOCK_TOKENS])
            # Documents end where the next begins, that is in (first, first + len(ids)].
            low, high = np.searchsorted(self.ends, [first, first + len(ids)], side="right")
            ends = np.unique(self.ends[low:high] - first)
            last = first + len(ids) == len(self.tokens)
            yield ids, np.unique(np.append(ends, len(ids))) if last else ends


def open_input(path, info, position):
    if not path.is_file():
        raise Failure(f"{path}: no such file", EXIT_MISSING)
    if path.suffix == ".idx":
        return MegatronFile(path)
    if path.with_suffix(".idx").is_file():
        return MegatronFile(path.with_suffix(".idx"))
    if info.eos_id < 0:
        raise Failure("llm.c files need an end token to find documents: give --eos", EXIT_USAGE)
    return LlmcFile(path, info.eos_id, position)


def tokenizer_info(arguments):
    if arguments.tokenizer != "unknown":
        return make_encoder(arguments.tokenizer, arguments.eos, arguments.vocab_size).info
    if arguments.vocab_size is None:
        raise Failure("--tokenizer unknown needs --vocab-size", EXIT_USAGE)
    eos = -1 if arguments.eos in (None, "none") else int(arguments.eos)
    if not -1 <= eos < arguments.vocab_size:
        raise Failure(f"--eos {eos} is not below --vocab-size {arguments.vocab_size}", EXIT_USAGE)
    return TokenizerInfo(UNKNOWN_TOKENIZER, arguments.vocab_size, eos, ())


def check_ids(ids, info, path, first):
    bad = np.flatnonzero((ids < 0) | (ids >= info.vocab_size))
    if len(bad):
        raise Failure(f"{path}: token {first + bad[0]} is id {ids[bad[0]]}, expected below "
                      f"{info.vocab_size}: another tokenizer?")


def convert(files, info, writer):
    total, done = sum(len(file.tokens) for file in files), 0
    progress = Progress(PROGRAM)
    for file in files:
        first = 0
        for ids, ends in file.blocks():
            check_ids(ids, info, file.path, first)
            writer.append(ids, ends)
            first += len(ids)
            progress.show((done + first) / total, f"{done + first:,} of {total:,} tokens")
        done += first
    progress.clear()


def parse_arguments():
    parser = argparse.ArgumentParser(prog="import_tokens.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="FILE", help=".bin of llm.c; .idx of Megatron")
    add("--output", required=True, type=Path, metavar="DIR", help="where the shards go")
    add("--tokenizer", required=True, metavar="NAME",
        help="what made the ids: a Hugging Face directory, a tokenizer.json, or 'unknown'")
    add("--vocab-size", type=int, metavar="N", help="ids are below [as the tokenizer says]")
    add("--eos", metavar="TOKEN", help="end of document: token or id [as the tokenizer says]")
    add("--eos-position", choices=("start", "end"), default="start",
        help="llm.c: whether the end token stands before or behind a document [start]")
    add("--shard-tokens", type=float, default=1 << 27, metavar="N",
        help="tokens per shard [134217728]")
    add("--source", default="", help="note on the tokens' origin, kept in the shards")
    add("--overwrite", action="store_true", help="replace shards that are there already")
    arguments = parser.parse_args()
    if not arguments.shard_tokens >= 1:
        parser.error("--shard-tokens must be at least 1")
    if arguments.tokenizer == "unknown" and arguments.eos not in (None, "none") and \
            not arguments.eos.isdecimal():
        parser.error("--eos must be an id when the tokenizer is unknown")
    return arguments


def main():
    arguments = parse_arguments()
    info = tokenizer_info(arguments)
    files = [open_input(path, info, arguments.eos_position) for path in arguments.inputs]
    source = arguments.source or ", ".join(file.path.name for file in files)
    if not any(len(file.tokens) for file in files):
        raise Failure("the input holds no tokens")
    with ShardSetWriter(arguments.output, info, source, int(arguments.shard_tokens),
                        arguments.overwrite) as writer:
        convert(files, info, writer)
        writer.finish()
    print(f"{PROGRAM}: {writer.summary()}")


if __name__ == "__main__":
    run_main(PROGRAM, main)
