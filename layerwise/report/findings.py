"""What the columns of a profile say, in sentences, with those that are uncertain marked as such.

Only columns that are there are spoken of: no sentence rests on anything else.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from layerwise.measure.scores import Column, Scores
from layerwise.report.table import size
from layerwise.spec import StateSpace

TRIED = ("leave-one-out", "skip-effect")
"""Columns that try a layer's absence, what it costs in loss first."""
FEED_FORWARD = frozenset(("gate", "up", "down"))
FEW = 3
AGREE = 0.5
"""Rank correlation from which two instruments count as telling the same story."""
EMERGED = 0.5
KNOWN = 0.1
"""Mean chance of the right answers below which a kind of fact counts as hardly known."""


@dataclass(frozen=True)
class Finding:
    """One sentence or two. `sure` is False where the instruments contradict one another."""

    text: str
    sure: bool = True


def findings(scores: Scores) -> list[Finding]:
    """Which layers carry the model, which could go, where facts of what kind are written and the prediction forms,
    where bytes, time and energy go, and how far from the hardware's limit layers run."""
    return [*_importance(scores), *_knowledge(scores), *_kinds(scores), *_emergence(scores), *_settled(scores),
            *_bits(scores), *_bytes(scores), *_time(scores), *_energy(scores), *_roofline(scores)]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's correlation of two columns over layers where both are known; nan where there is none."""
    known = [(x, y) for x, y in zip(a, b, strict=True) if not (math.isnan(x) or math.isnan(y))]
    if len(known) < FEW or any(len(set(side)) < 2 for side in zip(*known, strict=True)):
        return math.nan
    from scipy.stats import spearmanr

    return float(spearmanr(*zip(*known, strict=True)).statistic)


def ranking_columns(scores: Scores) -> list[Column]:
    """Columns that say which layers are important, measured ones first."""
    columns = [column for column in scores.columns.values() if column.important]
    return sorted(columns, key=lambda column: TRIED.index(column.name) if column.name in TRIED else len(TRIED))


def _importance(scores: Scores) -> Iterator[Finding]:
    columns = [column for column in ranking_columns(scores) if any(value == value for value in column.values)]
    if _asked(scores) & set(TRIED) and len(scores.spec.rows) > 1 and not any(c.name in TRIED for c in columns):
        yield Finding("No layer can be taken away: the output of each has another shape than its input.")
    if not columns:
        return
    main = next((column for column in columns if column.name in (*TRIED, "block-influence")), columns[0])
    order = [layer for layer in main.ranking() if not math.isnan(main.values[layer])]
    few = min(FEW, len(order) // 2)
    if not few:
        return
    if main.name == "leave-one-out" and main.values[order[-1]] <= 0:
        yield Finding("Without any one of the layers the loss is no higher: on this data none of them helps, and which "
                      "could go cannot be told.", sure=False)
        return
    most, least = order[: -few - 1 : -1], order[:few]
    kind = "taking each away" if main.name in TRIED else f"{main.name}, which does not try it"
    carry = "carries" if few == 1 else "carry"
    yield Finding(f"By {kind}, {_layers(most)} {carry} most of the model, and {_layers(least)} could go first.",
                  sure=main.name in TRIED)
    kept = [layer for layer, value in enumerate(main.values) if math.isnan(value)]
    if kept and not scores.spec.vocabulary:
        yield Finding(f"Nothing of this is known of {_layers(kept)}, whose output has another shape than the input: "
                      "such a layer cannot be taken away.")
    others = {column.name: rank_correlation(_signed(main), _signed(column))
              for column in columns if column.name != main.name and ":" not in column.name}
    against = sorted((name for name, value in others.items() if value < AGREE), key=lambda name: others[name])
    if against:
        said = ", ".join(f"{name} {others[name]:+.2f}" for name in against[:4])
        yield Finding(f"{len(against)} of {len(others)} other instruments order the layers differently "
                      f"(rank correlation with {main.name}: {said}).", sure=False)
    elif others:
        yield Finding(f"All {len(others)} other instruments order the layers much the same way.")


def _asked(scores: Scores) -> set[str]:
    """The names of all instruments that were run; one whose trials were all impossible has no column."""
    parts = scores.provenance.get("merged", [scores.provenance])
    return {instrument["name"] for part in parts for instrument in part.get("instruments", [])}


def _knowledge(scores: Scores) -> Iterator[Finding]:
    """Where facts of each kind are written, and whether the kinds lie apart."""
    kinds = {name.removeprefix("knowledge:"): column for name, column in scores.columns.items()
             if name.startswith("knowledge:")}
    if kinds and all(math.isnan(value) for column in kinds.values() for value in column.values):
        yield Finding("Where facts are written is not said: that is found by leaving out feed-forward halves, and no "
                      "layer has one.")
        return
    said, poor = [], []
    chances = scores.provenance.get("knowledge", {})
    for kind, column in kinds.items():
        known = sorted(((value, layer) for layer, value in enumerate(column.values) if layer and not math.isnan(value)),
                       reverse=True)
        if len(known) >= FEW:
            said.append(f"{kind} {_layers([layer for _, layer in known[:FEW]])} ({known[0][0]:.2g} nats at layer "
                        f"{known[0][1]}, chance of the answer {chances.get(kind, math.nan):.0%})")
            poor += [kind] if chances.get(kind, 0.0) < KNOWN else []
    if not said:
        return
    yield Finding(f"Facts are lost most without the feed-forward halves at their subjects in: {'; '.join(said)}. "
                  "Layer 0, without which no token is what it was, is left out.")
    if poor:
        yield Finding(f"The model hardly knows {', '.join(poor)}: the layers said to hold them are a guess.",
                      sure=False)
    pairs = [rank_correlation(a.values, b.values) for a, b in itertools.combinations(kinds.values(), 2)]
    if pairs:
        apart = statistics.fmean(pairs)
        yield Finding(f"Kinds of facts share their layers with a mean rank correlation of {apart:+.2f}"
                      + (", so that no kind has layers of its own." if apart >= AGREE else
                         ": which layers hold what depends on the kind."), sure=abs(apart - AGREE) > 0.2)


def _kinds(scores: Scores) -> Iterator[Finding]:
    """Where the context is read and where what is stored in weights is written: by the size of what each half adds."""
    halves = {half: f"relative-contribution:{half}" for half in ("attention", "feed-forward")}
    if any(name not in scores for name in halves.values()) or len(scores.spec.rows) < 2 * FEW:
        return
    most = {}
    for half, name in halves.items():
        known = [(value, layer) for layer, value in enumerate(scores[name].values) if layer and not math.isnan(value)]
        most[half] = [layer for value, layer in sorted(known, reverse=True)[:FEW] if value > 0]
    if all(most.values()):
        mixer = "attention or state space" if _recurrent(scores) else "attention"
        yield Finding(
            f"What the context says is written most in {_layers(most['attention'])} ({mixer}), what is stored in "
            f"weights most in {_layers(most['feed-forward'])} (feed-forward), beside what is there already; layer 0, "
            "which writes on bare embeddings, is left out. Size alone does not say which facts these are.", sure=False)


def _emergence(scores: Scores) -> Iterator[Finding]:
    if "logit-lens-overlap" not in scores:
        return
    values = scores["logit-lens-overlap"].values
    first = next((layer for layer, value in enumerate(values) if value >= EMERGED), None)
    if first is None:
        yield Finding("The final prediction forms in the last layer: before it, less than half of the likeliest "
                      "tokens are there.")
    elif first == 0:
        yield Finding("Half of the likeliest tokens can be read off the embedding already: where the head is the "
                      "embedding, that is the token itself.", sure=False)
    else:
        yield Finding(f"The prediction takes shape at layer {first} of {len(values)}: from its input on, at least "
                      "half of the finally likeliest tokens can be read off the residual stream.")


def _settled(scores: Scores) -> Iterator[Finding]:
    if "tuned-lens:settled" not in scores:
        return
    values = scores["tuned-lens:settled"].values
    first = next((layer for layer, value in enumerate(values) if value >= EMERGED), None)
    place = f"from the input of layer {first} of {len(values)} on" if first is not None else "only in the last layer"
    yield Finding(f"Read through affine maps, the likeliest token no longer changes {place}, at half of the "
                  "positions or more.")


def _bits(scores: Scores) -> Iterator[Finding]:
    widths = {int(name.split(":")[1]): column for name, column in scores.columns.items()
              if name.startswith("quantization-sensitivity:") and name.split(":")[1].isdigit()}
    if not widths:
        return
    narrow = min(widths)
    order = widths[narrow].ranking()
    known = [layer for layer in order if not math.isnan(widths[narrow].values[layer])]
    few = min(FEW, len(known) // 2)
    if few:
        verb = "suffers" if few == 1 else "suffer"
        yield Finding(f"In {narrow} bits {_layers(known[: -few - 1 : -1])} {verb} most, {_layers(known[:few])} least.")


def _bytes(scores: Scores) -> Iterator[Finding]:
    spec = scores.spec
    total = spec.bytes()
    if not total:
        return
    if not spec.vocabulary:
        rows = [row.bytes(spec.hidden, spec.dtype) for row in spec.rows]
        most = max(range(len(rows)), key=rows.__getitem__)
        yield Finding(f"Of {size(total)}, the layers hold {sum(rows) / total:.0%}, the rest lies outside them; "
                      f"layer {most} is the largest with {rows[most] / total:.0%}.")
        return
    tables = spec.embedding_bytes() + spec.head_bytes()
    held = {"attention": 0.0, "the state spaces": 0.0, "the feed-forward halves": 0.0}
    for row in spec.rows:
        mixer = "the state spaces" if isinstance(row.mixer, StateSpace) else "attention"
        for name, count in row.matrix_bytes(spec.hidden, spec.dtype).items():
            held["the feed-forward halves" if name in FEED_FORWARD else mixer] += count
    parts = [f"the token tables hold {tables / total:.0%}",
             *(f"{part} {count / total:.0%}" for part, count in held.items() if count)]
    yield Finding(f"Of {size(total)}, {', '.join(parts[:-1])} and {parts[-1]}.")


def _time(scores: Scores) -> Iterator[Finding]:
    batch = "a prompt" if scores.spec.vocabulary else "the first batch"
    for name, what in (("cost:prefill-ms", batch), ("cost:decode-ms", "one token")):
        if name not in scores:
            continue
        values = [value for value in scores[name].values if not math.isnan(value)]
        if len(values) < 2:
            continue
        slowest, middle = max(values), statistics.median(values)
        layer = scores[name].values.index(slowest)
        even = slowest < 1.5 * middle
        yield Finding(f"For {what} the layers take {sum(values):.1f} ms together, "
                      + (f"each about {middle:.2f} ms." if even
                         else f"{middle:.2f} ms in the middle; layer {layer} takes {slowest:.2f} ms."))


def _energy(scores: Scores) -> Iterator[Finding]:
    if "energy:prompt" not in scores:
        return
    totals = {part: [value for value in scores[f"energy:{part}"].values if not math.isnan(value)]
              for part in ("prompt", "decode") if f"energy:{part}" in scores}
    if not totals["prompt"]:
        return
    values = scores["energy:prompt"].values
    most = max((layer for layer, value in enumerate(values) if not math.isnan(value)), key=values.__getitem__)
    written = f", one that is written {sum(totals['decode']):.2g} mJ" if totals.get("decode") else ""
    total = sum(totals["prompt"])
    one = "a token that is read" if scores.spec.vocabulary else "a place (a token, or a pixel of the map)"
    yield Finding(f"By a model of energy (no meter), {one} costs {total:.2g} mJ in all layers{written}; "
                  f"of reading, layer {most} takes {values[most] / total:.0%}.", sure=False)


def _roofline(scores: Scores) -> Iterator[Finding]:
    batch = "Reading a prompt" if scores.spec.vocabulary else "On the first batch"
    for name, what in (("roofline:attained", batch), ("roofline:decode-attained", "Writing one token")):
        if name not in scores:
            continue
        values = [value for value in scores[name].values if not math.isnan(value)]
        if values:
            worst = scores[name].values.index(min(values))
            yield Finding(f"{what}, layers run at {100 * min(values):.2g} to {100 * max(values):.2g} % of what "
                          f"this machine's arithmetic and memory allow; layer {worst} is furthest from it.")


def _recurrent(scores: Scores) -> bool:
    return any(isinstance(row.mixer, StateSpace) for row in scores.spec.rows)


def _signed(column: Column) -> list[float]:
    return [value if column.important == "high" else -value for value in column.values]


def _layers(layers: Sequence[int]) -> str:
    names = [str(layer) for layer in sorted(layers)]
    return f"layer {names[0]}" if len(names) == 1 else f"layers {', '.join(names[:-1])} and {names[-1]}"
