"""The table in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from layerwise.testing.stacks import random_stack


@pytest.mark.parametrize(("vocabulary", "words"), [(19_000_000, "1216."), (2_000_000, "128."), (100, "0.0")])
def test_parameters_are_written_out_at_every_size(vocabulary: int, words: str) -> None:
    spec = replace(random_stack(2).spec, vocabulary=vocabulary)
    first = spec.table().splitlines()[0]
    count = spec.parameters() / 1e6
    assert f" {words}" in first and "e+" not in first
    assert abs(float(first.split("M parameters")[0].split()[-1]) / count - 1) < 0.01
