"""Output errors before anything is built: after learned rotations too, and only where values may be rotated."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch

from layerwise.measure.engine import measure
from layerwise.measure.output_error import OutputError
from layerwise.nets.decoder import Block
from layerwise.spec import Attention, FeedForward, Format, LayerSpec
from layerwise.testing.stacks import random_stack
from layerwise.transform.gram import grams
from layerwise.transform.learn_rotation import LearnRotation
from layerwise.transform.output_error import energy
from layerwise.transform.quantize import Quantize, values

ROW = LayerSpec(Attention(4, 2, 16), FeedForward(96))
TOKENS = torch.randint(50, (4, 48), generator=torch.Generator().manual_seed(0))


def test_errors_after_the_learned_rotation_are_those_of_the_rotated_block() -> None:
    """Plain rounding of all 64 outputs, measured on the rotated block itself."""
    stack = random_stack(1, row=ROW)
    scores = measure(stack, TOKENS, [OutputError(("3/16", "2/64"), "nearest", rotated=True)], progress=False)
    block, states = cast(Block, stack.block(0)), [stack.start(TOKENS)]
    turned = LearnRotation().apply(block, ROW, grams(block, 0, states))
    inputs = grams(turned, 0, states)
    for name in ("v", "o"):
        weight_OI = values(turned.matrix(name)).float()
        for label in ("3/16", "2/64"):
            format = Format.parse(label)
            packed = Quantize(format.bits, format.group, method="nearest").apply(turned, ROW)
            lost = energy(weight_OI - values(packed.matrix(name)), inputs[name]) / energy(weight_OI, inputs[name])
            assert scores[f"output-error:{name}:rotated {label}"].values[0] == pytest.approx(lost, rel=1e-3)


def test_only_values_that_no_other_layer_reads_are_rotated() -> None:
    sharing = replace(ROW, mixer=Attention(4, 2, 16, shares=0))
    stack = random_stack(rows=(ROW, sharing, ROW))
    scores = measure(stack, TOKENS, [OutputError(("3/16",), "nearest", rotated=True)], progress=False)
    known = [value == value for value in scores["output-error:o:rotated 3/16"].values]
    assert known == [False, False, True]
