"""The pages in a real headless Chromium: they open offline and silently, every control works, nothing hostile runs.

Needs Debian's chromium and axe-core; ``make browser`` fetches both. Their absence is an error, not a skip.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from report_results import HOSTILE, counted_domains, simulated_trace, write_result
from test_report_intervention import made, made_with_items

from dbes.comparison.compare import compare
from dbes.reporting.html import unpacked
from dbes.reporting.leaderboard import render_leaderboard
from dbes.reporting.outcome import Outcome
from dbes.reporting.outcome_page import render_outcome
from dbes.reporting.page import write_page
from dbes.testbed import report as testbed_report
from dbes.testbed.experiments import Findings, Verdict

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parent.parent.parent
AXE = ROOT / "build" / "axe" / "package" / "axe.min.js"
SHOTS = ROOT / "build" / "screenshots"
READY = "document.documentElement.dataset.ready === 'yes'"


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    assert path is not None, "chromium is not installed: make browser"
    assert AXE.is_file(), f"{AXE} is missing: make browser"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def closed_afterwards(chromium):
    """Pages that stay open go on drawing, and slow the pages of later tests down."""
    yield
    for context in chromium.contexts:
        context.close()


@pytest.fixture(scope="module")
def model_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(write_result(tmp_path_factory.mktemp("model"), simulated_trace()))


@pytest.fixture(scope="module")
def counts_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(counted_domains(tmp_path_factory.mktemp("counts"), 30))


@pytest.fixture(scope="module")
def leaderboard_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leaderboard")
    for seed, (lean, family, experts) in enumerate(((0.1, "olmoe", 16), (0.4, "mixtral", 16), (0.7, "olmoe", 32))):
        trace = simulated_trace(seed, lean=lean, model=f"model-{seed}", family=family, experts=experts, generated=seed < 2)
        for phase in (None, 0, 1) if seed < 2 else (None,):
            write_result(folder / f"{seed}-{phase}", trace, keep_trace=False, permutations=20, phase=phase)
    accuracies = folder / "arc.csv"
    accuracies.write_text("model,accuracy\nmodel-0,0.41\nmodel-1,0.412\n", "utf-8")
    page = folder / "leaderboard.html"
    page.write_text(render_leaderboard(compare([folder], accuracy=[accuracies])), "utf-8")
    return page


@pytest.fixture(scope="module")
def testbed_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arms = [f"{method}/global_batch/a third of other domains" for method in ("aux_loss", "sinkhorn", "a<b")]
    table = pd.DataFrame(
        {"arm": arms, "seeds": 3, "specialization": [0.1, 0.2, 0.4], "specialization_low": [0.05, 0.1, 0.3],
         "specialization_high": [0.15, 0.3, 0.5], "bits_per_byte": [3.4, 3.5, 3.45], "tokens_per_cpu_second": 12345.0}
    )  # fmt: skip
    verdicts = [Verdict(experiment="soft", claim=f"claim {outcome}", outcome=outcome, sentence="By 0.1 [0.05, 0.2].")
                for outcome in ("reproduces", "does not reproduce", "undecided")]  # fmt: skip
    records = [{"status": "ok", "seed": 0, "cpu_seconds": 10.0}]
    about = {"preset": "smoke", "mix": "tiny", "domains": ["law", "code"]}
    path = tmp_path_factory.mktemp("testbed") / "index.html"
    findings = Findings(tables={"soft": table}, verdicts=verdicts)
    path.write_text(testbed_report.page(about, records, findings, [{"arm": "x", "seed": 1, "error": "out of memory"}]), "utf-8")
    return path


@pytest.fixture(scope="module")
def intervention_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("intervention") / "report.html"
    path.write_text(render_outcome(Outcome.model_validate(made())), "utf-8")
    return path


class Opened:
    """A page, with everything it said or asked for."""

    def __init__(self, chromium, path: Path, width: int = 1400, scheme: str = "light") -> None:
        self.context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True)
        self.tab = self.context.new_page()
        # a page behind others, or a machine that stands still for a while, must not fail a test: nothing here measures by it
        self.tab.set_default_timeout(90_000)
        self.tab.bring_to_front()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.tab.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.tab.on("pageerror", lambda problem: self.said.append(f"pageerror: {problem}"))
        self.tab.on("request", lambda request: self.asked.append(request.url))
        started = time.perf_counter()
        self.tab.goto(path.as_uri())
        if "<script" in path.read_text("utf-8"):
            self.until(READY)
        self.seconds = time.perf_counter() - started
        self.home = path.as_uri()

    def until(self, condition: str, seconds: float = 20.0) -> None:
        """Waits from outside: the page's own policy forbids the evaluation that Playwright's wait_for_function relies on."""
        end = time.perf_counter() + seconds
        while not self.tab.evaluate(condition):
            assert time.perf_counter() < end, f"never true: {condition}"
            self.tab.wait_for_timeout(30)

    def scroll_through(self) -> None:
        height = self.tab.evaluate("document.documentElement.scrollHeight")
        for top in range(0, height, 500):
            self.tab.evaluate(f"window.scrollTo({{top: {top}, behavior: 'instant'}})")
            self.tab.wait_for_timeout(60)
        self.tab.wait_for_timeout(400)
        self.tab.evaluate("window.scrollTo({top: 0, behavior: 'instant'})")

    def drawn(self, name: str) -> None:
        self.tab.locator(f'[data-figure="{name}"]').scroll_into_view_if_needed()
        self.until(f"document.querySelector('[data-figure=\"{name}\"] [data-plot]').dataset.ready")

    def rows(self, name: str) -> list[dict]:
        """The rows that a figure really draws, from the running Vega view."""
        self.drawn(name)
        return self.tab.evaluate(f"page.figures.get('{name}').view.view.data('rows').map((row) => ({{...row}}))")

    def choose(self, figure: str, select: str, value: str) -> None:
        before = self.tab.evaluate(f"page.figures.get('{figure}').drawn")
        self.tab.select_option(f"#{select}", value)
        wait = f"Number(document.querySelector('[data-figure=\"{figure}\"] [data-plot]').dataset.ready) > {before}"
        self.until(wait)

    def save(self, selector: str) -> str:
        with self.tab.expect_download() as waiting:
            self.tab.locator(selector).click()
        path = waiting.value.path()
        return path.read_text("utf-8", errors="replace") if waiting.value.suggested_filename[-3:] != "png" else path.read_bytes()[:8].hex()

    def silent(self) -> None:
        assert self.said == []
        outside = [url for url in self.asked if not url.startswith((self.home, "data:", "blob:"))]
        assert outside == []


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (1400, "dark"), (390, "light"), (390, "dark")])
@pytest.mark.parametrize("which", ["model", "leaderboard", "testbed", "intervention"])
def test_pages_open_silently_fit_and_are_accessible(chromium, request, which: str, width: int, scheme: str) -> None:
    page = Opened(chromium, request.getfixturevalue(f"{which}_page"), width, scheme)
    page.scroll_through()
    page.silent()
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= width
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.tab.screenshot(path=SHOTS / f"{which}-{width}-{scheme}.png", full_page=True, timeout=400_000)
    page.tab.evaluate(AXE.read_text("utf-8"))
    found = page.tab.evaluate("axe.run().then((found) => found.violations)")
    serious = [(each["id"], each["nodes"][0]["html"][:200]) for each in found if each["impact"] in ("serious", "critical")]
    assert serious == []


def test_the_table_of_arms_has_accuracy_only_with_items(chromium, intervention_page: Path, tmp_path: Path) -> None:
    content = made_with_items()
    (tmp_path / "report.html").write_text(render_outcome(Outcome.model_validate(content)), "utf-8")
    named = {"Accuracy", "Accuracy elsewhere", "Accuracy per byte", "elsewhere, per byte"}
    for path, expected in ((intervention_page, set()), (tmp_path / "report.html", named)):
        page = Opened(chromium, path)
        page.scroll_through()
        shown = {text.strip(" ▲▼↑↓") for text in page.tab.locator("#arms-0 thead th").all_inner_texts()}
        assert shown & named == expected
        page.silent()
    cells = page.tab.locator("#arms-0 tbody tr", has_text="full finetuning").first.inner_text()
    gains = [f"{arm['accuracy']['gain']['value']:.3f}" for arm in content["targets"]["a"]["arms"] if arm["arm"].startswith("full")]
    assert any(gain in cells for gain in gains)


def test_what_is_drawn_is_what_the_result_says(chromium, model_page: Path) -> None:
    page = Opened(chromium, model_page)
    result = json.loads((model_page.parent / "result.json").read_text("utf-8"))
    for metric in ("specialization", "der", "ngram_expertise_2"):
        drawn = {row["layer"]: row for row in page.rows(f"curve-{metric}")}
        expected = [row for row in result["calibrated"] if row["metric"] == metric and row["domain"] is None and row["layer"] is not None]
        assert len(drawn) == len(expected) == 4
        for row in expected:
            for name in ("score", "score_low", "score_high", "value", "null", "p"):
                assert drawn[row["layer"]][name] == pytest.approx(row[name], rel=1e-4, abs=1e-9)


def test_a_figure_without_a_value_says_so_in_words(chromium, counts_page: Path) -> None:
    opened = Opened(chromium, counts_page)
    tab = opened.tab
    tab.locator("html[data-drawn='yes']").wait_for(state="attached", timeout=120_000)
    for figure in ("parts", "curve-stiffness", "domain"):
        assert "Not defined here" in tab.locator(f"[data-figure='{figure}'] [data-plot]").inner_text()
        assert tab.locator(f"[data-figure='{figure}'] svg.marks").count() == 0
    assert tab.locator("[data-figure='curve-specialization'] svg.marks").count() == 1  # values are known
    assert tab.locator("[data-figure='similarity'] svg.marks").count() == 1


def test_a_printed_page_has_every_figure_whole(chromium, model_page: Path) -> None:
    """Nobody scrolled: what is drawn near the window only would be missing."""
    opened = Opened(chromium, model_page)
    tab = opened.tab
    tab.locator("html[data-drawn='yes']").wait_for(state="attached", timeout=120_000)
    tab.emulate_media(media="print")
    tab.set_viewport_size({"width": 718, "height": 1000})  # of A4, less its margins
    wide = "(e) => e.offsetParent && e.getBoundingClientRect().right > innerWidth + 1"
    assert tab.evaluate(f"[...document.querySelectorAll('figure, table, .card')].filter({wide}).length") == 0
    plots = "[...document.querySelectorAll('[data-plot]')].filter((e) => !e.closest('details'))"
    assert tab.evaluate(f"{plots}.length") > 5
    assert tab.evaluate(f"{plots}.every((e) => e.querySelector('svg, canvas, .none'))")
    cut = "(e) => e.getBoundingClientRect().right > e.closest('.card').getBoundingClientRect().right + 1"
    assert tab.evaluate(f"[...document.querySelectorAll('.plot :is(svg, canvas)')].filter({cut}).length") == 0
    assert not tab.locator("header.top").is_visible()


def test_on_a_telephone_specialists_keep_lift_and_q(chromium, model_page: Path) -> None:
    opened = Opened(chromium, model_page, width=390)
    table = opened.tab.locator("#s-table")
    for key in ("domain", "lift", "q"):
        box = table.locator(f"tbody tr:first-child td[data-key='{key}']").bounding_box()
        assert box is not None and box["x"] + box["width"] <= 390
    assert not table.locator("tbody tr:first-child td[data-key='hits']").is_visible()


def test_scale_domain_and_axis_of_the_curves(chromium, model_page: Path) -> None:
    page = Opened(chromium, model_page)
    page.drawn("curve-specialization")
    page.choose("curve-specialization", "curve-domain", "law")
    assert {row["domain"] for row in page.rows("curve-specialization")} == {"law"}
    assert {row["domain"] for row in page.rows("curve-der")} == {None}
    page.tab.check("input[value=value]")
    page.tab.check("#full")
    page.tab.wait_for_timeout(600)
    assert "ideal router" in page.tab.inner_text("#curve-key")
    assert page.tab.evaluate("page.figures.get('curve-specialization').spec().layer.length") == 7
    page.silent()


def test_heat_map_switches_layers_and_tells_on_hover(chromium, model_page: Path) -> None:
    page = Opened(chromium, model_page)
    usage = pd.read_parquet(model_page.parent / "expert_usage.parquet")
    for layer in (1, 4):
        page.drawn("heat")
        page.choose("heat", "heat-layer", str(layer)) if str(layer) != page.tab.input_value("#heat-layer") else None
        drawn = {(row["domain"], row["expert"]): row for row in page.rows("heat")}
        for row in usage[usage["layer"] == layer].to_dict("records"):
            cell = drawn[row["domain"], row["expert"]]
            assert cell["hits"] == row["hits"]
            assert cell["share"] == pytest.approx(row["share"], rel=1e-6)
            assert cell["lift"] == pytest.approx(row["lift"], rel=1e-3)
            assert cell["lift_low"] == pytest.approx(row["lift_low"], abs=2e-3)
            assert (cell["kind"] == "specialist") == row["specialist"]
    page.tab.locator('[data-figure="heat"] button[data-step="-1"]').click()
    assert page.tab.input_value("#heat-layer") == "3"
    page.tab.wait_for_timeout(500)
    page.tab.locator('[data-figure="heat"] svg .mark-rect path').nth(5).hover(force=True)
    page.tab.wait_for_selector("#vg-tooltip-element.visible")
    told = page.tab.inner_text("#vg-tooltip-element")
    assert all(word in told for word in ("hits", "share", "lift", "q-value", "expert", "domain"))
    page.silent()


def test_specialists_sort_filter_and_show_contexts(chromium, model_page: Path) -> None:
    page = Opened(chromium, model_page)
    column = "() => [...document.querySelectorAll('#s-table tbody tr')].map((row) => row.cells[3].textContent)"
    falling = [float(text) for text in page.tab.evaluate(column)]
    assert falling == sorted(falling, reverse=True) and len(falling) > 3
    page.tab.click("#s-table th[data-key=lift] button")
    rising = [float(text) for text in page.tab.evaluate(column)]
    assert rising == sorted(rising)
    assert page.tab.get_attribute("#s-table th[data-key=lift]", "aria-sort") == "ascending"
    page.tab.select_option("#s-domain", "code")
    page.tab.select_option("#s-layer", "4")
    rows = page.tab.evaluate(
        "() => [...document.querySelectorAll('#s-table tbody tr')].map((r) => [r.cells[0].textContent, r.cells[1].textContent])"
    )
    assert rows and all(row == ["code", "4"] for row in rows)
    saved = list(csv.DictReader(io.StringIO(page.save("#s-csv"))))
    assert len(saved) == len(rows) and {row["domain"] for row in saved} == {"code"}
    page.tab.locator("#s-table details").first.locator("summary").click()
    assert page.tab.locator("#s-table details[open] mark").count() >= 1
    page.tab.fill("#s-text", "no such token")
    assert page.tab.inner_text("#s-pager") == "nothing matches"


def test_text_view_by_mouse_and_keyboard(chromium, model_page: Path) -> None:
    page = Opened(chromium, model_page)
    text = unpacked(model_page.read_text("utf-8"))["text"][0]
    page.tab.select_option("#t-layer", "2")
    page.tab.locator("#t-tokens [data-token='3']").hover()
    start = (3 * 4 + 1) * 2
    told = page.tab.inner_text("#t-inspector")
    for slot in range(2):
        assert f"expert {text['experts'][start + slot]} · {text['weights'][start + slot]} %" in told
    page.tab.focus("#t-tokens")
    page.tab.keyboard.press("ArrowRight")
    assert "position 4" in page.tab.inner_text("#t-inspector")
    page.tab.select_option("#t-expert", index=1)
    assert page.tab.locator("#t-tokens .uses").count() >= 1
    page.tab.locator('[data-figure="text"] [data-save=csv]')
    rows = list(csv.DictReader(io.StringIO(page.save('[data-figure="text"] [data-save=csv]'))))
    assert len(rows) == len(text["tokens"]) * 4 * 2


def test_trajectories_and_downloads(chromium, model_page: Path) -> None:
    page = Opened(chromium, model_page)
    page.drawn("trajectory")
    page.choose("trajectory", "move-domain", "math")
    moves = [row for row in page.rows("trajectory") if row["kind"] == "move"]
    assert moves and all(0 < row["share"] <= 1 for row in moves)
    assert page.save('[data-figure="trajectory"] [data-save=svg]').startswith("<svg")
    assert page.save('[data-figure="heat"] [data-save=png]') == "89504e470d0a1a0a"
    rows = list(csv.DictReader(io.StringIO(page.save('[data-figure="heat"] [data-save=csv]'))))
    assert len(rows) == 4 * 4 * 16
    page.silent()


def test_theme_switches_and_redraws(chromium, model_page: Path) -> None:
    page = Opened(chromium, model_page)
    page.drawn("curve-specialization")
    page.tab.click("#theme")
    assert page.tab.get_attribute("html", "data-theme") == "dark"
    page.tab.wait_for_timeout(600)
    assert page.tab.evaluate("page.figures.get('curve-specialization').view.view.background()") == "#171b21"
    page.silent()


def test_leaderboard_sorts_filters_and_pairs(chromium, leaderboard_page: Path) -> None:
    page = Opened(chromium, leaderboard_page)
    names = "() => [...document.querySelectorAll('#l-table tbody tr')].map((row) => row.cells[1].textContent)"
    assert page.tab.evaluate(names) == ["model-2", "model-1", "model-0"]
    page.tab.click("#l-table th[data-key=specialization] button")
    page.tab.click("#l-table th[data-key=specialization] button")
    assert page.tab.evaluate(names) == ["model-0", "model-1", "model-2"]
    page.tab.fill("#l-text", "model-1")
    assert page.tab.evaluate(names) == ["model-1"]
    page.tab.select_option("#p-first", "model-0")
    page.tab.select_option("#p-second", "model-2")
    assert "-" in page.tab.inner_text("#p-table tbody tr:first-child td:nth-child(5)")
    assert {row["model"] for row in page.rows("overlay")} == {"model-0", "model-1", "model-2"}
    assert len(list(csv.DictReader(io.StringIO(page.save("#l-csv"))))) == 1
    page.silent()


def test_leaderboard_filters_by_family_and_size(chromium, leaderboard_page: Path) -> None:
    page = Opened(chromium, leaderboard_page)
    names = "() => [...document.querySelectorAll('#l-table tbody tr')].map((row) => row.cells[1].textContent)"
    options = "(id) => [...document.getElementById(id).options].map((option) => option.value)"
    assert page.tab.evaluate(options, "l-family") == ["", "mixtral", "olmoe"]
    assert page.tab.evaluate(options, "l-size") == ["", "17 to 64", "up to 16"]
    page.tab.select_option("#l-family", "olmoe")
    assert page.tab.evaluate(names) == ["model-2", "model-0"]
    page.tab.select_option("#l-size", "up to 16")
    assert page.tab.evaluate(names) == ["model-0"]
    saved = list(csv.DictReader(io.StringIO(page.save("#l-csv"))))
    assert [(row["model"], row["family"], row["experts"]) for row in saved] == [("model-0", "olmoe", "16")]
    page.tab.select_option("#l-family", "mixtral")
    page.tab.select_option("#l-size", "17 to 64")
    assert page.tab.evaluate(names) == [] and page.tab.inner_text("#l-pager") == "nothing matches"
    page.tab.select_option("#l-family", "")
    assert page.tab.evaluate(names) == ["model-2"]
    page.tab.select_option("#l-size", "")
    assert page.tab.evaluate(names) == ["model-2", "model-1", "model-0"]
    page.silent()


def test_leaderboard_shows_accuracy_and_phases(chromium, leaderboard_page: Path) -> None:
    page = Opened(chromium, leaderboard_page)
    data = unpacked(leaderboard_page.read_text("utf-8"))
    scores = {row["model"]: row["specialization"] for row in data["rows"]}
    drawn = {row["model"]: (row["accuracy"], row["score"]) for row in page.rows("scatter")}
    assert drawn == {"model-0": (0.41, scores["model-0"]), "model-1": (0.412, scores["model-1"])}
    column = "(key) => { const heads = [...document.querySelectorAll('#l-table th')];"
    column += " const at = heads.findIndex((th) => th.dataset.key === key);"
    column += " return [...document.querySelectorAll('#l-table tbody tr')].map((row) => row.cells[at].textContent); }"
    assert page.tab.evaluate(column, "accuracy") == ["–", "41.2 %", "41.0 %"]
    assert page.tab.evaluate(column, "generated")[0] == "–"
    page.tab.select_option("#g-metric", "domain_isolation")
    shown = page.tab.evaluate(
        "() => [...document.querySelectorAll('#g-table tbody tr')].map((row) => [...row.cells].map((c) => c.textContent))"
    )
    phases = data["phases"]
    expected = {
        model: (prompt, generated)
        for model, metric, prompt, generated in zip(phases["model"], phases["metric"], phases["prompt"], phases["generated"], strict=True)
        if metric == "domain_isolation"
    }
    assert {row[0] for row in shown} == set(expected) == {"model-0", "model-1"}
    for name, prompt, generated, *_ in shown:
        assert prompt.startswith(f"{100 * expected[name][0]:.1f} %") and generated.startswith(f"{100 * expected[name][1]:.1f} %")
    page.silent()


@pytest.mark.parametrize("figure", ["overlay", "parallel", "scatter"])
def test_names_of_models_do_not_cover_each_other(chromium, leaderboard_page: Path, figure: str) -> None:
    page = Opened(chromium, leaderboard_page)
    page.drawn(figure)
    page.tab.wait_for_timeout(300)
    boxes = page.tab.evaluate(
        '(name) => [...document.querySelectorAll(`[data-figure="${name}"] svg g.mark-text.role-mark text`)]'
        ".filter((text) => text.textContent.startsWith('model-')).map((text) => text.getBoundingClientRect().toJSON())",
        figure,
    )
    assert len(boxes) == (2 if figure == "scatter" else 3)
    for index, one in enumerate(boxes):
        for other in boxes[index + 1 :]:
            apart = one["right"] <= other["left"] or other["right"] <= one["left"]
            assert apart or one["bottom"] <= other["top"] + 2 or other["bottom"] <= one["top"] + 2


def test_the_testbed_draws_its_tables_and_saves_them(chromium, testbed_page: Path) -> None:
    page = Opened(chromium, testbed_page)
    expected = {"a<b/global_batch/a third of other domains": (0.4, 0.3, 0.5)}
    drawn = {row["label"]: (row["value"], row["low"], row["high"]) for row in page.rows("soft-specialization")}
    assert len(drawn) == 3 and expected.items() <= drawn.items()
    assert {row["low"] for row in page.rows("soft-bits_per_byte")} == {None}
    cells = page.tab.locator("#soft-table tbody tr").last.locator("td").all_inner_texts()
    assert [cell.split() for cell in cells[1:]] == [["3"], ["0.400", "[0.300,", "0.500]"], ["3.450"], ["12,345"]]
    saved = list(csv.DictReader(io.StringIO(page.save('[data-csv="soft-table"]'))))
    assert [float(row["specialization_high"]) for row in saved] == [0.15, 0.3, 0.5]
    assert page.save('[data-figure="soft-specialization"] [data-save=svg]').startswith("<svg")
    assert page.tab.locator("#failed-table tbody td").all_inner_texts() == ["x", "1", "out of memory"]
    page.silent()


def test_hostile_names_and_tokens_never_run(chromium, tmp_path: Path) -> None:
    words = dict(enumerate(HOSTILE))
    trace = simulated_trace(model=HOSTILE[0] + "\u202e\x07", domains=(HOSTILE[1], HOSTILE[3], "=cmd()", "\u202elaw"), vocabulary=words)
    folder = write_result(tmp_path / "model", trace)
    board = tmp_path / "board.html"
    board.write_text(render_leaderboard(compare([folder])), "utf-8")
    for path in (write_page(folder), board):
        assert path.stat().st_size < 2_000_000
        page = Opened(chromium, path)
        page.scroll_through()
        if path.name == "report.html":
            page.tab.locator("#t-tokens [data-token='0']").hover()
            page.tab.locator("#s-table details").first.locator("summary").click()
            assert "'=cmd()" in page.save('[data-figure="heat"] [data-save=csv]')
            page.tab.locator('[data-figure="heat"] svg .mark-rect path').first.hover(force=True)
        assert page.tab.evaluate("window.hacked") is None
        assert page.tab.locator("img[src=x]").count() == 0
        page.silent()


def test_page_of_94_layers_and_128_experts_opens_in_three_seconds(chromium, tmp_path: Path) -> None:
    domains = tuple(f"domain {index}" for index in range(8))
    trace = simulated_trace(domains=domains, documents=3, layers=94, experts=128, top_k=8, tokens=(30, 60))
    path = write_page(write_result(tmp_path, trace, permutations=20))
    page = Opened(chromium, path)
    page.drawn("curve-specialization")
    print(f"94 x 128 x 8: {path.stat().st_size / 1e6:.2f} MB, ready in {page.seconds:.2f} s")
    assert path.stat().st_size < 8_000_000
    assert page.seconds < 3
    page.silent()
