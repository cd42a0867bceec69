"""What transforms make of rows that are state spaces: the same promises, or one clear refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from layerwise.errors import BadOption
from layerwise.export.dense import dense_tensors
from layerwise.nets.decoder import Decoder
from layerwise.spec import Attention, FeedForward, LayerSpec, StackSpec, StateSpace
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.tail import Tail
from layerwise.testing.stacks import random_stack
from layerwise.testing.transforms import check_transform
from layerwise.transform.drop import Drop
from layerwise.transform.low_rank import LowRank
from layerwise.transform.narrow import Narrow
from layerwise.transform.quantize import Quantize
from layerwise.transform.rotate import RotateValues, rotate_residual
from layerwise.transform.scale_inputs import ScaleInputs
from layerwise.transform.share_kv import ShareKV

SPACE = LayerSpec(StateSpace(heads=8, head_dim=16, state=8, groups=2), FeedForward(128))
ROWS = (SPACE, LayerSpec(Attention(4, 2, 16), FeedForward(128)), replace(SPACE, feed_forward=None))


@pytest.fixture(scope="module")
def hybrid() -> DecoderStack:
    return random_stack(rows=ROWS)


@pytest.mark.parametrize("transform", [
    Quantize(8), Quantize(4, method="gptq"), LowRank(16), Drop("attention"), Drop("feed_forward"), Narrow(width=64),
    ScaleInputs(4),
], ids=repr)
def test_the_contract_holds(transform: Any, hybrid: DecoderStack) -> None:
    check_transform(transform, hybrid)


@pytest.mark.parametrize("transform", [Narrow(kv_heads=1), RotateValues(), ShareKV(0)], ids=repr)
def test_what_needs_keys_is_refused(transform: Any) -> None:
    with pytest.raises(BadOption):
        transform.edit(SPACE, 64)


def test_a_rotated_residual_stream_computes_the_same() -> None:
    spec = StackSpec("llama", 64, 61, ROWS, tied=False, dtype="float32", context=64)
    decoder, generator = Decoder(spec), torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + 0.5 * noise
    stack = DecoderStack(decoder.requires_grad_(False).eval())
    tokens_BT = torch.arange(12).view(2, 6)
    torch.testing.assert_close(rotate_residual(stack)(tokens_BT), stack(tokens_BT), rtol=0, atol=1e-3)


def test_dense_tensors_are_all_tensors(hybrid: DecoderStack) -> None:
    own, dense = hybrid.decoder.state_dict(), dict(dense_tensors(hybrid))
    assert dense.keys() == own.keys() and all(torch.equal(dense[name], own[name]) for name in own)


def test_the_end_of_rows_equals_the_whole(hybrid: DecoderStack) -> None:
    rows = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12, 13, 14, 15]]
    tail = Tail(hybrid, rows, [2, 0, 5])
    state = tail.enter(1)
    expected = torch.stack([hybrid(torch.tensor([row]))[0, -1] for row in rows])
    for _ in range(2):
        torch.testing.assert_close(tail.last(tail.run(state)), expected, rtol=1e-5, atol=1e-5)
