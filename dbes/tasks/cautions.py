"""What about a benchmark can pass for a difference between domains, or for evidence: few texts, unlike lengths or formats, copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median

from dbes.tasks.documents import Document
from dbes.wording import counted

FEW_TEXTS = 8
"""Source texts of a domain below which intervals were seen to fail and no test of the domain alone can find anything."""

LENGTHS = 3.0
"""Median length of a domain relative to the shortest one from which length and position alone can give a score."""

MOST, FEW = 0.9, 0.1
"""Shares of a domain's texts that have a feature which makes a format: nearly all, hardly any."""

NAMED = 6
"""Domains that one line names at most."""

BEGINNING = 8
"""Characters that texts of one template have in common."""

Cautions = Mapping[str, Mapping[str, str]]
"""For each kind of caution what it means, and of each domain it is of what was seen there."""


def cautions(documents: Sequence[Document]) -> Cautions:
    """What a reader should know of the texts before believing a score; kinds that were not found are left out.

    Args:
        documents: of all domains; texts without a source stand for themselves.
    """
    by_domain: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        by_domain[document.domain].append(document)
    sources = {domain: len({each.source_document or _words(each) for each in own}) for domain, own in by_domain.items()}
    named = {domain for domain, own in by_domain.items() if sources[domain] == 1 < len(own)}
    found = {
        f"fewer than {FEW_TEXTS} source texts, too few for intervals": {
            domain: str(count) for domain, count in sources.items() if count < FEW_TEXTS and domain not in named
        },
        "one source text only, no interval and no test": {domain: _alone(by_domain[domain]) for domain in sorted(named)},
        "texts of one collection only, whose style can pass for the domain": _one_collection(by_domain),
        f"texts more than {LENGTHS:g} times as long as those of another domain; compare with `dbes score --match length`": _long(by_domain),
        "another format than other domains, which a router can follow": _formats(by_domain),
        "texts that are also in another domain": _shared(by_domain),
        "texts that are there more than once, copies are no further evidence": _repeated(by_domain),
    }
    return {kind: domains for kind, domains in found.items() if domains}


def caution_lines(found: Cautions) -> list[str]:
    """A line for each kind, with the domains it is of; of more than `NAMED` domains the first ones and how many more."""
    lines = []
    for kind, domains in found.items():
        told = [f"{domain} ({seen})" for domain, seen in domains.items()]
        more = [f"and {len(told) - NAMED} domains more"] if len(told) > NAMED else []
        lines.append(f"{kind}: {', '.join([*told[:NAMED], *more])}")
    return lines


def by_domain(found: Cautions) -> dict[str, list[str]]:
    """The same for each domain that has any, to stand beside it."""
    told: dict[str, list[str]] = defaultdict(list)
    for kind, domains in found.items():
        for domain, seen in domains.items():
            told[domain].append(f"{kind} ({seen})")
    return dict(told)


def _words(document: Document) -> str:
    """A text without regard to its white space; copies of it are one source, as in a recording."""
    return " ".join(document.text.split())


def _alone(documents: Sequence[Document]) -> str:
    """How a domain of one source is made up."""
    count = len(documents)
    return f"{count:,} copies of a text" if len({_words(each) for each in documents}) == 1 else counted(count, "document")


def _one_collection(documents: Mapping[str, list[Document]]) -> dict[str, str]:
    """Domains whose texts all name the same collection, in a benchmark in which another domain has several."""
    names = {domain: {each.source for each in own} for domain, own in documents.items()}
    if not any(len(own - {None}) > 1 for own in names.values()):
        return {}
    return {domain: str(next(iter(own))) for domain, own in names.items() if len(own) == 1 and None not in own}


def _long(documents: Mapping[str, list[Document]]) -> dict[str, str]:
    length = {domain: median(len(each.text) for each in own) for domain, own in documents.items()}
    shortest = min(length, key=length.__getitem__)
    return {
        domain: f"median {own:,.0f} characters, {shortest} {length[shortest]:,.0f}"
        for domain, own in length.items()
        if own > LENGTHS * length[shortest]
    }


def _formats(documents: Mapping[str, list[Document]]) -> dict[str, str]:
    """Domains whose texts all have line breaks where those of others have none, or the reverse, the fewer of both; and that begin alike."""
    lines = {domain: sum("\n" in each.text.strip() for each in own) / len(own) for domain, own in documents.items()}
    having, without = ({domain for domain, share in lines.items() if keep(share)} for keep in (lambda s: s >= MOST, lambda s: s <= FEW))
    seen: dict[str, list[str]] = defaultdict(list)
    for domain, own in documents.items():
        if domain in having and 0 < len(without) >= len(having):
            seen[domain].append("line breaks")
        elif domain in without and 0 < len(having) > len(without):
            seen[domain].append("no line breaks")
        begins = [each.text.lstrip()[:BEGINNING] for each in own]
        common = max(set(begins), key=begins.count)
        if len(own) >= FEW_TEXTS and begins.count(common) >= MOST * len(own):
            seen[domain].append(f"texts begin with {common!r}")
    return {domain: "; ".join(words) for domain, words in seen.items()}


def _shared(documents: Mapping[str, list[Document]]) -> dict[str, str]:
    texts = {domain: {each.text.strip() for each in own} for domain, own in documents.items()}
    found = {}
    for domain, own in texts.items():
        others = {other: len(own & theirs) for other, theirs in texts.items() if other != domain and own & theirs}
        if others:
            found[domain] = ", ".join(f"{count:,} in {other}" for other, count in others.items())
    return found


def _repeated(documents: Mapping[str, list[Document]]) -> dict[str, str]:
    copies = {domain: len(own) - len({each.text.strip() for each in own}) for domain, own in documents.items()}
    return {domain: f"{count:,} of {len(documents[domain]):,}" for domain, count in copies.items() if count}
