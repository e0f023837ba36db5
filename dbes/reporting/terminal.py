"""A result in the terminal: verdict, a row per layer, a row per domain, the strongest specialists."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dbes.results import CalibratedRecord, Result, Specialist

SIGNIFICANCE = 0.05

COLUMNS = (
    ("specialization", "Specialization"),
    ("der", "Effective rank"),
    ("domain_isolation", "Isolation"),
    ("stiffness", "Stiffness"),
    ("ngram_expertise_2", "N-gram (n=2)"),
)
"""Metric and heading, in the order of the tables."""

SPECIALISTS_PER_DOMAIN = 2
TOKEN_WIDTH = 14


def render(result: Result) -> RenderableType:
    """Everything a reader needs to judge a result, for ``Console.print``."""
    if result.status == "error":
        return Panel(Text(result.error or "unknown error"), title="evaluation failed", border_style="red")
    parts: list[RenderableType] = [_heading(result), _layer_table(result), _domain_table(result)]
    if result.specialists:
        parts.append(_specialist_table(result))
    parts.append(Panel(Text(result.verdict), title="verdict", border_style="bold"))
    parts.append(_footnotes(result))
    return Group(*parts)


def render_paths(folder: Path, console: Console) -> None:
    """Names what was written and the next commands to type."""
    console.print(Text("Written:", style="bold"))
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        console.print(Text(f"  {path}{'/' if path.is_dir() else ''}"), soft_wrap=True)
    if (folder / "trace").is_dir():
        console.print(Text("Next: score the same recording again, or as an ideal or a random router would have routed it:", style="bold"))
        console.print(Text(f"  dbes score {folder / 'trace'} --seed 1\n  dbes score {folder / 'trace'} --router uniform"), soft_wrap=True)
        console.print(Text("The experts that serve a domain, to train only these:", style="bold"))
        console.print(Text(f"  dbes paths {folder} --domain DOMAIN --out paths.json"), soft_wrap=True)
        console.print(Text("Your own model (folder or hub id):", style="bold"))
        console.print(Text("  dbes doctor MODEL && dbes evaluate --model MODEL"))


def visible(token: str) -> str:
    """Text of a token made safe and legible for one cell: blanks shown, control and direction marks replaced, shortened."""
    shown = "".join(_visible_character(character) for character in token[: TOKEN_WIDTH + 1])
    return shown if len(token) <= TOKEN_WIDTH else shown[:TOKEN_WIDTH] + "…"


def _visible_character(character: str) -> str:
    if character == " ":
        return "·"
    if character == "\n":
        return "⏎"
    return "�" if unicodedata.category(character).startswith("C") else character


def _heading(result: Result) -> Text:
    model, task, recording = result.model, result.task, result.recording
    sizes = sorted(set(zip(model.experts, model.top_k, strict=True)))
    shape = ", ".join(f"{experts} experts, top-{k}" for experts, k in sizes)
    line = Text.assemble((model.name, "bold"), f"  {len(model.layers)} MoE layers ({shape})")
    if model.dtype:
        line.append(f", {model.dtype}")
    line.append(f"\n{task.name} task: {len(task.domains)} domains")
    if recording is not None:
        line.append(f", {recording.documents:,} documents, {recording.tokens:,} tokens")
        if not math.isnan(recording.tokens_per_second):
            line.append(f", recorded at {recording.tokens_per_second:,.0f} tokens/s")
    return line


def _layer_table(result: Result) -> Table:
    found = {(record.metric, record.layer): record for record in result.calibrated if record.domain is None}
    title = "Layers: score ± half of the 95 % interval; specialization, rank and isolation in % of the ideal domain router"
    table = Table(title=title, title_justify="left", title_style="italic", header_style="bold")
    table.add_column("Layer", justify="right")
    for _, heading in COLUMNS:
        table.add_column(heading, justify="right")
    table.add_column("p", justify="right")
    table.add_column("Random router", justify="right")
    table.add_column("Load used", justify="right")
    utilization = result.companions.get("by_layer", {}).get("utilization", {})
    for layer in (*result.model.layers, None):
        if layer is None:
            table.add_section()
        specialization = found[("specialization", layer)]
        used = utilization.get(str(layer)) if layer is not None else result.companions.get("model", {}).get("utilization")
        table.add_row(
            "mean" if layer is None else str(layer),
            *(_score(found[(metric, layer)]) for metric, _ in COLUMNS),
            _p(specialization.p),
            _percent(specialization.control),
            _percent(math.nan if used is None else used),
        )
    return table


def _domain_table(result: Result) -> Table:
    found = {(record.metric, record.domain): record for record in result.calibrated if record.layer is None}
    table = Table(title="Domains (means over layers)", title_justify="left", title_style="italic", header_style="bold")
    table.add_column("Domain")
    for heading in ("Documents", "Sources", "Tokens", "Specialization", "Isolation", "N-gram (n=2)", "p", "Random router", "Specialists"):
        table.add_column(heading, justify="right")
    counts = result.companions.get("specialists", {}).get("by_domain", {})
    for domain, facts in result.task.domains.items():
        specialization = found[("specialization", domain)]
        table.add_row(
            Text(domain),
            f"{facts.documents:,}",
            f"{facts.sources:,}",
            f"{facts.tokens:,}",
            _score(specialization),
            _score(found[("domain_isolation", domain)]),
            _score(found[("ngram_expertise_2", domain)]),
            _p(specialization.p),
            _percent(specialization.control),
            str(counts.get(domain, "")),
        )
    return table


def _specialist_table(result: Result) -> Table:
    counts = result.companions.get("specialists", {})
    title = (
        f"Specialists: {counts.get('specialists', len(result.specialists)):,} of {counts.get('tests', 0):,} (layer, expert, domain) tests "
        f"at 5 % false discoveries, in both halves of the documents; the strongest {SPECIALISTS_PER_DOMAIN} of each domain"
    )
    table = Table(title=title, title_justify="left", title_style="italic", header_style="bold")
    for heading in ("Domain", "Layer", "Expert", "Lift", "95 % interval", "Share", "q"):
        table.add_column(heading, justify="left" if heading == "Domain" else "right")
    table.add_column("Typical tokens", overflow="fold")
    for specialist in _strongest(result.specialists, result.task.domains):
        table.add_row(
            Text(specialist.domain),
            str(specialist.layer),
            str(specialist.expert),
            f"{specialist.lift:.2f}",
            f"{specialist.lift_low:.2f} – {specialist.lift_high:.2f}",
            f"{specialist.share:.1%}",
            _p(specialist.q),
            Text("  ".join(visible(token) for token in specialist.tokens)),
        )
    return table


def _strongest(specialists: Iterable[Specialist], domains: Iterable[str]) -> list[Specialist]:
    ranked = list(specialists)
    return [each for domain in domains for each in [one for one in ranked if one.domain == domain][:SPECIALISTS_PER_DOMAIN]]


def _footnotes(result: Result) -> Text:
    lines = [
        "0 % is what shuffling the documents' domain labels gives, 100 % a router that gives each domain experts of its own; · marks "
        "scores not above chance (p > 0.05). Random router: the same score for a frozen random router on the same hidden states.",
        "Intervals, shuffles and tests take source texts as their unit: documents cut from one source count as one.",
        "Stiffness: share of tokens whose experts stay the same under noise of 1 % of the scores' spread. N-gram: how much more often two "
        "neighbours share their first expert than after shuffling each document.",
    ]
    if not math.isnan(result.task.separability):
        chance = 1 / max(len(result.task.domains), 1)
        lines.append(
            f"A bag-of-words classifier tells the domains apart in {result.task.separability:.0%} of documents (chance {chance:.0%}): "
            "what wording and format alone give away."
        )
    lines += [f"Note: {warning}." for warning in result.warnings]
    return Text("\n".join(lines), style="dim")


def _score(record: CalibratedRecord) -> Text:
    if math.isnan(record.score):
        return Text("–", style="dim")
    half = (record.score_high - record.score_low) / 2
    text = f"{record.score:.1%}" + ("" if math.isnan(half) else f" ±{100 * half:.1f}")
    if not math.isnan(record.p) and record.p > SIGNIFICANCE:
        return Text(f"· {text}", style="dim")
    if math.isnan(record.p):
        return Text(text)
    return Text(text, style="green" if record.score >= 0.25 else "cyan" if record.score >= 0.05 else "yellow")


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.1%}"


def _p(p: float) -> str:
    if math.isnan(p):
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"
