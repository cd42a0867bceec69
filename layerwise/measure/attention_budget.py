"""How many tokens a layer must keep for the last ones to attend nearly as before: its minimum budget.

    tokens(h) = the smallest n whose n most attended keys hold `mass` of what the last `window` queries of head h give,
                averaged over those queries

and the mean over heads. The part "no sinks" leaves out the first SINKS tokens, which hold most of it in many layers.
The part "output" asks instead for the smallest n with which every head, attending to only n such keys, leaves the
attention's output within a cosine of `cosine`. Source: the minimum budgets to maintain attention (LMBA) and
attention output (LMBO) of ZigZagKV, arXiv 2412.09036; the cosine is ours. Cost: the pass, and attention of `window`
queries about ten times over in every layer. Sequences should be of one length, that of the prompts to be served.

Shapes: B rows, T tokens, S keys, W last queries, H query heads, D head width, C hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerwise import spec
from layerwise.errors import BadOption
from layerwise.measure.base import Reading
from layerwise.measure.scores import Direction
from layerwise.nets.attention import Attention
from layerwise.nets.decoder import Block
from layerwise.nets.flow import Flow
from layerwise.stack.base import Stack, State

SINKS = 4


def needed(weights_HS: Tensor, share: float) -> Tensor:
    """The smallest number of keys of each head that hold `share` of its weights, int64 [H]."""
    sums_HS = weights_HS.double().sort(dim=-1, descending=True).values.cumsum(-1)
    short_HS = sums_HS < share * sums_HS[:, -1:]
    return (short_HS.sum(-1) + 1).clamp(max=weights_HS.shape[1])


class Heads(Flow):
    """A pass that ends at the softmax of one attention layer: `seen` are its queries, keys and values, [B, H, S, D]."""

    seen: tuple[Tensor, Tensor, Tensor]

    def __init__(self, flow: Flow) -> None:
        vars(self).update(vars(flow), caches=None)

    def attend(self, a: spec.Attention, layer: int, q_BHTD: Tensor, k_BKTD: Tensor | None = None,
               v_BKTD: Tensor | None = None) -> Tensor:
        if k_BKTD is None or v_BKTD is None:
            assert a.shares is not None
            k_BKTD, v_BKTD = self._kept[a.shares]
        groups = a.heads // a.kv_heads
        self.seen = q_BHTD, k_BKTD.repeat_interleave(groups, 1), v_BKTD.repeat_interleave(groups, 1)
        return q_BHTD


@dataclass(frozen=True)
class AttentionBudget(Reading):
    """Tokens that keep `mass` of the attention of the last `window` tokens, mean over heads and sequences."""

    mass: float = 0.9
    window: int = 32
    cosine: float = 0.9

    name: ClassVar[str] = "attention-budget"
    unit: ClassVar[str] = "tokens"
    important: ClassVar[Direction | None] = "high"
    about: ClassVar[str] = "tokens the layer must keep to attend nearly as before"
    slow: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 < self.mass < 1 and 0 < self.cosine < 1 and self.window >= 1):
            raise BadOption(f"mass={self.mass}, cosine={self.cosine}, window={self.window} for {self.name}",
                            expected="shares between 0 and 1, and 1 token or more", do="change or leave them out")

    @property
    def parts(self) -> Mapping[str, str]:
        return {"": self.unit, "no sinks": self.unit, "output": self.unit}

    def of_layer(self, stack: Stack, layer: int, states: Sequence[State]) -> Mapping[str, float]:
        block = stack.block(layer)
        if not isinstance(block, Block):
            raise BadOption(f"{self.name} of {stack.name}", expected="a decoder language model",
                            do="measure what needs only 'input' and 'output'")
        body = None if block.attention is None else block.attention.body
        if block.attention is None or not isinstance(body, Attention):
            return {}
        found: dict[str, list[float]] = {part: [] for part in self.parts}
        with torch.no_grad():
            for state in states:
                heads, size = Heads(state.shared), len(state.hidden)
                body(block.attention.norm(state.hidden), heads, layer)
                for row, valid_S in enumerate(heads.valid_BS if heads.valid_BS is not None else [slice(None)] * size):
                    q_HTD, k_HSD, v_HSD = (x_BHSD[row][:, valid_S] for x_BHSD in heads.seen)
                    self._sequence(body, q_HTD, k_HSD, v_HSD, found)
        return {part: sum(values) / len(values) for part, values in found.items() if values}

    def _sequence(self, body: Attention, q_HTD: Tensor, k_HSD: Tensor, v_HSD: Tensor,
                  found: dict[str, list[float]]) -> None:
        weights_HWS = attended(body, q_HTD, k_HSD, self.window)
        mean_HS = weights_HWS.mean(1)
        found[""].append(float(needed(mean_HS, self.mass).double().mean()))
        if mean_HS.shape[1] > SINKS:
            found["no sinks"].append(float(needed(mean_HS[:, SINKS:], self.mass).double().mean()))
        found["output"].append(float(self._for_output(body, weights_HWS, v_HSD)))

    def _for_output(self, body: Attention, weights_HWS: Tensor, v_HSD: Tensor) -> int:
        """The smallest number of keys a head, found by halving, with which the output is nearly the same."""
        order_HS = weights_HWS.mean(1).argsort(dim=-1, descending=True, stable=True)
        whole_WC = _mixed(body, weights_HWS, v_HSD)
        low, high = 1, weights_HWS.shape[2]
        while low < high:
            middle = (low + high) // 2
            kept_HS = torch.zeros_like(order_HS, dtype=torch.bool).scatter_(1, order_HS[:, :middle], True)
            some_HWS = weights_HWS * kept_HS[:, None]
            some_HWS = some_HWS / some_HWS.sum(-1, keepdim=True).clamp(min=1e-12)
            near = float(torch.cosine_similarity(_mixed(body, some_HWS, v_HSD), whole_WC, dim=-1).mean())
            low, high = (low, middle) if near >= self.cosine else (middle + 1, high)
        return low


def attended(body: Attention, q_HTD: Tensor, k_HSD: Tensor, window: int) -> Tensor:
    """Attention of the last `window` queries to all keys no later than themselves, float32 [H, W, S]."""
    a = body.spec
    q_HWD = q_HTD[:, -window:].float()
    logits_HWS = q_HWD @ k_HSD.float().transpose(1, 2) * (a.scale if a.scale is not None else a.head_dim**-0.5)
    if a.softcap is not None:
        logits_HWS = a.softcap * torch.tanh(logits_HWS / a.softcap)
    size = k_HSD.shape[1]
    place_S = torch.arange(size, device=q_HTD.device)
    behind_WS = place_S[size - q_HWD.shape[1] :, None] - place_S
    seen_WS = (behind_WS >= 0) & (behind_WS < (size if a.window is None else a.window))
    return logits_HWS.masked_fill(~seen_WS, float("-inf")).softmax(-1)


def _mixed(body: Attention, weights_HWS: Tensor, v_HSD: Tensor) -> Tensor:
    """The output of attention with these weights, float32 [W, C]."""
    out_WHD = (weights_HWS @ v_HSD.float()).transpose(0, 1)
    output_WC: Tensor = body.o(out_WHD.flatten(1).to(v_HSD.dtype))
    return output_WC.float()
