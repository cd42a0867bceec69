"""Plain ways to make a small network smaller: zeros, low rank, int8, and learning from a larger one.

For networks made of `nn.Linear`; decoders have transforms, which keep their table. Every function returns a new
network and leaves the given one as it was.

Shapes: O outputs, I inputs, K classes; B items of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import BadOption
from layerwise.nets.packed import PackedLinear
from layerwise.spec import Format
from layerwise.train.loop import AfterStep
from layerwise.transform.rounding import round_to_nearest


def replaced(model: nn.Module, change: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A copy with every linear layer passed through `change`."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, change(module))
    return model.eval()


@torch.no_grad()
def pruned(model: nn.Module, share: float) -> tuple[nn.Module, AfterStep]:
    """The `share` smallest weights of every matrix set to zero, and what keeps them there while training."""
    if not 0 <= share < 1:
        raise BadOption(f"share={share}", expected="0 or more, below 1", do="give a share of the weights")
    model = copy.deepcopy(model)
    kept: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            magnitude = module.weight.abs().flatten()
            count = int(share * len(magnitude))
            gone = torch.zeros_like(magnitude, dtype=torch.bool)
            gone[magnitude.argsort()[:count]] = True
            kept.append((module.weight, ~gone.view_as(module.weight)))

    def mask(_: int) -> None:
        with torch.no_grad():
            for weight, stays in kept:
                weight.mul_(stays)

    mask(0)
    return model, mask


@torch.no_grad()
def low_rank(model: nn.Module, share: float) -> nn.Module:
    """Every matrix of which a factorization at `share` of its parameters exists, as two of the best such rank."""
    if not 0 < share <= 1:
        raise BadOption(f"share={share}", expected="above 0, up to 1", do="give a share of the parameters")

    def change(module: nn.Linear) -> nn.Module:
        outputs, inputs = module.weight.shape
        rank = int(share * outputs * inputs / (outputs + inputs))
        if rank < 1:
            return module
        u_OK, s_K, v_KI = torch.linalg.svd(module.weight.double(), full_matrices=False)
        first, second = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=module.bias is not None)
        root_R = s_K[:rank].sqrt()
        first.weight.copy_(root_R[:, None] * v_KI[:rank])
        second.weight.copy_(u_OK[:, :rank] * root_R)
        if module.bias is not None:
            second.bias.copy_(module.bias)
        return nn.Sequential(first, second)

    return replaced(model, change)


@torch.no_grad()
def int8(model: nn.Module) -> nn.Module:
    """Every matrix in 8 bits with one scale a row, after training, without data."""
    form = Format(8, 0, symmetric=True)
    return replaced(model, lambda module: PackedLinear.from_codes(
        *round_to_nearest(module.weight.detach(), form), form, module.bias))


def distilling(teacher: nn.Module, temperature: float = 2.0) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """A loss for `layerwise.train.classify.fit`: half the labels, half the teacher's softened answers."""

    def loss(model: nn.Module, x_B: Tensor, labels_B: Tensor) -> Tensor:
        with torch.no_grad():
            wanted_BK = (teacher(x_B) / temperature).log_softmax(-1)
        logits_BK = model(x_B)
        soft = F.kl_div((logits_BK / temperature).log_softmax(-1), wanted_BK, log_target=True, reduction="batchmean")
        return (F.cross_entropy(logits_BK, labels_B) + temperature**2 * soft) / 2

    return loss
