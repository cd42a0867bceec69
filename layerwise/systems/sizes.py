"""Small decoders of several depths trained on the same bytes: the axis of scale where real models are too few."""

from __future__ import annotations

from torch import Tensor

from layerwise.spec import Attention, FeedForward, LayerSpec, StackSpec
from layerwise.stack.decoder import DecoderStack
from layerwise.systems.text import prose
from layerwise.train.fresh import fresh
from layerwise.train.heal import next_token_loss
from layerwise.train.loop import Recipe, train

HELD_OUT = 24


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def byte_blocks(seed: int, blocks: int = 2000, length: int = 64) -> tuple[Tensor, Tensor]:
    """The default text as bytes, [N, T]: blocks to train on, and the last 24, which are held out."""
    tokens_NT = prose(Bytes(), blocks, length, seed).tokens_NT
    return tokens_NT[:-HELD_OUT], tokens_NT[-HELD_OUT:]


def sized(layers: int, tokens_NT: Tensor, *, steps: int, width: int = 128, seed: int = 0) -> DecoderStack:
    """A decoder over bytes trained on `tokens_NT`, float32 and seeded; with no steps as it is drawn."""
    row = LayerSpec(Attention(heads=4, kv_heads=4, head_dim=width // 4), FeedForward(width=3 * width))
    stack = fresh(StackSpec("llama", width, 256, (row,) * layers, dtype="float32", context=128), seed)
    if steps:
        stack.decoder.requires_grad_(True)
        train(list(stack.decoder.parameters()), lambda tokens_BT: next_token_loss(stack, tokens_BT), tokens_NT,
              Recipe(steps=steps, batch=16, learning_rate=2e-3, warmup=20, seed=seed))
        stack.decoder.requires_grad_(False)
    return stack
