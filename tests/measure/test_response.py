"""Response and output error: predicting what an alternative loses from one disturbance and one statistic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from layerwise.errors import BadData, BadOption
from layerwise.measure.engine import measure
from layerwise.measure.output_error import PROBE, OutputError
from layerwise.measure.response import Response
from layerwise.spec import Format
from layerwise.testing.stacks import random_stack
from layerwise.transform.quantize import values
from layerwise.transform.rounding import code_value, round_to_nearest


def tokens(rows: int = 4, length: int = 24) -> Tensor:
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(0))


def test_the_probe_error_is_that_of_a_plain_float64_loop() -> None:
    stack = random_stack()
    found = measure(stack, tokens(), [OutputError(("4/32",), "nearest")], progress=False)
    inputs = []
    handle = stack.block(1).feed_forward.body.down.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    stack(tokens())
    handle.remove()
    x_NI = torch.cat(inputs).flatten(0, 1).double()
    weight_OI = values(stack.block(1).matrix("down")).double()
    codes, scale, zero = round_to_nearest(weight_OI.float(), PROBE)
    assert zero is not None
    group_I = torch.arange(weight_OI.shape[1]) // PROBE.group
    stored_OI = code_value(codes.double(), scale[:, group_I].double(), zero[:, group_I].double(), PROBE.bits)
    error = float(((x_NI @ (weight_OI - stored_OI).T) ** 2).sum() / ((x_NI @ weight_OI.T) ** 2).sum())
    assert found["output-error:down:probe"].values[1] == pytest.approx(error, rel=1e-3)


def test_fewer_bits_and_larger_groups_lose_more() -> None:
    stack = random_stack()
    found = measure(stack, tokens(), [OutputError(("4/16", "3/16", "3/row", "2/16"))], progress=False)
    for matrix in stack.block(0).matrices():
        four, three, row, two = (found[f"output-error:{matrix}:{label}"].values[0]
                                 for label in ("4/16", "3/16", "3/row", "2/16"))
        assert four < three < min(row, two)


def test_response_tries_matrices_parts_and_tables() -> None:
    stack = random_stack()
    found = measure(stack, tokens(), [Response()], progress=False)
    for part in (*stack.block(0).matrices(), "drop", "drop attention", "drop feed-forward"):
        assert all(value > 0 for value in found[f"response:{part}"].values)
    table = found["response:3/64"]
    assert all(math.isnan(value) for value in table.values)
    assert table.outside["embedding"] > found["response:8/row="].outside["embedding"] >= 0


def test_a_layer_of_one_half_is_dropped_whole() -> None:
    from layerwise.allocate.apply import apply
    from layerwise.allocate.plan import Edit, Plan

    stack = random_stack()
    plan = Plan(stack.spec.fingerprint(), len(stack), (Edit(1, "drop", {"part": "attention"}),))
    found = measure(apply(stack, plan), tokens(), [Response(tables=())], progress=False)
    assert math.isnan(found["response:drop attention"].values[1])
    assert found["response:drop"].values[1] > 0


def test_formats_have_short_names() -> None:
    for format in (Format(4, 128), Format(8, 0, symmetric=True), Format(2, 32, symmetric=True)):
        assert Format.parse(format.label) == format


@pytest.mark.parametrize("label", ["4", "four/32", "4/", "7/32", "4/32*"])
def test_a_format_that_does_not_exist_is_refused(label: str) -> None:
    with pytest.raises(BadOption):
        OutputError((label,))


def test_activations_that_are_not_finite_name_the_layer_and_batch() -> None:
    stack = random_stack()
    with stack.edit(2, "output", lambda x: x * float("inf")), pytest.raises(BadData, match="layer 2, in batch 0"):
        measure(stack, tokens(), [OutputError(("4/32",), "nearest")], progress=False)
