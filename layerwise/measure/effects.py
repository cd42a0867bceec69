"""How much skipping one layer changes what later layers write, and the prediction: source by target matrices.

E[s, l] = |D_l - D'_l| / |D_l| with D_l what layer l adds to the residual stream and D'_l the same with
layer s skipped. Source: arXiv 2505.13898 (effects on the present and on future tokens).

Shapes: S skipped layer, L later layer, B rows, T tokens, C hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.stack.base import Stack, State

SMALLEST = 1e-6


@dataclass(frozen=True)
class Effects:
    """`layers_SL` is zero for l <= s; `output_S` is the L2 change of the predicted distribution.

    Both are the largest over positions and rows, as published; `mean_SL` is the mean over them.
    """

    layers_SL: Tensor
    mean_SL: Tensor
    output_S: Tensor


@torch.inference_mode()
def skip_effects(stack: Stack, tokens_BT: Tensor, skipped_BT: Tensor, seen_BT: Tensor) -> Effects:
    """Skip each layer in turn at the positions of `skipped_BT` and look at those of `seen_BT`, both bool.

    For the effect on present tokens both are all positions but the first; for the effect on the future,
    `skipped_BT` is True before a cut and `seen_BT` after it. Cost: layers^2 / 2 layer runs.
    """
    count = len(stack)
    states = [stack.start(tokens_BT)]
    states.extend(_walk(stack, states[0]))
    added = [states[layer + 1].hidden - states[layer].hidden for layer in range(count)]
    clean_PV = _prediction(stack, states[-1], seen_BT)
    largest, mean, output = torch.zeros(count, count), torch.zeros(count, count), torch.zeros(count)
    for skipped in range(count):
        before, after = states[skipped], states[skipped + 1]
        state = after.moved(torch.where(skipped_BT[..., None], before.hidden, after.hidden), after.layer)
        for changed in _walk(stack, state):
            layer = changed.layer - 1
            effect_P = _relative(added[layer], changed.hidden - state.hidden)[seen_BT]
            largest[skipped, layer], mean[skipped, layer] = effect_P.max(), effect_P.mean()
            state = changed
        output[skipped] = (clean_PV - _prediction(stack, state, seen_BT)).norm(dim=-1).max()
    return Effects(largest, mean, output)


def present(tokens_BT: Tensor) -> Tensor:
    """All positions but the first, bool [B, T]: skipped and seen for the effect on present tokens."""
    mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    mask_BT[:, 0] = False
    return mask_BT


def future(tokens_BT: Tensor, cuts_B: Tensor) -> tuple[Tensor, Tensor]:
    """(skipped, seen): positions 1 to cut - 1, and from the cut on; one cut a row."""
    place_T = torch.arange(tokens_BT.shape[1])
    return (place_T > 0) & (place_T < cuts_B[:, None]), place_T >= cuts_B[:, None]


def depth_score(effect_S: Tensor) -> float:
    """Mean layer weighted by effect: where along the depth the work is done."""
    return float((torch.arange(len(effect_S)) * effect_S).sum() / effect_S.sum())


def _walk(stack: Stack, state: State) -> Iterator[State]:
    """The state after every remaining layer."""
    while state.layer < len(stack):
        state = stack.run(state, slice(state.layer, state.layer + 1))
        yield state


def _relative(clean_BTC: Tensor, changed_BTC: Tensor) -> Tensor:
    change_BT = (clean_BTC.float() - changed_BTC.float()).norm(dim=-1)
    relative_BT: Tensor = change_BT / clean_BTC.float().norm(dim=-1).clamp(min=SMALLEST)
    return relative_BT


def _prediction(stack: Stack, state: State, seen_BT: Tensor) -> Tensor:
    """Probabilities at the seen positions, [P, V]."""
    rows_1PC = state.hidden[seen_BT][None]
    logits_PV: Tensor = stack.finish(state.moved(rows_1PC, state.layer))[0]
    return logits_PV.float().softmax(-1)
