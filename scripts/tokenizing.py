"""Text to token ids: bytes, or a Hugging Face tokenizer, several times faster where it is safe.

The fast way. Byte-level BPE first cuts text into words with a regular expression and then encodes
each word by itself, so a word has the same ids wherever it stands. Most words of a text were seen
before. Words are therefore cut with Python's `re`, known ones are looked up, and only new ones go
through the tokenizer. This is exact as long as the expression means the same here and there, which
holds for texts in a fixed set of characters whose Unicode properties never changed and that NFC
leaves alone; every other paragraph, and one that mentions a special token, takes the normal way.
tests/test_prepare_data.py compares both.
"""

import json
import os
import re
import unicodedata
from array import array
from itertools import groupby
from pathlib import Path

import numpy as np

from token_shards import (BYTES_IDENTITY, EXIT_MISSING, EXIT_USAGE, Failure, TOKENIZER_FILES,
                          TokenizerInfo, sha256_of_files, tokenizer_identity)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # parallel by processes instead

BYTES_EOS = 256
BYTES_VOCAB = 257

QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
FAST_EXPRESSIONS = (QWEN2_WORDS, LLAMA3_WORDS)

# Code points whose general category and normalization have not changed since Unicode 4 (2003): what
# is unassigned, combining, or changed by NFC among them is taken out below.
STABLE_RANGES = ((0x09, 0x0D), (0x20, 0x7E), (0xA0, 0x17E), (0x180, 0x220), (0x250, 0x2AD),
                 (0x391, 0x3A1), (0x3A3, 0x3CE), (0x400, 0x45F), (0x2010, 0x2027), (0x2030, 0x2046),
                 (0x20A0, 0x20AC), (0x2122, 0x2122), (0x2190, 0x21EA), (0x2200, 0x22F1),
                 (0x2500, 0x2595), (0x2600, 0x2613), (0x261A, 0x266F), (0x3001, 0x3003),
                 (0x300A, 0x3011), (0x3041, 0x3094), (0x30A1, 0x30FA), (0x4E00, 0x9FA5),
                 (0xAC00, 0xD7A3), (0xFF01, 0xFF5E))
WHITE_SPACE = "\t\n\x0b\x0c\r \xa0"

MAX_KNOWN_WORDS = 1 << 20  # some 200 MB per process; then start again

# The expressions of FAST_EXPRESSIONS never match across a line end that is followed by a letter or
# digit, whatever comes before: text can be cut there and tokenized in parts.
CUT_IN_BYTES = re.compile(rb"\n(?=[A-Za-z0-9])")
CUT_IN_TEXT = re.compile(r"(?<=\n)(?=[A-Za-z0-9])")


class BytesEncoder:
    """Ids 0..255 are the bytes, 256 ends a document."""

    def __init__(self):
        self.info = TokenizerInfo(BYTES_IDENTITY, BYTES_VOCAB, BYTES_EOS, ())

    def decode(self, data, where):
        return data

    def encode(self, texts):
        return [np.frombuffer(text, dtype=np.uint8).astype(np.uint32) for text in texts]

    @staticmethod
    def cut(data, near):
        return near if near < len(data) else 0


class TokenizerEncoder:
    def __init__(self, tokenizer, info):
        self.tokenizer = tokenizer
        self.info = info
        self.words = WordTable(tokenizer) if WordTable.understands(tokenizer) else None
        self.cut = self.cut_at_line if self.words else None

    @staticmethod
    def cut_at_line(data, near):
        found = CUT_IN_BYTES.search(data, near)
        return found.end() if found else 0

    def decode(self, data, where):
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise Failure(f"{where}: not UTF-8: byte 0x{data[error.start]:02x} at {error.start} "
                          f"of this part ({error.reason})") from None

    def encode(self, texts):
        """Arrays of ids, one per text."""
        if not self.words:
            return encode_slowly(self.tokenizer, texts)
        pieces = [self.words.separate(text) for text in texts]
        slow = iter(encode_slowly(self.tokenizer, [piece for text in pieces
                                                   for piece, is_safe in text if not is_safe]))
        return [join([self.words.encode(piece) if is_safe else next(slow)
                      for piece, is_safe in text]) for text in pieces]


def join(arrays):
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def encode_slowly(tokenizer, texts):
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    return [np.array(encoding.ids, dtype=np.uint32)
            for encoding in encode(texts, add_special_tokens=False)]


def character_class(characters):
    """The inside of [...] for a sorted list of code points."""
    ranges = []
    for code in characters:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


def stable_characters():
    for first, last in STABLE_RANGES:
        for code in range(first, last + 1):
            character = chr(code)
            if (unicodedata.category(character)[0] not in "CM" or character in WHITE_SPACE) and \
                    unicodedata.normalize("NFC", character) == character:
                yield code


def translate(expression, letters, numbers):
    """The tokenizer's expression for Python's re, with explicit classes of characters."""
    spaces = "".join(f"\\x{ord(character):02x}" for character in WHITE_SPACE)
    classes = {r"\p{L}": letters, r"\p{N}": numbers, r"\s": spaces}
    out, inside = [], False
    for token in re.findall(r"\\p\{.\}|\\.|.", expression):
        if token in classes:
            token = classes[token] if inside else f"[{classes[token]}]"
        elif token == r"\S":
            token = f"[^{spaces}]"
        inside = (inside or token == "[") and token != "]"
        out.append(token)
    return re.compile("".join(out))


def byte_level_alphabet():
    """byte -> the character that stands for it in a byte-level vocabulary (GPT-2's rule): itself
    where it prints, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(0x100) if byte not in printable)
    return {byte: byte for byte in printable} | {byte: 0x100 + i for i, byte in enumerate(others)}


class WordIds(dict):
    """word -> its ids, as bytes of uint32. A new word goes through the tokenizer's model: what the
    tokenizer would do with it, without cutting and normalizing it first."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.alphabet = byte_level_alphabet()

    def __missing__(self, word):
        text = word.encode().decode("latin-1").translate(self.alphabet)
        ids = self[word] = array("I", [token.id for token in self.model.tokenize(text)]).tobytes()
        return ids


class WordTable:
    """The ids of all words seen so far."""

    def __init__(self, tokenizer):
        self.ids = WordIds(tokenizer.model)
        stable = list(stable_characters())
        category = {code: unicodedata.category(chr(code))[0] for code in stable}
        self.words = translate(split_expression(tokenizer),
                               character_class(c for c in stable if category[c] == "L"),
                               character_class(c for c in stable if category[c] == "N"))
        self.special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        self.safe_ascii = bytes(code for code in stable if code < 0x80)
        self.unsafe = re.compile("|".join([f"[^{character_class(stable)}]"] +
                                          [re.escape(content) for content in self.special]))

    @staticmethod
    def understands(tokenizer):
        """Whether the tokenizer is byte-level BPE over an expression that is known here."""
        normalizer = tokenizer.normalizer
        added = tokenizer.get_added_tokens_decoder().values()
        return (type(tokenizer.model).__name__ == "BPE" and not tokenizer.model.dropout and
                (normalizer is None or type(normalizer).__name__ == "NFC") and
                tokenizer.truncation is None and tokenizer.padding is None and
                not any(token.lstrip or token.rstrip or "\n" in token.content
                        for token in added) and
                split_expression(tokenizer) in FAST_EXPRESSIONS)

    def _is_safe(self, text):
        """Whether all characters are in the safe set and no special token is mentioned."""
        if text.isascii():  # ten times as fast as the search
            return not (text.encode().translate(None, self.safe_ascii) or
                        any(content in text for content in self.special))
        return not self.unsafe.search(text)

    def separate(self, text):
        """The text in pieces (text, is it in the safe set)."""
        if self._is_safe(text):
            return [(text, True)]
        runs = groupby(CUT_IN_TEXT.split(text), self._is_safe)
        return [("".join(parts), is_safe) for is_safe, parts in runs]

    def encode(self, text):
        """The ids of a text in the safe set."""
        if len(self.ids) > MAX_KNOWN_WORDS:
            self.ids.clear()
        ids = b"".join(map(self.ids.__getitem__, self.words.findall(text)))
        return np.frombuffer(ids, dtype=np.uint32)


def split_expression(tokenizer):
    """The expression that cuts words, if it and ByteLevel are all that happens before BPE."""
    if tokenizer.pre_tokenizer is None:
        return None
    steps = json.loads(tokenizer.pre_tokenizer.__getstate__()).get("pretokenizers", [])
    if len(steps) != 2 or steps[0]["type"] != "Split" or steps[1]["type"] != "ByteLevel":
        return None
    split, byte_level = steps
    plain = (split["behavior"] == "Isolated" and not split["invert"] and
             not byte_level["add_prefix_space"] and not byte_level["use_regex"])
    return split["pattern"].get("Regex") if plain else None


# --- Loading -------------------------------------------------------------------------------------

def load_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise Failure(f"{path}: not valid JSON: {error}") from None


def added_tokens(config, AddedToken):
    """The added tokens of a tokenizer_config.json, by id."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    entries = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    return [(int(id), AddedToken(entry["content"], **{flag: entry[flag] for flag in flags
                                                      if flag in entry}))
            for id, entry in entries]


def build_tokenizer(directory, config):
    """A byte-level BPE tokenizer from vocab.json and merges.txt."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers
    kind = config.get("tokenizer_class", "Qwen2Tokenizer").removesuffix("Fast")
    if kind not in ("Qwen2Tokenizer", "GPT2Tokenizer"):
        raise Failure(f"{directory}: has no tokenizer.json, and {kind} cannot be made from "
                      "vocab.json and merges.txt here: save it with transformers' "
                      "AutoTokenizer.from_pretrained(...).save_pretrained(...)")
    tokenizer = Tokenizer(models.BPE.from_file(str(directory / "vocab.json"),
                                               str(directory / "merges.txt")))
    if kind == "Qwen2Tokenizer":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for id, token in added_tokens(config, AddedToken):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != id:
            raise Failure(f"{directory}/tokenizer_config.json: added token {token.content!r} has "
                          f"id {id}, expected {tokenizer.token_to_id(token.content)}")
    return tokenizer


def find_eos(tokenizer, config, wanted, name):
    """The id that ends documents. For pre-training that is <|endoftext|> where it exists, not the
    end of a chat turn, which instruction-tuned models call eos_token."""
    if wanted == "none":
        return -1
    if wanted is None:
        wanted = "<|endoftext|>"
        if tokenizer.token_to_id(wanted) is None:
            wanted = config.get("eos_token")
            wanted = wanted["content"] if isinstance(wanted, dict) else wanted
        if wanted is None:
            raise Failure(f"{name}: names no end token: give one with --eos TOKEN, or --eos none",
                          EXIT_USAGE)
    id = tokenizer.token_to_id(wanted)
    if id is None and wanted.isdecimal() and tokenizer.id_to_token(int(wanted)) is not None:
        id = int(wanted)
    if id is None:
        raise Failure(f"{name}: has no token {wanted!r} to end documents with", EXIT_USAGE)
    return id


def load_tokenizer(name):
    """A Hugging Face tokenizer, its configuration, its identity and its files."""
    from tokenizers import Tokenizer
    path = Path(name)
    directory = path if path.is_dir() else path.parent
    if not path.exists():
        raise Failure(f"{path}: no such tokenizer; give 'bytes', a directory or a tokenizer.json",
                      EXIT_MISSING)
    config_path = directory / "tokenizer_config.json"
    config = load_json(config_path) if config_path.exists() else {}
    single = directory / "tokenizer.json" if path.is_dir() else path
    files = tuple(directory / entry for entry in TOKENIZER_FILES if (directory / entry).exists())
    if single.exists():
        try:
            tokenizer = Tokenizer.from_file(str(single))
        except Exception as error:  # the library raises plain Exception
            raise Failure(f"{single}: not a tokenizer: {error}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer, config, sha256_of_files([single]), files
    identity = tokenizer_identity(directory)
    if identity is None:
        raise Failure(f"{directory}: holds neither tokenizer.json nor vocab.json and merges.txt",
                      EXIT_MISSING)
    return build_tokenizer(directory, config), config, identity, files


def make_encoder(name, eos=None, vocab_size=None):
    """An encoder for --tokenizer NAME: 'bytes', a directory, or a tokenizer.json."""
    if name == "bytes" or (Path(name) / "dense2moe_tokenizer.json").exists():
        encoder = BytesEncoder()
        if eos == "none":
            encoder.info = TokenizerInfo(BYTES_IDENTITY, BYTES_VOCAB, -1, ())
        elif eos is not None:
            raise Failure("--eos: the bytes tokenizer has its own end token", EXIT_USAGE)
        smallest = BYTES_VOCAB
    else:
        tokenizer, config, identity, files = load_tokenizer(name)
        smallest = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        encoder = TokenizerEncoder(tokenizer, TokenizerInfo(
            identity, smallest, find_eos(tokenizer, config, eos, name), files))
    if vocab_size is not None:
        if vocab_size < smallest:
            raise Failure(f"--vocab-size {vocab_size}: the tokenizer has {smallest} ids",
                          EXIT_USAGE)
        info = encoder.info
        encoder.info = TokenizerInfo(info.identity, vocab_size, info.eos_id, info.files)
    return encoder
