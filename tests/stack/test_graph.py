"""What the halves of a block add is read from its own data flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.stack.graph import called, halves, trace


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        if mask is not None and mask.sum() == 0:
            x = x * 0
        return self.proj(x).mean(1, keepdim=True).expand_as(x), None


class Block(nn.Module):
    """Holds every part; subclasses differ in how they are put together."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn_norm = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.mixer = SelfAttention()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.dropout = nn.Dropout(0.5)


class PreNorm(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Any:
        y, _ = self.mixer(self.norm1(x), mask=mask, **kwargs)
        x = x + self.dropout(y)
        return (self.mlp(self.attn_norm(x)) + x,)


class Sandwich(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.norm1(self.mixer(x)[0]))
        x += self.norm2(self.mlp(x))
        return x


class Parallel(Block):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)
        return x + self.mixer(y, mask)[0] + self.mlp(y)


class PostNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.mixer(x)[0])
        return self.norm2(x + self.mlp(x))


class Scaled(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.mixer(self.norm1(x))[0] + self.mlp(x)


class OnlyFeedForward(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class ByValue(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(x)[0] if x.sum() > 0 else x + self.mlp(x)


@pytest.mark.parametrize(("kind", "expected"), [
    (PreNorm, {"attention": "mixer", "feed_forward": "mlp"}),
    (Sandwich, {"attention": "norm1", "feed_forward": "norm2"}),
    (Parallel, {"attention": "mixer", "feed_forward": "mlp"}),
    (PostNorm, {}), (Scaled, {}), (OnlyFeedForward, {}), (ByValue, {}), (Block, {}),
])
def test_halves(kind: type[Block], expected: dict[str, str]) -> None:
    assert halves(kind().eval()) == expected


@pytest.mark.parametrize("kind", [PreNorm, Sandwich, Parallel])
def test_what_the_halves_return_is_what_is_added(kind: type[Block]) -> None:
    block = kind().eval()
    seen: list[Tensor] = []
    for path in halves(block).values():
        block.get_submodule(path).register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    x = torch.randn(2, 3, 8)
    out = block(x, *([torch.ones(1)] if kind is Parallel else []))
    torch.testing.assert_close(out[0] if isinstance(out, tuple) else out, x + sum(seen))


@pytest.mark.parametrize(("name", "expected"), [
    ("vit", {"attention": "attention", "feed_forward": "mlp"}),
    ("llama", {"attention": "self_attn", "feed_forward": "mlp"}), ("bert", {}), ("t5", {})])
def test_halves_of_layers_in_transformers(make: Callable[[str], Any], name: str,
                                          expected: dict[str, str]) -> None:
    network = make(name)
    assert halves(network.module.get_submodule(network.layers[0])) == expected


def test_calls_in_order(make: Callable[[str], Any]) -> None:
    assert called(make("children").module) == ["conv1", "conv2", "fc"]
    assert trace(ByValue()) is None and called(ByValue()) == []
