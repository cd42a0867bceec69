"""Skip effects against a loop that runs the whole model again for every skipped layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from layerwise.measure.effects import Part, depth_score, future, halves, present, skip_effects
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack


@pytest.fixture
def stack() -> DecoderStack:
    return random_stack(4, hidden=32)


@pytest.fixture
def tokens_BT() -> Tensor:
    return torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(1))


def states(stack: DecoderStack, tokens_BT: Tensor, start: Tensor | None = None, layer: int = 0) -> list[Tensor]:
    """What enters layer `layer` and what leaves each from there on."""
    state = stack.start(tokens_BT)
    found = [state.hidden if start is None else start]
    for index in range(layer, len(stack)):
        found.append(stack.run(state.moved(found[-1], index), slice(index, index + 1)).hidden)
    return found


def relative(clean: Tensor, changed: Tensor) -> Tensor:
    return (clean - changed).double().norm(dim=-1) / clean.double().norm(dim=-1)


@pytest.mark.parametrize("part", ["layer", "attention", "feed_forward"])
def test_effects_equal_starting_over(stack: DecoderStack, tokens_BT: Tensor, part: Part) -> None:
    skipped_BT, seen_BT = future(tokens_BT, torch.tensor([4, 6]))
    found = skip_effects(stack, tokens_BT, skipped_BT, seen_BT, part=part)
    clean = states(stack, tokens_BT)
    for s in range(4):
        if part == "layer":
            without = clean[s]
        else:
            with stack.zero(s, part):
                without = stack.run(stack.start(tokens_BT).moved(clean[s], s), slice(s, s + 1)).hidden
        changed = states(stack, tokens_BT, torch.where(skipped_BT[..., None], without, clean[s + 1]), s + 1)
        for step, layer in enumerate(range(s + 1, 4)):
            effect = relative(clean[layer + 1] - clean[layer], changed[step + 1] - changed[step])[seen_BT]
            assert float(found.layers_SL[s, layer]) == pytest.approx(float(effect.max()), rel=1e-4)
            assert float(found.mean_SL[s, layer]) == pytest.approx(float(effect.mean()), rel=1e-4)
    assert found.layers_SL.tril().count_nonzero() == 0


def test_a_direct_effect_changes_nothing_in_between(stack: DecoderStack, tokens_BT: Tensor) -> None:
    everywhere = present(tokens_BT)
    found = skip_effects(stack, tokens_BT, everywhere, everywhere, local=True)
    clean = states(stack, tokens_BT)
    wrote = torch.where(everywhere[..., None], clean[1] - clean[0], 0)
    entering = clean[3] - wrote
    leaving = stack.run(stack.start(tokens_BT).moved(entering, 3), slice(3, 4)).hidden
    effect = relative(clean[4] - clean[3], leaving - entering)[everywhere]
    assert float(found.layers_SL[0, 3]) == pytest.approx(float(effect.max()), rel=1e-4)
    next_layer = skip_effects(stack, tokens_BT, everywhere, everywhere)
    assert float(found.layers_SL[1, 2]) == pytest.approx(float(next_layer.layers_SL[1, 2]), rel=1e-4)


def test_the_mean_by_source_counts_later_layers_only(stack: DecoderStack, tokens_BT: Tensor) -> None:
    found = skip_effects(stack, tokens_BT, present(tokens_BT), present(tokens_BT))
    assert float(found.by_source_S[1]) == pytest.approx(float(found.layers_SL[1, 2:].mean()))
    assert math.isnan(float(found.by_source_S[3]))
    assert float(found.mean_by_source_S[1]) == pytest.approx(float(found.mean_SL[1, 2:].mean()))
    assert bool((found.mean_by_source_S[:3] <= found.by_source_S[:3]).all())


def test_a_past_layer_cannot_reach_back(stack: DecoderStack, tokens_BT: Tensor) -> None:
    skipped_BT, seen_BT = future(tokens_BT, torch.tensor([5, 5]))
    before_BT = ~seen_BT & ~skipped_BT
    assert float(skip_effects(stack, tokens_BT, seen_BT, before_BT).layers_SL.abs().max()) < 1e-5


def test_scores_and_halves_by_hand() -> None:
    assert depth_score(torch.tensor([0.0, 1.0, 0.0, 1.0])) == 2
    assert halves([9.0, 2.0, 4.0, math.nan]) == {"first half": 2.0, "second half": 4.0}
    assert halves([9.0, 1.0, 4.0, 6.0], 0) == {"first half": 5.0, "second half": 5.0}
