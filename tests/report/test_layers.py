"""What each layer got, read off two tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from layerwise.report.layers import layer_changes, runs
from layerwise.spec import Attention, Format, Opaque, StackSpec, Tiers

KEPT = [0, 1, 2, 3, 4, 6, 7]


def test_every_row_and_table_is_told_once(before_spec: StackSpec, after_spec: StackSpec) -> None:
    changes = layer_changes(before_spec, after_spec, KEPT)
    assert [change.layer for change in changes] == [*range(8), "embedding"]
    assert [change.got for change in changes] == [
        *["8 bits"] * 3,
        *["8 bits: q k v o; 4 bits: gate up down"] * 2,
        "dropped",
        "no attention, 4 bits",
        "8 bits: q k v o; 4 bits: gate up down",
        "8 bits",
    ]


def test_bits_are_zero_where_a_matrix_is_gone(before_spec: StackSpec, after_spec: StackSpec) -> None:
    changes = layer_changes(before_spec, after_spec, KEPT)
    assert set(changes[5].bits.values()) == {0.0}
    assert changes[6].bits == {"q": 0.0, "k": 0.0, "v": 0.0, "o": 0.0, "gate": 4.0, "up": 4.0, "down": 4.0}


def test_bytes_add_up_to_the_tables(before_spec: StackSpec, after_spec: StackSpec) -> None:
    changes = layer_changes(before_spec, after_spec, KEPT)
    norm = before_spec.hidden * 2
    assert sum(change.bytes_before for change in changes) + norm == before_spec.bytes()
    assert sum(change.bytes_after for change in changes) + norm == after_spec.bytes()


def test_a_table_whose_rows_differ(before_spec: StackSpec) -> None:
    tiers = Tiers(1000, Format(8, 0, True), Format(3, 32))
    change = layer_changes(before_spec, replace(before_spec, embedding_format=tiers))[-1]
    assert change.got == "8 bits for 1,000 frequent tokens, 3 bits for all others"
    assert change.bits["table"] == pytest.approx(3 + 5 * 1000 / before_spec.vocabulary)


def test_without_origins_the_last_rows_count_as_dropped(before_spec: StackSpec) -> None:
    changes = layer_changes(before_spec, before_spec.with_rows({0: None, 1: None}))
    assert [change.got for change in changes[:8]] == [*["as it was"] * 6, "dropped", "dropped"]


def test_origins_that_do_not_fit_are_refused(before_spec: StackSpec, after_spec: StackSpec) -> None:
    with pytest.raises(ValueError, match="zip"):
        layer_changes(before_spec, after_spec, [0, 1])


def test_runs_merge_neighbours_but_not_what_is_outside(before_spec: StackSpec, after_spec: StackSpec) -> None:
    spans = [span for span, _ in runs(layer_changes(before_spec, after_spec, KEPT))]
    assert spans == ["0-2", "3-4", "5", "6", "7", "embedding"]
    same = layer_changes(before_spec, before_spec)
    assert list(runs(same)) == [("0-7", "as it was"), ("embedding", "as it was")]


def test_an_untied_head_and_opaque_rows(before_spec: StackSpec) -> None:
    untied = replace(before_spec, tied=False)
    assert [change.layer for change in layer_changes(untied, untied)][-2:] == ["embedding", "head"]
    row = replace(before_spec.rows[0], mixer=Opaque("layers.0", "Layer", 10, 40), feed_forward=None)
    module = replace(before_spec, rows=(row,) * 3, outside=Opaque("", "Net", 5, 20), vocabulary=0)
    assert [(c.layer, c.got, c.bytes_after) for c in layer_changes(module, module)] == [
        (layer, "as it was", 40) for layer in range(3)
    ]


def test_narrower_layers_and_factors_are_told(before_spec: StackSpec) -> None:
    row = before_spec.rows[0]
    assert isinstance(row.mixer, Attention)
    assert row.feed_forward is not None
    heads = row.mixer.heads // row.mixer.kv_heads
    narrow = replace(row, mixer=replace(row.mixer, heads=heads, kv_heads=1), ranks={"q": 3, "up": 5, "k": 3},
                     feed_forward=replace(row.feed_forward, width=10))
    after = before_spec.with_rows({0: narrow})
    got = layer_changes(before_spec, after)[0].got
    assert got == (f"10 of {row.feed_forward.width} channels, 1 of {row.mixer.kv_heads} key-value heads, "
                   "rank 3: q k; rank 5: up")
