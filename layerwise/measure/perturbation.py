"""Perturb one part of a network at a time, compare its outputs with the original's: any network, any comparison.

The states of all batches walk along the layers as in `sweep`: what comes before a perturbed part is computed
once. Parts outside the layers (stem, head) cost a whole pass. Criticality is the comparison of
arXiv 2410.14470: 1 - mean cosine of the two vectors of class probabilities.

Shapes: N items (or tokens), K classes (or vocabulary).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.data.module import Batches
from layerwise.errors import BadModel, BadOption
from layerwise.stack.base import Stack, first_tensor
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.module import ModuleStack
from layerwise.stack.perturb import Perturbation, parts, perturbed

Comparison = Callable[[Tensor, Tensor], float]
"""(original logits, changed logits), each [N, K], to a number."""


@torch.inference_mode()
def outputs(stack: Stack, data: Iterable[Any]) -> Tensor:
    """The logits of all batches, [N, K] float32."""
    return _joined(stack(*call.args, **call.kwargs) for call in Batches(data))


@torch.inference_mode()
def perturb(
    stack: Stack,
    data: Iterable[Any],
    perturbations: Mapping[str, Perturbation],
    comparisons: Mapping[str, Comparison],
    chosen: Mapping[str, nn.Module] | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Part to perturbation to comparison to value. `chosen` are the parts by path, all linear and convolutional
    ones unless given; a layer's own path perturbs the whole layer.

    Raises BadOption for a decoder that is streamed from disk, BadModel for outputs of a single class, whose
    probability is always one.
    """
    root, layers = _opened(stack)
    chosen = parts(root) if chosen is None else chosen
    places = {path: _place(path, layers) for path in chosen}
    calls = list(Batches(data))
    states = [stack.start(*call.args, **call.kwargs) for call in calls]
    original_NK = _joined(stack.finish(stack.run(state)) for state in states)
    if original_NK.shape[-1] < 2:
        raise BadModel(f"outputs of {stack.name} for a single class", expected="logits of two classes or more",
                       do="append a column of zeros to the logits of a yes-or-no question")
    found: dict[str, dict[str, dict[str, float]]] = {path: {} for path in chosen}
    for layer in [*range(len(stack)), None]:
        for path in (path for path, place in places.items() if place == layer):
            for name, perturbation in perturbations.items():
                with perturbed(chosen[path], path, perturbation):
                    changed_NK = _joined(
                        stack(*call.args, **call.kwargs) if layer is None else stack.finish(stack.run(state))
                        for call, state in zip(calls, states, strict=True)
                    )
                found[path][name] = {key: compare(original_NK, changed_NK) for key, compare in comparisons.items()}
        if layer is not None:
            states = [stack.run(state, slice(layer, layer + 1)) for state in states]
    return found


def criticality(original_NK: Tensor, changed_NK: Tensor) -> float:
    """1 - mean cosine of class probabilities: 0 for equal decisions, near 1 for unrelated ones."""
    return 1 - float(F.cosine_similarity(original_NK.softmax(-1), changed_NK.softmax(-1)).mean())


def disagreement(original_NK: Tensor, changed_NK: Tensor) -> float:
    """Share of items whose most probable class is another one."""
    return float((original_NK.argmax(-1) != changed_NK.argmax(-1)).float().mean())


def total_variation(original_NK: Tensor, changed_NK: Tensor) -> float:
    """Mean of half the absolute difference of class probabilities, 0 to 1."""
    return float((original_NK.softmax(-1) - changed_NK.softmax(-1)).abs().sum(-1).mean()) / 2


def _opened(stack: Stack) -> tuple[nn.Module, list[str]]:
    """The module whose parts are perturbed, and the path of every layer in it."""
    if isinstance(stack, ModuleStack):
        return stack.root, [path for path, _ in stack.layers]
    assert isinstance(stack, DecoderStack)
    if stack.streamed:
        raise BadOption(f"perturbing the weights of {stack.name}, which is read from disk layer by layer",
                        expected="a model in memory", do="open it with stream=False")
    return stack.decoder, [f"layers.{layer}" for layer in range(len(stack))]


def _place(path: str, layers: list[str]) -> int | None:
    return next((i for i, layer in enumerate(layers) if path == layer or path.startswith(f"{layer}.")), None)


def _joined(logits: Iterator[Any]) -> Tensor:
    return torch.cat([first_tensor(value).flatten(0, -2).float() for value in logits])
