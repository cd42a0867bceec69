"""The softmax of attention, on whatever keys and values a pass has.

Shapes: B batch, T new tokens, S all tokens, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.spec import Attention


def softmax_attention(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None, a: Attention) -> Tensor:
    """Softmax(q k' * scale) v, [B, H, T, D], through the fastest kernel that is exact for the case.

    `mask` is True where a query sees a key, bool [B or 1, 1, T, S]; None where the T queries are the last of the S
    keys and plain causal order says it all.
    """
    scale = a.scale if a.scale is not None else a.head_dim**-0.5
    groups = a.heads // a.kv_heads
    if a.softcap is not None:
        return _capped(q_BHTD, k_BKSD, v_BKSD, mask, scale, a.softcap, groups)
    if q_BHTD.shape[2] == 1:  # one token: the query heads that share a key head become the query axis
        batch, heads, _, width = q_BHTD.shape
        q_BKGD = q_BHTD.view(batch, a.kv_heads, groups, width)
        out_BKGD = F.scaled_dot_product_attention(q_BKGD, k_BKSD, v_BKSD, attn_mask=mask, scale=scale)
        return out_BKGD.view(batch, heads, 1, width)
    if groups > 1:
        k_BKSD, v_BKSD = k_BKSD.repeat_interleave(groups, 1), v_BKSD.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, attn_mask=mask, is_causal=mask is None, scale=scale)


def few_queries(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, seen: Tensor | None, a: Attention) -> Tensor:
    """The same for few new tokens of many sequences, as two batched products, [B, H, T, D].

    `seen` is added to the logits: 0 where a query sees a key, minus infinity elsewhere, [B or 1, 1, T, S]; None where
    every query sees every key. Keys should lie head by head. In half precision logits are rounded once more than in
    `softmax_attention`; on a CPU this takes a fifth of its time.
    """
    batch, heads, new, width = q_BHTD.shape
    kv, total = k_BKSD.shape[1:3]
    shape = kv, batch, heads // kv, new
    q_KBGTD = q_BHTD.reshape(batch, kv, -1, new, width).transpose(0, 1)
    k_nSD, v_nSD = (x.transpose(0, 1).reshape(kv * batch, total, width) for x in (k_BKSD, v_BKSD))
    logits = torch.bmm(q_KBGTD.reshape(kv * batch, -1, width), k_nSD.transpose(1, 2)).view(*shape, total)
    scale = a.scale if a.scale is not None else a.head_dim**-0.5
    if a.softcap is not None:
        logits, scale = a.softcap * torch.tanh(logits * (scale / a.softcap)), 1.0
    logits = logits * scale if seen is None else torch.add(seen[None, :, 0, None], logits, alpha=scale)
    weights = logits.softmax(-1)  # in float32 inside, rounded once
    out_KBGTD = torch.bmm(weights.view(kv * batch, -1, total), v_nSD).view(*shape, width)
    return out_KBGTD.transpose(0, 1).reshape(batch, heads, new, width)


def _capped(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None, scale: float, cap: float,
            groups: int) -> Tensor:
    k_BHSD, v_BHSD = k_BKSD.repeat_interleave(groups, 1), v_BKSD.repeat_interleave(groups, 1)
    logits = cap * torch.tanh(q_BHTD @ k_BHSD.transpose(-1, -2) * (scale / cap))
    new, total = logits.shape[-2:]
    if mask is None:
        mask = torch.ones(new, total, dtype=torch.bool, device=logits.device).tril(total - new)
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(v_BHSD.dtype) @ v_BHSD
