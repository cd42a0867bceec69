"""Any data becomes calls of a module."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layerwise.data import Batches, Call, ImageData, TextData, calls
from layerwise.data.text import Tokenizer
from layerwise.errors import BadData

X = torch.arange(3)


@pytest.mark.parametrize(("item", "args", "kwargs"), [
    (X, (X,), {}),
    ((X, X), (X, X), {}),
    ([X, X], (X, X), {}),
    ({"x": X}, (), {"x": X}),
    (((X,), {"y": X}), (X,), {"y": X}),
    (Call((X,)), (X,), {}),
])
def test_forms_of_a_batch(item: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    [call] = Batches([item])
    assert len(call.args) == len(args)
    assert all(a is b for a, b in zip(call.args, args, strict=True))
    assert call.kwargs == kwargs


def test_an_iterator_can_be_walked_through_twice() -> None:
    batches = Batches(iter([X, X + 1]))
    assert [len(list(batches)) for _ in range(2)] == [2, 2]


def test_no_batch_and_a_strange_batch() -> None:
    with pytest.raises(BadData, match="without a batch"):
        Batches([])
    with pytest.raises(BadData, match="of type str"):
        list(Batches(["text"]))


def test_text_images_and_anything_else(byte_tokenizer: Tokenizer) -> None:
    first, second = calls(TextData.from_prompts(["ab", "a", "abc"], byte_tokenizer), size=2)
    assert first.kwargs["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert second.kwargs["input_ids"].tolist() == [[97, 98, 99]]
    assert set(second.kwargs) == {"input_ids"}
    [images] = calls(ImageData.shapes(4))
    assert images.args[0].shape == (4, 3, 32, 32)
    assert images.labels_B is not None
    assert [call.args for call in calls([(X,)])] == [(X,)]
