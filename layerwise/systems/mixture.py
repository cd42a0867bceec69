"""A small mixture of experts trained on the bytes of real text: routing that was learned, where no model is at hand.

Attention looks back as far as the blocks it was trained on, so that longer prompts are nothing new to it.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from layerwise.nets.decoder import Block, shallow
from layerwise.spec import Attention, FeedForward, LayerSpec, StackSpec
from layerwise.stack.decoder import DecoderStack
from layerwise.train.balance import watched
from layerwise.train.fresh import fresh
from layerwise.train.heal import next_token_loss
from layerwise.train.loop import Recipe, train

WEIGHT = 0.01
"""Of the balance loss, the mean over layers, as in Switch Transformers and Mixtral."""


def mixture(tokens_NT: Tensor, *, layers: int, experts: int, chosen: int, steps: int, width: int = 64,
            context: int = 2048, seed: int = 0) -> DecoderStack:
    """A decoder over bytes with `experts` experts a layer, of which a token runs `chosen`; float32 and seeded.

    `experts` 0 gives a dense one as wide as the chosen experts together. With no steps it is as it is drawn.
    """
    half = FeedForward(width // 2, experts=experts, experts_per_token=chosen) if experts else FeedForward(
        chosen * width // 2)
    row = LayerSpec(Attention(heads=4, kv_heads=4, head_dim=width // 4, window=tokens_NT.shape[1]), half)
    stack = fresh(StackSpec("llama", width, 256, (row,) * layers, dtype="float32", context=context), seed)
    if not steps:
        return stack

    def loss(tokens_BT: Tensor) -> Tensor:
        with watched(stack.decoder) as imbalances:
            value = next_token_loss(stack, tokens_BT)
        return value + WEIGHT * sum(imbalances) / max(1, len(imbalances))

    stack.decoder.requires_grad_(True)
    train(list(stack.decoder.parameters()), loss, tokens_NT,
          Recipe(steps=steps, batch=8, learning_rate=3e-3, warmup=20, seed=seed))
    stack.decoder.requires_grad_(False)
    return stack


def routed(stack: DecoderStack, chosen: int) -> DecoderStack:
    """The same weights, each token sent to its best `chosen` experts."""
    rows, blocks = [], []
    for layer, row in enumerate(stack.spec.rows):
        block = stack.block(layer)
        assert isinstance(block, Block) and block.feed_forward is not None and row.feed_forward is not None
        half = replace(row.feed_forward, experts_per_token=chosen)
        twin = shallow(block)
        twin.feed_forward = shallow(block.feed_forward)
        twin.feed_forward.body = shallow(block.feed_forward.body)
        twin.feed_forward.body.spec = half  # type: ignore[assignment]
        rows.append(replace(row, feed_forward=half))
        blocks.append(twin)
    return stack.rebuilt(replace(stack.spec, rows=tuple(rows)), blocks)
