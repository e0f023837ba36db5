"""A result in the terminal: verdict, a row per layer, a row per domain, the strongest specialists."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group, RenderableType, RenderHook, RenderResult
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from dbes.reporting.commands import program, shell
from dbes.results import CalibratedRecord, Result, Specialist
from dbes.scoring.resolution import DOUBTFUL, SIGNIFICANCE, cannot_tell, why_not
from dbes.scoring.verdict import current_verdict
from dbes.text import label, labels, printable
from dbes.wording import counted, p_cell, plus_minus, share

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
DOMAIN_WIDTH = 32


class Harmless:
    """A renderable whose text holds nothing that a terminal would obey; what rich itself tells the terminal passes."""

    def __init__(self, inner: RenderableType) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.inner, options):
            yield segment if segment.control else Segment(printable(segment.text, lines=True), segment.style)


class _Shield(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [Harmless(each) for each in renderables]


def harmless() -> Console:
    """A console on stdout that reads no markup, links or emoji codes from text, and sends none of its control characters on."""
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:  # a pipe or a log cannot be measured: tables are given room instead of being folded at 80 columns
        console = Console(markup=False, emoji=False, width=150)
    console.push_render_hook(_Shield())
    return console


def render(result: Result) -> RenderableType:
    """Everything a reader needs to judge a result, for ``Console.print``."""
    if result.status == "error":
        return Panel(Text(result.error or "unknown error"), title="evaluation failed", border_style="red")
    parts: list[RenderableType] = [_heading(result), _layer_table(result), _domain_table(result)]
    if result.specialists:
        parts.append(_specialist_table(result))
    parts.append(Panel(Text(current_verdict(result)), title="verdict", border_style="bold"))
    parts.append(_footnotes(result))
    return Group(*parts)


def render_paths(folder: Path, console: Console, *, domains: Sequence[str] = ()) -> None:
    """Names what was written and the next commands to type.

    Args:
        domains: of the result; those that the router serves most by themselves first.
    """
    console.print(Text("Written:", style="bold"))
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        console.print(Text(printable(f"  {path}{'/' if path.is_dir() else ''}")), soft_wrap=True)
    if (folder / "trace").is_dir():
        start, trace = program(), shell([folder / "trace"])
        console.print(Text("Next: score the same recording again, or as an ideal or a random router would have routed it:", style="bold"))
        console.print(Text(f"  {start} score {trace} --seed 1\n  {start} score {trace} --router uniform"), soft_wrap=True)
        if domains:
            path = shell(["--domain", domains[0], "--out", "paths.json"])
            console.print(Text(f"The experts that serve a domain (here {printable(domains[0])}), to train only these:", style="bold"))
            console.print(Text(f"  {start} paths {shell([folder])} {path}"), soft_wrap=True)
        console.print(Text("Your own model, a folder or a hub id in place of MODEL:", style="bold"))
        console.print(Text(f"  {start} doctor MODEL && {start} evaluate --model MODEL"), soft_wrap=True)


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
    line = Text.assemble((label(model.name, 120), "bold"), f"  {counted(len(model.layers), 'MoE layer')} ({shape})")
    if model.dtype:
        line.append(f", {label(model.dtype, 20)}")
    line.append(f"\n{label(task.name)} task: {counted(len(task.domains), 'domain')}")
    if recording is not None:
        read = counted(recording.documents, "document") if result.documents_known else "documents unknown"
        line.append(f", {read}, {counted(recording.tokens, 'token')}")
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
        specialization = found.get(("specialization", layer))
        used = utilization.get(str(layer)) if layer is not None else result.companions.get("model", {}).get("utilization")
        table.add_row(
            "mean" if layer is None else str(layer),
            *(_score(result, found.get((metric, layer))) for metric, _ in COLUMNS),
            p_cell(math.nan if specialization is None else specialization.p),
            share(None if specialization is None else specialization.control),
            share(used),
        )
    return table


def _domain_table(result: Result) -> Table:
    found = {(record.metric, record.domain): record for record in result.calibrated if record.layer is None}
    table = Table(title="Domains (means over layers)", title_justify="left", title_style="italic", header_style="bold")
    table.add_column("Domain")
    for heading in ("Documents", "Sources", "Tokens", "Specialization", "Isolation", "N-gram (n=2)", "p", "Random router", "Specialists"):
        table.add_column(heading, justify="right")
    counts = result.companions.get("specialists", {}).get("by_domain", {})
    shown = labels(result.task.domains, DOMAIN_WIDTH)
    for domain, facts in result.task.domains.items():
        specialization = found.get(("specialization", domain))
        table.add_row(
            Text(shown[domain]),
            f"{facts.documents:,}" if result.documents_known else "–",
            f"{facts.sources:,}" if result.documents_known else "–",
            f"{facts.tokens:,}",
            _score(result, specialization),
            _score(result, found.get(("domain_isolation", domain))),
            _score(result, found.get(("ngram_expertise_2", domain))),
            p_cell(math.nan if specialization is None else specialization.p),
            share(None if specialization is None else specialization.control),
            f"{counts[domain]:,}" if domain in counts else "",
        )
    return table


def _specialist_table(result: Result) -> Table:
    counts = result.companions.get("specialists", {})
    title = (
        f"Specialists: {counts.get('specialists', len(result.specialists)):,} of {counts.get('tests', 0):,} (layer, expert, domain) tests "
        f"at 5 % false discoveries, in both halves of the documents; the strongest {SPECIALISTS_PER_DOMAIN} of each domain"
    )
    if cannot_tell(result):
        title += f". {DOUBTFUL}"
    table = Table(title=title, title_justify="left", title_style="italic", header_style="bold")
    for heading in ("Domain", "Layer", "Expert", "Lift", "95 % interval", "Share", "q"):
        table.add_column(heading, justify="left" if heading == "Domain" else "right")
    table.add_column("Typical tokens", overflow="fold")
    shown = labels(result.task.domains, DOMAIN_WIDTH)
    for specialist in _strongest(result.specialists, result.task.domains):
        table.add_row(
            Text(shown[specialist.domain]),
            str(specialist.layer),
            str(specialist.expert),
            f"{specialist.lift:.2f}",
            f"{specialist.lift_low:.2f} – {specialist.lift_high:.2f}",
            share(specialist.share),
            p_cell(specialist.q),
            Text("  ".join(visible(token) for token in specialist.tokens)),
        )
    return table


def _strongest(specialists: Iterable[Specialist], domains: Iterable[str]) -> list[Specialist]:
    ranked = list(specialists)
    return [each for domain in domains for each in [one for one in ranked if one.domain == domain][:SPECIALISTS_PER_DOMAIN]]


def _footnotes(result: Result) -> Text:
    lines = [
        "0 % is what shuffling the documents' domain labels gives, 100 % a router that gives each domain experts of its own; "
        f"{_marks(result)}. Random router: the same score for a frozen random router on the same hidden states.",
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


def _marks(result: Result) -> str:
    """What the marks before scores mean; a test that nothing could have passed says nothing against a router."""
    above = f"· marks scores not above chance (p > {SIGNIFICANCE})"
    if cannot_tell(result):
        return f"{above}; ? marks scores that could not be told from chance, whatever the router does ({why_not(result)})"
    metrics = [metric for metric, _ in COLUMNS]
    if any(cannot_tell(result, metric, domain) for metric in metrics for domain in (None, *result.task.domains)):
        return f"{above}, ? those of which too few texts can tell nothing (smallest possible p above {SIGNIFICANCE})"
    return above


def _score(result: Result, record: CalibratedRecord | None) -> Text:
    if record is None or math.isnan(record.score):
        return Text("–", style="dim")
    # digits beyond the first decimal say nothing where the score may as well be chance
    score = round(record.score, 3) if record.p > SIGNIFICANCE else record.score
    text = share(score) + plus_minus(record.score_low, record.score_high)
    if math.isnan(record.p):
        return Text(text)
    if cannot_tell(result, record.metric, record.domain):
        return Text(f"? {text}", style="dim")
    if record.p > SIGNIFICANCE:
        return Text(f"· {text}", style="dim")
    return Text(text, style="green" if record.score >= 0.25 else "cyan" if record.score >= 0.05 else "yellow")
