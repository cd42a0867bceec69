"""A small decoder trained here on sentences made by rule: for quick sizes, where everything about it is known."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from layerwise.data.words import WordTokenizer
from layerwise.spec import Attention, FeedForward, LayerSpec, StackSpec
from layerwise.stack.decoder import DecoderStack
from layerwise.train.fresh import fresh
from layerwise.train.heal import next_token_loss
from layerwise.train.loop import Recipe, train

LENGTH = 32


def pupil(sentences: Sequence[str], *, layers: int = 6, width: int = 64, steps: int = 300, seed: int = 0,
          words: Sequence[str] = ()) -> DecoderStack:
    """A decoder over the sentences' words (and `words`), trained on blocks of sentences in random order.

    Every block of 32 tokens begins with the beginning of a sentence. Float32, seeded throughout.
    """
    tokenizer = WordTokenizer([*sentences, *words])
    row = LayerSpec(Attention(heads=4, kv_heads=4, head_dim=width // 4), FeedForward(width=3 * width))
    spec = StackSpec("llama", width, tokenizer.vocabulary, (row,) * layers, dtype="float32", context=128)
    stack = fresh(spec, seed, name="pupil")
    stack.tokenizer = tokenizer  # type: ignore[assignment]
    encoded = [tokenizer.encode(sentence) for sentence in sentences]
    draw = random.Random(seed)
    blocks = []
    for _ in range(16 * steps):
        block: list[int] = []
        while len(block) < LENGTH:
            block += draw.choice(encoded)
        blocks.append(block[:LENGTH])
    stack.decoder.requires_grad_(True)
    train(list(stack.decoder.parameters()), lambda tokens_BT: next_token_loss(stack, tokens_BT),
          torch.tensor(blocks), Recipe(steps=steps, batch=16, learning_rate=3e-3, warmup=20, seed=seed))
    stack.decoder.requires_grad_(False)
    return stack
