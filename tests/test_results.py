"""Results: strict in what they accept, strict JSON in what they write, and old files go on loading."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dbes.errors import ResultError
from dbes.results import (
    RESULT_FILE,
    CalibratedRecord,
    DomainFacts,
    ModelFacts,
    NumberKeyed,
    PublishedMetric,
    RecordingFacts,
    Result,
    Specialist,
    TaskFacts,
    load_result,
    load_results,
)

NAN = math.nan


def record(metric: str = "specialization", *, layer: int | None = None, domain: str | None = None, **values: float) -> CalibratedRecord:
    names = ("value", "null", "corrected", "ci_low", "ci_high", "p", "reference", "score", "score_low", "score_high")
    return CalibratedRecord(metric=metric, layer=layer, domain=domain, **{**dict.fromkeys(names, 0.5), **values})


def result(**changes: Any) -> Result:
    given: dict[str, Any] = {
        "status": "ok",
        "created": "2026-01-02T03:04:05+00:00",
        "model": ModelFacts(name="m", layers=(1, 3), experts=(8, 8), top_k=(2, 2)),
        "task": TaskFacts(name="t", domains={"law": DomainFacts(documents=2, sources=2, tokens=30)}),
        "recording": RecordingFacts(documents=2, tokens=30),
        "warnings": ("careful",),
        "published": {
            "rs": PublishedMetric(model=0.25, by_domain={"law": NAN}, by_layer={1: 0.5, 3: NAN}),
            "ngram_ratio": {2: PublishedMetric(model=NAN, by_domain={"law": 0.125}, by_layer={1: 0.5, 3: 0.5})},
        },
        "calibrated": (record(), record(layer=1, p=NAN), record(layer=1, domain="law", ci_low=NAN, ci_high=math.inf)),
        "specialists": (
            Specialist(
                layer=1, expert=3, domain="law", hits=9, share=0.1, lift=2, lift_low=1, lift_high=3, z=4, p=0.01, q=NAN, tokens=("§",)
            ),
        ),
        "companions": {"by_layer": {"load": {"1": 0.5, "3": None}}},
        "settings": {"permutations": 10},
    }
    return Result(**{**given, **changes})


def test_a_saved_result_is_the_same_result_with_nan_as_null(tmp_path: Path) -> None:
    path = result().save(tmp_path / "deep" / "folder")
    assert path == tmp_path / "deep" / "folder" / RESULT_FILE
    text = path.read_text("utf-8")
    content = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not strict JSON"))
    assert content["published"]["rs"]["by_domain"] == {"law": None}
    assert content["calibrated"][2]["ci_high"] is None
    loaded = load_result(path)
    assert loaded.model_dump_json() == result().model_dump_json()
    assert math.isnan(loaded.record("specialization", layer=1).p)
    assert loaded.specialists[0].tokens == ("§",)


def test_numbers_are_written_to_the_last_digit(tmp_path: Path) -> None:
    value = 0.1 + 0.2 + 1e-17
    loaded = load_result(result(calibrated=(record(value=value),)).save(tmp_path))
    assert loaded.record("specialization").value == value


def test_layers_and_sizes_are_found_by_number_and_by_its_text(tmp_path: Path) -> None:
    loaded = load_result(result().save(tmp_path))
    for key in (2, "2"):
        ngram = loaded.published["ngram_ratio"]
        assert isinstance(ngram, dict) and ngram[key].by_domain["law"] == 0.125  # type: ignore[index]
    rs = loaded.published["rs"]
    assert isinstance(rs, PublishedMetric)
    assert rs.by_layer[1] == rs.by_layer["1"] == 0.5  # type: ignore[index]
    assert NumberKeyed({-1: "x"})["-1"] == "x"  # type: ignore[index]
    for missing in (7, "7", "x"):
        with pytest.raises(KeyError):
            rs.by_layer[missing]  # type: ignore[index]


def test_a_record_is_found_by_metric_layer_and_domain() -> None:
    found = result()
    assert found.record("specialization").layer is None
    assert found.record("specialization", layer=1, domain="law").domain == "law"
    with pytest.raises(KeyError, match="no calibrated record for metric 'der', layer 1"):
        found.record("der", layer=1)


def test_the_table_has_one_row_per_record() -> None:
    table = result().to_dataframe()
    assert list(table.columns) == list(CalibratedRecord.model_fields)
    assert table["layer"].tolist()[0] is None or np.isnan(table["layer"].tolist()[0])
    assert len(table) == 3 and table["value"].tolist() == [0.5] * 3
    assert list(result(calibrated=()).to_dataframe().columns) == list(CalibratedRecord.model_fields)


def test_a_result_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        result().status = "error"  # type: ignore[misc]


def edited(tmp_path: Path, change: Any) -> Path:
    path = result().save(tmp_path)
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda content: content.update(surprise=1), "surprise: Extra inputs", id="unknown key"),
        pytest.param(lambda content: content["model"].update(surprise=1), r"model\.surprise: Extra inputs", id="unknown key inside"),
        pytest.param(lambda content: content["calibrated"][0].update(surprise=1), r"calibrated\.0\.surprise", id="unknown key of a record"),
        pytest.param(lambda content: content.pop("created"), "created: Field required", id="missing key"),
        pytest.param(lambda content: content.update(status="fine"), "status: Input should be", id="unknown status"),
        pytest.param(lambda content: content["calibrated"][0].update(value="high"), "value", id="text for a number"),
        pytest.param(lambda content: content.update(schema_version=2), "schema_version 2; this dbes reads 1", id="newer version"),
        pytest.param(lambda content: content.pop("schema_version"), "schema_version None", id="no version"),
    ],
)
def test_a_result_that_is_not_one_is_refused_with_the_field(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ResultError, match=message):
        load_result(edited(tmp_path, change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"{", "not JSON", id="not JSON"),
        pytest.param(b"\xff", "not UTF-8", id="not text"),
        pytest.param(b"[]", "expected a JSON object", id="a list"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / RESULT_FILE).write_bytes(content)
    with pytest.raises(ResultError, match=message):
        load_result(tmp_path)


def test_a_missing_result_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="run `dbes evaluate` first"):
        load_result(tmp_path)
    with pytest.raises(ResultError, match=r"no result\.json below"):
        load_results(tmp_path)


def test_all_results_below_a_folder_are_loaded_in_order_of_path(tmp_path: Path) -> None:
    for name in ("b", "a/x"):
        result(verdict=name).save(tmp_path / name)
    assert [found.verdict for found in load_results(tmp_path)] == ["a/x", "b"]
    assert [found.verdict for found in load_results(tmp_path / "b" / RESULT_FILE)] == ["b"]


def test_a_result_that_cannot_be_written_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResultError, match="cannot be written"):
        result().save(tmp_path / "file")
    (tmp_path / "taken" / RESULT_FILE).mkdir(parents=True)
    with pytest.raises(ResultError, match="cannot be written"):
        result().save(tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == [RESULT_FILE]


OLD = {
    "schema_version": 1,
    "status": "ok",
    "error": None,
    "created": "2026-01-01T00:00:00+00:00",
    "model": {"name": "m"},
    "task": {"name": "t"},
    "published": {
        "rs": {"model": 0.5, "by_domain": {"law": 0.5}, "by_layer": {"0": 0.5}},
        "ngram_ratio": {"2": {"model": None, "by_domain": {"law": None}, "by_layer": {"0": None}}},
    },
    "calibrated": [
        {
            "metric": "specialization", "layer": None, "domain": None, "value": 0.1, "null": 0.05, "corrected": 0.06, "ci_low": 0.0,
            "ci_high": 0.1, "p": 0.01, "reference": 1.0, "score": 0.05, "score_low": 0.0, "score_high": 0.1,
        }
    ],
}  # fmt: skip
"""A file of schema 1 with only the fields that had no default when the schema was fixed: such files must load for ever."""


def test_an_old_file_loads(tmp_path: Path) -> None:
    (tmp_path / RESULT_FILE).write_text(json.dumps(OLD))
    loaded = load_result(tmp_path)
    assert loaded.record("specialization").score == 0.05
    assert math.isnan(loaded.record("specialization").control)
    assert loaded.units == "nats" and loaded.specialists == ()


def test_an_error_is_a_result_too(tmp_path: Path) -> None:
    failed = Result(status="error", error="no experts", created="now", model=ModelFacts(name="m"), task=TaskFacts(name="t"))
    assert load_result(failed.save(tmp_path)).error == "no experts"
