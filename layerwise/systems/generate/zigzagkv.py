"""ZigZagKV: Dynamic KV Cache Compression for Long-context Modeling based on Layer Uncertainty (arXiv 2412.09036)

Claims: how many tokens a layer must keep, for its attention as for its output, varies irregularly over layers; caches
divided in proportion to that need keep quality at about a fifth of the whole, and more of it than equal ones.

From two re-implementations that cite equation 6: the need as the number of keys with 90 % of what the last 32 queries
attend to, mean over heads, measured on the prompt itself; a floor of a tenth of the mean; selection as in SnapKV, once,
after the prompt. Ours: a small model and prompts of 640 tokens, one choice of tokens for all heads of a layer (blocks
of the engine hold all of them), the cosine of the output's twin, needles in plain prose, and controls: equal budgets,
the same budgets in reversed and in random order, a pyramid.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

import layerwise as lw
from layerwise.allocate.shares import floor_plus_proportional
from layerwise.data import Losses, paired_interval, text_blocks
from layerwise.serve.budgets import RECENT
from layerwise.serve.forced import scores
from layerwise.serve.request import TokenLogprob
from layerwise.serve.table import layer_table
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.prepared import prepared
from layerwise.systems.base import Check, Size

FLOOR, CLAIMED, NEAR = 0.1, 0.2, 1.05
"""The floor as a share of the mean budget, the share of the cache in the claim, and what counts as nearly lossless."""
FULL, ZIGZAG, EQUAL = "whole cache", "by need", "equal"
NEED, NEED_LATER, NEED_OUTPUT = (f"attention-budget{part}" for part in ("", ":no sinks", ":output"))


@dataclass(frozen=True)
class Scale:
    """Tokens of a prompt, tokens scored after it, texts, needles, shares of the cache, rules at the claimed share."""

    prompt: int
    scored: int
    texts: int
    needles: int
    shares: tuple[float, ...]
    rules: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """A prompt and what follows it; `needs` are the layers' on this prompt, by column."""

    prompt: list[int]
    answer: list[int]
    needs: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Told:
    """Of every case, the losses after the first token, and whether every token was the likeliest."""

    losses: Losses
    right: list[bool]


Rule = Callable[[Case, int, int], list[int]]
"""From a case, the mean budget and a seed to the budget of every layer."""


def by_need(case: Case, mean: int, seed: int) -> list[int]:
    needs = case.needs[NEED]
    floor = min(mean, max(RECENT + 1, int(FLOOR * mean)))
    return floor_plus_proportional(needs, mean * len(needs), floor, len(case.prompt))


def equal(case: Case, mean: int, seed: int) -> list[int]:
    return [mean] * len(case.needs[NEED])


def reversed_order(case: Case, mean: int, seed: int) -> list[int]:
    """The same budgets, the largest where the least is needed."""
    budgets = by_need(case, mean, seed)
    order = sorted(range(len(budgets)), key=lambda layer: (budgets[layer], layer))
    found = [0] * len(budgets)
    for low, high in zip(order, reversed(order), strict=True):
        found[low] = budgets[high]
    return found


def random_order(case: Case, mean: int, seed: int) -> list[int]:
    """The same budgets, shuffled."""
    budgets = by_need(case, mean, seed)
    return random.Random(seed).sample(budgets, len(budgets))


def pyramid(case: Case, mean: int, seed: int) -> list[int]:
    """Less and less from the first layer to the last."""
    depth, floor = len(case.needs[NEED]), min(mean, RECENT + 1)
    return floor_plus_proportional([depth - layer for layer in range(depth)], mean * depth, floor, len(case.prompt))


RULES: dict[str, Rule] = {ZIGZAG: by_need, EQUAL: equal, "by need, reversed": reversed_order,
                          "by need, shuffled": random_order, "pyramid": pyramid}
OTHERS = tuple(name for name in RULES if name != ZIGZAG)
SCALES: dict[Size, Scale] = {"quick": Scale(240, 8, 2, 2, (CLAIMED,), (ZIGZAG, EQUAL)),
                             "full": Scale(640, 48, 10, 10, (0.1, CLAIMED), tuple(RULES))}


def run(size: Size, seed: int) -> list[Check]:
    """Scores of what follows, told from caches divided by every rule; needs of all layers by attention and output."""
    scale, opened = SCALES[size], lw.open("smollm2")
    assert isinstance(opened, DecoderStack) and opened.tokenizer is not None
    stack = opened.copied(torch.float32)
    texts, needles = (
        [_case(stack, prompt, answer) for prompt, answer in pairs]
        for pairs in (_texts(stack, scale), _needles(stack, scale, seed)))
    fast = prepared(stack)
    rules = {share: (FULL, *scale.rules) if share == CLAIMED else (ZIGZAG, EQUAL) for share in scale.shares}
    found = {kind: {share: told(fast, cases, share, names, seed) for share, names in rules.items()}
             for kind, cases in (("texts", texts), ("needles", needles))}
    better = [_better(kind, by_share, scale, size) for kind, by_share in found.items()]
    return [_premise(texts + needles, size), *better, _near(found["texts"], scale, size)]


def _texts(stack: DecoderStack, scale: Scale) -> list[tuple[list[int], list[int]]]:
    assert stack.tokenizer is not None
    data = text_blocks("default", stack.tokenizer, length=scale.prompt + scale.scored, blocks=scale.texts,
                       split="verification")
    return [(row[: scale.prompt], row[scale.prompt :]) for row in data.tokens_NT.tolist()]


def _needles(stack: DecoderStack, scale: Scale, seed: int) -> list[tuple[list[int], list[int]]]:
    """Prose with a sentence that tells a number, at even depths, and the beginning of that sentence at the end."""
    assert stack.tokenizer is not None
    encode, draw = stack.tokenizer.encode, random.Random(seed)
    hay = text_blocks("default", stack.tokenizer, length=scale.prompt, blocks=scale.needles, seed=seed)
    found = []
    for index, row in enumerate(hay.tokens_NT.tolist()):
        stem, number = " The secret number of the old house is", f" {draw.randint(10000, 99999)}"
        needle, asked = encode(f"{stem}{number}."), encode(stem)
        prose = row[: scale.prompt - len(needle) - len(asked)]
        place = int(len(prose) * (index + 0.5) / scale.needles)
        answer = encode(stem + number)[len(asked) :]
        found.append((prose[:place] + needle + prose[place:] + asked, answer))
    return found


def _case(stack: DecoderStack, prompt: list[int], answer: list[int]) -> Case:
    columns = lw.measure(stack, torch.tensor([prompt]), ["attention-budget"], progress=False).columns
    return Case(prompt, answer, {name: columns[name].values for name in (NEED, NEED_LATER, NEED_OUTPUT)})


def told(stack: DecoderStack, cases: Sequence[Case], share: float, rules: Sequence[str], seed: int) -> dict[str, Told]:
    """What the engine predicts of every case's answer with the cache divided by each rule."""
    found = {}
    for name in rules:
        entries: list[tuple[TokenLogprob, ...]] = []
        for index, case in enumerate(cases):
            mean = int(share * len(case.prompt))
            budgets = {} if name == FULL else dict(enumerate(RULES[name](case, mean, 1000 * seed + index)))
            table = layer_table(stack.spec, budgets=budgets, scorer="attention")
            engine = lw.Engine(stack, table=table, prepare=False, step_tokens=len(case.prompt), prefix_cache=False,
                               cache_tokens=len(case.prompt) + 128, block=64)  # a block of slack: one eviction
            entries += scores(engine, [case.prompt], [case.answer])
        losses = Losses(np.array([-sum(token.logprob for token in one[1:]) for one in entries]),
                        np.array([float(len(one) - 1) for one in entries]))
        found[name] = Told(losses, [all(token.top[0][0] == token.token for token in one) for one in entries])
    return found


def _premise(cases: Sequence[Case], size: Size) -> Check:
    means = {name: np.mean([case.needs[name] for case in cases], axis=0) for name in (NEED, NEED_LATER, NEED_OUTPUT)}
    agreement = float(spearmanr(means[NEED], means[NEED_OUTPUT]).statistic)
    steps = np.sign(np.diff(means[NEED]))
    turns = int((steps[1:] * steps[:-1] < 0).sum())
    halves = [np.mean([case.needs[NEED] for case in cases[part::2]], axis=0) for part in range(2)]
    return Check(
        name="needs vary irregularly over layers",
        claim="what a layer must keep goes up and down over layers, and attention and output rank their needs alike",
        measured={"tokens for 90 % of attention": [round(float(need)) for need in means[NEED]],
                  "the same without the first 4": [round(float(need)) for need in means[NEED_LATER]],
                  "tokens for an output within a cosine of 0.9": [round(float(need)) for need in means[NEED_OUTPUT]],
                  "largest divided by smallest": round(float(means[NEED].max() / means[NEED].min()), 1),
                  "turns between rising and falling": turns,
                  "rank correlation of attention and output": round(agreement, 2)},
        control={"rank correlation of two halves of the prompts": round(float(spearmanr(*halves).statistic), 2),
                 "rank correlation with and without the first 4": round(
                     float(spearmanr(means[NEED], means[NEED_LATER]).statistic), 2),
                 "turns of an order by chance": round(2 / 3 * (len(steps) - 1), 1)},
        holds=bool(means[NEED].max() >= 2 * means[NEED].min() and turns >= len(steps) / 3 and agreement >= 0.5)
        if size == "full" else None,
        why="holds where needs differ twofold, turn at a third of the layers or more, and correlate at 0.5 or more; "
            f"mean over {len(cases)} prompts and all heads, of the last {RECENT} queries")


def _better(kind: str, by_share: Mapping[float, Mapping[str, Told]], scale: Scale, size: Size) -> Check:
    measured: dict[str, Any] = {}
    control: dict[str, Any] = {}
    for share, by_rule in by_share.items():
        for name, one in by_rule.items():
            row = {"perplexity": round(one.losses.perplexity, 2)}
            if kind == "needles":
                row["found"] = sum(one.right)
            (measured if name == ZIGZAG else control)[f"{name}, {share:.0%}"] = row
    at = by_share[CLAIMED]
    nats = {name: paired_interval(_per_token(at[ZIGZAG]), _per_token(at[name])) for name in at if name in OTHERS}
    return Check(
        name=f"caches by need keep more: {kind}",
        claim=f"at {CLAIMED:.0%} of the cache, budgets by need predict better than equal ones",
        measured=measured | {"nats a token that others lose more": {name: str(loss) for name, loss in nats.items()}},
        control=control,
        holds=nats[EQUAL].low > 0 if size == "full" else None,
        why=f"perplexity of {'the number' if kind == 'needles' else f'{scale.scored} tokens'} after prompts of "
            f"{scale.prompt} tokens, the first token left out, since no cache had forgotten yet; holds where the "
            "paired interval over prompts of what equal budgets lose more lies above 0")


def _per_token(one: Told) -> NDArray[np.float64]:
    return one.losses.sum_N / one.losses.tokens_N


def _near(by_share: Mapping[float, Mapping[str, Told]], scale: Scale, size: Size) -> Check:
    whole = by_share[CLAIMED][FULL].losses
    ratio = {name: whole.change(one.losses) for name, one in by_share[CLAIMED].items() if name != FULL}
    return Check(
        name="a fifth of the cache is nearly lossless",
        claim=f"at {CLAIMED:.0%} of the cache by need, perplexity of long text rises by at most {NEAR - 1:.0%}",
        measured={"perplexity divided by that of the whole cache": str(ratio[ZIGZAG])},
        control={name: str(value) for name, value in ratio.items() if name != ZIGZAG},
        holds=ratio[ZIGZAG].value <= NEAR if size == "full" else None,
        why=f"{scale.texts} texts, {scale.scored} tokens after {scale.prompt}; a fifth of these prompts is "
            f"{int(CLAIMED * scale.prompt)} tokens a layer, and of the paper's, ten times as long, ten times as "
            "many; the bound is ours")
