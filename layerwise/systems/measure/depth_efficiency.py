"""Do Language Models Use Their Depth Efficiently? (arXiv 2505.13898)

Claims: layers of the second half write little (relative contribution above 0.15 before, below 0.05 after the
middle of Llama 3.1 70B); skipping them leaves future tokens almost untouched; the states of earlier tokens are
not read there (erasure, integrated gradients); the depth score does not move with difficulty; linear maps from a
shallow to a deep model are best where relative depths are equal.

From the abstract, a public fork of the official code and a note that quotes its numbers: contributions, skip effects
(present, future, direct; whole layers and halves), erasure, integrated gradients, depth score. The authors' own
repository could not be had. The fork's skip effects, run on a random Llama of six layers, are ours within 6e-7, present
and future, once its cut runs along positions: with layers that return a tensor, as in current transformers, it takes
the batch axis off first and cuts along the width, which moves effects by 14 to 42 % of the largest there. Ours: texts,
models, fewer steps of the integral, and the closed-form map: between two small models trained here, and between Gemma 3
270M and SmolLM2 135M where both tokenizers end a token at the same character (the original needs one tokenizer); depth
scores of effects on all positions but the first, theirs on those after a cut. Claims hold where the second half has
less than half of the first, fixed before looking.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import torch
from scipy.stats import spearmanr
from torch import Tensor

import layerwise as lw
from layerwise.data.aligned import aligned
from layerwise.data.text import TextData
from layerwise.measure.effects import Part, depth_score, future, halves, present, skip_effects
from layerwise.measure.erasure import erasure, mean_states
from layerwise.measure.integrated_gradients import integrated_gradients
from layerwise.measure.linear_map import leaving, map_errors, matches
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack
from layerwise.systems.base import Check, Size
from layerwise.systems.controls import shuffled_weights
from layerwise.systems.sizes import byte_blocks, sized
from layerwise.systems.text import asked_sums, prose, sums

CONTRIBUTIONS = ["relative-contribution", "contribution-cosine", "block-influence"]
PARTS: tuple[Part, ...] = ("layer", "attention", "feed_forward")


def run(size: Size, seed: int) -> list[Check]:
    """Contributions, future effects, erasure and depth scores of SmolLM2; maps between models."""
    stack = lw.open("smollm2")
    assert isinstance(stack, DecoderStack) and stack.tokenizer is not None
    prompts, cuts, length = (1, 2, 48) if size == "quick" else (10, 4, 128)
    text = prose(stack.tokenizer, prompts, length, seed)
    checks = [_contribution(stack, text), _future(stack, text, cuts, seed, PARTS if size == "full" else PARTS[:1]),
              _reading(stack, size, seed), _difficulty(stack, size, seed), _trained_maps(size, seed)]
    return checks if size == "quick" else [*checks, _real_maps(stack, seed)]


def _contribution(stack: DecoderStack, text: TextData) -> Check:
    def found(model: Stack) -> dict[str, dict[str, float]]:
        scores = lw.measure(model, text, CONTRIBUTIONS, progress=False)
        return {name: halves(column.values) for name, column in scores.columns.items()}

    real, null = found(stack), found(shuffled_weights(stack, 0))
    block = real["relative-contribution:block"]
    return Check(
        name="second-half layers write less",
        measured=real,
        control={"weights shuffled": null},
        claim="mean relative contribution of the second half is below half of the first (published: 0.05 against 0.15)",
        holds=block["second half"] < 0.5 * block["first half"],
        why="judged on what the whole block adds; its halves, cosines with the stream and block influence (1 - cosine "
        "of what enters and leaves) stand beside it. Layer 0 is left out, as it writes on bare embeddings; with "
        "shuffled weights the residual stream grows all the same, so the control shows how much of the fall is only "
        "growth of the stream",
    )


def _future(stack: DecoderStack, text: TextData, cuts: int, seed: int, parts: Sequence[Part]) -> Check:
    choices = torch.arange(8, text.length - 4, 8)
    order = torch.randperm(len(choices), generator=torch.Generator().manual_seed(seed))
    cuts_B = choices[order[:cuts]].repeat_interleave(len(text))
    tokens_BT, everywhere = text.tokens_NT.repeat(cuts, 1), present(text.tokens_NT)
    later = {part: skip_effects(stack, tokens_BT, *future(tokens_BT, cuts_B), part=part) for part in parts}
    now = skip_effects(stack, text.tokens_NT, everywhere, everywhere)
    direct = skip_effects(stack, text.tokens_NT, everywhere, everywhere, local=True)
    found = {part: halves(effects.by_source_S.tolist()) for part, effects in later.items()}
    whole = found["layer"]
    matrix = [[round(value, 2) for value in row] for row in later["layer"].layers_SL.tolist()]
    return Check(
        name="second-half layers hardly reach future tokens",
        measured={**found, "mean over positions and prompts": halves(later["layer"].mean_by_source_S.tolist()),
                  "by skipped and later layer": matrix},
        control={"effect on present tokens": halves(now.by_source_S.tolist()),
                 "direct effect on present tokens": halves(direct.by_source_S.tolist())},
        claim="skipping a second-half layer changes later layers at future tokens less than half as much as skipping "
        "a first-half layer",
        holds=whole["second half"] < 0.5 * whole["first half"],
        why="mean over later layers of the largest change over positions and prompts; layer 0 is left out. The effect "
        "on present tokens is the control: only a fall that is steeper for the future speaks of it. A direct effect "
        "takes what a layer wrote out of the input of one later layer and of nothing between",
    )


def _reading(stack: DecoderStack, size: Size, seed: int) -> Check:
    every, steps, prompts = (15, 4, 1) if size == "quick" else (3, 48, 3)
    assert stack.tokenizer is not None
    at, text = range(0, len(stack) + 1, every), prose(stack.tokenizer, 4, 48, seed)
    asked = asked_sums(stack.tokenizer, 2, prompts, seed)

    def read(model: DecoderStack) -> tuple[dict[str, dict[str, float]], float]:
        means_DC, erased, pulled, missing = mean_states(model, text.tokens_NT), [], [], 0.0
        for prompt in asked:
            erased.append(erasure(model, prompt, means_DC, at=at)[:, : prompt.first].amax(1).double())
            found = integrated_gradients(model, prompt, steps=steps, at=at)
            pulled.append(found.tokens_DT[:, : prompt.first].abs().sum(1) / found.tokens_DT.abs().sum(1))
            missing = max(missing, float((found.missing_D / found.gain_D.abs().clamp(min=1e-6)).median()))
        curves = {"erasure": erased, "integrated gradients": pulled}
        return {name: halves(torch.stack(curve).mean(0).tolist(), 0) for name, curve in curves.items()}, missing

    (real, missing), (null, _) = (read(m.copied(torch.float32)) for m in (stack, shuffled_weights(stack, 0)))
    return Check(
        name="the second half does not read earlier tokens",
        measured={**real, "error of the integral": round(missing, 3)},
        control={"weights shuffled": null},
        claim="erasing a prompt token's state, and its share of integrated gradients, matter less than half as much in "
        "the second half of the depth",
        holds=all(value["second half"] < 0.5 * value["first half"] for value in real.values()),
        why=f"sums of two digits with their answer, every {every} depths; the prompt's tokens are those before the one "
        "that predicts the answer. Erasure: its worst token, mean over prompts. The error is what the attributions "
        "lack to add up, relative, median over depths: paths from a mean state bend sharply at the first norm",
    )


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
    shuffled = [float(spearmanr(list(digits), sorted(row, reverse=True)).statistic) for row in scores]
    return Check(
        name="harder sums do not move the depth score",
        claim="rank correlation of depth score and number of digits is not distinguishable from zero",
        measured={"correlation by seed": [round(rank, 3) for rank in ranks], "95% interval": [low, high],
                  "depth scores": scores},
        control={"scores sorted downwards": shuffled},
        holds=low <= 0 <= high if size == "full" else None,
        why="Student interval over seeds, which draw other sums; all prompts have the same number of tokens. Quick "
        "has too few seeds and levels to tell",
    )


def _score(stack: Stack, text: TextData) -> float:
    """Mean depth score over prompts, of the effect on the output at all positions but the first."""
    return mean(depth_score(skip_effects(stack, row_1T, present(row_1T), present(row_1T)).output_S)
                for row_1T in text.tokens_NT.split(1))


def _trained_maps(size: Size, seed: int) -> Check:
    steps, width = (40, 32) if size == "quick" else (1500, 128)
    known_NT, held_NT = byte_blocks(seed)
    shallow, deep, null = (leaving(sized(layers, known_NT, steps=count, width=width, seed=draw), held_NT)
                           for layers, count, draw in ((8, steps, seed), (12, steps, seed), (12, 0, seed + 1)))
    return _maps("linear maps match equal relative depths", map_errors(shallow, deep), map_errors(shallow, null),
                 "models of 8 and 12 layers trained here on the same bytes; the control's deep one is untrained",
                 size == "full")


def _real_maps(deep: DecoderStack, seed: int) -> Check:
    shallow = lw.open("gemma3-270m")
    assert deep.tokenizer is not None and shallow.tokenizer is not None
    a, b = [], []
    for row_T in prose(deep.tokenizer, 48, 128, seed).tokens_NT.tolist():
        pair = aligned(deep.tokenizer.decode(row_T), shallow.tokenizer, deep.tokenizer)
        a.append(leaving(shallow, pair.a_1T, pair.a_ends_1T))
        b.append(leaving(deep, pair.b_1S, pair.b_ends_1S))
    small, large = ([torch.cat(parts) for parts in zip(*found, strict=True)] for found in (a, b))
    order = torch.randperm(len(large[0]), generator=torch.Generator().manual_seed(seed))
    return _maps("linear maps from Gemma 3 270M to SmolLM2 135M", map_errors(small, large),
                 map_errors(small, [states_NC[order] for states_NC in large]),
                 f"18 and 30 layers, {len(order)} places where both tokenizers end a token at the same character; the "
                 "control pairs places at random", True)


def _maps(name: str, errors_MG: Tensor, null_MG: Tensor, why: str, enough: bool) -> Check:
    best, null = matches(errors_MG), matches(null_MG)
    (rank, off), (null_rank, null_off) = (_diagonal(found, errors_MG.shape[1]) for found in (best, null))
    return Check(
        name=name,
        claim="the deep model's best-matching layer rises with the shallow model's layer (rank correlation above 0.8), "
        "nearer to equal relative depths than in the control",
        measured={"best match of each shallow layer": best, "correlation": rank, "distance from equal depths": off},
        control={"best match": null, "correlation": null_rank, "distance": null_off},
        holds=rank is not None and rank > 0.8 and off < null_off if enough else None,
        why=f"{why}. Error is |A h + b - g| / |g| on held-out tokens, relative to each target layer's mean error so "
        "that layers that are easy for everything do not win; distance is of relative depths, mean",
    )


def _diagonal(best: Sequence[int], deep: int) -> tuple[float | None, float]:
    """Rank correlation of layer and best match (None where all match one), and mean distance of relative depths."""
    away = mean(abs(m / (len(best) - 1) - layer / (deep - 1)) for m, layer in enumerate(best))
    if len(set(best)) < 2:
        return None, round(away, 3)
    return round(float(spearmanr(range(len(best)), best).statistic), 3), round(away, 3)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean."""
    from scipy.stats import sem, t

    centre, half = mean(values), float(t.ppf(0.975, len(values) - 1) * sem(values))
    return round(centre - half, 3), round(centre + half, 3)
