"""How fast a decoder reads and writes on this machine, in tokens per second."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.generate.sample import next_logits
from layerwise.stack.base import Stack
from layerwise.stack.decoder import Caches, DecoderStack


def decode_speed(
    stack: Stack,
    prompt_tokens: int = 64,
    new_tokens: int = 48,
    *,
    repeats: int = 3,
    layers: tuple[int, ...] | None = None,
) -> float:
    """New tokens per second of one greedy stream, after a prompt of random tokens whose time is left out.

    The prompt runs all layers, new tokens all or only `layers`. The median of `repeats` after a warm-up.
    Raises BadOption for a stack that is no decoder.
    """
    decoder = _decoder(stack)
    prompt_BT = _random_tokens(decoder, prompt_tokens)
    _decode(decoder, prompt_BT, min(new_tokens, 8), layers)
    times = [_decode(decoder, prompt_BT, new_tokens, layers) for _ in range(repeats)]
    return new_tokens / statistics.median(times)


def prefill_speed(stack: Stack, tokens: int = 1024, *, repeats: int = 3) -> float:
    """Prompt tokens per second up to the first new token, for one prompt of `tokens` random tokens.

    The median of `repeats` after a warm-up. Raises BadOption for a stack that is no decoder.
    """
    decoder = _decoder(stack)
    prompt_BT = _random_tokens(decoder, min(tokens, decoder.spec.context))
    _prefill(decoder, prompt_BT[:, : max(1, prompt_BT.shape[1] // 4)])
    return statistics.median(prompt_BT.shape[1] / _prefill(decoder, prompt_BT) for _ in range(repeats))


def _decode(stack: DecoderStack, prompt_BT: Tensor, count: int, layers: tuple[int, ...] | None) -> float:
    caches: Caches = {}
    token_BT = next_logits(stack, prompt_BT, caches).argmax(-1, keepdim=True)
    _wait(stack)
    began = time.perf_counter()
    for _ in range(count):
        token_BT = next_logits(stack, token_BT, caches, layers).argmax(-1, keepdim=True)
    _wait(stack)
    return time.perf_counter() - began


def _prefill(stack: DecoderStack, prompt_BT: Tensor) -> float:
    _wait(stack)
    began = time.perf_counter()
    next_logits(stack, prompt_BT, {})
    _wait(stack)
    return time.perf_counter() - began


def _wait(stack: DecoderStack) -> None:
    if stack.device.type == "cuda":
        torch.cuda.synchronize(stack.device)


def _random_tokens(stack: DecoderStack, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(stack.spec.vocabulary, (1, count), generator=generator)


def _decoder(stack: Stack) -> DecoderStack:
    if not isinstance(stack, DecoderStack):
        raise BadOption(
            f"the speed of {type(stack).__name__} {stack.name}",
            expected="a decoder language model",
            do="time the module itself with its own input",
        )
    return stack
