"""Counting equal tokens."""

from __future__ import annotations

import pytest

from layerwise.systems.served import same


def test_tokens_are_compared_place_by_place() -> None:
    assert same([[1, 2], [3, 4]], [[1, 2], [3, 4]]) == 1
    assert same([[1, 2], [3, 4]], [[2, 1], [3, 5]]) == 0.25
    with pytest.raises(ValueError, match="shorter"):
        same([[1, 2]], [[1]])
