"""Modelled energy by hand: two constants, and what the row says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from layerwise.measure.engine import measure
from layerwise.measure.layer_energy import millijoules
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.module import ModuleStack
from layerwise.transform.quantize import Quantize


def test_one_operation_and_one_byte() -> None:
    assert millijoules(1e9, 0) == pytest.approx(2.3)
    assert millijoules(0, 1e9) == pytest.approx(160)


def test_a_written_token_pays_for_all_weights(stack: DecoderStack) -> None:
    found = measure(stack, None, "energy", progress=False)
    prompt, decode = found["energy:prompt"].values, found["energy:decode"].values
    assert len(set(prompt)) == 1 and decode[0] > 5 * prompt[0]
    weights = stack.spec.rows[0].bytes(stack.spec.hidden, "float32")
    assert decode[0] > millijoules(0, weights)


def test_fewer_bits_cost_less_to_write(stack: DecoderStack) -> None:
    quantize = Quantize(4)
    rows = tuple(quantize.edit(row, stack.spec.hidden) for row in stack.spec.rows)
    packed = stack.rebuilt(replace(stack.spec, rows=rows), [quantize.apply(stack.block(layer), row)  # type: ignore[arg-type]
                                                           for layer, row in enumerate(stack.spec.rows)])
    before, after = (measure(model, None, "energy", progress=False) for model in (stack, packed))
    assert after["energy:decode"].values[0] < before["energy:decode"].values[0]


def test_a_module_is_counted_as_it_runs() -> None:
    module = ModuleStack(nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3))))
    found = measure(module, [torch.randn(5, 8)], "energy", progress=False)
    per_token = millijoules(2 * 8 * 8, (5 * 8 * 2 + 64) * 4 / 5)
    assert found["energy:prompt"].values == pytest.approx([per_token] * 3)
    assert "energy:decode" not in found  # a module decodes nothing
