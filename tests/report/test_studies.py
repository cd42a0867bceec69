"""Charts of studies hold the numbers they were given."""

from __future__ import annotations

import math

import pytest
import torch

from layerwise.measure.engine import measure
from layerwise.report.html import profile_page
from layerwise.report.studies import curves_chart, energy_chart, flow_chart, heat_chart, manifold_chart
from layerwise.testing.stacks import random_stack


def test_an_intervention_is_a_map_of_layers_by_positions() -> None:
    figure = heat_chart([[0.0, 1.0], [0.5, 0.25], [math.nan, 2.0]], ["the", " cat"])
    assert len(figure.data[0].z) == 3 and figure.data[0].zmax == 2.0 and figure.data[0].zmin == 0
    assert list(figure.layout.xaxis.ticktext) == ["the", " cat"]


def test_signed_values_are_centred() -> None:
    figure = heat_chart([[-3.0, 1.0]], centred=True)
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-3.0, 3.0)


def test_curves_have_bands_where_they_are_given() -> None:
    bands = {"a": ([0.0, 1.0], [2.0, 3.0])}
    figure = curves_chart({"a": [1.0, 2.0], "b": [2.0, 1.0]}, "nats", bands=bands, depths=[0, 5])
    band, line, other = figure.data
    assert band.fill == "toself" and list(band.y) == [2.0, 3.0, 1.0, 0.0]
    assert list(line.x) == [0, 5] and list(other.y) == [2.0, 1.0]


def test_flows_are_changes_around_zero() -> None:
    figure = flow_chart({"image -> question": [-60.0, -21.0], "question -> last": [-5.0, -30.0]})
    assert [trace.name for trace in figure.data] == ["image -> question", "question -> last"]
    assert figure.layout.shapes[0].y0 == 0


@pytest.fixture(scope="module")
def page() -> tuple[str, object]:
    scores = measure(random_stack(), torch.randint(97, (3, 20)), ["energy", "manifold"], progress=False)
    return profile_page(scores, "tiny"), scores


def test_energy_and_dimensions_are_on_the_page_of_a_profile(page: tuple[str, object]) -> None:
    text, scores = page
    for name, chart in (("energy", energy_chart), ("manifold", manifold_chart)):
        assert f'data-figure="{name}"' in text
        assert len(chart(scores).data) == 2  # type: ignore[operator]
    assert "By a model of energy" in text
