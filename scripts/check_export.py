#!/usr/bin/env python3
"""Compare exported model directories with real transformers.

Each directory must hold logits.safetensors with `ids` (T) and `logits` (T, V) as this project
computed them. The test of the export check leaves such directories, one for each kind of model:

    DENSE2MOE_EXAMPLES=examples build/bin/test_export_check every_kind_of_model_passes
    python scripts/check_export.py examples/*

For developers: needs torch, transformers and safetensors, which nothing else in the project does.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

# fp32 on both sides; sums in another order, over a few layers.
TOLERANCE = 1e-4


def unexpected(directory, info):
    """What transformers says about the names of tensors, without what is meant to be so."""
    tied = json.loads((directory / "config.json").read_text())["tie_word_embeddings"]
    found = {key: sorted(map(str, info[key])) for key in
             ("missing_keys", "unexpected_keys", "mismatched_keys")}
    # Zero-size matrices are not written (vLLM has no place for them), and tied heads never are.
    found["missing_keys"] = [name for name in found["missing_keys"]
                             if ".mlp.shared_expert." not in name
                             and not (tied and name == "lm_head.weight")]
    return {key: names for key, names in found.items() if names}


def check(directory):
    """Largest difference of two logits over the largest logit."""
    expected = load_file(directory / "logits.safetensors")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, torch_dtype=torch.float32, attn_implementation="eager",
        output_loading_info=True)
    problems = unexpected(directory, info)
    if problems:
        raise ValueError(f"{directory}: tensors do not fit: {problems}")
    with torch.no_grad():
        logits = model.eval()(expected["ids"].long()[None]).logits[0]
    error = (logits - expected["logits"]).abs().max() / expected["logits"].abs().max()
    print(f"{directory}: {type(model).__name__}, relative difference {error:.2e}")
    return float(error)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR")
    directories = parser.parse_args().directories
    transformers.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    bad = [directory for directory in directories if not check(directory) <= TOLERANCE]
    for directory in bad:
        print(f"{directory}: differs by more than {TOLERANCE}", file=sys.stderr)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
