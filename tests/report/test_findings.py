"""Sentences follow from the columns, and what rests on a contradiction says so."""

import math
from dataclasses import replace

import pytest

from layerwise.measure.scores import Column, Scores
from layerwise.report.findings import findings, rank_correlation
from layerwise.report.html import profile_page
from layerwise.spec import LayerSpec, StateSpace
from layerwise.testing.stacks import random_stack

LAYERS = 8


def column(name: str, values: list[float], important: str | None = "high") -> Column:
    return Column(name, tuple(values), "nats", important, "made up")  # type: ignore[arg-type]


def scores(*columns: Column) -> Scores:
    return Scores(random_stack(LAYERS).spec, {column.name: column for column in columns})


RISING = [float(layer) for layer in range(LAYERS)]


def test_a_measured_column_comes_first_and_is_sure() -> None:
    first = findings(scores(column("block-influence", RISING[::-1]), column("leave-one-out", RISING)))[0]
    assert first.sure and "layers 5, 6 and 7 carry" in first.text and "layers 0, 1 and 2 could go" in first.text


@pytest.mark.parametrize(("count", "said"), [
    (2, "layer 1 carries most of the model, and layer 0 could go first"),
    (5, "layers 3 and 4 carry most of the model, and layers 0 and 1 could go first")])
def test_few_layers_are_ranked_too(count: int, said: str) -> None:
    few = Scores(random_stack(count).spec, {"leave-one-out": column("leave-one-out", RISING[:count])})
    assert said in findings(few)[0].text
    alone = Scores(random_stack(1).spec, {"leave-one-out": column("leave-one-out", RISING[:1])})
    assert not any("could go" in finding.text for finding in findings(alone))


def test_where_no_layer_can_be_taken_away_that_is_said_and_another_instrument_ranks() -> None:
    run = {"merged": [{"instruments": [{"name": "taylor"}]}, {"instruments": [{"name": "skip-effect"}]}]}
    first, second = findings(replace(scores(column("taylor", RISING)), provenance=run))[:2]
    assert first.sure and "No layer can be taken away" in first.text
    assert not second.sure and "By taylor, which does not try it, layers 5, 6 and 7 carry" in second.text


def test_layers_that_only_do_harm_carry_nothing() -> None:
    first = findings(scores(column("leave-one-out", [-value for value in RISING]), column("zd", RISING)))[0]
    assert not first.sure and "none of them helps" in first.text


def test_layers_of_a_module_that_cannot_be_taken_away_are_named() -> None:
    spec = replace(random_stack(LAYERS).spec, vocabulary=0)
    tried = column("leave-one-out", [*RISING[:5], math.nan, 6.0, math.nan])
    found = findings(Scores(spec, {tried.name: tried}))
    assert "layers 3, 4 and 6 carry" in found[0].text and "known of layers 5 and 7" in found[1].text


def test_layers_that_suffer_most_are_not_those_that_suffer_least() -> None:
    narrow = column("quantization-sensitivity:2", RISING[:4])
    texts = [f.text for f in findings(Scores(random_stack(4).spec, {narrow.name: narrow}))]
    assert "In 2 bits layers 2 and 3 suffer most, layers 0 and 1 least." in texts


def test_instruments_that_contradict_are_uncertain() -> None:
    found = findings(scores(column("leave-one-out", RISING), column("zd", RISING[::-1]), column("lim", RISING)))
    doubt = next(finding for finding in found if not finding.sure)
    assert "1 of 2" in doubt.text and "zd -1.00" in doubt.text
    agreed = findings(scores(column("leave-one-out", RISING), column("zd", RISING[::-1], "low")))
    assert all(finding.sure for finding in agreed)


def test_where_the_prediction_forms() -> None:
    overlap = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9]
    texts = " ".join(finding.text for finding in findings(scores(column("logit-lens-overlap", overlap, "low"))))
    assert "takes shape at layer 4 of 8" in texts
    late = " ".join(f.text for f in findings(scores(column("logit-lens-overlap", [0.1] * LAYERS, "low"))))
    assert "forms in the last layer" in late


def test_bytes_add_up_to_the_whole() -> None:
    spec = random_stack(LAYERS).spec
    parts = sum(sum(row.matrix_bytes(spec.hidden, spec.dtype).values()) for row in spec.rows)
    vectors = sum(row.bytes(spec.hidden, spec.dtype) for row in spec.rows) - parts
    assert 0 < vectors < 0.05 * parts
    assert any("feed-forward halves" in finding.text for finding in findings(scores()))


def test_state_spaces_are_neither_attention_nor_feed_forward() -> None:
    row = LayerSpec(StateSpace(heads=2, head_dim=4, state=4, groups=1), None)
    spec = replace(random_stack(LAYERS).spec, rows=(row,) * LAYERS)
    contributions = [column("relative-contribution:attention", RISING),
                     column("relative-contribution:feed-forward", [0.0] * LAYERS)]
    found = " ".join(f.text for f in findings(Scores(spec, {c.name: c for c in contributions})))
    assert "the state spaces" in found
    assert "feed-forward halves" not in found and "What the context says" not in found


def test_a_slow_layer_is_named() -> None:
    times = [1.0] * LAYERS
    times[3] = 5.0
    texts = " ".join(finding.text for finding in findings(scores(column("cost:prefill-ms", times, None))))
    assert "layer 3 takes 5.00 ms" in texts


@pytest.mark.parametrize("values", [[math.nan] * 4, [1.0] * 4, [1.0, 2.0, math.nan, math.nan]])
def test_no_correlation_of_what_is_constant_or_unknown(values: list[float]) -> None:
    assert math.isnan(rank_correlation(values, [1.0, 2.0, 3.0, 4.0]))


def test_the_page_holds_words_charts_and_numbers() -> None:
    attained = [column(f"roofline:{name}", [0.5] * LAYERS, None)
                for name in ("intensity", "attained", "decode-intensity", "decode-attained")]
    text = profile_page(scores(column("leave-one-out", RISING), *attained), "made up")
    assert "carry most of the model" in text and 'data-figure="roofline"' in text and 'data-figure="map"' in text
    assert "http://" not in text.split("<script")[0]


def test_where_each_half_writes_most_is_an_uncertain_reading() -> None:
    found = findings(scores(column("relative-contribution:attention", RISING[::-1], None),
                            column("relative-contribution:feed-forward", RISING, None)))
    said = next(finding for finding in found if "What the context says" in finding.text)
    assert not said.sure and "layers 1, 2 and 3 (attention)" in said.text
    assert "layers 5, 6 and 7 (feed-forward)" in said.text


def test_energy_is_called_modelled_and_its_largest_layer_named() -> None:
    values = [1.0] * LAYERS
    values[2] = 3.0
    found = findings(scores(column("energy:prompt", values, None), column("energy:decode", values, None)))
    said = next(finding for finding in found if "model of energy" in finding.text)
    assert not said.sure and "layer 2 takes 30%" in said.text and "10 mJ" in said.text


def facts(**kinds: list[float]) -> Scores:
    made = scores(*(column(f"knowledge:{kind}", values, None) for kind, values in kinds.items()))
    return replace(made, provenance={"knowledge": {kind: 0.4 if kind != "symbol" else 0.01 for kind in kinds}})


def test_facts_are_told_by_kind_and_hardly_known_ones_are_uncertain() -> None:
    found = findings(facts(capital=RISING, symbol=RISING[::-1]))
    first, poor, apart = (finding for finding in found if "acts" in finding.text or "hardly" in finding.text)
    assert first.sure and "capital layers 5, 6 and 7 (7 nats at layer 7, chance of the answer 40%)" in first.text
    assert not poor.sure and "hardly knows symbol" in poor.text
    assert apart.sure and "-1.00: which layers hold what depends on the kind" in apart.text
    page = profile_page(facts(capital=RISING, language=RISING), "made up")
    assert 'data-figure="knowledge"' in page and "no kind has layers of its own" in page


def test_a_module_without_labels_is_judged_by_its_output() -> None:
    first = findings(scores(column("block-influence", RISING[::-1]), column("skip-effect", RISING)))[0]
    assert first.sure and "layers 5, 6 and 7 carry" in first.text


def test_facts_of_a_model_without_feed_forward_halves_are_not_drawn() -> None:
    nowhere = [float("nan")] * LAYERS
    bare = facts(capital=nowhere, language=nowhere)
    said = [finding.text for finding in findings(bare) if "facts" in finding.text]
    page = profile_page(bare, "made up")
    assert len(said) == 1 and "no layer has one" in said[0] and said[0] in page
    assert 'data-figure="knowledge"' not in page and "Where facts of each kind" not in page


def test_kinds_without_a_value_are_left_out_of_the_map_of_facts() -> None:
    page = profile_page(facts(capital=RISING, language=[float("nan")] * LAYERS), "made up")
    assert 'data-figure="knowledge"' in page and "no layer has one" not in page


def test_from_where_on_the_answer_is_settled() -> None:
    rising = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9]
    texts = " ".join(finding.text for finding in findings(scores(column("tuned-lens:settled", rising, None))))
    assert "no longer changes from the input of layer 4 of 8 on" in texts
    late = " ".join(f.text for f in findings(scores(column("tuned-lens:settled", [0.1] * LAYERS, None))))
    assert "no longer changes only in the last layer" in late
