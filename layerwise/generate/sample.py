"""Text from a decoder, one token at a time: greedy, or drawn with temperature, top-k and top-p.

Shapes: B batch (one), T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.errors import BadData, BadOption
from layerwise.generate.skip import run_layers
from layerwise.stack.base import Stack
from layerwise.stack.decoder import Caches, DecoderStack


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits: `temperature` 0 takes the likeliest.

    `top_k` keeps that many tokens; `top_p` then keeps the fewest whose probabilities reach it.
    Raises BadOption for values outside their range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise BadOption(
                f"temperature={self.temperature}", expected="0 or more", do="0 is greedy, 1 the model's own"
            )
        if self.top_k is not None and self.top_k < 1:
            raise BadOption(f"top_k={self.top_k}", expected="1 or more", do="leave it out to keep all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise BadOption(
                f"top_p={self.top_p}", expected="above 0, up to 1", do="leave it out to keep all tokens"
            )

    def draw(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """One token id."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        weights_V = self.probabilities(logits_V).cpu()
        return int(torch.multinomial(weights_V, 1, generator=generator))

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """What a token is drawn from, [V] float32; needs a temperature above 0."""
        logits_V = logits_V.float() / self.temperature
        if self.top_k is not None and self.top_k < len(logits_V):
            smallest = logits_V.topk(self.top_k).values[-1]
            logits_V = logits_V.masked_fill(logits_V < smallest, float("-inf"))
        weights_V = logits_V.softmax(-1)
        if self.top_p is not None:
            ordered_V, order_V = weights_V.sort(descending=True, stable=True)
            before_V = ordered_V.cumsum(-1) - ordered_V
            weights_V = weights_V.index_fill(0, order_V[before_V >= self.top_p], 0.0)
        return weights_V / weights_V.sum()


def generate(
    stack: Stack,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Collection[int] | None = None,
) -> Iterator[int]:
    """Continue `prompt` (text, or token ids): yields token ids as they come.

    Ends after `max_tokens`, before a token in `stop` (by default the tokenizer's end of text), or when
    the model's context is full. The same seed gives the same tokens. Raises BadOption for options outside
    their range or a stack that is no decoder, BadData for a prompt that is empty or too long.
    """
    if not isinstance(stack, DecoderStack):
        raise BadOption(
            f"{type(stack).__name__} {stack.name}",
            expected="a decoder language model of a known family",
            do="open its Hugging Face folder instead of the module",
        )
    if max_tokens < 1:
        raise BadOption(f"max_tokens={max_tokens}", expected="1 or more", do="ask for at least one token")
    ids = prompt_ids(stack, prompt)
    if stop is None:
        end = stack.tokenizer.eos if stack.tokenizer else None
        stop = () if end is None else (end,)
    count = min(max_tokens, stack.spec.context - len(ids) + 1)
    return _tokens(stack, ids, count, Sampling(temperature, top_k, top_p), seed, frozenset(stop))


def _tokens(
    stack: DecoderStack, ids: Sequence[int], count: int, sampling: Sampling, seed: int, stop: Collection[int]
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    caches: Caches = {}
    new: Sequence[int] = ids
    for _ in range(count):
        token = sampling.draw(next_logits(stack, torch.tensor([list(new)]), caches)[0], generator)
        if token in stop:
            return
        yield token
        new = (token,)


@torch.inference_mode()
def next_logits(
    stack: DecoderStack, tokens_BT: Tensor, caches: Caches, layers: tuple[int, ...] | None = None
) -> Tensor:
    """Logits [B, V] after `tokens_BT`, which are added to `caches`; the head sees the last position only.

    With `layers` the tokens run only these; a sequence that has left a layer out cannot go back to it.
    """
    state = stack.start(tokens_BT, caches=caches)
    state = stack.run(state) if layers is None else run_layers(stack, state, layers)
    return stack.finish(state.moved(state.hidden[:, -1:], state.layer))[:, -1]


def prompt_ids(stack: DecoderStack, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt. Raises BadData where it is empty, too long, or text without a tokenizer."""
    if isinstance(prompt, str):
        if stack.tokenizer is None:
            raise BadData(
                f"a text prompt for {stack.name}, which has no tokenizer",
                expected="token ids, or a model folder with tokenizer files",
                do="pass a list of token ids",
            )
        ids = stack.tokenizer.encode(prompt, special=True)
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        raise BadData("an empty prompt", expected="at least one token", do="write something to continue")
    if len(ids) > stack.spec.context:
        raise BadData(
            f"a prompt of {len(ids)} tokens",
            expected=f"at most {stack.spec.context}, the context of {stack.name}",
            do="shorten the prompt",
        )
    return ids
