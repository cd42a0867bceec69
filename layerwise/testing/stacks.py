"""Small random models to run contracts on."""

from __future__ import annotations

import torch

from layerwise.nets.decoder import Decoder
from layerwise.spec import Attention, FeedForward, LayerSpec, StackSpec
from layerwise.stack.decoder import DecoderStack


def random_stack(
    layers: int = 4,
    *,
    hidden: int = 64,
    vocabulary: int = 97,
    seed: int = 0,
    dtype: str = "float32",
    row: LayerSpec | None = None,
    rows: tuple[LayerSpec, ...] = (),
) -> DecoderStack:
    """A decoder of `layers` equal rows, or of `rows`, with seeded Gaussian weights; norms are ones plus noise."""
    row = row or LayerSpec(
        Attention(heads=4, kv_heads=2, head_dim=hidden // 4), FeedForward(width=2 * hidden)
    )
    rows = rows or (row,) * layers
    spec = StackSpec("llama", hidden, vocabulary, rows, dtype=dtype, context=256)  # type: ignore[arg-type]
    decoder = Decoder(spec)
    generator = torch.Generator().manual_seed(seed)
    for parameter in decoder.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.data = (noise * spread + (0.0 if parameter.dim() > 1 else 1.0)).to(getattr(torch, dtype))
    return DecoderStack(decoder.requires_grad_(False).eval(), name="random")
