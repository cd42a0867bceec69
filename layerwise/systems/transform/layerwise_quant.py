"""Layer-Wise Quantization: quantizing LLMs beyond integer bit-levels (arXiv 2406.17415)

Claims: moving layers to fewer bits in the order of a cheap score keeps quality near the wide model's until 25 to
50 % of the layers are moved, against 5 to 10 % in no specific order; and at equal bytes fewer bits beat dropped
layers, except at 2 bits.

From the abstract and two re-implementations (no code was released): the scores LIM and ZD, and moving the
lowest-ranked layers first. Ours: one small model, asymmetric rounding in groups of 64, "near" as at most 5 % more
perplexity, areas under the curve of the loss. The demo checkpoint was itself stored in 4 bits (groups of 32 with
minima), so its weights are easier to round again than others; groups of 64 do not coincide with its own.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import layerwise as lw
from layerwise.allocate.plan import Edit
from layerwise.data import Interval, Losses, TextData, perplexity, text_blocks
from layerwise.measure.base import Instrument
from layerwise.measure.quantization_sensitivity import QuantizationSensitivity
from layerwise.measure.scores import Scores
from layerwise.stack.decoder import DecoderStack
from layerwise.systems.base import Check, Size
from layerwise.systems.curve import Curve, against_chance

GROUP = 64
SCORES = ("lim", "zd")
Curves = Mapping[str, Mapping[str, Curve]]


@dataclass(frozen=True)
class Scale:
    """Pairs of widths, points of a curve, random orders, and blocks of 128 tokens to calibrate and verify on."""

    pairs: tuple[tuple[int, int], ...]
    points: tuple[int, ...]
    randoms: int
    calibration: int
    verification: int


SCALES: dict[Size, Scale] = {
    "quick": Scale(((8, 4),), (0, 10, 20, 30), 2, calibration=2, verification=4),
    "full": Scale(((8, 4), (4, 3), (4, 2)), (0, 3, 6, 9, 15, 22, 30), 5, calibration=8, verification=12),
}


def run(size: Size, seed: int) -> list[Check]:
    """Curves of the loss over layers moved down, in every order; fewer bits against dropping at equal bytes."""
    scale, stack = SCALES[size], lw.open("smollm2")
    assert isinstance(stack, DecoderStack) and stack.tokenizer is not None
    calibration = text_blocks("default", stack.tokenizer, length=128, blocks=scale.calibration, seed=seed)
    text = text_blocks("default", stack.tokenizer, length=128, blocks=scale.verification, split="verification")
    instruments: list[str | Instrument] = [*SCORES]
    if size == "full":
        lows = tuple(narrow for _, narrow in scale.pairs)
        instruments.append(QuantizationSensitivity(lows, group=GROUP, metric="loss", outside=False))
    scores = lw.measure(stack, calibration, instruments, seed=seed, progress=False)
    curves = {f"{wide}/{narrow}": _curves(stack, (wide, narrow), _orders(scores, narrow, scale.randoms, seed),
                                          scale.points, text) for wide, narrow in scale.pairs}
    checks = [_area(curves, size), _near(curves, size)]
    checks += [_drop(stack, scores.ranking("lim"), pair, text) for pair in scale.pairs if pair[1] in (4, 2)]
    return checks + ([_gptq(stack, scores.ranking("lim"), calibration, text)] if size == "full" else [])


def quantized(stack: DecoderStack, bits: Mapping[int, int], gone: Collection[int] = (), method: str = "nearest",
              data: TextData | None = None) -> DecoderStack:
    """`stack` with every layer of `bits` at its width, below 8 by `method`, and the layers of `gone` dropped."""
    edits = [Edit(layer, "drop") if layer in gone else
             Edit(layer, "quantize", {"bits": width, "group": GROUP, "method": method if width < 8 else "nearest"})
             for layer, width in bits.items()]
    return lw.apply(stack, lw.Plan(stack.spec.fingerprint(), len(stack), tuple(edits)), data)


def _orders(scores: Scores, narrow: int, randoms: int, seed: int) -> dict[str, list[int]]:
    """Layers in the order in which they move down, the least important first."""
    orders = {name: scores.ranking(name) for name in SCORES}
    orders |= {"reversed lim": orders["lim"][::-1], "depth": sorted(orders["lim"])}
    if (oracle := f"quantization-sensitivity:{narrow}") in scores:
        orders["oracle"] = scores.ranking(oracle)
    for draw in range(randoms):
        orders[f"random {draw}"] = random.Random(1000 * seed + draw).sample(orders["depth"], len(orders["depth"]))
    return orders


def _curves(stack: DecoderStack, pair: tuple[int, int], orders: Mapping[str, Sequence[int]], points: Sequence[int],
            text: TextData) -> dict[str, Curve]:
    wide, narrow = (quantized(stack, dict.fromkeys(range(len(stack)), bits)) for bits in pair)

    def loss(moved: Collection[int]) -> float:
        chosen = [narrow if layer in moved else wide for layer in range(len(stack))]
        spec = replace(wide.spec, rows=tuple(model.spec.rows[layer] for layer, model in enumerate(chosen)))
        return _losses(wide.rebuilt(spec, [model.block(layer) for layer, model in enumerate(chosen)]), text).mean

    ends = {0: loss(()), len(stack): loss(range(len(stack)))}
    return {name: Curve(points, [ends[k] if k in ends else loss(order[:k]) for k in points])
            for name, order in orders.items()}


def _losses(stack: lw.Stack, text: TextData) -> Losses:
    return perplexity(stack, text, len(text))


def _area(curves: Curves, size: Size) -> Check:
    found = {pair: against_chance(table, lambda curve: curve.area) for pair, table in curves.items()}
    beaten = [all(areas[score] < control["random mean"] - control["random deviation"] for score in SCORES)
              for areas, control in found.values()]
    return Check(
        name="scores order layers better than chance",
        claim="for some pair of widths the areas of LIM and of ZD lie over a standard deviation below random orders",
        measured={pair: areas for pair, (areas, _) in found.items()},
        control={pair: control for pair, (_, control) in found.items()},
        holds=any(beaten) if size == "full" else None,
        why="area: mean growth of the loss in nats while layers move down one by one; the oracle orders by the loss of "
            "each layer alone. Quick has two random orders and two inner points, too few to tell")


def _near(curves: Curves, size: Size) -> Check:
    found = {pair: against_chance(table, lambda curve: curve.share(1.05)) for pair, table in curves.items()}
    held = [max(shares[score] for score in SCORES) >= 0.25 and control["random mean"] <= 0.10
            for shares, control in found.values()]
    return Check(
        name="a quarter of the layers can move",
        claim="by score at least 25 % of the layers move before quality leaves the wide model's, at random 10 %",
        measured={pair: shares for pair, (shares, _) in found.items()},
        control={pair: control for pair, (_, control) in found.items()},
        holds=any(held) if size == "full" else None,
        why="share of layers until perplexity is 5 % above the wide model's, for LIM or ZD and some pair of widths; "
            "straight between points of the curve, of which quick has too few")


def _drop(stack: DecoderStack, order: list[int], pair: tuple[int, int], text: TextData) -> Check:
    wide, narrow = pair
    widths = dict.fromkeys(range(len(stack)), wide)
    whole = quantized(stack, widths)
    slim = quantized(stack, widths | dict.fromkeys(order[: len(order) // 2], narrow))
    saved, row = whole.spec.bytes() - slim.spec.bytes(), whole.spec.rows[0].bytes(stack.spec.hidden, stack.spec.dtype)
    cut = quantized(stack, widths, order[: saved // row])
    losses = [_losses(model, text) for model in (whole, slim, cut)]
    found = [{"perplexity": round(loss.perplexity, 3), "bytes": model.spec.bytes(), "layers": len(model)}
             for loss, model in zip(losses, (whole, slim, cut), strict=True)]
    ratio = losses[1].change(losses[2])
    better = _above_one(ratio)
    return Check(
        name=f"{narrow} bits against dropping at equal bytes", measured=found[1],
        claim=f"half of the layers at {narrow} bits instead of {wide} predict {'better' if narrow > 2 else 'worse'} "
              "than dropping layers down to the same bytes",
        control={"dropped": found[2], f"all at {wide} bits": found[0]},
        holds=better if narrow > 2 or better is None else not better,
        why=f"both take layers in the order of LIM; dropping may keep more bytes. Perplexity after dropping divided "
            f"by that of {narrow} bits: {ratio}, over blocks of text")


def _gptq(stack: DecoderStack, order: list[int], calibration: TextData, text: TextData) -> Check:
    widths, half = dict.fromkeys(range(len(stack)), 8), len(order) // 2
    forward, backward = (
        _losses(quantized(stack, widths | dict.fromkeys(layers, 4), method="gptq", data=calibration), text)
        for layers in (order[:half], order[-half:]))
    ratio = forward.change(backward)
    return Check(
        name="the order holds with GPTQ", measured=round(forward.perplexity, 3), control=round(backward.perplexity, 3),
        claim="half of the layers at 4 bits by GPTQ, the rest at 8, cost less in the order of LIM than in its reverse",
        holds=_above_one(ratio),
        why=f"layers are quantized in depth order behind their quantized prefix. Perplexity of the reverse divided by "
            f"that of LIM: {ratio}, over blocks of text")


def _above_one(ratio: Interval) -> bool | None:
    return None if 1 in ratio else ratio.low > 1
