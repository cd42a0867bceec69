"""A small random decoder, tokens for it, and plain float64 arithmetic to compare with."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack


@pytest.fixture(scope="session")
def stack() -> DecoderStack:
    """Four random layers of width 64, vocabulary 97, float32; read only."""
    return random_stack()


@pytest.fixture(scope="session")
def tokens_NT() -> Tensor:
    return torch.randint(97, (5, 16), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Trace:
    """Every tensor of one plain forward pass, in float64, one entry per layer."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    attention: list[Tensor]
    feed_forward: list[Tensor]
    logits: Tensor


@pytest.fixture(scope="session")
def trace(stack: DecoderStack, tokens_NT: Tensor) -> Trace:
    """The sites of the whole batch, captured in one run."""
    with stack.capture("input", "output", "attention", "feed_forward") as seen:
        logits = stack(tokens_NT)
    sites = [[seen[layer, site].double() for layer in range(len(stack))]
             for site in ("input", "output", "attention", "feed_forward")]
    return Trace(*sites, logits.double())
