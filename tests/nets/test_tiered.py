"""A token table in two formats computes what its rows say, wherever they lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layerwise.errors import BadData, BadModel, BadOption
from layerwise.io.save import save
from layerwise.io.source import read
from layerwise.nets.tiered import TieredEmbedding
from layerwise.spec import Format, StackSpec, Tiers, parse_table_format
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.prepared import prepared
from layerwise.testing.stacks import random_stack
from layerwise.transform.quantize import Method, pack_table, values

FORMATS = [Tiers(10, Format(8, 0, True), Format(3, 32)), Tiers(40, Format(6, 32), Format(4, 32))]
ORDER_V = torch.randperm(97, generator=torch.Generator().manual_seed(3))
TOKENS = torch.tensor([[0, 5, 96], [40, 5, 33]])


def table(format: Tiers, method: Method = "search", dtype: str = "float32") -> tuple[DecoderStack, TieredEmbedding]:
    stack = random_stack(dtype=dtype)
    packed = pack_table(values(stack.decoder.embedding), format, method, order_V=ORDER_V)
    assert isinstance(packed, TieredEmbedding)
    return stack.with_tables(replace(stack.spec, embedding_format=format), embedding=packed), packed


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_those_of_either_format(format: Tiers) -> None:
    _, packed = table(format)
    dense_VC, weight_VC = packed.dense(), values(random_stack().decoder.embedding)
    for one, tokens in ((format.frequent, ORDER_V[: format.rows]), (format.rare, ORDER_V[format.rows :])):
        assert torch.equal(dense_VC[tokens], pack_table(weight_VC[tokens], one, "search").dense())
    assert torch.equal(packed(TOKENS), dense_VC[TOKENS])
    assert packed(TOKENS[:0]).shape == (0, 3, 64)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(packed.logits(x), x @ dense_VC.T, rtol=1e-4, atol=1e-4)


def test_frequent_rows_err_less() -> None:
    _, packed = table(FORMATS[0])
    error_V = (packed.dense() - values(random_stack().decoder.embedding)).square().sum(1)
    assert error_V[ORDER_V[:10]].max() < 0.1 * error_V[ORDER_V[10:]].min()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prepared_stack_gives_the_same_logits(format: Tiers, dtype: str) -> None:
    stack, _ = table(format, dtype=dtype)
    with torch.inference_mode():
        expected, found = stack(TOKENS), prepared(stack)(TOKENS)
    atol = float(expected.float().std()) * (0.1 if dtype == "bfloat16" else 1e-4)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol, check_dtype=False)


@pytest.mark.parametrize("rows", [1, 10, 96])
def test_what_is_saved_opens_again(rows: int, tmp_path: Path) -> None:
    stack, _ = table(Tiers(rows, Format(8, 0, True), Format(4, 32)))
    save(tmp_path / "m", stack.spec, stack.tensors())
    source = read(tmp_path / "m")
    assert source.spec == stack.spec == StackSpec.from_json(stack.spec.to_json())
    assert sum(tensor.nbytes for _, tensor in source.weights.stream()) == stack.spec.bytes()
    from layerwise.stack.open import open

    again = open(tmp_path / "m")
    assert torch.equal(again(TOKENS), stack(TOKENS))


def test_tokens_without_a_row_of_their_own_are_refused() -> None:
    _, packed = table(FORMATS[0])
    state = packed.state_dict()
    for place in (torch.zeros(97), torch.arange(97) + 1):
        with pytest.raises(BadModel, match="row each"):
            packed.load_state_dict(state | {"place": place.int()})


def test_some_tokens_must_be_rare() -> None:
    with pytest.raises(BadOption, match="97 frequent ones of 97"):
        table(replace(FORMATS[0], rows=97))
    with pytest.raises(BadOption, match="with 0 rows"):
        replace(FORMATS[0], rows=0)


def test_frequency_must_be_known() -> None:
    with pytest.raises(BadData, match=r"8/row=@10\+3/32 without text"):
        pack_table(torch.randn(97, 64), FORMATS[0])


@pytest.mark.parametrize("format", [*FORMATS, Format(4, 128), Format(8, 0, True)])
def test_labels_are_read_back(format: Tiers | Format) -> None:
    assert parse_table_format(format.label) == format
