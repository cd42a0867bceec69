"""How much skipping one layer changes what later layers write, and the prediction: source by target matrices.

    E[s, l] = |D_l - D'_l| / |D_l|

with D_l what layer l adds to the residual stream and D'_l the same with layer s (or one half of it) skipped.
`local` takes only what s wrote out of the input of l and leaves everything between as it was, so that E is what
l reads from s directly. Source: arXiv 2505.13898 (effects on the present, on future tokens, and direct ones).

Shapes: S skipped layer, L later layer, B rows, T tokens, C hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.stack.base import Stack, State

SMALLEST = 1e-6
Part = Literal["layer", "attention", "feed_forward"]


@dataclass(frozen=True)
class Effects:
    """`layers_SL` is zero for l <= s; `output_S` is the L2 change of the predicted distribution.

    Both are the largest over positions and rows, as published; `mean_SL` is the mean over them.
    """

    layers_SL: Tensor
    mean_SL: Tensor
    output_S: Tensor

    @property
    def by_source_S(self) -> Tensor:
        """Mean effect of each layer on those after it; nan for the last, which has none."""
        return _over_later(self.layers_SL)

    @property
    def mean_by_source_S(self) -> Tensor:
        """The same of means over positions and rows, less moved by single positions."""
        return _over_later(self.mean_SL)


@torch.inference_mode()
def skip_effects(stack: Stack, tokens_BT: Tensor, skipped_BT: Tensor, seen_BT: Tensor, *, part: Part = "layer",
                 local: bool = False) -> Effects:
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
        wrote_BTC = states[skipped + 1].hidden - _without(stack, states[skipped], part)
        wrote_BTC = torch.where(skipped_BT.to(wrote_BTC.device)[..., None], wrote_BTC, 0)
        entering = _removed(states[skipped + 1], wrote_BTC)
        for layer in range(skipped + 1, count):
            leaving = stack.run(entering, slice(layer, layer + 1))
            effect_P = _relative(added[layer], leaving.hidden - entering.hidden)[seen_BT]
            largest[skipped, layer], mean[skipped, layer] = effect_P.max(), effect_P.mean()
            entering = _removed(states[layer + 1], wrote_BTC) if local else leaving
        output[skipped] = (clean_PV - _prediction(stack, entering, seen_BT)).norm(dim=-1).max()
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


def _over_later(effect_SL: Tensor) -> Tensor:
    later_S = torch.arange(len(effect_SL) - 1, -1, -1)
    return effect_SL.sum(1) / torch.where(later_S > 0, later_S, torch.nan)


def depth_score(effect_S: Tensor) -> float:
    """Mean layer weighted by effect: where along the depth the work is done."""
    return float((torch.arange(len(effect_S)) * effect_S).sum() / effect_S.sum())


def halves(by_depth: Sequence[float], first: int = 1) -> dict[str, float]:
    """Mean over the first and the second half of the depth; what comes before `first` is left out, and nan."""
    middle = len(by_depth) // 2
    parts = {"first half": by_depth[first:middle], "second half": by_depth[middle:]}
    return {name: round(float(torch.tensor(values).nanmean()), 4) for name, values in parts.items()}


def _walk(stack: Stack, state: State) -> Iterator[State]:
    """The state after every remaining layer."""
    while state.layer < len(stack):
        state = stack.run(state, slice(state.layer, state.layer + 1))
        yield state


def _without(stack: Stack, entering: State, part: Part) -> Tensor:
    """What leaves the layer when it, or one half of it, writes nothing, [B, T, C]."""
    if part == "layer":
        return entering.hidden
    with stack.zero(entering.layer, part):
        return stack.run(entering, slice(entering.layer, entering.layer + 1)).hidden


def _removed(state: State, wrote_BTC: Tensor) -> State:
    return state.moved(state.hidden - wrote_BTC, state.layer)


def _relative(clean_BTC: Tensor, changed_BTC: Tensor) -> Tensor:
    change_BT = (clean_BTC.float() - changed_BTC.float()).norm(dim=-1)
    relative_BT: Tensor = change_BT / clean_BTC.float().norm(dim=-1).clamp(min=SMALLEST)
    return relative_BT


def _prediction(stack: Stack, state: State, seen_BT: Tensor) -> Tensor:
    """Probabilities at the seen positions, [P, V]."""
    rows_1PC = state.hidden[seen_BT][None]
    logits_PV: Tensor = stack.finish(state.moved(rows_1PC, state.layer))[0]
    return logits_PV.float().softmax(-1)
