"""Low rank: the closed form with an inverse, the minimum over other matrices of the rank, and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import layerwise as lw
from layerwise.allocate.plan import Edit
from layerwise.data.text import Source, TextData
from layerwise.errors import BadData, BadModel, BadOption
from layerwise.nets.decoder import Block
from layerwise.nets.factored import FactoredLinear
from layerwise.nets.packed import PackedLinear
from layerwise.spec import Attention, FeedForward, LayerSpec, Opaque
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from layerwise.testing.transforms import check_transform
from layerwise.transform.gram import grams
from layerwise.transform.low_rank import LowRank, Method, factors, gram_rank, largest_rank, share_rank
from layerwise.transform.quantize import Quantize, values

BIASED = LayerSpec(Attention(4, 2, 16, qkv_bias=True, out_bias=True), FeedForward(96, gated=False, bias=True))
SHAPES = [(20, 50), (50, 20), (30, 30)]


def problem(outputs: int, inputs: int, samples: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and the Gram matrix of correlated inputs of very different sizes, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, inputs)
    return weight, x.T @ x


def error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    change = weight.double() - other.double()
    return float(((change @ gram.double()) * change).sum())


def block_of(stack: DecoderStack) -> Block:
    block = stack.block(0)
    assert isinstance(block, Block)
    return block


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("rank", [1, 6, 15])
def test_whitened_is_the_textbook_form(outputs: int, inputs: int, rank: int) -> None:
    weight, gram = problem(outputs, inputs)
    lower = torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(weight @ lower, full_matrices=False)
    reference = (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(lower)
    b, a = factors(weight, rank, gram)
    assert (b.shape, a.shape) == ((outputs, rank), (rank, inputs))
    torch.testing.assert_close(b @ a, reference)
    torch.testing.assert_close(b.T @ b, torch.eye(rank, dtype=torch.float64))
    assert error(weight, b @ a, gram) == pytest.approx(float(s[rank:].square().sum()), rel=1e-6)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_plain_is_the_singular_value_decomposition(outputs: int, inputs: int) -> None:
    weight, gram = problem(outputs, inputs)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    for given_gram in (None, gram):
        b, a = factors(weight, 7, given_gram, "plain")
        torch.testing.assert_close(b @ a, (u[:, :7] * s[:7]) @ v[:7])


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_utilized_projects_on_both_sides(outputs: int, inputs: int) -> None:
    weight, gram = problem(outputs, inputs)
    seen = torch.linalg.eigh(gram)[1][:, -7:]
    made = torch.linalg.eigh(weight @ gram @ weight.T)[1][:, -7:]
    b, a = factors(weight, 7, gram, "utilized")
    torch.testing.assert_close(b @ a, made @ made.T @ weight @ seen @ seen.T)


@settings(deadline=None, max_examples=40)
@given(shape=st.sampled_from(SHAPES), rank=st.integers(1, 15), samples=st.integers(15, 120),
       seed=st.integers(0, 1000), nudge=st.floats(1e-4, 1.0))
def test_no_matrix_of_the_rank_gives_closer_outputs(
        shape: tuple[int, int], rank: int, samples: int, seed: int, nudge: float) -> None:
    weight, gram = problem(*shape, samples, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    b, a = factors(weight, rank, gram)
    least = error(weight, b @ a, gram)
    slack = 1e-9 * error(weight, torch.zeros_like(weight), gram)
    for method in ("plain", "utilized"):
        other_b, other_a = factors(weight, rank, gram, method)  # type: ignore[arg-type]
        assert least <= error(weight, other_b @ other_a, gram) + slack
    for factor in (1.0, 0.0):  # matrices near the best, and any matrices
        near = [factor * part + nudge * torch.randn(part.shape, generator=generator) for part in (b, a)]
        assert least <= error(weight, near[0] @ near[1], gram) + slack


def test_data_matter() -> None:
    weight, gram = problem(30, 30)
    whitened, plain = (error(weight, b @ a, gram) for b, a in (factors(weight, 10, gram),
                                                               factors(weight, 10, None, "plain")))
    assert whitened < 0.5 * plain


# the transform ------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [
    LowRank(0.5), LowRank(7, "plain"), LowRank(0.3, "utilized", ("o", "down"))], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contract_of_biased_rows(transform: LowRank, dtype: str) -> None:
    check_transform(transform, random_stack(1, row=BIASED, dtype=dtype))


@given(share=st.floats(0.01, 0.99), outputs=st.integers(1, 700), inputs=st.integers(1, 700))
def test_a_share_of_parameters_is_never_exceeded(share: float, outputs: int, inputs: int) -> None:
    rank = share_rank(share, outputs, inputs)
    most = int(share * outputs * inputs / (outputs + inputs))
    assert rank == most if 1 <= most < 32 else rank == 1 or (rank % 32 == 0 and most - 32 < rank <= most)


@given(outputs=st.integers(1, 60), inputs=st.integers(1, 60))
def test_the_largest_rank_is_the_last_that_saves(outputs: int, inputs: int) -> None:
    most = largest_rank(outputs, inputs)
    assert most * (outputs + inputs) < outputs * inputs <= (most + 1) * (outputs + inputs)


def test_outputs_stay_close_and_biases_stay() -> None:
    stack = random_stack(1, row=BIASED)
    state = stack.start(torch.randint(97, (8, 60), generator=torch.Generator().manual_seed(0)))
    block, stats = block_of(stack), grams(block_of(stack), 0, [state])
    exact = block(state.hidden, state.shared, 0)
    errors = {}
    for method in ("plain", "whitened"):
        new = LowRank(0.6, method).apply(block, BIASED, stats)  # type: ignore[arg-type]
        assert all(new.matrix(name).bias is not None for name in block.matrices())
        errors[method] = float((new(state.hidden, state.shared, 0) - exact).square().mean())
    assert errors["whitened"] < errors["plain"]


def test_a_second_time_nothing_changes_and_other_ranks_start_from_the_values() -> None:
    stack = random_stack(1)
    block, row = block_of(stack), stack.spec.rows[0]
    once = LowRank(12, "plain", ("q",)).apply(block, row)
    row = LowRank(12, "plain", ("q",)).edit(row, 64)
    assert LowRank(12, "plain", ("q",)).apply(once, row).matrix("q") is once.matrix("q")
    lower = LowRank(5, "plain", ("q",)).apply(once, row)
    b, a = factors(values(block.matrix("q")), 5, None, "plain")
    torch.testing.assert_close(values(lower.matrix("q")), (b @ a).float(), rtol=1e-4, atol=1e-5)


def test_a_packed_matrix_stays_packed() -> None:
    stack = random_stack(1)
    block, row = Quantize(8).apply(block_of(stack), stack.spec.rows[0]), Quantize(8).edit(stack.spec.rows[0], 64)
    new = LowRank(12, "plain", ("q",)).apply(block, row)
    layer = new.matrix("q")
    assert isinstance(layer, FactoredLinear)
    assert isinstance(layer.a, PackedLinear)
    assert layer.a.format == row.formats["q"]
    stored = sum(tensor.nbytes for tensor in new.state_dict().values())
    assert stored == LowRank(12, "plain", ("q",)).edit(row, 64).bytes(64, "float32")


# bad input ----------------------------------------------------------------------------------------


def test_text_too_short_for_the_rank_is_said_in_numbers() -> None:
    weight, gram = problem(40, 40, samples=9)
    factors(weight, 9, gram.float())
    with pytest.raises(BadData, match=r"span 9 directions, for rank 10"):
        factors(weight, 10, gram.float())
    constant = torch.ones(40, 40)
    assert all(bool(part.isfinite().all()) for part in factors(weight, 1, constant))
    with pytest.raises(BadData, match=r"span 1 directions, for rank 2"):
        factors(weight, 2, constant)


@pytest.mark.parametrize("method", ["whitened", "utilized"])
def test_inputs_that_are_never_active_leave_the_plain_directions(method: Method) -> None:
    weight_OI = problem(20, 30)[0]
    found, plain = (factors(weight_OI, 5, gram_II, way) for gram_II, way in (
        (torch.zeros(30, 30), method), (None, "plain")))
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


def test_carried_out_in_a_plan_the_layer_is_named() -> None:
    stack = random_stack(3)
    plan = lw.Plan(stack.spec.fingerprint(), 3, (Edit(2, "low-rank", {"rank": 12, "matrices": ("o",)}),))
    tokens_NT = torch.arange(8)[None]
    text = TextData(tokens_NT, "short", Source("short", None, "", 8, (0,)))
    with pytest.raises(BadData, match="layer 2: calibration inputs of matrix 'o' that span 8 directions, for rank 12"):
        lw.apply(stack, plan, text)


def test_a_singular_gram_of_enough_directions_is_fine() -> None:
    weight, gram = problem(20, 50, samples=25)
    gram[3], gram[:, 3] = 0, 0
    b, a = factors(weight, 12, gram.float())
    least = torch.linalg.eigvalsh(weight @ gram @ weight.T)[:-12].clamp(min=0).sum()
    assert error(weight, b @ a, gram) == pytest.approx(float(least), rel=1e-3)


def test_weights_of_low_rank_are_no_fault_of_the_data() -> None:
    weight, gram = problem(30, 30)
    flat = weight[:, :2] @ weight[:2]
    b, a = factors(flat, 9, gram.float())
    assert error(flat, b @ a, gram) < 1e-9 * error(flat, 0 * flat, gram)


def test_rank_counts_directions_whatever_their_scales() -> None:
    gram = problem(1, 40, samples=17)[1].float()
    scale = torch.logspace(-4, 4, 40)
    assert gram_rank(gram) == gram_rank(gram * torch.outer(scale, scale)) == 17


def test_refusals() -> None:
    stack = random_stack(1)
    row, block = stack.spec.rows[0], block_of(stack)
    with pytest.raises(BadOption, match=r"rank 32 for the matrix 'q', 64 x 64") as caught:
        LowRank(32).edit(row, 64)
    assert "at most 31" in caught.value.expected
    for rank in (0, 1.0, -0.5, 1.5):
        with pytest.raises(BadOption, match="rank="):
            LowRank(rank)
    with pytest.raises(BadOption, match="method='svd'"):
        LowRank(0.5, "svd")  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="qkv"):
        LowRank(0.5, matrices=("qkv",))
    with pytest.raises(BadOption, match="conv1"):
        LowRank(0.5).edit(LayerSpec(Opaque("conv1", "Conv2d", 1, 4), None), 64)
    experts = replace(row, feed_forward=FeedForward(16, experts=3, experts_per_token=1))
    with pytest.raises(BadOption, match="experts"):
        LowRank(0.5).edit(experts, 64)
    assert set(LowRank(0.5, matrices=("q", "o")).edit(experts, 64).ranks) == {"q", "o"}
    with pytest.raises(BadData, match="matrix 'q' without statistics"):
        LowRank(0.5).apply(block, row)
    with pytest.raises(BadModel, match="matrix 'q'"):
        LowRank(0.5, "plain").apply(block.with_matrices({"q": _broken()}), row)
    with pytest.raises(BadData, match="Gram matrix of shape"):
        factors(torch.ones(4, 4), 1, torch.full((4, 4), float("nan")))


def _broken() -> torch.nn.Linear:
    layer = torch.nn.Linear(64, 64, bias=False)
    torch.nn.init.constant_(layer.weight, float("nan"))
    return layer
