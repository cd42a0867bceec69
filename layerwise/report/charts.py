"""The charts of a report, as plotly figures without colours of their own for text and ground.

A page adds those for light and dark; in a notebook they follow plotly's theme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layerwise.report.layers import LayerChange
from layerwise.report.report import Report
from layerwise.report.table import percent_change, size, speed

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from layerwise.measure.scores import Column, Scores

BEFORE, AFTER = "#8792a2", "#2368b0"
KINDS = {
    "plan": ("chosen plan", "star", "#d9480f", 17),
    "candidate": ("other candidates", "circle", "#2f7fd1", 10),
    "control": ("controls", "x-thin-open", "#8a63d2", 11),
    "original": ("original", "diamond", "#8792a2", 11),
}
LOG_FROM = 20.0
"""Losses that differ by this factor are shown on a logarithmic axis."""
BITS_SCALE = ((0, "#b9c0ca"), (2, "#ffe08a"), (4, "#a5d8c8"), (6, "#5fb3c6"), (8, "#3a7fc0"), (16, "#1f3a68"))


def column_chart(column: Column) -> Figure:
    """One instrument over depth: a bar per layer, and what is outside the layers beside them."""
    from plotly.graph_objects import Figure

    names = [str(layer) for layer in range(len(column.values))] + list(column.outside)
    values = [*column.values, *column.outside.values()]
    figure = Figure()
    figure.add_bar(
        x=names,
        y=values,
        marker_color=AFTER,
        hovertemplate="layer %{x}: %{y:.4g} " + column.unit + "<extra></extra>",
    )
    figure.update_xaxes(title_text="layer", type="category")
    figure.update_yaxes(title_text=column.unit, zeroline=True, exponentformat="power")
    return plain(figure, 340)


def rank_chart(columns: Sequence[Column]) -> Figure:
    """Instruments by layers: the place of every layer in each ranking, 1 for the most important.

    Layers of equal value share their mean place, so that a column without differences is one flat shade.
    """
    from plotly.graph_objects import Figure

    ranked = [column for column in columns if column.important]
    figure = Figure()
    figure.add_heatmap(
        x=[str(layer) for layer in range(len(columns[0].values))] if columns else [],
        y=[column.name for column in ranked],
        z=[_places(column) for column in ranked],
        zmin=0,
        zmax=1,
        customdata=[list(column.values) for column in ranked],
        hovertemplate="layer %{x}, %{y}: %{customdata:.4g}<extra></extra>",
        colorscale="Blues",
        xgap=1,
        ygap=1,
        showscale=False,
    )
    figure.update_xaxes(title_text="layer", type="category")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return plain(figure, 120 + 26 * len(ranked), left=210)


def _places(column: Column) -> list[float | None]:
    """The mean place of every layer among those measured, as a share of their number; None where not measured."""
    from scipy.stats import rankdata

    sign = 1 if column.important == "high" else -1
    known = {layer: sign * value for layer, value in enumerate(column.values) if value == value}
    place = dict(zip(known, rankdata(list(known.values())).tolist(), strict=True))
    return [place[layer] / len(known) if layer in place else None for layer in range(len(column.values))]


def roofline_chart(scores: Scores) -> Figure:
    """Share of the roofline against arithmetic intensity, a point per layer, for a prompt and for one token."""
    from plotly.graph_objects import Figure

    figure = Figure()
    kinds = {"a prompt": ("intensity", "attained", AFTER), "one token": ("decode-intensity", "decode-attained", BEFORE)}
    for name, (intensity, attained, colour) in kinds.items():
        if f"roofline:{attained}" in scores:
            figure.add_scatter(
                x=scores[f"roofline:{intensity}"].values,
                y=scores[f"roofline:{attained}"].values,
                text=[f"layer {layer}" for layer in range(len(scores.spec.rows))],
                name=name,
                mode="markers",
                cliponaxis=False,
                marker={"color": colour, "size": 9},
                hovertemplate="%{text}: %{y:.0%} of the limit at %{x:.1f} FLOP/byte<extra></extra>",
            )
    figure.add_hline(y=1, line_dash="dot", line_color=BEFORE)
    steps = [mantissa * 10.0**power for power in range(-4, 7) for mantissa in (1, 1.5, 2, 3, 5, 7)]
    figure.update_xaxes(title_text="FLOP per byte", type="log", tickvals=steps, ticktext=[f"{x:g}" for x in steps])
    figure.update_yaxes(title_text="share of the limit", tickformat=".0%", rangemode="tozero")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    return plain(figure, 360)


def similarity_chart(similarity: Sequence[Sequence[float]]) -> Figure:
    """Layers of one model by layers of another, 1 for states that are equal up to rotation and scale."""
    from plotly.graph_objects import Figure

    figure = Figure()
    figure.add_heatmap(
        z=similarity,
        zmin=0,
        zmax=1,
        colorscale="Blues",
        colorbar={"title": {"text": "CKA"}, "thickness": 12},
        hovertemplate="layer %{y} against layer %{x}: %{z:.3f}<extra></extra>",
    )
    figure.update_xaxes(title_text="layer of the second model")
    figure.update_yaxes(title_text="layer of the first model")
    return plain(figure, 560)


def bits_chart(layers: Sequence[LayerChange]) -> Figure:
    """What each layer got: matrices over depth, coloured by stored bits; a dash where a matrix is gone."""
    from plotly.graph_objects import Figure

    rows = [change for change in layers if isinstance(change.layer, int) and change.bits]
    matrices = list(dict.fromkeys(name for change in rows for name in change.bits))
    bits = [[change.bits.get(name) for change in rows] for name in matrices]
    words = [[f"{change.got}<br>{size(change.bytes_before)} to {size(change.bytes_after)}" for change in rows]] * len(
        bits
    )
    figure = Figure()
    figure.add_heatmap(
        x=[str(change.layer) for change in rows],
        y=matrices,
        z=bits,
        text=[[_bits_label(value) for value in row] for row in bits],
        customdata=words,
        texttemplate="%{text}",
        hovertemplate="layer %{x}, matrix %{y}: %{text}<br>%{customdata}<extra></extra>",
        colorscale=[[edge / 16, colour] for edge, colour in BITS_SCALE],
        zmin=0,
        zmax=16,
        xgap=1,
        ygap=1,
        colorbar={
            "title": {"text": "bits"},
            "tickvals": [0, 2, 4, 6, 8, 16],
            "thickness": 12,
            "ticktext": ["gone", "2", "4", "6", "8", "16"],
        },
    )
    figure.update_xaxes(title_text="layer", type="category", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return plain(figure, 120 + 34 * max(len(matrices), 3))


def before_after_chart(report: Report) -> Figure:
    """Each quantity after as a percentage of before."""
    from plotly.graph_objects import Figure

    bars = before_after(report)[::-1]
    figure = Figure()
    figure.add_bar(
        y=[name for name, _, _ in bars],
        x=[share for _, share, _ in bars],
        orientation="h",
        marker_color=AFTER,
        text=[f"{share:.1f} %" for _, share, _ in bars],
        textposition="auto",
        insidetextanchor="end",
        textangle=0,
        customdata=[words for _, _, words in bars],
        hovertemplate="%{y}: %{customdata}<extra></extra>",
    )
    largest = max([share for _, share, _ in bars], default=100.0)
    figure.add_vline(
        x=100,
        line_dash="dot",
        line_color=BEFORE,
        layer="below",
        annotation_text="before",
        annotation_position="top",
    )
    figure.update_xaxes(title_text="% of before", range=[0, 1.08 * max(largest, 100)])
    return plain(figure, 110 + 44 * len(bars), left=130)


def before_after(report: Report) -> list[tuple[str, float, str]]:
    """(quantity, percentage of before, both values in words) for whatever was measured on both sides."""
    a, b = report.before, report.after
    pairs: list[tuple[str, float | None, float | None, str]] = [
        ("stored bytes", a.bytes, b.bytes, f"{size(a.bytes)} to {size(b.bytes)}"),
        (
            "parameters",
            a.parameters,
            b.parameters,
            f"{a.parameters / 1e6:.1f} M to {b.parameters / 1e6:.1f} M",
        ),
        (
            "peak memory",
            a.peak_memory_bytes,
            b.peak_memory_bytes,
            f"{size(a.peak_memory_bytes or 0)} to {size(b.peak_memory_bytes or 0)}",
        ),
        (
            "decode speed",
            a.decode_tokens_per_s,
            b.decode_tokens_per_s,
            f"{speed(a.decode_tokens_per_s)} to {speed(b.decode_tokens_per_s)} tokens/s",
        ),
        (
            "prefill speed",
            a.prefill_tokens_per_s,
            b.prefill_tokens_per_s,
            f"{speed(a.prefill_tokens_per_s)} to {speed(b.prefill_tokens_per_s)} tokens/s",
        ),
        (
            "perplexity",
            a.perplexity,
            b.perplexity,
            f"{a.perplexity:.2f} to {b.perplexity:.2f}, {percent_change(report.perplexity_ratio)}",
        ),
    ]
    return [(name, 100 * new / old, words) for name, old, new, words in pairs if old and new]


def tried_chart(tried: Sequence[Mapping[str, Any]]) -> Figure:
    """Every plan tried: stored bytes against divergence from the original; low and left is best."""
    from plotly.graph_objects import Figure

    figure = Figure()
    for kind, (label, symbol, colour, width) in KINDS.items():
        points = [point for point in tried if point["kind"] == kind]
        if points:
            figure.add_scatter(
                x=[point["bytes"] / 1e6 for point in points],
                y=[point["kl"] for point in points],
                text=[point["name"] for point in points],
                name=label,
                mode="markers+text",
                textposition="middle left" if kind == "control" else "top center",
                cliponaxis=False,
                marker={
                    "symbol": symbol,
                    "color": colour,
                    "size": width,
                    "line": {"width": 2, "color": colour},
                },
                hovertemplate="%{text}<br>%{x:.1f} MB, KL %{y:.4f} nats/token<extra></extra>",
            )
    sizes = [point["bytes"] / 1e6 for point in tried]
    room = 0.08 * (max(sizes) - min(sizes) or max(sizes))
    figure.update_xaxes(title_text="stored MB", range=[min(sizes) - room, max(sizes) + room])
    losses = [point["kl"] for point in tried]
    if min(losses) > 0 and max(losses) > LOG_FROM * min(losses):
        figure.update_yaxes(type="log", dtick="D2", tickformat="~g")
    else:
        figure.update_yaxes(range=[0, 1.15 * max(losses)])
    figure.update_yaxes(title_text="KL, nats/token")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    return plain(figure, 420)


def frontier_chart(points: Sequence[Mapping[str, Any]], unit: str, scale: float) -> Figure:
    """Cost in units of `scale` against divergence, predicted and measured; low and left is best."""
    from plotly.graph_objects import Figure

    figure = Figure()
    for name, symbol, dash in (("measured", "circle", "solid"), ("predicted", "circle-open", "dot")):
        figure.add_scatter(
            x=[point["cost"] / scale for point in points],
            y=[point[name] for point in points],
            text=[f"{point['share']:.0%}" for point in points],
            name=name,
            mode="lines+markers",
            line={"dash": dash},
            marker={"symbol": symbol, "size": 10},
            hovertemplate=f"%{{text}}: %{{x:.1f}} {unit}, KL %{{y:.4f}} nats/token<extra></extra>",
        )
    figure.update_xaxes(title_text=unit)
    figure.update_yaxes(title_text="KL, nats/token", type="log", tickformat="~g")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    return plain(figure, 420)


def _bits_label(bits: float | None) -> str:
    return "" if bits is None else f"{bits:g}" if bits else "-"


def plain(figure: Figure, height: int, left: int = 70) -> Figure:
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": left, "r": 24, "t": 36, "b": 52},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        hoverlabel={"font": {"size": 13}},
        bargap=0.25,
    )
    figure.update_yaxes(automargin=True, title_standoff=10)
    return figure
