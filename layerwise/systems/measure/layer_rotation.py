"""Layer rotation: a surprisingly powerful indicator of generalization in deep networks? (arXiv 1806.01603v2)

Claims: on five image tasks test accuracy rises with every layer's final cosine distance from its initial weights and
is best where all layers reach about 1; configurations of equal training accuracy differ by up to 30 points. Learning
rates and adaptive optimizers act through this quantity.

From the official code: the distance, the controller's operations and the rates by layer; on the same random weights
and updates one turn differs from that code's by 2e-7. Differences found: an update of zero gives it weights that are
not numbers, and one along the weight turns it by the noise of rounding, where ours stay; it multiplies by the
learning rate once in the update and again in the turn (which normalising cancels). Ours: a six-layer perceptron with
batch norm on a few drawn digits, initial weights as in the paper (He-uniform, no biases), linear decay instead of
late steps; none of the five tasks themselves, nor what a first layer of one hidden layer learns of MNIST.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from scipy.stats import spearmanr
from torch import nn

from layerwise.data.glyphs import glyphs
from layerwise.data.labelled import Labelled
from layerwise.measure.training import Rotation
from layerwise.nets.classifiers import mlp
from layerwise.systems.base import Check, Size
from layerwise.train.classify import accuracy, fit, seeded
from layerwise.train.layca import Layca, rates
from layerwise.train.loop import Optimizer, Recipe

ALPHAS = (-0.6, 0.0, 0.6)
LAYERS, DECAY = 6, 1e-3


@dataclass(frozen=True)
class Trained:
    """One run: how it was trained, accuracy on its own and on other data, and each layer's rotation."""

    how: str
    seed: int
    train: float
    test: float
    turns: tuple[float, ...]

    def shown(self) -> dict[str, object]:
        return {"how": self.how, "test": self.test, "train": self.train, "rotation": [round(t, 2) for t in self.turns]}


def run(size: Size, seed: int) -> list[Check]:
    """A grid of controlled runs, and runs of ordinary optimizers; rotation against test accuracy."""
    quick = size == "quick"
    exponents, seeds, steps = ((5, 3), 1, 100) if quick else ((6, 5, 4, 3, 2), 3, 400)
    controlled = [train(f"alpha {alpha:g}, rho 3^-{e}", _layca(alpha, 3.0**-e), s, steps)
                  for s in range(seed, seed + seeds) for alpha in ALPHAS for e in exponents]
    ordinary = [train(how, optimizer, s, steps) for s in range(seed, seed + seeds)
                for how, optimizer in _ordinary(quick)]
    return [_correlation("rotation predicts accuracy", controlled, size, seed),
            _best(controlled, size), _balance(controlled, size),
            _correlation("ordinary optimizers act through rotation", ordinary, size, seed)]


def train(how: str, optimizer: Optimizer, seed: int, steps: int) -> Trained:
    """A fresh network trained on 300 digits (30 a class), tested on 2,000 others."""
    data, test = glyphs(300, 10 * seed + 1, side=12), glyphs(2000, 10 * seed + 2, side=12)
    net = seeded(_network, seed)
    rotation = Rotation(net, every=steps)
    fit(net, data, Recipe(steps, batch=100, learning_rate=1.0, seed=seed), optimizer=optimizer, after=[rotation])
    _calibrate(net, data)
    return Trained(how, seed, round(accuracy(net, data), 4), round(accuracy(net, test), 4),
                   tuple(rotation.curve[-1][1]))


def _network() -> nn.Module:
    net = mlp((144, *[128] * (LAYERS - 1), 10), bias=False, norm=True)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    return net


def _calibrate(net: nn.Module, data: Labelled) -> None:
    """Batch norms take the statistics of the whole training set."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        norm.momentum = 1.0
    net.train()
    with torch.no_grad():
        net(data.x_N)
    net.eval()


def _layca(alpha: float, rho: float) -> Optimizer:
    return lambda parameters, _: Layca(parameters, rates(len(parameters), rho, alpha))


def _ordinary(quick: bool) -> list[tuple[str, Optimizer]]:
    def sgd(rate: float) -> Optimizer:
        return lambda parameters, _: torch.optim.SGD(parameters, lr=rate)

    def decayed(rate: float) -> Optimizer:
        return lambda parameters, _: torch.optim.SGD(parameters, lr=rate, weight_decay=DECAY)

    def adam(rate: float) -> Optimizer:
        return lambda parameters, _: torch.optim.Adam(parameters, lr=rate)

    def rms(rate: float) -> Optimizer:
        return lambda parameters, _: torch.optim.RMSprop(parameters, lr=rate)

    exponents: Sequence[int] = (1, 3) if quick else (0, 1, 2, 3)
    makers: dict[str, Callable[[float], Optimizer]] = {
        "SGD": sgd, "SGD with decay": decayed, "Adam": adam, "RMSprop": rms}
    first = {"SGD": 3.0, "SGD with decay": 3.0, "Adam": 0.03, "RMSprop": 0.03}
    return [(f"{name} at {first[name] * 4.0**-e:g}", make(first[name] * 4.0**-e))
            for name, make in makers.items() for e in exponents]


def _fitted(runs: Sequence[Trained]) -> list[Trained]:
    return [found for found in runs if found.train > 0.99]


def _spearman(values: Sequence[float], runs: Sequence[Trained]) -> float | None:
    if len(set(values)) < 2 or len({found.test for found in runs}) < 2:
        return None
    return round(float(spearmanr(values, [found.test for found in runs]).statistic), 3)


def _correlation(name: str, runs: Sequence[Trained], size: Size, seed: int) -> Check:
    fitted = _fitted(runs)
    mixed = random.Random(seed).sample([mean(found.turns) for found in fitted], len(fitted))
    by_mean = _spearman([mean(found.turns) for found in fitted], fitted)
    return Check(
        name=name,
        claim="among runs with training accuracy above 0.99 the rank correlation of mean final rotation and test "
        "accuracy is above 0.5",
        measured={"by mean over layers": by_mean, "by least of all layers":
                  _spearman([min(found.turns) for found in fitted], fitted), "fitted runs": len(fitted),
                  "all runs": len(runs), "runs of the first seed": [r.shown() for r in runs if r.seed == seed]},
        control={"rotations shuffled": _spearman(mixed, fitted),
                 "all runs, fitted or not": _spearman([mean(found.turns) for found in runs], runs)},
        holds=None if size == "quick" or by_mean is None or len(fitted) < 8 else by_mean > 0.5,
        why="runs of all seeds together, so data and start differ as well. Cannot tell with fewer than eight fitted "
        "runs",
    )


def _best(runs: Sequence[Trained], size: Size) -> Check:
    fitted = _fitted(runs) or runs
    best, worst = (choose(fitted, key=lambda found: found.test) for choose in (max, min))
    return Check(
        name="the best run has turned all layers",
        claim="in the run with the best test accuracy among those with training accuracy above 0.99 every layer has "
        "turned by at least 0.8",
        measured=best.shown(),
        control={"worst of them": worst.shown(), "share of runs with all layers at 0.8":
                 round(mean(min(found.turns) >= 0.8 for found in fitted), 3)},
        holds=min(best.turns) >= 0.8 if size == "full" else None,
        why="the share of runs that pass is the chance that a run picked blindly would. Where it is zero, the rates of "
        "the grid do not turn all layers that far within 400 steps of a decaying rate; the best run is then among "
        "those that turned them furthest",
    )


def _balance(runs: Sequence[Trained], size: Size) -> Check:
    best = {f"alpha {alpha:g}": round(max(_by_rate(runs, alpha).values()), 4) for alpha in ALPHAS}
    by_seed = [found.test for found in runs if found.how == max(runs, key=lambda r: r.test).how]
    return Check(
        name="equal rotation of all layers is best",
        claim="at its best rate, alpha = 0 has a higher test accuracy than alpha = -0.6 and 0.6",
        measured=best,
        control={"by rate": {f"alpha {alpha:g}": _by_rate(runs, alpha) for alpha in ALPHAS},
                 "seeds of the best setting": by_seed},
        holds=best["alpha 0"] > max(best["alpha -0.6"], best["alpha 0.6"]) if size == "full" else None,
        why="means over seeds; by chance one of three would be best",
    )


def _by_rate(runs: Sequence[Trained], alpha: float) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for trained in runs:
        if trained.how.startswith(f"alpha {alpha:g},"):
            found.setdefault(trained.how.split(", ")[1], []).append(trained.test)
    return {rate: round(mean(values), 4) for rate, values in found.items()}
