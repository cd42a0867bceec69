"""Filling up, slicing, and tokens that do not fit the model."""

from __future__ import annotations

import pytest
import torch

from layerwise.data.batch import check_tokens, common_prefix, pad, slices
from layerwise.errors import BadData


def test_equal_lengths_need_no_mask() -> None:
    assert pad([[1, 2], [3, 4]]).mask_BT is None


def test_filling_is_masked() -> None:
    batch = pad([[1], [2, 3]], value=9)
    assert batch.tokens_BT.tolist() == [[1, 9], [2, 3]]
    assert batch.mask_BT is not None
    assert batch.mask_BT.tolist() == [[True, False], [True, True]]


def test_slices_cover_everything_once() -> None:
    assert [list(range(10))[part] for part in slices(10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_common_prefix() -> None:
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert common_prefix([[], [1]]) == 0


@pytest.mark.parametrize("sequences", [[], [[1], []]])
def test_nothing_to_pad(sequences: list[list[int]]) -> None:
    with pytest.raises(BadData):
        pad(sequences)


@pytest.mark.parametrize(("token", "fits"), [(0, True), (9, True), (10, False), (-1, False)])
def test_tokens_must_lie_in_the_vocabulary(token: int, fits: bool) -> None:
    if fits:
        check_tokens(torch.tensor([[token]]), 10)
        return
    with pytest.raises(BadData, match=f"token {token} for a model with 10 tokens"):
        check_tokens(torch.tensor([[3, token]]), 10)
