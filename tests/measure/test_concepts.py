"""Concept maps by hand; removing directions at the last position equals editing whole runs."""

from __future__ import annotations

import pytest
import torch

from layerwise.measure.concepts import (
    alignment,
    answers,
    concept_map,
    first_occurrence,
    read_concepts,
    support,
    support_share,
)
from layerwise.measure.track import lens
from layerwise.stack.changes import at, without
from layerwise.stack.decoder import DecoderStack

ROWS = [[1, 2, 3], [4, 5, 6, 7, 8]]
CONCEPTS_BK = torch.tensor([[10, 11, 12], [20, 21, 22]])


class Letters:
    """Every token is a letter or a mark."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 97 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + index % 26) if index % 2 else "." for index in ids)


def test_a_map_is_normalised_over_what_is_known() -> None:
    log_p_DBK = torch.tensor([[[0.1, 0.3, 0.4]]]).log()
    torch.testing.assert_close(concept_map(log_p_DBK), torch.tensor([[[0.125, 0.375, 0.5]]]))
    known = torch.tensor([[True, True, False]])
    torch.testing.assert_close(concept_map(log_p_DBK, known), torch.tensor([[[0.25, 0.75, 0.0]]]))


def test_alignment_is_the_difference_of_masses_over_depths() -> None:
    map_DBK = torch.tensor([[[0.5, 0.3, 0.2]], [[0.1, 0.8, 0.1]]])
    context, competitor = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    torch.testing.assert_close(alignment(map_DBK, context, competitor), torch.tensor([-0.25]))


def test_the_share_counts_positive_support_only() -> None:
    support_LBK = torch.tensor([[[3.0, 1.0, -5.0]], [[-1.0, -1.0, -1.0]]])
    torch.testing.assert_close(support_share(support_LBK, torch.tensor([[True, False, True]])), torch.tensor([0.625]))


def test_repeated_tokens_count_once() -> None:
    assert first_occurrence(torch.tensor([[5, 5, 6, 5]])).tolist() == [[True, False, True, False]]


def test_odds_are_of_summed_probabilities() -> None:
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    torch.testing.assert_close(answers(p.log(), [([0, 1], [3])]), torch.tensor([0.3 / 0.4]).log())


@pytest.mark.parametrize("layer", [0, 2])
def test_support_is_what_removing_a_direction_costs(tiny_stack: DecoderStack, layer: int) -> None:
    outcome_BJ = torch.tensor([[30, 31], [40, 40]])
    found_LBK = support(tiny_stack, ROWS, CONCEPTS_BK, outcome_BJ, [layer])
    for row, tokens in enumerate(ROWS):
        wanted = outcome_BJ[row].unique()
        tokens_1T = torch.tensor([tokens])

        def chance(tokens_1T: torch.Tensor = tokens_1T, wanted: torch.Tensor = wanted) -> torch.Tensor:
            return tiny_stack(tokens_1T)[0, -1].log_softmax(-1)[wanted].logsumexp(0)  # type: ignore[no-any-return]

        clean, last_T = chance(), torch.arange(len(tokens)) == len(tokens) - 1
        for place, concept in enumerate(CONCEPTS_BK[row]):
            direction_C = tiny_stack.decoder.embedding.weight[int(concept)]  # type: ignore[index]
            with tiny_stack.edit(layer, "input", at(last_T, without(direction_C))):
                torch.testing.assert_close(found_LBK[0, row, place], clean - chance(), atol=1e-5, rtol=1e-4)


def test_concepts_are_both_senses_and_the_likeliest_words(tiny_stack: DecoderStack) -> None:
    found = read_concepts(tiny_stack, Letters(), ROWS, [[10, 11], [20]], [[12], [21, 22]], others=2)
    assert found.tokens_NK.shape == (2, 5) and bool(found.known_NK.all())
    assert found.tokens_NK[0, :3].tolist() == [10, 11, 12]
    assert found.right_NK.tolist() == [[True, True, False, False, False], [True, False, False, False, False]]
    assert found.wrong_NK.tolist() == [[False, False, True, False, False], [False, True, True, False, False]]
    assert all(token % 2 for token in found.tokens_NK[:, 3:].flatten().tolist()), "marks are no words"
    log_p_DV = torch.cat(list(lens(tiny_stack, torch.tensor([ROWS[1]]))))
    torch.testing.assert_close(found.log_p_DNK[:, 1], log_p_DV[:, found.tokens_NK[1]], atol=1e-5, rtol=1e-4)
    p_V = log_p_DV[-1].exp()
    torch.testing.assert_close(found.entropy_N[1], -(p_V * p_V.log()).sum(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.odds_DN[-1, 1], (p_V[20] / (p_V[21] + p_V[22])).log(), atol=1e-4, rtol=1e-4)
