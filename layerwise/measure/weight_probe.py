"""Reading categories of models from the weights of one layer, without running them.

`WeightProbe` is that of arXiv 2410.13569: Z = relu(V X U), t = E vec(Z) + b, scores = linear(t), with far fewer
parameters than a linear map of all entries of X. Its probes start uniform within 1 / sqrt(r_U), as in the
official code (commit 3eb20d4), whose outputs are equal for equal parameters.

Shapes: N models, H x W of the weight matrix, U probes, V projections, R of the representation, Y categories.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import BadData


class WeightProbe(nn.Module):
    """Scores [N, Y] of matrices [N, H, W] through `probes` learned inputs and a shared projection of the answers."""

    def __init__(self, shape: tuple[int, int], categories: int, *, probes: int = 16, projections: int = 16,
                 representation: int = 64, learn_probes: bool = True) -> None:
        super().__init__()
        height, width = shape
        probes_WU = torch.empty(width, probes).uniform_(-1, 1) / math.sqrt(probes)
        self.probes_WU = nn.Parameter(probes_WU, requires_grad=learn_probes)
        self.project = nn.Linear(height, projections, bias=False)
        self.encode = nn.Linear(probes * projections, representation)
        self.head = nn.Linear(representation, categories)

    def represent(self, x_NHW: Tensor) -> Tensor:
        """What the probe sees of each model, [N, R]."""
        answers_NUH = (x_NHW @ self.probes_WU).transpose(1, 2)
        found: Tensor = self.encode(F.relu(self.project(answers_NUH)).flatten(1))
        return found

    def forward(self, x_NHW: Tensor) -> Tensor:
        scores_NY: Tensor = self.head(self.represent(x_NHW))
        return scores_NY


class DenseProbe(nn.Linear):
    """One weight for every entry and category: scores [N, Y] of [N, H, W] or [N, C]."""

    def forward(self, x_NHW: Tensor) -> Tensor:
        return super().forward(x_NHW.flatten(1))


def statistics(x_NHW: Tensor) -> Tensor:
    """Mean, deviation and nine quantiles of each matrix, [N, 11]."""
    flat_NC = x_NHW.flatten(1).float()
    quantiles = torch.quantile(flat_NC, torch.linspace(0, 1, 9), dim=1).T
    return torch.cat([flat_NC.mean(1, keepdim=True), flat_NC.std(1, keepdim=True), quantiles], 1)


@dataclass(frozen=True)
class Split:
    """Rows to fit on, to choose by, and to report."""

    train: Tensor
    validation: Tensor
    test: Tensor

    @classmethod
    def draw(cls, count: int, seed: int) -> Split:
        """70 %, 15 % and 15 % at random. Raises BadData below 20 rows."""
        if count < 20:
            raise BadData(f"{count} models", expected="at least 20", do="train more models")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        first, second = round(0.7 * count), round(0.85 * count)
        return cls(order[:first], order[first:second], order[second:])


@dataclass(frozen=True)
class Reading:
    """Element accuracy: the mean over models and categories of a yes or no read at 0.5."""

    validation: float
    test: float
    parameters: int


def read(probe: nn.Module, x_N: Tensor, labels_NY: Tensor, split: Split, *, epochs: int = 200, rate: float = 1e-3,
         decay: float = 1e-5, batch: int = 128, every: int = 10, seed: int = 0) -> Reading:
    """Fit `probe` with Adam on binary cross-entropy; report the epoch that was best on the validation models.

    Inputs are centred on the mean of the training models and divided by their common deviation.
    """
    known = x_N[split.train]
    centre = known.mean(0)
    x_N = (x_N - centre) / (known - centre).std().clamp(min=1e-12)
    labels_NY = labels_NY.float()
    trained = [parameter for parameter in probe.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate, weight_decay=decay)
    generator = torch.Generator().manual_seed(seed)
    best, kept = -1.0, copy.deepcopy(probe.state_dict())
    for epoch in range(1, epochs + 1):
        order = split.train[torch.randperm(len(split.train), generator=generator)]
        for rows in order.split(batch):
            loss = F.binary_cross_entropy_with_logits(probe(x_N[rows]), labels_NY[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if epoch % every == 0 or epoch == epochs:
            value = accuracy(probe, x_N[split.validation], labels_NY[split.validation])
            if value > best:
                best, kept = value, copy.deepcopy(probe.state_dict())
    probe.load_state_dict(kept)
    return Reading(best, accuracy(probe, x_N[split.test], labels_NY[split.test]), sum(p.numel() for p in trained))


@torch.inference_mode()
def accuracy(probe: nn.Module, x_N: Tensor, labels_NY: Tensor) -> float:
    """Share of right yes-or-no answers."""
    return float(((probe(x_N) > 0) == (labels_NY > 0.5)).float().mean())


def majority(labels_NY: Tensor, split: Split) -> float:
    """Accuracy of answering for every category what most training models would."""
    guess_Y = labels_NY[split.train].float().mean(0) > 0.5
    return float((guess_Y == labels_NY[split.test].bool()).float().mean())


def nearest_root(x_NHW: Tensor, roots_RHW: Tensor) -> Tensor:
    """Which root each model's matrix is closest to, by Euclidean distance, int64 [N]."""
    return torch.cdist(x_NHW.flatten(1).double(), roots_RHW.flatten(1).double()).argmin(1)
