"""Heal: a short training that recovers what a transform cost, over a few layers or through adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import BadOption, MissingExtra
from layerwise.nets.decoder import MATRICES, Block, Decoder
from layerwise.stack.decoder import DecoderStack
from layerwise.train.loop import Recipe, train

Loss = Callable[[DecoderStack, Tensor], Tensor]


@dataclass(frozen=True)
class Partial:
    """Train the last `layers` layers, the final norm, and the head (untied first, so the embedding stays)."""

    layers: int = 3
    head: bool = True


@dataclass(frozen=True)
class Lora:
    """Train low-rank adapters on every matrix of every layer, through PEFT, and merge them at the end."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05


def next_token_loss(stack: DecoderStack, tokens_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, nats."""
    logits_BTV = stack(tokens_BT)
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), tokens_BT[:, 1:].flatten())


def heal(
    stack: DecoderStack,
    tokens_NT: Tensor,
    method: Partial | Lora,
    recipe: Recipe | None = None,
    *,
    loss: Loss = next_token_loss,
) -> tuple[DecoderStack, list[float]]:
    """Train a float32 copy of `stack` on blocks of tokens; returns it in the dtype of `stack`, and the losses.

    The recipe's seed draws batches, adapters and dropout; the global generator is left as it was. Raises
    BadOption for a packed stack (train before quantizing) and MissingExtra where PEFT is needed.
    """
    if stack.spec.packed():
        raise BadOption("healing a stack with packed matrices", expected="dense weights", do="heal, then quantize")
    recipe, trained = recipe or Recipe(), stack.copied(torch.float32)
    with torch.random.fork_rng([stack.device] if stack.device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        if isinstance(method, Lora):
            _adapt(trained, method)
        else:
            trained = _partial(trained, method)
        trained.decoder.train()
        parameters = [p for p in trained.decoder.parameters() if p.requires_grad]
        losses = train(parameters, lambda tokens_BT: loss(trained, tokens_BT), tokens_NT, recipe)
    if isinstance(method, Lora):
        _merge(trained.decoder)
    healed = trained.copied(stack.dtype)
    healed.decoder.requires_grad_(False).eval()
    return healed, losses


def _partial(stack: DecoderStack, method: Partial) -> DecoderStack:
    if not 0 <= method.layers <= len(stack):
        raise BadOption(
            f"healing {method.layers} of {len(stack)} layers",
            expected=f"0 to {len(stack)}",
            do="choose how many of the last layers to train",
        )
    if method.head and stack.spec.tied:
        stack = untied(stack)
    head = [stack.decoder.head] if method.head else []
    last = [stack.block(layer) for layer in range(len(stack) - method.layers, len(stack))]
    for module in (*last, stack.decoder.norm, *head):
        if module is not None:
            module.requires_grad_(True)
    return stack


def untied(stack: DecoderStack) -> DecoderStack:
    """The same model with a head of its own: a copy of the embedding."""
    if not stack.spec.tied:
        return stack
    embedding = stack.decoder.embedding
    assert isinstance(embedding, nn.Embedding)
    head = nn.Embedding.from_pretrained(embedding.weight.detach().clone())
    return stack.rebuilt(replace(stack.spec, tied=False), list(stack.decoder.layers), head=head)


def _adapt(stack: DecoderStack, method: Lora) -> None:
    """Put PEFT adapters on every matrix, in place; only they are trainable."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtra("peft", "peft", "healing with adapters") from error
    config = LoraConfig(
        r=method.rank, lora_alpha=method.alpha, lora_dropout=method.dropout, target_modules=list(MATRICES)
    )
    inject_adapter_in_model(config, stack.decoder)


def _merge(decoder: Decoder) -> None:
    """Fold the adapters into the matrices and put the plain linear layers back."""
    for block in decoder.layers:
        assert isinstance(block, Block)
        for name, module in block.matrices().items():
            if hasattr(module, "merge"):
                module.merge()  # type: ignore[operator]
                setattr(block.branch(name).body, name, module.base_layer)
