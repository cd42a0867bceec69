"""ROME and MEMIT: change what a model says about a subject by closed-form edits of feed-forward matrices.

Every edit gives a new stack that shares all other weights with the old one, which stays as it was: keeping
the old stack is the way back, and `written` puts edited matrices in place only while a context lasts.

Sources: arXiv 2202.05262 (ROME), 2210.07229 (MEMIT), read beside the code published with 2301.04213.

Shapes: N requests, C hidden width, I inner width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from layerwise.nets.decoder import Block
from layerwise.stack.base import State
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.closed_form import batch, directions, rank_one, ridged
from layerwise.transform.moments import mirrored, with_outer
from layerwise.transform.wishes import Request, Search, keys, last_matrix, wishes


@torch.inference_mode()
def neuron_moments(stack: DecoderStack, states: Sequence[State], layers: Sequence[int]) -> dict[int, Tensor]:
    """Uncentred second moment of the neurons of some layers over all tokens of `states`, [I, I] float32, ridged.

    `states` enter layer 0; padded tokens count like others.
    """
    sums: dict[int, Tensor] = {}
    count = 0
    for state in states:
        count += state.hidden.shape[0] * state.hidden.shape[1]
        for layer in range(max(layers) + 1):
            with stack.capture("neurons", layers=range(layer, layer + (layer in layers))) as seen:
                state = stack.run(state, slice(layer, layer + 1))
            if layer in layers:
                x_NI = seen[layer, "neurons"].flatten(0, 1).float()
                sums[layer] = with_outer(sums.get(layer), x_NI)
    return {layer: ridged(mirrored(sums[layer]) / count).float() for layer in layers}


def rome(stack: DecoderStack, layer: int, requests: Sequence[Request], moment_II: Tensor,
         search: Search | None = None) -> list[Tensor]:
    """One edited last matrix of `layer` for each request by itself, [C, I]: only that fact is changed in it."""
    weight_CI = last_matrix(stack, layer)
    residual_NC, _ = wishes(stack, layer, requests, search or Search())
    key_NI, now_NI = keys(stack, layer, requests)
    return [rank_one(weight_CI, direction_I, residual_C, now_I) for direction_I, residual_C, now_I
            in zip(directions(key_NI, moment_II), residual_NC, now_NI, strict=True)]


def memit(stack: DecoderStack, layers: Sequence[int], requests: Sequence[Request], moments: Mapping[int, Tensor],
          *, weight: float = 15_000.0, search: Search | None = None) -> DecoderStack:
    """A stack that answers all requests, edited in `layers` one after another, each taking its part of the rest.

    `weight` says how much usual inputs count, `moments` are theirs by layer.
    """
    layers = sorted(layers)
    search = replace(search or Search(largest=0.75), site="output")
    shift_NC, start_NC = wishes(stack, layers[-1], requests, search)
    for index, layer in enumerate(layers):
        key_NI, _ = keys(stack, layer, requests)
        rest_NC = shift_NC + start_NC - _leaves(stack, layers[-1], requests)
        changed_CI = batch(last_matrix(stack, layer), key_NI, rest_NC / (len(layers) - index), moments[layer], weight)
        stack = edited(stack, {layer: changed_CI})
    return stack


def edited(stack: DecoderStack, matrices: Mapping[int, Tensor]) -> DecoderStack:
    """A stack with other last matrices in some layers; everything else is shared, the given one unchanged."""
    return stack.rebuilt(stack.spec, [_block(stack, layer, matrices[layer]) if layer in matrices
                                      else stack.block(layer) for layer in range(len(stack))])


@contextmanager
def written(stack: DecoderStack, matrices: Mapping[int, Tensor]) -> Iterator[None]:
    """Other last matrices in some layers while the context lasts."""
    with ExitStack() as context:
        for layer, weight_CI in matrices.items():
            context.enter_context(stack.swap(layer, _block(stack, layer, weight_CI)))
        yield


def _block(stack: DecoderStack, layer: int, weight_CI: Tensor) -> Block:
    block = stack.block(layer)
    assert isinstance(block, Block)
    before = block.matrix("down")
    assert isinstance(before, nn.Linear)
    with torch.device("meta"):
        linear = nn.Linear(before.in_features, before.out_features, bias=before.bias is not None)
    linear.weight = nn.Parameter(weight_CI, requires_grad=False)
    linear.bias = before.bias
    return block.with_matrices({"down": linear})


@torch.no_grad()
def _leaves(stack: DecoderStack, layer: int, requests: Sequence[Request]) -> Tensor:
    """What leaves `layer` at each subject in its bare prompt, [N, C]."""
    rows = []
    for request in requests:
        prompt = request.prompts[0]
        state = stack.run(stack.start(torch.tensor([prompt.tokens])), slice(0, layer + 1))
        rows.append(state.hidden[0, prompt.last].float())
    return torch.stack(rows)
