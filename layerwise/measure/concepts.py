"""Maps of concepts through the layers: which of two groups of words the residual stream leans to, and why.

    map        p_l(c): lens probability at the answer's place, renormalised over a set of concepts
    alignment  mean over layers of (mass of context words - mass of competitors) in the map
    support    log p(c) - log p(c | direction of c' removed from the answer's residual at layer l)

A reconstruction of distributional semantics tracing (arXiv 2510.06107), whose text gives no formulas.

Shapes: D depths (layers + 1), L layers, B or N prompts, K concepts, J tokens of a
outcome, C hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.data.batch import pad
from layerwise.data.text import Tokenizer
from layerwise.errors import BadOption
from layerwise.measure.track import lens
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.tail import Tail


@dataclass(frozen=True)
class Concepts:
    """What the lens reads at the answer's place of every prompt.

    `tokens_NK` are the concepts: the right sense's words, the wrong one's, and the likeliest others; `right_NK`
    and `wrong_NK` say which, `known_NK` is False at filling. `log_p_DNK` is their log-probability at every depth,
    `odds_DN` the log-odds of the right sense against the wrong, `entropy_N` (nats) and `top_N` the doubt at the end.
    """

    tokens_NK: Tensor
    right_NK: Tensor
    wrong_NK: Tensor
    known_NK: Tensor
    log_p_DNK: Tensor
    odds_DN: Tensor
    entropy_N: Tensor
    top_N: Tensor


@torch.inference_mode()
def read_concepts(stack: Stack, tokenizer: Tokenizer, rows: Sequence[Sequence[int]], right: Sequence[Sequence[int]],
                  wrong: Sequence[Sequence[int]], *, others: int = 4) -> Concepts:
    """Concepts of every prompt: the tokens of both senses, and the `others` likeliest words over all depths.

    Words are tokens that decode to a space and letters, where the tokenizer has spaces at all.
    """
    batch = pad(rows)
    last_N = torch.tensor([len(row) - 1 for row in rows])
    readings = list(lens(stack, batch.tokens_BT, last_N))
    mean_NV = torch.stack([log_p_NV.exp() for log_p_NV in readings]).mean(0)
    named = [[*r, *w] for r, w in zip(right, wrong, strict=True)]
    chosen = [[*own, *_likeliest(mean_V, own, tokenizer, others)] for own, mean_V in zip(named, mean_NV, strict=True)]
    filled = pad(chosen)
    known_NK = torch.ones_like(filled.tokens_BT, dtype=torch.bool) if filled.mask_BT is None else filled.mask_BT
    place_K = torch.arange(known_NK.shape[1])
    first_N1, both_N1 = (torch.tensor([[size] for size in sizes])
                         for sizes in (list(map(len, right)), list(map(len, named))))
    right_NK, wrong_NK = place_K < first_N1, (place_K >= first_N1) & (place_K < both_N1)
    senses = list(zip(right, wrong, strict=True))
    return Concepts(
        filled.tokens_BT, right_NK, wrong_NK, known_NK,
        torch.stack([log_p_NV.gather(1, filled.tokens_BT) for log_p_NV in readings]),
        torch.stack([answers(log_p_NV, senses) for log_p_NV in readings]),
        -(readings[-1].exp() * readings[-1]).sum(-1), readings[-1].exp().amax(-1))


def answers(logits_NV: Tensor, senses: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """Log-odds of the first group of tokens against the second, one pair of groups a row, [N]."""
    return torch.stack([logits_V[list(right)].float().logsumexp(0) - logits_V[list(wrong)].float().logsumexp(0)
                        for logits_V, (right, wrong) in zip(logits_NV, senses, strict=True)])


def _likeliest(mean_V: Tensor, named: Sequence[int], tokenizer: Tokenizer, count: int) -> list[int]:
    decode: Callable[[list[int]], str] = tokenizer.decode  # type: ignore[attr-defined]
    order = [token for token in mean_V.topk(min(len(mean_V), 50)).indices.tolist() if token not in named]
    words = [token for token in order if decode([token]).strip().isalpha()]
    spaced = [token for token in words if decode([token]).startswith(" ")]
    return (spaced or words)[:count]


def concept_map(log_p_DBK: Tensor, known_BK: Tensor | None = None) -> Tensor:
    """Probability of each concept among all of its prompt's, [D, B, K]; `known_BK` is False at filling."""
    if known_BK is not None:
        log_p_DBK = log_p_DBK.masked_fill(~known_BK, -torch.inf)
    return log_p_DBK.softmax(-1)


def alignment(map_DBK: Tensor, context_BK: Tensor, competitor_BK: Tensor) -> Tensor:
    """Context mass less competitor mass, mean over depths, [B] from -1 to 1."""
    return (map_DBK * (context_BK.to(map_DBK) - competitor_BK.to(map_DBK))).sum(-1).mean(0)


@torch.no_grad()
def support(stack: DecoderStack, rows: Sequence[Sequence[int]], concepts_BK: Tensor, outcome_BJ: Tensor,
            layers: Sequence[int]) -> Tensor:
    """How much each concept's direction at the answer's place supports an outcome, nats, [L, B, K].

    The direction is the concept's row of the head, the outcome the summed chance of the tokens `outcome_BJ`
    (repeat one to fill up). Only the last position runs again. Raises BadOption for a packed head.
    """
    table = stack.decoder.embedding if stack.decoder.head is None else stack.decoder.head
    if not isinstance(table, torch.nn.Embedding):
        raise BadOption("directions of a packed head", expected="a dense head", do="trace before packing")
    unit_BKC = torch.nn.functional.normalize(table.weight[concepts_BK].float(), dim=-1)
    tail = Tail(stack, rows, [len(row) - 1 for row in rows])
    once_BJ = first_occurrence(outcome_BJ)
    found = []
    for layer in layers:
        entering = tail.enter(layer)
        clean_B = _chance(tail.last(tail.run(entering)), outcome_BJ, once_BJ)
        column = []
        for unit_BC in unit_BKC.unbind(1):
            x_B1C = entering.hidden
            along_B1 = (x_B1C[:, 0].float() * unit_BC).sum(-1, keepdim=True)
            removed = x_B1C - (along_B1 * unit_BC)[:, None].to(x_B1C)
            column.append(clean_B - _chance(tail.last(tail.run(entering.moved(removed, layer))), outcome_BJ, once_BJ))
        found.append(torch.stack(column, 1))
    return torch.stack(found)


def support_share(support_LBK: Tensor, context_BK: Tensor) -> Tensor:
    """Share of positive support that comes from context words, mean over layers, [B]; a half where there is none."""
    positive = support_LBK.clamp(min=0)
    whole_LB = positive.sum(-1)
    share_LB = (positive * context_BK.to(positive)).sum(-1) / whole_LB.clamp(min=1e-12)
    return torch.where(whole_LB > 1e-9, share_LB, torch.full_like(share_LB, 0.5)).mean(0)


def first_occurrence(tokens_BJ: Tensor) -> Tensor:
    """True where a token stands for the first time in its row."""
    same_BJJ = tokens_BJ[:, :, None] == tokens_BJ[:, None, :]
    return ~(same_BJJ & torch.ones_like(same_BJJ[0]).tril(-1)).any(-1)


def _chance(logits_BV: Tensor, tokens_BJ: Tensor, once_BJ: Tensor) -> Tensor:
    log_p_BJ = logits_BV.float().log_softmax(-1).gather(1, tokens_BJ.to(logits_BV.device))
    return log_p_BJ.masked_fill(~once_BJ.to(log_p_BJ.device), -torch.inf).logsumexp(-1)
