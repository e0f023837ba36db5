"""A comparison or a result in the forms other tools read: CSV, JSON, Markdown, Hub metadata, leaderboard records."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from dbes.comparison.compare import Comparison, PhaseDifference, model_score, phase_differences
from dbes.comparison.entries import LeaderboardEntry
from dbes.comparison.ranks import Difference
from dbes.comparison.relation import LEAST
from dbes.errors import ResultError
from dbes.files import write_text
from dbes.reporting.charts import METRICS
from dbes.reporting.meaning import named
from dbes.results import Result
from dbes.scoring.portions import share_of_word
from dbes.scoring.resolution import cannot_tell, why_not
from dbes.scoring.score import REPLICATED
from dbes.scoring.tables import spreadsheet_safe
from dbes.text import legible
from dbes.wording import UNKNOWN, counted, p_cell, portion, share, shares, task_words

NAME_WIDTH = 80

MARKDOWN = re.compile(r"[\\`*_\[\]<>|#&~$@]|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""What Markdown, or what GitHub adds to it (bare links, mentions, formulas), could take for markup."""

ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "&#64;"}


def entry_row(entry: LeaderboardEntry, comparison: Comparison) -> dict[str, Any]:
    """One line of the leaderboard. A score that misses a domain or a layer is None, never a mean of the rest."""
    result, model = entry.result, entry.result.model
    rank = comparison.ranks.get(entry.label)
    row: dict[str, Any] = {
        "rank": None if rank is None else rank.place,
        "rank_last": None if rank is None else rank.last,
        "model": legible(entry.label, NAME_WIDTH),
        "baseline": entry.baseline,
        "family": None if model.family is None else legible(model.family, 40),
        "experts": _span(model.experts),
        "k": _span(model.top_k),
        "layers": len(model.layers),
        "parameters": model.parameters,
        "dtype": None if model.dtype is None else legible(model.dtype, 20),
        "tokens": None if result.recording is None else result.recording.tokens,
    }
    for metric in comparison.metrics:
        score = model_score(result, metric)
        record = None if score is None else result.record(metric)
        row[metric] = score
        row[f"{metric}_low"] = None if record is None else _known(record.score_low)
        row[f"{metric}_high"] = None if record is None else _known(record.score_high)
    specialization = None if row["specialization"] is None else result.record("specialization")
    row |= {
        "random_router": None if specialization is None else _known(specialization.control),
        "excess": None if specialization is None else _known(specialization.excess),
        "excess_low": None if specialization is None else _known(specialization.excess_low),
        "excess_high": None if specialization is None else _known(specialization.excess_high),
        "share_of_word": None if specialization is None else _known(share_of_word(specialization)),
        "domain_named": named(result),
        "utilization": _known(result.companions.get("model", {}).get("utilization")),
        "phase": str(result.settings.get("phase", "all")),
    }
    for phase in ("prompt", "generated"):  # by the metric that ranks; the other metrics in phase_row
        each = entry.phases.get(phase)
        score = None if each is None else model_score(each.result, comparison.metric)
        record = None if each is None or score is None else each.result.record(comparison.metric)
        row[phase] = score
        row[f"{phase}_low"] = None if record is None else _known(record.score_low)
        row[f"{phase}_high"] = None if record is None else _known(record.score_high)
    row |= {"loss": entry.loss} if has_loss(comparison) else {}
    row |= {"accuracy": entry.accuracy} if comparison.accuracy_of else {}
    row |= {
        "date": result.created[:10],
        "versions": legible(_versions(result), 120),
        "note": entry_note(entry, comparison.metric),
    }
    return row


def has_loss(comparison: Comparison) -> bool:
    """Whether a model of the comparison has its loss measured."""
    return any(entry.loss is not None for entry in comparison.entries)


def relation_lines(comparison: Comparison) -> list[str]:
    """Whether more specialized models have a lower loss or a higher accuracy, a line each."""
    lines = []
    for each in comparison.relations:
        name = {"loss": "bits per byte (mean over domains; lower is better)", "accuracy": "accuracy"}[each.of]
        if each.models < LEAST:
            lines.append(f"Specialization and {name}: {counted(each.models, 'model')}, of which nothing can be said; {LEAST} are needed.")
            continue
        told = "constant" if math.isnan(each.rho) else f"{each.rho:+.2f} (95 %: {each.low:+.2f} to {each.high:+.2f})"
        line = f"Specialization and {name}: Spearman {told} over {counted(each.models, 'model')}"
        if not math.isnan(each.within):
            line += f"; over the domains of a model, mean {each.within:+.2f} ({each.within_low:+.2f} to {each.within_high:+.2f})"
        lines.append(f"{line}. A correlation is no cause: models differ in much else.")
    return lines


def entry_note(entry: LeaderboardEntry, metric: str) -> str | None:
    """What a reader of the table must know of a result: why it has no rank, and whether its scores could be told from chance."""
    notes = [entry.problem] if entry.problem else []
    if cannot_tell(entry.result, metric):
        notes.append(f"whether its score is above chance: {why_not(entry.result, metric)}")
    return "; ".join(notes) or None


def titles(comparison: Comparison) -> dict[str, str]:
    """Title of every metric that is compared."""
    return {name: METRICS[name][0] if name in METRICS else legible(comparison.own[name], 40) for name in comparison.metrics}


def order_words(comparison: Comparison) -> str:
    """What the entries are ordered and ranked by, in words."""
    metric = titles(comparison)[comparison.metric]
    metric = metric.lower() if comparison.metric in METRICS else metric
    if not comparison.by_excess:
        return f"Order and rank by score, {metric}"
    below = any(not entry.baseline and entry.label not in comparison.ranks for entry in comparison.entries)
    return f"Order and rank by excess over the random router, {metric}" + ("; models without one stand below" if below else "")


def bits_cell(bits: float | None) -> str:
    """Bits per byte."""
    return UNKNOWN if bits is None else f"{bits:.3f}"


def excess_cell(row: dict[str, Any]) -> str:
    """The excess with its interval."""
    interval = "" if row["excess_low"] is None else f" ({shares(row['excess_low'], row['excess_high'], sign=True)})"
    return f"{share(row['excess'], sign=True)}{interval}"


def table(comparison: Comparison) -> pd.DataFrame:
    """The leaderboard as a table, one row each."""
    return pd.DataFrame([entry_row(entry, comparison) for entry in comparison.entries], dtype=object)


def phase_row(each: PhaseDifference) -> dict[str, Any]:
    """Prompt and generated text of one model by one metric, and the difference between them with its 95 % interval."""
    row: dict[str, Any] = {"model": legible(each.entry.label, NAME_WIDTH), "metric": each.metric}
    for phase, score in (("prompt", each.prompt), ("generated", each.generated)):
        record = each.entry.phases[phase].result.record(each.metric)
        row |= {phase: score, f"{phase}_low": _known(record.score_low), f"{phase}_high": _known(record.score_high)}
    test = each.test
    row |= {"difference": each.generated - each.prompt, "low": None if test is None else _known(test.low)}
    return row | {"high": None if test is None else _known(test.high), "p": None if test is None else _known(test.p)}


def phase_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Prompt and generated text of every model that has both, by every metric."""
    return [phase_row(each) for entry in comparison.entries for each in phase_differences(entry)]


def published_row(entry: LeaderboardEntry) -> dict[str, Any]:
    """The published, uncalibrated values of one result, under their own names."""
    row: dict[str, Any] = {"model": legible(entry.label, NAME_WIDTH)}
    for key, found in entry.result.published.items():
        for size, each in found.items() if isinstance(found, dict) else [(None, found)]:
            row[key if size is None else f"{key}_{size}"] = _known(each.model)
    return row


def as_csv(comparison: Comparison, *, published: bool = False) -> str:
    """Comma-separated values that a spreadsheet cannot run; the published values, marked so in every column, if asked for."""
    rows = _published_table(comparison) if published else table(comparison)
    return spreadsheet_safe(rows).to_csv(index=False, lineterminator="\n")


def _published_table(comparison: Comparison) -> pd.DataFrame:
    rows = pd.DataFrame([published_row(entry) for entry in comparison.entries], dtype=object)
    return rows.rename(columns={name: f"{name} (published, uncalibrated)" for name in rows.columns if name != "model"})


def write(text: str, path: Path) -> None:
    """Write an export, whole or not at all.

    Raises:
        FileError: it cannot be written.
    """
    write_text(path, text)


def as_json(comparison: Comparison, paired: Sequence[Difference] = ()) -> str:
    """Everything of a comparison as strict JSON."""
    first = comparison.entries[0].result.task if comparison.entries else None
    content = {
        "ranked_by": comparison.metric,
        "ranked_by_excess": comparison.by_excess,
        "task": None if first is None else {"name": first.name, "version": first.version, "fingerprint": first.fingerprint},
        "entries": [entry_row(entry, comparison) for entry in comparison.entries],
        "published_uncalibrated": [published_row(entry) for entry in comparison.entries],
        "pairs": [_plain(asdict(pair)) for pair in comparison.pairs],
        "paired_differences": [_plain(asdict(pair)) for pair in paired],
        "prompt_and_generated": phase_rows(comparison),
        "accuracy_of": comparison.accuracy_of or None,
        "relations": [_plain(asdict(each)) for each in comparison.relations],
        "apart": [asdict(each) for each in comparison.apart],
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)


def as_markdown(comparison: Comparison, paired: Sequence[Difference] = (), *, published: bool = False) -> str:
    """The leaderboard as a Markdown table, with what stands apart below it."""
    lines: list[str] = []
    named = titles(comparison)
    if published:
        rows = [published_row(entry) for entry in comparison.entries]
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines += [
            "Published values: uncalibrated, without chance level.",
            "",
            *markdown_table(names, [[row.get(name) for name in names] for row in rows]),
        ]
    else:
        names = [
            "Rank",
            "Model",
            "Experts",
            "k",
            "Layers",
            "Tokens",
            *named.values(),
            "Random router",
            "Excess",
            "Word",
            "Domain named",
            "Load used",
            *(["Bits per byte"] if has_loss(comparison) else []),
            *(["Accuracy"] if comparison.accuracy_of else []),
        ]
        body = []
        for entry in comparison.entries:
            row, rank = entry_row(entry, comparison), comparison.ranks.get(entry.label)
            name = row["model"] + (" (baseline)" if entry.baseline else "")
            scores = [_interval(row[metric], row[f"{metric}_low"], row[f"{metric}_high"]) for metric in comparison.metrics]
            body.append(["–" if rank is None else str(rank), name, row["experts"], row["k"], row["layers"], row["tokens"], *scores,
                         share(row["random_router"]), excess_cell(row), portion(row["share_of_word"]), share(row["domain_named"]),
                         share(row["utilization"]), *([bits_cell(row["loss"])] if has_loss(comparison) else []),
                         *([share(row["accuracy"])] if comparison.accuracy_of else [])])  # fmt: skip
        lines += [*markdown_table(names, body), "", f"{order_words(comparison)}."]
        if comparison.accuracy_of:
            lines += ["", f"Accuracy: {markdown_cell(comparison.accuracy_of)}"]
        lines += [part for line in relation_lines(comparison) for part in ("", line)]
        if phases := phase_rows(comparison):
            lines += ["", "Prompt and generated text:", ""]
            body = [[row["model"], named.get(row["metric"], row["metric"]), *(
                     _interval(row[phase], row[f"{phase}_low"], row[f"{phase}_high"]) for phase in ("prompt", "generated")
                     ), _change(row)] for row in phases]  # fmt: skip
            lines += markdown_table(["Model", "Metric", "Prompt", "Generated", "Generated minus prompt"], body)
    if paired:
        lines += ["", f"Paired difference, {markdown_cell(paired[0].first)} minus {markdown_cell(paired[0].second)}:", ""]
        body = [[named.get(each.metric, each.metric), each.depth, f"{each.score_first:.4f}", f"{each.score_second:.4f}",
                 _difference(each), p_cell(each.adjusted)] for each in paired]  # fmt: skip
        lines += markdown_table(["Metric", "Depth", "First", "Second", "Difference", "p (Holm)"], body)
    for each in comparison.apart:
        lines += ["", f"Not in the table: {markdown_cell(each.name)}: {markdown_cell(each.reason)}"]
    return "\n".join(lines) + "\n"


def markdown_table(names: Sequence[str], body: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table, its cells escaped."""
    rows = ["| " + " | ".join(markdown_cell(cell) for cell in row) + " |" for row in body]
    return ["| " + " | ".join(map(markdown_cell, names)) + " |", "|" + " --- |" * len(names), *rows]


def markdown_cell(value: Any, width: int = 160) -> str:
    """Text that can neither end a Markdown cell nor become markup."""
    if value is None:
        return "–"
    text = f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else legible(str(value), width)
    return MARKDOWN.sub(lambda found: ENTITIES.get(found[0], f"\\{found[0]}"), text)


# ---------------------------------------------------------------------------------------------------------------------
# One result


def hub_entries(result: Result, *, dataset: str) -> str:
    """The text of ``.eval_results/dbes.yaml`` for a model's repository on the hub.

    Args:
        dataset: id of the benchmark's dataset on the hub, where the leaderboard collects the entries.

    Raises:
        ResultError: ``dataset`` is not an id of the form owner/name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", dataset):
        raise ResultError(f"dataset {legible(dataset, 80)!r}: expected the id of a dataset on the hub, owner/name")
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries = []
    for metric in REPLICATED:
        score = model_score(result, metric)
        if score is None:
            continue
        record = result.record(metric)
        interval = "" if math.isnan(record.score_low) else f"95 % interval {record.score_low:.4f} to {record.score_high:.4f}; "
        fingerprint = None if result.task.fingerprint is None else result.task.fingerprint[:12]
        notes = (
            f"{interval}task {task_words(result.task.name, result.task.version, fingerprint)}; "
            f"dtype {result.model.dtype}; dbes {result.environment.get('dbes')}"
        )
        entries.append(
            EvalResultEntry(
                dataset_id=dataset,
                task_id=f"{result.task.name}_{metric}",
                value=round(score, 6),
                date=result.created,
                notes=legible(notes, 300),
            )
        )
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)


def open_record(result: Result) -> str:
    """The minimal record of open leaderboards: ``{"config": {...}, "results": {...}}``."""
    config = {
        "model_name": legible(result.model.name, NAME_WIDTH), "model_sha": result.model.revision, "model_dtype": result.model.dtype,
        "task_fingerprint": result.task.fingerprint, "task_version": result.task.version, "date": result.created,
        "versions": result.environment, "settings": result.settings,
    }  # fmt: skip
    scores = {metric: score for metric in REPLICATED if (score := model_score(result, metric)) is not None}
    results = {f"{result.task.name}_{metric}": {"score": score} for metric, score in scores.items()}
    return json.dumps({"config": config, "results": results}, indent=1, ensure_ascii=False, allow_nan=False)


# ---------------------------------------------------------------------------------------------------------------------


def _span(numbers: Sequence[int]) -> str:
    return "–" if not numbers else str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)}–{max(numbers)}"


def _known(number: Any) -> float | None:
    return None if number is None or not math.isfinite(number) else float(number)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}


def _versions(result: Result) -> str:
    found = {name.removeprefix("recorded_with_"): value for name, value in result.environment.items() if value}
    return ", ".join(f"{name} {found[name]}" for name in ("dbes", "torch", "transformers", "numpy") if name in found)


def _interval(score: float | None, low: float | None, high: float | None) -> str:
    return share(score) if score is None or low is None or high is None else f"{share(score)} ({shares(low, high)})"


def _change(row: dict[str, Any]) -> str:
    interval = "" if row["low"] is None else f" ({shares(row['low'], row['high'], sign=True)})"
    return f"{share(row['difference'], sign=True)}{interval}"


def _difference(test: Difference) -> str:
    return f"{test.difference:+.4f}" + ("" if math.isnan(test.low) else f" ({test.low:+.4f} to {test.high:+.4f})")
