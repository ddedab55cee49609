#!/usr/bin/env python3
"""The speed of Hugging Face transformers: what bench_gpu.py and bench_scaling.py compare ours with.

Qwen2ForCausalLM, or Qwen2MoeForCausalLM for the fused model, with random weights: torch.compile,
SDPA attention, grouped_mm experts, fused AdamW, everything in bf16 (weights and moments, too, which
is less work than fp32 master weights), no gradient clipping, random tokens that are on the GPU
before the clock starts. Prints one JSON object. Needs torch and transformers, and no network.

    scripts/bench_gpu_peer.py --model dense --batch 16 --length 2048

Under torchrun each process takes a GPU and DistributedDataParallel joins them; --micro-batches
per step and process then accumulate before gradients are exchanged.

    torchrun --nproc-per-node 4 scripts/bench_gpu_peer.py --model dense --micro-batches 4
"""
import argparse
import contextlib
import json
import os
import statistics
import time

import torch
import transformers

import bench_gpu_shapes as shapes


class SparseBlock(torch.nn.Module):
    """Qwen2MoeSparseMoeBlock without the shared expert, which the fused model does not have."""

    def __init__(self, block):
        super().__init__()
        self.gate, self.experts = block.gate, block.experts

    def forward(self, hidden):
        rows = hidden.view(-1, hidden.shape[-1])
        _, weights, chosen = self.gate(rows)
        return self.experts(rows, chosen, weights).view(hidden.shape)


def make_model(shape, length):
    common = dict(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=max(length, 4096),
        tie_word_embeddings=True, use_cache=False, attn_implementation="sdpa")
    if not shape.experts:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common))
    else:
        model = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(
            **common, num_experts=shape.experts, num_experts_per_tok=shape.top_k,
            moe_intermediate_size=shape.inner, shared_expert_intermediate_size=8,
            norm_topk_prob=False, output_router_logits=False))
        for layer in model.model.layers:
            layer.mlp = SparseBlock(layer.mlp)
            torch.nn.init.normal_(layer.mlp.gate.weight, std=0.02)
    return model.train()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=shapes.SHAPES, default="dense")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--micro-batches", type=int, default=1, help="per step and process")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()

    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        torch.distributed.init_process_group("nccl")
    torch.manual_seed(1)
    shape = shapes.SHAPES[arguments.model]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = make_model(shape, arguments.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    joined = model
    if world > 1:
        joined = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[torch.cuda.current_device()], gradient_as_bucket_view=True)
    step_model = joined if arguments.no_compile else torch.compile(joined)
    batches = [torch.randint(shape.vocab, (arguments.batch, arguments.length), device="cuda")
               for _ in range(8)]
    seconds = []
    for step in range(arguments.warmup + arguments.steps):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for micro in range(arguments.micro_batches):
            last = micro == arguments.micro_batches - 1
            ids = batches[(step + micro) % len(batches)]
            with contextlib.nullcontext() if world == 1 or last else joined.no_sync():
                loss = step_model(input_ids=ids, labels=ids).loss
                (loss / arguments.micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds[arguments.warmup:])
    tokens = arguments.batch * arguments.length * arguments.micro_batches * world
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank > 0:
        return
    print(json.dumps({
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "transformers": transformers.__version__, "loss": float(loss),
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_seconds": median, "tokens_per_second": tokens / median, "world": world,
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved()}))


if __name__ == "__main__":
    main()
