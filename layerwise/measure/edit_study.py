"""Editing many facts at many layers, each by itself, and scoring every edit: rewrite, paraphrase, neighbourhood.

Shapes: N facts, L layers, S scores (`SCORES`), C hidden width, I inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.data.facts import Fact
from layerwise.data.prompts import locate, single_token
from layerwise.data.text import Tokenizer
from layerwise.measure.edit_scores import Prompts, neighbourhood, rewrite
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.model_editing import written
from layerwise.transform.wishes import Request

SCORES = ("rewrite", "paraphrase", "neighbourhood")
Write = Callable[[int], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """A fact, the new answer to be written, and other subjects that the edit should leave alone."""

    fact: Fact
    answer: str
    neighbours: tuple[str, ...]

    def request(self, tokenizer: Tokenizer, prefixes: Sequence[str]) -> Request:
        """What an edit is asked for; `prefixes` go before the prompt beside nothing at all."""
        template, subject = self.fact.relation.template, self.fact.subject
        return Request(
            tuple(locate(tokenizer, template, subject, prefix) for prefix in ("", *prefixes)),
            locate(tokenizer, "{} is a", subject), single_token(tokenizer, self.answer))

    def prompts(self, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
        """The prompt, its other wordings, and the prompt about each neighbour, as tokens."""
        relation, subject = self.fact.relation, self.fact.subject
        own = [locate(tokenizer, text, subject) for text in (relation.template, *relation.paraphrases)]
        others = [locate(tokenizer, relation.template, other) for other in self.neighbours]
        return [prompt.tokens for prompt in (*own, *others)]


def edit_scores(stack: DecoderStack, cases: Sequence[Case], layers: Sequence[int], tokenizer: Tokenizer,
                write: Mapping[str, Write]) -> dict[str, Tensor]:
    """Scores [N, L, S] by method; `write[method](layer)` gives one last matrix of that layer for each case.

    Layers must ascend: prompts wait before the layer, so that each edit runs only what comes after it.
    """
    prompts = [Prompts(stack, rows, [single_token(tokenizer, case.answer)] * len(rows))
               for case in cases for rows in [case.prompts(tokenizer)]]
    before = [asked.chances() for asked in prompts]
    found = {method: torch.zeros(len(cases), len(layers), len(SCORES)) for method in write}
    for column, layer in enumerate(layers):
        for asked in prompts:
            asked.advance(layer)
        for method, matrices in write.items():
            for row, matrix_CI in enumerate(matrices(layer)):
                with written(stack, {layer: matrix_CI}):
                    after = prompts[row].chances()
                found[method][row, column] = _scores(cases[row], before[row], after)
    return found


def batch_scores(stack: DecoderStack, changed: DecoderStack, cases: Sequence[Case], tokenizer: Tokenizer) -> Tensor:
    """Scores [N, S] of one edited model for all cases."""
    scores = []
    for case in cases:
        rows = case.prompts(tokenizer)
        asked = Prompts(stack, rows, [single_token(tokenizer, case.answer)] * len(rows))
        scores.append(_scores(case, asked.chances(), asked.chances(changed)))
    return torch.stack(scores)


def _scores(case: Case, before: Tensor, after: Tensor) -> Tensor:
    wordings = 1 + len(case.fact.relation.paraphrases)
    gained, kept = rewrite(before, after), neighbourhood(before, after)
    return torch.stack([gained[0], gained[1:wordings].mean(), kept[wordings:].mean()])
