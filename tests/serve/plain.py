"""References without an engine: one sequence, one whole forward pass a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from layerwise.generate.sample import generate
from layerwise.nets.decoder import Decoder
from layerwise.serve.engine import Engine
from layerwise.serve.request import Completion, Params
from layerwise.serve.sampler import Position, sample
from layerwise.spec import Attention, FeedForward, LayerSpec, StackSpec, StateSpace
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.transform.share_kv import ShareKV


def prompts(count: int, vocabulary: int = 97, seed: int = 1) -> list[list[int]]:
    """Prompts of 1 to 60 tokens; every third begins like the one before it."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = []
    for index in range(count):
        size = int(torch.randint(1, 61, (1,), generator=generator))
        prompt = torch.randint(vocabulary, (size,), generator=generator).tolist()
        found.append(found[-1][:40] + prompt[:20] if index % 3 == 2 else prompt)
    return found


def greedy(stack: DecoderStack, prompt: Sequence[int], count: int) -> list[int]:
    return list(generate(stack, prompt, max_tokens=count, stop=()))


def drawn(stack: DecoderStack, prompt: Sequence[int], params: Params) -> list[int]:
    """What a request must get: every token from a whole pass over everything before it."""
    assert params.seed is not None
    tokens = list(prompt)
    for _ in range(params.max_tokens):
        position = Position(params, params.seed, tokens, len(prompt))
        tokens += sample(stack(torch.tensor([tokens]))[:, -1], [position])
    return tokens[len(prompt) :]


def serve(engine: Engine, asked: Sequence[Sequence[int]], params: Params | Sequence[Params]) -> list[Completion]:
    """All completions, with the engine's books checked after every step."""
    step = engine.step

    def checked() -> list[object]:
        news = step()
        engine.check_integrity()
        return news  # type: ignore[return-value]

    engine.step = checked  # type: ignore[method-assign, assignment]
    try:
        return engine.generate(list(asked), params)
    finally:
        engine.step = step  # type: ignore[method-assign]


@dataclass(frozen=True)
class Kind:
    """A table whose layers differ in one way."""

    rows: tuple[LayerSpec, ...]

    def stack(self) -> DecoderStack:
        base = random_stack(len(self.rows), row=self.rows[0])
        spec = StackSpec("llama", 64, 97, self.rows, dtype="float32", context=256)
        decoder = Decoder(spec)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in decoder.named_parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.data = torch.randn(parameter.shape, generator=generator) * spread + (parameter.dim() == 1)
            if name.endswith("A_log"):
                parameter.data -= 4  # a state that a few tokens do not wash away
        return DecoderStack(decoder.requires_grad_(False).eval(), name=base.name)


FULL = LayerSpec(Attention(heads=4, kv_heads=2, head_dim=16), FeedForward(width=96))
NARROW = replace(FULL, mixer=Attention(heads=4, kv_heads=2, head_dim=16, window=9))
OTHER = replace(FULL, mixer=Attention(heads=2, kv_heads=1, head_dim=32, window=20, softcap=3.0, qk_norm=True))
STATE = LayerSpec(StateSpace(heads=8, head_dim=8, state=8, groups=2), None)
KINDS = {
    "full": Kind((FULL,) * 3),
    "windows": Kind((NARROW, FULL, OTHER, NARROW)),
    "narrow": Kind((NARROW, NARROW)),
    "no attention": Kind((FULL, replace(FULL, mixer=None), FULL)),
    "no cache": Kind((replace(FULL, mixer=None),)),
    "recurrent": Kind((STATE, STATE)),
    "hybrid": Kind((STATE, FULL, replace(STATE, feed_forward=FeedForward(width=96)), NARROW)),
    "shared": Kind((FULL, NARROW, ShareKV(0).edit(FULL, 64), ShareKV(1).edit(FULL, 64), ShareKV(0).edit(NARROW, 64))),
}
