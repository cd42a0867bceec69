"""What Affects the Effective Depth of Large Language Models? (arXiv 2512.14064)

Claims: the share of layers that a model uses effectively is high and similar over sizes (stored ratios: 0.56 to 0.75
by cosine, 0.75 to 0.95 by lens KL, 0.86 to 0.97 by lens overlap), and harder tasks do not recruit more layers.

From the abstract, the official code and its stored table: three of the five probes become an integer, with these
thresholds, and the ratio. On SmolLM2 as transformers runs it, its lens divergence differs from ours by 2e-7 of the
largest, overlap, cosines and contributions by at most 1e-7. Ours: the integers of the other probes (skip effects on
future tokens, residual erasure, integrated gradients, and angular distance as in depth pruning: the last depth above
half of the largest), the texts (prose, and additions of one to six digits), float32 instead of 8 bits, two small base
models instead of Qwen 2.5 with models of 4, 8 and 12 layers trained here as the axis of size, and tolerances. Criteria
without a crossing report none instead of failing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

import layerwise as lw
from layerwise.data.text import TextData
from layerwise.measure.effective import cosine_depth, kl_depth, last_above, overlap_depth, shares
from layerwise.measure.effects import future, skip_effects
from layerwise.measure.erasure import erasure, mean_states
from layerwise.measure.integrated_gradients import integrated_gradients
from layerwise.stack.decoder import DecoderStack
from layerwise.systems.base import Check, Size
from layerwise.systems.controls import shuffled_weights
from layerwise.systems.sizes import byte_blocks, sized
from layerwise.systems.text import asked_sums, prose, sums

INSTRUMENTS = ["contribution-cosine", "logit-lens-kl", "logit-lens-overlap", "angular-distance"]
Depths = dict[str, int | None]


def by_curves(stack: DecoderStack, data: object, seed: int) -> Depths:
    """Effective depth by the published criteria, from one pass over the data."""
    found = lw.measure(stack, data, INSTRUMENTS, seed=seed, lens_tokens=64, progress=False)
    kl = found["logit-lens-kl"].values
    cosines = [found[f"contribution-cosine:{part}"].values for part in ("attention", "feed-forward", "block")]
    return {"cosine": cosine_depth(cosines), "kl": kl_depth(kl), "kl, without its two highest layers":
            kl_depth(kl, rank=2), "overlap": overlap_depth(found["logit-lens-overlap"].values),
            "angular distance": last_above(found["angular-distance"].values, first=1)}


def by_trying(stack: DecoderStack, text: TextData, seed: int, *, every: int, steps: int, prompts: int) -> Depths:
    """Effective depth by what is read from the states of earlier tokens, at every so many depths."""
    assert stack.tokenizer is not None
    cuts_B = torch.full((len(text),), text.length // 2)
    skipped = skip_effects(stack, text.tokens_NT, *future(text.tokens_NT, cuts_B)).output_S.tolist()
    at = range(0, len(stack) + 1, every)
    erased, pulled = torch.zeros(len(at)), torch.zeros(len(at))
    means_DC = mean_states(stack, text.tokens_NT)
    for prompt in asked_sums(stack.tokenizer, 2, prompts, seed):
        erased += erasure(stack, prompt, means_DC, at=at)[:, : prompt.first].amax(1)
        tokens_DT = integrated_gradients(stack, prompt, steps=steps, at=at).tokens_DT[:, : prompt.first]
        pulled += tokens_DT.abs().sum(1).float()
    curves = {"erasure": erased.tolist(), "integrated gradients": pulled.tolist()}
    return {"skip effects": last_above(skipped, first=1)} | {
        name: None if (last := last_above(curve)) is None else at[last] for name, curve in curves.items()}


def run(size: Size, seed: int) -> list[Check]:
    """Effective depth of SmolLM2 (and Gemma 3 270M at full size), and of three small models trained here."""
    names = ["smollm2"] if size == "quick" else ["smollm2", "gemma3-270m"]
    digits, prompts = ((1, 6), 2) if size == "quick" else ((1, 2, 3, 4, 5, 6), 10)
    checks: list[Check] = []
    for name in names:
        opened = lw.open(name)
        assert isinstance(opened, DecoderStack)
        stack = opened.copied(torch.float32)
        assert stack.tokenizer is not None
        text = prose(stack.tokenizer, prompts, 128, seed)
        texts = [text, *(sums(stack.tokenizer, n, prompts, seed) for n in digits)]
        found = {data.name: by_curves(stack, data, seed) for data in texts}
        null = by_curves(shuffled_weights(stack, seed), text, seed)
        checks += [_ratio_check(name, found, null, len(stack)), _difficulty_check(name, found)]
        checks.append(_probes_check(name, stack, found[text.name], null, size, seed))
    return [*checks, _scale_check(size, seed)]


def _ratio_check(name: str, found: Mapping[str, Depths], null: Depths, layers: int) -> Check:
    by_text = {text: shares(depth, layers) for text, depth in found.items()}
    lens = [ratio[criterion] for ratio in by_text.values() for criterion in ("kl", "overlap")]
    return Check(
        name=f"{name}: most layers are effective",
        claim="lens criteria put the effective depth at 0.6 of the layers or deeper (published: 0.75 to 0.97)",
        measured=by_text,
        control={"weights shuffled within each matrix": shares(null, layers)},
        holds=all(ratio is not None and ratio >= 0.6 for ratio in lens),
        why="every lens ratio on every text must reach 0.6; the control has the same weights without structure, "
        "so a criterion that gives it the same ratio measures the architecture and not the model. Embeddings are "
        "tied here, so the lens at layer 0 reads back the input token: where text repeats (digits), that alone "
        "overlaps with the final top five, and one early spike sets the largest divergence",
    )


def _difficulty_check(name: str, found: Mapping[str, Depths]) -> Check:
    levels = {text: depth for text, depth in found.items() if text.startswith("sums")}
    prose_name = next(iter(found))
    spread = {criterion: _spread([depth[criterion] for depth in levels.values()])
              for criterion in ("cosine", "kl", "overlap")}
    change = {criterion: _spread([*(depth[criterion] for depth in levels.values()), found[prose_name][criterion]])
              for criterion in spread}
    return Check(
        name=f"{name}: harder sums do not use more layers",
        claim="effective depth stays within two layers of its middle from one-digit to six-digit sums",
        measured={"spread in layers": spread, "depths": levels},
        control={"spread with prose added": change},
        holds=all(width is not None and width <= 4 for width in spread.values()),
        why="the spread is the deepest minus the shallowest level, at most 4 (plus or minus two); none means that "
        "a criterion has no crossing at some level. The control shows how far a change of text kind moves it",
    )


def _probes_check(name: str, stack: DecoderStack, found: Depths, null: Depths, size: Size, seed: int) -> Check:
    every, steps, prompts = (15, 4, 1) if size == "quick" else (3, 48, 3)
    layers = len(stack)
    assert stack.tokenizer is not None
    text = prose(stack.tokenizer, 2, 48, seed)
    tried = by_trying(stack, text, seed, every=every, steps=steps, prompts=prompts)
    ratio, lens = shares(found | tried, layers), ("kl", "overlap")
    cosine = ratio["cosine"]
    return Check(
        name=f"{name}: the five probes",
        claim="layers begin to amplify before the lens settles: the cosine depth is above both lens depths "
        "(published: 0.56 to 0.75 against 0.75 to 0.97)",
        measured=ratio,
        control={"weights shuffled within each matrix": shares(null, layers)},
        holds=cosine is not None and all(cosine <= value for criterion in lens if (value := ratio[criterion])),
        why="on prose; published criteria first. Skip effects on future tokens, erasure and integrated gradients "
        f"(sums of two digits, every {every} depths) are the last depth at which states of earlier tokens still "
        "matter half as much as at their best depth: they are listed for comparison and judge nothing",
    )


def _scale_check(size: Size, seed: int) -> Check:
    sizes, steps, width = ((4, 8), 40, 32) if size == "quick" else ((4, 8, 12), 1500, 128)
    known_NT, held_NT = byte_blocks(seed)

    def ratios(layers: int, steps: int) -> dict[str, float | None]:
        stack = sized(layers, known_NT, steps=steps, width=width, seed=seed)
        return shares(by_curves(stack, held_NT, seed), layers)

    found, null = ({f"{layers} layers": ratios(layers, count) for layers in sizes} for count in (steps, 0))
    spread = {criterion: _range([ratio[criterion] for ratio in found.values()]) for criterion in ("kl", "overlap")}
    return Check(
        name="the share does not grow with size",
        claim="lens ratios of models of 4, 8 and 12 layers differ by at most 0.2 (the width of the published range)",
        measured={"spread": spread, "by layers": found},
        control={"as drawn, before training": null},
        holds=all(width is not None and width <= 0.2 for width in spread.values()) if size == "full" else None,
        why="models over bytes trained here on the same text, read on held-out blocks; one layer is a quarter of the "
        "smallest. Quick trains for too few steps to tell",
    )


def _spread(values: Sequence[int | None]) -> int | None:
    numbers = [value for value in values if value is not None]
    return max(numbers) - min(numbers) if len(numbers) == len(values) else None


def _range(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return round(max(numbers) - min(numbers), 3) if len(numbers) == len(values) else None
