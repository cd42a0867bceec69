"""A tiny random Llama as transformers saves it, and as this library opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import layerwise as lw


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The transformers model, and the folder it was saved in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="session")
def stack(reference: tuple[Any, Path]) -> lw.Stack:
    return lw.open(reference[1])
