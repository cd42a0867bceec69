"""Small random models to serve, and what plain runs say they answer."""

from __future__ import annotations

import pytest
import torch

from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from tests.serve.plain import prompts
from tests.serve.served import served, talker, tiny_folder  # noqa: F401 - fixtures


@pytest.fixture(scope="session")
def stack() -> DecoderStack:
    return random_stack(4)


@pytest.fixture(scope="session")
def mixed() -> list[list[int]]:
    """Prompts of 1 to 60 tokens, some with a common beginning."""
    return prompts(10)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
