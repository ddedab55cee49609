#!/usr/bin/env python3
"""Makes tests/goldens/: what PyTorch and Hugging Face transformers compute for small models.

Each case is a Hugging Face model directory (config.json, model.safetensors; random weights, fp32)
with golden.safetensors beside it, which holds, all as F32:

    tokens            (B, S) input ids
    logits            (B, S, V)
    loss              (1)    the scalar whose gradients follow
    cross_entropy     (1)    mean over the B * (S - 1) next-token targets
    grad_norm         (1)    global 2-norm of all gradients, before clipping
    grad.NAME         gradient of parameter NAME
    adamw.NAME        parameter NAME after one step of torch.optim.AdamW, gradients clipped to 1.0

and, in its metadata ("made_with", JSON), the versions that made it, the AdamW constants, and the
weights balance and z in  loss = cross_entropy + balance * LB + z * Z.

Run by developers only (needs torch and transformers):  scripts/make_goldens.py [OUTPUT_DIRECTORY]
Tests compare within 1e-4, so a re-run on another machine may change last digits, not results.
"""

import json
import pathlib
import shutil
import sys

import safetensors
import safetensors.torch
import torch
import transformers

BATCH, LENGTH, VOCAB = 2, 21, 83
OPTIMIZER = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
EXPERTS = {
    "num_hidden_layers": 4,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 0,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}
# name: (class prefix, settings, weight of the balance loss, weight of the z-loss)
CASES = {
    "qwen2": ("Qwen2", {**SHAPE, "tie_word_embeddings": True, "rope_theta": 1e6}, 0.0, 0.0),
    "llama": ("Llama", {**SHAPE, "tie_word_embeddings": False, "rope_theta": 1e4}, 0.0, 0.0),
    "qwen3": (
        "Qwen3",
        # head_dim * heads differs from hidden_size, as in Qwen3-0.6B.
        {**SHAPE, "head_dim": 12, "tie_word_embeddings": True, "rope_theta": 1e6},
        0.0,
        0.0,
    ),
    "qwen2_moe_softmax": (
        "Qwen2Moe",
        {**SHAPE, **EXPERTS, "norm_topk_prob": False, "tie_word_embeddings": True},
        0.0,
        0.0,
    ),
    "qwen2_moe_renorm": (
        "Qwen2Moe",
        {**SHAPE, **EXPERTS, "norm_topk_prob": True, "tie_word_embeddings": False},
        0.05,
        0.01,
    ),
}


def randomize(model, generator):
    """Weights at which everything matters: no zero bias, no unit norm, peaked attention."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.2 * values)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * values)
            elif name.endswith("mlp.gate.weight"):
                parameter.copy_(0.5 * values)
            else:
                parameter.copy_(0.15 * values)


def router_losses(router_logits, top_k):
    """Sum over layers of N * sum_i f_i * P_i, and of mean(logsumexp^2)."""
    balance, z = 0.0, 0.0
    for logits in router_logits:
        experts = logits.shape[-1]
        probabilities = torch.softmax(logits.float(), dim=-1)
        chosen = torch.topk(probabilities, top_k, dim=-1).indices
        counts = torch.bincount(chosen.reshape(-1), minlength=experts).float()
        share = counts / chosen.numel()
        balance = balance + experts * (share * probabilities.mean(dim=0)).sum()
        z = z + torch.logsumexp(logits.float(), dim=-1).square().mean()
    return balance, z


def decays(name):
    """Weight decay is for matrices, not for norms, biases, routers and embeddings."""
    outside = ("norm", "bias", "mlp.gate.weight", "embed_tokens", "lm_head", "shared_expert")
    return not any(part in name for part in outside)


def adamw_step(model):
    o = OPTIMIZER
    groups = [
        {"params": [p for n, p in model.named_parameters() if decays(n)],
         "weight_decay": o["weight_decay"]},
        {"params": [p for n, p in model.named_parameters() if not decays(n)],
         "weight_decay": 0.0},
    ]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o["clip"])
    optimizer = torch.optim.AdamW(
        groups, lr=o["lr"], betas=(o["beta1"], o["beta2"]), eps=o["eps"], foreach=False
    )
    optimizer.step()
    return norm


def split_experts(name, tensor):
    """Parameters under the names of the files: transformers >= 5 packs experts in memory."""
    if name.endswith("mlp.experts.gate_up_proj"):
        base, width = name[: -len("gate_up_proj")], tensor.shape[1] // 2
        for e in range(tensor.shape[0]):
            yield f"{base}{e}.gate_proj.weight", tensor[e, :width]
            yield f"{base}{e}.up_proj.weight", tensor[e, width:]
    elif name.endswith("mlp.experts.down_proj"):
        for e in range(tensor.shape[0]):
            yield f"{name[: -len('down_proj')]}{e}.down_proj.weight", tensor[e]
    elif "shared_expert" not in name:  # zero width: nothing is computed with it
        yield name, tensor


def named(tensors, prefix):
    return {
        prefix + name: part.detach().float().contiguous().clone()
        for packed, tensor in tensors
        for name, part in split_experts(packed, tensor)
    }


def make_case(directory, seed, kind, settings, balance_weight, z_weight):
    generator = torch.Generator().manual_seed(seed)
    config = getattr(transformers, kind + "Config")(**settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, kind + "ForCausalLM")(config).float().eval()
    randomize(model, generator)
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)

    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    moe = "num_experts" in settings
    extra = {"output_router_logits": True} if moe else {}
    result = model(input_ids=tokens, use_cache=False, **extra)
    cross_entropy = torch.nn.functional.cross_entropy(
        result.logits[:, :-1].reshape(-1, VOCAB), tokens[:, 1:].reshape(-1)
    )
    loss = cross_entropy
    if moe:
        balance, z = router_losses(result.router_logits, settings["num_experts_per_tok"])
        loss = loss + balance_weight * balance + z_weight * z
    loss.backward()

    golden = {
        "tokens": tokens.float(),
        "logits": result.logits.detach().float().contiguous(),
        "loss": loss.detach().reshape(1),
        "cross_entropy": cross_entropy.detach().reshape(1).clone(),
        **named(((n, p.grad) for n, p in model.named_parameters() if p.grad is not None), "grad."),
    }
    norm = adamw_step(model)
    golden["grad_norm"] = norm.reshape(1)
    golden |= named(model.named_parameters(), "adamw.")
    made_with = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "balance": balance_weight,
        "z": z_weight,
        **OPTIMIZER,
    }
    # One key: safetensors writes several in random order, and equal goldens should be equal files.
    metadata = {"made_with": json.dumps(made_with, sort_keys=True)}
    safetensors.torch.save_file(golden, directory / "golden.safetensors", metadata)
    generation = directory / "generation_config.json"
    generation.unlink(missing_ok=True)
    return loss.item(), norm.item()


def main():
    root = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens"
    if len(sys.argv) > 1:
        root = pathlib.Path(sys.argv[1])
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    total = 0
    for seed, (name, case) in enumerate(CASES.items(), 1):
        directory = root / name
        loss, norm = make_case(directory, seed, *case)
        size = sum(path.stat().st_size for path in directory.iterdir())
        total += size
        print(f"{name}: loss {loss:.6f}, gradient norm {norm:.4f}, {size} bytes")
    print(json.dumps({"total_bytes": total}))


if __name__ == "__main__":
    main()
