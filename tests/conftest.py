"""Fixtures shared by every test."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from layerwise.stack import DecoderStack

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
hypothesis.settings.register_profile("no deadline", deadline=None)  # how busy the machine is must not matter
hypothesis.settings.load_profile("no deadline")


@pytest.fixture
def tiny_stack() -> DecoderStack:
    """A random Llama-like decoder: 4 layers, hidden 32, vocabulary 97, 4 query and 2 key heads, float32."""
    import torch

    from layerwise.nets.decoder import Decoder
    from layerwise.spec import Attention, FeedForward, LayerSpec, StackSpec
    from layerwise.stack import DecoderStack

    row = LayerSpec(Attention(heads=4, kv_heads=2, head_dim=8), FeedForward(64))
    spec = StackSpec(family="llama", hidden=32, vocabulary=97, rows=(row,) * 4, dtype="float32", context=128)
    torch.manual_seed(0)
    return DecoderStack(Decoder(spec).requires_grad_(False).eval(), name="tiny")
