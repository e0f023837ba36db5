"""The page of one model: everything a result says, in one HTML file that needs no network and no server."""

from __future__ import annotations

import math
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dbes.files import check_writable, write_text
from dbes.reporting import charts, layer_charts, measures
from dbes.reporting.commands import command, program
from dbes.reporting.html import render
from dbes.reporting.meaning import meaning_rows, placebo_rows
from dbes.reporting.phases import HEADINGS, answer_note, answer_rows
from dbes.reporting.strata import StrataRows, strata_rows
from dbes.reporting.text_view import TextSample, contexts, documents, read_sample, token_text, trajectories
from dbes.results import PAGE_FILE, CalibratedRecord, Result, load_result
from dbes.scoring.portions import word_unknown
from dbes.scoring.resolution import DOUBTFUL, cannot_tell, why_not
from dbes.scoring.tables import read_arrays, read_usage
from dbes.scoring.verdict import current_verdict
from dbes.text import label, labels, legible
from dbes.trace.store import MANIFEST, Trace
from dbes.wording import share

NAME_WIDTH = 120
DOMAIN_WIDTH = 26
"""Characters of a domain's name in figures: as many as their axes have room for."""

SPECIALIST_ROWS = 2000
"""Specialists listed on the page at most; the CSV beside the result has all."""

ROUNDING = 1e-12
"""Smaller numbers are what rounding leaves of 0: an axis would be drawn of them."""

CITATION = """@software{dbes,
  title   = {dbes: expert specialization in Mixture-of-Experts language models},
  version = {%s}
}
@article{dbes_metrics,
  title   = {DBES},
  journal = {arXiv:2605.18498}
}
@article{moe_routing_testbed,
  title   = {MoE Routing Testbed},
  journal = {arXiv:2604.07030}
}"""


def write_page(folder: str | Path, *, trace: str | Path | None = None, output: str | Path | None = None) -> Path:
    """Write ``report.html`` beside a result and return its path.

    Args:
        trace: folder of the recorded routes; by default the one beside the result, and what needs it is left out without.

    Raises:
        ResultError: the result cannot be read.
        FileError: the page cannot be written.
    """
    result = load_result(folder)
    folder = Path(folder)
    folder = folder if folder.is_dir() else folder.parent
    path = Path(output) if output is not None else folder / PAGE_FILE
    check_writable(path)
    routes = _trace_of(folder, None if trace is None else Path(trace))
    usage, arrays = read_usage(folder, result), read_arrays(folder, result)
    page = render_page(result, usage=usage, arrays=arrays, trace=routes, start=program(shared=True))
    write_text(path, page)
    return path


def page_stands(path: Path) -> bool:
    """Whether there is a whole page."""
    try:
        with path.open("rb") as page:
            page.seek(-64, os.SEEK_END)
            return page.read().rstrip().endswith(b"</html>")
    except OSError:
        return False


def _trace_of(folder: Path, given: Path | None) -> Trace | None:
    if given is not None:
        return Trace.load(given)
    return Trace.load(folder / "trace") if (folder / "trace" / MANIFEST).is_file() else None


def render_page(
    result: Result,
    *,
    usage: pd.DataFrame | None = None,
    arrays: dict[str, np.ndarray] | None = None,
    trace: Trace | None = None,
    start: str = "dbes",
) -> str:
    """The HTML of a result's page; it holds no time of day and no speed, so that the same evaluation gives the same page.

    Args:
        start: how dbes is started in the command that makes the result again.
    """
    if result.status == "error":
        return render("error.html", title=label(result.model.name, NAME_WIDTH), result=result, command=command(result, start=start))
    sample = read_sample(trace) if trace is not None else None
    payload = model_payload(result, usage=usage, arrays=arrays or {}, sample=sample)
    named = labels(result.task.domains, DOMAIN_WIDTH)
    return render(
        "model.html",
        scripts=("page.js", "model.js"),
        payload=payload,
        title=label(result.model.name, NAME_WIDTH),
        result=result,
        verdict=current_verdict(result),
        meaning=meaning_rows(result),
        placebo=[(None if name is None else named[name], cells) for name, *cells in placebo_rows(result)],
        word_known=any(not math.isnan(record.lexical) for record in result.calibrated),
        word_unknown=word_unknown(result),
        beside=measures.beside_table(result, named),
        ablation=measures.ablation_rows(result, named),
        verdicts=measures.ablation_verdicts(result, named),
        measured=measures,
        notes=measures.measure_notes(result),
        answers=answer_rows(result),
        answer_headings=HEADINGS,
        answer_note=answer_note(result),
        few=charts.FEW_DOMAINS,
        headline=[_tile(result, metric) for metric in charts.HEADLINE],
        facts=provenance(result),
        published=published_rows(result),
        doubtful=DOUBTFUL if cannot_tell(result) else "",
        command=command(result, start=start),
        citation=CITATION % version("dbes"),
        has=payload["has"],
        strata=[*strata_rows(result)],
        strata_shown=bool(payload["strata"]),
        metrics=_metrics(result),
        domains=[(named[name], facts) for name, facts in result.task.domains.items()],
    )


def model_payload(
    result: Result, *, usage: pd.DataFrame | None, arrays: dict[str, np.ndarray], sample: TextSample | None
) -> dict[str, Any]:
    """Everything the page's script draws from: specifications and the numbers of the result."""
    named = labels(result.task.domains, DOMAIN_WIDTH)
    domains = list(named.values())
    similarity = _similarity(result, arrays)
    tree, order = charts.dendrogram_rows(similarity[-1], domains)
    specialists = result.specialists[:SPECIALIST_ROWS]
    places = contexts(sample, specialists)
    text = documents(sample, named) if sample is not None else []
    moves = trajectories(sample) if sample is not None else None
    by_layer = result.companions.get("by_layer", {})
    payload: dict[str, Any] = {
        "name": slug(result.model.name),
        "layers": list(result.model.layers),
        "experts": list(result.model.experts),
        "top_k": list(result.model.top_k),
        "domains": domains,
        "order": order,
        "metrics": {name: title for name, (title, _) in _metrics(result).items()},
        "whole": [name for name in _metrics(result) if not result.by_domain(name)],
        "curves": columns(_scores(result, named, by_layer=True), ("metric", "domain", "layer", *charts.CURVE_FIELDS)),
        "curve_domains": columns(_scores(result, named, by_layer=False), ("metric", "domain", *charts.CURVE_FIELDS)),
        "heat": heat_columns(usage, result) if usage is not None else None,
        "similarity": [[[_short(cell) for cell in row] for row in layer] for layer in similarity],
        "dendrogram": tree,
        "load": [
            {"layer": layer}
            | {name: by_layer.get(name, {}).get(str(layer)) for name in ("utilization", "dead_experts", "max_violation", "load_entropy")}
            for layer in result.model.layers
        ],
        "specialists": columns(
            [
                {
                    "domain": named.get(each.domain, ""), "layer": each.layer, "expert": each.expert, "lift": each.lift,
                    "lift_low": each.lift_low, "lift_high": each.lift_high, "share": each.share, "hits": each.hits, "q": each.q,
                    "tokens": [token_text(token) for token in each.tokens], "contexts": place,
                }
                for each, place in zip(specialists, places, strict=True)
            ],
            ("domain", "layer", "expert", "lift", "lift_low", "lift_high", "share", "hits", "q", "tokens", "contexts"),
        ),
        "text": text,
        "moves": moves,
        "untold": why_not(result) if cannot_tell(result) else "",
        "sample_tokens": sample.tokens if sample is not None else 0,
        "parts": columns(layer_charts.part_rows(result, named), ("domain", "layer", "part", "score", "low", "high")),
        "ablation": measures.ablation_series(result, named),
        "strata": {rows.kind: {"title": rows.title, "rows": _stratum_rows(rows)} for rows in strata_rows(result) if rows.scores},
        "specs": _specs(result, order),
    }  # fmt: skip
    heat, listed = payload["heat"], result.companions.get("specialists", {})
    payload["has"] = {
        "heat": heat is not None, "lift": heat is not None and any(each is not None for each in heat["lift"]),
        "tests": bool(result.specialists) or listed.get("tests", 0) > 0, "tree": bool(tree), "text": bool(text), "moves": moves is not None,
        "weights": any(document["weights"] for document in text),
        "more_specialists": len(result.specialists) > SPECIALIST_ROWS or listed.get("not_listed", 0) > 0,
    }  # fmt: skip
    return payload


def _metrics(result: Result) -> dict[str, tuple[str, str]]:
    """Title and meaning of every metric of a result, those of the user's own last."""
    own = {name: (legible(each.title, 40), legible(each.meaning, 200)) for name, each in result.own_metrics.items()}
    return charts.METRICS | own


def _scores(result: Result, named: dict[str, str], *, by_layer: bool) -> list[dict[str, Any]]:
    """The calibrated records of every layer and domain (None: all), or of every domain over all layers."""
    return [
        {"metric": record.metric, "domain": None if record.domain is None else named[record.domain], "layer": record.layer}
        | {name: getattr(record, name) for name in charts.CURVE_FIELDS}
        for record in result.calibrated
        if (record.layer is not None if by_layer else record.layer is None and record.domain is not None)
    ]


def _stratum_rows(found: StrataRows) -> list[dict[str, Any]]:
    """Rows of the figure of domains, with strata in their place."""
    fields = ("score", "score_low", "score_high")
    return [
        {"domain": name, "control": None, "label": share(numbers[0])} | dict(zip(fields, map(_short, numbers), strict=True))
        for name, *numbers in found.scores
    ]


def _specs(result: Result, order: list[str]) -> dict[str, Any]:
    layers, domains = result.model.layers, len(order)
    with charts.unchecked():
        return {
            "ablation": charts.interval_spec("bits per byte added by masking", measures.SERIES),
            "curve": layer_charts.curve_specs(layers),
            "parts": layer_charts.parts_spec(layers),
            "domain": charts.domain_spec(domains),
            "strata": charts.domain_spec(max((len(each.strata) for each in result.strata.values()), default=1)),
            "heat": charts.heat_spec(domains),
            "similarity": charts.similarity_spec(domains),
            "dendrogram": charts.dendrogram_spec(order),
            "load": charts.load_spec(),
            "utilization": charts.utilization_spec(layers),
            "trajectory": charts.trajectory_spec(layers),
        }


def columns(rows: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, list[Any]]:
    """Rows as columns, numbers with five significant digits: a third of the size."""
    return {name: [_short(row[name]) for row in rows] for name in names}


def heat_columns(usage: pd.DataFrame, result: Result) -> dict[str, list[Any]]:
    """Expert usage as columns in the order domains, layers, experts; ``kind`` 2 specialist, 1 too rare to tell, 0 neither.

    The page orders experts by their share of the hits, shows ``lift``, and computes both ends of its interval from ``reach``, half its
    width: the interval is symmetric and cut at 0. ``reach`` has as many decimals as the upper end has with four significant digits.
    """
    order = {name: index for index, name in enumerate(result.task.domains)}
    table = usage.assign(_domain=[order[name] for name in usage["domain"]]).sort_values(["_domain", "layer", "expert"], kind="stable")
    kind = np.where(table["specialist"], 2, np.where(table["unknown"], 1, 0))
    found: dict[str, list[Any]] = {"hits": table["hits"].astype(int).tolist(), "kind": kind.tolist()}
    lift, high = (table[name].to_numpy(float) for name in ("lift", "lift_high"))
    scale = 10.0 ** np.clip(3 - np.floor(np.log10(np.maximum(high, 1e-3))), 0, 6)
    reach = np.rint((high - lift) * scale) / scale
    found["lift"] = [_short(number, 4) for number in lift.tolist()]
    found["reach"] = [number if math.isfinite(number) else None for number in reach.tolist()]
    found["q"] = [_short(number, 2) for number in table["q"].tolist()]
    return found


def _similarity(result: Result, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Similarity of the domains at each layer and, last, the mean over layers, [layers + 1, domains, domains]."""
    size = len(result.task.domains)
    mean = result.companions.get("similarity", {}).get("mean_over_layers")
    last = np.full((size, size), np.nan) if mean is None else np.asarray(mean, float)
    layers = arrays.get("similarity", np.full((len(result.model.layers), size, size), np.nan))
    return np.concatenate([layers, last[None]])


def _short(value: Any, digits: int = 5) -> Any:
    if not isinstance(value, float | np.floating):
        return value
    if abs(value) < ROUNDING:
        return 0.0
    return None if not math.isfinite(value) else float(f"{value:.{digits}g}")


def slug(name: str) -> str:
    """A name that is safe as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:60] or "model"


def _tile(result: Result, metric: str) -> dict[str, Any]:
    title, meaning = charts.METRICS[metric]
    try:
        record: CalibratedRecord | None = result.record(metric)
    except KeyError:
        record = None
    known = record is not None and not math.isnan(record.score)
    untold = why_not(result, metric) if record is not None and not math.isnan(record.p) and cannot_tell(result, metric) else ""
    value = f"{record.value:.4g}" if record is not None and not known and not math.isnan(record.value) else ""
    return {"title": title, "meaning": meaning, "record": record if known else None, "untold": untold, "value": value}


def provenance(result: Result) -> list[tuple[str, str]]:
    """What identifies the result, as pairs of name and text."""
    model, task, recording = result.model, result.task, result.recording
    sizes = sorted(set(zip(model.experts, model.top_k, strict=True)))
    facts: list[tuple[str, Any]] = [
        ("Model", model.name), ("Revision", model.revision), ("Family", model.family),
        ("Experts", ", ".join(f"{experts} per layer, top-{k}" for experts, k in sizes)), ("MoE layers", len(model.layers)),
        ("Parameters", None if model.parameters is None else f"{model.parameters:,}"), ("dtype", model.dtype),
        ("Task", task.name if task.version is None else f"{task.name}, version {task.version}"), ("Task fingerprint", task.fingerprint),
        ("Separability by words alone", None if math.isnan(task.separability) else f"{share(task.separability)} of documents"),
    ]  # fmt: skip
    if recording is not None:
        facts += [("Documents", f"{recording.documents:,}" if result.documents_known else None), ("Tokens", f"{recording.tokens:,}")]
    asked = {name: value for name, value in result.settings.items() if name not in ("model", "tasks", "revision", "dtype")}
    if isinstance(asked.get("generation"), dict):
        asked["generation"] = ", ".join(f"{name} {value}" for name, value in asked["generation"].items())
    facts += [(name.replace("_", " ").capitalize(), value) for name, value in asked.items() if value is not None]
    facts += [(name.replace("_", " "), value) for name, value in result.environment.items()]
    return [(label(name), legible(str(value), NAME_WIDTH)) for name, value in facts if value is not None and value != ""]


def published_rows(result: Result) -> list[tuple[str, str, str]]:
    """The published, uncalibrated values: key, size where there is one, value."""
    rows = []
    for key, found in result.published.items():
        sizes = found.items() if isinstance(found, dict) else [("", found)]
        rows += [(label(key), str(size), "–" if math.isnan(each.model) else f"{each.model:.4f}") for size, each in sizes]
    return rows
