"""Layca: an optimizer that sets how far every layer turns in a step, whatever the update rule beneath it.

The update is projected on the tangent of the sphere, brought to the weight's length, applied with the rate rho,
and the weight is brought back to its length, so each step turns a tensor by arctan(rho). Source: arXiv
1806.01603v2 and its official code, whose operations these are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST = 1e-6
"""Share of an update that rounding may leave when it is projected."""
Base = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


def turned(weight: Tensor, update: Tensor, rho: float) -> Tensor:
    """`weight` turned by arctan(rho) against `update`; as it is where the update only changes its length."""
    length = torch.linalg.vector_norm(weight)
    given = torch.linalg.vector_norm(update)
    update = update - (update * weight).sum() * weight / length**2
    size = torch.linalg.vector_norm(update)
    if float(size) <= SMALLEST * float(given):
        return weight
    moved = weight - rho * length * update / size
    found: Tensor = moved * length / torch.linalg.vector_norm(moved)
    return found


def rates(layers: int, rho: float, alpha: float) -> list[float]:
    """A rate for every layer, first to last: alpha > 0 slows the first layers, alpha < 0 the last ones."""
    last = max(1, layers - 1)
    if alpha > 0:
        return [rho * (1 - alpha) ** (5 * (last - i) / last) for i in range(layers)]
    return [rho * (1 + alpha) ** (5 * i / last) for i in range(layers)]


def plain_gradient(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The base of Layca-SGD: the update is the gradient."""
    return torch.optim.SGD(parameters, lr=1.0)


class Layca(torch.optim.Optimizer):
    """Turns every parameter by its own rate; one parameter group each, so schedules scale all of them.

    `base` makes the optimizer whose updates are followed. It works on parameters of its own that start from
    zero at each step, so that small updates are not lost in large weights; it does not see the weights, so
    weight decay in it does nothing (nor would it here: lengths are kept).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rates: Sequence[float], base: Base = plain_gradient) -> None:
        groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]
        super().__init__(groups, {})
        self.shadows = [nn.Parameter(torch.zeros_like(p)) for p in parameters]
        self.base = base(self.shadows)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One turn of every parameter that has a gradient."""
        pairs = [(group["params"][0], group["lr"]) for group in self.param_groups]
        for (parameter, _), shadow in zip(pairs, self.shadows, strict=True):
            shadow.zero_()
            shadow.grad = parameter.grad
        self.base.step()
        for (parameter, rate), shadow in zip(pairs, self.shadows, strict=True):
            if parameter.grad is not None:
                parameter.copy_(turned(parameter, -shadow, rate))
