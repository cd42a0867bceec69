"""What a layer may become: from words and from a budget, and what must be measured to choose among it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from layerwise.allocate.budget import Budget
from layerwise.allocate.choices import coded, dropped, factored, factors, keep, mixed, narrowed, rotated, shared, tiered
from layerwise.allocate.cost import totals
from layerwise.allocate.losses import Alternative
from layerwise.errors import BadData, BadOption
from layerwise.measure.base import Instrument
from layerwise.measure.output_error import OutputError
from layerwise.measure.response import CACHES, DROPS, SHARES, Response
from layerwise.spec import BITS, Format, StackSpec, Tiers
from layerwise.transform.low_rank import share_rank
from layerwise.transform.quantize import Quantize

DROPPING: dict[str, Callable[[], Alternative]] = {
    "drop": dropped,
    "drop-attention": lambda: dropped("attention"),
    "drop-feed-forward": lambda: dropped("feed_forward"),
}
WIDEST = 256
RANKS, WIDTHS = (0.8, 0.6, 0.4), (0.875, 0.75, 0.5)
CURRENCIES = ("bits", "tiers", "rank", "width", "share", "cache", *DROPPING)
FREQUENT = {16: (6, 5, 4, 3), 64: (3,)}
"""One token in so many counts as frequent, in tables whose other rows have so many bits. On SmolLM2 and Gemma 3 these
are 79 to 97 % of unseen text of the kind they were counted in (`python -m benchmarks.tiers`)."""
FINE = "8/32="
"""What 8 bits are in llama.cpp's Q8_0: nearer than a scale a row, in 8.5 bits a number."""
POSITIONS = 64
"""Positions of every block at which the output of a changed model is compared."""


def formats(spec: StackSpec) -> list[str]:
    """The formats worth having for this model, widest first, as labels.

    Small groups round better and cost more scales: the smallest of a width come first. The largest group is one that
    divides every matrix's inputs, since a group that is not full is stored in full.
    """
    inputs = [columns for row in spec.rows for _, columns in row.matrices(spec.hidden).values()] or [WIDEST]
    wide = next((size for size in range(WIDEST, 32, -32) if math.gcd(*inputs) % size == 0), 64)
    groups: dict[int, list[int | str]] = {
        8: ["row="], 6: [wide], 5: [wide], 4: [32, 64, wide, "row"], 3: [64, wide, "row"], 2: [32, 64, wide]}
    return list(dict.fromkeys([FINE, *(f"{bits}/{group}" for bits, sizes in groups.items() for group in sizes)]))


def table_formats(labels: Sequence[str]) -> list[str]:
    """Those of the formats that token tables may have: a table is large and slow to try, so one or two a width."""
    chosen = []
    for bits in sorted({Format.parse(label).bits for label in labels if Format.parse(label).bits > 2}, reverse=True):
        same = [label for label in labels if Format.parse(label).bits == bits and not label.endswith("row")]
        chosen += [same[0], same[-1]] if bits in (8, 4) else same[-1:]
    return list(dict.fromkeys(chosen))


def tier_formats(labels: Sequence[str], vocabulary: int) -> list[str]:
    """Tables whose frequent tokens have the widest of the formats, for each narrower width."""
    largest = {format.bits: format for format in map(Format.parse, table_formats(labels))}  # groups of each width
    wide, *narrow = largest.values() or [Format(8)]
    return [Tiers(rows, wide, format).label for format in narrow
            for part in FREQUENT if format.bits in FREQUENT[part] and (rows := vocabulary // part)]


def parse_alternatives(only: Sequence[str], spec: StackSpec) -> list[Alternative]:
    """What a layer may become, from words; leaving it as it is is always possible.

    A word is a currency (`bits`, `tiers` of token tables, `rank`, `width`, `share`, `cache`, `drop`, `drop-attention`,
    `drop-feed-forward`), a number of bits (`4`: every format of that width) or a format (`4/128`). Raises BadOption for
    another word.
    """
    labels = list(dict.fromkeys(label for word in only if word not in CURRENCIES[1:] for label in _labels(word, spec)))
    found = [keep(), *_formats(labels)] if only else []
    if "tiers" in only:
        found += tiered(tier_formats(labels or formats(spec), spec.vocabulary))
    if "rank" in only:
        found += factored(RANKS, _inner(labels)) if labels else factors(RANKS)
    if "width" in only:
        found += narrowed(WIDTHS, spec)
    if "share" in only:
        found += shared()
    if "cache" in only:
        found += coded(_fewer_heads(spec) if "width" in only else ())
    return [*found, *(make() for word, make in DROPPING.items() if word in only)]


def check_words(only: Sequence[str]) -> None:
    """Raises BadOption for a word that means nothing, before a model is opened."""
    for word in only:
        if word not in CURRENCIES and not (word.isdigit() and int(word) in BITS):
            _parsed(word)


def _labels(word: str, spec: StackSpec) -> list[str]:
    if word == "bits":
        return formats(spec)
    if word.isdigit() and int(word) in BITS:
        return [label for label in formats(spec) if Format.parse(label).bits == int(word)]
    return [_parsed(word).label]


def _parsed(word: str) -> Format:
    try:
        return Format.parse(word)
    except BadOption as error:
        known = ", ".join([*CURRENCIES, *map(str, BITS), "a format such as 4/128"])
        raise BadOption(f"--only {word}", expected=f"one of: {known}", do="correct the word") from error


def _formats(labels: Sequence[str]) -> list[Alternative]:
    coarse = any(Format.parse(label).bits < 8 for label in labels)
    return [*mixed(labels, tables=table_formats(labels)), *([rotated()] if coarse else [])]


def defaults_for(budget: Budget, spec: StackSpec, hard: bool = False) -> list[Alternative]:
    """Alternatives that can help with this budget: formats to save bytes or time, what shrinks the cache where that is
    limited, and all others for hard budgets.

    Factors, narrower layers and leaving parts out are tried where layers or parameters are limited, where 4 bits
    everywhere do not fit, or where the budget is known to be `hard`, as one of milliseconds may be.
    """
    currencies = set(budget.given())
    labels = useful_formats(budget, spec) if currencies & {"bytes", "bits", "milliseconds", "prefill"} else []
    fits = _size_at(4, spec) <= _allowed(budget, spec)
    found = [keep(), *_formats(labels), *tiered(tier_formats(labels, spec.vocabulary)),
             *(smaller_cache(spec) if "cache" in currencies else [])]
    if not fits or hard or currencies & {"parameters", "layers"}:
        found += [*factored(RANKS, _inner(labels)), *narrowed(WIDTHS, spec), *shared()] if labels else []
        found += [make() for make in DROPPING.values()]
    return list({item.label: item for item in found}.values())


def smaller_cache(spec: StackSpec) -> list[Alternative]:
    """What keeps less of every token: integers, fewer heads of keys, both, the keys of another layer, nothing."""
    fewer = _fewer_heads(spec)
    return [*coded(fewer), *fewer, *shared(), dropped("attention")]


def _fewer_heads(spec: StackSpec) -> list[Alternative]:
    return [item for item in narrowed(WIDTHS, spec) if "kv_heads" in item.arguments]


def calibrated(alternatives: Sequence[Alternative], spec: StackSpec, tokens: int,
               only: Sequence[str]) -> list[Alternative]:
    """Those whose ranks so many tokens of calibration text can show: each token shows one direction of inputs at most.

    Raises BadData where `only` asks for ranks that they cannot show.
    """
    shapes = {shape for row in spec.rows for shape in row.matrices(spec.hidden).values()}

    def needed(alternative: Alternative) -> int:
        share = alternative.arguments["rank"] if alternative.transform == "low-rank" else None
        return max((share_rank(share, *shape) for shape in shapes), default=0) if share else 0

    short = [alternative for alternative in alternatives if needed(alternative) > tokens]
    if short and "rank" in only:
        most = max(map(needed, short))
        raise BadData(f"{tokens} tokens of calibration text for factors of rank {most}",
                      expected=f"at least {most} tokens", do="give more text with --data, or do without rank in --only")
    return [alternative for alternative in alternatives if alternative not in short]


def _inner(labels: Sequence[str]) -> list[str]:
    """Formats for factors: one of each width from 6 to 3 bits, in the largest full groups."""
    return [[label for label in labels if Format.parse(label).bits == bits and "row" not in label][-1]
            for bits in (6, 4, 3) if any(Format.parse(label).bits == bits for label in labels)]


def useful_formats(budget: Budget, spec: StackSpec) -> list[str]:
    """The formats worth measuring: from the widest down to the width below the one that fits everywhere.

    Widths below the budget belong to it, because a matrix that bears them pays for others that do not. FINE, half a bit
    a number more than 8 bits by rows, is for budgets within which 6 bits fit everywhere.
    """
    labels, allowed = formats(spec), _allowed(budget, spec)
    widths = sorted({Format.parse(label).bits for label in labels}, reverse=True)
    if allowed < math.inf:
        fits = next((place for place, bits in enumerate(widths) if _size_at(bits, spec) <= allowed), len(widths))
        widths = widths[: max(fits + 3, 4)]
    refused = () if _size_at(6, spec) <= allowed else (FINE,)
    return [label for label in labels if Format.parse(label).bits in widths and label not in refused]


def _allowed(budget: Budget, spec: StackSpec) -> float:
    """Bytes that the budget leaves, infinite where it limits none."""
    limits = budget.limits({**totals(spec), "milliseconds": math.inf, "prefill": math.inf})
    return min(limits.get("bytes", math.inf), limits.get("bits", math.inf) * spec.parameters() / 8)


def _size_at(bits: int, spec: StackSpec) -> int:
    """Stored bytes with every matrix and table at `bits` in groups of 64."""
    transform = Quantize(bits, 64)
    packed = replace(spec, rows=tuple(transform.edit(row, spec.hidden) for row in spec.rows))
    head = None if spec.tied else transform.format
    return replace(packed, embedding_format=transform.format, head_format=head).bytes()


def felt(alternatives: Sequence[Alternative]) -> bool:
    """Whether errors differ so much from alternative to alternative that what predictions feel of them must be known:
    rounding errs everywhere alike, what is left of a narrower or a factored matrix does not.
    """
    return any(item.transform in ("narrow", "low-rank") for item in alternatives)


def reading(alternatives: Sequence[Alternative], sensitivity: tuple[Tensor, ...] = ()) -> list[str | Instrument]:
    """What reads layers beside the statistics of their inputs."""
    labels = tuple(item.label for item in alternatives if item.each and item.transform == "quantize")
    ranks = dict.fromkeys(item.arguments["rank"] for item in alternatives if item.transform == "low-rank")
    widths = WIDTHS if any(item.transform == "narrow" for item in alternatives) else ()
    turned = any(item.transform == "learn-rotation" for item in alternatives)
    wanted = OutputError(labels or ("8/row=",), ranks=tuple(ranks), widths=widths, rotated=turned,
                         sensitivity=sensitivity)
    return [wanted] if labels or ranks or widths else []


def trying(alternatives: Sequence[Alternative], order_V: Tensor | None = None) -> list[str | Instrument]:
    """What tries changes on the model, and what a reader wants to see beside it.

    `order_V` holds the tokens, the most frequent first: tables whose rows differ by that are tried only with it.
    """
    tables = tuple(item.label for item in alternatives if item.tables and item.transform == "quantize"
                   and (order_V is not None or "frequent" not in item.arguments))
    drops, shares, caches = (tuple(label for label in known if any(item.label == label for item in alternatives))
                             for known in (DROPS, SHARES, CACHES))
    return ["block-influence", "logit-lens-kl", "lim", "zd",
            Response(any(item.each or item.transform == "narrow" for item in alternatives), drops, tables, POSITIONS,
                     shares, caches, order_V)]
