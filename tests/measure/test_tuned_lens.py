"""The tuned lens: maps that are known, numpy's least squares, and what must not matter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import BadData, BadModel, BadOption
from layerwise.measure.engine import lacking, measure, supported
from layerwise.measure.tuned_lens import TunedLens, settled
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.module import ModuleStack
from layerwise.testing.instruments import check_instrument
from layerwise.testing.stacks import random_stack

ALL = 1000
"""More positions than any row has: every one is scored."""


@pytest.fixture(scope="module")
def text_NT() -> Tensor:
    """Enough tokens for maps of width 16."""
    return torch.randint(97, (6, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def narrow() -> DecoderStack:
    return random_stack(3, hidden=16)


class Affine(nn.Module):
    def __init__(self, map_CC: Tensor) -> None:
        super().__init__()
        self.map_CC = map_CC

    def forward(self, x: Tensor, *shared: object) -> Tensor:
        return x @ self.map_CC + 0.5


def test_layers_that_are_affine_are_read_through_exactly(narrow: DecoderStack, text_NT: Tensor) -> None:
    maps = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0)) / 4
    with (narrow.swap(0, Affine(maps[0])), narrow.swap(1, Affine(maps[1])), narrow.swap(2, Affine(maps[2]))):
        found = measure(narrow, text_NT, TunedLens(ridge=1e-12), progress=False)
    assert found["tuned-lens"].values == pytest.approx([0, 0, 0], abs=1e-6)
    assert found["tuned-lens:settled"].values == (1, 1, 1)
    assert min(found["tuned-lens:logit-lens"].values) > 0.01


def test_layers_that_do_nothing_need_no_map(narrow: DecoderStack, text_NT: Tensor) -> None:
    with narrow.skip(0), narrow.skip(1), narrow.skip(2):
        found = measure(narrow, text_NT, "tuned-lens", progress=False)
    assert found["tuned-lens"].values == found["tuned-lens:logit-lens"].values == pytest.approx([0, 0, 0], abs=1e-9)


def test_settled_is_from_where_on_nothing_changes() -> None:
    same_LP = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 1, 0]], dtype=torch.bool)
    assert settled(same_LP).int().tolist() == [[0, 1, 0], [0, 1, 0], [1, 1, 0]]


def test_equals_least_squares_of_numpy(narrow: DecoderStack, text_NT: Tensor) -> None:
    with narrow.capture("input", "output") as seen:
        narrow(text_NT)
    order = sorted(range(6), key=lambda row: hashlib.sha256(text_NT[row].numpy().tobytes()).digest())
    halves = order[::2], order[1::2]
    last_NTC = seen[2, "output"].double().numpy()
    head = narrow.copied(torch.float32)
    head.decoder.double()
    state = head.run(head.start(text_NT))

    def log_p(rows: Any) -> Tensor:
        rows_1PC = torch.as_tensor(rows, dtype=torch.float64)[None]
        logits_1PV: Tensor = head.finish(state.moved(rows_1PC, 3))
        return logits_1PV[0].log_softmax(-1)

    final_PV = log_p(np.concatenate([last_NTC[half, 1:].reshape(-1, 16) for half in halves]))
    tuned, plain, same = [], [], []
    for layer in range(3):
        h_NTC = seen[layer, "input"].double().numpy()

        one, two = (h_NTC[half, 1:].reshape(-1, 16) for half in halves)
        ends = [last_NTC[half, 1:].reshape(-1, 16) for half in halves]
        x, y = (np.hstack([rows, np.ones((len(rows), 1))]) for rows in (one, two))
        read = np.concatenate([x @ np.linalg.lstsq(y, ends[1], rcond=None)[0],
                               y @ np.linalg.lstsq(x, ends[0], rcond=None)[0]])
        for found, rows in ((tuned, read), (plain, np.concatenate([one, two]))):
            found.append(float((final_PV.exp() * (final_PV - log_p(rows))).sum(-1).mean()))
        same.append(log_p(read).argmax(-1) == final_PV.argmax(-1))
    scores = measure(narrow, text_NT, TunedLens(ridge=1e-10, tokens=ALL), batch=2, progress=False)
    assert scores["tuned-lens"].values == pytest.approx(tuned, rel=1e-4)
    assert scores["tuned-lens:logit-lens"].values == pytest.approx(plain, rel=1e-4)
    assert all(lens < bare for lens, bare in zip(tuned, plain, strict=True))  # on tokens that did not fit the map
    expected = [torch.stack(same[layer:]).all(0).double().mean().item() for layer in range(3)]
    assert scores["tuned-lens:settled"].values == pytest.approx(expected)


def test_a_strong_ridge_is_the_logit_lens(narrow: DecoderStack, text_NT: Tensor) -> None:
    found = measure(narrow, text_NT, TunedLens(ridge=1e9), progress=False)
    assert found["tuned-lens"].values == pytest.approx(found["tuned-lens:logit-lens"].values, rel=1e-5)


def test_neither_batches_nor_padding_nor_order_matter(narrow: DecoderStack, text_NT: Tensor) -> None:
    def of(data: Any, batch: int | None = None) -> list[float]:
        scores = measure(narrow, data, TunedLens(tokens=5), batch=batch, progress=False)
        return [value for column in scores.columns.values() for value in column.values]

    right_NT, left_NT = F.pad(text_NT, (0, 7), value=5), F.pad(text_NT, (7, 0), value=5)
    mask_NT = torch.arange(47).expand(6, 47) < 40
    expected = of(text_NT, 6)
    for found in (of(text_NT, 1), of(text_NT.flip(0), 4), of([(right_NT, mask_NT)]), of([(left_NT, mask_NT.flip(1))])):
        assert found == pytest.approx(expected, rel=2e-5)


def test_more_positions_than_the_head_takes_at_once(narrow: DecoderStack, text_NT: Tensor,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure(narrow, text_NT, "tuned-lens", progress=False)
    monkeypatch.setattr("layerwise.measure.tuned_lens.CHUNK", 97 * 11)
    parts = measure(narrow, text_NT, "tuned-lens", progress=False)
    for name, column in whole.columns.items():
        assert parts[name].values == pytest.approx(column.values, rel=1e-6)


def test_learning_the_divergence_beats_least_squares_on_other_text() -> None:
    stack = random_stack(3, hidden=16)
    text_NT = torch.randint(97, (120, 40), generator=torch.Generator().manual_seed(5))
    closed, learned = (measure(stack, text_NT, TunedLens(ridge=1e-6, steps=steps), progress=False)
                       for steps in (0, 150))
    assert all(after < before for after, before in
               zip(learned["tuned-lens"].values, closed["tuned-lens"].values, strict=True))
    assert learned["tuned-lens:logit-lens"].values == closed["tuned-lens:logit-lens"].values
    assert all(weight.grad is None for weight in stack.decoder.parameters())


def test_learning_stays_where_nothing_is_left_to_add(narrow: DecoderStack, text_NT: Tensor) -> None:
    with narrow.skip(0), narrow.skip(1), narrow.skip(2):
        found = measure(narrow, text_NT, TunedLens(steps=5), progress=False)
    assert found["tuned-lens"].values == pytest.approx([0, 0, 0], abs=1e-9)


@pytest.mark.parametrize("make", [TunedLens, lambda: TunedLens(ridge=0.1, tokens=3), lambda: TunedLens(steps=3)])
def test_the_contract(make: Callable[[], TunedLens]) -> None:
    check_instrument(make())


def test_bad_input_is_refused(narrow: DecoderStack, text_NT: Tensor) -> None:
    with pytest.raises(BadData, match="texts of one token"):
        measure(narrow, text_NT[:, :1], "tuned-lens", progress=False)
    with pytest.raises(BadData, match="one text only"):
        measure(narrow, text_NT[:1].repeat(3, 1), "tuned-lens", progress=False)
    assert supported(narrow, ["tuned-lens", "taylor"], text_NT[:1]) == ["taylor"]  # a profile goes on without it
    for broken in (TunedLens(ridge=0.0), TunedLens(tokens=0), TunedLens(steps=-1)):
        with pytest.raises(BadOption, match="ridge"):
            measure(narrow, text_NT, broken, progress=False)
    module = ModuleStack(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert "decoder" in str(lacking(module, "tuned-lens"))


def test_the_layer_that_breaks_is_named(narrow: DecoderStack, text_NT: Tensor) -> None:
    with narrow.swap(1, Affine(torch.full((16, 16), torch.nan))), pytest.raises(BadModel, match="after layer 1"):
        measure(narrow, text_NT, "tuned-lens", progress=False)
