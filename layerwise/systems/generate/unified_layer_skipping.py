"""Accelerating Inference in LLMs with a Unified Layer Skipping Strategy (arXiv 2404.06954)

Claims: how many layers a decoded token runs follows from the target speed-up alone; spread evenly, with the prompt
through all layers, they keep more quality than the first layers or other choices, each fine-tuned alike; and the real
speed-up is near the target and the same for every input.

From the official code: the kept sets, prefill through all layers, the loss on the response alone, all layers trained
and embeddings frozen. Ours: continuing English passages instead of translation, tens of steps instead of two epochs and
a higher rate, and Amdahl's law for what head and embedding, which cannot be skipped, leave of the target. Tokens are
decoded by the engine, whose table says which layers they skip.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import layerwise as lw
from layerwise.data import Losses, TextData, block_losses, text_blocks
from layerwise.generate import skip
from layerwise.generate.sample import next_logits
from layerwise.serve.request import Request
from layerwise.serve.table import layer_table
from layerwise.stack.decoder import Caches, DecoderStack
from layerwise.stack.prepared import prepared
from layerwise.systems.base import Check, Size
from layerwise.systems.served import same
from layerwise.train.heal import Partial, heal
from layerwise.train.loop import Recipe

RULES: dict[str, Callable[[int, float], tuple[int, ...]]] = {
    "unified": skip.unified, "first": skip.first, "last": skip.last, "without middle": skip.without_middle,
    "random": skip.at_random}
CLAIMED = ("unified", "first", "last")
"""The rules of the claim, which are healed at every speed-up; the others only at the first."""


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
    "full": Scale((2, 3), (1.5, 2, 3, 5), verification=16, steps=20, tokens=64, repeats=9),
}
PROMPT, LENGTH = 48, 96
"""Tokens of a passage that are given, and tokens of the whole."""
RATE = 1e-3
"""Learning rate of healing, the best of a few on calibration text."""


def run(size: Size, seed: int) -> list[Check]:
    """Loss on responses when their tokens run the layers of each rule; the engine's tokens, and how many a second."""
    scale, stack = SCALES[size], lw.open("smollm2")
    assert isinstance(stack, DecoderStack) and stack.tokenizer is not None
    text = text_blocks("default", stack.tokenizer, length=LENGTH, blocks=scale.verification, split="verification")
    training = text_blocks("default", stack.tokenizer, length=LENGTH, blocks=max(2, 2 * scale.steps), seed=seed)
    recipe = Recipe(scale.steps, 2, RATE, warmup=scale.steps // 10, seed=seed)
    checks = [_quality(stack, speedup, text, training, recipe, RULES if speedup == scale.speedups[0] else CLAIMED)
              for speedup in scale.speedups]
    return [*checks, _served(stack, text, scale), _speed(stack, text, scale, size)]


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


def _quality(stack: DecoderStack, speedup: int, text: TextData, training: TextData, recipe: Recipe,
             healed: Collection[str]) -> Check:
    kept = {name: rule(len(stack), speedup) for name, rule in RULES.items()}
    found = {name: [_held(stack, layers, text)] for name, layers in kept.items()}
    for name in healed if recipe.steps else ():
        found[name].append(_held(_healed(stack, kept[name], training, recipe), kept[name], text))
    ratios = {name: found["unified"][-1].change(found[name][-1]) for name in CLAIMED[1:]}
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


def _served(stack: DecoderStack, text: TextData, scale: Scale) -> Check:
    exact, speedup = stack.copied(torch.float32), scale.speedups[0]
    layers = skip.unified(len(stack), speedup)
    prompts = [row[:PROMPT] for row in text.tokens_NT[:2].tolist()]
    params = lw.Params(max_tokens=scale.tokens, temperature=0.0, stop_ids=())
    kept = {"even layers": layers, "all layers": tuple(range(len(stack)))}
    served = {name: [list(one.tokens) for one in _engine(exact, own).generate(prompts, params)]
              for name, own in kept.items()}
    plain = [_plain(exact, prompt, layers, scale.tokens) for prompt in prompts]
    return Check(
        name="served with layers left out",
        claim="prompts read by all layers and tokens decoded by some share one cache, and come as in plain passes",
        measured={"tokens as in plain passes": same(served["even layers"], plain)},
        control={"tokens as with all layers": same(served["even layers"], served["all layers"])},
        holds=served["even layers"] == plain,
        why=f"{len(prompts)} prompts of {PROMPT} tokens in one batch of the engine, {scale.tokens} greedy tokens each "
            f"through {len(layers)} layers, in float32, beside one sequence at a time without an engine")


def _engine(stack: DecoderStack, layers: Collection[int]) -> lw.Engine:
    table = layer_table(stack.spec, skip=[layer for layer in range(len(stack)) if layer not in layers])
    return lw.Engine(stack, table=table, cache_tokens=1024, prepare=False)


@torch.inference_mode()
def _plain(stack: DecoderStack, prompt: list[int], layers: tuple[int, ...], count: int) -> list[int]:
    caches: Caches = {}
    logits_BV = next_logits(stack, torch.tensor([prompt]), caches)
    tokens = [int(logits_BV.argmax())]
    while len(tokens) < count:
        tokens.append(int(next_logits(stack, torch.tensor([tokens[-1:]]), caches, layers).argmax()))
    return tokens


def _seconds(engine: lw.Engine, prompt: tuple[int, ...], tokens: int) -> float:
    """Seconds a decoded token of one stream, the prompt left out."""
    engine.add(Request(prompt, lw.Params(max_tokens=tokens, stop_ids=())))
    engine.step()
    began = time.perf_counter()
    while engine.busy:
        engine.step()
    return (time.perf_counter() - began) / (tokens - 1)


def _speed(stack: DecoderStack, text: TextData, scale: Scale, size: Size) -> Check:
    fast, depth = prepared(stack), len(stack)
    asked = {f"{speedup:g}x": skip.unified(depth, speedup) for speedup in scale.timed}
    kept = {"all": tuple(range(depth)), "one": (0,), **asked}
    engines = {name: _engine(fast, layers) for name, layers in kept.items()}
    prompt = tuple(text.tokens_NT[0, :PROMPT].tolist())
    seconds: dict[str, list[float]] = {name: [] for name in kept}
    for engine in engines.values():
        _seconds(engine, prompt, min(8, scale.tokens))
    for _ in range(scale.repeats):
        for name, engine in engines.items():
            seconds[name].append(_seconds(engine, prompt, scale.tokens))
    token = {name: statistics.median(times) for name, times in seconds.items()}
    spread = {name: round(statistics.stdev(times) / statistics.mean(times), 3) for name, times in seconds.items()}
    gain = {name: token["all"] / token[name] for name in asked}
    inside = (token["all"] - token["one"]) / (depth - 1)
    outside = token["all"] - depth * inside
    amdahl = {name: token["all"] / (outside + inside * len(kept[name])) for name in asked}
    return Check(
        name="decoding speeds up as the share of layers that run",
        claim="one stream decodes within 15 % of what Amdahl's law leaves of the target, whatever the input",
        measured={name: {"speed-up": round(speedup, 2), "tokens/s": round(1 / token[name], 1), "spread": spread[name]}
                  for name, speedup in gain.items()},
        control={"predicted speed-up": {name: round(amdahl[name], 2) for name in asked},
                 "all layers": {"tokens/s": round(1 / token["all"], 1), "spread": spread["all"]},
                 "share of time outside layers": round(outside / token["all"], 3)},
        holds=all(abs(gain[name] / amdahl[name] - 1) <= 0.15 for name in asked) if size == "full" else None,
        why="served by the engine in turns; the prediction takes the time of all layers and of one, and so of none "
            "(embedding, norm, head and the engine's own work). Which layers run does not depend on the input, so "
            "spread (deviation over repeats by their mean) is the machine's, as with all layers. Quick times too few "
            "tokens to tell on a machine with other work")
