"""GPTQ against a float64 loop that recomputes the inverse for every column, and its guarantees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import BadData, BadModel
from layerwise.nets.packed import PackedLinear
from layerwise.spec import Format
from layerwise.transform.gptq import factorised, gptq, output_error
from layerwise.transform.rounding import Rounded, round_to_nearest

FOUR, THREE = Format(4, 32), Format(3, 32)


def problem(outputs: int = 24, inputs: int = 80, samples: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normal weights, and the Gram matrix of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    mixing = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(samples, inputs, generator=generator) @ mixing * torch.logspace(-1, 1, inputs)
    return weight, x.T @ x


def slow_gptq(weight_OI: Tensor, gram_II: Tensor, rounded: Rounded, format: Format, damping: float) -> Tensor:
    """Optimal brain quantisation in a fixed order, all in float64.

    After input j is rounded, the inputs left move by -(error_j / inverse_jj) * inverse_j,left, where the
    inverse is that of the damped Gram matrix of the inputs not yet rounded, computed anew each time.
    """
    w, gram = weight_OI.double().clone(), gram_II.double()
    gram = gram + damping * torch.diag(gram.diagonal())
    _, scale, zero = rounded
    half = 2 ** (format.bits - 1)
    left = gram_II.diagonal().argsort(descending=True, stable=True).tolist()
    codes = torch.zeros_like(w)
    while left:
        inverse = torch.linalg.inv(gram[left][:, left])
        column, group = left[0], left[0] // (format.group or len(gram))
        step = scale[:, group].double()
        shift = torch.zeros_like(step) if zero is None else zero[:, group].double()
        codes[:, column] = ((w[:, column] - shift) / step).round().add(half).clamp(0, 2**format.bits - 1)
        error = w[:, column] - ((codes[:, column] - half) * step + shift)
        w[:, left] -= torch.outer(error / inverse[0, 0], inverse[0])
        left = left[1:]
    return codes


@pytest.mark.parametrize("format", [FOUR, Format(3, 16, True), Format(2, 32), Format(8, 0, True)], ids=str)
@pytest.mark.parametrize("block", [7, 128])
def test_matches_the_slow_loop(format: Format, block: int) -> None:
    weight, gram = problem()
    plain = round_to_nearest(weight, format)
    codes = gptq(weight, gram, format, block=block, damping=0.01)[0]
    slow = slow_gptq(weight, gram, plain, format, 0.01)
    kept = (codes == plain[0]).all(1)  # rows where plain rounding was no worse
    agree = (codes == slow).float().mean(1)
    assert kept.float().mean() < 0.5
    assert (agree[~kept] > 0.97).all(), "float32 may flip a tie, and what follows it"
    fast, exact = (output_error(weight, gram, (c.to(torch.uint8), *plain[1:]), format)[~kept].sum()
                   for c in (codes, slow))
    assert abs(fast / exact - 1) < 0.01


@settings(deadline=None, max_examples=25)
@given(bits=st.sampled_from([2, 3, 4, 8]), group=st.sampled_from([0, 16]), symmetric=st.booleans(),
       samples=st.integers(1, 100), search=st.sampled_from([0, 4]), seed=st.integers(0, 1000))
def test_output_error_is_never_above_plain_rounding(bits: int, group: int, symmetric: bool, samples: int,
                                                    search: int, seed: int) -> None:
    weight, gram = problem(8, 40, samples, seed)
    format = Format(bits, group, symmetric)
    plain = round_to_nearest(weight, format, search=search, importance_I=gram.diagonal())
    error = output_error(weight, gram, gptq(weight, gram, format, search=search), format)
    assert (error <= output_error(weight, gram, plain, format)).all()


def test_correlated_inputs_halve_the_error() -> None:
    weight, gram = problem()
    plain, compensated = (output_error(weight, gram, rounded, THREE).sum()
                          for rounded in (round_to_nearest(weight, THREE), gptq(weight, gram, THREE)))
    assert compensated < 0.5 * plain


def test_independent_inputs_are_rounded_to_nearest() -> None:
    weight = problem()[0]
    assert torch.equal(gptq(weight, torch.eye(80), FOUR)[0], round_to_nearest(weight, FOUR)[0])


def test_dead_inputs_keep_their_nearest_codes() -> None:
    weight, gram = problem()
    gram[[3, 40]], gram[:, [3, 40]] = 0, 0
    codes = gptq(weight, gram, FOUR)[0]
    assert torch.equal(codes[:, [3, 40]], round_to_nearest(weight, FOUR)[0][:, [3, 40]])
    nothing = gptq(weight, torch.zeros_like(gram), FOUR)[0]
    assert torch.equal(nothing, round_to_nearest(weight, FOUR)[0])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_singular_gram_without_damping(scale: float) -> None:
    weight = problem()[0]
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(0))
    gram = x.T @ x * scale
    error = output_error(weight, gram, gptq(weight, gram, THREE, damping=1e-12), THREE).sum()
    assert error < 0.1 * output_error(weight, gram, round_to_nearest(weight, THREE), THREE).sum()


def test_factor_gives_the_damped_gram_back() -> None:
    gram = problem()[1].double()
    factor = factorised(gram, 0.01)
    order, unit = factor.order_I, factor.unit_II.double()
    damped = (gram + 0.01 * torch.diag(gram.diagonal()))[order][:, order]
    assert (gram.diagonal()[order].diff() <= 0).all()
    assert torch.equal(order[factor.back_I], torch.arange(80))
    assert torch.equal(unit, unit.triu()) and (unit.diagonal() == 1).all()
    pivots = torch.linalg.solve_triangular(unit, damped, upper=True).diagonal()
    size = torch.outer(damped.diagonal(), damped.diagonal()).sqrt()
    torch.testing.assert_close(unit @ torch.diag(pivots) @ unit.T / size, damped / size, rtol=0, atol=1e-5)


def test_stacking_matrices_changes_nothing() -> None:
    weight, gram = problem()
    whole = gptq(weight, gram, FOUR, search=4, sweeps=1)[0]
    halves = torch.cat([gptq(part, gram, FOUR, search=4, sweeps=1)[0] for part in weight.chunk(2)])
    assert (halves == whole).float().mean() > 0.99, "but for sums of another order"


def test_layers_really_give_closer_outputs() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 16, generator=generator) @ torch.randn(16, 64, generator=generator)
    x = x + 0.1 * torch.randn(300, 64, generator=generator)
    weight = torch.randn(32, 64, generator=generator)
    layers = (PackedLinear.from_codes(*rounded, THREE)
              for rounded in (round_to_nearest(weight, THREE), gptq(weight, x.T @ x, THREE)))
    plain, compensated = (((layer(x) - x @ weight.T) ** 2).mean() for layer in layers)
    assert compensated < 0.3 * plain


def test_bad_statistics_and_weights() -> None:
    weight, gram = problem()
    with pytest.raises(BadData, match="Gram matrix of shape"):
        gptq(weight, gram[:10, :10], Format(4, 32))
    with pytest.raises(BadData, match="Gram matrix of shape"):
        gptq(weight, gram * float("nan"), Format(4, 32))
    with pytest.raises(BadModel, match="matrix 'up'"):
        gptq(weight * float("inf"), gram, Format(4, 32), what="matrix 'up'")


def test_a_table_rounded_part_by_part_is_what_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(outputs=70, inputs=64)
    whole = gptq(weight, gram, THREE, search=5, sweeps=1)
    monkeypatch.setattr("layerwise.transform.gptq.ROWS", 16)
    parts = gptq(weight, gram, THREE, search=5, sweeps=1)
    assert (whole[0] == parts[0]).float().mean() > 0.98  # sums of other lengths may tip a tie
    assert output_error(weight, gram, parts, THREE).sum() == pytest.approx(
        float(output_error(weight, gram, whole, THREE).sum()), rel=0.02)
