"""Estimating Time Series Foundation Model Transferability via In-Context Learning (TimeTic) (arXiv 2509.23695)

Claims: a table of known (data set, model, score after fine-tuning) rows, described by statistics of the data and by
the model's entropy over depth, lets an in-context learner rank models for unseen data; rank correlation about
0.6, about 30 % better than ranking by zero-shot error.

From the abstract and summaries; no code was found. Reconstructed: the entropy formula, its resampling to eight
depths, windows as rows, targets normalized within a data set. Ours: ten small forecasters of four families trained
on different drawn mixtures instead of ten foundation models, drawn data sets, 19 statistics instead of over 700,
chosen by likelihood instead of by the predictor's uncertainty, a Gaussian process instead of a pretrained tabular
model, whose weights cannot be had offline, and known models on unseen data alone, the first of the paper's settings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import kendalltau, spearmanr
from torch import Tensor

from layerwise.data.bootstrap import paired_interval
from layerwise.data.series import FEATURES, HELD_OUT, TRAINING, features, series, windows
from layerwise.measure.in_context import linear, nearest, predict, selected
from layerwise.measure.spectral_entropy import depth_profile
from layerwise.nets.forecasters import Family, Forecaster
from layerwise.systems.base import Check, Size
from layerwise.train.classify import seeded
from layerwise.train.loop import Recipe, train

CONTEXT, HORIZON, POINTS, GROUPS, CHOSEN = 64, 32, 8, 2, 4
ZOO: tuple[tuple[Family, int, tuple[str, ...]], ...] = (
    ("transformer", 2, ("seasonal",)), ("gru", 2, TRAINING), ("tcn", 3, ("chaotic",)), ("mixer", 4, TRAINING),
    ("transformer", 4, TRAINING), ("transformer", 8, ("autoregressive", "walk")), ("gru", 1, ("walk",)),
    ("tcn", 4, TRAINING), ("mixer", 2, ("seasonal", "autoregressive")), ("transformer", 2, ("chaotic",)))


@dataclass(frozen=True)
class Scale:
    """Models, data sets, horizons, steps of training and of tuning, windows of each data set."""

    models: int
    sets: int
    horizons: tuple[int, ...]
    steps: int
    tuning: int
    windows: int


SCALES: dict[Size, Scale] = {"quick": Scale(4, 4, (8,), 20, 10, 64),
                             "full": Scale(10, 12, (8, 16, 32), 400, 80, 256)}


@dataclass(frozen=True)
class Known:
    """For every data set D, group of windows G, model M and horizon H: what is described, and what was measured.

    `features_DGF`, `profile_DMGP`, mean absolute errors `zero_DMH` and `tuned_DMH`, parameters of models [M].
    """

    features_DGF: Tensor
    profile_DMGP: Tensor
    zero_DMH: Tensor
    tuned_DMH: Tensor
    sizes_M: Tensor

    def targets(self, horizon: int) -> Tensor:
        """Log errors after tuning in deviations from the mean of their data set, [D, M]."""
        logs_DM = self.tuned_DMH[..., horizon].log()
        return (logs_DM - logs_DM.mean(1, keepdim=True)) / logs_DM.std(1, keepdim=True).clamp(min=1e-9)


def run(size: Size, seed: int) -> list[Check]:
    """Train the zoo, tune every pair, and predict each data set from the others."""
    scale = SCALES[size]
    zoo = [_trained(place, scale, seed) for place in range(scale.models)]
    known = measured(zoo, HELD_OUT[: scale.sets], scale, seed)
    return judged(known, size, seed)


def _trained(place: int, scale: Scale, seed: int) -> Forecaster:
    family, depth, kinds = ZOO[place]
    model = seeded(lambda: Forecaster(family, depth, context=CONTEXT, horizon=HORIZON), seed + place)
    assert isinstance(model, Forecaster)
    text = torch.cat([series(kind, 1024 // len(kinds), CONTEXT + HORIZON, seed + 1) for kind in kinds])
    _fit(model, *windows(text, CONTEXT, HORIZON), HORIZON, Recipe(scale.steps, 32, 2e-3, seed=seed))
    return model


def _fit(model: Forecaster, past_NT: Tensor, ahead_NH: Tensor, horizon: int, recipe: Recipe) -> None:
    train(list(model.parameters()), lambda rows_B: F.l1_loss(model(past_NT[rows_B])[:, :horizon],
                                                             ahead_NH[rows_B, :horizon]),
          torch.arange(len(past_NT)), recipe)


@torch.no_grad()
def _error(model: Forecaster, past_NT: Tensor, ahead_NH: Tensor, horizon: int) -> float:
    return float(F.l1_loss(model(past_NT)[:, :horizon], ahead_NH[:, :horizon]))


def measured(zoo: Sequence[Forecaster], kinds: Sequence[str], scale: Scale, seed: int) -> Known:
    """Describe every data set and model, and tune every pair on half of the windows."""
    described, profiles, zero, tuned = [], [], [], []
    recipe = Recipe(scale.tuning, 32, 1e-3, seed=seed)
    for kind in kinds:
        past_NT, ahead_NH = windows(series(kind, 2 * scale.windows, CONTEXT + HORIZON, seed + 7), CONTEXT, HORIZON)
        seen, unseen = slice(0, scale.windows), slice(scale.windows, None)
        described.append(torch.stack([part.mean(0) for part in features(past_NT[seen]).chunk(GROUPS)]))
        with torch.no_grad():
            profiles.append(torch.stack([torch.stack([part.mean(0) for part in depth_profile(
                model.states(past_NT[seen]), POINTS).chunk(GROUPS)]) for model in zoo]))
        zero.append([[_error(model, past_NT[seen], ahead_NH[seen], h) for h in scale.horizons] for model in zoo])
        rows: list[list[float]] = []
        for model in zoo:
            rows.append([])
            for horizon in scale.horizons:
                pupil = copy.deepcopy(model)
                _fit(pupil, past_NT[seen], ahead_NH[seen], horizon, recipe)
                rows[-1].append(_error(pupil, past_NT[unseen], ahead_NH[unseen], horizon))
        tuned.append(rows)
    sizes = torch.tensor([float(sum(p.numel() for p in model.parameters())) for model in zoo])
    return Known(torch.stack(described), torch.stack(profiles), torch.tensor(zero), torch.tensor(tuned), sizes)


def table(known: Known, sets: Sequence[int], use: Sequence[str]) -> Tensor:
    """Rows [D, M, G, columns] of the data sets: the parts named in `use`."""
    profile = known.profile_DMGP[list(sets)]
    data = known.features_DGF[list(sets)][:, None].expand(-1, profile.shape[1], -1, -1)
    return torch.cat([{"profile": profile, "features": data}[part].double() for part in use], -1)


Learner = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Known rows, their scores and asked rows to the scores of these."""


def predicted(known: Known, target: int, targets_DM: Tensor, use: Sequence[str],
              learner: Learner = lambda x_NF, y_N, asked_MF: predict(x_NF, y_N, asked_MF).mean_M) -> Tensor:
    """Predicted scores of all models on one data set from all others, [M]; rows are averaged over windows."""
    others = [place for place in range(len(targets_DM)) if place != target]
    rows, asked = table(known, others, use), table(known, [target], use)
    y_DM = targets_DM[others]
    columns = list(range(rows.shape[-1]))
    if "features" in use:
        always = columns[: -len(FEATURES)]
        columns = selected(rows.mean(2).flatten(0, 1), y_DM.flatten(), always, CHOSEN)
    y_DMG = y_DM[..., None].expand(-1, -1, GROUPS)
    found_M = learner(rows[..., columns].flatten(0, 2), y_DMG.flatten(), asked[..., columns].flatten(0, 2))
    return found_M.view(-1, GROUPS).mean(1)


def rank(scores: Tensor, truth: Tensor, correlation: Callable[..., Any] = spearmanr) -> float:
    """Spearman's correlation, or another; 0 where the scores are all alike."""
    value = float(correlation(scores.numpy(), truth.numpy()).statistic) if float(scores.std()) > 1e-9 else 0.0
    return 0.0 if np.isnan(value) else value


def judged(known: Known, size: Size, seed: int) -> list[Check]:
    """Rank correlations and regret by way of predicting, per data set, averaged over horizons."""
    ways: dict[str, list[list[float]]] = {}
    lost: dict[str, list[float]] = {}
    kendall: list[float] = []
    generator = torch.Generator().manual_seed(seed)
    sets, models, horizons = known.tuned_DMH.shape
    for horizon in range(horizons):
        truth_DM = known.targets(horizon)
        mixed_DM = torch.stack([row[torch.randperm(models, generator=generator)] for row in truth_DM])
        for target in range(sets):
            others = [place for place in range(sets) if place != target]
            scores = {
                "TimeTic": predicted(known, target, truth_DM, ("profile", "features")),
                "without data features": predicted(known, target, truth_DM, ("profile",)),
                "without the entropy profile": predicted(known, target, truth_DM, ("features",)),
                "zero-shot error": known.zero_DMH[target, :, horizon],
                "mean past score": truth_DM[others].mean(0),
                "fewest parameters": known.sizes_M,
                "nearest rows": predicted(known, target, truth_DM, ("profile", "features"), nearest),
                "linear": predicted(known, target, truth_DM, ("profile", "features"), linear),
                "scores of other models": predicted(known, target, mixed_DM, ("profile", "features")),
            }
            for way, value in scores.items():
                ways.setdefault(way, [[] for _ in range(sets)])[target].append(rank(value, truth_DM[target]))
                lost.setdefault(way, []).append(float(truth_DM[target][value.argmin()] - truth_DM[target].min()))
            kendall.append(rank(scores["TimeTic"], truth_DM[target], kendalltau))
    by_set = {way: [mean(values) for values in rows] for way, rows in ways.items()}
    regret = {way: round(mean(values), 3) for way, values in lost.items()}
    return _checks({way: round(mean(values), 3) for way, values in by_set.items()}, by_set, regret,
                   round(mean(kendall), 3), size, seed)


def _checks(found: dict[str, float], by_set: dict[str, list[float]], regret: dict[str, float], kendall: float,
            size: Size, seed: int) -> list[Check]:
    gain = paired_interval(by_set["zero-shot error"], by_set["TimeTic"], seed=seed)
    told = size == "full"
    quick = "" if told else ". Quick has too few models and data sets"
    return [
        Check(
            name="models are ranked for unseen data",
            claim="leaving one data set out, the mean rank correlation with scores after tuning is above 0.3",
            measured={"TimeTic": found["TimeTic"], "by data set": [round(value, 2) for value in by_set["TimeTic"]],
                      "Kendall": kendall, "regret": regret["TimeTic"]},
            control={**{way: found[way] for way in ("scores of other models", "mean past score", "fewest parameters",
                                                    "nearest rows", "linear")},
                     "regret": {way: regret[way] for way in ("zero-shot error", "mean past score",
                                                             "scores of other models")}},
            holds=found["TimeTic"] > 0.3 if told else None,
            why="mean over data sets and horizons. The mean past score knows which model is which and nothing of the "
                "data; scores of other models are the same table with scores exchanged within each data set; nearest "
                "rows and linear read the whole table with a simpler learner. Regret is how much worse the model put "
                "first is than the best, in deviations of log error over models. Ten models and eleven known data "
                "sets are few rows for a table to tell from" + quick),
        Check(
            name="better than ranking by zero-shot error",
            claim="the gain in rank correlation over zero-shot error is positive, with an interval that excludes 0",
            measured={"gain": str(gain), "TimeTic": found["TimeTic"]},
            control={"zero-shot error": found["zero-shot error"]},
            holds=gain.low > 0 if told else None,
            why="bootstrap over data sets, 95 %; models are tuned on windows other than those that score them. "
                "Tuning is short, so that the error before it says most of the error after it" + quick),
        Check(
            name="both halves of the table are needed",
            claim="without the data features and without the entropy profile the rank correlation is lower",
            measured={way: found[way] for way in ("TimeTic", "without data features", "without the entropy profile")},
            control={"scores of other models": found["scores of other models"]},
            holds=max(found["without data features"], found["without the entropy profile"]) < found["TimeTic"]
            if told else None,
            why="without the profile all models look alike on one data set, so that no ranking is left (0); the test "
                "is whether the data features add to the profile" + quick),
    ]
