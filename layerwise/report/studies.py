"""Charts of studies over depth, for the page of a profile and for notebooks: maps, curves with bands, flows.

Shapes: L layers or depths, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from layerwise.report.charts import AFTER, BEFORE, plain

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from layerwise.measure.scores import Scores

COLOURS = (AFTER, "#d9480f", "#2b8a3e", "#8a63d2", "#c2255c", "#7a6a00")
CURVES = {"intrinsic-dimension": "two nearest neighbours", "participation-ratio": "participation ratio"}
FEW = 16
"""Layers up to which every one has its mark on an axis."""
ENERGY = {"prompt": ("reading a prompt", AFTER), "decode": ("writing one token", BEFORE)}

Values = Sequence[float]


def heat_chart(values_LT: Sequence[Values], positions: Sequence[str] | None = None, *, unit: str = "effect",
               rows: str = "layer", columns: str = "position", centred: bool = False) -> Figure:
    """An intervention at every layer and position: erasure, causal tracing, attribution, skip effects.

    `positions` are names, such as the tokens themselves. `centred` gives values below zero another colour.
    """
    from plotly.graph_objects import Figure

    names = [str(place) for place in range(len(values_LT[0]))] if positions is None else list(positions)
    most = max((abs(value) for row in values_LT for value in row if value == value), default=1.0)
    figure = Figure()
    figure.add_heatmap(
        z=[list(row) for row in values_LT],
        zmin=-most if centred else 0,
        zmax=most,
        colorscale="RdBu" if centred else "Blues",
        colorbar={"title": {"text": unit}, "thickness": 12},
        customdata=[names] * len(values_LT),
        hovertemplate=f"{rows} %{{y}}, {columns} %{{x}} %{{customdata}}: %{{z:.4g}}<extra></extra>",
    )
    ticks = {"tickvals": list(range(len(names))), "ticktext": names} if positions is not None else {}
    figure.update_xaxes(title_text=columns, showgrid=False, **ticks)
    figure.update_yaxes(title_text=rows, showgrid=False)
    return plain(figure, 160 + 14 * max(len(values_LT), 12))


def curves_chart(curves: Mapping[str, Values], unit: str, *, bands: Mapping[str, tuple[Values, Values]] | None = None,
                 depths: Sequence[int] | None = None) -> Figure:
    """Curves over depth by name, and the band between lower and upper values for those that have one."""
    from plotly.graph_objects import Figure

    figure = Figure()
    for place, (name, values) in enumerate(curves.items()):
        colour = COLOURS[place % len(COLOURS)]
        x = list(range(len(values)) if depths is None else depths)
        if bands and name in bands:
            low, high = bands[name]
            figure.add_scatter(x=[*x, *x[::-1]], y=[*high, *list(low)[::-1]], fill="toself", fillcolor=colour,
                               opacity=0.18, line={"width": 0}, hoverinfo="skip", showlegend=False, name=name)
        figure.add_scatter(x=x, y=list(values), name=name, mode="lines+markers", line={"color": colour},
                           hovertemplate=f"layer %{{x}}, {name}: %{{y:.4g}} {unit}<extra></extra>")
    longest = max((len(values) for values in curves.values()), default=0)
    figure.update_xaxes(title_text="layer", dtick=1 if longest <= FEW else None)
    figure.update_yaxes(title_text=unit, zeroline=True, exponentformat="power")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    return plain(figure, 360)


def flow_chart(changes: Mapping[str, Values], *, bands: Mapping[str, tuple[Values, Values]] | None = None) -> Figure:
    """What cutting each flow between groups of positions (image -> question, ...) does in a window around each layer.

    Values are changes of the answer's probability in percent, as `measure.trace.change` gives them.
    """
    figure = curves_chart(changes, "% change of the answer's probability", bands=bands)
    figure.add_hline(y=0, line_dash="dot", line_color=BEFORE)
    figure.update_xaxes(title_text="layer in the middle of the cut")
    return figure


def manifold_chart(scores: Scores) -> Figure:
    """Dimensions of the cloud of states over depth, by both estimates; on a logarithmic axis, as they differ much."""
    curves = {name: scores[f"manifold:{part}"].values for part, name in CURVES.items()}
    figure = curves_chart(curves, "dimensions")
    figure.update_yaxes(type="log")
    return figure


def energy_chart(scores: Scores) -> Figure:
    """Modelled energy of every layer, for a token of a prompt and for one token written."""
    from plotly.graph_objects import Figure

    figure = Figure()
    for part, (name, colour) in ENERGY.items():
        if f"energy:{part}" not in scores:
            continue
        column = scores[f"energy:{part}"]
        figure.add_bar(x=[str(layer) for layer in range(len(column.values))], y=list(column.values), name=name,
                       marker_color=colour,
                       hovertemplate=f"layer %{{x}}, {name}: %{{y:.4g}} {column.unit}<extra></extra>")
    figure.update_xaxes(title_text="layer", type="category")
    unit = scores["energy:prompt"].unit if scores.spec.vocabulary else "mJ/place"
    figure.update_yaxes(title_text=f"{unit}, modelled", rangemode="tozero", exponentformat="power")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}, barmode="group")
    return plain(figure, 340)
