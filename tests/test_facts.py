"""What a trace says of the texts that were read: its fingerprint and the different texts of each domain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbes.scoring.counting import count_routes
from dbes.scoring.score import score
from dbes.scoring.texts import Texts
from dbes.trace.baselines import imitate
from dbes.trace.store import Trace


def trace(
    seed: int = 0, *, tokens: bool | int = True, ids: list[str] | None = None, domain: tuple[int, ...] = (0, 0, 1, 1), **more: Any
) -> Trace:
    """Two domains of two documents of 6 tokens; ``tokens``: seed of the token ids, or whether there are any."""
    random = np.random.default_rng(seed)
    document = np.repeat(np.arange(4), 6)
    token_ids = np.random.default_rng(int(tokens)).integers(0, 50, 24) if tokens is not False else None
    return Trace.from_arrays(
        np.argsort(random.random((24, 2, 4)), axis=-1)[..., :2], document=document, domain=domain, domains=("law", "code"),
        layers=(0, 1), experts=4, token_ids=token_ids, document_ids=ids, **more,
    )  # fmt: skip


def texts_of(one: Trace) -> Texts:
    return count_routes(one).texts


IDS = ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        pytest.param(trace(0), trace(1), True, id="another model, same tokens"),
        pytest.param(trace(0, tokens=5), trace(1, tokens=6), False, id="other tokens under default ids"),
        pytest.param(trace(0, tokens=5, ids=IDS), trace(1, tokens=6, ids=IDS), False, id="other tokens under the same ids"),
        pytest.param(trace(0, tokens=False, ids=IDS), trace(1, tokens=False, ids=IDS), True, id="ids of the user"),
        pytest.param(trace(0, tokens=False, ids=IDS), trace(1, tokens=False, ids=IDS[::-1]), False, id="another order"),
        pytest.param(trace(0), trace(0, domain=(0, 1, 0, 1)), False, id="other domains"),
    ],
)
def test_fingerprints_are_equal_where_the_data_are(one: Trace, other: Trace, same: bool) -> None:
    first, second = texts_of(one).fingerprint, texts_of(other).fingerprint
    assert first is not None and first.startswith("data:") and second is not None
    assert (first == second) == same


@pytest.mark.parametrize("ids", [None, ["0", "1", "2", "3"]])
def test_numbers_of_documents_are_no_fingerprint(ids: list[str] | None) -> None:
    assert texts_of(trace(tokens=False, ids=ids)).fingerprint is None
    assert score(trace(tokens=False, ids=ids), permutations=5).task.fingerprint is None


def test_what_a_model_wrote_is_no_part_of_the_data() -> None:
    phase = np.tile([0, 0, 0, 1, 1, 1], 4)
    one, other = trace(tokens=5, phase=phase), trace(tokens=5, phase=phase)
    written = [replace(routes, token_ids=np.where(routes.phase == 1, 49, routes.token_ids)) for routes in other]
    changed = replace(other, loaded=tuple(written))
    assert texts_of(one).fingerprint == texts_of(changed).fingerprint
    assert texts_of(replace(other, loaded=tuple(replace(routes, phase=np.ones(24, np.uint8)) for routes in other))).fingerprint is None


def test_the_fingerprint_survives_the_disk_and_the_routers_that_imitate(tmp_path: Path) -> None:
    made = trace(tokens=5, phase=np.tile([0, 0, 0, 1, 1, 1], 4))
    expected = texts_of(made).fingerprint
    assert texts_of(made.save(tmp_path / "trace")).fingerprint == expected
    assert texts_of(imitate(made, "uniform", seed=0)).fingerprint == expected
    assert score(made, permutations=5, phase="generated").task.fingerprint == expected


def test_the_fingerprint_of_the_task_comes_first() -> None:
    known = trace(provenance={"task": {"name": "mine", "fingerprint": "ab" * 32}})
    assert score(known, permutations=5).task.fingerprint == "ab" * 32


def test_copies_of_a_text_are_one_text() -> None:
    made = trace()
    ids = np.concatenate([np.tile([1, 2, 3, 4, 5, 6], 2), np.arange(12)])
    copied = replace(made, loaded=tuple(replace(routes, token_ids=ids.astype(np.int32)) for routes in made))
    assert texts_of(copied).distinct == {"law": 1, "code": 2}
    assert texts_of(trace(tokens=False)).distinct == {}
    found = score(copied, permutations=20)
    told = [warning for warning in found.warnings if "copies" in warning]
    assert len(told) == 1 and told[0].startswith("domain 'law' is one text, repeated in 2 documents: copies are no further evidence")


def test_documents_of_one_source_are_one_text_of_several_documents() -> None:
    made = trace()
    sourced = replace(made, shape=replace(made.shape, document_source=("s", "s", "t", "u")))
    assert texts_of(sourced).distinct == {"law": 1, "code": 2}
    found = score(sourced, permutations=20)
    assert "domain 'law' has one source text only, cut into 2 documents: values without interval" in found.warnings
