"""The probability of a known answer inside a text, read from where it is predicted: shared by studies of one prompt.

Shapes: S variants of one text, T its tokens, A answer tokens, C hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.errors import BadData
from layerwise.stack.base import Stack, State


@dataclass(frozen=True)
class Answered:
    """A text [T] and the places of its answer's tokens in it, each predicted one place before.

    Raises BadData for no place, or one that nothing comes before.
    """

    tokens_T: Tensor
    answers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.answers or min(self.answers) < 1 or max(self.answers) >= len(self.tokens_T):
            raise BadData(f"an answer at places {list(self.answers)} of {len(self.tokens_T)} tokens",
                          expected="places within the text, after its first token", do="put a prompt before the answer")

    @property
    def places_A(self) -> Tensor:
        """Where the answer's tokens are predicted."""
        return torch.tensor(self.answers) - 1

    @property
    def first(self) -> int:
        """The place that predicts the first token of the answer; those before it are the prompt's own."""
        return min(self.answers) - 1

    def start(self, stack: Stack, variants: int) -> State:
        """What enters layer 0, the same text `variants` times."""
        return stack.start(self.tokens_T.expand(variants, -1))

    def probabilities(self, stack: Stack, state: State) -> Tensor:
        """Predicted distributions where the answer is, [S, A, V], from what leaves the last layer."""
        rows_SAC = state.hidden[:, self.places_A.to(state.hidden.device)]
        logits_SAV: Tensor = stack.finish(state.moved(rows_SAC, len(stack)))
        return logits_SAV.float().softmax(-1)

    def chance(self, stack: Stack, state: State) -> Tensor:
        """Summed probability of the answer's tokens, [S]."""
        p_SAV = self.probabilities(stack, state)
        gold_A = self.tokens_T[list(self.answers)].to(p_SAV.device)
        return p_SAV.gather(-1, gold_A.expand(len(p_SAV), -1)[..., None]).sum((1, 2))


def depths(stack: Stack, state: State) -> list[State]:
    """The state at every depth: what enters each layer, and what leaves the last."""
    found = [state]
    for layer in range(state.layer, len(stack)):
        found.append(stack.run(found[-1], slice(layer, layer + 1)))
    return found


def prompts(rows_NT: Tensor, answer: int) -> Sequence[Answered]:
    """Rows whose last `answer` tokens are what is asked for."""
    length = rows_NT.shape[1]
    return [Answered(row_T, tuple(range(length - answer, length))) for row_T in rows_NT]
