"""The page "What real models show", of the results committed beside it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined
from markupsafe import Markup

from dbes.files import write_text
from dbes.reporting.meaning import decoded_words
from dbes.results import Result, load_result
from dbes.scoring.portions import share_of_position, share_of_word
from dbes.scoring.verdict import current_verdict
from dbes.wording import p_cell, share, shares

HERE = Path(__file__).parent
WIDE, HIGH, LEFT = 640, 190, 44


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is shown of a result; None where it cannot be told.

    Attributes:
        share: information of the counts as they are as a share of the ideal router's, biased upwards; all that counts of domains give.
        score, score_low, score_high: corrected, with its 95 % interval.
        isolation, isolation_low, isolation_high: the same of domain isolation; plain_isolation: published form.
    """

    documents: int
    tokens: int
    domains: dict[str, int]
    share: float | None
    score: float | None
    score_low: float | None
    score_high: float | None
    p: float | None
    word: float | None
    position: float | None
    named: str
    isolation: float | None
    isolation_low: float | None
    isolation_high: float | None
    plain_isolation: float | None
    load_used: float | None
    specialists: dict[str, int]
    tested: int
    verdict: str


def _known(value: float) -> float | None:
    return None if not math.isfinite(value) else round(value, 6)


def main_figures(result: Result) -> dict[str, Any]:
    model, isolation = result.record("specialization"), result.record("domain_isolation")
    found, recording = result.companions.get("specialists", {}), result.recording
    known = result.documents_known
    return asdict(
        Figures(
            documents=recording.documents if recording is not None and known else 0,
            tokens=sum(each.tokens for each in result.task.domains.values()),
            domains={name: each.sources if known else 0 for name, each in result.task.domains.items()},
            share=_known(model.value / model.reference),
            score=_known(model.score), score_low=_known(model.score_low), score_high=_known(model.score_high), p=_known(model.p),
            word=_known(share_of_word(model)), position=_known(share_of_position(model)), named=decoded_words(result),
            isolation=_known(isolation.score), isolation_low=_known(isolation.score_low), isolation_high=_known(isolation.score_high),
            plain_isolation=_known(isolation.value), load_used=_known(result.companions["model"]["utilization"]),
            specialists=dict(found.get("by_domain", {})) if known else {},
            tested=found.get("tests", 0) if known else 0,
            verdict=current_verdict(result),
        )
    )  # fmt: skip


def profile(result: Result) -> Markup:
    """Score (of counts alone: share without correction) by layer with its interval, as SVG."""
    of_model = [record for record in result.calibrated if record.metric == "specialization" and record.domain is None]
    rows = [record for record in of_model if record.layer is not None]
    corrected = result.documents_known
    values = [record.score if corrected else record.value / record.reference for record in rows]
    ends = [(record.score_low, record.score_high) if corrected else (value, value) for record, value in zip(rows, values, strict=True)]
    most = max(0.05, math.ceil(20 * max(high for _, high in ends)) / 20)
    last = max(record.layer or 0 for record in rows)

    def x(layer: int | None) -> float:
        return LEFT + 8 + (WIDE - LEFT - 20) * (layer or 0) / max(last, 1)

    def y(value: float) -> float:
        return 10 + (HIGH - 36) * (1 - max(value, 0) / most)

    parts = [f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="Score by layer" style="width:100%;height:auto;font:11px system-ui">']
    for tick in (0, most / 2, most):
        parts.append(f'<line x1="{LEFT}" x2="{WIDE - 6}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="var(--soft)">{tick:.1%}</text>')
    step = max(1, last // 12)
    for record in rows:
        if (record.layer or 0) % step == 0 or len(rows) < 5:
            parts.append(f'<text x="{x(record.layer):.1f}" y="{HIGH - 8}" text-anchor="middle" fill="var(--soft)">{record.layer}</text>')
    if corrected:
        points = " ".join(f"{x(record.layer):.1f},{y(value):.1f}" for record, value in zip(rows, values, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="var(--accent)" stroke-width="1.5"/>')
    for record, value, (low, high) in zip(rows, values, ends, strict=True):
        at = f"{x(record.layer):.1f}"
        if high > low:
            parts.append(f'<line x1="{at}" x2="{at}" y1="{y(low):.1f}" y2="{y(high):.1f}" stroke="var(--accent)" stroke-width="2"/>')
        told = f"layer {record.layer}: {share(value)}" + (f" ({shares(low, high)})" if high > low else "")
        parts.append(f'<circle cx="{at}" cy="{y(value):.1f}" r="3.5" fill="var(--accent)"><title>{told}</title></circle>')
    return Markup("".join(parts) + "</svg>")


def render() -> str:
    sources = yaml.safe_load((HERE / "sources.yaml").read_text("utf-8"))
    whole = {name: load_result(HERE / name) for name in sources["whole"]}
    variants = json.loads((HERE / "variants.json").read_text("utf-8"))
    rows = {name: main_figures(whole[name]) if name in whole else variants[name] for name in sources["results"]}
    about = {name: {**sources["results"][entry.get("of", name)], **entry} for name, entry in sources["results"].items()}
    environment = Environment(
        loader=ChoiceLoader([FileSystemLoader(HERE), PackageLoader("dbes.reporting")]),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    assert environment.loader is not None
    return environment.get_template("index.jinja.html").render(
        title="What real models show",
        style=Markup(environment.loader.get_source(environment, "page.css")[0]),
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'none'",
        scripts=[],
        data="",
        dbes_version=version("dbes"),
        rows=rows,
        about=about,
        repositories=sources["repositories"],
        profiles={name: profile(result) for name, result in whole.items()},
        share=share,
        shares=shares,
        p_cell=p_cell,
    )


def write_page(path: Path) -> None:
    write_text(path, render())
