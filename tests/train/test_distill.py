"""Distillation is what its formula says, in chunks as at once, and each kept layer answers for the layer it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.allocate.plan import Edit
from layerwise.errors import BadOption
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.train import distill
from layerwise.train.distill import Teacher, Weights, distance, distillation, frozen_layers, in_chunks, paired

KEPT = [0, 1, 3, 4]


@pytest.fixture(scope="module")
def original() -> DecoderStack:
    return random_stack(5, hidden=32)


@pytest.fixture
def student(original: DecoderStack) -> DecoderStack:
    return lw.apply(original, lw.Plan(original.spec.fingerprint(), 5, (Edit(2, "drop"),)))


@pytest.fixture(scope="module")
def tokens_NT() -> Tensor:
    return torch.randint(97, (6, 10), generator=torch.Generator().manual_seed(0))


ROWS = torch.tensor([[4], [1]])


def test_predictions_are_compared_by_divergence(original: DecoderStack, student: DecoderStack,
                                                tokens_NT: Tensor) -> None:
    found = distillation(Teacher(original, tokens_NT, KEPT), Weights(hidden=0.0))(student, ROWS)
    p_BTV, q_BTV = (stack(tokens_NT[[4, 1]]).double().log_softmax(-1) for stack in (original, student))
    assert float(found) == pytest.approx(float((p_BTV.exp() * (p_BTV - q_BTV)).sum(-1).mean()), rel=1e-4)


def test_all_parts_add_up(original: DecoderStack, student: DecoderStack, tokens_NT: Tensor) -> None:
    teacher = Teacher(original, tokens_NT, KEPT, pairs=[0, 2])
    parts = [float(distillation(teacher, weights)(student, ROWS))
             for weights in (Weights(1, 0, 0), Weights(0, 1, 0), Weights(0, 0, 1), Weights(0.5, 2, 3))]
    assert parts[3] == pytest.approx(0.5 * parts[0] + 2 * parts[1] + 3 * parts[2], rel=1e-5)
    logits_BTV = student(tokens_NT[[4, 1]])
    loss = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_NT[[4, 1], 1:].flatten())
    assert parts[2] == pytest.approx(float(loss), rel=1e-5)


def test_each_kept_layer_is_paired_with_the_layer_it_was(original: DecoderStack, student: DecoderStack,
                                                       tokens_NT: Tensor) -> None:
    """Layer 0 and 1 still put out what they did; the layer after the gap does not."""
    losses = [float(distillation(Teacher(original, tokens_NT, KEPT, pairs=[pair]), Weights(0, 1, 0))(student, ROWS))
              for pair in (0, 1, 2)]
    assert losses[0] == losses[1] == 0 < losses[2]
    with original.capture("output") as seen:
        original(tokens_NT[[4, 1]])
    with student.capture("output") as mine:
        student(tokens_NT[[4, 1]])
    assert losses[2] == pytest.approx(float(distance(mine[2, "output"], seen[3, "output"])), rel=1e-5)


def test_distance_is_relative_token_by_token() -> None:
    target = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e3, 1e-2])[:, None]
    assert float(distance(target, target)) == 0
    assert float(distance(torch.zeros_like(target), target)) == pytest.approx(1)
    assert float(distance(1.1 * target, target)) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("layers", "kept", "expected"),
    [
        (5, [0, 1, 3, 4], [0, 1, 2]),
        (4, [0, 1, 2, 3], [0, 1]),
        (4, [0, 1, 2], [0, 1, 2]),
        (12, [0, 1, 2, 3, 4, 5, 9, 10, 11], [1, 3, 4, 6]),
        (2, [1], [0]),
    ],
)
def test_pairs_are_spread_and_stand_after_gaps(layers: int, kept: list[int], expected: list[int]) -> None:
    found = paired(layers, kept)
    gaps = [index for index in range(1, len(kept)) if kept[index] != kept[index - 1] + 1]
    assert set(gaps) <= {*found, len(kept) - 1}
    assert all(0 <= index < len(kept) for index in found) and found == sorted(set(found))
    assert kept[-1] != layers - 1 or len(kept) - 1 not in found


def test_answers_are_kept_while_there_is_room(original: DecoderStack, tokens_NT: Tensor,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    one = 10 * 32 * 4 * 3
    teacher = Teacher(original, tokens_NT, KEPT, pairs=[0, 2], memory=2 * one)
    ask = teacher._answers._ask
    monkeypatch.setattr(teacher._answers, "_ask", lambda rows: asked.append(rows) or ask(rows))
    first = teacher([0, 1])
    teacher([2])
    again = teacher([1, 2, 0])
    assert asked == [[0, 1], [2], [2]]
    assert torch.equal(first.final_BTC[0], again.final_BTC[2])
    for ours, theirs in zip(first.states, teacher([0, 1]).states, strict=True):
        assert torch.equal(ours, theirs)


def test_layers_that_do_not_pair_are_refused(original: DecoderStack, tokens_NT: Tensor) -> None:
    for kept in ([0, 5], [1, 0], [0, 0]):
        with pytest.raises(BadOption, match="original of 5"):
            Teacher(original, tokens_NT, kept)


def test_chunks_have_the_value_and_gradients_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def loss(x_PC: Tensor, part: slice) -> Tensor:
        return ((x_PC @ w.T).tanh() * torch.arange(7)[part, None]).sum()

    whole = torch.autograd.grad(2 * loss(x, slice(None)), [x, w])
    value = in_chunks(loss, x, [w], 2)
    assert value.item() == pytest.approx(loss(x, slice(None)).item(), rel=1e-6)
    for ours, theirs in zip(torch.autograd.grad(2 * value, [x, w]), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_loss_in_chunks_trains_head_and_norm_too(original: DecoderStack, student: DecoderStack, tokens_NT: Tensor,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "CHUNK", 97 * 3)
    trained = student.copied(torch.float32)
    parameters = list(trained.decoder.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    teacher = Teacher(original, tokens_NT, KEPT)
    found = torch.autograd.grad(distillation(teacher, Weights(1, 0, 0))(trained, ROWS), parameters)
    p_BTV = original(tokens_NT[[4, 1]]).log_softmax(-1).detach()
    q_BTV = trained(tokens_NT[[4, 1]]).log_softmax(-1)
    expected = torch.autograd.grad((p_BTV.exp() * (p_BTV - q_BTV)).sum(-1).mean(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_layers_that_do_not_learn_run_once_a_block(original: DecoderStack, student: DecoderStack,
                                                   tokens_NT: Tensor) -> None:
    trained = student.copied(torch.float32)
    assert frozen_layers(trained) == 4
    for parameter in trained.block(2).parameters():
        parameter.requires_grad_(True)
    assert frozen_layers(trained) == 2
    teacher = Teacher(original, tokens_NT, KEPT, pairs=[2])
    plain, kept = distillation(teacher, Weights()), distillation(teacher, Weights(), frozen=2)
    parameters = list(trained.block(2).parameters())
    for _ in range(2):
        losses = [loss(trained, ROWS) for loss in (plain, kept)]
        assert losses[0].item() == losses[1].item()
        for ours, theirs in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
            assert torch.equal(ours, theirs)
    with trained.edit(0, "output", torch.zeros_like):
        assert kept(trained, ROWS).item() == losses[1].item() != plain(trained, ROWS).item()
    trained.decoder.embedding.requires_grad_(True)
    assert frozen_layers(trained) == 0
