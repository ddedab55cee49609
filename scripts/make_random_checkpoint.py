#!/usr/bin/env python3
"""Write a Hugging Face directory of random weights in the true layout of a Qwen2.5 model.

Real weights cannot always be fetched; memory, speed, surgery and export only need their shapes.
Matrices and biases are N(0, 0.02), norms 1, everything BF16, one tensor in memory at a time:

    scripts/make_random_checkpoint.py --shape qwen2.5-0.5b OUT    # 290 tensors, 988 MB
    scripts/make_random_checkpoint.py --shape tiny --layers 4 --vocab-size 257 OUT
"""
import argparse
import json
import os
import shutil
import struct
import sys

import numpy as np

SHAPES = {
    "qwen2.5-0.5b": dict(hidden_size=896, layers=24, heads=14, kv_heads=2,
                         intermediate_size=4864, vocab_size=151936, tied=True),
    "qwen2.5-1.5b": dict(hidden_size=1536, layers=28, heads=12, kv_heads=2,
                         intermediate_size=8960, vocab_size=151936, tied=True),
    "tiny": dict(hidden_size=64, layers=6, heads=4, kv_heads=2,
                 intermediate_size=176, vocab_size=512, tied=True),
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                   "dense2moe_tokenizer.json")
CHUNK = 1 << 22  # elements drawn at once


def tensors(shape):
    """(name, shape) of every tensor, in the order of names as Hugging Face writes them."""
    hidden, width = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["heads"] * shape["kv_heads"]
    found = {"model.embed_tokens.weight": (shape["vocab_size"], hidden),
             "model.norm.weight": (hidden,)}
    if not shape["tied"]:
        found["lm_head.weight"] = (shape["vocab_size"], hidden)
    for layer in range(shape["layers"]):
        at = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            found[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
            found[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        found[at + "self_attn.o_proj.weight"] = (hidden, hidden)
        found[at + "mlp.gate_proj.weight"] = (width, hidden)
        found[at + "mlp.up_proj.weight"] = (width, hidden)
        found[at + "mlp.down_proj.weight"] = (hidden, width)
        found[at + "input_layernorm.weight"] = (hidden,)
        found[at + "post_attention_layernorm.weight"] = (hidden,)
    return sorted(found.items())


def config(shape):
    return {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": shape["eos"], "eos_token_id": shape["eos"], "hidden_act": "silu",
        "hidden_size": shape["hidden_size"], "initializer_range": 0.02,
        "intermediate_size": shape["intermediate_size"], "max_position_embeddings": 32768,
        "max_window_layers": shape["layers"], "model_type": "qwen2",
        "num_attention_heads": shape["heads"], "num_hidden_layers": shape["layers"],
        "num_key_value_heads": shape["kv_heads"], "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": shape["tied"], "torch_dtype": "bfloat16",
        "use_cache": True, "use_sliding_window": False, "vocab_size": shape["vocab_size"],
    }


def to_bf16(values):
    """float32 -> the upper 16 bits, rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write_weights(path, found, seed, std):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in found:
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape),
                        "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.Generator(np.random.SFC64(seed))
    done = 0
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in found:
            left = int(np.prod(shape))
            while left:
                count = min(left, CHUNK)
                if "norm" in name:
                    values = np.ones(count, np.float32)
                else:
                    values = random.standard_normal(count, np.float32) * np.float32(std)
                file.write(to_bf16(values).tobytes())
                left -= count
                done += 2 * count
            if sys.stderr.isatty():
                print(f"\r{done / 1e6:8.1f} of {offset / 1e6:.1f} MB", end="", file=sys.stderr)
        file.flush()
        os.fsync(file.fileno())
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return offset


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", metavar="OUT", help="directory to create")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    for name in ("hidden-size", "layers", "heads", "kv-heads", "intermediate-size", "vocab-size"):
        parser.add_argument("--" + name, type=int, help="instead of the shape's")
    parser.add_argument("--untied", action="store_true", help="with an lm_head of its own")
    parser.add_argument("--std", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokenizer", metavar="DIR", help="copy the tokenizer files of DIR")
    arguments = parser.parse_args()

    shape = dict(SHAPES[arguments.shape])
    for key in shape:
        if getattr(arguments, key, None):
            shape[key] = getattr(arguments, key)
    shape["tied"] = not arguments.untied
    shape["eos"] = min(151643, shape["vocab_size"] - 1)
    if shape["hidden_size"] % shape["heads"] or shape["heads"] % shape["kv_heads"]:
        parser.error("hidden-size must be a multiple of heads, and heads of kv-heads")
    if os.path.exists(arguments.output):
        parser.error(f"{arguments.output} exists; remove it or name another directory")

    temp = arguments.output.rstrip("/") + ".tmp"
    shutil.rmtree(temp, ignore_errors=True)
    os.makedirs(temp)
    found = tensors(shape)
    size = write_weights(os.path.join(temp, "model.safetensors"), found, arguments.seed,
                         arguments.std)
    with open(os.path.join(temp, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config(shape), file, indent=2)
        file.write("\n")
    if arguments.tokenizer:
        for name in TOKENIZER_FILES:
            source = os.path.join(arguments.tokenizer, name)
            if os.path.exists(source):
                shutil.copyfile(source, os.path.join(temp, name))
    os.rename(temp, arguments.output)
    print(f"{arguments.output}: {len(found)} tensors, {size // 2:,} parameters, "
          f"{size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
