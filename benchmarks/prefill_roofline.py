"""What the grouped path should take on an H200 by its bytes and FLOPs, LLaMA2-7B, bf16: a prediction, no measurement.

python benchmarks/prefill_roofline.py
"""

from __future__ import annotations

from math import ceil

from lte.ops.prefill_launch import _GROUPED_16

HIDDEN, NEURONS, EXPERT_SIZE = 4096, 11008, 32
EXPERTS = NEURONS // EXPERT_SIZE
L2_BYTES_PER_S, DRAM_BYTES_PER_S, FLOPS_PER_S, LAUNCH_S = 5.5e12, 3.8e12, 650e12, 3e-6
# Best dense FFN in us, measured on the H200 before this path was written.
DENSE_US = {128: 84.0, 256: 108.0, 512: 190.6, 1024: 371.0, 2048: 733.0, 4096: 1450.0, 8192: 3326.0}
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)


def grouped_parts(tokens: int, active: float) -> dict[str, float]:
    """Seconds of each step of the grouped path, tokens choosing independently."""
    block = next(tiles.block_t for limit, tiles in _GROUPED_16 if tokens / 10 <= limit)
    tiles = EXPERTS * ceil(active * tokens / block)
    # A tile reads its rows of x and of gate and up through the L2 cache, and computes its padding, too.
    l2 = tiles * (block + 2 * EXPERT_SIZE) * HIDDEN * 2 / L2_BYTES_PER_S
    compute = tiles * block * 2 * EXPERT_SIZE * HIDDEN * 2 / FLOPS_PER_S
    weights = 2 * NEURONS * HIDDEN * 2 / DRAM_BYTES_PER_S
    return {
        "router, lists": 2 * LAUNCH_S + 2 * tokens * HIDDEN * EXPERTS / FLOPS_PER_S + LAUNCH_S,
        "zeros": LAUNCH_S + tokens * NEURONS * 2 / DRAM_BYTES_PER_S,
        "gate, up": max(l2, compute, weights),
        "down": DENSE_US[tokens] * 1e-6 / 3,
    }


def main() -> None:
    print("us (of dense): router and lists + zeros + gate and up + down")
    for tokens, dense in DENSE_US.items():
        for sparsity in SPARSITIES:
            parts = [1e6 * value for value in grouped_parts(tokens, 1 - sparsity).values()]
            shown = " + ".join(f"{value:.0f}" for value in parts)
            print(f"{tokens:5} tokens, {sparsity:.0%}: {sum(parts):5.0f} ({sum(parts) / dense:.2f}) = {shown}")


if __name__ == "__main__":
    main()
