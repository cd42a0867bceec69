"""Short greedy answers to many prompts at once, with the hidden states that made them.

Prompts of equal length run together, and what all of them begin with runs once.

Shapes: N prompts, B of one batch, T prompt tokens, A answer tokens, L layers, C hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.data.batch import common_prefix, slices
from layerwise.errors import BadData
from layerwise.generate.sample import next_logits
from layerwise.stack.decoder import Caches, DecoderStack


@dataclass(frozen=True)
class Answers:
    """What was said and the states behind it, in the order of the prompts.

    `ids` are the answers, without the token that ended them. `prompt_NLC` is the output of every layer at the
    last token of the prompt, `answer_NLC` the mean of it over the tokens of the answer (the prompt's where
    the answer is empty), both float32. `confidence_N` is the mean log-probability, nats, of what was chosen,
    the ending token included.
    """

    ids: tuple[tuple[int, ...], ...]
    prompt_NLC: Tensor
    answer_NLC: Tensor
    confidence_N: Tensor


@torch.inference_mode()
def answers(
    stack: DecoderStack, prompts: Sequence[Sequence[int]], tokens: int, stop: int, batch: int = 32
) -> Answers:
    """Continue every prompt greedily by at most `tokens` tokens, until `stop`. Raises BadData without prompts."""
    if not prompts or not all(prompts):
        raise BadData("no prompts" if not prompts else "an empty prompt", expected="at least one token each",
                      do="write something to continue")
    shared = min(common_prefix(prompts), min(map(len, prompts)) - 1)
    caches: Caches = {}
    if shared:
        next_logits(stack, torch.tensor([list(prompts[0][:shared])]), caches)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    found: dict[int, tuple[tuple[int, ...], Tensor, Tensor, float]] = {}
    for length in sorted({len(prompt) for prompt in prompts}):
        alike = [place for place in order if len(prompts[place]) == length]
        for part in slices(len(alike), batch):
            places = alike[part]
            tokens_BT = torch.tensor([list(prompts[place][shared:]) for place in places])
            copies = {layer: cache.copied(len(places)) for layer, cache in caches.items()}
            rows = _batch(stack, tokens_BT, copies, tokens, stop)
            found |= dict(zip(places, rows, strict=True))
    said, at_prompt, at_answer, confidence = zip(*(found[place] for place in range(len(prompts))), strict=True)
    return Answers(said, torch.stack(at_prompt), torch.stack(at_answer), torch.tensor(confidence))


def _batch(
    stack: DecoderStack, tokens_BT: Tensor, caches: Caches, tokens: int, stop: int
) -> list[tuple[tuple[int, ...], Tensor, Tensor, float]]:
    """One row each: the answer, its states [L, C] at prompt and answer, its confidence."""
    logits_BV, prompt_BLC = _step(stack, tokens_BT, caches)
    total_BLC = torch.zeros_like(prompt_BLC)
    said: list[list[int]] = [[] for _ in tokens_BT]
    chances: list[list[float]] = [[] for _ in tokens_BT]
    open_B = torch.ones(len(tokens_BT), dtype=torch.bool)
    for _ in range(tokens):
        best = logits_BV.float().log_softmax(-1).max(-1)
        for row in open_B.nonzero()[:, 0].tolist():
            chances[row].append(float(best.values[row]))
        open_B &= best.indices.cpu() != stop
        if not bool(open_B.any()):
            break
        for row in open_B.nonzero()[:, 0].tolist():
            said[row].append(int(best.indices[row]))
        logits_BV, state_BLC = _step(stack, best.indices[:, None], caches)
        total_BLC += state_BLC * open_B[:, None, None]
    counts = [len(ids) for ids in said]
    return [(tuple(said[row]), prompt_BLC[row], total_BLC[row] / count if count else prompt_BLC[row],
             sum(chances[row]) / len(chances[row])) for row, count in enumerate(counts)]


def _step(stack: DecoderStack, tokens_BT: Tensor, caches: Caches) -> tuple[Tensor, Tensor]:
    """Logits after the tokens [B, V], and every layer's output at the last of them, float32 [B, L, C]."""
    with stack.capture("output") as seen:
        logits_BV = next_logits(stack, tokens_BT, caches)
    states = [seen[layer, "output"][:, -1].float().cpu() for layer in range(len(stack))]
    return logits_BV, torch.stack(states, 1)
