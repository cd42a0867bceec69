"""The state space: its recurrence, its chunks, what it keeps, and how its matrices are stored."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.errors import BadOption
from layerwise.io.weights import expected_tensors
from layerwise.nets.decoder import Decoder
from layerwise.nets.flow import Flow, StateCache
from layerwise.nets.initial import initial
from layerwise.nets.state_space import StateSpace as Module
from layerwise.nets.state_space import scan
from layerwise.spec import Attention, FeedForward, Format, LayerSpec, Norm, StackSpec, StateSpace

MIXER = StateSpace(heads=6, head_dim=4, state=5, groups=2, conv=3)
HIDDEN = 16


def inputs(tokens: int, batch: int = 2) -> tuple[Tensor, ...]:
    """x, time steps, decay, write, read and a state, in float64."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (draw(batch, tokens, 6, 4), draw(batch, tokens, 6).exp(), -draw(6).exp(), draw(batch, tokens, 2, 5),
            draw(batch, tokens, 2, 5), draw(batch, 6, 4, 5))


def loop(x: Tensor, dt: Tensor, decay: Tensor, write: Tensor, read: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, head by head, in float64."""
    y = torch.zeros_like(x)
    state = state.clone()
    for row in range(x.shape[0]):
        for token in range(x.shape[1]):
            for head in range(x.shape[2]):
                group = head // 3
                step = dt[row, token, head]
                state[row, head] *= torch.exp(step * decay[head])
                state[row, head] += step * torch.outer(x[row, token, head], write[row, token, group])
                y[row, token, head] = state[row, head] @ read[row, token, group]
    return y, state


def module(mixer: StateSpace = MIXER) -> Module:
    generator = torch.Generator().manual_seed(3)
    made = Module(mixer, HIDDEN, Norm())
    for name, weight in made.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = initial(name, weight, 0.0, generator) + 0.3 * noise * (weight.dim() == 1)
    return made.requires_grad_(False)


def hidden(batch: int, tokens: int) -> Tensor:
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(7))


def flow(start: int, stop: int, batch: int, caches: dict[int, Any] | None = None,
         valid: Tensor | None = None) -> Flow:
    return Flow(torch.arange(start, stop).expand(batch, -1), valid, caches, past=start)


def test_without_decay_and_steps_of_one_the_state_is_a_sum_of_outer_products() -> None:
    x, _, _, write, read, state = inputs(7)
    y, last = scan(x, torch.ones(2, 7, 6).double(), torch.zeros(6).double(), write, read, torch.zeros_like(state))
    whole = torch.einsum("bthp,bthn->bhpn", x, write.repeat_interleave(3, 2))
    torch.testing.assert_close(last, whole)
    torch.testing.assert_close(y[:, -1], torch.einsum("bhpn,bhn->bhp", whole, read[:, -1].repeat_interleave(3, 1)))


def test_a_step_of_zero_leaves_the_state_as_it_is() -> None:
    x, dt, decay, write, read, state = inputs(5)
    torch.testing.assert_close(scan(x, torch.zeros_like(dt), decay, write, read, state)[1], state)


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9, 20])
def test_chunks_equal_the_loop(tokens: int) -> None:
    given = inputs(tokens)
    for found, expected in zip(scan(*given, chunk=8), loop(*given), strict=True):
        torch.testing.assert_close(found, expected)


def test_strong_decay_over_a_long_chunk_stays_finite() -> None:
    x, dt, decay, write, read, state = (value.float() for value in inputs(200))
    y, last = scan(x, dt * 100, decay * 100, write, read, state)
    assert bool(y.isfinite().all()) and bool(last.isfinite().all())


def test_gradients_are_those_of_the_loop() -> None:
    given = [value.requires_grad_() for value in inputs(11)]
    scan(*given, chunk=4)[0].square().sum().backward()
    found = [value.grad.clone() for value in given if value.grad is not None]
    for value in given:
        value.grad = None
    step = [given[5]]
    outputs = []
    for token in range(11):  # one token at a time through the step, which the loop above has checked
        y, state = scan(*(v[:, token : token + 1] for v in given[:2]), given[2],
                        *(v[:, token : token + 1] for v in given[3:5]), step[-1])
        step.append(state)
        outputs.append(y)
    torch.cat(outputs, 1).square().sum().backward()
    for value, expected in zip(given, found, strict=True):
        assert value.grad is not None
        torch.testing.assert_close(value.grad, expected)


@pytest.mark.parametrize("cuts", [[3], [1, 2, 3], [1], [4, 8], [2, 3, 9]])
def test_pieces_equal_the_whole(cuts: list[int]) -> None:
    caches: dict[int, Any] = {}
    made, x_BTC = module(), hidden(2, 10)
    places = [0, *cuts, 10]
    found = [made(x_BTC[:, a:b], flow(a, b, 2, caches), 0) for a, b in pairwise(places)]
    torch.testing.assert_close(torch.cat(found, 1), made(x_BTC, flow(0, 10, 2), 0), rtol=0, atol=1e-5)
    assert caches[0].length == 10


def test_padding_anywhere_is_passed_by() -> None:
    caches: dict[int, Any] = {}
    made, x_BTC = module(), hidden(3, 12)
    valid_BT = torch.ones(3, 12, dtype=torch.bool)
    valid_BT[0, 2:5] = valid_BT[1, 0:3] = valid_BT[2, 5:9] = False
    found = torch.cat([made(x_BTC[:, a:b], flow(a, b, 3, caches, valid_BT[:, :b]), 0)
                       for a, b in ((0, 1), (1, 7), (7, 8), (8, 12))], 1)
    for row in range(3):
        alone = made(x_BTC[row, valid_BT[row]][None], flow(0, int(valid_BT[row].sum()), 1), 0)[0]
        torch.testing.assert_close(found[row, valid_BT[row]], alone, rtol=0, atol=1e-5)


def test_a_copied_cache_goes_on_by_itself() -> None:
    caches: dict[int, Any] = {}
    made, x_BTC = module(), hidden(2, 6)
    made(x_BTC[:, :4], flow(0, 4, 2, caches), 0)
    twice = {0: caches[0].copied(3)}
    found = made(x_BTC[:, 4:].repeat_interleave(3, 0), flow(4, 6, 6, twice), 0)
    assert caches[0].length == 4 and twice[0].length == 6
    again = made(x_BTC[:, 4:], flow(4, 6, 2, {0: caches[0].copied()}), 0)
    assert torch.equal(again, made(x_BTC[:, 4:], flow(4, 6, 2, caches), 0))
    torch.testing.assert_close(found, again.repeat_interleave(3, 0), rtol=0, atol=1e-5)


def test_the_state_is_float32_in_half_precision() -> None:
    caches: dict[int, Any] = {}
    made = module().to(torch.bfloat16)
    y_BTC = made(hidden(1, 4).bfloat16(), flow(0, 4, 1, caches), 0)
    kept = caches[0].kept
    assert isinstance(caches[0], StateCache) and kept is not None
    assert (y_BTC.dtype, kept[0].dtype, kept[1].dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert sum(part.nbytes for part in kept) == MIXER.state_bytes("bfloat16")


def stack(**row: Any) -> StackSpec:
    rows = (LayerSpec(MIXER, None), LayerSpec(Attention(2, 1, 8), FeedForward(24)), LayerSpec(MIXER, FeedForward(24)))
    return StackSpec("bamba", HIDDEN, 50, tuple(replace(r, **row) if r.mixer == MIXER else r for r in rows))


@pytest.mark.parametrize("row", [
    {}, {"formats": {"in_proj": Format(4, 8), "out_proj": Format(8)}}, {"ranks": {"in_proj": 3, "out_proj": 2}},
    {"ranks": {"in_proj": 3}, "formats": {"in_proj": Format(8)}}, {"mixer": replace(MIXER, bias=True, conv_bias=False)},
    {"post_norm": True},
])
def test_sizes_are_those_of_what_is_stored(row: dict[str, Any]) -> None:
    spec = stack(**row)
    stored = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in expected_tensors(spec).values()]
    assert spec.bytes() == sum(tensor.nbytes for tensor in stored)
    if not spec.packed():
        assert spec.parameters() == sum(weight.numel() for weight in Decoder(spec).parameters())


def test_rows_survive_json_and_say_what_they_are() -> None:
    spec = stack(ranks={"in_proj": 3})
    assert StackSpec.from_json(spec.to_json()) == spec
    assert "state space 6x4x5, no feed-forward, rank 3 in_proj" in str(spec)
    changed = spec.with_rows({0: LayerSpec(replace(MIXER, state=7), None)})
    assert "rows[0].mixer.state: 5 -> 7" in spec.diff(changed)


@pytest.mark.parametrize("change", [{"groups": 4}, {"groups": 0}, {"conv": 1}])
def test_rows_that_cannot_be_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(BadOption):
        replace(MIXER, **change)
