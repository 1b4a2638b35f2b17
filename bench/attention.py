"""The attention of the shared layout by itself: what a mask costs that skips what it hides.

    python bench/attention.py

One layer's attention, forward and backward, on rows `[prompt | y_1 | ... | y_K]`: SDPA with the
dense mask (what the stages use), SDPA causal on separate rows, and on GPUs flex attention with the
same mask in blocks.
"""
import argparse
import statistics

import harness  # first: it puts the project on the path

import torch
import torch.nn.functional as F

import common

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


def flex(batch, groups):
    """Flex attention under the mask of `common.collate`, from each place's response number."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    L = batch["input_ids"].shape[1]
    segment = torch.full(batch["input_ids"].shape, -1, device=common.device())
    for row, g in enumerate(groups):
        at = 0
        for number, part in enumerate([g["prompt"], *g["responses"]]):
            segment[row, at:at + len(part)] = number
            at += len(part)

    def seen(b, h, i, j):
        same = (segment[b, j] == 0) | (segment[b, j] == segment[b, i])
        return (same & (segment[b, j] >= 0) & (j <= i)) | (i == j)
    mask = create_block_mask(seen, len(groups), None, L, L, device=common.device())
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--out", help="file of the results (bench/attention.json)")
    args = flags.parse_args()
    gpu, rows = torch.cuda.is_available(), []
    for B, prompt, response, K, heads, size in CASES if gpu else CASES[:1] + CASES[2:3]:
        groups = harness.groups_of([(prompt, *[response] * K)] * B, 8000)
        for dtype in (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16):
            def qkv(layout):
                batch = common.collate(groups, 0, layout)
                R, L = batch["input_ids"].shape
                return batch, [torch.randn(R, heads, L, size, device=common.device(), dtype=dtype,
                                           requires_grad=True) for _ in "qkv"]
            shared, tensors = qkv("shared")
            dense = clock(lambda q, k, v: F.scaled_dot_product_attention(
                q, k, v, attn_mask=shared["attention_mask"]), *tensors)
            row = {"B": B, "prompt": prompt, "response": response, "K": K, "dtype": str(dtype)[6:],
                   "dense_ms": dense}
            if gpu:
                attend = flex(shared, groups)
                row["flex_ms"] = clock(attend, *tensors)
                with torch.no_grad():
                    a, b = attend(*tensors), F.scaled_dot_product_attention(
                        *tensors, attn_mask=shared["attention_mask"])
                row["difference"] = ((a - b).norm() / b.norm()).item()
            _, tensors = qkv("separate")
            row["separate_ms"] = clock(lambda q, k, v: F.scaled_dot_product_attention(
                q, k, v, is_causal=True), *tensors)
            rows.append(row)
            print(row, flush=True)
    harness.report("attention", rows, list(max(rows, key=len)), args.out)


if __name__ == "__main__":
    main()
