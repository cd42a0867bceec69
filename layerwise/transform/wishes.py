"""What a layer should write at a subject so that the model predicts a chosen answer.

A vector is added to one site of one layer at the subject's last token and optimised with Adam:

    mean over prompts of -log p(answer) + kl KL(after || before at "{subject} is a") + decay |d| / |v0|^2

and is kept within |d| <= largest |v0|, v0 being what the layer writes in the bare prompt. Formula and stopping
rule (five losses below 0.05) are those of ROME's public code, which takes the length of d in the last term,
not its square. Many requests are optimised at once; each keeps its own Adam, as all of it is elementwise.

Shapes: N requests, B prompts of all requests, C hidden width, I inner width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.data.prompts import Located
from layerwise.errors import BadOption
from layerwise.nets.decoder import Block
from layerwise.stack.base import Site
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.tail import Tail

ENOUGH, PATIENCE = 0.05, 5


@dataclass(frozen=True)
class Request:
    """`prompts[0]` is the bare prompt, the others have something before it; all end before the answer.

    `essence` is a prompt about the subject itself, whose prediction at the subject should stay.
    """

    prompts: tuple[Located, ...]
    essence: Located
    answer: int


@dataclass(frozen=True)
class Search:
    """How vectors are searched; the defaults are ROME's. MEMIT searches at "output" within 0.75."""

    site: Site = "feed_forward"
    steps: int = 20
    rate: float = 0.5
    kl: float = 0.0625
    decay: float = 0.5
    largest: float = 4.0


def wishes(stack: DecoderStack, layer: int, requests: Sequence[Request], search: Search) -> tuple[Tensor, Tensor]:
    """(d, v0), both float32 [N, C]: what `layer` should write at each subject beyond what it writes now, v0.

    Gradients reach only the vectors. Cost: `steps` forward and backward passes of the tokens from the subject's
    last on, through the layers from `layer` on.
    """
    prompts = [prompt for request in requests for prompt in (*request.prompts, _cut(request.essence))]
    tail = Tail(stack, [prompt.tokens for prompt in prompts], [prompt.last for prompt in prompts])
    owner_B = torch.tensor([n for n, request in enumerate(requests) for _ in (*request.prompts, None)])
    essence_B = torch.tensor([is_last for request in requests
                              for is_last in [False] * len(request.prompts) + [True]])
    bare_N = torch.tensor([int((owner_B == n).nonzero()[0]) for n in range(len(requests))])
    answer_B = torch.tensor([request.answer for request in requests])[owner_B]
    entering = tail.enter(layer)
    with torch.no_grad(), stack.capture(search.site, layers=range(layer, layer + 1)) as seen:
        before = tail.last(tail.run(entering)).float().log_softmax(-1)[essence_B]
    start_NC = seen[layer, search.site][bare_N, 0].detach().float().clone()
    shift_NC = torch.zeros_like(start_NC, requires_grad=True)
    optimizer = torch.optim.Adam([shift_NC], lr=search.rate)
    quiet_N = torch.zeros(len(requests), dtype=torch.int64)

    def shifted(x_BAC: Tensor) -> Tensor:
        return torch.cat([x_BAC[:, :1] + shift_NC[owner_B][:, None].to(x_BAC), x_BAC[:, 1:]], 1)

    for _ in range(search.steps):
        with stack.edit(layer, search.site, shifted):
            log_p_BV = tail.last(tail.run(entering)).float().log_softmax(-1)
        losses_B = -log_p_BV.gather(1, answer_B[:, None])[:, 0]
        count_N = torch.bincount(owner_B[~essence_B], minlength=len(requests))
        told_N = torch.zeros(len(requests)).index_add(0, owner_B[~essence_B], losses_B[~essence_B]) / count_N
        after = log_p_BV[essence_B]
        drift_N = (after.exp() * (after - before)).sum(-1)
        size_N = shift_NC.norm(dim=1) / start_NC.norm(dim=1) ** 2
        loss_N = told_N + search.kl * drift_N + search.decay * size_N
        quiet_N = quiet_N + (loss_N.detach() < ENOUGH)
        if bool((quiet_N >= PATIENCE).all()):
            break
        optimizer.zero_grad()
        loss_N.sum().backward()
        kept_NC = shift_NC.detach().clone()
        optimizer.step()
        with torch.no_grad():
            most_N = search.largest * start_NC.norm(dim=1)
            shift_NC *= (most_N / shift_NC.norm(dim=1).clamp(min=1e-12)).clamp(max=1)[:, None]
            done_N1 = (quiet_N >= PATIENCE)[:, None]
            shift_NC.copy_(torch.where(done_N1, kept_NC, shift_NC))
    return shift_NC.detach(), start_NC


@torch.no_grad()
def keys(stack: DecoderStack, layer: int, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    """Neurons of `layer` at each subject's last token, [N, I]: mean over the prompts, and in the bare one."""
    prompts = [prompt for request in requests for prompt in request.prompts]
    tail = Tail(stack, [prompt.tokens for prompt in prompts], [prompt.last for prompt in prompts])
    with stack.capture("neurons", layers=range(layer, layer + 1)) as seen:
        tail.run(tail.enter(layer), slice(layer, layer + 1))
    groups = seen[layer, "neurons"][:, 0].float().split([len(request.prompts) for request in requests])
    return torch.stack([group.mean(0) for group in groups]), torch.stack([group[0] for group in groups])


def last_matrix(stack: DecoderStack, layer: int) -> Tensor:
    """The feed-forward network's last weight, [C, I]. BadOption where what it writes is normed or not dense."""
    block = stack.block(layer)
    assert isinstance(block, Block)
    if layer_is_opaque(block):
        raise BadOption(f"editing layer {layer} of {stack.name}",
                        expected="a dense feed-forward network that writes straight into the residual stream",
                        do="edit before packing, and another layer where this one has experts or a norm behind it")
    return block.matrix("down").weight  # type: ignore[return-value]


def layer_is_opaque(block: Block) -> bool:
    """Whether a closed-form edit of the last matrix would not be what the layer writes."""
    branch = block.feed_forward
    return (branch is None or branch.post_norm is not None or hasattr(branch.body, "router")
            or not isinstance(block.matrix("down"), torch.nn.Linear))


def _cut(prompt: Located) -> Located:
    """The prompt up to its subject's last token."""
    return Located(prompt.tokens[: prompt.last + 1], prompt.first, prompt.last)
