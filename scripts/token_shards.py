"""Writes token shards and shards.json (docs/formats.md), for prepare_data.py and import_tokens.py.

Shards are written to a folder `.partial` in their directory and moved to their names when all are
complete and on disk; shards.json, which makes them a data set, comes last. Until then the shards
that were there before stay as they are. Equal input gives equal bytes: no time stamps, no names of
machines.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import xxhash

BYTES_IDENTITY = hashlib.sha256(b"dense2moe-bytes-v1").hexdigest()
UNKNOWN_TOKENIZER = "0" * 64
TOKENIZER_FILES = ("dense2moe_tokenizer.json", "tokenizer.json", "vocab.json", "merges.txt",
                   "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

# Exit codes of all programs of the project (docs/troubleshooting.md).
EXIT_USAGE, EXIT_BAD_DATA, EXIT_MISSING, EXIT_CANNOT_WRITE, EXIT_IO = 2, 65, 66, 73, 74


class Failure(Exception):
    """An error to be told in one line: what was found where, and what was expected."""

    def __init__(self, message, code=EXIT_BAD_DATA):
        super().__init__(message)
        self.code = code

    def __reduce__(self):  # travels between processes with its code
        return (Failure, (self.args[0], self.code))


def run_main(program, main):
    """Runs main() and turns failures into one line on stderr and an exit code."""
    try:
        main()
    except Failure as failure:
        print(f"{program}: error: {failure}", file=sys.stderr)
        sys.exit(failure.code)
    except OSError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(EXIT_IO)
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted; nothing was published")


@dataclass(frozen=True)
class TokenizerInfo:
    """What a shard says about the tokenizer that made it."""
    identity: str    # SHA-256 hex (docs/formats.md, "Tokenizer identity")
    vocab_size: int  # ids are below
    eos_id: int      # -1: documents have no end token
    files: tuple     # paths to copy beside the shards


def sha256_of_files(paths):
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def tokenizer_identity(directory):
    """The identity of the tokenizer in a directory, or None."""
    directory = Path(directory)
    if (directory / "dense2moe_tokenizer.json").exists():
        return BYTES_IDENTITY
    if (directory / "tokenizer.json").exists():
        return sha256_of_files([directory / "tokenizer.json"])
    pair = [directory / "vocab.json", directory / "merges.txt"]
    return sha256_of_files(pair) if all(path.exists() for path in pair) else None


def fsync_path(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def hash_file(path):
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class ShardSetWriter:
    """A directory of shards that is filled document by document, then finished. As a context: what
    is not finished at its end is thrown away."""

    def __init__(self, directory, tokenizer, source, shard_tokens, overwrite=False):
        self.directory = Path(directory)
        self.partial = self.directory / ".partial"
        self.tokenizer = tokenizer
        self.source = source
        self.shard_tokens = shard_tokens
        self.dtype = np.dtype("<u2") if tokenizer.vocab_size <= 65536 else np.dtype("<u4")
        self.shards = []
        self.tokens = self.documents = 0
        self._begin_shard()
        manifest = self.directory / "shards.json"
        if manifest.exists() and not overwrite:
            raise Failure(f"{manifest} exists: choose another directory, or replace its shards "
                          "with --overwrite", EXIT_CANNOT_WRITE)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.partial, ignore_errors=True)  # of a run that was killed
            self.partial.mkdir()
        except OSError as error:
            raise Failure(f"cannot write: {error}", EXIT_CANNOT_WRITE) from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.directory.rmdir()  # if nothing is in it

    def _begin_shard(self):
        self.parts = []       # arrays of ids
        self.part_tokens = 0
        self.ends = []        # arrays of places where documents end, rising

    def append(self, ids, ends):
        """Adds tokens; `ends` are the places in `ids` behind which a document ends. A document may
        go on in the next call. Documents without tokens vanish."""
        ends = np.asarray(ends, dtype=np.int64)
        while True:  # a shard ends with the first document that fills it
            full = np.searchsorted(ends, self.shard_tokens - self.part_tokens)
            if full == len(ends):
                break
            place = ends[full]
            self._add(ids[:place], ends[:full + 1])
            self._write_shard()
            ids, ends = ids[place:], ends[full + 1:] - place
        self._add(ids, ends)
        if self.part_tokens >= 2 * self.shard_tokens:  # within one document, which is cut
            self._write_shard()

    def _add(self, ids, ends):
        self.parts.append(ids.astype(self.dtype, copy=False))
        self.ends.append(ends + self.part_tokens)
        self.part_tokens += len(ids)

    def _write_shard(self):
        offsets = np.unique(np.concatenate([[0], *self.ends, [self.part_tokens]])).astype("<u8")
        path = self.partial / f"shard-{len(self.shards):05d}.h5"
        self._write_hdf5(path, offsets)
        fsync_path(path)
        self.shards.append({"file": path.name, "bytes": path.stat().st_size,
                            "xxh3_128": hash_file(path), "tokens": self.part_tokens,
                            "documents": len(offsets) - 1})
        self.tokens += self.part_tokens
        self.documents += len(offsets) - 1
        self._begin_shard()

    def _write_hdf5(self, path, offsets):
        with h5py.File(path, "w", libver="earliest") as file:
            file.attrs["format"] = np.bytes_("dense2moe-shard")
            file.attrs["version"] = np.int64(1)
            file.attrs["vocab_size"] = np.int64(self.tokenizer.vocab_size)
            file.attrs["tokenizer_sha256"] = np.bytes_(self.tokenizer.identity)
            file.attrs["eos_id"] = np.int64(self.tokenizer.eos_id)
            file.attrs["source"] = np.bytes_(self.source.encode("ascii", "replace")[:255])
            tokens = file.create_dataset("tokens", (self.part_tokens,), self.dtype,
                                         track_times=False)
            at = 0
            for part in self.parts:
                tokens[at:at + len(part)] = part
                at += len(part)
            file.create_dataset("doc_offsets", data=offsets, track_times=False)

    def finish(self):
        """Writes the last shard, puts all in place, then tokenizer files and shards.json."""
        if self.part_tokens:
            self._write_shard()
        (self.directory / "shards.json").unlink(missing_ok=True)
        fsync_path(self.directory)  # from here on the directory is no data set
        for path in self.directory.glob("shard-*.h5"):
            path.unlink()
        for shard in self.shards:
            os.replace(self.partial / shard["file"], self.directory / shard["file"])
        for path in self.tokenizer.files:
            self._publish(path.name, path.read_bytes())
        if self.tokenizer.identity == BYTES_IDENTITY:
            self._publish("dense2moe_tokenizer.json", b'{"type": "bytes"}\n')
        manifest = {"format": "dense2moe-shards", "version": 1,
                    "tokenizer_sha256": self.tokenizer.identity,
                    "vocab_size": self.tokenizer.vocab_size, "eos_id": self.tokenizer.eos_id,
                    "tokens": self.tokens, "documents": self.documents, "shards": self.shards}
        self._publish("shards.json", json.dumps(manifest, indent=2).encode() + b"\n")

    def _publish(self, name, content):
        """Makes a file visible as a whole, durably, and after all that was published before."""
        path = self.partial / name
        path.write_bytes(content)
        fsync_path(path)
        os.replace(path, self.directory / name)
        fsync_path(self.directory)

    def summary(self):
        return (f"{self.tokens:,} tokens in {self.documents:,} documents, "
                f"{len(self.shards)} shard{'s' if len(self.shards) != 1 else ''} in "
                f"{self.directory}")


class Progress:
    """One line on stderr: rewritten on a terminal, repeated at intervals elsewhere."""

    def __init__(self, program):
        self.program = program
        self.terminal = sys.stderr.isatty()
        self.interval = 0.5 if self.terminal else 10
        self.begin = time.monotonic()
        self.last = self.begin

    def seconds(self):
        return time.monotonic() - self.begin

    def show(self, fraction, text):
        now = time.monotonic()
        if now - self.last < self.interval:
            return
        self.last = now
        left = (now - self.begin) * (1 - fraction) / fraction if fraction > 0 else 0
        line = f"{self.program}: {100 * fraction:.0f} %, {text}, {left:.0f} s left"
        print(f"\r\033[K{line}" if self.terminal else line, end="" if self.terminal else "\n",
              file=sys.stderr, flush=True)

    def clear(self):
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
