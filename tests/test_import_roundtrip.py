"""A recorded trace, written in a foreign format and imported: the same routes, and the same scores of what the format holds."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest

import dbes

USAGE = ("specialization", "der", "domain_isolation")
"""Metrics of how often experts are used."""

SEED = {"seed": 0, "permutations": 99}


@dataclass
class Text:
    """One document of the recorded trace."""

    name: str
    domain: str
    ids: np.ndarray
    weights: np.ndarray
    token_ids: np.ndarray
    margins: np.ndarray


@dataclass
class Recorded:
    trace: Any
    texts: list[Text]

    @property
    def experts(self) -> int:
        return self.trace.shape.experts[0]

    @property
    def k(self) -> int:
        return self.trace.shape.top_k[0]


@pytest.fixture(scope="module")
def recorded(tiny_checkpoint, tiny_task, tmp_path_factory) -> Recorded:
    folder = tmp_path_factory.mktemp("recorded")
    result = dbes.evaluate(tiny_checkpoint, tasks=tiny_task, output_path=folder, permutations=9)
    assert result.folder is not None
    trace = dbes.Trace.load(result.folder / "trace")
    texts = []
    for shard in trace:
        for document in np.unique(shard.document):
            rows = shard.take(np.flatnonzero(shard.document == document))
            texts.append(
                Text(
                    f"{document:03d}", trace.shape.domains[trace.shape.document_domain[document]], rows.ids.astype(np.int64),
                    rows.weights.astype(np.float64), rows.token_ids, rows.logit_margins.astype(np.float64),
                )
            )  # fmt: skip
    return Recorded(trace, texts)


def as_jsonl(folder: Path, found: Recorded) -> dict[str, Any]:
    foreign.write_lines(folder / "a.jsonl", [
        {"id": text.name, "domain": text.domain, "routes": text.ids.tolist(), "weights": text.weights.tolist(),
         "token_ids": text.token_ids.tolist(), "phase": [0] * len(text.ids)} for text in found.texts
    ])  # fmt: skip
    return {}


def as_vllm(folder: Path, found: Recorded) -> dict[str, Any]:
    foreign.write_lines(folder / "a.jsonl", [
        foreign.vllm_response(text.name, text.ids.astype(np.uint8), text.token_ids.tolist(), [7], metadata={"domain": text.domain})
        for text in found.texts
    ])  # fmt: skip
    return {}


def as_sglang(folder: Path, found: Recorded) -> dict[str, Any]:
    foreign.write_lines(folder / "a.jsonl", [
        {"metadata": {"domain": text.domain}, "input_ids": text.token_ids.tolist(), "output_ids": [7], "meta_info": {
            "id": text.name, "routed_experts": base64.b64encode(text.ids.astype("<i4").tobytes()).decode()}} for text in found.texts
    ])  # fmt: skip
    shape = found.trace.shape
    return {"model_config": foreign.config(folder.parent, layers=len(shape.layers), experts=found.experts, k=found.k)}


def as_gptoss(folder: Path, found: Recorded) -> dict[str, Any]:
    for text in found.texts:
        rows = [
            {f"token_{token}": {f"layer_{layer}": {"selected_experts": ids.tolist(), "selected_probs": gates.tolist()}
             for layer, (ids, gates) in enumerate(zip(text.ids[token], text.weights[token], strict=True))}}
            for token in range(len(text.ids))
        ]  # fmt: skip
        foreign.write_json(folder / f"{text.name}.json", {"dataset": text.domain, "router_data": rows})
    return {}


def as_esft(folder: Path, found: Recorded) -> dict[str, Any]:
    for layer in range(len(found.trace.shape.layers)):
        for domain in found.trace.shape.domains:
            lines = ["\t\t".join("\t".join(map(str, part[:, layer].reshape(-1))) for part in (text.ids, text.weights))
                     for text in found.texts if text.domain == domain]  # fmt: skip
            place = folder / f"{found.trace.shape.domains.index(domain)}-{domain}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"layer_{layer}.txt").write_text("\n".join(lines) + "\n")
    return {"top_k": found.k, "domain_map": {f"*-{domain}/*": domain for domain in found.trace.shape.domains}}


def as_reference(folder: Path, found: Recorded) -> dict[str, Any]:
    records = []
    for text in found.texts:
        for token in range(len(text.ids)):
            layers = {str(layer): {"expert_ids": text.ids[token, layer].tolist(), "weights": text.weights[token, layer].tolist(),
                                   "logits": [text.margins[token, layer]] * found.k, "next_expert_logit": 0.0}
                      for layer in range(len(found.trace.shape.layers))}  # fmt: skip
            records.append({"request_id": text.name, "token_index": token, "output_token_id": int(text.token_ids[token]),
                            "layers": layers, "domain": text.domain})  # fmt: skip
    foreign.write_lines(folder / "a.jsonl", records)
    return {}


def as_counts(folder: Path, found: Recorded) -> dict[str, Any]:
    rows = ["domain,document,layer,expert,count"]
    for text in found.texts:
        for (layer, expert), count in np.ndenumerate(foreign.hits_of(text.ids, found.experts)):
            rows.append(f"{text.domain},{text.name},{layer},{expert},{count}")
    folder.mkdir(exist_ok=True)
    (folder / "a.csv").write_text("\n".join(rows) + "\n")
    return {"top_k": found.k}


@pytest.mark.parametrize(
    ("write", "format", "more"),
    [
        pytest.param(as_jsonl, "jsonl", ("ngram_expertise_2",), id="jsonl"),
        pytest.param(as_vllm, "vllm", (), id="vllm"),
        pytest.param(as_sglang, "sglang", (), id="sglang"),
        pytest.param(as_gptoss, "gptoss-json", ("ngram_expertise_2",), id="gpt-oss"),
        pytest.param(as_esft, "esft", ("ngram_expertise_2",), id="esft"),
        pytest.param(as_reference, "dbes-jsonl", ("ngram_expertise_2",), id="dbes-jsonl"),
        pytest.param(as_counts, "counts", (), id="counts"),
    ],
)
def test_the_same_routes_and_scores(tmp_path, recorded, write: Callable[[Path, Recorded], dict[str, Any]], format, more):
    source = tmp_path / "in"
    options = write(source, recorded)
    found = dbes.import_routing(source, output_path=tmp_path / "out", **{"experts": recorded.experts, **options})
    assert found.format == format and found.routes.shape.domains == recorded.trace.shape.domains
    if isinstance(found.routes, dbes.Trace):
        kept = list(foreign.rows_of(found.routes).values())
        assert len(kept) == len(recorded.texts)
        assert all(np.array_equal(rows, np.sort(text.ids, axis=2)) for rows, text in zip(kept, recorded.texts, strict=True))
    before, after = dbes.score(recorded.trace, **SEED), dbes.score(tmp_path / "out", **SEED)
    for metric in (*USAGE, *more):
        one, other = before.record(metric), after.record(metric)
        for name in ("value", "score", "score_low", "score_high", "p"):
            assert getattr(other, name) == getattr(one, name), (metric, name)
    for metric in {"ngram_expertise_2"} - set(more):
        assert np.isnan(after.record(metric).value)
    margins = [shard.logit_margins for shard in found.routes] if isinstance(found.routes, dbes.Trace) else [None]
    if format == "dbes-jsonl":
        assert np.array_equal(np.concatenate(margins), np.concatenate([text.margins for text in recorded.texts]))
    else:
        assert all(each is None for each in margins)
