"""The attention of the shared layout by itself: what a mask costs that skips what it hides.

    python bench/attention.py

One layer's attention, forward and backward, on groups `[prompt | y_1 | ... | y_K]`: what the stages
use (shared), SDPA with a dense mask over a row for each group (what that is on a GPU, but for its
gathers), SDPA causal on separate rows, and on GPUs flex attention with the same mask in blocks.
"""
import argparse
import statistics

import harness  # first: it puts the project on the path

import torch
import torch.nn.functional as F

import common
from lab import attention

CASES = [  # pairs, prompt, response, K, heads, head size
    (16, 256, 128, 2, 16, 64), (16, 512, 256, 2, 16, 64), (8, 512, 256, 4, 16, 64),
    (2, 512, 256, 16, 16, 64)]


def clock(attend, q, k, v, turns=5):
    """Median milliseconds of forward + backward."""
    times = []
    for _ in range(turns + 2):
        start = harness.now()
        out = attend(q, k, v)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        times.append(harness.now() - start)
    return 1e3 * statistics.median(times[2:])


def flex(seen):
    """Flex attention under a dense mask [B, 1, row, row], in blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    B, _, row, _ = seen.shape
    mask = create_block_mask(lambda b, h, i, j: seen[b, 0, i, j], B, None, row, row,
                             device=common.device())
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--out", help="file of the results (bench/attention.json)")
    args = flags.parse_args()
    gpu, rows = torch.cuda.is_available(), []
    for B, prompt, response, K, heads, size in CASES if gpu else CASES[:1] + CASES[2:3]:
        for dtype in (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16):
            lengths = ((prompt, *[response] * K),) * B

            def qkv(R, L):
                return [torch.randn(R, heads, L, size, device=common.device(), dtype=dtype,
                                    requires_grad=True) for _ in "qkv"]
            _, seen, _ = attention.rows_of(lengths, None, common.device())
            row = {"B": B, "prompt": prompt, "response": response, "K": K, "dtype": str(dtype)[6:]}
            tensors = qkv(B, seen.shape[-1])
            row["dense_ms"] = clock(lambda q, k, v: F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen), *tensors)
            if gpu:
                attend = flex(seen)
                row["flex_ms"] = clock(attend, *tensors)
                with torch.no_grad():
                    a = attend(*tensors)
                    b = F.scaled_dot_product_attention(*tensors, attn_mask=seen)
                row["difference"] = ((a - b).norm() / b.norm()).item()
            mask = torch.tensor([[lengths]], dtype=torch.int32)
            row["shared_ms"] = clock(lambda q, k, v: attention.shared_attention(
                torch.nn.Module(), q, k, v, mask)[0], *qkv(1, sum(map(sum, lengths))))
            row["separate_ms"] = clock(lambda q, k, v: F.scaled_dot_product_attention(
                q, k, v, is_causal=True), *qkv(B * K, prompt + response))
            rows.append(row)
            print(row, flush=True)
    harness.report("attention", rows, list(max(rows, key=len)), args.out)


if __name__ == "__main__":
    main()
