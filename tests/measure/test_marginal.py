"""What undoing an edit saves is the difference of two models that were made, one with the edit and one without."""

from __future__ import annotations

import pytest
import torch

from layerwise.allocate.apply import apply
from layerwise.allocate.plan import Edit, Plan
from layerwise.data.text import Source, TextData
from layerwise.measure.marginal import divergence, marginals
from layerwise.report.layers import kept_layers
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack

GONE = [Edit(layer, "drop") for layer in (0, 2, 3, 5)]
PACKED = Edit(4, "quantize", {"bits": 3, "group": 16, "symmetric": False})
SHARED = Edit(3, "share-kv", {"source": 1})


@pytest.fixture(scope="module")
def stack() -> DecoderStack:
    return random_stack(6)


def text() -> TextData:
    tokens_NT = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    return TextData(tokens_NT, "random", Source("random", "calibration", "", 48, (0, 1)))


def edited(stack: DecoderStack, *edits: Edit) -> tuple[DecoderStack, Plan]:
    plan = Plan(stack.spec.fingerprint(), len(stack), edits)
    return apply(stack, plan), plan


def test_undoing_each_edit_gives_the_model_without_it(stack: DecoderStack) -> None:
    """The first layer, two in a row and the last are gone, and one of the two that are left is packed."""
    edits = (*GONE, PACKED)
    after, plan = edited(stack, *edits)
    found = marginals(stack, after, kept_layers(stack.spec, plan), text(), tokens=None)
    assert found.kl == pytest.approx(divergence(stack, after, text(), tokens=None), rel=1e-6)
    assert set(found.saved) == {0, 2, 3, 4, 5}
    for edit in edits:
        without, _ = edited(stack, *(other for other in edits if other is not edit))
        expected = found.kl - divergence(stack, without, text(), tokens=None)
        assert found.saved[edit.target] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_undoing_an_edit_finds_the_keys_that_it_read_before(stack: DecoderStack) -> None:
    """Layer 3 of the original reads layer 1, which is layer 0 where one before it is gone; so does a layer put back."""
    before, _ = edited(stack, SHARED)
    for undone in (Edit(3, "quantize", PACKED.arguments), Edit(3, "drop")):
        (both, plan), (one, _) = edited(before, GONE[0], undone), edited(before, GONE[0])
        found = marginals(before, both, kept_layers(before.spec, plan), text(), tokens=None)
        expected = found.kl - divergence(before, one, text(), tokens=None)
        assert set(found.saved) == {0, 3} and found.saved[3] == pytest.approx(expected, rel=1e-3)


def test_what_reads_the_keys_of_a_layer_that_is_gone_cannot_be_undone(stack: DecoderStack) -> None:
    before, _ = edited(stack, SHARED)
    both, plan = edited(before, Edit(3, "drop"), Edit(1, "drop"))
    assert set(marginals(before, both, kept_layers(before.spec, plan), text()).saved) == {1}
