"""Every edit is scored on its own prompts only, and layers that wait give what whole runs give."""

from __future__ import annotations

import torch

from layerwise.data.facts import Fact, Relation
from layerwise.data.prompts import single_token
from layerwise.data.words import WordTokenizer
from layerwise.measure.edit_scores import neighbourhood, rewrite
from layerwise.measure.edit_study import Case, batch_scores, edit_scores
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.transform.model_editing import edited
from layerwise.transform.wishes import last_matrix

RELATION = Relation("city", "The city of {} is", ("A city in {} is",),
                    {"North": "Rome", "South": "Oslo", "West": "Bern"})
TOKENIZER = WordTokenizer(["The city of North South West is Rome Oslo Bern . A in a"])
CASES = [Case(Fact(RELATION, "North", " Rome"), " Oslo", ("South", "West")),
         Case(Fact(RELATION, "South", " Oslo"), " Bern", ("North",))]


def chance(stack: DecoderStack, text: str, answer: str) -> torch.Tensor:
    logits_BTV = stack(torch.tensor([TOKENIZER.encode(text)]))
    return logits_BTV[0, -1].softmax(-1)[single_token(TOKENIZER, answer)]  # type: ignore[no-any-return]


def test_scores_are_those_of_whole_models() -> None:
    stack = random_stack(3, hidden=32, vocabulary=TOKENIZER.vocabulary)
    matrices = {layer: [last_matrix(stack, layer) * 3, -last_matrix(stack, layer)] for layer in (0, 2)}
    found = edit_scores(stack, CASES, [0, 2], TOKENIZER, {"x": lambda layer: matrices[layer]})["x"]
    for row, case in enumerate(CASES):
        for column, layer in enumerate((0, 2)):
            changed = edited(stack, {layer: matrices[layer][row]})
            torch.testing.assert_close(batch_scores(stack, changed, CASES, TOKENIZER)[row], found[row, column],
                                       atol=1e-5, rtol=1e-4)
            subject = case.fact.subject
            p, q = (chance(model, f"The city of {subject} is", case.answer) for model in (stack, changed))
            torch.testing.assert_close(found[row, column, 0], rewrite(p, q), atol=1e-5, rtol=1e-4)
            p, q = (chance(model, f"A city in {subject} is", case.answer) for model in (stack, changed))
            torch.testing.assert_close(found[row, column, 1], rewrite(p, q), atol=1e-5, rtol=1e-4)
            p, q = (torch.stack([chance(model, f"The city of {other} is", case.answer) for other in case.neighbours])
                    for model in (stack, changed))
            torch.testing.assert_close(found[row, column, 2], neighbourhood(p, q).mean(), atol=1e-5, rtol=1e-4)


def test_an_edit_that_changes_nothing_scores_nothing() -> None:
    stack = random_stack(2, hidden=32, vocabulary=TOKENIZER.vocabulary)
    found = edit_scores(stack, CASES, [1], TOKENIZER, {"x": lambda layer: [last_matrix(stack, layer)] * 2})["x"]
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 1.0]).expand(2, 1, 3), atol=1e-6, rtol=0)


def test_requests_hold_every_prefix() -> None:
    request = CASES[0].request(TOKENIZER, ("A city . ",))
    assert [len(prompt.tokens) for prompt in request.prompts] == [5, 8]
    assert [prompt.tokens[prompt.last] for prompt in request.prompts] == [TOKENIZER.encode("North")[0]] * 2
