"""A result in the terminal: no mark and no number says more than was measured."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from report_results import simulated_trace
from rich.console import Console

from dbes.reporting.card import card_section
from dbes.reporting.page import render_page
from dbes.reporting.terminal import render
from dbes.results import RecordingFacts, Result
from dbes.scoring.score import score
from dbes.trace.store import Trace


def printed(result: Result, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(render(result))
    return out.getvalue()


def shown(result: Result) -> str:
    return " ".join(printed(result, 200).split())


@pytest.mark.parametrize(("documents", "least"), [(1, "1"), (3, "0.1")])
def test_where_nothing_can_be_told_every_form_says_so_and_calls_nothing_chance(documents: int, least: str) -> None:
    result = score(simulated_trace(documents=documents, domains=("law", "code"), lean=1.0, layers=2), permutations=200)
    why = f"ew texts to tell; the smallest possible p is {least}"
    page = render_page(result)
    for text in (shown(result), card_section(result), page):
        assert why in text
        assert "No specialization" not in text and "is above chance" not in text and "strongest for" not in text
    if documents > 1:  # of one text a domain there is no score at all
        assert "? marks scores that could not be told from chance" in shown(result) and "│ ? " in shown(result)
    assert 'class="not">not above chance' not in page.split("N-gram")[0]


def test_an_older_result_is_told_anew_where_its_texts_were_too_few() -> None:
    result = score(simulated_trace(documents=1, domains=("law", "code"), layers=2), permutations=200)
    older = result.model_copy(update={"verdict": "No specialization: 0.0% of the ideal router's."})
    for text in (shown(older), card_section(older), render_page(older)):
        assert "No specialization" not in text and "oo few texts to tell" in text


def test_marks_stay_where_there_are_texts_enough() -> None:
    result = score(simulated_trace(documents=8, domains=("law", "code"), lean=0.0, layers=2), permutations=200)
    assert "· marks scores not above chance (p > 0.05)" in shown(result) and "texts to tell" not in shown(result)


def test_one_of_anything_is_singular_and_nothing_is_nan() -> None:
    made = Trace.from_arrays(
        np.array([[[0, 1]], [[2, 3]]]), document=[0, 1], domain=[0, 1], domains=("a", "b"), layers=[7], experts=4, token_ids=[1, 2]
    )
    result = score(made, permutations=20)
    text = shown(result)
    assert "1 MoE layer (" in text and "2 documents, 2 tokens" in text
    for form in (text, card_section(result)):
        assert "nan%" not in form and "nan " not in form and "[nan" not in form and "-0.0%" not in form and "1 layers" not in form


def test_80_columns_cut_no_number() -> None:
    names = ("software_engineering", "law", "a domain with a rather long name", "code")
    result = score(simulated_trace(domains=names, lean=0.8), permutations=200)
    wide, narrow = printed(result, 200), printed(result, 80)
    assert max(map(len, narrow.splitlines())) <= 80 and "…" not in narrow
    numbers = [[word for word in text.replace("│", " ").replace("┃", " ").split() if word[0].isdigit()] for text in (wide, narrow)]
    assert sorted(numbers[0]) == sorted(numbers[1])


def test_the_terminal_and_the_card_lead_with_what_the_score_means() -> None:
    result = score(simulated_trace(), permutations=200)
    text, card = shown(result), card_section(result)
    assert text.index("verdict") < text.index("Layers: specialization")
    assert "Random router" in text and "Word, Position: share of the score" in text and "(chance 25.0%, from its words " in text
    assert "| Size | moderate |" in card and "| Share of the word | 0% (of the 100.0% of tokens" in card
    assert "| Domain of an unseen text named | 100.0% (chance 25.0%, from its words" in card


def test_without_token_ids_the_share_of_the_word_is_unknown_everywhere() -> None:
    trace = simulated_trace()
    bare = replace(trace, loaded=tuple(replace(part, token_ids=None) for part in trace), control=None)
    result = score(bare, permutations=200)
    for text in (shown(result), card_section(result), render_page(result)):
        assert "the share of the word is unknown: the recording has no token ids" in text


def test_what_was_read_layer_by_layer_is_told() -> None:
    result = score(simulated_trace(), permutations=20)
    facts = RecordingFacts(documents=2, tokens=3, engine="streaming", bytes_read=5_263_360, bytes_skipped=1_572_864)
    told = shown(result.model_copy(update={"recording": facts}))
    assert "Layers read from disk one at a time: 5.26 MB of weights, 1.57 MB were not needed" in told
    assert "from disk" not in shown(result)
