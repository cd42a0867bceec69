"""Do Language Models Use Their Depth Efficiently? (arXiv 2505.13898)

Claims: layers of the second half write little (relative contribution above 0.15 before, below 0.05 after the
middle of Llama 3.1 70B); skipping them leaves future tokens almost untouched; the depth score does not move
with difficulty; linear maps from a shallow to a deep model are best where relative depths are equal.

From the abstract, a public fork of the official code and a note that quotes its numbers: contributions, skip
effects, depth score. Ours: texts, models and the closed-form map between two small models trained here.
"""

from __future__ import annotations

import math

import torch
from scipy.stats import spearmanr
from torch import Tensor

import layerwise as lw
from layerwise.data.text import TextData
from layerwise.measure.effects import depth_score, future, present, skip_effects
from layerwise.measure.linear_map import map_errors
from layerwise.spec import Attention, FeedForward, LayerSpec, StackSpec
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack
from layerwise.systems.base import Check, Size
from layerwise.systems.controls import shuffled_weights
from layerwise.systems.text import prose, sums
from layerwise.train.fresh import fresh
from layerwise.train.heal import next_token_loss
from layerwise.train.loop import Recipe, train


def run(size: Size, seed: int) -> list[Check]:
    """Contributions, future effects and depth scores of SmolLM2; maps between two small models."""
    stack = lw.open("smollm2")
    assert stack.tokenizer is not None
    prompts, cuts, length = (2, 2, 64) if size == "quick" else (10, 4, 128)
    text = prose(stack.tokenizer, prompts, length, seed)
    return [
        _contribution(stack, text),
        _future(stack, text, cuts, seed),
        _difficulty(stack, size, seed),
        _maps(size, seed),
    ]


def _contribution(stack: Stack, text: TextData) -> Check:
    def halves(model: Stack) -> dict[str, float]:
        values = lw.measure(model, text, ["relative-contribution"], progress=False)[
            "relative-contribution:block"
        ].values
        middle = len(values) // 2
        return {"first half": _mean(values[1:middle]), "second half": _mean(values[middle:])}

    found, null = halves(stack), halves(shuffled_weights(stack, 0))
    return Check(
        name="second-half layers write less",
        measured=found,
        control={"weights shuffled": null},
        claim="mean relative contribution of the second half is below half of the first (published: 0.05 against 0.15)",
        holds=found["second half"] < 0.5 * found["first half"],
        why="layer 0 is left out, as it writes on bare embeddings; with shuffled weights the residual stream grows "
        "all the same, so the control shows how much of the fall is only growth of the stream",
    )


def _future(stack: Stack, text: TextData, cuts: int, seed: int) -> Check:
    choices = torch.arange(8, text.length - 4, 8)
    order = torch.randperm(len(choices), generator=torch.Generator().manual_seed(seed))
    cuts_B = choices[order[:cuts]].repeat_interleave(len(text))
    tokens_BT = text.tokens_NT.repeat(cuts, 1)
    skipped_BT, seen_BT = future(tokens_BT, cuts_B)
    later = _halves(skip_effects(stack, tokens_BT, skipped_BT, seen_BT).layers_SL)
    everywhere = present(text.tokens_NT)
    now = _halves(skip_effects(stack, text.tokens_NT, everywhere, everywhere).layers_SL)
    return Check(
        name="second-half layers hardly reach future tokens",
        measured=later,
        control={"effect on present tokens": now},
        claim="skipping a second-half layer changes later layers at future tokens less than half as much as skipping "
        "a first-half layer",
        holds=later["second half"] < 0.5 * later["first half"],
        why="mean over later layers of the largest change over positions and prompts; layer 0 is left out. The effect "
        "on present tokens is the control: only a fall that is steeper for the future speaks of it",
    )


def _halves(effect_SL: Tensor) -> dict[str, float]:
    """Mean effect on later layers, over the skipped layers of each half; the last layer has none after it."""
    count = len(effect_SL)
    per_source = [float(effect_SL[s, s + 1 :].mean()) for s in range(count - 1)]
    middle = count // 2
    return {"first half": _mean(per_source[1:middle]), "second half": _mean(per_source[middle:])}


def _difficulty(stack: Stack, size: Size, seed: int) -> Check:
    digits, prompts, seeds = ((1, 6), 1, 2) if size == "quick" else (range(1, 7), 3, 5)
    assert stack.tokenizer is not None
    ranks, scores = [], []
    for draw in range(seed, seed + seeds):
        texts = [sums(stack.tokenizer, n, prompts, draw, length=48) for n in digits]
        row = [_score(stack, text) for text in texts]
        scores.append([round(value, 3) for value in row])
        ranks.append(float(spearmanr(list(digits), row).statistic))
    low, high = _interval(ranks)
    shuffled = [float(spearmanr(list(digits), list(reversed(sorted(row)))).statistic) for row in scores]
    return Check(
        name="harder sums do not move the depth score",
        claim="rank correlation of depth score and number of digits is not distinguishable from zero",
        measured={
            "correlation by seed": [round(rank, 3) for rank in ranks],
            "95% interval": [low, high],
            "depth scores": scores,
        },
        control={"scores sorted downwards": shuffled},
        holds=low <= 0 <= high if size == "full" else None,
        why="Student interval over seeds, which draw other sums; all prompts have the same number of tokens. Quick "
        "has too few seeds and levels to tell",
    )


def _score(stack: Stack, text: TextData) -> float:
    """Mean depth score over prompts, of the effect on the output at all positions but the first."""
    return _mean(
        [
            depth_score(skip_effects(stack, row_1T, present(row_1T), present(row_1T)).output_S)
            for row_1T in text.tokens_NT.split(1)
        ]
    )


def _maps(size: Size, seed: int) -> Check:
    steps, width = (40, 48) if size == "quick" else (1500, 128)
    data = _bytes(seed)
    shallow, deep = (_trained(layers, width, steps, data, seed) for layers in (4, 8))
    tokens_BT = data[-24:]
    errors_MG = map_errors(_hidden(shallow, tokens_BT), _hidden(deep, tokens_BT))
    null_MG = map_errors(_hidden(shallow, tokens_BT), _hidden(fresh(deep.spec, seed + 1), tokens_BT))
    (best, rank), (null_best, null_rank) = _matches(errors_MG), _matches(null_MG)
    return Check(
        name="linear maps match equal relative depths",
        claim="the deep model's best-matching layer rises with the shallow model's layer (rank correlation above 0.8)",
        measured={"best match of each shallow layer": best, "correlation": rank},
        control={"deep model untrained": null_best, "correlation": null_rank},
        holds=rank is not None and rank > 0.8 if size == "full" else None,
        why="models of 4 and 8 layers trained here on the same bytes; error is |A h + b - g| / |g| on held-out tokens, "
        "relative to each target layer's mean error so that layers that are easy for everything do not win",
    )


def _matches(errors_MG: Tensor) -> tuple[list[int], float | None]:
    relative_MG = errors_MG / errors_MG.mean(0)
    best = relative_MG.argmin(1).tolist()
    rank = float(spearmanr(range(len(best)), best).statistic) if len(set(best)) > 1 else math.nan
    return best, None if math.isnan(rank) else round(rank, 3)


def _trained(layers: int, width: int, steps: int, tokens_NT: Tensor, seed: int) -> DecoderStack:
    row = LayerSpec(Attention(heads=4, kv_heads=4, head_dim=width // 4), FeedForward(width=3 * width))
    stack = fresh(StackSpec("llama", width, 256, (row,) * layers, dtype="float32", context=128), seed)
    stack.decoder.requires_grad_(True)
    train(
        list(stack.decoder.parameters()),
        lambda tokens_BT: next_token_loss(stack, tokens_BT),
        tokens_NT[:-24],
        Recipe(steps=steps, batch=16, learning_rate=2e-3, warmup=20, seed=seed),
    )
    stack.decoder.requires_grad_(False)
    return stack


def _bytes(seed: int) -> Tensor:
    """The default text as bytes, in blocks of 64."""

    class Bytes:
        def encode(self, text: str) -> list[int]:
            return list(text.encode())

    return prose(Bytes(), 2000, 64, seed).tokens_NT


@torch.inference_mode()
def _hidden(stack: DecoderStack, tokens_BT: Tensor) -> list[Tensor]:
    """What leaves every layer, [N, C] each; the first token of a block is dropped."""
    state, seen = stack.start(tokens_BT), []
    for layer in range(len(stack)):
        state = stack.run(state, slice(layer, layer + 1))
        seen.append(state.hidden[:, 1:].flatten(0, 1))
    return seen


def _mean(values: object) -> float:
    numbers = [float(value) for value in values]  # type: ignore[attr-defined]
    return round(sum(numbers) / len(numbers), 4)


def _interval(values: list[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean."""
    from scipy.stats import sem, t

    centre, half = sum(values) / len(values), float(t.ppf(0.975, len(values) - 1) * sem(values))
    return round(centre - half, 3), round(centre + half, 3)
