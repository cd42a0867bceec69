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


def _capped(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None, scale: float, cap: float,
            groups: int) -> Tensor:
    k_BHSD, v_BHSD = k_BKSD.repeat_interleave(groups, 1), v_BKSD.repeat_interleave(groups, 1)
    logits = cap * torch.tanh(q_BHTD @ k_BHSD.transpose(-1, -2) * (scale / cap))
    new, total = logits.shape[-2:]
    if mask is None:
        mask = torch.ones(new, total, dtype=torch.bool, device=logits.device).tril(total - new)
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(v_BHSD.dtype) @ v_BHSD
