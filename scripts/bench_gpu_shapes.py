"""Shapes and cases of the GPU benchmark, and how many FLOPs a token costs."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    experts: int = 0  # per layer; 0 = dense
    top_k: int = 0

    def matmul_parameters(self):
        """Those that one token is multiplied with, LM head included, embedding not."""
        head = self.hidden // self.heads
        attention = self.hidden * head * (2 * self.heads + 2 * self.kv_heads)
        mlp = 3 * self.hidden * self.inner * max(self.top_k, 1) + self.experts * self.hidden
        return self.layers * (attention + mlp) + self.vocab * self.hidden

    def flops_per_token(self, length):
        """Forward and backward: 6 per parameter, and causal attention's two products."""
        return 6 * self.matmul_parameters() + 6 * self.layers * self.hidden * length


# Qwen2.5-0.5B, and what Layer-Fusion UpCycling makes of it: 5 of 24 layers fused away.
SHAPES = {
    "dense": Shape(24, 896, 14, 2, 4864, 151936),
    "lfuc": Shape(19, 896, 14, 2, 4864, 151936, experts=6, top_k=1),
}

# Dense bf16 rates of the tensor cores, TFLOP/s, without sparsity; parts of nvidia-smi's names.
# The first match counts.
PEAKS = (("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("H200", 989), ("GH200", 989),
         ("A100", 312), ("A800", 312), ("L40S", 362), ("RTX 4090", 165), ("RTX 3090", 71))


def peak_flops(device):
    """FLOP/s of a device by its name, or None."""
    return next((1e12 * rate for name, rate in PEAKS if name in device), None)


def mfu(shape, length, tokens_per_second, device):
    """Model FLOPs utilisation as text: a share of the device's peak, or n/a."""
    peak = peak_flops(device)
    if not peak or not tokens_per_second:
        return "n/a"
    return f"{100 * tokens_per_second * shape.flops_per_token(length) / peak:.1f} %"
