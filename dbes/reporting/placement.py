"""A placement or a pruning in words and tables: in the terminal, as JSON, and as a page without scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from dbes.paths.placement import DomainPlacement, Estimate, Placement
from dbes.reporting.agreement import plain_table, without_nan
from dbes.reporting.html import render
from dbes.text import json_text, legible
from dbes.wording import UNKNOWN, counted, share, shares

if TYPE_CHECKING:
    from dbes.comparison.pruning import Pruned, Pruning

FINDINGS = {
    "unknown": "unknown",
    "none": "no exploitable skew",
    "load": "skew, overall load not shown to be worse",
    "domain": "skew of this domain",
}
AGAINST = {"better": "better than by", "worse": "worse than by", "no difference": "not told apart from"}
PLACED = ("Domain", "Texts", "Unseen texts", "Gain", "95 % interval", "Domain over load", "95 % interval", "Finding")
ELSEWHERE = ("Other domain", "Its slots covered", "95 % interval", "Lost to its own choice", "95 % interval")
ARMS = ("Kept by", "Added in {}", "95 % interval", "Added elsewhere, mean", "Domain load minus this", "interval", "Domain load is")
NAME = 60


@dataclass(frozen=True, kw_only=True)
class Table:
    title: str
    headings: tuple[str, ...]
    rows: list[list[str]]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What every form shows."""

    title: str
    words: list[str]
    tables: list[Table]
    notes: list[str]


def shown(found: Placement | Pruning) -> Shown:
    """What a placement or a pruning says, for a reader."""
    return _placement(found) if isinstance(found, Placement) else _pruning(found)


def render_terminal(found: Placement | Pruning) -> RenderableType:
    """For ``Console.print``."""
    said = shown(found)
    parts: list[RenderableType] = [Text(said.title, style="bold"), *map(Text, said.words)]
    parts += [plain_table(table.title, table.headings, table.rows) for table in said.tables]
    return Group(*parts, *(Text(f"Note: {note}", style="dim") for note in said.notes))


def as_json(found: Placement | Pruning) -> str:
    """Everything, with null for what is unknown, and the findings."""
    content: dict[str, Any] = asdict(found)
    if isinstance(found, Placement):
        _with_findings(found, content)
    else:
        for each, one in zip(found.budgets, content["budgets"], strict=True):
            _with_findings(each.placement, one["placement"])
            for arm, told in zip(each.arms, one["arms"], strict=True):
                told["finding"] = arm.finding
    return json_text(json.dumps(without_nan(content), indent=1, ensure_ascii=False, allow_nan=False)) + "\n"


def render_page(found: Placement | Pruning) -> str:
    """The HTML. The same recording gives the same bytes."""
    said = shown(found)
    return render("placement.html", title=said.title, shown=said)


def _with_findings(found: Placement, content: dict[str, Any]) -> None:
    for domain, told in zip(found.domains, content["domains"], strict=True):
        told["finding"] = domain.finding


def words(found: Placement, each: DomainPlacement) -> list[str]:
    """What a domain's placement shows, a sentence each, the main thing first."""
    name = legible(each.domain, NAME)
    if each.finding == "unknown":
        return [f"Nothing can be said about unseen texts of {name}: {each.reason or 'too few texts'}."]
    where = "wherever they lie" if found.allocation == "global" else "of every layer"
    kept = f"the {share(each.uniform)} of the experts ({where}) that other texts of {name} use most"
    took = f"{_told(each.covered)} of the slots of its unseen texts"
    bounds = f"as many at random take {share(each.uniform)}, the best {share(each.oracle)}"
    if each.finding == "none":
        return [f"No exploitable skew: {kept} take {took}; {bounds}. The gain is {_told(each.gain)}, which does not exclude none."]
    lines = [f"Skew: {kept} take {took}; {bounds}. That is {_told(each.gain)} of what can be gained."]
    if math.isnan(each.knowing.value):
        return [*lines, f"{(each.reason or 'too few texts').capitalize()}."]
    by_load = f"experts chosen by the load of all domains take {share(each.by_load.value)}"
    points = f"{share(each.knowing.value, sign=True)}{_interval(each.knowing, sign=True)}"
    if each.finding == "domain":
        return [*lines, f"Knowing the domain helps: {by_load}, the domain's own {points} more."]
    return [*lines, f"That knowing the domain helps is not shown: {by_load}; the domain's own add {points}."]


def _placement(found: Placement) -> Shown:
    size = f"{counted(found.chosen, 'expert')} of {found.cells:,}"
    left_out = "text" if found.groups is None else "group of texts"
    notes = [
        f"Chosen by {found.folds - 1} of {found.folds} parts of a domain's texts and measured on the other, in turn. Gain: 0 as experts at "
        f"random, 1 as if the unseen texts had chosen. Intervals leave out one {left_out} at a time.",
        *(f"{legible(each.domain, NAME)}: {each.reason}" for each in found.domains if each.reason),
    ]
    if len(found.domains) == 1:
        each = found.domains[0]
        seen = f"On the very texts that chose they take {share(each.seen)}, which says nothing about others."
        title, rows = f"{legible(found.model, NAME)}, {size}, for {legible(each.domain, NAME)}", list(_elsewhere(each))
        tables = [Table(title="The same experts for other domains", headings=ELSEWHERE, rows=rows)] if rows else []
        return Shown(title=title, words=[*words(found, each), seen], tables=tables, notes=notes)
    skewed = [each for each in found.domains if each.finding in ("load", "domain")]
    own = [each for each in skewed if each.finding == "domain"]
    if all(each.finding == "unknown" for each in found.domains):
        lines = ["Nothing can be said about unseen texts."]
    elif skewed:
        lines = [
            f"{len(skewed)} of {counted(len(found.domains), 'domain')} have a skew that serves their unseen texts; in {len(own)} knowing "
            "the domain covers more than the load of all domains does."
        ]
    else:
        lines = [f"No exploitable skew in any of {counted(len(found.domains), 'domain')}."]
    lines.append("All intervals of a column hold together with 95 % (Bonferroni).")
    rows = [
        [
            legible(each.domain, NAME), f"{each.texts:,}", share(each.covered.value), share(each.gain.value),
            shares(each.gain.low, each.gain.high), share(each.knowing.value, sign=True),
            shares(each.knowing.low, each.knowing.high, sign=True), FINDINGS[each.finding],
        ]
        for each in found.domains
    ]  # fmt: skip
    title = f"Slots of unseen texts covered by the domain's experts; {share(found.domains[0].uniform)} at random"
    table = Table(title=title, headings=PLACED, rows=rows)
    return Shown(title=f"{legible(found.model, NAME)}, {size}", words=lines, tables=[table], notes=notes)


def _elsewhere(each: DomainPlacement) -> Iterable[list[str]]:
    for name, other in each.elsewhere.items():
        covered, lost = other.covered, other.lost
        ends = shares(covered.low, covered.high), shares(lost.low, lost.high, sign=True)
        yield [legible(name, NAME), share(covered.value), ends[0], share(lost.value, sign=True), ends[1]]


def _pruning(found: Pruning) -> Shown:
    name = legible(found.domain, NAME)
    lines, tables = [], []
    for each in found.budgets:
        own = each.arms[0]
        kept = f"{each.placement.chosen:,} of {each.placement.cells:,} experts"
        told = [f"{AGAINST[str(arm.finding)]} {arm.name} ({_bits(arm.less)})" for arm in each.arms if arm.less is not None]
        cost = f"{kept} kept by the load of {name}: {_bits(own.added[found.domain])} bits per byte on its unseen texts"
        lines.append(f"{cost}. That is {'; '.join(told)}.")
        covered = each.placement[found.domain].covered
        title = f"{kept}; they take {_told(covered)} of the slots of unseen texts of {name}. Bits per byte"
        tables.append(Table(title=title, headings=tuple(each.format(name) for each in ARMS), rows=list(_arms(found, each))))
    rows = [
        [legible(other, NAME), f"{found.texts[other]:,}", f"{whole:.4f}", *(_bits(each.arms[0].added[other]) for each in found.budgets)]
        for other, whole in found.bits_per_byte.items()
    ]
    columns = tuple(f"added at {each.placement.chosen:,}" for each in found.budgets)
    headings = ("Domain", "Texts read", "Bits per byte, whole model", *columns)
    tables.append(Table(title=f"All domains with the experts kept for {name}", headings=headings, rows=rows))
    notes = [
        f"{counted(found.chosen_by, 'text')} of {name} chose; other texts were read with the dropped experts masked in the routers, so "
        "that as many run for every token as before. Intervals are over the texts read, given what was chosen; those between choices hold "
        "together with 95 %.",
        *(legible(note, 600) for note in found.notes),
    ]
    return Shown(title=f"{legible(found.model, NAME)}, pruned for {name}", words=lines, tables=tables, notes=notes)


def _arms(found: Pruning, each: Pruned) -> Iterable[list[str]]:
    for arm in each.arms:
        own = arm.added[found.domain]
        others = [added.value for other, added in arm.added.items() if other != found.domain]
        mean = f"{sum(others) / len(others):+.4f}" if others else UNKNOWN
        less = ["", "", ""] if arm.less is None else [f"{arm.less.value:+.4f}", _ends(arm.less), str(arm.finding)]
        yield [arm.name, f"{own.value:+.4f}", _ends(own), mean, *less]


def _bits(value: Estimate) -> str:
    ends = _ends(value)
    return f"{value.value:+.4f}" + ("" if ends == UNKNOWN else f" ({ends})")


def _ends(value: Estimate) -> str:
    return f"{value.low:+.4f} to {value.high:+.4f}" if math.isfinite(value.low) else UNKNOWN


def _told(value: Estimate) -> str:
    return share(value.value) + _interval(value)


def _interval(value: Estimate, *, sign: bool = False) -> str:
    ends = shares(value.low, value.high, sign=sign)
    return "" if ends == UNKNOWN else f" ({ends})"
