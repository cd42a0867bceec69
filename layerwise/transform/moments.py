"""Streaming means and second moments of what enters linear and convolutional layers; partial ones add up.

Sums are kept in float64, so batching and order change nothing that matters, and what several processes have
seen is merged by adding. Convolutions see their input as patches, [positions, C k k], zero padding included.

Shapes: N rows (tokens, items or positions), I inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import BadData, BadModel, BadOption

PANEL = 192
"""Columns of a sum of outer products made at once by a CPU: of those on its diagonal half is made in vain."""


@dataclass
class Moments:
    """Count, sum [I] and sum of outer products [I, I] of rows, float64."""

    count: int
    sum_I: Tensor
    outer_II: Tensor

    @classmethod
    def empty(cls, width: int) -> Moments:
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))

    def add(self, x_NI: Tensor) -> None:
        """Add rows; the product is taken in the rows' own precision, at least float32."""
        x_NI = x_NI.detach().to(torch.promote_types(x_NI.dtype, torch.float32))
        self.count += len(x_NI)
        self.sum_I += x_NI.sum(0, dtype=torch.float64).cpu()
        self.outer_II += mirrored(with_outer(None, x_NI)).double().cpu()

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.sum_I + other.sum_I, self.outer_II + other.outer_II)

    @property
    def mean_I(self) -> Tensor:
        """Mean of the rows. Raises BadData where there are none."""
        if not self.count:
            raise BadData("moments of nothing", expected="at least one row", do="let data pass first")
        return self.sum_I / self.count

    @property
    def second_II(self) -> Tensor:
        """Mean of x x^T, not centred."""
        return self.outer_II / max(1, self.count)

    @property
    def covariance_II(self) -> Tensor:
        """Mean of (x - mean)(x - mean)^T."""
        return self.second_II - torch.outer(self.mean_I, self.mean_I)


def with_outer(sum_II: Tensor | None, x_NI: Tensor) -> Tensor:
    """The sum of outer products, x' x added on and above its diagonal: little more than half of the work of the whole.

    None is a sum of nothing; one that is given is changed. See `mirrored`.
    """
    inputs = x_NI.shape[1]
    sum_II = x_NI.new_zeros(inputs, inputs) if sum_II is None else sum_II
    panel = PANEL if x_NI.device.type == "cpu" else inputs
    for start in range(0, inputs, panel):
        sum_II[start : start + panel, start:].addmm_(x_NI[:, start : start + panel].T, x_NI[:, start:])
    return sum_II


def mirrored(sum_II: Tensor) -> Tensor:
    """The symmetric matrix of which `sum_II` holds what is on and above the diagonal."""
    return sum_II.triu() + sum_II.triu(1).T


@contextmanager
def watching(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While the context lasts, show what enters each module to `see(name, x_NI)`, as rows.

    Raises BadOption for a grouped convolution, whose groups see different inputs.
    """

    def watch(name: str, module: nn.Module) -> Any:
        return module.register_forward_pre_hook(lambda _, args: see(name, rows(module, args[0])))

    handles = []
    try:
        for name, module in modules.items():
            handles.append(watch(name, module))
        yield
    finally:
        for handle in handles:
            handle.remove()


def rows(module: nn.Module, x: Tensor) -> Tensor:
    """The input of a linear layer as [N, I], or of a 2-d convolution as patches [N, C k k]."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    if module.groups > 1 or isinstance(module.padding, str):
        raise BadOption("the input of a grouped or string-padded convolution", expected="one group, padding in numbers",
                        do="leave it out")
    patches_BIP = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return patches_BIP.transpose(1, 2).flatten(0, 1)


@torch.inference_mode()
def moments(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Moments]:
    """Moments of the input of every module over everything that `run` passes through them.

    Raises BadModel where an input is NaN or infinite, naming the module and its first batch.
    """
    found: dict[str, Moments] = {}
    batches: Counter[str] = Counter()

    def see(name: str, x_NI: Tensor) -> None:
        if not bool(torch.isfinite(x_NI.sum(dtype=torch.float32))):
            raise BadModel(f"what enters {name} is NaN or infinite, first in batch {batches[name]}",
                           expected="finite activations", do="check the weights before it, or compute in float32")
        batches[name] += 1
        found.setdefault(name, Moments.empty(x_NI.shape[1])).add(x_NI)

    with watching(modules, see):
        run()
    return found
