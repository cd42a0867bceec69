"""Angles, contributions and lenses: against float64 arithmetic on captured tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.measure.angular_distance import AngularDistance, distance
from layerwise.measure.base import Forward
from layerwise.measure.contribution_cosine import ContributionCosine
from layerwise.measure.engine import measure, names
from layerwise.measure.logit_lens_overlap import LogitLensOverlap, overlap
from layerwise.stack.base import Skip
from layerwise.stack.decoder import DecoderStack


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def test_angles_known_by_hand() -> None:
    assert distance(torch.tensor([1.0, 0.0, -1.0])).tolist() == pytest.approx([0, 0.5, 1])


def test_a_skipped_layer_does_not_turn(stack: DecoderStack, tokens_NT: Tensor) -> None:
    with stack.swap(0, Skip()):
        found = measure(stack, tokens_NT, ["angular-distance", "lim"], progress=False)
    assert found["angular-distance"].values[0] == 0
    assert found["lim"].values[0] == -1


@pytest.mark.parametrize("n", [1, 2, 4])
def test_angle_over_n_layers(stack: DecoderStack, tokens_NT: Tensor, trace: Any, n: int) -> None:
    found = measure(stack, tokens_NT, AngularDistance(n), batch=2, progress=False)
    column = found["angular-distance" if n == 1 else f"angular-distance:{n}"]
    expected = [float((cosine(trace.inputs[layer], trace.outputs[layer + n - 1]).acos() / math.pi).mean())
                for layer in range(4 - n + 1)]
    assert column.values[: len(expected)] == pytest.approx(expected, abs=1e-5)
    assert all(math.isnan(value) for value in column.values[len(expected):])


def test_an_angle_over_more_layers_than_there_are(stack: DecoderStack, tokens_NT: Tensor) -> None:
    with pytest.raises(BadOption, match="n=5"):
        measure(stack, tokens_NT, AngularDistance(5), progress=False)


def test_contributions(stack: DecoderStack, tokens_NT: Tensor, trace: Any) -> None:
    wanted = ["relative-contribution", ContributionCosine()]
    found = measure(stack, tokens_NT, wanted, batch=2, progress=False)
    sites = zip(trace.inputs, trace.outputs, trace.attention, trace.feed_forward, strict=True)
    for layer, (h, y, a, m) in enumerate(sites):
        pairs = {"attention": (a, h), "feed-forward": (m, h + a), "block": (y - h, h)}
        for part, (added, present) in pairs.items():
            ratio = float((added.norm(dim=-1) / present.norm(dim=-1)).mean())
            turn = float(cosine(added, present).mean())
            assert found[f"relative-contribution:{part}"].values[layer] == pytest.approx(ratio, rel=1e-5)
            assert found[f"contribution-cosine:{part}"].values[layer] == pytest.approx(turn, abs=1e-6)


def test_a_half_that_is_gone_contributes_nothing(stack: DecoderStack, tokens_NT: Tensor) -> None:
    from dataclasses import replace

    row = replace(stack.spec.rows[1], mixer=None)
    blocks = [stack.block(layer) for layer in range(4)]
    blocks[1] = blocks[1].without("attention")  # type: ignore[operator]
    slim = stack.rebuilt(stack.spec.with_rows({1: row}), blocks)
    found = measure(slim, tokens_NT, "relative-contribution", progress=False)
    assert found["relative-contribution:attention"].values[1] == 0
    assert found["relative-contribution:feed-forward"].values[1] > 0


def test_lens_at_every_token(stack: DecoderStack, tokens_NT: Tensor, trace: Any) -> None:
    found = measure(stack, tokens_NT, ["logit-lens-kl", LogitLensOverlap(3)], lens_tokens=16, batch=2,
                    progress=False)
    final = trace.logits.log_softmax(-1)
    for layer, x_BTC in enumerate(trace.inputs):
        lens = stack.decoder.logits(x_BTC.float()).double().log_softmax(-1)
        kl = float((lens.exp() * (lens - final)).sum(-1).mean())
        tops = zip(lens.flatten(0, 1).topk(3).indices.tolist(), final.flatten(0, 1).topk(3).indices.tolist(),
                   strict=True)
        share = math.fsum(len(set(a) & set(b)) / 3 for a, b in tops) / tokens_NT.numel()
        assert found["logit-lens-kl"].values[layer] == pytest.approx(kl, rel=1e-4)
        assert found["logit-lens-overlap"].values[layer] == pytest.approx(share, abs=1e-12)


def test_overlap_known_by_hand() -> None:
    assert overlap(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 9], [7, 8]])).tolist() == [0.5, 0]


def test_the_lens_after_layers_that_do_nothing_is_the_model(stack: DecoderStack, tokens_NT: Tensor) -> None:
    with stack.swap(2, Skip()), stack.swap(3, Skip()):
        found = measure(stack, tokens_NT, ["logit-lens-kl", "logit-lens-overlap"], progress=False)
    assert found["logit-lens-kl"].values[2:] == pytest.approx([0, 0], abs=1e-9)
    assert found["logit-lens-overlap"].values[2:] == (1, 1)


def test_a_lens_sample_is_seeded(stack: DecoderStack, tokens_NT: Tensor) -> None:
    def kl(seed: int) -> tuple[float, ...]:
        return measure(stack, tokens_NT, "logit-lens-kl", seed=seed, lens_tokens=2, progress=False).columns[
            "logit-lens-kl"].values

    assert kl(0) == kl(0) != kl(1)


def test_all_together_equal_each_alone(stack: DecoderStack, tokens_NT: Tensor) -> None:
    together = measure(stack, tokens_NT, names(Forward), batch=2, progress=False)
    for name in names(Forward):
        alone = measure(stack, tokens_NT, name, batch=2, progress=False)
        for column in alone.columns.values():
            assert together[column.name] == column
