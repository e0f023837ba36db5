"""The figures of the layers of a model: every metric with its interval, and what routing is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from dbes.reporting import charts
from dbes.results import Result
from dbes.scoring.resolution import SIGNIFICANCE


def curve_specs(layers: Sequence[int]) -> dict[str, charts.Spec]:
    """Score or value against layer, with and without the ideal router in view."""
    axis = charts.layer_axis(layers)
    return {
        "score": _curve(axis, "score", "score_low", "score_high", "control", rules=(0.0,)),
        "score_full": _curve(axis, "score", "score_low", "score_high", "control", rules=(0.0, 1.0)),
        "value": _curve(axis, "value", "ci_low", "ci_high", "null"),
        "value_full": _curve(axis, "value", "ci_low", "ci_high", "null", also="reference"),
    }


PARTS = ("router", "the word alone", "the position alone", "random router")
"""Lines of the figure of what routing is made of, in the order of its legend."""


def part_rows(result: Result, named: Mapping[str, str]) -> list[charts.Row]:
    """Rows of the figure, of every domain and of all (None): a row per layer and line, in the unit of the score.

    Where the word is known, the router is shown on the tokens that the word's line is of, with the interval of its difference to it.
    """
    rows = []
    for record in result.calibrated:
        if record.metric != "specialization" or record.layer is None:
            continue
        scale = record.reference if record.reference > 0 else math.nan
        if math.isnan(record.lexical):
            router = record.score, record.score_low, record.score_high
        else:
            beyond = record.contextual, record.contextual_low, record.contextual_high
            router = tuple((record.lexical + part) / scale for part in beyond)
        alone = [(value, math.nan, math.nan) for value in (record.lexical / scale, record.position / scale, record.control)]
        about = {"domain": None if record.domain is None else named[record.domain], "layer": record.layer}
        rows += [
            about | {"part": part, "score": score, "low": low, "high": high}
            for part, (score, low, high) in zip(PARTS, (router, *alone), strict=True)
            if not math.isnan(score)
        ]
    return rows


def parts_spec(layers: Sequence[int]) -> charts.Spec:
    """What the router shows at each layer beside what the token alone, its position alone and a random router show, all as scores."""
    legend = alt.Legend(orient="bottom", columns=2, title=None, labelLimit=420, symbolOpacity=1)
    domain = alt.Scale(domain=list(PARTS))
    dashes = alt.Scale(domain=list(PARTS), range=[[1, 0], [7, 3], [2, 3], [5, 4]])
    base = alt.Chart(charts.ROWS).encode(
        x=alt.X("layer:Q", title="layer", axis=charts.layer_axis(layers), scale=alt.Scale(nice=False)),
        color=alt.Color("part:N", scale=domain, legend=legend),
    )
    y = alt.Y("score:Q", title=None, axis=alt.Axis(format="%"))
    tooltip = [alt.Tooltip("layer:Q", format="d"), "part:N", *charts.numbers("score", "low", "high", titles=("score", "95 % from", "to"))]
    layers_of = [
        charts.rule(0).encode(y="level:Q"),
        base.mark_area(opacity=0.18).encode(y=alt.Y("low:Q", title=None), y2="high:Q").transform_filter("isValid(datum.low)"),
        base.mark_line(strokeWidth=2).encode(y=y, strokeDash=alt.StrokeDash("part:N", scale=dashes, legend=legend)),
        base.mark_point(size=44, filled=True, opacity=1).encode(
            y=y, tooltip=tooltip, shape=alt.Shape("part:N", scale=alt.Scale(domain=list(PARTS), range=charts.SHAPES[:4]), legend=legend)
        ),
    ]
    return charts.finished(alt.layer(*layers_of), 260)


def _curve(
    axis: alt.Axis, value: str, low: str, high: str, second: str, *, also: str | None = None, rules: tuple[float, ...] = ()
) -> charts.Spec:
    base = alt.Chart(charts.ROWS).encode(x=alt.X("layer:Q", title="layer", axis=axis, scale=alt.Scale(nice=False)))
    tooltip = [
        alt.Tooltip("layer:Q", format="d"),
        *charts.numbers(value, low, high, second, titles=(value, "95 % from", "to", "random router" if second == "control" else "chance")),
        alt.Tooltip("p:Q", format=".3g"),
    ]
    y = alt.Y(f"{value}:Q", title=None)
    above = f"isValid(datum.p) && datum.p > {SIGNIFICANCE}"
    layers: list[Any] = [
        base.mark_area(opacity=0.22).encode(y=alt.Y(f"{low}:Q", title=None), y2=f"{high}:Q"),
        base.mark_line(strokeDash=[5, 4], style="second-line").encode(y=alt.Y(f"{second}:Q", title=None)),
        base.mark_line(strokeWidth=2).encode(y=y),
        base.mark_point(size=34, filled=True, opacity=1, style="open").encode(y=y),
        base.mark_point(size=34, filled=True).encode(y=y, opacity=alt.condition(above, alt.value(0), alt.value(1))),
        base.mark_point(size=160, opacity=0).encode(y=y, tooltip=tooltip),
    ]
    if also is not None:
        layers.insert(0, base.mark_line(strokeDash=[1, 3], style="bound").encode(y=alt.Y(f"{also}:Q", title=None)))
    for level in rules:
        layers.insert(0, charts.rule(level).encode(y="level:Q"))
    return charts.finished(alt.layer(*layers), 170)
