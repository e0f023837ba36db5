"""The figures of the pages as Vega-Lite specifications, made by Altair.

Checking them against the schema costs more than making them, so that the tests check them and a page only makes them.

A specification names its data (``rows``) instead of holding them; the page hands the rows over when it draws, so that one
specification serves every layer, metric and domain. Colours come from the page's theme (dark or light), never from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import altair as alt
import numpy as np
from altair.utils.schemapi import debug_mode
from scipy.cluster.hierarchy import dendrogram, linkage

Spec = dict[str, Any]
Row = dict[str, Any]

METRICS = {
    "specialization": ("Specialization", "How much an expert choice says about the domain"),
    "der": ("Effective rank", "How many different routing profiles the domains have"),
    "domain_isolation": ("Domain isolation", "How little two domains overlap"),
    "stiffness": ("Stiffness", "Share of tokens whose experts survive noise of 1 %"),
    "ngram_expertise_2": ("N-gram (n = 2)", "Neighbours that stay with an expert, above a shuffle"),
    "specialization_normalized": ("Specialization, normalized", "Domain information as a share of its upper bound"),
    "ngram_expertise_5": ("N-gram (n = 5)", "Runs of five tokens with one expert, above a shuffle"),
    "ngram_expertise_10": ("N-gram (n = 10)", "Runs of ten tokens with one expert, above a shuffle"),
    "ngram_expertise_20": ("N-gram (n = 20)", "Runs of twenty tokens with one expert, above a shuffle"),
}
"""Title and meaning of every calibrated metric, the five of the summary first."""

HEADLINE = tuple(METRICS)[:5]

CURVE_FIELDS = (
    "value", "null", "corrected", "ci_low", "ci_high", "p", "reference", "score", "score_low", "score_high", "control",
    "excess", "excess_low", "excess_high",
)  # fmt: skip

ROWS = alt.NamedData("rows")

FEW_DOMAINS = 12
"""Of more domains a table of their similarity has no room for numbers: hover tells them, and the CSV."""

MODELS = alt.Legend(orient="bottom", columns=2, title=None, labelLimit=420, symbolOpacity=1)

TIMES = alt.Legend(orient="top", gradientLength=160, labelExpr="format(pow(2, datum.value), '.2~f') + 'x'")
"""Legend of a colour that shows the logarithm of a ratio, labelled with the ratio."""


SHAPES = ["circle", "diamond", "square", "cross", "triangle-up"]
LIFT = ("lift against the mean", "of the domains (log2)")


def unchecked() -> AbstractContextManager[None]:
    """Inside, Altair makes its objects without looking each of them up in the schema."""
    return debug_mode(False)


def layer_axis(layers: Sequence[int]) -> alt.Axis:
    """Ticks at real layers, at most twelve of them."""
    step = max(1, -(-len(layers) // 12))
    return alt.Axis(format="d", values=list(layers)[::step], grid=False)


def domain_spec(domains: int) -> Spec:
    """Score of every domain with its interval, the random router beside it."""
    y = alt.Y("domain:N", title=None, sort=alt.SortField("score", order="descending"))
    base = alt.Chart(ROWS).encode(y=y)
    tooltip = ["domain:N", *numbers("score", "score_low", "score_high", "control", "p")]
    layers = [
        rule(0).encode(x="level:Q"),
        base.mark_rule(strokeWidth=3, style="interval").encode(x=alt.X("score_low:Q", title="score"), x2="score_high:Q"),
        base.mark_tick(thickness=3, size=18, style="second-tick").encode(x="control:Q"),
        base.mark_point(size=80, filled=True, opacity=1).encode(x="score:Q", tooltip=tooltip),
        base.mark_text(dy=-11, fontSize=11).encode(x="score:Q", text="label:N"),
    ]
    return finished(alt.layer(*layers), 38 * domains)


def heat_spec(domains: int) -> Spec:
    """Domains by experts of one layer, experts in the order of their affinity; a dot marks a specialist."""
    base = alt.Chart(ROWS).encode(
        x=alt.X(
            "expert:O", title="expert, ordered by the domain it prefers", sort=alt.SortField("order"), axis=alt.Axis(labelOverlap=True)
        ),
        y=alt.Y("domain:N", title=None, sort=None),
    )
    tooltip = [
        "domain:N",
        alt.Tooltip("expert:O"),
        alt.Tooltip("hits:Q", format=","),
        alt.Tooltip("share:Q", format=".2%"),
        *numbers("lift", "lift_low", "lift_high", titles=("lift", "lift from", "to"), digits=3),
        alt.Tooltip("q:Q", title="q-value", format=".2g"),
        alt.Tooltip("kind:N", title="test"),
    ]
    cells = base.mark_rect().encode(color=_shade(LIFT), tooltip=tooltip)
    marks = base.mark_point(shape="circle", size=26, filled=True, style="mark").transform_filter("datum.kind == 'specialist'")
    return finished(alt.layer(cells, marks.encode(tooltip=tooltip)), 26 * domains)


def similarity_spec(domains: int) -> Spec:
    """Cosine similarity of the domains' routing, with the number in every cell where there is room for it."""
    axis = alt.Axis(labelAngle=-40 if domains <= FEW_DOMAINS else -90)
    base = alt.Chart(ROWS).encode(x=alt.X("second:N", title=None, sort=None, axis=axis), y=alt.Y("first:N", title=None, sort=None))
    cells = base.mark_rect().encode(
        color=alt.Color(
            "similarity:Q",
            title="cosine",
            scale=alt.Scale(range="heatmap", interpolate="lab"),
            legend=alt.Legend(orient="top", gradientLength=160),
        ),
        tooltip=["first:N", "second:N", alt.Tooltip("similarity:Q", format=".4f")],
    )
    if domains > FEW_DOMAINS:
        return finished(cells, 22 * domains)
    numbers = base.mark_text(fontSize=alt.ExprRef(f"width < {24 * domains} ? 9 : 11")).encode(
        text="label:N",
        color=alt.condition("datum.strong", alt.value("#ffffff"), alt.value("#10151c")),
    )
    return finished(alt.layer(cells, numbers).resolve_scale(color="independent"), 34 * domains)


def dendrogram_rows(similarity: np.ndarray, domains: list[str]) -> tuple[list[Row], list[str]]:
    """Corners of the dendrogram's brackets (average linkage of 1 - cosine), and the domains in the order of its leaves."""
    if len(domains) < 2 or np.isnan(similarity).any():
        return [], list(domains)
    distance = np.clip(1 - similarity, 0, None)
    tree = dendrogram(linkage(distance[np.triu_indices(len(domains), 1)], "average"), no_plot=True)
    rows = [
        {"bracket": index, "corner": corner, "distance": float(d), "place": float((i - 5) / 10)}
        for index, (dcoord, icoord) in enumerate(zip(tree["dcoord"], tree["icoord"], strict=True))
        for corner, (d, i) in enumerate(zip(dcoord, icoord, strict=True))
    ]
    return rows, [domains[leaf] for leaf in tree["leaves"]]


def dendrogram_spec(order: list[str]) -> Spec:
    names = alt.Chart(alt.InlineData([{"domain": name, "place": index, "distance": 0} for index, name in enumerate(order)]))
    y = alt.Y("place:Q", axis=None, scale=alt.Scale(domain=[len(order) - 0.5, -0.5], nice=False, zero=False))
    x = alt.X("distance:Q", title="distance (1 - cosine)", scale=alt.Scale(reverse=True, nice=True), axis=alt.Axis(tickCount=4, grid=False))
    brackets = alt.Chart(ROWS).mark_line(strokeWidth=1.8).encode(x=x, y=y, detail="bracket:N", order="corner:Q")
    labels = names.mark_text(align="left", dx=6, fontSize=12).encode(x=x, y=y, text="domain:N")
    return finished(alt.layer(brackets, labels), max(120, 30 * len(order)))


def load_spec() -> Spec:
    """Load of the experts of every layer against an even load, experts ordered by load."""
    chart = alt.Chart(ROWS).mark_rect().encode(
        x=alt.X("layer:O", title="layer", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
        y=alt.Y("rank:O", title="experts by load", axis=alt.Axis(labels=False, ticks=False), sort="descending"),
        color=_shade(["load against an", "even load (log2)"]),
        tooltip=[
            alt.Tooltip("layer:O"), alt.Tooltip("expert:O"), alt.Tooltip("load:Q", title="share of all choices", format=".3%"),
            alt.Tooltip("relative:Q", title="times an even load", format=".2f"),
        ],
    )  # fmt: skip
    return finished(chart, 240)


def utilization_spec(layers: Sequence[int]) -> Spec:
    """Share of the experts' capacity in use, and the busiest expert's excess, per layer."""
    base = alt.Chart(ROWS).encode(x=alt.X("layer:Q", title="layer", axis=layer_axis(layers), scale=alt.Scale(nice=False)))
    tooltip = [
        "layer:Q",
        alt.Tooltip("utilization:Q", format=".1%"),
        alt.Tooltip("dead_experts:Q"),
        alt.Tooltip("max_violation:Q", format=".2f"),
    ]
    y = alt.Y("utilization:Q", title=None, axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1]))
    line = base.mark_line(strokeWidth=2).encode(y=y)
    points = base.mark_point(size=40, filled=True, opacity=1).encode(y=y, tooltip=tooltip)
    return finished(alt.layer(line, points), 170)


def trajectory_spec(layers: Sequence[int]) -> Spec:
    """Strongest moves between the experts of neighbouring layers, as ribbons between numbered nodes."""
    axis = alt.Axis(format="d", values=list(layers), grid=False)
    x = alt.X("layer:Q", title="layer", axis=axis, scale=alt.Scale(nice=False, zero=False, padding=26))
    y = alt.Y("place:Q", axis=None, scale=alt.Scale(reverse=True, zero=False, padding=14))
    tooltip = [
        alt.Tooltip("move:N"), alt.Tooltip("share:Q", title="share of the domain's tokens", format=".2%"),
        alt.Tooltip("lift:Q", title="times the mean of the domains", format=".2f"),
    ]  # fmt: skip
    ribbons = (
        alt.Chart(ROWS)
        .mark_line(interpolate="monotone", opacity=0.55, strokeCap="round")
        .transform_filter("datum.kind == 'move'")
        .encode(
            x=x, y=y, detail="move:N", order="layer:Q", tooltip=tooltip,
            strokeWidth=alt.StrokeWidth("share:Q", legend=None, scale=alt.Scale(range=[1, 14], zero=True)),
            color=_shade(LIFT, colours="ramp"),
        )
    )  # fmt: skip
    nodes = (
        alt.Chart(ROWS)
        .transform_filter("datum.kind == 'expert'")
        .encode(x=x, y=y, tooltip=["layer:Q", "expert:N", alt.Tooltip("share:Q", format=".2%")])
    )
    chart = alt.layer(
        ribbons,
        nodes.mark_point(size=420, filled=True, opacity=1, style="node"),
        nodes.mark_text(fontSize=11, style="label").encode(text="expert:N"),
    )
    return finished(chart, 360)


def scatter_spec(field: str, title: str, form: str) -> Spec:
    """Specialization against accuracy or loss, one point per model with its interval."""
    base = alt.Chart(ROWS).encode(y=alt.Y(f"{field}:Q", title=title, axis=alt.Axis(format=form), scale=alt.Scale(zero=False)))
    tooltip = ["model:N", *numbers("score", field, digits=3)]
    layers = [
        base.mark_rule(style="interval").encode(
            x=alt.X("score_low:Q", title="specialization (score)", axis=alt.Axis(format="%", tickCount=8)), x2="score_high:Q"
        ),
        base.mark_point(size=90, filled=True, opacity=1).encode(x="score:Q", tooltip=tooltip),
        base.mark_text(dy=-12, fontSize=11).encode(x="score:Q", y=alt.Y("label_at:Q", title=title), text="model:N"),
    ]
    return finished(alt.layer(*layers), 280)


def overlay_spec() -> Spec:
    """Scores of several models against relative depth (0 first, 1 last MoE layer), told apart by colour, dash and shape."""
    axis = alt.Axis(format="%", grid=False, tickCount=5)
    x = alt.X("depth:Q", title="relative depth of the layer", scale=alt.Scale(domain=[0, 1]), axis=axis)
    base = alt.Chart(ROWS).encode(x=x, y=alt.Y("score:Q", title=None), color=alt.Color("model:N", legend=MODELS))
    area = base.mark_area(opacity=0.12).encode(y=alt.Y("score_low:Q", title=None), y2="score_high:Q")
    return finished(alt.layer(area, *_model_lines(base, "layer:Q", size=50)), 300)


def parallel_spec() -> Spec:
    """The five scores of several models as one line each."""
    x = alt.X("metric:N", title=None, sort=None, axis=alt.Axis(labelAngle=-20, grid=True))
    colour = alt.Color("model:N", legend=MODELS)
    base = alt.Chart(ROWS).encode(x=x, y=alt.Y("score:Q", title="score"), color=colour, detail="model:N")
    return finished(alt.layer(*_model_lines(base, "metric:N", size=60)), 300)


def _model_lines(base: alt.Chart, where: str, *, size: int) -> list[alt.Chart]:
    """A line with points for each model, and its name right of its end, at ``label_at``, which the page sets: no name covers another."""
    tooltip = ["model:N", where, *numbers("score", "score_low", "score_high")]
    names = base.mark_text(align="left", dx=9, fontSize=11).transform_filter("isValid(datum.label_at)")
    return [
        base.mark_line(strokeWidth=2).encode(strokeDash=alt.StrokeDash("model:N", legend=None)),
        base.mark_point(size=size, filled=True, opacity=1).encode(shape=alt.Shape("model:N", legend=None), tooltip=tooltip),
        names.encode(y=alt.Y("label_at:Q", title=None), text="model:N"),
    ]


def plane_spec(groups: Sequence[str]) -> Spec:
    """Gain against forgetting: arms with intervals and names, the Pareto front, trajectories of full finetuning.

    Rows are told apart by ``mark``; the page sets the parameters x0, x1, y0, y1 (what is in view) and where names stand.
    """
    ends = {name: alt.param(name=name, value=value) for name, value in (("x0", 0), ("x1", 1), ("y0", 0), ("y1", 1))}

    def scale(low: str, high: str) -> alt.Scale:
        return alt.Scale(domain=[alt.ExprRef(low), alt.ExprRef(high)], nice=False, zero=False)

    x_scale, y_scale = scale("x0", "x1"), scale("y0", "y1")
    x = alt.X("x:Q", title="forgetting, bits per byte (less is better)", scale=x_scale)
    y = alt.Y("y:Q", title="gain, bits per byte (more is better)", scale=y_scale)
    base = alt.Chart(ROWS)
    arms = base.transform_filter("datum.mark === 'arm'")
    path = base.transform_filter("datum.mark === 'trajectory'").encode(x=x, y=y)
    placed = arms.transform_filter("isValid(datum.name_x)")
    names = placed.encode(x=alt.X("name_x:Q", scale=x_scale), y=alt.Y("name_y:Q", scale=y_scale))
    leaders = placed.encode(x=alt.X("edge_x:Q", scale=x_scale), y=alt.Y("edge_y:Q", scale=y_scale))
    legend = alt.Legend(orient="bottom", columns=3, title=None, labelLimit=420, symbolOpacity=1)
    tooltip = [
        alt.Tooltip("arm:N"), alt.Tooltip("gain:N"), alt.Tooltip("forgetting:N"), alt.Tooltip("ratio:N", title="times full, matched"),
    ]  # fmt: skip
    layers: list[Any] = [
        rule(0, clip=True).encode(x=alt.X("level:Q", scale=x_scale)),
        rule(0, clip=True).encode(y=alt.Y("level:Q", scale=y_scale)),
        base.transform_filter("datum.mark === 'front'")
        .mark_line(interpolate="step-after", style="bound", strokeWidth=2, clip=True)
        .encode(x=x, y=y, order="order:Q"),
        path.mark_line(style="second-line", strokeWidth=2, clip=True).encode(
            detail="arm:N", order="step:Q", strokeDash=alt.StrokeDash("arm:N", legend=None, scale=alt.Scale(range=[[1, 0], [7, 4], [2, 3]]))
        ),
        path.mark_point(style="second-tick", size=22, filled=True, opacity=1, clip=True).encode(
            tooltip=["arm:N", "step:Q", *numbers("y", "x", titles=("gain", "forgetting"))]
        ),
        arms.mark_rule(opacity=0.4, clip=True).encode(x=alt.X("x_low:Q", scale=x_scale), x2="x_high:Q", y=y),
        arms.mark_rule(opacity=0.4, clip=True).encode(x=x, y=alt.Y("y_low:Q", scale=y_scale), y2="y_high:Q"),
        leaders.mark_rule(style="zero", strokeDash=[2, 2], opacity=0.8).encode(x2="x:Q", y2="y:Q"),
        arms.mark_point(size=90, filled=True, opacity=1, clip=True).encode(
            x=x,
            y=y,
            tooltip=tooltip,
            color=alt.Color("group:N", scale=alt.Scale(domain=list(groups)), legend=legend),
            shape=alt.Shape("group:N", scale=alt.Scale(domain=list(groups), range=SHAPES), legend=legend),
        ),
        names.mark_text(fontSize=11, baseline="middle").encode(text="label:N"),
    ]
    return finished(alt.layer(*layers).add_params(*ends.values()), 430)


def interval_spec(title: str, series: Sequence[str]) -> Spec:
    """Values with intervals, a line for every ``label`` and ``series``; the page sets the height."""
    base = alt.Chart(ROWS).encode(
        y=alt.Y("label:N", title=None, sort=None, axis=alt.Axis(grid=True)),
        yOffset=alt.YOffset("series:N", sort=list(series), scale=alt.Scale(paddingOuter=0.35)),
    )
    legend = alt.Legend(orient="bottom", columns=1, title=None, labelLimit=320, symbolOpacity=1)
    domain = alt.Scale(domain=list(series))
    shapes = alt.Scale(domain=list(series), range=["circle", "square", "triangle-up", "diamond"][: len(series)])
    colour = alt.Color("series:N", scale=domain, legend=legend)
    tooltip = ["label:N", "series:N", *numbers("value", "low", "high")]
    layers = [
        rule(0).encode(x="level:Q"),
        base.mark_rule(strokeWidth=2.4, opacity=0.55).encode(x=alt.X("low:Q", title=title), x2="high:Q", color=colour),
        base.mark_point(size=62, filled=True, opacity=1).encode(
            x=alt.X("value:Q", title=title), color=colour, shape=alt.Shape("series:N", scale=shapes, legend=legend), tooltip=tooltip
        ),
    ]
    return finished(alt.layer(*layers), 200)


def named_interval_spec(*, zero: bool) -> Spec:
    """A value with its interval for every ``label``, which stands above its line and so may be long; the page sets the height.

    Args:
        zero: the axis holds 0; without, it holds the values only, whose differences are small beside them.
    """
    base = alt.Chart(ROWS).encode(y=alt.Y("label:N", sort=None, axis=None))
    low, value = (alt.X(name, title=None, scale=alt.Scale(zero=zero), axis=alt.Axis(tickCount=6)) for name in ("low:Q", "value:Q"))
    names = base.mark_text(align="left", dy=-9, fontSize=11, limit=alt.ExprRef("width - 52"))
    layers = [
        *([rule(0).encode(x="level:Q")] if zero else []),
        base.mark_rule(strokeWidth=3, style="interval", yOffset=6).encode(x=low, x2="high:Q"),
        base.mark_point(size=62, filled=True, opacity=1, yOffset=6).encode(x=value, tooltip=["label:N", *numbers("value", "low", "high")]),
        names.encode(x=alt.value(0), text="label:N"),
        base.mark_text(align="right", dy=-9, fontSize=11).encode(x=alt.value("width"), text=alt.Text("value:Q", format=".3f")),
    ]
    return finished(alt.layer(*layers), 200)


def numbers(*names: str, titles: Sequence[str] = (), digits: int = 4) -> list[alt.Tooltip]:
    named: list[dict[str, Any]] = [{"title": title} for title in titles] or [{}] * len(names)
    return [alt.Tooltip(f"{name}:Q", format=f".{digits}f", **title) for name, title in zip(names, named, strict=True)]


def rule(level: float, **mark: Any) -> alt.Chart:
    return alt.Chart(alt.InlineData([{"level": level}])).mark_rule(style="bound" if level else "zero", **mark)


def _shade(title: Sequence[str], *, colours: Literal["diverging", "ramp"] = "diverging") -> alt.Color:
    """Colour of a ratio's logarithm to base 2, cut at a quarter and at four times."""
    scale = alt.Scale(range=colours, domain=[-2, 0, 2], clamp=True, interpolate="lab")
    return alt.Color("shade:Q", title=list(title), scale=scale, legend=TIMES)


def finished(chart: Any, height: int) -> Spec:
    """The chart as a dict, as wide as its place; Altair's own theme is taken out, the page brings one for dark and one for light."""
    spec = chart.properties(width="container", height=height).to_dict(validate=False)
    spec.pop("config", None)
    return spec | {"autosize": {"type": "fit-x", "contains": "padding"}}
