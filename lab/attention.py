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


def shared_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None,
                     sliding_window=None, **more):
    """transformers' "sdpa", and the shared layout."""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout,
                                      scaling=scaling, sliding_window=sliding_window, **more)
    lengths = tuple(map(tuple, attention_mask[0, 0].tolist()))
    if sliding_window and max(group[0] + max(group[1:]) for group in lengths) <= sliding_window:
        sliding_window = None
    short = query.shape[2] < SHORT * attention_mask.numel()
    if short or dropout or sliding_window or query.device.type != "cpu":
        return by_rows(module, query, key, value, lengths, sliding_window, dropout=dropout,
                       scaling=scaling, **more), None
    return by_segments(query, key, value, lengths, scaling), None


def by_segments(query, key, value, lengths, scaling):
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


def by_rows(module, query, key, value, lengths, window, **more):
    """One call with a padded row for each group, whose mask hides the siblings: few kernels."""
    index, seen, places = rows_of(lengths, window, query.device)
    rows = (x[0].index_select(1, index.flatten()).view(-1, *index.shape, x.shape[-1]).transpose(
        0, 1) for x in (query, key, value))                        # [B, heads, row, size]
    out = sdpa_attention_forward(module, *rows, seen, **more)[0]   # [B, row, heads, size]
    return out.flatten(0, 1).index_select(0, places)[None]


@lru_cache(maxsize=4)
def rows_of(lengths, window, device):
    """Padded rows of groups: where each place's token lies [B, row], who sees whom [B, 1, row,
    row], and where each token is in the flattened rows [L]."""
    longest = max(map(sum, lengths))

    def padded(rows):
        return torch.tensor([row + [-1] * (longest - len(row)) for row in rows], device=device)
    segment = padded([[k for k, n in enumerate(group) for _ in range(n)] for group in lengths])
    position = padded([[*range(n)] + [n + i for t in ts for i in range(t)] for n, *ts in lengths])
    q, k = segment[:, :, None], segment[:, None, :]                # [B, row, 1], [B, 1, row]
    seen = (((k == 0) | (k == q)) & (k >= 0)).tril()
    if window:
        seen &= position[:, :, None] - position[:, None, :] < window
    seen |= torch.eye(longest, dtype=torch.bool, device=device)  # an empty row would be NaN
    real = (segment >= 0).flatten()
    index = (real.cumsum(0) - 1).clamp(min=0).view(segment.shape)
    return index, seen[:, None], real.nonzero().flatten()


AttentionInterface.register("sdpa", shared_attention)
