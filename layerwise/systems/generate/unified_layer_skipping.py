"""Accelerating Inference in LLMs with a Unified Layer Skipping Strategy (arXiv 2404.06954)

Claims: how many layers a decoded token runs follows from the target speed-up alone; spread evenly, with the prompt
through all layers, they keep more quality than the first layers or other choices, each fine-tuned alike; and the real
speed-up is near the target and the same for every input.

From the official code: the kept sets, prefill through all layers, the loss on the response alone, all layers trained
and embeddings frozen. Ours: continuing English passages instead of translation, tens of steps instead of two epochs and
a higher rate, and Amdahl's law for what head and embedding, which cannot be skipped, leave of the target.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import layerwise as lw
from layerwise.data import Losses, TextData, block_losses, text_blocks
from layerwise.generate import skip
from layerwise.generate.speed import decode_speed
from layerwise.stack.decoder import DecoderStack
from layerwise.systems.base import Check, Size
from layerwise.train.heal import Partial, heal
from layerwise.train.loop import Recipe

RULES: dict[str, Callable[[int, float], tuple[int, ...]]] = {
    "unified": skip.unified, "first": skip.first, "last": skip.last, "without middle": skip.without_middle,
    "random": skip.at_random}


@dataclass(frozen=True)
class Scale:
    """Target speed-ups for quality and for time, blocks to verify on, steps of healing, tokens and repeats to time."""

    speedups: tuple[int, ...]
    timed: tuple[float, ...]
    verification: int
    steps: int
    tokens: int
    repeats: int


SCALES: dict[Size, Scale] = {
    "quick": Scale((2,), (2, 3), verification=4, steps=0, tokens=16, repeats=3),
    "full": Scale((2, 3), (1.5, 2, 3, 5), verification=16, steps=40, tokens=64, repeats=9),
}
PROMPT, LENGTH = 48, 96
"""Tokens of a passage that are given, and tokens of the whole."""
RATE = 1e-3
"""Learning rate of healing, the best of a few on calibration text."""


def run(size: Size, seed: int) -> list[Check]:
    """Loss on responses when their tokens run the layers of each rule, and tokens per second of decoding."""
    scale, stack = SCALES[size], lw.open("smollm2")
    assert isinstance(stack, DecoderStack) and stack.tokenizer is not None
    text = text_blocks("default", stack.tokenizer, length=LENGTH, blocks=scale.verification, split="verification")
    training = text_blocks("default", stack.tokenizer, length=LENGTH, blocks=max(2, 2 * scale.steps), seed=seed)
    recipe = Recipe(scale.steps, 2, RATE, warmup=scale.steps // 10, seed=seed)
    checks = [_quality(stack, speedup, text, training, recipe) for speedup in scale.speedups]
    return [*checks, _speed(stack, scale, size)]


def response_losses(stack: DecoderStack, tokens_BT: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Loss of every response token, [B, T - PROMPT], when prompts run all layers and responses only `layers`."""
    response_BT = (torch.arange(tokens_BT.shape[1]) >= PROMPT).expand_as(tokens_BT)
    logits_BTV = skip.split_pass(stack, tokens_BT, response_BT, layers)[:, PROMPT - 1 : -1].float()
    return F.cross_entropy(logits_BTV.transpose(1, 2), tokens_BT[:, PROMPT:], reduction="none")


def _held(stack: DecoderStack, layers: tuple[int, ...], text: TextData) -> Losses:
    return block_losses(lambda tokens_BT: response_losses(stack, tokens_BT, layers), text, len(text))


def _healed(stack: DecoderStack, layers: tuple[int, ...], training: TextData, recipe: Recipe) -> DecoderStack:
    return heal(stack, training.tokens_NT, Partial(len(stack), head=False), recipe,
                loss=lambda model, tokens_BT: response_losses(model, tokens_BT, layers).mean())[0]


def _quality(stack: DecoderStack, speedup: int, text: TextData, training: TextData, recipe: Recipe) -> Check:
    kept = {name: rule(len(stack), speedup) for name, rule in RULES.items()}
    found = {name: [_held(stack, layers, text)] for name, layers in kept.items()}
    if recipe.steps:
        for name, layers in kept.items():
            found[name].append(_held(_healed(stack, layers, training, recipe), layers, text))
    ratios = {name: found["unified"][-1].change(found[name][-1]) for name in ("first", "last")}
    better = None if any(1 in ratio for ratio in ratios.values()) else all(ratio.low > 1 for ratio in ratios.values())
    plain = {name: dict(zip(("before healing", "after"), (round(loss.perplexity, 2) for loss in losses), strict=False))
             for name, losses in found.items()}
    return Check(
        name=f"quality at {speedup} times the speed",
        claim=f"healed alike, {len(kept['unified'])} even layers predict better than as many first or last ones",
        measured=plain.pop("unified") | {"layers": list(kept["unified"])},
        control=plain | {"all layers": round(_held(stack, tuple(range(len(stack))), text).perplexity, 2)},
        holds=better if recipe.steps else None,
        why=f"perplexity of {LENGTH - PROMPT} response tokens after {PROMPT} of prompt; {recipe.steps} steps of "
            "healing with two passages each. Divided by that of even layers: "
            + ", ".join(f"{name} {ratio}" for name, ratio in ratios.items()))


def _speed(stack: DecoderStack, scale: Scale, size: Size) -> Check:
    asked = {f"{speedup:g}x": skip.unified(len(stack), speedup) for speedup in scale.timed}
    kept = {"all": tuple(range(len(stack))), "none": (), **asked}
    seconds: dict[str, list[float]] = {name: [] for name in kept}
    for _ in range(scale.repeats):
        for name, layers in kept.items():
            speed = decode_speed(stack, new_tokens=scale.tokens, repeats=1, layers=layers)
            seconds[name].append(1 / speed)
    token = {name: statistics.median(times) for name, times in seconds.items()}
    spread = {name: round(statistics.stdev(times) / statistics.mean(times), 3) for name, times in seconds.items()}
    gain = {name: token["all"] / token[name] for name in asked}
    outside, inside = token["none"], token["all"] - token["none"]
    amdahl = {name: token["all"] / (outside + inside * len(kept[name]) / len(stack)) for name in asked}
    return Check(
        name="decoding speeds up as the share of layers that run",
        claim="one stream decodes within 15 % of what Amdahl's law leaves of the target, whatever the input",
        measured={name: {"speed-up": round(speedup, 2), "tokens/s": round(1 / token[name], 1), "spread": spread[name]}
                  for name, speedup in gain.items()},
        control={"predicted speed-up": {name: round(amdahl[name], 2) for name in asked},
                 "all layers": {"tokens/s": round(1 / token["all"], 1), "spread": spread["all"]},
                 "share of time outside layers": round(outside / token["all"], 3)},
        holds=all(abs(gain[name] / amdahl[name] - 1) <= 0.15 for name in asked) if size == "full" else None,
        why="the prediction takes the time of all layers and of none (embedding, norm and head). Which layers run does "
            "not depend on the input, so spread (deviation over repeats by their mean) is the machine's, as with all "
            "layers. Quick times too few tokens to tell on a machine with other work")
