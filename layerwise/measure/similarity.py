"""Two models layer against layer: how alike their states are, and how far their weights have moved.

Similarity is linear CKA (Kornblith et al. 2019, arXiv 1905.00414, equation 2 with linear kernels): for states
X and Y of the same tokens, centred over tokens, |X'Y|^2 / (|X'X| |Y'Y|) in Frobenius norms. It is 1 for equal
states up to rotation and scale. It is computed through kernels between tokens, so widths may differ. For few
tokens it is biased upwards; the same number between shuffled tokens is the control to read beside it.

Shapes: P tokens, C width, L layers of one model, M of the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from layerwise.errors import BadData
from layerwise.measure.inputs import Input, Inputs, try_batch
from layerwise.measure.sample import real, sample
from layerwise.measure.seen import Vectors
from layerwise.nets.decoder import Block
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.quantize import values

POINTS = 512


@torch.no_grad()
def states(stack: Stack, data: Any, points: int = POINTS, seed: int = 0, pooled: bool = False) -> list[Tensor]:
    """States that leave each layer at up to `points` real tokens in all, float32 [P, C] by layer.

    With `pooled` the points of a module that is no decoder are items, each the mean over its positions.
    """
    inputs = Inputs(stack, data)
    if not isinstance(stack, DecoderStack):
        return _module_states(stack, inputs, points, seed, pooled)
    share = max(1, math.ceil(points / max(1, _texts(inputs))))
    kept: list[list[Tensor]] = [[] for _ in range(len(stack))]
    for item in inputs:
        assert item.tokens_BT is not None
        place_P = sample(item.tokens_BT, real(item.tokens_BT, item.mask_BT), lambda length: share, seed)
        state = item.start(stack)
        for layer in range(len(stack)):
            state = stack.run(state, slice(layer, layer + 1))
            kept[layer].append(state.hidden.flatten(0, 1)[place_P.to(state.hidden.device)].float().cpu())
    return [torch.cat(parts) for parts in kept]


def _module_states(stack: Stack, inputs: Inputs, points: int, seed: int, pooled: bool) -> list[Tensor]:
    """As `states`, of tokens where `pooled` is False, else of whole items: means over their positions."""
    kept: list[list[Tensor]] = [[] for _ in range(len(stack))]
    batches = list(inputs)
    for index, item in enumerate(batches):
        for layer, x_BTC in enumerate(_outputs(stack, item)):
            mask_BT = item.mask_BT if item.mask_BT is not None and item.mask_BT.shape == x_BTC.shape[:2] else None
            mask_BT = torch.ones(x_BTC.shape[:2], dtype=torch.bool) if mask_BT is None else mask_BT
            mask_BT = mask_BT.to(x_BTC.device)
            if pooled:
                kept[layer].append(((x_BTC * mask_BT[..., None]).sum(1) / mask_BT.sum(1)[:, None]).cpu())
            else:
                order_N = torch.randperm(int(mask_BT.sum()), generator=torch.Generator().manual_seed(seed + index))
                place_P = order_N[: math.ceil(points / len(batches))].sort().values
                kept[layer].append(x_BTC[mask_BT][place_P.to(x_BTC.device)].cpu())
    return [torch.cat(parts) for parts in kept]


def _outputs(stack: Stack, item: Input) -> list[Tensor]:
    """What leaves every layer of a module, float32 [B, T, C]."""
    with stack.capture("output") as seen:
        stack(*item.args, **item.kwargs)
    return [Vectors(seen[layer, "output"]).x_BTC for layer in range(len(stack))]


def _positions(stack: Stack, data: Any) -> set[int]:
    """The numbers of positions that the outputs of a module's layers have."""
    return {x_BTC.shape[1] for x_BTC in _outputs(stack, next(iter(Inputs(stack, data))))}


def cka(a_LPC: list[Tensor], b_MPC: list[Tensor]) -> Tensor:
    """Linear CKA of every layer of one model with every layer of the other, float64 [L, M].

    Raises BadData where the two hold different numbers of tokens, or fewer than three.
    """
    if len({len(states_PC) for states_PC in (*a_LPC, *b_MPC)}) != 1 or len(a_LPC[0]) < 3:
        raise BadData("states of different tokens", expected="the same tokens, at least three, in both models",
                      do="run both models on the same text with the same tokenizer")
    a_LK, b_MK = _kernels(a_LPC), _kernels(b_MPC)
    return a_LK @ b_MK.T


def similarity(a: Stack, b: Stack, data: Any, points: int = POINTS, seed: int = 0) -> tuple[Tensor, float]:
    """CKA of all pairs of layers on `data`, float64 [L, M], and its mean over pairs where tokens are shuffled.

    Where the layers of two modules have outputs of different sizes, whole items are compared instead of positions.
    Raises BadData where the models do not read the same tokens, or a module fails on the data.
    """
    if isinstance(a, DecoderStack) and isinstance(b, DecoderStack) and a.spec.vocabulary != b.spec.vocabulary:
        raise BadData(f"vocabularies of {a.spec.vocabulary} and {b.spec.vocabulary} tokens",
                      expected="two models with one tokenizer", do="compare their tables with --tables-only")
    for stack in (a, b):
        if not isinstance(stack, DecoderStack):
            try_batch(stack, next(iter(Inputs(stack, data))))
    modules = not (isinstance(a, DecoderStack) or isinstance(b, DecoderStack))
    pooled = modules and len(_positions(a, data) | _positions(b, data)) > 1
    one, other = states(a, data, points, seed, pooled), states(b, data, points, seed, pooled)
    order = torch.randperm(len(other[0]), generator=torch.Generator().manual_seed(seed))
    control = cka(one, [states_PC[order] for states_PC in other])
    return cka(one, other), float(control.mean())


def drift(a: Stack, b: Stack) -> list[Mapping[str, float]]:
    """|W_b - W_a| / |W_a| of every matrix, by layer; matrices of other shapes, or in one model only, are absent."""
    found: list[Mapping[str, float]] = []
    for layer in range(min(len(a), len(b))):
        mine, theirs = (_matrices(stack, layer) for stack in (a, b))
        found.append({name: float((theirs[name] - weight).norm() / weight.norm().clamp(min=1e-30))
                      for name, weight in mine.items() if name in theirs and theirs[name].shape == weight.shape})
    return found


def _texts(inputs: Inputs) -> int:
    return sum(len(item.tokens_BT) for item in inputs if item.tokens_BT is not None)


def _kernels(states: list[Tensor]) -> Tensor:
    """Centred kernels between tokens, each of unit Frobenius norm, float64 [L, P * P]."""
    rows = []
    for states_PC in states:
        x_PC = states_PC.double() - states_PC.double().mean(0)
        kernel = (x_PC @ x_PC.T).flatten()
        rows.append(kernel / kernel.norm().clamp(min=1e-300))
    return torch.stack(rows)


def _matrices(stack: Stack, layer: int) -> dict[str, Tensor]:
    block = stack.block(layer)
    if isinstance(stack, DecoderStack):
        return {name: values(matrix).float() for name, matrix in cast(Block, block).matrices().items()}
    return {name: weight.detach().float() for name, weight in block.named_parameters() if weight.dim() > 1}
