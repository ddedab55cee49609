#!/usr/bin/env python3
"""Training speed of PyTorch on the CPU, eager and in fp32, for the architecture of a config.json.

    scripts/bench_cpu_peer.py --config DIR/config.json --batch 8 --sequence 256 --threads 2

The other side of scripts/bench_cpu.sh. The model is written the way PyTorch is meant to be used:
fused q|k|v and gate|up projections, scaled_dot_product_attention, the built-in RMSNorm and the
fused AdamW where this version of torch has them; expert layers gather each expert's tokens, as
transformers does. Prints one JSON line: tokens per second of every timed step.
"""

import argparse
import json
import sys
import time

try:
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
except ImportError:
    sys.exit("bench_cpu_peer: this Python has no torch")


class RMSNorm(nn.Module):
    def __init__(self, size, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x):
        if hasattr(F, "rms_norm"):
            return F.rms_norm(x, x.shape[-1:], self.weight, self.epsilon)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weight


class Mlp(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Experts(nn.Module):
    def __init__(self, hidden, inner, count, top_k):
        super().__init__()
        self.router = nn.Linear(hidden, count, bias=False)
        self.experts = nn.ModuleList(Mlp(hidden, inner) for _ in range(count))
        self.top_k = top_k
        self.balance = None

    def forward(self, x):
        shape, count = x.shape, len(self.experts)
        x = x.reshape(-1, shape[-1])
        probabilities = self.router(x).softmax(-1)
        gates, chosen = probabilities.topk(self.top_k, dim=-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            if token.numel():
                out.index_add_(0, token, expert(x[token]) * gates[token, slot, None])
        load = torch.bincount(chosen.flatten(), minlength=count).float() / chosen.numel()
        self.balance = count * (load * probabilities.mean(0)).sum()
        return out.view(shape)


class Layer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        hidden, epsilon = config["hidden_size"], config["rms_norm_eps"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim = config.get("head_dim") or hidden // self.heads
        self.input_norm, self.mlp_norm = RMSNorm(hidden, epsilon), RMSNorm(hidden, epsilon)
        self.qkv = nn.Linear(hidden, (self.heads + 2 * self.kv_heads) * self.dim)
        self.output = nn.Linear(self.heads * self.dim, hidden, bias=False)
        if config.get("num_experts") and index not in config.get("mlp_only_layers", []):
            self.mlp = Experts(hidden, config["moe_intermediate_size"], config["num_experts"],
                               config["num_experts_per_tok"])
        else:
            self.mlp = Mlp(hidden, config["intermediate_size"])

    def attention(self, x, cosine, sine):
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.dim).transpose(1, 2)
        turned, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        a, b = turned.chunk(2, dim=-1)
        turned = turned * cosine + torch.cat([-b, a], dim=-1) * sine
        q, k = turned.split([self.heads, self.kv_heads], dim=1)
        group = self.heads // self.kv_heads
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(out.transpose(1, 2).reshape(batch, length, -1))

    def forward(self, x, cosine, sine):
        x = x + self.attention(self.input_norm(x), cosine, sine)
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    def __init__(self, config, length):
        super().__init__()
        self.embed = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        dim = self.layers[0].dim
        theta = config.get("rope_theta", config.get("rope_parameters", {}).get("rope_theta", 1e4))
        angle = torch.arange(length)[:, None] * theta ** (-torch.arange(0, dim, 2) / dim)
        angle = torch.cat([angle, angle], dim=-1)
        self.register_buffer("cosine", angle.cos())
        self.register_buffer("sine", angle.sin())

    def forward(self, tokens, targets, balance):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.cosine, self.sine)
        logits = self.norm(x) @ self.embed.weight.t()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        terms = [l.mlp.balance for l in self.layers if isinstance(l.mlp, Experts)]
        return loss + balance * sum(terms) if terms else loss


def optimizer_for(model):
    settings = dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    try:
        return torch.optim.AdamW(model.parameters(), fused=True, **settings)
    except (RuntimeError, TypeError):  # an older torch: no fused AdamW on the CPU
        return torch.optim.AdamW(model.parameters(), **settings)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="config.json of the model")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--sequence", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with open(args.config, encoding="utf-8") as file:
        config = json.load(file)
    model = Model(config, args.sequence)
    optimizer = optimizer_for(model)
    tokens = torch.randint(0, config["vocab_size"], (args.batch, args.sequence + 1))
    rates = []
    for step in range(args.warmup + args.steps):
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = model(tokens[:, :-1], tokens[:, 1:], 1e-3)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step >= args.warmup:
            rates.append(args.batch * args.sequence / (time.perf_counter() - begin))
    print(json.dumps({"torch": torch.__version__, "tokens_per_second": rates,
                      "parameters": sum(p.numel() for p in model.parameters())}))


if __name__ == "__main__":
    main()
