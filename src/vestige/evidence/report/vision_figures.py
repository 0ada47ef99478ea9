"""Figures of the heads of a vision transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vestige.evidence.report.figures import COLOURS, SCALE, plain_figure
from vestige.evidence.report.page import Figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from vestige.evidence.probes.vit_head_analytics import HeadAnalytics

__all__ = ["distances", "head_figures", "pattern_maps", "profiles"]


def head_figures(found: HeadAnalytics) -> tuple[Figure, ...]:
    """Importance, distance and patterns, with titles and captions."""
    first = found.ranking()[0]
    kind = found.patterns.names[int(found.mixture[first].argmax())]
    return (
        Figure(
            "importance",
            found.figure(),
            "Importance of the heads",
            "How far the classes' probabilities move where the head alone is pruned; mean over the images.",
            f"Head {first[1]} of layer {first[0]} matters most.",
        ),
        Figure(
            "distance",
            distances(found),
            "How far heads look, and how much they matter",
            "One mark per head; the larger, the more important.",
            f"Heads look {found.distance.min():.1f} to {found.distance.max():.1f} patches far.",
        ),
        Figure(
            "profiles",
            profiles(found),
            "Attention over distance",
            "Mean over the heads of a layer, with the lowest and the highest head.",
            "Attention that patches give to those some hops away, layer by layer.",
        ),
        Figure(
            "patterns",
            pattern_maps(found),
            "Kinds of attention patterns",
            "Attention by the step from a patch to the one it looks at; no step is in the middle. The share says how "
            "many of all maps are of the kind.",
            f"The most important head is mostly of the kind '{kind}'.",
        ),
    )


def distances(found: HeadAnalytics) -> go.Figure:
    """Mean distance of each head by layer; the size of a mark is the head's importance."""
    import plotly.graph_objects as go

    figure = plain_figure(380)
    layers, heads = found.distance.shape
    value = found.importance["divergence"]
    sizes = 7 + 20 * np.sqrt(np.clip(value, 0, None) / max(float(value.max()), 1e-12))
    # Heads of a layer stand side by side, so that none hides another.
    across = np.arange(layers)[:, None] + (np.arange(heads) - (heads - 1) / 2) * min(0.5 / heads, 0.12)
    label = [[f"layer {layer}, head {head}" for head in range(heads)] for layer in range(layers)]
    figure.add_trace(
        go.Scatter(
            x=across.ravel(),
            y=found.distance.ravel(),
            text=np.ravel(label),
            customdata=value.ravel(),
            mode="markers",
            marker={
                "size": sizes.ravel(),
                "color": COLOURS[1],
                "opacity": 0.7,
                "line": {"width": 1, "color": "#ffffff"},
            },
            hovertemplate="%{text}<br>%{y:.2f} patches, importance %{customdata:.3f}<extra></extra>",
            showlegend=False,
            meta={"series": 1},
        )
    )
    figure.update_xaxes(title_text="layer", tickvals=list(range(layers)), showgrid=False)
    figure.update_yaxes(title_text="mean distance, patches", rangemode="tozero")
    return figure


def profiles(found: HeadAnalytics) -> go.Figure:
    """Attention by hops, one line per layer; of deep models, of evenly spaced layers."""
    from vestige.evidence.report.study_figures import lines

    layers = len(found.profile)
    shown = sorted(set(np.linspace(0, layers - 1, min(layers, len(COLOURS) - 1)).round().astype(int).tolist()))
    hops = list(range(found.profile.shape[-1]))
    series = {f"layer {layer}": (hops, found.profile[layer]) for layer in shown}
    figure = lines(series, across="hops between the patches", up="share of a patch's attention")
    figure.update_xaxes(tickvals=hops)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def pattern_maps(found: HeadAnalytics) -> go.Figure:
    """The mean map of each kind of pattern, side by side."""
    from plotly.subplots import make_subplots

    patterns = found.patterns
    shares = np.bincount(patterns.kinds, minlength=len(patterns.names)) / len(patterns.kinds)
    columns = min(3, len(patterns.names))
    rows = -(-len(patterns.names) // columns)
    titles = [f"{name}, {share:.0%}" for name, share in zip(patterns.names, shares, strict=True)]
    figure: Any = make_subplots(
        rows, columns, subplot_titles=titles, horizontal_spacing=0.06, vertical_spacing=0.16 / rows
    )
    figure.update_layout(plain_figure(70 + 230 * rows).layout)
    height, width = patterns.offsets.shape[1:]
    down, across = np.arange(height) - height // 2, np.arange(width) - width // 2
    for place, offsets in enumerate(patterns.offsets):
        share = offsets / offsets.sum()
        trace = {
            "type": "heatmap",
            "z": share,
            "x": across,
            "y": down,
            "zmin": 0,
            "colorscale": [list(stop) for stop in SCALE],
            "showscale": False,
            "hovertemplate": "%{y} down, %{x} across: %{z:.1%}<extra></extra>",
            "meta": {"scale": "share"},
        }
        at = {"row": place // columns + 1, "col": place % columns + 1}
        figure.add_trace(trace, **at)
        figure.update_yaxes(autorange="reversed", showgrid=False, showticklabels=False, zeroline=False, **at)
        figure.update_xaxes(showgrid=False, showticklabels=False, zeroline=False, **at)
    figure.update_layout(margin={"t": 40, "b": 20})
    figure.update_annotations(font={"size": 13})
    return figure
