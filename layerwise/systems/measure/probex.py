"""Learning on Model Weights using Tree Experts (ProbeX) (arXiv 2410.13569)

Claims: among models fine-tuned from one ancestor even a linear classifier on one hidden layer tells which classes a
model was trained on, and a factorized probe does so with far fewer parameters; across ancestors that fails, and
routing each model to its own tree repairs it.

Exact to the paper and its official code: the probe (outputs equal for equal parameters on the same input), its loss,
optimizer, learning rate, decay, batch and the choice of the epoch and layer by validation. Found in the code:
validation every 25 epochs only, raw inputs, encoder and head with nothing between them. Ours: trees of small networks
on drawn digits instead of vision transformers, 5 of 10 classes instead of 50 of 100, 16 probes, centred and scaled
inputs, 200 epochs, routing by distance to the roots. Search by text, for which it needs CLIP, and neighbours in the
representation are not examined.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.data.glyphs import glyphs
from layerwise.measure.weight_probe import (
    DenseProbe,
    Reading,
    Split,
    WeightProbe,
    majority,
    nearest_root,
    read,
    statistics,
)
from layerwise.systems.base import Check, Size
from layerwise.train.population import Lessons, Population, by_class, graded, taught

WIDTHS, CLASSES, ROOTS = (256, 128, 128, 10), 10, 4


@dataclass(frozen=True)
class Scale:
    """Models in each zoo, the longest fine-tuning, steps of the roots, epochs of the probes."""

    models: int
    steps: int
    root_steps: int
    epochs: int


SCALES: dict[Size, Scale] = {"quick": Scale(60, 20, 40, 20), "full": Scale(600, 200, 600, 200)}


@dataclass(frozen=True)
class Zoo:
    """Models, the classes each was trained on, the root of each, and the roots."""

    models: Population
    classes_NY: Tensor
    root_N: Tensor
    roots: Population
    accuracy: float


def run(size: Size, seed: int) -> list[Check]:
    """Three zoos of equal size: one tree, four trees, and every model from its own initial weights."""
    scale = SCALES[size]
    items_YMD = by_class(glyphs(3000, seed)) - 0.5
    everything = torch.ones(ROOTS, CLASSES, dtype=torch.bool)
    roots = taught(Population.fresh(ROOTS, WIDTHS, seed), items_YMD,
                   Lessons(everything, torch.full((ROOTS,), scale.root_steps), torch.full((ROOTS,), 0.03)), seed)
    count = scale.models
    zoos = {
        "one tree": grown(roots.picked([0]), torch.zeros(count, dtype=torch.long), items_YMD, scale, seed + 1),
        "four trees": grown(roots, torch.arange(count) % ROOTS, items_YMD, scale, seed + 2),
        "no tree": grown(Population.fresh(count, WIDTHS, seed + 3), torch.arange(count), items_YMD, scale, seed + 3),
    }
    split = Split.draw(count, seed)
    return [*_within(zoos["one tree"], split, scale, size, seed), _across(zoos, split, scale, size, seed),
            _routing(zoos["four trees"])]


def grown(roots: Population, root_N: Tensor, items_YMD: Tensor, scale: Scale, seed: int) -> Zoo:
    """Children of `roots` with new heads; classes, length and learning rate are drawn apart from one another."""
    generator = torch.Generator().manual_seed(seed)
    count = len(root_N)
    classes_NY = torch.rand(count, CLASSES, generator=generator).argsort(1) < CLASSES // 2
    lessons = Lessons(classes_NY, torch.randint(scale.steps // 4, scale.steps + 1, (count,), generator=generator),
                      10 ** (torch.rand(count, generator=generator) * 0.7 - 2.0))
    children = roots.picked(root_N).with_head(Population.fresh(count, WIDTHS, seed + 100))
    models = taught(children, items_YMD, lessons, seed)
    grade = float(graded(models, items_YMD[:, :20], classes_NY).mean())
    return Zoo(models, classes_NY, root_N, roots, round(grade, 3))


def probed(x_NHW: Tensor, labels_NY: Tensor, split: Split, scale: Scale, seed: int, learn: bool = True) -> Reading:
    """The factorized probe on one layer."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        probe = WeightProbe((x_NHW.shape[1], x_NHW.shape[2]), CLASSES, learn_probes=learn)
    return read(probe, x_NHW, labels_NY, split, epochs=scale.epochs, seed=seed)


def dense(x_N: Tensor, labels_NY: Tensor, split: Split, scale: Scale, seed: int) -> Reading:
    """One weight for every number."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        probe = DenseProbe(x_N[0].numel(), CLASSES)
    return read(probe, x_N, labels_NY, split, epochs=scale.epochs, seed=seed)


def _within(zoo: Zoo, split: Split, scale: Scale, size: Size, seed: int) -> list[Check]:
    layers, labels_NY = zoo.models.weights[:-1], zoo.classes_NY
    probes = [probed(x_NHW, labels_NY, split, scale, seed) for x_NHW in layers]
    layer = max(range(len(layers)), key=lambda place: probes[place].validation)
    x_NHW, best = layers[layer], probes[layer]
    numbers = torch.cat([statistics(x) for x in layers], 1)
    simple = dense((numbers - numbers.mean(0)) / numbers.std(0).clamp(min=1e-12), labels_NY, split, scale, seed)
    full = dense(x_NHW, labels_NY, split, scale, seed)
    fixed = probed(x_NHW, labels_NY, split, scale, seed, learn=False)
    order = torch.randperm(len(labels_NY), generator=torch.Generator().manual_seed(seed))
    chance = probed(x_NHW, labels_NY[order], split, scale, seed)
    decided = size == "full"
    return [
        Check(
            name="one hidden layer tells the training classes",
            claim="within one tree the probe is right on more than 65 % of the classes of unseen models, and at least "
                  "10 points above statistics of the weights",
            measured={"by layer": [round(probe.test, 3) for probe in probes], "chosen by validation": layer,
                      "statistics of all layers": round(simple.test, 3), "accuracy of the models": zoo.accuracy},
            control={"labels given to other models": round(chance.test, 3),
                     "majority": round(majority(labels_NY, split), 3)},
            holds=best.test > 0.65 and best.test >= simple.test + 0.10 if decided else None,
            why="mean over test models and classes, half of which are in each model's subset; the head is left out, "
                "length and learning rate are independent of the classes. Quick has too few models"),
        Check(
            name="the factorized probe needs far fewer parameters",
            claim="within 3 points of a dense linear classifier, or above it, with at least 5 times fewer parameters",
            measured={"probe": _plain(best)},
            control={"dense": _plain(full), "probe with random inputs": _plain(fixed)},
            holds=best.test >= full.test - 0.03 and 5 * best.parameters <= full.parameters if decided else None,
            why="both on the layer that the probe chose, with the same training. Quick has too few models"),
    ]


def _across(zoos: dict[str, Zoo], split: Split, scale: Scale, size: Size, seed: int) -> Check:
    found = {name: round(probed(zoo.models.weights[1], zoo.classes_NY, split, scale, seed).test, 3)
             for name, zoo in zoos.items()}
    zoo = zoos["four trees"]
    tree_N = nearest_root(zoo.models.weights[1], zoo.roots.weights[1])
    experts = []
    for tree in range(ROOTS):
        mine = Split(*(rows[tree_N[rows] == tree] for rows in (split.train, split.validation, split.test)))
        experts.append((len(mine.test), probed(zoo.models.weights[1], zoo.classes_NY, mine, scale, seed).test))
    total = sum(count for count, _ in experts)
    return Check(
        name="without a common ancestor it fails",
        claim="among models from 600 own initial weights the same probe is right on at most 55 %",
        measured={"no tree": found["no tree"], "four trees together": found["four trees"],
                  "four trees, an expert each": round(sum(count * value for count, value in experts) / total, 3)},
        control={"one tree": found["one tree"], "accuracy of the models": {n: z.accuracy for n, z in zoos.items()}},
        holds=found["no tree"] <= 0.55 if size == "full" else None,
        why="second hidden layer, equal numbers of models in each zoo, so that an expert has a quarter of the models "
            "to learn from. Quick has too few models")


def _routing(zoo: Zoo) -> Check:
    shares, other = [], zoo.root_N[torch.randperm(len(zoo.root_N), generator=torch.Generator().manual_seed(0))]
    for layer in range(len(WIDTHS) - 2):
        found_N = nearest_root(zoo.models.weights[layer], zoo.roots.weights[layer])
        shares.append((round(float((found_N == zoo.root_N).float().mean()), 3),
                       round(float((found_N == other).float().mean()), 3)))
    return Check(
        name="weights tell the ancestor",
        claim="at least 99 % of the models are nearest to their own root, at every hidden layer",
        measured={"by layer": [share for share, _ in shares]},
        control={"roots given to other models": [share for _, share in shares]},
        holds=all(share >= 0.99 for share, _ in shares),
        why="Euclidean distance between the matrix of a model and those of four roots that differ by their seed")


def _plain(reading: Reading) -> dict[str, float]:
    return {"accuracy": round(reading.test, 3), "parameters": reading.parameters}
