"""scripts/prepare_data.py and import_tokens.py, and the program `shards` on what they write.

    python3 tests/test_prepare_data.py [TEST ...]     with D2M_SHARDS=path of the program `shards`

Real text and the real Qwen2 tokenizer are used where the shared data directory has them. Exits with
77 (CTest: skipped) when the Python packages are not installed.
"""

import gzip
import hashlib
import importlib.util
import json
import lzma
import os
import random
import struct
import subprocess
import sys
import tempfile
import unicodedata
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
try:
    import h5py
    import numpy as np
    import tokenizers
    import xxhash  # noqa: F401
    import text_inputs
    import tokenizing
except ImportError as error:
    print(f"skipped: {error}; scripts/setup.sh installs what is needed")
    sys.exit(77)

SHARDS = os.environ.get("D2M_SHARDS", str(ROOT / "build/bin/shards"))
DATA = Path(os.environ.get("D2M_DATA", ROOT / "../shared/data"))
QWEN2 = DATA / "qwen2_tokenizer"
needs_data = unittest.skipUnless(QWEN2.is_dir(), f"{DATA} is not there")

AWKWARD_TEXTS = (
    "", " ", "\n", "a", "Hello world", "don't DON'T we'LL I'd they've 'tis 's",
    "tabs\tand\r\nWindows\r\n\r\nlines  \n\n\n   indented\n\tmore \n", "1234567890 3.14 x86_64 ½²",
    "na\u0308ive e\u0301le\u0300ve \u212b \u1e9b\u0323",  # NFC composes or replaces these
    "\u017f'\u017f it'\u017f", "日本語のテキスト、中文文本。한국어", "שלום مرحبا हिन्दी ไทย",
    "emoji 👩‍👩‍👧‍👦 🇩🇪 x\ufe0f", "\u00a0nbsp\u2009thin\u3000wide\u0085next\x1cfs\x00nul\x7f",
    "<|endoftext|>", "a<|im_start|>user\nhi<|im_end|>\n<|endoftext", "©®™ €£ “quoted” — dash… ′″",
    "a\n<|endoftext|>\nb", "\u0301starts with a mark", "\U0001d400 math \U00010330 gothic",
    "x" * 5000, " " * 300 + "y", "\n" * 100 + "z", "a\n\n \n b\n  \n\nc",
    "()[]{}!?.,;:'\"\n\n(x)\n",
)


def run(*arguments):
    return subprocess.run([str(argument) for argument in arguments], capture_output=True,
                          timeout=600)


def prepare(*arguments):
    return run(sys.executable, ROOT / "scripts/prepare_data.py", *arguments)


def import_tokens(*arguments):
    return run(sys.executable, ROOT / "scripts/import_tokens.py", *arguments)


def independent_tokenizer():
    """Qwen2's tokenizer as the JSON that Hugging Face distributes, put together here."""
    merges = (QWEN2 / "merges.txt").read_text(encoding="utf-8").split("\n")
    added = json.loads((QWEN2 / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    pattern = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"
               " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": int(id), **token} for id, token in added.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
             "use_regex": False}]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                    "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                  "byte_fallback": False, "vocab": json.loads((QWEN2 / "vocab.json").read_text()),
                  "merges": [line for line in merges if line and not line.startswith("#version")]},
    }


class Case(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="d2m-test-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def write(self, name, content):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def write_jsonl(self, name, texts):
        return self.write(name, "".join(json.dumps({"text": text}) + "\n" for text in texts))

    def ok(self, result):
        self.assertEqual(result.returncode, 0, result.stderr.decode())
        return result

    def fails(self, result, code, text):
        self.assertEqual(result.returncode, code, result.stderr.decode())
        self.assertIn(text, result.stderr.decode())
        self.assertNotIn("Traceback", result.stderr.decode())

    def documents(self, directory):
        """All documents of a directory of shards, which `shards check` must find good."""
        self.ok(run(SHARDS, "check", directory))
        out = []
        for shard in json.loads((directory / "shards.json").read_text())["shards"]:
            with h5py.File(directory / shard["file"]) as file:
                tokens, offsets = file["tokens"][:], file["doc_offsets"][:].astype(np.int64)
            out += [tokens[begin:end] for begin, end in zip(offsets, offsets[1:])]
        return out

    def texts(self, directory):
        """Documents of byte shards."""
        documents = self.documents(directory)
        for document in documents:
            self.assertEqual(document[-1], 256)
            self.assertLess(document[:-1].max(initial=0), 256)
        return [bytes(document[:-1].astype(np.uint8)).decode() for document in documents]


class BytesTokenizer(Case):
    def test_jsonl_is_held_out_evenly(self):
        texts = [f"document {i} ä€🙂\n" * (i % 5 + 1) for i in range(50)]
        path = self.write_jsonl("a.jsonl", texts)
        self.ok(prepare("--tokenizer", "bytes", "--valid-every", 12, "--output", self.folder / "o",
                        path))
        held_out = [texts[i] for i in range(11, 50, 12)]
        self.assertEqual(self.texts(self.folder / "o/valid"), held_out)
        self.assertEqual(self.texts(self.folder / "o/train"),
                         [text for text in texts if text not in held_out])
        with h5py.File(self.folder / "o/train/shard-00000.h5") as file:
            self.assertEqual(file["tokens"].dtype, np.dtype("<u2"))

    def test_fraction(self):
        path = self.write_jsonl("a.jsonl", [str(i) for i in range(100)])
        self.ok(prepare("--tokenizer", "bytes", "--valid-fraction", "0.07", "--output",
                        self.folder / "o", path))
        self.assertEqual(len(self.texts(self.folder / "o/valid")), 7)

    def test_compressed_files_and_directories(self):
        lines = "".join(json.dumps({"body": f"line {i}"}) + "\n" for i in range(4)).encode()
        self.write("in/b.jsonl.gz", gzip.compress(lines))
        self.write("in/a.jsonl.xz", lzma.compress(lines))
        self.write("in/deep/c.txt.xz", lzma.compress("plain ä".encode()))
        self.write("in/ignored.bin", b"\x00")
        self.ok(prepare("--tokenizer", "bytes", "--field", "body", "--output", self.folder / "o",
                        self.folder / "in"))
        lines = [f"line {i}" for i in range(4)]
        self.assertEqual(self.texts(self.folder / "o"), lines + lines + ["plain ä"])

    @unittest.skipUnless(importlib.util.find_spec("pyarrow"), "pyarrow is not installed")
    def test_parquet(self):
        import pyarrow
        import pyarrow.parquet
        path, texts = self.folder / "a.parquet", ["eins", "zwei ä", "", "vier"]
        pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3, 4], "body": texts}), path)
        self.ok(prepare("--tokenizer", "bytes", "--field", "body", "--output", self.folder / "o",
                        path))
        self.assertEqual(self.texts(self.folder / "o"), ["eins", "zwei ä", "vier"])
        self.fails(prepare("--tokenizer", "bytes", "--output", self.folder / "p", path), 65,
                   "no column 'text', found n, body")

    def test_text_file_is_one_document(self):
        text = "".join(f"line {i}\n" for i in range(200000))  # several blocks and parts
        path = self.write("a.txt", text)
        self.ok(prepare("--tokenizer", "bytes", "--output", self.folder / "o", path))
        self.assertEqual(self.texts(self.folder / "o"), [text])

    def test_single_document_is_split_at_a_line(self):
        text = "".join(f"line {i}\n" for i in range(200000))
        path = self.write("a.txt.gz", gzip.compress(text.encode()))
        self.ok(prepare("--tokenizer", "bytes", "--valid-every", 10, "--output", self.folder / "o",
                        path))
        train, valid = (self.texts(self.folder / "o" / name) for name in ("train", "valid"))
        self.assertEqual(len(train) + len(valid), 2)
        self.assertEqual(train[0] + valid[0], text)
        self.assertTrue(train[0].endswith("\n"))
        self.assertAlmostEqual(len(valid[0]) / len(text), 0.1, delta=0.001)

    def test_separator(self):
        documents = [f"part {i} " * 50000 for i in range(7)] + ["", "short", "last"]
        path = self.write("a.txt", "<|endoftext|>\n".join(documents))
        self.ok(prepare("--tokenizer", "bytes", "--separator", r"<|endoftext|>\n", "--output",
                        self.folder / "o", path))
        self.assertEqual(self.texts(self.folder / "o"), [text for text in documents if text])

    def test_limits(self):
        path = self.write_jsonl("a.jsonl", ["x" * 100] * 50)
        self.ok(prepare("--tokenizer", "bytes", "--max-docs", 7, "--output", self.folder / "o",
                        path))
        self.assertEqual(len(self.documents(self.folder / "o")), 7)
        line = path.stat().st_size // 50
        self.ok(prepare("--tokenizer", "bytes", "--max-bytes", 3 * line + 1, "--overwrite",
                        "--output", self.folder / "o", path))
        self.assertEqual(len(self.documents(self.folder / "o")), 4)

    def test_many_shards(self):
        texts = [chr(97 + i % 26) * (i * 7 % 400) for i in range(300)] + ["z" * 5000]
        path = self.write_jsonl("a.jsonl", texts)
        self.ok(prepare("--tokenizer", "bytes", "--shard-tokens", 1000, "--output",
                        self.folder / "o", path))
        self.assertEqual(self.texts(self.folder / "o"), [text for text in texts if text])
        shards = json.loads((self.folder / "o/shards.json").read_text())["shards"]
        self.assertGreater(len(shards), 30)
        self.assertTrue(all(1000 <= shard["tokens"] < 1500 for shard in shards[:-1]))

    def test_document_larger_than_a_shard(self):
        text = "0123456789\n" * 200000
        path = self.write("a.txt", text)
        self.ok(prepare("--tokenizer", "bytes", "--shard-tokens", 300000, "--output",
                        self.folder / "o", path))
        documents = self.documents(self.folder / "o")
        self.assertGreater(len(documents), 2)
        joined = np.concatenate(documents)
        self.assertEqual(bytes(joined[:-1].astype(np.uint8)).decode(), text)

    def test_vocab_size_and_no_eos(self):
        path = self.write("a.txt", "abc")
        self.ok(prepare("--tokenizer", "bytes", "--vocab-size", 512, "--eos", "none", "--output",
                        self.folder / "o", path))
        self.assertEqual(self.documents(self.folder / "o")[0].tolist(), [97, 98, 99])
        manifest = json.loads((self.folder / "o/shards.json").read_text())
        self.assertEqual((manifest["vocab_size"], manifest["eos_id"]), (512, -1))

    def test_result_does_not_depend_on_workers(self):
        rng = random.Random(5)
        texts = ["".join(rng.choices("abcdefgh \n", k=rng.randrange(2, 20000))) for _ in range(500)]
        path = self.write_jsonl("a.jsonl", texts)  # large enough for several processes
        for workers in (1, 3):
            self.ok(prepare("--tokenizer", "bytes", "--workers", workers, "--valid-every", 9,
                            "--shard-tokens", 1e6, "--output", self.folder / f"o{workers}", path))
        names = sorted(path.relative_to(self.folder / "o1") for path in
                       (self.folder / "o1").rglob("*") if path.is_file())
        self.assertGreater(len(names), 6)
        for name in names:
            self.assertEqual((self.folder / "o1" / name).read_bytes(),
                             (self.folder / "o3" / name).read_bytes(), name)


class BadInput(Case):
    def refused(self, name, content, code, text, *options):
        path = self.write(name, content)
        self.fails(prepare("--tokenizer", "bytes", *options, "--output", self.folder / "o", path),
                   code, text)
        self.assertFalse((self.folder / "o/shards.json").exists())

    def test_bad_files(self):
        good = '{"text": "good"}\n'
        self.refused("a.jsonl", good + "{oops\n", 65, "a.jsonl:2: not valid JSON")
        self.refused("a.jsonl", good + "[1]\n", 65, "a.jsonl:2: no text in field 'text'")
        self.refused("a.jsonl", '{"body": "x", "n": 1}\n', 65, "found fields 'body', 'n'")
        self.refused("a.jsonl", '{"text": 5}\n', 65, "a.jsonl:1: no text in field")
        self.refused("a.jsonl", b'{"text": "\xff"}\n', 65, "a.jsonl:1: not valid JSON")
        self.refused("a.jsonl", '{"text": "\\ud800"}\n', 65, "half a surrogate pair")
        self.refused("a.jsonl", "", 65, "holds no text")
        self.refused("a.jsonl.xz", lzma.compress(good.encode() * 999)[:-30], 65, "decompressed")
        self.refused("a.jsonl.gz", b"not gzip", 65, "decompressed")
        self.refused("a.jsonl", good, 65, "no document was held out", "--valid-every", 5)

    def test_usage(self):
        path = self.write("a.txt", "text")
        out = self.folder / "o"
        self.fails(prepare("--tokenizer", "bytes", "--output", out, self.folder / "no"), 66,
                   "no such file")
        self.fails(prepare("--tokenizer", self.folder / "no", "--output", out, path), 66,
                   "no such tokenizer")
        self.fails(prepare("--tokenizer", self.folder, "--output", out, path), 66, "tokenizer.json")
        self.fails(prepare("--tokenizer", "bytes", "--output", out), 2, "INPUT")
        self.fails(prepare("--tokenizer", "bytes", "--valid-every", 1, "--output", out, path), 2,
                   "at least 2")
        self.fails(prepare("--tokenizer", "bytes", "--vocab-size", 9, "--output", out, path), 2,
                   "the tokenizer has 257 ids")
        self.fails(prepare("--tokenizer", "bytes", "--output", path, path), 73, "cannot write")
        self.ok(prepare("--tokenizer", "bytes", "--output", out, path))
        self.fails(prepare("--tokenizer", "bytes", "--output", out, path), 73, "--overwrite")
        self.ok(prepare("--tokenizer", "bytes", "--overwrite", "--output", out, path))

    def test_shards_stay_when_their_replacement_fails(self):
        out, good = self.folder / "o", self.write_jsonl("good.jsonl", ["one", "two"])
        self.ok(prepare("--tokenizer", "bytes", "--output", out, good))
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        bad = self.write("bad.jsonl", '{"text": "three"}\n{oops\n')
        self.fails(prepare("--tokenizer", "bytes", "--overwrite", "--shard-tokens", 2, "--output",
                           out, bad), 65, "bad.jsonl:2")
        self.assertEqual({path.name: path.read_bytes() for path in out.iterdir()}, before)
        fewer = self.write_jsonl("fewer.jsonl", ["four"])
        self.ok(prepare("--tokenizer", "bytes", "--overwrite", "--output", out, fewer))
        self.assertEqual(self.texts(out), ["four"])

    @needs_data
    def test_text_must_be_utf8_for_tokenizers(self):
        path = self.write("a.txt", b"good \xff bad")
        self.fails(prepare("--tokenizer", QWEN2, "--output", self.folder / "o", path), 65,
                   "a.txt: not UTF-8: byte 0xff at 5")
        self.fails(prepare("--tokenizer", QWEN2, "--eos", "<nope>", "--output", self.folder / "o",
                           path), 2, "no token '<nope>'")


@needs_data
class Qwen2(Case):
    @classmethod
    def setUpClass(cls):
        cls.config = independent_tokenizer()
        cls.reference = tokenizers.Tokenizer.from_str(json.dumps(cls.config))
        cls.encoder = tokenizing.make_encoder(str(QWEN2))

    def ids(self, text):
        return self.reference.encode(text, add_special_tokens=False).ids

    def test_known_ids(self):
        self.assertEqual(self.ids("hello world"), [14990, 1879])
        self.assertEqual(self.encoder.encode(["hello world"])[0].tolist(), [14990, 1879])
        info = self.encoder.info
        self.assertEqual((info.vocab_size, info.eos_id), (151646, 151643))

    def test_wikitext(self):
        """Shard tokens equal the tokenizer's, and give the text back byte for byte."""
        packed = DATA / "text/wikitext2.valid.txt.xz"
        self.ok(prepare("--tokenizer", QWEN2, "--output", self.folder / "o", packed))
        text = lzma.open(packed).read().decode()
        shard = self.folder / "o/shard-00000.h5"
        self.ok(run(SHARDS, "check", self.folder / "o"))
        ids = self.ok(run(SHARDS, "show", shard, "--ids")).stdout.split()
        self.assertEqual([int(id) for id in ids], self.ids(text) + [151643])
        shown = self.ok(run(SHARDS, "show", shard, "--text", "--tokenizer", QWEN2)).stdout
        self.assertEqual(shown, unicodedata.normalize("NFC", text).encode())
        self.assertEqual(unicodedata.normalize("NFC", text), text)  # this text is in NFC already

    def test_awkward_texts(self):
        texts = list(AWKWARD_TEXTS) + ["\n".join(AWKWARD_TEXTS), " ".join(AWKWARD_TEXTS)]
        for text, ids in zip(texts, self.encoder.encode(texts)):
            self.assertEqual(ids.tolist(), self.ids(text), repr(text[:80]))

    def test_random_texts(self):
        """The fast way and the library agree on all characters that the fast way takes."""
        rng = random.Random(11)
        stable = [chr(code) for code in tokenizing.stable_characters()]
        common = [*stable[:400], *["'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "\xa0", "'re"] * 30]
        texts = ["".join(stable), " ".join(stable), "x".join(stable), "'".join(stable)]
        for _ in range(1500):
            texts.append("".join(rng.choice(common if rng.random() < 0.9 else stable)
                                 for _ in range(rng.randrange(1, 60))))
        self.assertTrue(all(self.encoder.words.separate(text) == [(text, True)] for text in texts))
        for text, ids in zip(texts, self.encoder.encode(texts)):
            self.assertEqual(ids.tolist(), self.ids(text), repr(text[:80]))

    def test_real_documents(self):
        with lzma.open(DATA / "text/valid.jsonl.xz") as file:
            texts = [json.loads(line)["text"] for line in file]
        for text, ids in zip(texts, self.encoder.encode(texts)):
            self.assertEqual(ids.tolist(), self.ids(text))

    def test_words_are_forgotten_when_too_many(self):
        texts = [f"word{i} thing{i} " * 20 for i in range(300)]
        expected = [self.ids(text) for text in texts]
        before, tokenizing.MAX_KNOWN_WORDS = tokenizing.MAX_KNOWN_WORDS, 100
        try:
            table = tokenizing.WordTable(self.encoder.tokenizer)
            self.assertEqual([table.encode(text).tolist() for text in texts], expected)
        finally:
            tokenizing.MAX_KNOWN_WORDS = before

    def test_long_text_in_parts(self):
        """A text that is cut into parts for the workers has the tokens of the whole."""
        with lzma.open(DATA / "text/valid.jsonl.xz") as file:
            text = "\n".join(json.loads(line)["text"] for line in file)[:1500000]
        path = self.write("a.txt", text)
        self.ok(prepare("--tokenizer", QWEN2, "--output", self.folder / "o", path))
        documents = self.documents(self.folder / "o")
        self.assertEqual(len(documents), 1)
        self.assertEqual(documents[0].tolist(), self.ids(text) + [151643])

    def test_tokenizer_json(self):
        """The same tokenizer as one file, with its own identity, and copied beside the shards."""
        single = self.write("tok/tokenizer.json", json.dumps(self.config))
        path = self.write_jsonl("a.jsonl", [text for text in AWKWARD_TEXTS])
        self.ok(prepare("--tokenizer", self.folder / "tok", "--output", self.folder / "o", path))
        documents = self.documents(self.folder / "o")
        self.assertEqual([document.tolist() for document in documents],
                         [self.ids(text) + [151643] for text in AWKWARD_TEXTS if text])
        manifest = json.loads((self.folder / "o/shards.json").read_text())
        self.assertEqual(manifest["tokenizer_sha256"],
                         hashlib.sha256(single.read_bytes()).hexdigest())
        self.assertEqual((self.folder / "o/tokenizer.json").read_bytes(), single.read_bytes())
        for i, text in enumerate(text for text in AWKWARD_TEXTS if text):
            shown = self.ok(run(SHARDS, "show", self.folder / "o/shard-00000.h5", "--doc", i,
                                "--text")).stdout
            self.assertEqual(shown, unicodedata.normalize("NFC", text).encode())
        self.fails(run(SHARDS, "show", self.folder / "o/shard-00000.h5", "--tokenizer", QWEN2), 65,
                   "tokenizer_sha256")

    def test_other_tokenizers_take_the_normal_way(self):
        config = json.loads(json.dumps(self.config))
        config["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "\\p{L}+|\\s+|."
        reference = tokenizers.Tokenizer.from_str(json.dumps(config))
        single = self.write("tokenizer.json", json.dumps(config))
        encoder = tokenizing.make_encoder(str(single))
        self.assertIsNone(encoder.words)
        self.assertIsNone(encoder.cut)
        text = "One. Two\n" * 100000  # more than a part: must stay whole
        path = self.write("a.txt", text)
        self.ok(prepare("--tokenizer", single, "--output", self.folder / "o", path))
        self.assertEqual(self.documents(self.folder / "o")[0].tolist()[:-1],
                         reference.encode(text, add_special_tokens=False).ids)


class Pieces(unittest.TestCase):
    def test_separators_across_blocks(self):
        class Stream:
            def __init__(self, data, step):
                self.data, self.step = data, step

            def read(self, _):
                block, self.data = self.data[:self.step], self.data[self.step:]
                return block

        data = b"one<sep>two<<sep>><sep><se<sep>p>"
        for step in range(1, 12):
            documents, current = [], b""
            for piece, ends in text_inputs.pieces_between(Stream(data, step), b"<sep>"):
                current += piece
                if ends:
                    documents.append(current)
                    current = b""
            self.assertEqual(documents, data.split(b"<sep>"), step)


class Import(Case):
    def llmc(self, name, magic, version, dtype, tokens):
        header = np.zeros(256, "<i4")
        header[:3] = magic, version, len(tokens)
        return self.write(name, header.tobytes() + np.array(tokens, dtype).tobytes())

    def megatron(self, name, dtype, code, sequences, documents):
        tokens = np.concatenate([np.array(sequence, dtype) for sequence in sequences])
        lengths = np.array([len(sequence) for sequence in sequences], "<i4")
        pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * np.dtype(dtype).itemsize
        self.write(name + ".bin", tokens.tobytes())
        header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(documents))
        return self.write(name + ".idx", header + lengths.tobytes() +
                          pointers.astype("<i8").tobytes() + np.array(documents, "<i8").tobytes())

    def imported(self, *arguments):
        self.ok(import_tokens("--tokenizer", "unknown", "--overwrite", "--output",
                              self.folder / "o", *arguments))
        return [document.tolist() for document in self.documents(self.folder / "o")]

    def test_llmc(self):
        tokens = [9, 1, 2, 9, 3, 9, 9, 4, 5]
        options = ("--vocab-size", 10, "--eos", 9)
        for magic, version, dtype in ((20240520, 1, "<u2"), (20240801, 7, "<u4")):
            path = self.llmc("a.bin", magic, version, dtype, tokens)
            self.assertEqual(self.imported(*options, path),
                             [[9, 1, 2], [9, 3], [9], [9, 4, 5]])
            self.assertEqual(self.imported(*options, "--eos-position", "end", path),
                             [[9], [1, 2, 9], [3, 9], [9], [4, 5]])
        path = self.llmc("b.bin", 20240801, 7, "<u4", [99999, 7])
        self.assertEqual(self.imported("--vocab-size", 100000, "--eos", 99999, path), [[99999, 7]])

    def test_llmc_in_blocks(self):
        sys.path.insert(0, str(ROOT / "scripts"))
        import import_tokens as module
        rng = random.Random(3)
        tokens = [rng.choice([0, 1, 2, 3]) for _ in range(200)]
        path = self.llmc("a.bin", 20240520, 1, "<u2", tokens)
        whole = {}
        for position in ("start", "end"):
            for block in (1 << 22, 1, 7, 64):
                before, module.BLOCK_TOKENS = module.BLOCK_TOKENS, block
                ends, at = set(), 0
                for ids, found in module.LlmcFile(path, 0, position).blocks():
                    ends |= {int(end) + at for end in found} - {0}
                    at += len(ids)
                module.BLOCK_TOKENS = before
                self.assertEqual(whole.setdefault(position, ends), ends)

    def test_megatron(self):
        sequences = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
        for dtype, code in (("<u2", 8), ("<i4", 4)):
            path = self.megatron("m", dtype, code, sequences, [0, 1, 3, 4])
            self.assertEqual(self.imported("--vocab-size", 11, path),
                             [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10]])
            self.assertEqual(self.imported("--vocab-size", 11, path.with_suffix(".bin")),
                             [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10]])

    def test_refusals(self):
        options = ("--tokenizer", "unknown", "--vocab-size", 10, "--eos", 9, "--output",
                   self.folder / "o")
        path = self.llmc("a.bin", 1234, 1, "<u2", [1])
        self.fails(import_tokens(*options, path), 65, "not an llm.c token file")
        path = self.llmc("a.bin", 20240520, 1, "<u2", [1, 2, 10])
        self.fails(import_tokens(*options, path), 65, "token 2 is id 10, expected below 10")
        path.write_bytes(path.read_bytes()[:-1])
        self.fails(import_tokens(*options, path), 65, "its header's 3 tokens need 1030")
        self.fails(import_tokens(*options, self.write("a.bin", b"")), 65, "not an llm.c")
        self.fails(import_tokens(*options, self.folder / "none.bin"), 66, "no such file")
        path = self.megatron("m", "<u2", 8, [[1], [2]], [0, 2])
        path.write_bytes(path.read_bytes()[:-4])
        self.fails(import_tokens(*options, path), 65, "truncated")
        path = self.megatron("m", "<u2", 8, [[1], [2]], [0, 3])
        self.fails(import_tokens(*options, path), 65, "document list")
        path = self.megatron("m", "<u2", 6, [[1], [2]], [0, 2])
        self.fails(import_tokens(*options, path), 65, "element type 6")

    @needs_data
    def test_tokenizer_says_the_rest(self):
        path = self.llmc("a.bin", 20240801, 7, "<u4", [151643, 14990, 1879])
        self.ok(import_tokens("--tokenizer", QWEN2, "--output", self.folder / "o", path))
        shard = self.folder / "o/shard-00000.h5"
        shown = self.ok(run(SHARDS, "show", shard, "--text")).stdout
        self.assertEqual(shown, b"<|endoftext|>hello world")


class Program(Case):
    def test_check_and_show(self):
        path = self.write_jsonl("a.jsonl", ["first", "second ä"])
        self.ok(prepare("--tokenizer", "bytes", "--output", self.folder / "o", path))
        shard = self.folder / "o/shard-00000.h5"
        result = self.ok(run(SHARDS, "check", self.folder / "o"))
        self.assertIn(b"shard-00000.h5: good: 16 tokens (uint16), 2 documents", result.stdout)
        result = self.ok(run(SHARDS, "show", shard, "--doc", 1))
        self.assertIn("115 101 99 111 110 100 32 195 164 256\nsecond ä\n", result.stdout.decode())
        self.assertEqual(self.ok(run(SHARDS, "show", shard, "--text")).stdout, b"first")
        self.fails(run(SHARDS, "show", shard, "--doc", 2), 2, "has 2 documents")
        self.fails(run(SHARDS, "show", self.folder / "none.h5"), 66, "no such file")
        self.fails(run(SHARDS, "check", self.folder / "none"), 66, "no such directory")
        self.fails(run(SHARDS, "check", self.folder), 66, "no shards.json")
        self.fails(run(SHARDS, "list", self.folder), 2, "unknown command")
        self.assertIn(b"GB/s", self.ok(run(SHARDS, "bench", self.folder / "o", "--seconds", 1,
                                           "--sequence-length", 5)).stdout)
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        result = run(SHARDS, "check", self.folder / "o")
        self.fails(result, 65, "1 of 1 shards bad")
        self.assertIn(b"shard-00000.h5: BAD: ", result.stdout)
        self.assertIn(b"XXH3-128", result.stdout)


if __name__ == "__main__":
    unittest.main()
