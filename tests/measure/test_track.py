"""Ranks and probabilities through the lens, by hand and against the model's own output."""

from __future__ import annotations

import pytest
import torch

from layerwise.errors import BadData
from layerwise.measure.track import track
from layerwise.stack.decoder import DecoderStack

TOKENS_BT = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
TRACKED_BK = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_the_last_depth_is_the_prediction(tiny_stack: DecoderStack) -> None:
    found = track(tiny_stack, TOKENS_BT, TRACKED_BK)
    log_p_BV = tiny_stack(TOKENS_BT)[:, -1].log_softmax(-1)
    assert found.log_p_DBK.shape == (5, 2, 3)
    torch.testing.assert_close(found.log_p_DBK[-1], log_p_BV.gather(1, TRACKED_BK))
    order_BV = log_p_BV.argsort(descending=True)
    for row in range(2):
        for place, token in enumerate(TRACKED_BK[row]):
            assert int(order_BV[row, found.rank_DBK[-1, row, place]]) == int(token)


def test_every_depth_is_the_lens_on_what_enters_the_layer(tiny_stack: DecoderStack) -> None:
    found = track(tiny_stack, TOKENS_BT, TRACKED_BK)
    with tiny_stack.capture("input") as seen:
        tiny_stack(TOKENS_BT)
    for layer in range(4):
        log_p_BV = tiny_stack.decoder.logits(seen[layer, "input"][:, -1]).log_softmax(-1)
        torch.testing.assert_close(found.log_p_DBK[layer], log_p_BV.gather(1, TRACKED_BK))


def test_filling_does_not_matter_where_the_place_is_told(tiny_stack: DecoderStack) -> None:
    filled = torch.cat([TOKENS_BT, torch.zeros(2, 3, dtype=torch.int64)], 1)
    found = track(tiny_stack, filled, TRACKED_BK, torch.tensor([3, 3]))
    torch.testing.assert_close(found.log_p_DBK, track(tiny_stack, TOKENS_BT, TRACKED_BK).log_p_DBK)


def test_the_top_token_has_rank_zero(tiny_stack: DecoderStack) -> None:
    top_BK = tiny_stack(TOKENS_BT)[:, -1].argmax(-1, keepdim=True)
    assert not bool(track(tiny_stack, TOKENS_BT, top_BK).rank_DBK[-1].any())


def test_ids_of_another_model_are_refused(tiny_stack: DecoderStack) -> None:
    with pytest.raises(BadData, match="token 97"):
        track(tiny_stack, TOKENS_BT, torch.tensor([[97], [1]]))
