"""What Affects the Effective Depth of Large Language Models? (arXiv 2512.14064)

Claims: the share of layers that a model uses effectively is high and similar over sizes (stored ratios: 0.75
to 0.95 by lens KL, 0.86 to 0.97 by lens overlap), and harder tasks do not recruit more layers.

From the abstract, the official code and its stored table: the three criteria, their thresholds and the ratio.
Ours: the texts (prose, and additions of one to six digits), two small base models instead of Qwen 2.5, and
tolerances of two layers for "does not move". Criteria without a crossing report none instead of failing.
"""

from __future__ import annotations

from collections.abc import Sequence

import layerwise as lw
from layerwise.data.text import TextData
from layerwise.measure.scores import Scores
from layerwise.stack.base import Stack
from layerwise.systems.base import Check, Size
from layerwise.systems.controls import shuffled_weights
from layerwise.systems.text import prose, sums

INSTRUMENTS = ["contribution-cosine", "logit-lens-kl", "logit-lens-overlap"]
PARTS = ("attention", "feed-forward", "block")
Depths = dict[str, int | None]


def cosine_depth(curves: Sequence[Sequence[float]]) -> int | None:
    """The last layer at which the mean of the cosine curves turns from below zero to above."""
    mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
    turns = [layer for layer in range(len(mean) - 1) if mean[layer] < 0 <= mean[layer + 1]]
    return turns[-1] if turns else None


def kl_depth(kl: Sequence[float], share: float = 0.5, rank: int = 0) -> int | None:
    """The first layer whose lens divergence is below `share` of the largest (after leaving out `rank` larger)."""
    largest = sorted(kl, reverse=True)[rank]
    return next((layer for layer, value in enumerate(kl) if value < share * largest), None)


def overlap_depth(overlap: Sequence[float], least: float = 0.3) -> int | None:
    """The first layer whose lens shares more than `least` of the final top five."""
    return next((layer for layer, value in enumerate(overlap) if value > least), None)


def depths(scores: Scores) -> Depths:
    """Effective depth by each criterion."""
    return {
        "cosine": cosine_depth([scores[f"contribution-cosine:{part}"].values for part in PARTS]),
        "kl": kl_depth(scores["logit-lens-kl"].values),
        "kl, without its two highest layers": kl_depth(scores["logit-lens-kl"].values, rank=2),
        "overlap": overlap_depth(scores["logit-lens-overlap"].values),
    }


def ratios(found: Depths, layers: int) -> dict[str, float | None]:
    """(depth + 1) / layers, as published."""
    return {name: None if depth is None else round((depth + 1) / layers, 3) for name, depth in found.items()}


def measured(stack: Stack, data: TextData, seed: int) -> Depths:
    return depths(lw.measure(stack, data, INSTRUMENTS, seed=seed, lens_tokens=64, progress=False))


def run(size: Size, seed: int) -> list[Check]:
    """Effective depth of SmolLM2 (and Gemma 3 270M at full size) on prose and on sums of graded difficulty."""
    names = ["smollm2"] if size == "quick" else ["smollm2", "gemma3-270m"]
    digits, prompts = ((1, 6), 2) if size == "quick" else ((1, 2, 3, 4, 5, 6), 10)
    checks: list[Check] = []
    for name in names:
        stack = lw.open(name)
        assert stack.tokenizer is not None
        texts = [
            prose(stack.tokenizer, prompts, 128, seed),
            *(sums(stack.tokenizer, n, prompts, seed) for n in digits),
        ]
        found = {text.name: measured(stack, text, seed) for text in texts}
        null = measured(shuffled_weights(stack, seed), texts[0], seed)
        checks += [_ratio_check(name, found, null, len(stack)), _difficulty_check(name, found)]
    return checks


def _ratio_check(name: str, found: dict[str, Depths], null: Depths, layers: int) -> Check:
    by_text = {text: ratios(depth, layers) for text, depth in found.items()}
    lens = [ratio[criterion] for ratio in by_text.values() for criterion in ("kl", "overlap")]
    return Check(
        name=f"{name}: most layers are effective",
        claim="lens criteria put the effective depth at 0.6 of the layers or deeper (published: 0.75 to 0.97)",
        measured=by_text,
        control={"weights shuffled within each matrix": ratios(null, layers)},
        holds=all(ratio is not None and ratio >= 0.6 for ratio in lens),
        why="every lens ratio on every text must reach 0.6; the control has the same weights without structure, "
        "so a criterion that gives it the same ratio measures the architecture and not the model. Embeddings are "
        "tied here, so the lens at layer 0 reads back the input token: where text repeats (digits), that alone "
        "overlaps with the final top five, and one early spike sets the largest divergence",
    )


def _difficulty_check(name: str, found: dict[str, Depths]) -> Check:
    levels = {text: depth for text, depth in found.items() if text.startswith("sums")}
    spread = {
        criterion: _spread([depth[criterion] for depth in levels.values()])
        for criterion in ("cosine", "kl", "overlap")
    }
    prose_name = next(iter(found))
    change = {
        criterion: _spread([*(depth[criterion] for depth in levels.values()), found[prose_name][criterion]])
        for criterion in spread
    }
    return Check(
        name=f"{name}: harder sums do not use more layers",
        claim="effective depth stays within two layers of its middle from one-digit to six-digit sums",
        measured={"spread in layers": spread, "depths": levels},
        control={"spread with prose added": change},
        holds=all(width is not None and width <= 4 for width in spread.values()),
        why="the spread is the deepest minus the shallowest level, at most 4 (plus or minus two); none means that "
        "a criterion has no crossing at some level. The control shows how far a change of text kind moves it",
    )


def _spread(values: Sequence[int | None]) -> int | None:
    numbers = [value for value in values if value is not None]
    return max(numbers) - min(numbers) if len(numbers) == len(values) else None
