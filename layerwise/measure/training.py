"""Watching layers while they train: how far weights have turned, and what rewinding a layer does to the loss.

Callbacks for any training loop, called with the number of steps done. Rotation is 1 - cosine of a layer's
flattened weights with its initial ones, kernels only (arXiv 1806.01603v2 and its official monitoring code).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from layerwise.errors import BadOption
from layerwise.stack.perturb import parts, perturbed, reset

LossNow = Callable[[], float]


def cosine_distance(a: Tensor, b: Tensor) -> float:
    """1 - <a, b> / (|a| |b|): 0 for equal directions, 1 for orthogonal ones, 2 for opposite ones."""
    a_N, b_N = a.detach().double().flatten(), b.detach().double().flatten()
    return float(1 - a_N @ b_N / (a_N.norm() * b_N.norm()))


def tangent(a: Tensor, b: Tensor) -> float:
    """Tangent of the angle between two weights; infinite from a right angle on, nan where one is zero."""
    a_N, b_N = a.detach().double().flatten(), b.detach().double().flatten()
    if not (bool(a_N.any()) and bool(b_N.any())):
        return math.nan
    unit_N = b_N / b_N.norm()
    along = float(a_N @ unit_N)
    return float((a_N - along * unit_N).norm()) / along if along > 0 else math.inf


class Rotation:
    """Rotation of the weights of chosen modules from where they are when this is made; float32 copies are kept.

    `curve` holds a row for every `every` steps: the steps done, and the rotation of each layer in order.
    Raises BadOption for a weight that is zero, which has no direction.
    """

    def __init__(self, module: nn.Module, every: int = 1, chosen: Mapping[str, nn.Module] | None = None) -> None:
        self.every = every
        self.modules = dict(parts(module) if chosen is None else chosen)
        self.start = {path: _weight(part).detach().float().clone() for path, part in self.modules.items()}
        self.curve: list[tuple[int, list[float]]] = []
        for path, weight in self.start.items():
            if not bool(weight.any()):
                raise BadOption(f"the rotation of {path}, whose weights are all zero", expected="initial weights",
                                do="leave it out")

    def __call__(self, step: int) -> None:
        if step % self.every == 0:
            self.curve.append((step, list(self.now().values())))

    def now(self) -> dict[str, float]:
        """The rotation of every layer so far."""
        return {path: cosine_distance(_weight(part), self.start[path]) for path, part in self.modules.items()}


class Turning:
    """How far one step turns every layer: the tangent of the angle between its weights before and after, float32 copies
    of the weights are kept.

    `curve` holds a row for every `every` steps, about the last of them: the steps done, and each layer's tangent.
    """

    def __init__(self, module: nn.Module, every: int = 1, chosen: Mapping[str, nn.Module] | None = None) -> None:
        self.every = every
        self.modules = dict(parts(module) if chosen is None else chosen)
        self.before = self._copies()
        self.curve: list[tuple[int, list[float]]] = []

    def __call__(self, step: int) -> None:
        if step % self.every == 0:
            row = [tangent(_weight(part), self.before[path]) for path, part in self.modules.items()]
            self.curve.append((step, row))
        if self.every == 1 or (step + 1) % self.every == 0:
            self.before = self._copies()

    def _copies(self) -> dict[str, Tensor]:
        return {path: _weight(part).detach().float().clone() for path, part in self.modules.items()}


class Criticality:
    """What rewinding one layer at a time to its initial weights does to the loss, while training goes on.

    `loss` is called with every part rewound in turn; `curve` holds, for every `every` steps, the steps done and
    the growth of the loss for each layer in order.
    """

    def __init__(self, module: nn.Module, loss: LossNow, every: int = 1,
                 chosen: Mapping[str, nn.Module] | None = None) -> None:
        self.loss, self.every = loss, every
        self.modules = dict(parts(module) if chosen is None else chosen)
        self.start = {f"{path}.{name}": tensor.detach().clone() for path, part in self.modules.items()
                      for name, tensor in part.state_dict().items()}
        self.curve: list[tuple[int, list[float]]] = []

    def __call__(self, step: int) -> None:
        if step % self.every == 0:
            self.curve.append((step, list(self.now().values())))

    def now(self) -> dict[str, float]:
        """Growth of the loss with each layer rewound."""
        before, grown = self.loss(), {}
        for path, part in self.modules.items():
            with perturbed(part, path, reset(self.start)):
                grown[path] = self.loss() - before
        return grown


def _weight(part: nn.Module) -> Tensor:
    return part.get_parameter("weight")
