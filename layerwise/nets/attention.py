"""Softmax attention with grouped keys, rotary positions, optional window, norms, biases and soft cap.

Shapes: B batch, T new tokens, S all tokens, H query heads, K key heads, D head width, C hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerwise import spec
from layerwise.nets.dense import Dense
from layerwise.nets.flow import Flow
from layerwise.nets.norms import build_norm


class Attention(nn.Module):
    """One attention layer; its four matrices may be dense or packed linear layers.

    A layer that shares an earlier layer's keys and values has only q and o. `qkv` may stand for q, k and v, one
    above the other.
    """

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module

    def __init__(self, attention: spec.Attention, hidden: int, norm: spec.Norm) -> None:
        super().__init__()
        self.spec = attention
        biased = {"q": attention.qkv_bias, "k": attention.qkv_bias, "v": attention.qkv_bias, "o": attention.out_bias}
        for name, (outputs, inputs) in attention.matrices(hidden).items():
            self.add_module(name, Dense(inputs, outputs, bias=biased[name]))
        if attention.qk_norm:
            self.q_norm = build_norm(norm, attention.head_dim)
            if attention.shares is None:
                self.k_norm = build_norm(norm, attention.head_dim)

    def forward(self, x_BTC: Tensor, flow: Flow, layer: int) -> Tensor:
        batch, new, _ = x_BTC.shape
        if self.spec.shares is None:
            q_BHTD, k_BKTD, v_BKTD = self._queries_and_keys(x_BTC, flow)
            out_BHTD = flow.attend(self.spec, layer, q_BHTD, k_BKTD, v_BKTD)
        else:
            out_BHTD = flow.attend(self.spec, layer, self._queries(x_BTC, flow))
        return self.o(out_BHTD.transpose(1, 2).reshape(batch, new, -1))  # type: ignore[no-any-return]

    def _queries_and_keys(self, x_BTC: Tensor, flow: Flow) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the new tokens, queries and keys normed and rotated."""
        a = self.spec
        both, v_BKTD = self._together(x_BTC)
        if a.qk_norm:
            both = torch.cat([self.q_norm(both[:, : a.heads]), self.k_norm(both[:, a.heads :])], 1)
        if a.rope is not None:
            both = rotate(both, flow, a)
        return both[:, : a.heads], both[:, a.heads :], v_BKTD

    def _together(self, x_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """Heads of queries and keys in one tensor, [B, H + K, T, D], and values."""
        if "qkv" not in self._modules:
            q_BHTD, k_BKTD, v_BKTD = (self._heads(name, x_BTC) for name in ("q", "k", "v"))
            return torch.cat([q_BHTD, k_BKTD], 1), v_BKTD
        all_BATD = self._heads("qkv", x_BTC)
        last = self.spec.heads + self.spec.kv_heads
        return all_BATD[:, :last], all_BATD[:, last:]

    def _queries(self, x_BTC: Tensor, flow: Flow) -> Tensor:
        q_BHTD = self._heads("q", x_BTC)
        if self.spec.qk_norm:
            q_BHTD = self.q_norm(q_BHTD)
        return q_BHTD if self.spec.rope is None else rotate(q_BHTD, flow, self.spec)

    def _heads(self, name: str, x_BTC: Tensor) -> Tensor:
        batch, new, _ = x_BTC.shape
        return getattr(self, name)(x_BTC).view(batch, new, -1, self.spec.head_dim).transpose(1, 2)  # type: ignore[no-any-return]


def rotate(x_BHTD: Tensor, flow: Flow, a: spec.Attention) -> Tensor:
    """Every pair of channels turned by its token's position; those after the part that turns stay."""
    assert a.rope is not None
    width = int(a.head_dim * a.rope.part)
    cos, sin = flow.rotation(a.rope, width)
    turning_BHTD = x_BHTD if width == a.head_dim else x_BHTD[..., :width]
    turned_BHTD = torch.addcmul(turning_BHTD * cos, turning_BHTD.roll(width // 2, -1), sin)
    return turned_BHTD if width == a.head_dim else torch.cat([turned_BHTD, x_BHTD[..., width:]], -1)
