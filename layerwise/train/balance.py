"""A loss that keeps the experts of a mixture in use: without it a few of them get all tokens.

Of a layer with E experts it is E times the sum over experts of (share of the choices) x (mean of the router's softmax),
which is 1 where all are used alike. Source: Switch Transformers (arXiv 2101.03961), for several experts a token.

Shapes: N tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.nets.feed_forward import Experts


def imbalance(body: Experts, logits_NE: Tensor) -> Tensor:
    """The loss of one layer, a number; gradients go through the softmax, not through the choice."""
    experts = logits_NE.shape[-1]
    chosen_NK = body.chosen(logits_NE)[1]
    share_E = torch.bincount(chosen_NK.flatten(), minlength=experts).to(logits_NE.dtype) / chosen_NK.numel()
    return experts * (share_E * F.softmax(logits_NE, -1).mean(0)).sum()


@contextmanager
def watched(module: nn.Module) -> Iterator[list[Tensor]]:
    """The imbalance of every mixture in `module` that runs while the context lasts, in the order in which they run."""
    found: list[Tensor] = []
    hooks = [body.router.register_forward_hook(
        lambda router, inputs, logits_NE, body=body: found.append(imbalance(body, logits_NE)))
        for body in module.modules() if isinstance(body, Experts)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
