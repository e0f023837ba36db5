"""A result in the terminal: verdict, a row per layer, a row per domain, the strongest specialists."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group, RenderableType, RenderHook, RenderResult
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from dbes.reporting import measures
from dbes.reporting.commands import program, shell
from dbes.reporting.phases import HEADINGS, TITLE, answer_note, answer_rows
from dbes.reporting.strata import strata_rows, strata_tables
from dbes.results import CalibratedRecord, Result, Specialist
from dbes.scoring.portions import share_of_position, share_of_word, word_unknown
from dbes.scoring.resolution import DOUBTFUL, SIGNIFICANCE, cannot_tell, why_not
from dbes.scoring.verdict import current_verdict
from dbes.text import label, labels, printable
from dbes.wording import UNKNOWN, byte_count, counted, p_cell, plus_minus, portion, share

FURTHER = (
    ("der", "Effective rank"),
    ("domain_isolation", "Isolation"),
    ("stiffness", "Stiffness"),
    ("ngram_expertise_2", "N-gram (n=2)"),
)
"""Metric and heading, in the order of the table of further metrics."""

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
    parts: list[RenderableType] = [_heading(result), Panel(Text(current_verdict(result)), title="verdict", border_style="bold")]
    tables = (_layer_table(result), _further_table(result), *([_own_table(result)] if result.own_metrics else []), _domain_table(result))
    parts += [_told(table) for table in tables]
    strata = [part for rows in strata_rows(result) for part in strata_tables(rows)]
    parts += [_told(part) if isinstance(part, Table) else part for part in strata]
    if rows := answer_rows(result):
        table = _table(TITLE, *HEADINGS)
        for row in rows:
            table.add_row(*row)
        parts += [table, Text(answer_note(result), style="dim")]
    if result.specialists:
        parts.append(_specialist_table(result))
    parts += _measures(result)
    parts.append(_footnotes(result))
    return Group(*parts)


def render_paths(folder: Path, console: Console, *, specialists: Mapping[str, int] | None = None) -> None:
    """Names what was written and the next commands to type.

    Args:
        specialists: of each domain, how many; a domain without one has no path to look for.
    """
    console.print(Text("Written:", style="bold"))
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        console.print(Text(printable(f"  {path}{'/' if path.is_dir() else ''}")), soft_wrap=True)
    if (folder / "trace").is_dir():
        start, trace = program(), shell([folder / "trace"])
        console.print(Text("Next: score the same recording again, or as an ideal or a random router would have routed it:", style="bold"))
        console.print(Text(f"  {start} score {trace} --seed 1\n  {start} score {trace} --router uniform"), soft_wrap=True)
        domain = max(specialists, key=specialists.__getitem__) if specialists and any(specialists.values()) else None
        if domain is not None:
            path = shell(["--domain", domain, "--out", "paths.json"])
            console.print(Text(f"The experts that serve a domain (here {printable(domain)}), to train only these:", style="bold"))
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
        if recording.bytes_read is not None:
            unread = byte_count(recording.bytes_skipped or 0)
            line.append(f"\nLayers read from disk one at a time: {byte_count(recording.bytes_read)} of weights, {unread} were not needed")
    return line


def _table(title: str, first: str, *headings: str) -> Table:
    """A table that fits into 80 columns without cutting a number: headings take a line a word, and names of domains are folded."""
    table = Table(title=title, title_justify="left", title_style="italic", header_style="bold", padding=(0, 0, 0, 1))
    table.add_column(first, justify="right" if first == "Layer" else "left", overflow="fold")
    for heading in headings:
        table.add_column("\n".join(heading.split()), justify="right", no_wrap=True)
    return table


def _told(table: Table) -> Table:
    """The table without the columns that tell nothing in any row."""
    first, *others = table.columns
    told = [column for column in others if any(str(cell) not in (UNKNOWN, "") for cell in column.cells)]
    table.columns = [replace(column, _index=place) for place, column in enumerate([first, *told])]
    return table


def _score_heading(result: Result) -> str:
    """Without documents there is no chance level, and so no score."""
    return "Score" if result.documents_known else "Value (nats)"


def _layer_table(result: Result) -> Table:
    found = {(record.metric, record.layer): record for record in result.calibrated if record.domain is None}
    decoding = result.companions.get("decoding", {})
    title = "Layers: specialization ± half of the 95 % interval, in % of the ideal domain router"
    if not result.documents_known:
        title = "Layers: specialization"
    table = _table(title, "Layer", _score_heading(result), "p", "Random router", "Word", "Position", "Domain named")
    for layer in (*result.model.layers, None):
        if layer is None:
            table.add_section()
        record = found.get(("specialization", layer))
        named = decoding.get("by_layer", {}).get(str(layer), {}) if layer is not None else decoding.get("model", {})
        place = UNKNOWN if record is None else portion(share_of_position(record))
        table.add_row("all" if layer is None else str(layer), *_explained(result, record), place, share(named.get("accuracy")))
    return table


def _explained(result: Result, record: CalibratedRecord | None) -> tuple[Text | str, ...]:
    """Score, p, what the random router shows, and the share of the word."""
    if record is None:
        return (UNKNOWN,) * 4
    return _score(result, record), p_cell(record.p), share(record.control), portion(share_of_word(record))


def _further_table(result: Result) -> Table:
    found = {(record.metric, record.layer): record for record in result.calibrated if record.domain is None}
    table = _table("Layers: further metrics", "Layer", *(heading for _, heading in FURTHER), "Load used")
    utilization = result.companions.get("by_layer", {}).get("utilization", {})
    for layer in (*result.model.layers, None):
        if layer is None:
            table.add_section()
        used = utilization.get(str(layer)) if layer is not None else result.companions.get("model", {}).get("utilization")
        scores = (_score(result, found.get((metric, layer))) for metric, _ in FURTHER)
        table.add_row("mean" if layer is None else str(layer), *scores, share(used))
    return table


def _own_table(result: Result) -> Table:
    """Every metric of the user's own: its value and, where it has a bound, its score."""
    found = {(record.metric, record.layer): record for record in result.calibrated if record.domain is None}
    parts = {name: ("value",) if own.bound is None else ("value", "score") for name, own in result.own_metrics.items()}
    headings = [f"{label(own.title, 24)} {part}" for name, own in result.own_metrics.items() for part in parts[name]]
    table = _table("Layers: metrics of your own", "Layer", *headings)
    for layer in (*result.model.layers, None):
        if layer is None:
            table.add_section()
        cells = [_value(each) if part == "value" else _score(result, each) for name in parts for each in [found.get((name, layer))]
                 for part in parts[name]]  # fmt: skip
        table.add_row("mean" if layer is None else str(layer), *cells)
    return table


def _domain_table(result: Result) -> Table:
    found = {(record.metric, record.domain): record for record in result.calibrated if record.layer is None}
    table = _table(
        "Domains: specialization, means over layers",
        *("Domain", "Sources", "Tokens", _score_heading(result), "p", "Random router", "Word", "Specialists"),
    )
    counts = result.companions.get("specialists", {}).get("by_domain", {})
    shown = labels(result.task.domains, DOMAIN_WIDTH)
    for domain, facts in result.task.domains.items():
        table.add_row(
            Text(shown[domain]),
            f"{facts.sources:,}" if result.documents_known else UNKNOWN,
            f"{facts.tokens:,}",
            *_explained(result, found.get(("specialization", domain))),
            f"{counts[domain]:,}" if domain in counts and result.documents_known else "",
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
    table = _table(title, "Domain", "Layer", "Expert", "Lift", "95 % interval", "Share", "q")
    table.add_column("Typical tokens", overflow="fold")
    shown = labels(result.task.domains, DOMAIN_WIDTH)
    for specialist in _strongest(result.specialists, result.task.domains):
        table.add_row(
            Text(shown[specialist.domain]),
            str(specialist.layer),
            str(specialist.expert),
            f"{specialist.lift:.2f}",
            f"{specialist.lift_low:.2f}–{specialist.lift_high:.2f}",
            share(specialist.share),
            p_cell(specialist.q),
            Text("  ".join(visible(token) for token in specialist.tokens)),
        )
    return table


def _strongest(specialists: Iterable[Specialist], domains: Iterable[str]) -> list[Specialist]:
    ranked = list(specialists)
    return [each for domain in domains for each in [one for one in ranked if one.domain == domain][:SPECIALISTS_PER_DOMAIN]]


def _measures(result: Result) -> list[RenderableType]:
    """Loss and accuracy by domain, and what masking the specialists did."""
    shown, parts = labels(result.task.domains, DOMAIN_WIDTH), list[RenderableType]()
    tables = (
        ("Loss and accuracy", *measures.beside_table(result, shown)),
        ("Bits per byte added by masking a domain's specialists", measures.ABLATION, measures.ablation_rows(result, shown)),
    )
    for title, headings, rows in tables:
        if rows:
            table = _table(title, *headings)
            for name, *cells in rows:
                table.add_row(Text(name), *cells)
            parts.append(table)
    verdicts = measures.ablation_verdicts(result, shown)
    told = [*measures.measure_notes(result), *([measures.METHOD] if len(verdicts) > 1 else [])]
    parts += [Text("\n".join(verdicts))] if verdicts else []
    return [*parts, Text("\n".join(told), style="dim")] if told else parts


def _footnotes(result: Result) -> Text:
    lines = [
        "A score of 0 % is a router that says nothing about the domain, 100 % one that gives each domain experts of its own; "
        f"{_marks(result)}. Random router: mean score of the recorded frozen random routers on the same hidden states.",
        _word_note(result),
        "Domain named: how often the domain of an unseen text is named from its routing at the layer, or at all layers together"
        f"{_chance_note(result)}.",
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


def _word_note(result: Result) -> str:
    note = "Word, Position: share of the score that a router shows which looks at the token alone, or at its place in the text alone"
    try:
        unknown = math.isnan(result.record("specialization").lexical)
    except KeyError:
        return f"{note}."
    return f"{note}; the share of the word is unknown: {word_unknown(result)}." if unknown else f"{note}."


def _chance_note(result: Result) -> str:
    model = result.companions.get("decoding", {}).get("model", {})
    chance, words = model.get("chance"), model.get("bag_of_words")
    if chance is None:
        return ""
    return f" (chance {share(chance)}" + ("" if words is None else f", from its words {share(words)}") + ")"


def _marks(result: Result) -> str:
    """What the marks before scores mean; a test that nothing could have passed says nothing against a router."""
    above = f"· marks scores not above chance (p > {SIGNIFICANCE})"
    if cannot_tell(result):
        return f"{above}; ? marks scores that could not be told from chance, whatever the router does ({why_not(result)})"
    metrics = ["specialization", *(metric for metric, _ in FURTHER)]
    if any(cannot_tell(result, metric, domain) for metric in metrics for domain in (None, *result.task.domains)):
        return f"{above}, ? those of which too few texts can tell nothing (smallest possible p above {SIGNIFICANCE})"
    return above


def _value(record: CalibratedRecord | None) -> str:
    return UNKNOWN if record is None or math.isnan(record.value) else f"{record.value:.4g}"


def _score(result: Result, record: CalibratedRecord | None) -> Text:
    if record is None or math.isnan(record.score):
        if record is None or result.documents_known or math.isnan(record.value):
            return Text(UNKNOWN, style="dim")
        return Text(f"{record.value:.4f}", style="dim")
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
