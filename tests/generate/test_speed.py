"""Speeds count tokens over the time they took, and nothing else."""

from __future__ import annotations

import time

import pytest
import torch

import layerwise as lw
from layerwise.errors import BadOption
from layerwise.generate.speed import decode_speed, prefill_speed
from layerwise.stack import ModuleStack


def test_decode_speed_counts_new_tokens_only(stack: lw.Stack) -> None:
    class Slow(torch.nn.Module):
        def forward(self, x_BTC: torch.Tensor, *shared: object) -> torch.Tensor:
            time.sleep(0.01 if x_BTC.shape[1] == 1 else 0.2)
            return x_BTC

    with stack.swap(0, Slow()):
        speed = decode_speed(stack, prompt_tokens=4, new_tokens=8, repeats=1)
    assert 40 < speed < 100


def test_prefill_speed_counts_prompt_tokens(stack: lw.Stack) -> None:
    class Slow(torch.nn.Module):
        def forward(self, x_BTC: torch.Tensor, *shared: object) -> torch.Tensor:
            time.sleep(0.2)
            return x_BTC

    with stack.swap(0, Slow()):
        speed = prefill_speed(stack, tokens=40, repeats=1)
    assert 100 < speed < 200


@pytest.mark.parametrize("speed", [decode_speed, prefill_speed])
def test_a_module_is_refused(speed: object) -> None:
    assert callable(speed)
    module = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
    with pytest.raises(BadOption):
        speed(ModuleStack(module))
