"""Cost: sizes from the row, operations against torch's own counter, times that are there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layerwise.measure.cost import Cost, flops
from layerwise.measure.engine import measure
from layerwise.spec import Attention, FeedForward, LayerSpec
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.module import ModuleStack
from layerwise.testing.stacks import random_stack

ROW = LayerSpec(Attention(4, 2, 16), FeedForward(128))


def test_sizes_add_up_to_the_model(stack: DecoderStack) -> None:
    found = measure(stack, None, "cost", progress=False)
    outside = 97 * 64 + 64
    assert sum(found["cost:parameters"].values) + outside == stack.spec.parameters()
    assert sum(found["cost:bytes"].values) + 4 * outside == stack.spec.bytes()
    assert all(value > 0 for part in ("prefill-ms", "decode-ms") for value in found[f"cost:{part}"].values)
    assert found["cost:flops"].important is None


def test_operations_of_the_matrices_equal_torchs_count(stack: DecoderStack) -> None:
    state = stack.start(torch.zeros(1, 10, dtype=torch.int64))
    with FlopCounterMode(display=False) as counter:
        stack.run(state, slice(0, 1))
    matrices = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    attention = 4 * 4 * 16 * (10 + 1) / 2
    assert flops(ROW, 64, prompt=10) == pytest.approx(matrices / 10 + attention)


def test_a_window_limits_the_keys_that_are_counted() -> None:
    narrow = replace(ROW, mixer=replace(ROW.mixer, window=2))
    fewer = (1 + 2 + 3 + 4) - (1 + 2 + 2 + 2)
    assert flops(ROW, 64, 4) - flops(narrow, 64, 4) == pytest.approx(4 * 4 * 16 * fewer / 4)


def test_only_chosen_experts_are_counted() -> None:
    routed = replace(ROW, feed_forward=FeedForward(128, experts=8, experts_per_token=2))
    assert flops(routed, 64, 1) - flops(ROW, 64, 1) == 2 * 3 * 128 * 64 + 2 * 8 * 64


def test_a_layer_without_attention_decodes() -> None:
    stack = random_stack(2, row=LayerSpec(None, FeedForward(128)))
    found = measure(stack, None, Cost(repeats=1), progress=False)
    assert all(value > 0 for value in found["cost:decode-ms"].values)


def test_layers_of_a_module_are_counted_on_the_first_batch() -> None:
    module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    found = measure(ModuleStack(module), [torch.randn(5, 8)], Cost(repeats=1), progress=False)
    assert found["cost:flops"].values == (2 * 8 * 8,) * 3
    assert found["cost:parameters"].values == (72,) * 3
    assert "cost:decode-ms" not in found  # a module decodes nothing
    assert not any(layer._forward_pre_hooks for layer in module)
