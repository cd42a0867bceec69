"""Narrow: the refit is the least-squares solution, choices are good, and what is stored is what the row says."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import BadData, BadModel, BadOption
from layerwise.nets.decoder import Block
from layerwise.nets.factored import FactoredLinear
from layerwise.nets.packed import PackedLinear
from layerwise.spec import Attention, FeedForward, LayerSpec, Opaque
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.open import open as open_stack
from layerwise.testing.stacks import random_stack
from layerwise.testing.transforms import check_transform
from layerwise.transform.gram import grams
from layerwise.transform.low_rank import LowRank
from layerwise.transform.narrow import Narrow, damped, ranked, refit, rows_of
from layerwise.transform.quantize import Quantize, values

BIASED = LayerSpec(Attention(6, 3, 8, qkv_bias=True, out_bias=True, qk_norm=True),
                   FeedForward(96, gated=False, bias=True))
GATED = LayerSpec(Attention(4, 2, 16), FeedForward(128))


def problem(outputs: int = 16, inputs: int = 24, samples: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and correlated inputs [N, I] of different sizes, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    mixing = torch.randn(inputs // 2, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, inputs // 2, generator=generator, dtype=torch.float64) @ mixing
    x = x + 0.3 * torch.randn(samples, inputs, generator=generator, dtype=torch.float64)
    return weight, x * torch.logspace(-1, 1, inputs, dtype=torch.float64)


def block_of(stack: DecoderStack) -> Block:
    block = stack.block(0)
    assert isinstance(block, Block)
    return block


def calibrated(stack: DecoderStack) -> tuple[Block, dict[str, Tensor], Tensor, object]:
    """The first block, its Gram matrices, what enters it, and what it shares."""
    state = stack.start(torch.randint(97, (16, 60), generator=torch.Generator().manual_seed(0)))
    return block_of(stack), grams(block_of(stack), 0, [state]), state.hidden, state.shared


def test_refitting_is_least_squares() -> None:
    weight, x = problem()
    kept = torch.tensor([1, 4, 5, 9, 16, 17, 22])
    refitted = weight @ refit(x.T @ x, kept)
    best = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    error, least = ((x @ weight.T - x[:, kept] @ w.T).square().sum() for w in (refitted, best))
    plain = (x @ weight.T - x[:, kept] @ weight[:, kept].T).square().sum()
    assert least <= error < 1.005 * least
    assert error < 0.7 * plain


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 24), samples=st.integers(1, 60), seed=st.integers(0, 500))
def test_refitting_on_any_data_never_does_harm(count: int, samples: int, seed: int) -> None:
    weight, x = problem(samples=samples, seed=seed)
    kept = torch.randperm(24, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    refitted = weight @ refit((x.T @ x).float(), kept)
    assert bool(refitted.isfinite().all())
    error, plain = ((x @ weight.T - x[:, kept] @ w.T).square().sum() for w in (refitted, weight[:, kept]))
    assert error <= plain * (1 + 1e-4) + 1e-6 * (x @ weight.T).square().sum()


@pytest.mark.parametrize(("unit", "count"), [(1, 3), (1, 5), (2, 2)])
def test_the_choice_is_close_to_the_best_of_all(unit: int, count: int) -> None:
    weight, x = problem(6, 8, seed=3)
    gram = x.T @ x

    def error(units: tuple[int, ...]) -> float:
        kept = (torch.tensor(units)[:, None] * unit + torch.arange(unit)).flatten()
        return float((x @ (weight - torch.zeros_like(weight).index_copy(1, kept, weight @ refit(gram, kept))).T)
                     .square().sum())

    everything = {units: error(units) for units in itertools.combinations(range(8 // unit), count)}
    chosen = tuple(sorted(ranked(weight, gram, unit, count)[:count].tolist()))
    assert everything[chosen] <= 1.2 * min(everything.values())


def test_what_others_explain_goes_first() -> None:
    weight, x = problem()
    x[:, 7] = x[:, 3] + x[:, 5]
    weight[:, 20] = 0
    order = ranked(weight, x.T @ x).tolist()
    assert 20 in order[-2:]
    assert {3, 5, 7} & set(order[-6:])
    assert not {3, 5, 7} <= set(order[-6:])
    assert sorted(ranked(weight, x.T @ x, 3).tolist()) == list(range(8))


@pytest.mark.parametrize("gram", [torch.zeros(24, 24), torch.ones(24, 24), torch.diag(torch.arange(24.0)),
                                  1e30 * torch.ones(24, 24)], ids=["dead", "constant", "independent", "huge"])
def test_singular_statistics(gram: Tensor) -> None:
    weight = problem()[0]
    order = ranked(weight, gram)
    mixing = refit(gram, order[:9].sort().values)
    assert bool(mixing.isfinite().all())
    assert mixing.abs().max() <= 1.001
    assert float(damped(gram).diagonal().min()) > 0


# the transform ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["error", "norm"])
@pytest.mark.parametrize("row", [BIASED, GATED, replace(GATED, mixer=None), replace(BIASED, feed_forward=None)],
                         ids=["biased", "gated", "no attention", "no feed-forward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contract(by: str, row: LayerSpec, dtype: str) -> None:
    check_transform(Narrow(width=40, kv_heads=1, by=by), random_stack(2, row=row, dtype=dtype))  # type: ignore[arg-type]


@pytest.mark.parametrize("prepare", [Quantize(8), Quantize(4), LowRank(10, "plain")], ids=str)
def test_contract_of_packed_and_factored_rows(prepare: Quantize | LowRank) -> None:
    stack = random_stack(1, row=BIASED)
    block, row = prepare.apply(block_of(stack), BIASED), prepare.edit(BIASED, 64)
    state = stack.start(torch.arange(48).view(2, 24))
    new = Narrow(width=40, kv_heads=2).apply(block, row, grams(block, 0, [state]))
    edited = Narrow(width=40, kv_heads=2).edit(row, 64)
    assert sum(tensor.nbytes for tensor in new.state_dict().values()) == edited.bytes(64, "float32")
    assert (edited.formats, edited.ranks) == (row.formats, row.ranks)
    for name in block.matrices():
        assert type(new.matrix(name)) is type(block.matrix(name))
    assert bool(new(state.hidden, state.shared, 0).isfinite().all())


def test_rows_are_taken_as_they_are_stored() -> None:
    block, kept = block_of(random_stack(1, row=BIASED)), torch.tensor([0, 7, 30])
    dense = block.matrix("up")
    for matrix in (dense, Quantize(4).apply(block, BIASED).matrix("up"),
                   LowRank(9, "plain").apply(block, BIASED).matrix("up")):
        few = rows_of(matrix, kept)
        torch.testing.assert_close(values(few), values(matrix)[kept], rtol=1e-6, atol=1e-6)
        assert dense.bias is not None and few.bias is not None
        assert torch.equal(few.bias, dense.bias[kept])
    assert isinstance(rows_of(Quantize(4).apply(block, BIASED).matrix("up"), kept), PackedLinear)
    assert isinstance(rows_of(LowRank(9, "plain").apply(block, BIASED).matrix("up"), kept), FactoredLinear)


@pytest.mark.parametrize("row", [BIASED, GATED], ids=["biased", "gated"])
def test_channels_that_are_never_used_cost_nothing(row: LayerSpec) -> None:
    stack = random_stack(1, row=row)
    block, stats, hidden, shared = calibrated(stack)
    weight = values(block.matrix("down")).clone()
    down = torch.nn.Linear(weight.shape[1], 64)
    weight[:, ::3] = 0
    down.weight, down.bias = torch.nn.Parameter(weight, requires_grad=False), block.matrix("down").bias
    block = block.with_matrices({"down": down})
    new = Narrow(width=weight.shape[1] * 2 // 3).apply(block, row, stats)
    torch.testing.assert_close(new(hidden, shared, 0), block(hidden, shared, 0), rtol=1e-4, atol=1e-4)


def test_groups_of_heads_go_with_their_queries() -> None:
    row = LayerSpec(Attention(8, 4, 8), None)
    stack = random_stack(1, row=row)
    block, stats, hidden, shared = calibrated(stack)
    silent = torch.nn.Linear(64, 64, bias=False)
    weight = values(block.matrix("o")).clone()
    weight[:, 16:32] = 0  # the second key-value head's two query heads
    silent.weight = torch.nn.Parameter(weight, requires_grad=False)
    block = block.with_matrices({"o": silent})
    for by in ("error", "norm"):
        new = Narrow(kv_heads=3, by=by).apply(block, row, stats)  # type: ignore[arg-type]
        torch.testing.assert_close(new(hidden, shared, 0), block(hidden, shared, 0), rtol=1e-4, atol=1e-4)
        keys = values(block.matrix("k")).view(4, 8, -1)
        torch.testing.assert_close(values(new.matrix("k")), keys[[0, 2, 3]].flatten(0, 1))


def test_refitting_beats_cutting() -> None:
    stack = random_stack(1)
    block, stats, hidden, shared = calibrated(stack)
    exact, row = block(hidden, shared, 0), stack.spec.rows[0]
    errors = {by: float((Narrow(width=64, by=by).apply(block, row, stats)(hidden, shared, 0) - exact).square().mean())
              for by in ("error", "norm")}  # type: ignore[arg-type]
    assert errors["error"] < 0.8 * errors["norm"]


def test_save_and_open(tmp_path: Path) -> None:
    stack = random_stack(2)
    block, stats, *_ = calibrated(stack)
    transform, row = Narrow(width=50, kv_heads=1), stack.spec.rows[0]
    narrow = stack.rebuilt(stack.spec.with_rows({0: transform.edit(row, 64)}),
                           [transform.apply(block, row, stats), stack.block(1)])
    tokens = torch.arange(10)[None]
    assert torch.equal(open_stack(narrow.save(tmp_path / "m"))(tokens), narrow(tokens))


def test_as_narrow_already_is_kept() -> None:
    stack = random_stack(1)
    block = block_of(stack)
    assert Narrow(width=128, kv_heads=2).apply(block, stack.spec.rows[0]) is block


def test_refusals() -> None:
    row, block = GATED, block_of(random_stack(1, row=GATED))
    with pytest.raises(BadOption, match="keeping 129 channels of 128"):
        Narrow(width=129).edit(row, 64)
    with pytest.raises(BadOption, match="keeping 3 key-value heads of 2"):
        Narrow(kv_heads=3).edit(row, 64)
    with pytest.raises(BadOption, match="narrowing nothing"):
        Narrow()
    with pytest.raises(BadOption, match="width=0"):
        Narrow(width=0)
    with pytest.raises(BadOption, match="by='size'"):
        Narrow(width=3, by="size")  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="conv1"):
        Narrow(width=3).edit(LayerSpec(Opaque("conv1", "Conv2d", 1, 4), None), 64)
    with pytest.raises(BadOption, match="experts"):
        Narrow(width=3).edit(replace(row, feed_forward=FeedForward(16, experts=3, experts_per_token=1)), 64)
    with pytest.raises(BadOption, match="keys of layer 2"):
        Narrow(kv_heads=1).edit(replace(row, mixer=Attention(4, 2, 16, shares=2)), 64)
    with pytest.raises(BadData, match="matrix 'down' without their statistics"):
        Narrow(width=3).apply(block, row)
    with pytest.raises(BadData, match="Gram matrix of shape"):
        Narrow(width=3).apply(block, row, {"down": torch.full((128, 128), float("nan"))})
    broken = torch.nn.Linear(128, 64, bias=False)
    torch.nn.init.constant_(broken.weight, float("inf"))
    with pytest.raises(BadModel, match="matrix 'down'"):
        Narrow(width=3).apply(block.with_matrices({"down": broken}), row, {"down": torch.eye(128)})
