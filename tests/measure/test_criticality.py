"""Re-initialised layers one at a time, against doing it by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.measure.criticality import Criticality
from layerwise.measure.engine import measure
from layerwise.nets.initial import reset
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.quantize import Quantize


def test_it_equals_a_model_with_the_layer_drawn_anew(stack: DecoderStack, tokens_NT: Tensor) -> None:
    instrument = Criticality(draws=2, tokens=None)
    found = measure(stack, tokens_NT, instrument, progress=False)["criticality"].values
    original = stack(tokens_NT)[:, :-1].double().softmax(-1)
    for layer in range(len(stack)):
        values = []
        for trial in instrument.trials(stack):
            if trial.place == layer:
                with stack.swap(layer, instrument.alternative(stack, trial)):
                    changed = stack(tokens_NT)[:, :-1].double().softmax(-1)
                values.append(1 - float(F.cosine_similarity(original, changed, dim=-1).mean()))
        assert found[layer] == pytest.approx(sum(values) / 2, abs=1e-5)


def test_draws_differ_and_repeat(stack: DecoderStack) -> None:
    one, two = Criticality().trials(stack)[:2]
    blocks = [Criticality().alternative(stack, trial).matrix("q").weight for trial in (one, two, one)]  # type: ignore[operator]
    assert torch.equal(blocks[0], blocks[2]) and not torch.equal(blocks[0], blocks[1])


def test_a_reset_layer_is_as_before_training(stack: DecoderStack) -> None:
    before = {name: weight.clone() for name, weight in stack.block(1).named_parameters()}
    fresh = reset(stack.block(1), 0.0, torch.Generator().manual_seed(0))
    assert all(torch.equal(weight, before[name]) for name, weight in stack.block(1).named_parameters())
    for name, weight in fresh.named_parameters():
        if weight.dim() == 1:
            assert set(weight.tolist()) == {1.0}, name
    assert float(fresh.matrix("down").weight.std()) == pytest.approx(128**-0.5, rel=0.05)  # type: ignore[operator]


def test_what_is_refused(stack: DecoderStack, tokens_NT: Tensor) -> None:
    with pytest.raises(BadOption, match="draws=0"):
        Criticality(draws=0)
    packed = stack.rebuilt(stack.spec, [Quantize(4).apply(stack.block(layer), row)
                                        for layer, row in enumerate(stack.spec.rows)])
    with pytest.raises(BadOption, match="packed"):
        measure(packed, tokens_NT, "criticality", progress=False)
