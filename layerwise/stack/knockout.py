"""Attention knock-out: in some layers of a decoder, some positions no longer see some others.

    with knockout(stack, source_BT, target_BT, range(4, 9)):
        logits = stack(tokens_BT)

Every pair (query in the target, key in the source) is masked before the softmax, for all heads; everything
else is as it was. Source of the method: arXiv 2411.18620 and 2304.14767.

Shapes: B rows (or 1 for all rows alike), T new tokens, S cached plus new tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadOption
from layerwise.nets.flow import Flow
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack


@contextmanager
def knockout(stack: Stack, source_BS: Tensor, target_BS: Tensor, layers: Iterable[int]) -> Iterator[None]:
    """Keep the positions of `target_BS` from attending to those of `source_BS` in `layers`, both bool.

    Positions count from the beginning of the sequence, cached tokens included; those beyond the masks, such
    as generated ones, are in neither group. A query that would be left without any key keeps itself. Layers
    without attention are passed over. Raises BadOption for a stack that is no decoder, or masks that differ
    in shape.
    """
    if not isinstance(stack, DecoderStack):
        raise BadOption(f"an attention knock-out in {stack.name}", expected="a decoder language model",
                        do="open its Hugging Face folder instead of the module")
    if source_BS.shape != target_BS.shape or source_BS.dim() != 2:
        raise BadOption(f"masks of shapes {tuple(source_BS.shape)} and {tuple(target_BS.shape)}",
                        expected="two of one shape, [rows or 1, positions]",
                        do="mark the positions of the whole prompt in both")
    cuts = _Cuts(source_BS.bool(), target_BS.bool())
    with ExitStack() as hooks:
        for layer in layers:
            attention = getattr(stack.module(layer, "input"), "attention", None)
            if attention is not None:
                hooks.callback(attention.register_forward_pre_hook(cuts.hook).remove)
        yield


class _Cuts:
    """Gives the layers that are cut a flow of their own; all those of one pass share it."""

    def __init__(self, source_BS: Tensor, target_BS: Tensor) -> None:
        self.source_BS, self.target_BS = source_BS, target_BS
        self._last: tuple[Flow, CutFlow] | None = None

    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BTC, flow, *rest = args
        if self._last is None or self._last[0] is not flow:
            shared = {field.name: getattr(flow, field.name) for field in fields(flow) if field.name != "_masks"}
            self._last = flow, CutFlow(**shared, source_BS=self.source_BS, target_BS=self.target_BS)
        return x_BTC, self._last[1], *rest


@dataclass
class CutFlow(Flow):
    """A flow in which queries of the target do not see keys of the source."""

    source_BS: Tensor | None = None
    target_BS: Tensor | None = None

    def _build_mask(self, window: int | None) -> Tensor:
        assert self.source_BS is not None
        assert self.target_BS is not None
        device = self.positions_BT.device
        new = self.positions_BT.shape[1]
        total = self.past + new
        seen_BxTS = super()._build_mask(window)
        if seen_BxTS is None:
            seen_BxTS = torch.ones(new, total, dtype=torch.bool, device=device).tril(self.past)[None, None]
        return without(seen_BxTS, _fit(self.source_BS, total).to(device), _fit(self.target_BS, total).to(device))


def without(seen_BxTS: Tensor, source_BS: Tensor, target_BS: Tensor) -> Tensor:
    """`seen_BxTS` without the pairs (target, source); the T queries are the last of S positions, bool."""
    new, total = seen_BxTS.shape[-2:]
    cut_BxTS = (target_BS[:, total - new :, None] & source_BS[:, None, :])[:, None]
    left_BxTS = seen_BxTS & ~cut_BxTS
    itself_TS = torch.eye(total, dtype=torch.bool, device=seen_BxTS.device)[total - new :]
    return left_BxTS | (itself_TS & ~left_BxTS.any(-1, keepdim=True))


def _fit(group_BS: Tensor, total: int) -> Tensor:
    """The group over `total` positions: cut off, or filled up with False."""
    missing = max(0, total - group_BS.shape[1])
    return torch.nn.functional.pad(group_BS[:, :total], (0, missing))
