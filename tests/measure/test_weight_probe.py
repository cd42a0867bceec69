"""The probe's formula as a loop, and categories that are planted in weights."""

from __future__ import annotations

import pytest
import torch

from layerwise.errors import BadData
from layerwise.measure.weight_probe import (
    DenseProbe,
    Split,
    WeightProbe,
    accuracy,
    majority,
    nearest_root,
    read,
    statistics,
)


def planted(count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Three yes-or-no categories, each adding its own rank-one pattern to noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(count, 3, generator=generator) < 0.5
    left, right = torch.randn(3, 12, generator=generator), torch.randn(3, 10, generator=generator)
    patterns = torch.einsum("yh,yw->yhw", left, right)
    noise = torch.randn(count, 12, 10, generator=generator)
    return torch.einsum("ny,yhw->nhw", labels.float(), patterns) + noise, labels


def test_the_formula_is_that_of_a_loop() -> None:
    torch.manual_seed(0)
    probe, x = WeightProbe((4, 5), 2, probes=3, projections=2, representation=6), torch.randn(4, 5)
    answers = []
    for u in range(3):
        answer = probe.project.weight @ (x @ probe.probes_WU[:, u])
        answers += answer.clamp(min=0).tolist()
    t = probe.encode.weight @ torch.tensor(answers) + probe.encode.bias
    assert torch.allclose(probe(x[None])[0], probe.head(t), atol=1e-6)


@pytest.mark.parametrize("kind", ["probe", "dense"])
def test_planted_categories_are_read(kind: str) -> None:
    x, labels = planted()
    torch.manual_seed(0)
    small = WeightProbe((12, 10), 3, probes=8, projections=8, representation=16)
    probe = small if kind == "probe" else DenseProbe(120, 3)
    found = read(probe, x, labels, Split.draw(200, 0), epochs=100, rate=3e-3)
    assert found.test > 0.85
    assert found.parameters == sum(p.numel() for p in probe.parameters())


def test_labels_of_other_models_are_not_read() -> None:
    x, labels = planted()
    torch.manual_seed(0)
    found = read(WeightProbe((12, 10), 3), x, labels[torch.randperm(200)], Split.draw(200, 0), epochs=30)
    assert 0.3 < found.test < 0.7


def test_fixed_probes_stay() -> None:
    x, labels = planted(40)
    probe = WeightProbe((12, 10), 3, learn_probes=False)
    before = probe.probes_WU.clone()
    found = read(probe, x, labels, Split.draw(40, 0), epochs=2)
    assert torch.equal(probe.probes_WU, before)
    assert found.parameters == sum(p.numel() for p in probe.parameters()) - before.numel()


def test_scale_and_shift_of_the_weights_do_not_matter() -> None:
    x, labels = planted(60)
    results = []
    for inputs in (x, 1e-3 * x + 5):
        torch.manual_seed(0)
        results.append(read(DenseProbe(120, 3), inputs, labels, Split.draw(60, 0), epochs=20))
    assert results[0].test == pytest.approx(results[1].test, abs=0.05)


def test_statistics_by_hand() -> None:
    found = statistics(torch.arange(9.0).view(1, 3, 3))[0]
    assert found[0] == 4
    assert found[1] == pytest.approx(7.5**0.5)
    assert found[2:].tolist() == pytest.approx(list(range(9)))


def test_majority_and_accuracy() -> None:
    labels = torch.tensor([[1, 0]] * 15 + [[0, 0]] * 5)
    split = Split(torch.arange(15), torch.arange(15, 17), torch.arange(15, 20))
    assert majority(labels, split) == 0.5
    assert accuracy(torch.nn.Identity(), torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 1.0]])) == 0.5


def test_splits_cover_all_models_once() -> None:
    split = Split.draw(100, 0)
    assert sorted(torch.cat([split.train, split.validation, split.test]).tolist()) == list(range(100))
    assert [len(split.train), len(split.validation)] == [70, 15]
    with pytest.raises(BadData, match="at least 20"):
        Split.draw(10, 0)


def test_models_go_to_the_nearest_root() -> None:
    roots = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])
    assert nearest_root(torch.tensor([[[0.1, 0], [0, 0.2]], [[1, 1], [0.6, 1]]]), roots).tolist() == [0, 1]
