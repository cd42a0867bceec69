"""How much of a network's weights its data uses, and what keeping only that costs: any linear or convolutional layers.

Source: arXiv 2407.04797; the formulas are those of `layerwise.transform.subspace`. Every layer is decomposed once and
then read at any threshold or rank.

Shapes: O outputs, I inputs of a layer (of a convolution: C k k), K the smaller of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import mean

from torch import Tensor, nn

from layerwise.stack.perturb import perturbed
from layerwise.transform.moments import Moments, moments
from layerwise.transform.subspace import Directions, Subspaces, best, output_error, plain, project

Weights = Mapping[str, Tensor]
Factors = tuple[Tensor, Tensor]


@dataclass
class Utilization:
    """Layers by path with the moments of their inputs; `plain` and `best` are full factorizations of each."""

    modules: Mapping[str, nn.Module]
    seen: Mapping[str, Moments]
    weights: dict[str, Tensor] = field(init=False)
    directions: dict[str, Directions] = field(init=False)
    plain: dict[str, Factors] = field(init=False)
    best: dict[str, Factors] = field(init=False)

    def __post_init__(self) -> None:
        self.weights = {path: module.get_parameter("weight").detach().flatten(1).clone()
                        for path, module in self.modules.items()}
        self.directions = {path: Directions(weight, self.seen[path]) for path, weight in self.weights.items()}
        self.plain = {path: plain(weight) for path, weight in self.weights.items()}
        self.best = {path: best(weight, self.seen[path]) for path, weight in self.weights.items()}

    @classmethod
    def of(cls, modules: Mapping[str, nn.Module], run: Callable[[], object]) -> Utilization:
        """Of what `run` passes through the modules."""
        return cls(modules, moments(modules, run))

    def used(self, eps: float) -> dict[str, Subspaces]:
        """What holds 1 - eps of the variance of every layer's inputs and outputs."""
        return {path: found.used(eps) for path, found in self.directions.items()}

    def share(self, eps: float) -> float:
        """Mean layer utilization: used rank over full rank."""
        return mean(spaces.rank / min(self.weights[path].shape) for path, spaces in self.used(eps).items())

    def ranks(self, share: float) -> dict[str, int]:
        """A rank for every layer, `share` of its full one and at least one."""
        return {path: max(1, round(share * min(weight.shape))) for path, weight in self.weights.items()}

    def projected(self, spaces: Mapping[str, Subspaces]) -> dict[str, Tensor]:
        """The weights projected on subspaces."""
        return {path: project(self.weights[path], found) for path, found in spaces.items()}

    def error(self, weights: Weights) -> float:
        """The largest relative error of any layer's outputs on what was seen, for other weights."""
        return max(output_error(self.weights[path], weight, self.seen[path]) for path, weight in weights.items())

    def with_weights(self, weights: Weights, measure: Callable[[], float]) -> float:
        """`measure` while other weights are in place."""

        def put(path: str, module: nn.Module) -> dict[str, Tensor]:
            return {"weight": weights[path].view_as(module.get_parameter("weight"))}

        with ExitStack() as changes:
            for path, module in self.modules.items():
                changes.enter_context(perturbed(module, path, put))
            return measure()

    def parameters(self, ranks: Mapping[str, int]) -> float:
        """Share of weights left when every layer that gains by it is stored as two factors of its rank."""
        left = sum(ranks[path] * sum(weight.shape) if self.pays(path, ranks[path]) else weight.numel()
                   for path, weight in self.weights.items())
        return left / sum(weight.numel() for weight in self.weights.values())

    def pays(self, path: str, rank: int) -> bool:
        """Whether two factors of this rank are fewer numbers than the weight."""
        return rank * sum(self.weights[path].shape) < self.weights[path].numel()


def cut(factors: Factors, rank: int) -> Tensor:
    """The product of the first `rank` columns and rows, float32."""
    return (factors[0][:, :rank] @ factors[1][:rank]).float()
