"""What an engine's caches predict of given tokens: a grammar that lets only these come, and their scores.

Prompt scores say what one whole pass predicts. Here every token is predicted from what its request has kept until
then, so caches that forget, coded caches and skipped layers show.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from layerwise.serve.engine import Engine
from layerwise.serve.request import Params, TokenLogprob


class Forced:
    """A grammar of one sentence; for one request."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._left = list(reversed(tokens))

    def mask(self, logits_V: Tensor) -> None:
        token = self._left[-1]
        value = logits_V[token].clone()
        logits_V.fill_(float("-inf"))
        logits_V[token] = value

    def accept(self, token: int) -> bool:
        """Whether this was the last."""
        wanted = self._left.pop()
        assert token == wanted
        return not self._left


def scores(engine: Engine, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
           ) -> list[tuple[TokenLogprob, ...]]:
    """Log-probability of every token of each prompt's answer, the likeliest token beside it.

    An answer of n tokens takes n steps; the first is predicted from the whole prompt. Raises BadOption for an empty
    answer, and whatever a request may raise.
    """
    params = [Params(max_tokens=len(answer), stop_ids=(), logprobs=1, grammar=Forced(answer)) for answer in answers]
    return [completion.logprobs for completion in engine.generate(list(prompts), params)]
