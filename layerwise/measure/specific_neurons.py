"""Neurons that belong to one category of text: scored, filtered, given to their best category, and capped by layer.

For neuron i and category g against all other categories together, with r the rate of positive values:

    e = relu((mean_g - mean_r) / sqrt((var_g + var_r) / 2 + 1e-4))     effect size
    o = relu(logit r_g - logit r_r), rates within [1e-4, 1 - 1e-4]     log-odds
    m = relu((mean_g - mean_r) / (|mean_r| + 0.01))                    relative mean
    s = 0.45 e + 0.35 o + 0.20 m, each standardised over all neurons of the category

Source: arXiv 2605.30717 and its public code. The same finds neurons of a language, a domain or a task.

Shapes: G categories, L layers, W neurons of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerwise.errors import BadData
from layerwise.measure.neuron_statistics import NeuronStatistics

SMALL = 1e-4
Units = dict[int, list[int]]
"""Neuron indices by layer; layers without any are left out."""


@dataclass(frozen=True)
class Thresholds:
    """What a neuron needs: a rate, standardised effect and log-odds, and a lead over its second-best category."""

    rate: float = 0.08
    effect: float = 0.5
    odds: float = 0.7
    lead: float = 0.4

    def relaxed(self) -> Thresholds:
        """A tenth lower, with floors."""
        return replace(self, rate=max(0.01, 0.9 * self.rate), effect=max(0.1, 0.9 * self.effect),
                       odds=max(0.1, 0.9 * self.odds), lead=max(0.1, 0.9 * self.lead))


@dataclass(frozen=True)
class Specificity:
    """Standardised scores by category, and each one's rate of positive values, all [G, L, W]."""

    score_GLW: Tensor
    effect_GLW: Tensor
    odds_GLW: Tensor
    rate_GLW: Tensor


def specificity(categories: Sequence[NeuronStatistics]) -> Specificity:
    """Scores of every neuron for every category against the rest. Raises BadData for a single category."""
    if len(categories) < 2:
        raise BadData(f"{len(categories)} category", expected="two or more to tell apart", do="give more labels")
    parts = []
    for index, own in enumerate(categories):
        rest = [other for place, other in enumerate(categories) if place != index]
        parts.append(_compared(own, sum(rest[1:], rest[0])))
    effect, odds, relative, rate = (torch.stack(part) for part in zip(*parts, strict=True))
    effect, odds, relative = map(_standardised, (effect, odds, relative))
    return Specificity(0.45 * effect + 0.35 * odds + 0.20 * relative, effect, odds, rate)


def _compared(own: NeuronStatistics, rest: NeuronStatistics) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    difference = own.mean_LW - rest.mean_LW
    spread = (own.variance_LW.clamp(min=SMALL) + rest.variance_LW.clamp(min=SMALL)) / 2
    rate, rest_rate = (side.rate_LW.clamp(SMALL, 1 - SMALL) for side in (own, rest))
    return (torch.relu(difference / (spread + SMALL).sqrt()), torch.relu(rate.logit() - rest_rate.logit()),
            torch.relu(difference / (rest.mean_LW.abs() + 0.01)), rate)


def _standardised(value_GLW: Tensor) -> Tensor:
    flat = value_GLW.flatten(1)
    mean, deviation = flat.mean(1)[:, None, None], flat.std(1).clamp(min=SMALL)[:, None, None]
    return (value_GLW - mean) / deviation


def candidates(found: Specificity, wanted: Thresholds) -> Tensor:
    """Score of each neuron for the one category it belongs to, zero for the others and where it fails, [G, L, W]."""
    keep = (found.rate_GLW >= wanted.rate) & (found.effect_GLW >= wanted.effect) & (found.odds_GLW >= wanted.odds)
    score_GLW = torch.where(keep, found.score_GLW, torch.zeros_like(found.score_GLW))
    best, second = score_GLW.topk(2, dim=0).values
    return torch.where((score_GLW == best) & (best > 0) & (best - second >= wanted.lead), score_GLW, 0.0)


def ratio_candidates(found: Specificity, ratio: float = 1.1, rate: float = 0.02) -> Tensor:
    """The simpler rule: rate of the best category over that of the second, where both bounds are met, [G, L, W]."""
    best, second = found.rate_GLW.topk(2, dim=0).values
    ratio_LW = best / (second + 1e-8)
    keep = (found.rate_GLW == best) & (best >= rate) & (ratio_LW >= ratio)
    return torch.where(keep, ratio_LW.expand_as(found.rate_GLW), 0.0)


def entropy_candidates(found: Specificity, rate: float = 0.02) -> Tensor:
    """LAPE (arXiv 2402.16438): log G less the entropy of a neuron's rates over categories, for its best category where
    that rate reaches `rate`, zero elsewhere, [G, L, W]."""
    share_GLW = found.rate_GLW / found.rate_GLW.sum(0).clamp(min=SMALL)
    entropy_LW = -(share_GLW * share_GLW.clamp(min=1e-12).log()).sum(0)
    best_LW = found.rate_GLW.amax(0)
    keep = (found.rate_GLW == best_LW) & (best_LW >= rate)
    return torch.where(keep, (math.log(len(share_GLW)) - entropy_LW).clamp(min=0).expand_as(share_GLW), 0.0)


def relaxed(found: Specificity, wanted: Thresholds, least: int, rounds: int = 20) -> Thresholds:
    """`wanted`, lowered until every category has `least` candidates, at most `rounds` times."""
    for _ in range(rounds):
        if int((candidates(found, wanted) > 0).flatten(1).sum(1).min()) >= least:
            break
        wanted = wanted.relaxed()
    return wanted


def select(score_LW: Tensor, count: int, per_layer: int | None = None) -> Units:
    """The `count` neurons of highest positive score, at most `per_layer` of any layer."""
    width = score_LW.shape[1]
    chosen: Units = {}
    left = count
    for index in score_LW.flatten().argsort(descending=True, stable=True).tolist():
        layer, neuron = divmod(index, width)
        if not left or float(score_LW[layer, neuron]) <= 0:
            break
        if per_layer is None or len(chosen.get(layer, ())) < per_layer:
            chosen.setdefault(layer, []).append(neuron)
            left -= 1
    return {layer: sorted(chosen[layer]) for layer in sorted(chosen)}


def like(units: Units, width: int, seed: int) -> Units:
    """Random neurons, as many of each layer as `units` has: the control."""
    generator = torch.Generator().manual_seed(seed)
    return {layer: sorted(torch.randperm(width, generator=generator)[: len(chosen)].tolist())
            for layer, chosen in units.items()}
