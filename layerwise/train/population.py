"""Many small networks trained at once, each on its own classes: zoos of models to study as data.

All networks have the same shape (linear layers with relu between), so a step of the whole population is one
batched product a layer. What one network learns does not depend on who is trained beside it, except for the
order in which random batches are drawn.

Shapes: K networks, B items of a batch, D inputs, Y classes, M items of a class; O outputs and I inputs of a layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data.labelled import Labelled
from layerwise.errors import BadData


@dataclass(frozen=True)
class Population:
    """`weights[l]` is [K, O, I] and `biases[l]` [K, O], float32."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    @classmethod
    def fresh(cls, count: int, widths: Sequence[int], seed: int) -> Population:
        """Networks of layers `widths[0]` to `widths[-1]`: Gaussian weights of variance 2 / inputs, no biases."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [(count, outputs, inputs) for inputs, outputs in itertools.pairwise(widths)]
        return cls(
            tuple(torch.randn(shape, generator=generator) * math.sqrt(2 / shape[2]) for shape in shapes),
            tuple(torch.zeros(shape[:2]) for shape in shapes),
        )

    def __len__(self) -> int:
        return len(self.biases[0])

    def picked(self, places: Tensor | Sequence[int]) -> Population:
        """The networks at `places`, which may repeat: children of the same root, for instance."""
        index = torch.as_tensor(places)
        return Population(tuple(w[index] for w in self.weights), tuple(b[index] for b in self.biases))

    def with_head(self, other: Population) -> Population:
        """The same networks with the last layer of another population."""
        return Population(
            (*self.weights[:-1], other.weights[-1]), (*self.biases[:-1], other.biases[-1])
        )

    def __call__(self, x_KBD: Tensor) -> Tensor:
        """Logits [K, B, Y]."""
        for layer, (weight_KOI, bias_KO) in enumerate(zip(self.weights, self.biases, strict=True)):
            x_KBD = torch.baddbmm(bias_KO[:, None], x_KBD, weight_KOI.transpose(1, 2))
            if layer < len(self.weights) - 1:
                x_KBD = F.relu(x_KBD)
        return x_KBD


@dataclass(frozen=True)
class Lessons:
    """What each network is taught: which classes [K, Y] bool, for how many steps [K], at which rate [K]."""

    classes_KY: Tensor
    steps_K: Tensor
    rates_K: Tensor
    batch: int = 32
    momentum: float = 0.9


def by_class(data: Labelled) -> Tensor:
    """Items of equal classes together, flattened, [Y, M, D]; the largest M that all classes have.

    Raises BadData where a class has no item.
    """
    counts = torch.bincount(data.labels_N, minlength=data.classes)
    fewest = int(counts.min())
    if not fewest:
        raise BadData(f"no item of class {int(counts.argmin())} in {data.name}", expected="items of every class",
                      do="give more data")
    flat_ND = data.x_N.flatten(1).float()
    return torch.stack([flat_ND[data.labels_N == label][:fewest] for label in range(data.classes)])


def taught(population: Population, items_YMD: Tensor, lessons: Lessons, seed: int) -> Population:
    """The population after training with momentum on cross-entropy over each network's own classes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [t.clone().requires_grad_(True) for t in (*population.weights, *population.biases)]
    layers, speeds = len(population.weights), [torch.zeros_like(t) for t in tensors]
    pupils = Population(tuple(tensors[:layers]), tuple(tensors[layers:]))
    hidden_KY = torch.where(lessons.classes_KY, 0.0, -torch.inf)
    for step in range(int(lessons.steps_K.max())):
        labels_KB = torch.multinomial(lessons.classes_KY.float(), lessons.batch, True, generator=generator)
        chosen_KB = torch.randint(items_YMD.shape[1], labels_KB.shape, generator=generator)
        logits_KBY = pupils(items_YMD[labels_KB, chosen_KB]) + hidden_KY[:, None]
        loss = F.cross_entropy(logits_KBY.flatten(0, 1), labels_KB.flatten(), reduction="sum") / lessons.batch
        rates_K = lessons.rates_K * (step < lessons.steps_K)
        for tensor, speed, grad in zip(tensors, speeds, torch.autograd.grad(loss, tensors), strict=True):
            speed.mul_(lessons.momentum).add_(grad)
            tensor.data -= rates_K.view(-1, *[1] * (tensor.dim() - 1)) * speed
    return Population(*(tuple(t.detach() for t in group) for group in (pupils.weights, pupils.biases)))


@torch.inference_mode()
def graded(population: Population, items_YMD: Tensor, classes_KY: Tensor) -> Tensor:
    """Accuracy of every network over its own classes, [K]."""
    right_KY = torch.zeros(classes_KY.shape)
    for label, items_MD in enumerate(items_YMD):
        logits_KMY = population(items_MD.expand(len(population), -1, -1))
        logits_KMY = logits_KMY.masked_fill(~classes_KY[:, None], -torch.inf)
        right_KY[:, label] = (logits_KMY.argmax(-1) == label).float().mean(1)
    return (right_KY * classes_KY).sum(1) / classes_KY.sum(1)
