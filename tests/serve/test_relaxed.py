"""Groups by hand, passes against a loop over halves, and what calibration leaves in a drafter's caches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.nets.decoder import Block
from layerwise.nets.flow import Flow
from layerwise.serve.engine import Engine
from layerwise.serve.model_drafts import SecondModel
from layerwise.serve.plan import in_order
from layerwise.serve.relaxed import InGroups, critical_path, groups
from layerwise.serve.request import Params
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from tests.serve.plain import KINDS, drawn, prompts, serve

TOKENS_1N = torch.randint(97, (1, 9), generator=torch.Generator().manual_seed(0))


def _entering(stack: DecoderStack) -> tuple[Tensor, Flow]:
    state = stack.start(TOKENS_1N)
    return state.hidden, state.shared


def test_groups_by_hand() -> None:
    assert groups(7, 2) == [range(1), range(1, 3), range(3, 5), range(5, 6), range(6, 7)]
    assert groups(2, 4) == [range(1), range(1, 2)]
    assert groups(1, 4) == [range(1)]
    assert critical_path(30, 4) == 9 + 30
    assert critical_path(30, 1) == 60


@pytest.mark.parametrize("kind", ["full", "windows", "shared", "no attention"])
def test_groups_of_one_are_layers_in_order(kind: str) -> None:
    stack = KINDS[kind].stack()
    layers = range(len(stack))
    for action in (InGroups(1), InGroups(1, whole=True)):
        assert torch.equal(action(stack, *_entering(stack), layers), in_order(stack, *_entering(stack), layers))


def test_a_group_attends_to_what_enters_it() -> None:
    stack = random_stack(5)
    blocks = [stack.block(layer) for layer in range(5)]
    x_1NC, flow = _entering(stack)
    for layer, block in enumerate(blocks):
        assert isinstance(block, Block) and block.attention and block.feed_forward
        if layer in (0, 1, 4):
            entered_1NC = x_1NC
        x_1NC = x_1NC + block.attention(entered_1NC, flow, layer)
        x_1NC = x_1NC + block.feed_forward(x_1NC)
    found_1NC = InGroups(3)(stack, *_entering(stack), range(5))
    torch.testing.assert_close(found_1NC, x_1NC)
    halves_1NC = InGroups(3)(stack, InGroups(3)(stack, *_entering(stack), range(4)), flow, range(4, 5))
    torch.testing.assert_close(halves_1NC, found_1NC)
    assert not torch.allclose(InGroups(3, whole=True)(stack, *_entering(stack), range(5)), found_1NC)


def test_calibration_leaves_what_plain_passes_leave(stack: DecoderStack) -> None:
    [prompt], count = prompts(1), 16
    kept: dict[bool, list[Tensor]] = {}
    for calibrate in (False, True):
        drafter = SecondModel(stack, most=3, action=InGroups(2), calibrate=calibrate)
        engine = Engine(stack, drafter=drafter, cache_tokens=256, prepare=False)
        found, = serve(engine, [prompt], Params(max_tokens=count, seed=0))
        assert list(found.tokens) == drawn(stack, prompt, Params(max_tokens=count, seed=0))
        pools = drafter.runner.pools
        kept[calibrate] = [pool.k for pool in pools if pool is not None]
        own = [pool.k for pool in engine.runner.pools if pool is not None]
        certain = len(prompt) + 4  # of the last round's tokens only some were read in order
        same = [torch.allclose(a[:, :certain], b[:, :certain], rtol=1e-4, atol=1e-4)
                for a, b in zip(kept[calibrate], own, strict=True)]
        assert all(same) if calibrate else not all(same)


def test_groups_without_layers_are_refused() -> None:
    with pytest.raises(BadOption, match="groups of 0"):
        InGroups(0)
