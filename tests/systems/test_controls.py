"""A model whose weights are shuffled keeps its values and loses its structure."""

from __future__ import annotations

import pytest
import torch

import layerwise as lw
from layerwise.allocate.plan import Edit
from layerwise.errors import BadOption
from layerwise.stack import ModuleStack
from layerwise.systems.controls import shuffled_weights
from layerwise.testing.stacks import random_stack


def test_every_matrix_keeps_its_values_in_another_order() -> None:
    stack = random_stack(2, hidden=32)
    before = {name: tensor.clone() for name, tensor in stack.tensors()}
    for name, tensor in shuffled_weights(stack, 0).tensors():
        if name.startswith("layers.") and tensor.dim() > 1:
            assert not torch.equal(tensor, before[name])
            assert torch.equal(tensor.flatten().sort().values, before[name].flatten().sort().values)
        else:
            assert torch.equal(tensor, before[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in stack.tensors())


def test_the_seed_is_the_order() -> None:
    stack, tokens_BT = random_stack(2, hidden=32), torch.arange(9)[None]
    one, same, other = (shuffled_weights(stack, seed)(tokens_BT) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_packed_stacks_and_modules_are_refused() -> None:
    stack = random_stack(2, hidden=32)
    plan = lw.Plan(stack.spec.fingerprint(), 2, (Edit(0, "quantize", {"bits": 8}),))
    module = ModuleStack(torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)]))
    for refused in (lw.apply(stack, plan), module):
        with pytest.raises(BadOption, match="dense decoder"):
            shuffled_weights(refused, 0)
