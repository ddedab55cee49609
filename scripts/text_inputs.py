"""Text files of several kinds as a stream of records.

Files are read once, front to back, by one process; what costs time (JSON, tokenizing) is left to
others. A record is a document or a part of one, still in its file's form.
"""

import gzip
import io
import lzma
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from token_shards import EXIT_MISSING, Failure

KINDS = {".txt": "text", ".text": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl",
         ".json": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = (".xz", ".gz")
BLOCK_BYTES = 1 << 20
PART_BYTES = 1 << 18  # a long document is cut into parts of about this size


@dataclass(frozen=True)
class Record:
    data: bytes
    is_json: bool   # a line of JSON that holds the document; else the text itself
    starts: bool    # the document's first part
    ends: bool      # its last
    held_out: bool  # goes to the validation set
    where: str      # for messages: file, and line where there is one


@dataclass(frozen=True)
class InputFile:
    path: Path
    kind: str           # text, jsonl or parquet
    compression: str    # suffix or ""


def classify(path):
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return KINDS.get(suffixes[-1] if suffixes else "", None), compression


def find_inputs(names):
    """Files as given, directories searched for files of known kinds, in sorted order."""
    files = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = [entry for entry in sorted(path.rglob("*"))
                     if entry.is_file() and classify(entry)[0]]
            if not found:
                raise Failure(f"{path}: no files named {', '.join('*' + kind for kind in KINDS)} "
                              "(.xz, .gz)", EXIT_MISSING)
            files += [InputFile(entry, *classify(entry)) for entry in found]
        elif path.is_file():
            kind, compression = classify(path)
            files.append(InputFile(path, kind or "text", compression))  # other names: plain text
        else:
            raise Failure(f"{path}: no such file or directory", EXIT_MISSING)
    return files


class Reader:
    """Iterates over the records of all files.

    `fraction` is the share of documents to hold out. `cut(data, near)` gives a place in `data`, not
    before `near`, where parts of a document can be tokenized apart, or 0 if there is none; it is
    None when documents must stay whole.
    """

    def __init__(self, files, field, separator, fraction, cut, max_documents, max_bytes):
        self.files = files
        self.field = field
        self.separator = separator
        self.fraction = Fraction(fraction)
        self.cut = cut
        self.max_documents = max_documents
        self.max_bytes = max_bytes
        self.documents = 0   # given so far
        self.bytes = 0       # of text or JSON, decompressed
        self.disk_bytes = 0  # of the files before the current one
        self.raw = None      # the current file
        self.total_disk_bytes = sum(file.path.stat().st_size for file in files)
        # With one document in all, holding out means its end.
        self.splits_document = (self.fraction > 0 and len(files) == 1 and not separator
                                and files[0].kind == "text")

    def __iter__(self):
        read = {"text": self._text, "jsonl": self._jsonl, "parquet": self._parquet}
        for file in self.files:
            try:
                yield from read[file.kind](file)
            except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
                raise Failure(f"{file.path}: cannot be decompressed: {error}") from None
            self.disk_bytes += file.path.stat().st_size

    def progress(self):
        """The share that was read, by bytes on disk."""
        done = self.disk_bytes + (self.raw.tell() if self.raw and not self.raw.closed else 0)
        return min(1.0, done / max(1, self.total_disk_bytes))

    def _is_full(self):
        return self.documents >= self.max_documents or self.bytes >= self.max_bytes

    def _is_held_out(self):
        """Spreads held-out documents evenly: document i is one if the share of i + 1 documents
        has one more whole document than that of i."""
        if self.splits_document:
            return self.documents == 1
        before, after = self.documents * self.fraction, (self.documents + 1) * self.fraction
        return int(after) > int(before)

    def _record(self, data, where, is_json=False, starts=True, ends=True):
        record = Record(data, is_json, starts, ends, self._is_held_out(), where)
        self.bytes += len(data)
        self.documents += ends
        return record

    @contextmanager
    def _open(self, file):
        with open(file.path, "rb") as self.raw:
            if file.compression == ".xz":
                yield io.BufferedReader(lzma.LZMAFile(self.raw), BLOCK_BYTES)
            elif file.compression == ".gz":
                yield io.BufferedReader(gzip.GzipFile(fileobj=self.raw), BLOCK_BYTES)
            else:
                yield self.raw

    def _jsonl(self, file):
        """One JSON object a line."""
        with self._open(file) as stream:
            for number, line in enumerate(stream, 1):
                if self._is_full():
                    return
                if not line.isspace():
                    yield self._record(line, f"{file.path}:{number}", is_json=True)

    def _parquet(self, file):
        """A column of strings."""
        try:
            import pyarrow.parquet
        except ImportError:
            raise Failure(f"{file.path}: reading parquet needs the Python package pyarrow: "
                          "pip install pyarrow") from None
        try:
            table = pyarrow.parquet.ParquetFile(file.path)
        except pyarrow.ArrowException as error:
            raise Failure(f"{file.path}: not a parquet file: {error}") from None
        if self.field not in table.schema_arrow.names:
            raise Failure(f"{file.path}: no column '{self.field}', found "
                          f"{', '.join(table.schema_arrow.names)}; choose one with --field")
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=[self.field]):
            for value in batch.column(0).to_pylist():
                row += 1
                if self._is_full():
                    return
                if not isinstance(value, str):
                    raise Failure(f"{file.path}: row {row}: '{self.field}' is not text")
                yield self._record(value.encode(), f"{file.path}: row {row}")

    def _text(self, file):
        """One document per file, or one between separators."""
        place = self._place_of_split(file) if self.splits_document else 0
        with self._open(file) as stream:
            pieces = (pieces_between(stream, self.separator) if self.separator
                      else pieces_split_at(stream, place))
            for part, starts, ends in self._parts(pieces):
                if starts and self._is_full():
                    return
                yield self._record(part, str(file.path), starts=starts, ends=ends)

    def _parts(self, pieces):
        """(bytes, starts a document, ends it) from pieces (bytes, ends a document)."""
        buffer, starts, searched = bytearray(), True, 0
        for piece, ends in pieces:
            buffer += piece
            while self.cut and len(buffer) > PART_BYTES:
                at = self.cut(buffer, max(PART_BYTES, searched))
                searched = 0 if at else len(buffer) - 1
                if not at:
                    break
                yield bytes(buffer[:at]), starts, False
                del buffer[:at]
                starts = False
            if ends:
                yield bytes(buffer), starts, True
                buffer, starts, searched = bytearray(), True, 0

    def _place_of_split(self, file):
        """Where the held-out end of the only document begins: after a line end."""
        with self._open(file) as stream:
            size = sum(len(block) for block in iter(lambda: stream.read(BLOCK_BYTES), b""))
        place = int(size * (1 - self.fraction))
        with self._open(file) as stream:
            at = 0
            while at < place and (line := stream.readline()):
                at += len(line)
        return at


def pieces_between(stream, separator):
    buffer, keep = b"", len(separator) - 1
    while block := stream.read(BLOCK_BYTES):
        *documents, buffer = (buffer + block).split(separator)
        for document in documents:
            yield document, True
        safe = max(0, len(buffer) - keep)  # behind it a separator may have begun
        yield buffer[:safe], False
        buffer = buffer[safe:]
    yield buffer, True


def pieces_split_at(stream, place):
    """The whole stream; a document ends at `place`, if that is not 0, and at the end."""
    while place > 0 and (block := stream.read(min(place, BLOCK_BYTES))):
        place -= len(block)
        yield block, place == 0
    while block := stream.read(BLOCK_BYTES):
        yield block, False
    yield b"", True
