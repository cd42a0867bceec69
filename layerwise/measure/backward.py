"""The backwards that gradient instruments share, layer by layer from the top: one for weights, one for states.

Every layer's input is kept from one forward pass; going down, a layer runs again with gradients on, for all
batches, and its gradients are summed in float32 with their signs. So gradients of one layer are in memory at
a time, whatever the size of the model; the kept inputs take tokens x hidden x layers, for the gradients of states only
those of one batch. In a module that is no decoder the loss is that of the labels; what reaches later layers by another
way than the hidden tensor is left out.

Shapes: B rows, T tokens, C hidden width, P positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.data.metrics import CHUNK
from layerwise.errors import BadData, BadModel, BadOption
from layerwise.measure.base import StateGradient, WeightGradient
from layerwise.measure.inputs import Input, Inputs
from layerwise.measure.module_walk import check_classes
from layerwise.measure.progress import Progress
from layerwise.measure.sample import predicted
from layerwise.measure.scores import Column
from layerwise.measure.seen import Seen, Vectors, fitting
from layerwise.measure.tally import Means
from layerwise.nets.packed import PackedMatrix
from layerwise.stack.base import Stack, State, first_tensor


def backward_pass(stack: Stack, inputs: Inputs, instruments: Sequence[WeightGradient],
                  progress: Progress) -> list[tuple[Column, ...]]:
    """The columns of every instrument, from the gradient of the mean loss of next tokens, or of labels.

    Raises BadOption for packed layers, which have no gradient, BadModel where the gradient is not finite.
    """
    items = list(inputs)
    trails = [trail(stack, item, progress) for item in items]
    count = sum(places(item).numel() for item in items)
    if not count:
        raise BadData("texts of one token", expected="at least two tokens in a row", do="give longer texts")
    arriving = [_loss_gradient(stack, item, states[-1], count)
                for item, states in zip(items, trails, strict=True)]
    values: list[list[float]] = [[] for _ in instruments]
    for layer in reversed(range(len(stack))):
        weights, gradients = _layer(stack, layer, trails, arriving, progress)
        for value, instrument in zip(values, instruments, strict=True):
            value.append(instrument.of(weights, gradients))
    return [(instrument.column("", reversed(value)),)
            for instrument, value in zip(instruments, values, strict=True)]


def state_pass(stack: Stack, inputs: Inputs, instruments: Sequence[StateGradient], progress: Progress) -> list[Means]:
    """The tallies of every instrument, from the gradients of the loss summed over a batch; batches come one by one.

    Raises what `backward_pass` raises.
    """
    tallies = [instrument.start(stack.spec) for instrument in instruments]
    count = 0
    for batch, item in enumerate(inputs):
        states = trail(stack, item, progress)
        count += places(item).numel()
        arriving = _loss_gradient(stack, item, states[-1], 1)
        for layer in reversed(range(len(stack))):
            hidden = {"input": states[layer].hidden, "output": states[layer + 1].hidden, "gradient": arriving}
            sites = {name: Vectors(hidden_BTC) for name, hidden_BTC in hidden.items()}
            seen = Seen(sites, fitting(item.mask_BT, sites["output"]))
            for instrument, tally in zip(instruments, tallies, strict=True):
                instrument.update(tally, layer, seen)
            if layer:
                arriving = below(stack, layer, states[layer], arriving, batch)
            progress.step(2)
    if not count:
        raise BadData("texts of one token", expected="at least two tokens in a row", do="give longer texts")
    return tallies


def trail(stack: Stack, item: Input, progress: Progress) -> list[State]:
    """The states entering every layer, and the one that leaves the last."""
    states = [item.start(stack)]
    for layer in range(len(stack)):
        states.append(stack.run(states[-1], slice(layer, layer + 1)))
        progress.step()
    return states


def places(item: Input) -> Tensor:
    """Positions with a next token, as indices into the flattened [B, T]; of a module the rows."""
    if item.labels_B is not None:
        return torch.arange(len(item.labels_B))
    assert item.tokens_BT is not None
    return predicted(item.tokens_BT, item.mask_BT).flatten().nonzero()[:, 0]


def _loss_gradient(stack: Stack, item: Input, last: State, count: int) -> Tensor:
    """Gradient of this batch's part of the mean loss with respect to the last hidden states, [B, T, C]."""
    if item.labels_B is not None:
        with torch.enable_grad():
            hidden = last.hidden.detach().requires_grad_()
            logits_BK = first_tensor(stack.finish(last.moved(hidden, len(stack))))
            check_classes(logits_BK, item.labels_B, "gradients of the loss")
            loss = F.cross_entropy(logits_BK.float(), item.labels_B.to(logits_BK.device), reduction="sum") / count
            return torch.autograd.grad(loss, hidden)[0]
    assert item.tokens_BT is not None
    targets_N = item.tokens_BT.flatten().roll(-1).to(last.hidden.device)
    return head_gradient(stack, item, last, lambda logits_PV, place_P: F.cross_entropy(
        logits_PV, targets_N[place_P], reduction="sum") / count)


def head_gradient(stack: Stack, item: Input, last: State, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Gradient with respect to the last hidden states, [B, T, C], of a sum over predictions, some of them at a time.

    `value` gives their part of the sum from their logits, [P, V] in float32, and their places, [P].
    """
    hidden_NC = last.hidden.flatten(0, 1)
    gradient_NC = torch.zeros_like(hidden_NC)
    for place_P in places(item).to(hidden_NC.device).split(max(1, CHUNK // stack.spec.vocabulary)):
        with torch.enable_grad():
            rows_PC = hidden_NC[place_P].requires_grad_()
            logits_1PV: Tensor = stack.finish(last.moved(rows_PC[None], len(stack)))
            gradient_NC[place_P] = torch.autograd.grad(value(logits_1PV[0].float(), place_P), rows_PC)[0]
    return gradient_NC.view_as(last.hidden)


def _layer(stack: Stack, layer: int, trails: list[list[State]], arriving: list[Tensor],
           progress: Progress) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Weights of a layer and their gradients over all batches; `arriving` moves to below the layer."""
    block = stack.block(layer)
    _check_dense(block, layer)
    with _learning(block) as weights:
        sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
        for batch, states in enumerate(trails):
            arriving[batch], found = _below(stack, layer, states[layer], arriving[batch], list(weights.values()))
            for name, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    sums[name] += gradient.float()
            _check_finite(arriving[batch], layer, batch)
            progress.step(2)
        return {name: weight.detach() for name, weight in weights.items()}, sums


def below(stack: Stack, layer: int, state: State, arriving: Tensor, batch: int) -> Tensor:
    """The gradient that enters a layer with dense weights from below, from the one `arriving` above it; finite."""
    _check_dense(stack.block(layer), layer)
    below_BTC, _ = _below(stack, layer, state, arriving, [])
    _check_finite(below_BTC, layer, batch)
    return below_BTC


def _below(stack: Stack, layer: int, state: State, arriving: Tensor,
           weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The gradient that enters a layer from below, and those of `weights`, from the one `arriving` above it."""
    with torch.enable_grad():
        x_BTC = state.hidden.detach().requires_grad_()
        y_BTC = stack.run(state.moved(x_BTC, layer), slice(layer, layer + 1)).hidden
        first, *others = torch.autograd.grad(y_BTC, [x_BTC, *weights], arriving, allow_unused=True)
    return torch.zeros_like(x_BTC) if first is None else first, others


def _check_dense(block: nn.Module, layer: int) -> None:
    if any(isinstance(module, PackedMatrix) for module in block.modules()):
        raise BadOption(f"gradients of layer {layer}, whose matrices are packed integers",
                        expected="dense weights", do="measure the model before it is quantized")


def _check_finite(gradient: Tensor, layer: int, batch: int) -> None:
    if not bool(torch.isfinite(gradient.sum(dtype=torch.float32))):
        raise BadModel(f"gradients below layer {layer} are NaN or infinite, first in batch {batch}",
                       expected="finite gradients", do="compute in float32: open(..., dtype='float32')")


@contextmanager
def _learning(block: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """The block's floating parameters with gradients on, while the context lasts."""
    weights = {name: weight for name, weight in block.named_parameters() if weight.is_floating_point()}
    before = {name: weight.requires_grad for name, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        yield weights
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(before[name])
