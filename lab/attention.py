"""Attention of the shared layout (`common.collate`): a response sees its prompt and itself, neither
its siblings nor other groups.

All groups lie in one row without padding, and the attention mask holds lengths: int32 [1, 1, B,
1 + K], the prompt's and each response's. Importing this replaces transformers' "sdpa", which does
all other masks as before. query, key and value are [1, heads, L, size of a head], what is returned
[1, L, heads, size].
"""
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

SHORT = 48  # tokens in a segment, on average, under which a call for each costs more than it saves


def shared_attention(module, query, key, value, mask, dropout=0.0, scaling=None, **more):
    """transformers' "sdpa", and the shared layout."""
    more |= {"dropout": dropout, "scaling": scaling}
    if mask is None or mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, mask, **more)
    lengths = tuple(map(tuple, mask[0, 0].tolist()))
    short = query.shape[2] < SHORT * mask.numel() or dropout  # SDPA with dropout is many operators
    attend = by_rows if short or query.device.type != "cpu" else by_segments
    return attend(module, query, key, value, lengths, **more), None


def by_segments(module, query, key, value, lengths, scaling, **more):
    """A call for each prompt and response: nothing that is hidden is computed. In fp32, whose
    backward pass takes half the time of bf16's on a CPU."""
    wide, shares = torch.promote_types(query.dtype, torch.float32), query.shape[1] // key.shape[1]
    attend = partial(F.scaled_dot_product_attention, scale=scaling)
    parts = (x.to(wide).split(sum(lengths, ()), 2) for x in (
        query, repeat_kv(key, shares), repeat_kv(value, shares)))
    segments, out = zip(*parts), []
    with torch.autocast("cpu", enabled=False):
        for n, *responses in lengths:
            q, k, v = next(segments)
            out.append(attend(q, k, v, is_causal=True))
            for t in responses:
                q, *own = next(segments)
                seen = torch.ones(t, n + t, dtype=torch.bool).tril(n)
                out.append(attend(q, *(torch.cat(x, 2) for x in zip((k, v), own)), seen))
    return torch.cat(out, 2).to(query.dtype).transpose(1, 2).contiguous()


def by_rows(module, query, key, value, lengths, **more):
    """One call with a padded row for each group, whose mask hides the siblings: few kernels."""
    index, seen, real = rows_of(lengths, query.device)
    rows = (x[0][:, index].transpose(0, 1) for x in (query, key, value))  # [B, heads, row, size]
    return sdpa_attention_forward(module, *rows, seen, **more)[0][real][None]


@lru_cache(maxsize=4)
def rows_of(lengths, device):
    """Where each group's tokens lie [B, row], who sees whom [B, 1, row, row], which are real."""
    longest = max(map(sum, lengths))
    segment = torch.tensor([[k for k, n in enumerate(group) for _ in range(n)] +
                            [-1] * (longest - sum(group)) for group in lengths], device=device)
    q, k = segment[:, :, None], segment[:, None, :]                # [B, row, 1], [B, 1, row]
    seen = (((k == 0) | (k == q)) & (k >= 0)).tril()
    seen |= torch.eye(longest, dtype=torch.bool, device=device)  # an empty row would be NaN
    real = segment >= 0
    index = (real.flatten().cumsum(0) - 1).clamp(min=0).view(real.shape)
    return index, seen[:, None], real


AttentionInterface.register("sdpa", shared_attention)
