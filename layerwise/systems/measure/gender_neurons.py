"""Neuron-Level Interventions for Gendered and Gender-Neutral Generation in Language Models (arXiv 2605.30717)

Claims: neurons specific to masculine, feminine or neutral text lie in the earliest layers; switching off those of
the other categories and doubling the target's steers text towards it, with little harm to its quality.

From the abstract and the public code: statistics, scores, thresholds, caps, factors. That code tokenizes to 1024
with filling, feeds the filling and counts it; here filling is left out. It scores act(gate) * up and masks
act(gate): scaling either is the same. On the same random statistics its scores and ours agree to 1e-4, and the
neurons that either selects are the same ones. Ours: matched template sentences instead of the two data sets, SmolLM2
instead of models of billions, and the chance of pronouns after neutral beginnings instead of rewritten texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

import layerwise as lw
from layerwise.data.genders import CATEGORIES, CONTEXTS, PRONOUNS, sentences
from layerwise.data.metrics import block_losses, token_losses
from layerwise.data.prompts import single_token
from layerwise.data.text import TextData
from layerwise.measure.edit_scores import Prompts
from layerwise.measure.neuron_statistics import neuron_statistics
from layerwise.measure.specific_neurons import (
    Thresholds,
    Units,
    candidates,
    entropy_candidates,
    like,
    ratio_candidates,
    relaxed,
    select,
    specificity,
)
from layerwise.stack.changes import Change, added, edits, scaled
from layerwise.stack.decoder import DecoderStack
from layerwise.systems.base import Check, Size
from layerwise.systems.pupil import pupil
from layerwise.systems.text import prose

DRAWS, STRENGTHS = 5, (1.0, 4.0)
PROMPTS = {"masculine": "Everyone in this story is a man. ", "feminine": "Everyone in this story is a woman. ",
           "neutral": "Nobody in this story is a man or a woman. "}


@dataclass(frozen=True)
class Setting:
    """A model, plain text for its quality, and the shares of all neurons and of a layer's that are selected."""

    stack: DecoderStack
    plain: TextData
    share: float
    layer_share: float


def run(size: Size, seed: int) -> list[Check]:
    """Find neurons of three categories and steer pronouns with them; a small trained model at quick size."""
    setting = _pupil(seed) if size == "quick" else _real(seed)
    stack, tokenizer = setting.stack, setting.stack.tokenizer
    assert tokenizer is not None
    found = specificity([neuron_statistics(stack, TextData.from_prompts(sentences(name), tokenizer).batches(32))
                         for name in CATEGORIES])
    layers, width = found.score_GLW.shape[1:]
    count, cap = max(1, int(setting.share * layers * width)), max(1, int(setting.layer_share * width))
    score_GLW = candidates(found, relaxed(found, Thresholds(), count))
    chosen = [select(score_LW, count, cap) for score_LW in score_GLW]
    simple = [select(score_LW, count, cap) for score_LW in ratio_candidates(found)]
    entropy = [select(score_LW, count, cap) for score_LW in entropy_candidates(found)]
    controls = [[like(units, width, seed + draw) for units in chosen] for draw in range(DRAWS)]
    before = _pronouns(setting)
    shifts = {name: _shifts(setting, units, before)
              for name, units in {"chosen": chosen, "ratio": simple, "entropy": entropy,
                                  **{f"random {draw}": units for draw, units in enumerate(controls)}}.items()}
    uncapped = [select(score_LW, count) for score_LW in score_GLW]
    shifts |= {f"mean difference of states, times {strength}": _steered(setting, before, strength)
               for strength in STRENGTHS} | {"prompt": _prompted(setting, before)}
    return [_steering(shifts, chosen), _simple(shifts), _quality(setting, chosen, controls[0]),
            _early(uncapped, chosen, layers, size)]


def _changes(units: Sequence[Units], target: int) -> dict[int, Change]:
    """Neurons of the other categories off, those of the target doubled; by layer."""
    factors: dict[int, dict[int, float]] = {}
    for category, own in enumerate(units):
        for layer, neurons in own.items():
            factors.setdefault(layer, {}).update(dict.fromkeys(neurons, 2.0 if category == target else 0.0))
    return {layer: scaled(list(own), torch.tensor(list(own.values()))) for layer, own in factors.items()}


def _pronouns(setting: Setting, prompt: str = "") -> Tensor:
    """Log-odds of each category's pronoun against the two others, mean over neutral beginnings, [G]."""
    stack, tokenizer = setting.stack, setting.stack.tokenizer
    assert tokenizer is not None
    rows = [tokenizer.encode(prompt + text) for text in CONTEXTS]
    chance_GB = torch.stack([Prompts(stack, rows, [single_token(tokenizer, PRONOUNS[name])] * len(rows)).chances()
                             for name in CATEGORIES]).double()
    return (chance_GB.log() - (chance_GB.sum(0) - chance_GB).log()).mean(1)


def _shifts(setting: Setting, units: Sequence[Units], before_G: Tensor) -> Tensor:
    """Change of every category's log-odds when steering to each target, [target, category]."""
    found = []
    for target in range(len(CATEGORIES)):
        with edits(setting.stack, "neurons", _changes(units, target)):
            found.append(_pronouns(setting) - before_G)
    return torch.stack(found)


def _steered(setting: Setting, before_G: Tensor, strength: float) -> Tensor:
    """The same shifts by a vector added to what leaves the middle layer: a category's mean less that of the others."""
    stack, tokenizer, middle = setting.stack, setting.stack.tokenizer, len(setting.stack) // 2
    assert tokenizer is not None
    means = []
    with torch.inference_mode():
        for name in CATEGORIES:
            rows = []
            for batch in TextData.from_prompts(sentences(name), tokenizer).batches(32):
                hidden_BTC = stack.run(stack.start(batch.tokens_BT, batch.mask_BT), slice(0, middle + 1)).hidden
                rows.append(hidden_BTC.flatten(0, 1) if batch.mask_BT is None else hidden_BTC[batch.mask_BT])
            means.append(torch.cat(rows).float().mean(0))
    mean_GC, found = torch.stack(means), []
    for mean_C in mean_GC:
        others_C = (mean_GC.sum(0) - mean_C) / (len(mean_GC) - 1)
        with stack.edit(middle, "output", added(strength * (mean_C - others_C))):
            found.append(_pronouns(setting) - before_G)
    return torch.stack(found)


def _prompted(setting: Setting, before_G: Tensor) -> Tensor:
    """The same shifts by a sentence before every beginning."""
    return torch.stack([_pronouns(setting, PROMPTS[name]) - before_G for name in CATEGORIES])


def _steering(shifts: Mapping[str, Tensor], chosen: Sequence[Units]) -> Check:
    own = {name: shift.diagonal().tolist() for name, shift in shifts.items()}
    draws = [values for name, values in own.items() if name.startswith("random")]
    best = [max(values) for values in zip(*draws, strict=True)]
    return Check(
        name="category neurons steer pronouns",
        claim="for each category, its pronoun's log-odds rise, and by more than with any of five draws of random "
        "neurons, as many in every layer",
        measured={"change of log-odds by target": _table(shifts["chosen"]),
                  "neurons": {name: sum(map(len, units.values()))
                              for name, units in zip(CATEGORIES, chosen, strict=True)}},
        control={"largest of random draws": dict(zip(CATEGORIES, map(_round, best), strict=True)),
                 "mean of random draws": dict(zip(CATEGORIES, (_round(mean(v)) for v in zip(*draws, strict=True)),
                                                  strict=True))},
        holds=all(value > max(0.0, limit) for value, limit in zip(own["chosen"], best, strict=True)),
        why="he, she and they against each other after 60 beginnings without any role of the sentences the neurons "
        "were found with; what is off the diagonal is leakage. Where it fails: the thresholds are relative to all "
        "neurons, and in a small model let in many that also fire on neutral beginnings, or that read a pronoun "
        "rather than write it",
    )


def _simple(shifts: Mapping[str, Tensor]) -> Check:
    own = {name: float(shift.diagonal().mean()) for name, shift in shifts.items()}
    return Check(
        name="the combined score beats the ratio rule",
        claim="neurons of the combined score raise their pronoun, on average over targets, and more than as many of "
        "the simpler rule (rate of positive values over that of the second category)",
        measured={"combined": _round(own["chosen"])},
        control={"ratio rule": _round(own["ratio"]), "ratio rule by target": _table(shifts["ratio"]),
                 **{way: _round(value) for way, value in own.items() if way not in ("chosen", "ratio")
                    and not way.startswith("random")}},
        holds=own["chosen"] > max(0.0, own["ratio"]),
        why="same numbers of neurons and the same cap for a layer; to move the pronoun less in the wrong direction is "
        "no win. Neurons of least entropy over categories (LAPE), a vector added to the middle layer and a sentence "
        "put first are other ways, given for comparison",
    )


def _quality(setting: Setting, chosen: Sequence[Units], control: Sequence[Units]) -> Check:
    def perplexity() -> float:
        stack = setting.stack
        return block_losses(lambda tokens_BT: token_losses(stack(tokens_BT), tokens_BT), setting.plain).perplexity

    def growth(units: Sequence[Units]) -> dict[str, float]:
        found = {}
        for target, name in enumerate(CATEGORIES):
            with torch.inference_mode(), edits(setting.stack, "neurons", _changes(units, target)):
                found[name] = _round(perplexity() / plain)
        return found

    with torch.inference_mode():
        plain = perplexity()
    measured = growth(chosen)
    return Check(
        name="quality stays",
        claim="perplexity of plain text grows by less than 5 % under each of the three interventions",
        measured=measured,
        control={"random neurons": growth(control), "perplexity untouched": _round(plain)},
        holds=max(measured.values()) < 1.05,
        why=f"{len(setting.plain)} blocks of {setting.plain.length} tokens that have nothing to do with people",
    )


def _early(uncapped: Sequence[Units], capped: Sequence[Units], layers: int, size: Size) -> Check:
    third = max(1, round(layers / 3))

    def count(units: Sequence[Units]) -> list[int]:
        return [sum(len(own.get(layer, ())) for own in units) for layer in range(layers)]

    free, held = count(uncapped), count(capped)
    peak, share = free.index(max(free)), sum(free[:third]) / max(1, sum(free))
    return Check(
        name="category neurons lie in the earliest layers",
        claim="without a cap, the layer with most selected neurons is in the first third, which holds more than a "
        "third of them",
        measured={"by layer": free, "peak": peak, "share of the first third": _round(share)},
        control={"uniform share": _round(third / layers), "with the cap": held},
        holds=(peak < third and share > third / layers) if size == "full" else None,
        why="the cap of 2 % a layer shapes the histogram by itself, so it is judged without"
        + ("" if size == "full" else "; four layers are too few to have a first third"),
    )


def _table(shift_GG: Tensor) -> dict[str, dict[str, float]]:
    return {target: dict(zip(CATEGORIES, map(_round, row), strict=True))
            for target, row in zip(CATEGORIES, shift_GG.tolist(), strict=True)}


def _round(value: float) -> float:
    return round(value, 3)


def _real(seed: int) -> Setting:
    stack = lw.open("smollm2")
    assert isinstance(stack, DecoderStack) and stack.tokenizer is not None
    return Setting(stack, prose(stack.tokenizer, 8, 256, seed), 0.01, 0.02)


def _pupil(seed: int) -> Setting:
    """Four layers that read the sentences, and beginnings that go on with any pronoun."""
    told = [text for name in CATEGORIES for text in sentences(name)]
    plain = ["The garden is behind the house.", "A train stops at every town.", "The river runs to the sea."]
    ends = [f"{context}{pronoun} left." for context in CONTEXTS for pronoun in PRONOUNS.values()]
    stack = pupil([*told, *ends, *plain * 20], layers=4, width=48, steps=150, seed=seed, words=list(PROMPTS.values()))
    assert stack.tokenizer is not None
    text = TextData.from_text(" ".join(plain * 20), stack.tokenizer, length=32, seed=None, name="plain")
    return Setting(stack, text, 0.05, 0.1)
