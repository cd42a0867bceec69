"""Feed-forward networks: gated, plain, and a routed mixture of gated experts.

Shapes: N tokens, C hidden width, W inner width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise import spec
from layerwise.nets.dense import Dense, linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class FeedForward(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where the row is not gated.

    `gate_up` may stand for gate and up, one above the other.
    """

    gate: nn.Module
    up: nn.Module
    down: nn.Module

    def __init__(self, feed_forward: spec.FeedForward, hidden: int) -> None:
        super().__init__()
        self.spec = feed_forward
        self.act = ACTIVATIONS[feed_forward.activation]
        for name, (outputs, inputs) in feed_forward.matrices(hidden).items():
            self.add_module(name, Dense(inputs, outputs, bias=feed_forward.bias))

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.gated:
            joined = self._modules.get("gate_up")
            gate, up = (self.gate(x), self.up(x)) if joined is None else joined(x).chunk(2, -1)
            gate = self.act(gate)
            inner = gate * up if torch.is_grad_enabled() else gate.mul_(up)  # a new tensor costs as much as the product
            return self.down(inner)  # type: ignore[no-any-return]
        return self.down(self.act(self.up(x)))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Each token goes to its `experts_per_token` best experts, weighted by the router's softmax.

    The experts' matrices are stacked on their outputs: gate and up are [E*W, C], down is [E*C, W].
    """

    def __init__(self, feed_forward: spec.FeedForward, hidden: int) -> None:
        super().__init__()
        self.spec = feed_forward
        self.act = ACTIVATIONS[feed_forward.activation]
        self.router = Dense(hidden, feed_forward.experts, bias=False)
        for name, (outputs, inputs) in feed_forward.matrices(hidden).items():
            self.add_module(name, Dense(inputs, outputs, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x_NC = x.reshape(-1, x.shape[-1])
        share_NK, chosen_NK = self.chosen(self.router(x_NC))
        out_NC = torch.zeros_like(x_NC)
        experts = chosen_NK.unique().tolist()
        weights = [self._weights(name, experts, x.dtype) for name in ("gate", "up", "down")]
        for expert, gate, up, down in zip(experts, *weights, strict=True):
            token, slot = (chosen_NK == expert).nonzero(as_tuple=True)
            part_nC = x_NC[token]
            y_nC = linear(self.act(linear(part_nC, gate)) * linear(part_nC, up), down)
            out_NC.index_add_(0, token, y_nC * share_NK[token, slot, None].to(x.dtype))
        return out_NC.view_as(x)

    def chosen(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """The share of each chosen expert and its number, both [N, K], from the router's logits."""
        share_NK, chosen_NK = F.softmax(logits_NE, dim=-1, dtype=torch.float32).topk(self.spec.experts_per_token, -1)
        return share_NK / share_NK.sum(-1, keepdim=True) if self.spec.normalize_router else share_NK, chosen_NK

    def _weights(self, name: str, experts: list[int], dtype: torch.dtype) -> Iterator[Tensor]:
        """The matrix `name` of some experts in turn: dense ones cut at once, so that gradients are joined once, packed
        ones unpacked when their turn comes.
        """
        matrix = getattr(self, name)
        if isinstance(matrix, nn.Linear):
            parts = matrix.weight.chunk(self.spec.experts)
            yield from (parts[expert] for expert in experts)
        else:
            size = matrix.out_features // self.spec.experts
            yield from (matrix.dense_rows(expert * size, (expert + 1) * size, dtype) for expert in experts)


def build_feed_forward(feed_forward: spec.FeedForward, hidden: int) -> FeedForward | Experts:
    """The module for one row's feed-forward half."""
    return (Experts if feed_forward.experts else FeedForward)(feed_forward, hidden)
