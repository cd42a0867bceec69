"""How much a change of the input changes what every layer computes: relative error of activations, clean to changed.

CM_l = |f_l(x) - f_l(x')| / |f_l(x)| over a batch, Frobenius norms (arXiv 2202.02626 and its official code). The same
meter reads error propagation of any change: run two models instead of two inputs. A layer's activation is what
leaves the layer after the activation function that follows it.

Shapes: L layers, M batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from layerwise.errors import BadModel
from layerwise.stack.perturb import WEIGHTED

SMALLEST = 1e-12
ACTIVATIONS = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)


def probes(module: nn.Module) -> dict[str, nn.Module]:
    """The place where every weighted layer is read, by the layer's path: its activation if one follows, else itself.

    "Follows" is meant in the order of the module's parts, norms and the like between them aside. Raises BadModel
    where there is no weighted layer.
    """
    leaves = [(path, part) for path, part in module.named_modules() if isinstance(part, (*WEIGHTED, *ACTIVATIONS))]
    found: dict[str, nn.Module] = {
        path: after if isinstance(after, ACTIVATIONS) else part
        for (path, part), (_, after) in itertools.pairwise([*leaves, ("", None)]) if isinstance(part, WEIGHTED)
    }
    if not found:
        raise BadModel(f"{type(module).__name__} without linear or convolutional layers", expected="at least one",
                       do="name the places to read")
    return found


@contextmanager
def reading(places: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """While the context lasts, collect what leaves each place, a list for each in the order given.

    Tensors keep their gradients, so that a penalty on them can be trained.
    """
    seen: list[list[Tensor]] = [[] for _ in places]
    handles = []
    try:
        for place, outputs in zip(places, seen, strict=True):
            handles.append(place.register_forward_hook(lambda _, __, output, keep=outputs: keep.append(output)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def relative_errors(clean: Sequence[Tensor], changed: Sequence[Tensor], *, fixed_scale: bool = False) -> Tensor:
    """CM of every pair of activations, [L], with gradients if they have them.

    `fixed_scale` keeps gradients from the denominator, so that a penalty cannot be met by larger activations.
    """
    errors = []
    for before, after in zip(clean, changed, strict=True):
        scale = before.detach() if fixed_scale else before
        errors.append((before - after).norm() / scale.norm().clamp(min=SMALLEST))
    return torch.stack(errors)


@torch.no_grad()
def sustainability(model: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], places: Sequence[nn.Module]) -> Tensor:
    """CM of every batch of (clean, changed) inputs at every place, [M, L]; the model is in evaluation mode."""
    model.eval()
    errors = []
    for pair in pairs:
        with reading(places) as seen:
            for x_B in pair:
                model(x_B)
        errors.append(relative_errors([clean for clean, _ in seen], [changed for _, changed in seen]))
    return torch.stack(errors)


def vulnerable(errors_ML: Tensor, eta: float) -> list[int]:
    """Layers whose mean CM exceeds the mean over all batches and layers by more than eta deviations, worst first."""
    mean_L = errors_ML.double().mean(0)
    limit = errors_ML.double().mean() + eta * errors_ML.double().std(correction=0)
    order = mean_L.argsort(descending=True).tolist()
    return [layer for layer in order if float(mean_L[layer]) > float(limit)]
