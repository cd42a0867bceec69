"""Layers that keep only some tokens: which, and moving them together.

After a prompt, a layer with a budget keeps its best tokens by a score; while the answer grows, it lets go again
whenever it holds a block more than its budget. Tokens that stay keep their positions.

Shapes: S slots, K key heads, D head width, W last queries, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.serve.caches import Caches
from layerwise.serve.placed import placed
from layerwise.serve.pool import Pool
from layerwise.serve.runner import Runner
from layerwise.serve.sequence import Row
from layerwise.serve.table import Scorer

SINKS = 4
RECENT = 32
POOL = 5
Score = Callable[[Tensor, Tensor], Tensor]


def recent(k_SKD: Tensor, q_WHD: Tensor) -> Tensor:
    """The last tokens, and the first few, which take up attention that belongs nowhere (arXiv 2309.17453)."""
    score_S = torch.arange(len(k_SKD), dtype=torch.float32, device=k_SKD.device)
    score_S[:SINKS] = float("inf")
    return score_S


def norm(k_SKD: Tensor, q_WHD: Tensor) -> Tensor:
    """Tokens with small keys, which tend to draw attention (arXiv 2406.11430)."""
    lengths_SK: Tensor = torch.linalg.vector_norm(k_SKD.float(), dim=-1)
    return -lengths_SK.mean(-1)


def attention(k_SKD: Tensor, q_WHD: Tensor) -> Tensor:
    """Tokens that the queries of the last W slots attend to, over all heads, averaged over POOL neighbours, so that
    what stands around a token that matters stays with it (SnapKV, arXiv 2404.14469, where each head keeps its own)."""
    window, heads, width = q_WHD.shape
    k_SHD = k_SKD.float().repeat_interleave(heads // k_SKD.shape[1], 1)
    logits_HWS: Tensor = torch.einsum("whd,shd->hws", q_WHD.float(), k_SHD) * width**-0.5
    later_WS = torch.ones(logits_HWS.shape[1:], dtype=torch.bool, device=k_SKD.device).triu(len(k_SKD) - window + 1)
    weights_S = logits_HWS.masked_fill(later_WS, float("-inf")).softmax(-1).sum((0, 1))
    return F.avg_pool1d(weights_S[None], POOL, stride=1, padding=POOL // 2)[0]


SCORES: dict[Scorer, Score] = {"recent": recent, "norm": norm, "attention": attention}


def best(score_S: Tensor, budget: int, fresh: int) -> list[int]:
    """The `budget` slots of highest score, ascending, among them the last `fresh`; of equals, the earlier."""
    score_S = score_S.clone()
    score_S[len(score_S) - min(fresh, budget) :] = float("inf")
    return sorted(score_S.argsort(descending=True, stable=True)[:budget].tolist())


@torch.inference_mode()
def compact(runner: Runner, caches: Caches, row: Row) -> None:
    """Let go of what exceeds the budgets, once a row's sequence is past its prompt."""
    sequence = row.sequence
    if sequence.computed < sequence.prompt:
        return
    for group, entry in enumerate(caches.table.groups):
        if entry.kind != "budget":
            continue
        assert entry.tokens is not None
        table, layer = sequence.tables[group], entry.layers[0]
        total, slack = sequence.computed - table.shift, caches.block if row.start >= sequence.prompt else 0
        if total <= entry.tokens + slack:
            continue
        pool = runner.pools[layer]
        assert isinstance(pool, Pool)
        blocks_1M = placed([table.blocks], runner.stack.device)
        slots_S = _slots(blocks_1M[0], total, caches.block)
        k_SKD = pool.gather(blocks_1M)[0][0].transpose(0, 1)[:total]
        q_WHD = k_SKD[:0]
        if layer in runner.watched:
            q_WHD = runner.queries_of(row, layer)[: sequence.computed - row.start][-RECENT:]
        kept = best(SCORES[entry.scorer](k_SKD, q_WHD), entry.tokens, min(RECENT, max(1, entry.tokens // 2)))
        pool.move(slots_S[kept], slots_S[: len(kept)])
        caches.compact(sequence, group, kept)


def _slots(blocks_M: Tensor, total: int, block: int) -> Tensor:
    """Places in the pool of the slots 0 to `total`."""
    place_MB = blocks_M[:, None] * block + torch.arange(block, device=blocks_M.device)
    return place_MB.flatten()[:total]
