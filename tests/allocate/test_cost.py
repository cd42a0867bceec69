"""Costs of parts add up to the model, exactly."""

from dataclasses import replace

import pytest

from layerwise.allocate.cost import Clocks, rest_cost, row_cost, table_cost, tables, totals
from layerwise.spec import Format, LayerSpec, Opaque, StackSpec
from tests.allocate.tables import ROW, spec


class SlowClock:
    """One millisecond per feed-forward unit of width, ten for the outside."""

    def row(self, row: LayerSpec) -> float:
        return float(row.feed_forward.width) if row.feed_forward else 0.0

    def outside(self, spec: StackSpec) -> float:
        return 10.0


def packed(row: LayerSpec, bits: int) -> LayerSpec:
    return replace(row, formats=dict.fromkeys(row.matrices(64), Format(bits, 32)))


@pytest.mark.parametrize("model", [
    spec(), spec(tied=False),
    replace(spec(), rows=(ROW, packed(ROW, 4), replace(ROW, mixer=None)), embedding_format=Format(8)),
    replace(spec(), learned_positions=10, dtype="float32"),
    StackSpec("module", 8, 0, (LayerSpec(Opaque("a.0", "B", 10, 40), None),) * 2,
              outside=Opaque("", "N", 5, 20)),
], ids=["tied", "untied", "packed", "positions", "module"])
def test_parts_add_up(model: StackSpec) -> None:
    total = totals(model)
    assert total["bytes"] == model.bytes()
    assert total["parameters"] == model.parameters()
    assert total["layers"] == len(model.rows)
    assert total["bits"] == pytest.approx(8 * model.bytes() / model.parameters())


def test_a_dense_bfloat16_model_has_16_bits() -> None:
    assert totals(spec())["bits"] == pytest.approx(16)


def test_a_dropped_layer_costs_nothing() -> None:
    assert set(row_cost(None, spec(), SlowClock()).values()) == {0.0}


def test_a_clock_of_prefill_adds_a_currency() -> None:
    both = Clocks(SlowClock(), SlowClock())
    for tied in (True, False):
        total = totals(spec(tied=tied), both)
        assert total["prefill"] == total["milliseconds"] == 4 * 128 + 10
    assert "prefill" not in totals(spec(), SlowClock())
    assert "prefill" in row_cost(None, spec(), both)


def test_the_table_that_makes_the_logits_takes_the_time() -> None:
    assert table_cost("embedding", spec(), SlowClock())["milliseconds"] == 10
    assert table_cost("embedding", spec(tied=False), SlowClock())["milliseconds"] == 0
    assert table_cost("head", spec(tied=False), SlowClock())["milliseconds"] == 10
    for tied in (True, False):
        assert totals(spec(tied=tied), SlowClock())["milliseconds"] == 4 * 128 + 10


def test_the_rest_is_the_final_norm() -> None:
    assert rest_cost(spec())["parameters"] == 64
    assert rest_cost(spec())["bytes"] == 128


def test_tables() -> None:
    assert tables(spec()) == ("embedding",)
    assert tables(spec(tied=False)) == ("embedding", "head")
    assert tables(StackSpec("module", 8, 0, ())) == ()
