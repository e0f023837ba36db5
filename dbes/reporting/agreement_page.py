"""The page of an agreement: by layer, margin and domain, and what it means for the scores; one HTML file without network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from dbes.comparison.agreement import Agreement, spread
from dbes.reporting import charts
from dbes.reporting.html import render
from dbes.reporting.page import slug
from dbes.text import labels, legible

SHARES = {
    "differing": "Sets differ",
    "kept": "Slots kept",
    "started": "Starts here",
    "reached": "Differed so far",
}
"""What the figure of the layers can show, with its title."""


def render_agreement(found: Agreement, words: Sequence[str]) -> str:
    """The HTML of an agreement. The same recordings give the same bytes.

    Args:
        words: what the recordings show, a sentence each, the main thing first.
    """
    return render(
        "agreement.html",
        scripts=("page.js", "agreement.js"),
        payload=agreement_payload(found),
        title="Agreement of two recordings",
        found=found,
        words=[legible(line, 600) for line in words],
        notes=[legible(note, 600) for note in found.notes],
        domains=len(found.by_domain),
    )


def agreement_payload(found: Agreement) -> dict[str, Any]:
    """Everything the page's script draws from: flat rows, and the specifications of the figures."""
    named = labels([each.domain for each in found.by_domain], 26)
    layers = [
        {"layer": each.layer, "compared": each.compared, "missing": each.missing}
        | {name: value for part in SHARES for name, value in spread(part, getattr(each, part)).items()}
        for each in found.by_layer
    ]
    cells = [
        {"layer": each.layer, "domain": named[domain]} | spread("differing", value)
        for each in found.by_layer
        for domain, value in each.by_domain.items()
    ]
    domains = [
        {"domain": named[each.domain], "documents": each.documents, "tokens": each.tokens}
        | spread("differing", each.differing)
        | spread("kept", each.kept)
        for each in found.by_domain
    ]
    margins = [
        {"label": f"{each.low:.0%} to {each.high:.0%}", "upper": each.upper, "pairs": each.pairs}
        | spread("differing", each.differing)
        | spread("part", each.part)
        for each in found.by_margin
    ]
    scores = [vars(each) | {"metric": charts.METRICS[each.metric][0]} for each in found.scores]
    with charts.unchecked():
        specs = {"layers": layer_spec(found.layers), "margins": margin_spec(), "domains": domain_spec(), "cells": cell_spec()}
    rows = {"layers": layers, "cells": cells, "domains": domains, "margins": margins, "scores": scores}
    return {
        "name": slug(f"agreement-{found.first}-{found.second}"),
        "shares": SHARES,
        "specs": specs,
        **{name: [_known(row) for row in each] for name, each in rows.items()},
    }


def _known(row: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}


def layer_spec(layers: Sequence[int]) -> charts.Spec:
    """A share at every layer with its interval; the page sets what ``value``, ``low`` and ``high`` are."""
    base = alt.Chart(charts.ROWS).encode(x=alt.X("layer:Q", title="layer", axis=charts.layer_axis(layers), scale=alt.Scale(nice=False)))
    tooltip = ["layer:Q", *_percents("value", "low", "high"), alt.Tooltip("compared:Q", format=",")]
    y = alt.Y("value:Q", title=None, axis=alt.Axis(format="~%"), scale=alt.Scale(zero=False))
    parts = [
        base.mark_area(opacity=0.16).encode(y=alt.Y("low:Q", title=None), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=y),
        base.mark_point(size=44, filled=True, opacity=1).encode(y=y, tooltip=tooltip),
    ]
    return charts.finished(alt.layer(*parts), 260)


def margin_spec() -> charts.Spec:
    """Share of differing tokens in every band of margins, the smallest left."""
    base = alt.Chart(charts.ROWS).encode(
        x=alt.X("label:N", title="tokens by margin, smallest first", sort=None, axis=alt.Axis(labelAngle=-30))
    )
    tooltip = [
        "label:N",
        *_percents("differing", "differing_low", "differing_high", "part"),
        alt.Tooltip("upper:Q", title="margin up to", format=".3g"),
        alt.Tooltip("pairs:Q", title="(token, layer) pairs", format=","),
    ]
    y = alt.Y("differing:Q", title="sets differ", axis=alt.Axis(format="~%"))
    parts = [
        base.mark_bar(opacity=0.55).encode(y=y, tooltip=tooltip),
        base.mark_rule(strokeWidth=2.4, style="interval").encode(y=alt.Y("differing_low:Q", title="sets differ"), y2="differing_high:Q"),
    ]
    return charts.finished(alt.layer(*parts), 260)


def domain_spec() -> charts.Spec:
    """Share of differing (token, layer) pairs of every domain with its interval; the page sets the height."""
    base = alt.Chart(charts.ROWS).encode(y=alt.Y("domain:N", title=None, sort=alt.SortField("differing", order="descending")))
    tooltip = ["domain:N", *_percents("differing", "differing_low", "differing_high", "kept"), alt.Tooltip("tokens:Q", format=",")]
    axis = alt.Axis(format="~%", tickCount=6)
    parts = [
        base.mark_rule(strokeWidth=3, style="interval").encode(
            x=alt.X("differing_low:Q", title="sets differ", axis=axis), x2="differing_high:Q"
        ),
        base.mark_point(size=70, filled=True, opacity=1).encode(x=alt.X("differing:Q", title="sets differ"), tooltip=tooltip),
    ]
    return charts.finished(alt.layer(*parts), 200)


def cell_spec() -> charts.Spec:
    """Domains by layers, coloured by the share that differs; the page sets the height."""
    chart = alt.Chart(charts.ROWS).mark_rect().encode(
        x=alt.X("layer:O", title="layer", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
        y=alt.Y("domain:N", title=None, sort=None),
        color=alt.Color(
            "differing:Q", title="sets differ", scale=alt.Scale(range="heatmap", interpolate="lab", zero=True),
            legend=alt.Legend(orient="top", gradientLength=160, format="~%"),
        ),
        tooltip=["domain:N", "layer:O", *_percents("differing", "differing_low", "differing_high")],
    )  # fmt: skip
    return charts.finished(chart, 200)


def _percents(*names: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(f"{name}:Q", format=".2%", title=name.replace("_", " ")) for name in names]
