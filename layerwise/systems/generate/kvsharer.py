"""KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing (arXiv 2410.18517)

Claims: without training, layers may read the keys and values of earlier layers; to share those that are most unlike
loses less than to share those that are most alike; and about a quarter of the cache goes with little loss.

From the official code: texts of 64 tokens, caches averaged over texts before they are compared, keys after rotation,
distance as the mean norm over heads and positions, pairs in descending order, a replacement kept where the cosine of
the flattened last states stays above 0.5, chains flattened. Ours: fewer texts, a small model with grouped keys, three
draws of text for each order, and perplexity as the judge. The published speed-up is not timed: with grouped keys
what sharing spares of a token's work is small.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

import layerwise as lw
from layerwise.allocate.plan import Edit
from layerwise.data import Losses, TextData, perplexity, text_blocks
from layerwise.generate.sample import generate
from layerwise.nets.flow import LayerCache
from layerwise.serve.table import layer_table
from layerwise.stack.decoder import Caches, DecoderStack
from layerwise.systems.base import Check, Size
from layerwise.systems.served import same

Pair = tuple[int, int]
"""A layer, and the earlier one whose keys and values it may read."""
LENGTH, THRESHOLD, LITTLE = 64, 0.5, 1.1
"""Tokens of a calibration text, the cosine a replacement must keep, and the rise of perplexity called little."""
ORDERS = ("unlike first", "alike first", "random")


@dataclass(frozen=True)
class Scale:
    """Calibration texts, draws of them, blocks of 128 tokens to verify on, layers to share, tokens to generate."""

    texts: int
    draws: int
    verification: int
    shared: tuple[int, ...]
    tokens: int


SCALES: dict[Size, Scale] = {"quick": Scale(2, 1, 2, (3,), 4), "full": Scale(8, 3, 12, (3, 5, 7), 32)}


def run(size: Size, seed: int) -> list[Check]:
    """Perplexity when as many layers share by each order, over draws of text; the cache and tokens when served."""
    scale, stack = SCALES[size], lw.open("smollm2")
    assert isinstance(stack, DecoderStack) and stack.tokenizer is not None
    text = text_blocks("default", stack.tokenizer, length=128, blocks=scale.verification, split="verification")
    maps: dict[str, list[list[dict[int, int]]]] = {order: [] for order in ORDERS}
    for draw in range(scale.draws):
        texts = text_blocks("default", stack.tokenizer, length=LENGTH, blocks=scale.texts, seed=100 * seed + draw)
        ranked = sorted(distances(stack, texts.tokens_NT).items(), key=lambda item: -item[1])
        unlike = [pair for pair, _ in ranked]
        shuffled = random.Random(100 * seed + draw).sample(unlike, len(unlike))
        for order, pairs in zip(ORDERS, (unlike, unlike[::-1], shuffled), strict=True):
            maps[order].append(search(stack, texts.tokens_NT, pairs, max(scale.shared)))
    whole = perplexity(stack, text, len(text))
    found = {order: {count: [_held(stack, draw[:count], text) for draw in draws] for count in scale.shared}
             for order, draws in maps.items()}
    largest = [steps[-1] for steps in maps["unlike first"]]
    return [_order(found, whole, size), _little(found, whole, scale, size), _served(stack, largest[0], text, scale)]


@torch.inference_mode()
def distances(stack: DecoderStack, tokens_BT: Tensor) -> dict[Pair, float]:
    """How far keys and values of a layer lie from those of an earlier one, each averaged over texts first."""
    caches: Caches = {}
    stack.run(stack.start(tokens_BT, caches=caches))
    means = []
    for layer in range(len(stack)):
        cache = caches[layer]
        assert isinstance(cache, LayerCache) and cache.k is not None and cache.v is not None
        means.append([kept[:, :, : cache.length].float().mean(0) for kept in (cache.k, cache.v)])
    return {(late, early): sum(float((a - b).norm(dim=-1).mean()) for a, b in zip(means[late], means[early],
                                                                                 strict=True)) / 2
            for early, late in combinations(range(len(stack)), 2)}


@torch.inference_mode()
def search(stack: DecoderStack, tokens_BT: Tensor, pairs: Iterable[Pair], count: int) -> list[dict[int, int]]:
    """Who reads whose keys after the first, second, ... of up to `count` replacements, tried in the order given."""
    reference_BX = _last_states(stack, tokens_BT)
    found: list[dict[int, int]] = []
    for late, early in pairs:
        before = found[-1] if found else {}
        if len(found) == count:
            break
        if late in before:
            continue
        trial = flattened({**before, late: early})
        states_BX = _last_states(sharing(stack, trial), tokens_BT)
        if float(torch.cosine_similarity(reference_BX, states_BX, dim=1).mean()) > THRESHOLD:
            found.append(trial)
    return found


def flattened(sources: Mapping[int, int]) -> dict[int, int]:
    """The same, each layer told the end of its chain: one that keeps keys of its own."""
    flat: dict[int, int] = {}
    for layer in sorted(sources):
        flat[layer] = flat.get(sources[layer], sources[layer])
    return flat


def sharing(stack: DecoderStack, sources: Mapping[int, int]) -> DecoderStack:
    """`stack` in which layers read the keys and values of their sources."""
    edits = tuple(Edit(layer, "share-kv", {"source": source}) for layer, source in sorted(sources.items()))
    return lw.apply(stack, lw.Plan(stack.spec.fingerprint(), len(stack), edits))


def _last_states(stack: DecoderStack, tokens_BT: Tensor) -> Tensor:
    hidden_BTC: Tensor = stack.decoder.norm(stack.run(stack.start(tokens_BT)).hidden)
    return hidden_BTC.flatten(1).float()


def _held(stack: DecoderStack, steps: Sequence[Mapping[int, int]], text: TextData) -> Losses:
    return perplexity(sharing(stack, steps[-1]) if steps else stack, text, len(text))


Found = Mapping[str, Mapping[int, Sequence[Losses]]]


def _plain(by_count: Mapping[int, Sequence[Losses]]) -> dict[str, list[float]]:
    return {f"{count} share": [round(one.perplexity, 2) for one in draws] for count, draws in by_count.items()}


def _order(found: Found, whole: Losses, size: Size) -> Check:
    unlike = found["unlike first"]
    better = all(max(one.mean for one in draws) < min(other.mean for other in found[order][count])
                 for order in ORDERS[1:] for count, draws in unlike.items())
    return Check(
        name="which layers share",
        claim="as many layers sharing, those most unlike lose less than those most alike and than random ones",
        measured={"perplexity by draw of text": _plain(unlike)},
        control={order: _plain(found[order]) for order in ORDERS[1:]} | {"none share": round(whole.perplexity, 2)},
        holds=better if size == "full" else None,
        why="holds where, for every number of layers, the worst draw is better than the best draw of both controls; "
            "all orders pass the same search, whose bound is loose, so that the order does nearly all the work")


def _little(found: Found, whole: Losses, scale: Scale, size: Size) -> Check:
    count = max(scale.shared)
    ratios = {order: [round(one.perplexity / whole.perplexity, 3) for one in draws[count]]
              for order, draws in found.items()}
    return Check(
        name=f"sharing {count} layers loses little",
        claim=f"with {count} layers without a cache of their own, perplexity rises by at most {LITTLE - 1:.0%}",
        measured={"perplexity divided by that of the whole model": ratios.pop(ORDERS[0])},
        control=ratios,
        holds=max(one.perplexity for one in found[ORDERS[0]][count]) <= LITTLE * whole.perplexity
        if size == "full" else None,
        why="the paper's models are fifty times as large and have layers to spare; the bound is ours")


def _served(stack: DecoderStack, sources: Mapping[int, int], text: TextData, scale: Scale) -> Check:
    exact = stack.copied(torch.float32)
    shared = sharing(exact, sources)
    prompts = [row[:LENGTH] for row in text.tokens_NT[:2].tolist()]
    params = lw.Params(max_tokens=scale.tokens, temperature=0.0, stop_ids=())
    served = [list(one.tokens) for one in lw.Engine(shared, cache_tokens=512, prepare=False).generate(prompts, params)]
    plain, whole = ([list(generate(model, prompt, max_tokens=scale.tokens, stop=())) for prompt in prompts]
                    for model in (shared, exact))
    sizes = [sum(group.token_bytes for group in layer_table(model.spec).groups) for model in (shared, exact)]
    return Check(
        name="served from the shared cache",
        claim="the engine keeps no cache for sharing layers and answers as plain passes through the same model do",
        measured={"cache bytes a token": sizes[0], "tokens as in plain passes": same(served, plain)},
        control={"cache bytes a token, none share": sizes[1],
                 "tokens as in the model in which none share": same(served, whole)},
        holds=served == plain and sizes[0] * len(stack) == sizes[1] * (len(stack) - len(sources)),
        why=f"{len(prompts)} prompts of {LENGTH} tokens, {scale.tokens} greedy tokens each, in float32")
