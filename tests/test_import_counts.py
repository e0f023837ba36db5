"""Importing counts: calibration files of llama.cpp, CSV, arrays, JSON and .pt, with what makes them useless or false."""

from __future__ import annotations

import json
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest

import dbes
from dbes.errors import DbesError, SettingError, SourceError

EXPERTS, K, CHUNKS, SIZE = 8, 2, 10, 64


def table(seed: int, layers: int = 3, tokens: int = CHUNKS * SIZE) -> np.ndarray:
    """Counts [layers, experts] that a router can have."""
    return foreign.hits_of(foreign.routing(np.random.default_rng(seed), tokens, layers, EXPERTS, K), EXPERTS)


def imported(tmp_path: Path, *sources: Path, **options: Any) -> Any:
    return dbes.import_routing(list(sources), output_path=tmp_path / "out", **options)


def refused(tmp_path: Path, path: Path, told: str, **options: Any) -> None:
    with pytest.raises(DbesError, match=told) as caught:
        imported(tmp_path, path, **options)
    assert "\n" not in str(caught.value) and path.name in str(caught.value) and not (tmp_path / "out").exists()


def hits(found: Any) -> np.ndarray:
    return found.routes.whole().hits


def imatrix(path: Path, seed: int = 0, **more: Any) -> Path:
    return foreign.gguf_imatrix(path, dict(enumerate(table(seed))), chunks=CHUNKS, size=SIZE, **more)


def test_a_calibration_file_is_a_domain(tmp_path):
    found = imported(tmp_path, imatrix(tmp_path / "law.gguf", 0), imatrix(tmp_path / "code.gguf", 1))
    assert found.format == "imatrix" and found.routes.shape.domains == ("law", "code") and not found.routes.by_documents
    assert np.array_equal(hits(found), np.stack([table(0), table(1)])) and found.routes.tokens.tolist() == [640, 640]
    assert found.routes.shape.top_k == (K,) * 3
    result = dbes.score(tmp_path / "out", output_path=tmp_path / "result")
    assert "cannot be said" in result.verdict and np.isnan(result.record("specialization").score_low)
    assert any("no chance level, interval or test" in warning for warning in result.warnings)
    assert Path(str(dbes.report(tmp_path / "result"))).is_file()


def test_sums_of_layers_are_checked(tmp_path):
    wrong = table(0)
    wrong[1, 3] += 1
    path = foreign.gguf_imatrix(tmp_path / "a.gguf", dict(enumerate(wrong)), chunks=CHUNKS, size=SIZE)
    refused(tmp_path, path, "layer 1 sums to 1,281, expected chunk_count x chunk_size x k = 640 x 2")
    refused(tmp_path, imatrix(tmp_path / "b.gguf"), "640 x 3", top_k=3)


def test_projections_must_agree(tmp_path):
    refused(tmp_path, imatrix(tmp_path / "a.gguf", up_2=table(5)[0]), "projections of layer 2 differ")


def test_dense_layers_have_no_counts_of_experts(tmp_path):
    found = imported(tmp_path, foreign.gguf_imatrix(tmp_path / "a.gguf", {1: table(0)[0], 4: table(0)[1]}, chunks=CHUNKS, size=SIZE))
    assert found.routes.shape.layers == (1, 4)


def test_one_count_for_each_tensor(tmp_path):
    path = foreign.gguf_imatrix(tmp_path / "a.gguf", {0: np.asarray([640.0])}, chunks=CHUNKS, size=SIZE)
    refused(tmp_path, path, "converted from a legacy .dat file")


def test_a_legacy_file(tmp_path):
    path = tmp_path / "old.dat"
    path.write_bytes(struct.pack("<i", 1) + struct.pack("<i", 20) + b"blk.0.ffn_up_exps.we" + struct.pack("<ii", 1, 4) + b"\0" * 16)
    refused(tmp_path, path, "not GGUF.*make it again")


def test_another_gguf_file(tmp_path):
    refused(tmp_path, imatrix(tmp_path / "a.gguf", type="model"), "general.type is 'model'|general.type is model")


def test_rounded_counts_of_a_large_file(tmp_path):
    tokens = 2**25
    counts = np.asarray([2**24 + 1, 2**24 - 1, 2**25 - 10, 10], np.int64)
    assert counts.sum() == tokens * 2 and int(np.float32(counts[0])) != counts[0]
    path = foreign.gguf_imatrix(tmp_path / "a.gguf", {0: counts}, chunks=2**15, size=2**10)
    found = imported(tmp_path, path)
    assert any("float32 rounds" in note for note in found.told)
    assert np.abs(hits(found)[0, 0] - counts).max() <= 2


def test_gguf_files_that_are_damaged(tmp_path):
    path = imatrix(tmp_path / "a.gguf")
    whole = path.read_bytes()
    for length in (4, 20, 60, 200, len(whole) - 64):
        path.write_bytes(whole[:length])
        refused(tmp_path, path, "not a readable GGUF file")
    # a list of 2^60 entries: the reader of the gguf package alone would not come back
    endless = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 4, 2**60)
    path.write_bytes(endless)
    refused(tmp_path, path, "cut short")


def test_without_the_package(tmp_path, monkeypatch):
    path = imatrix(tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SettingError, match=r"dbes\[gguf\]"):
        imported(tmp_path, path)


def csv(path: Path, rows: list[tuple[Any, ...]], head: str = "layer,expert,count") -> Path:
    path.write_text("\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n", "utf-8")
    return path


def cells(counts: np.ndarray, first: int = 0) -> list[tuple[Any, ...]]:
    return [(layer + first, expert, int(count)) for (layer, expert), count in np.ndenumerate(counts)]


SIZES: dict[str, Any] = {"experts": EXPERTS, "top_k": K}


def test_csv_files_are_domains(tmp_path):
    one = csv(tmp_path / "law.csv", cells(table(0)))
    other = csv(tmp_path / "code.csv", cells(table(1)), head="layer_id,expert_id,count")
    found = imported(tmp_path, one, other, **SIZES)
    assert found.format == "counts" and found.routes.shape.domains == ("law", "code")
    assert np.array_equal(hits(found), np.stack([table(0), table(1)]))


def test_files_of_ranks_are_added(tmp_path):
    paths = [csv(tmp_path / f"rank{rank}.csv", cells(table(rank)), head="layer_id,expert_id,count") for rank in range(3)]
    found = imported(tmp_path, *paths, domain_map={"rank*.csv": "served"}, **SIZES)
    assert np.array_equal(hits(found)[0], table(0) + table(1) + table(2)) and any("2 more tables were added" in note for note in found.told)


def test_a_csv_with_domains_and_documents(tmp_path):
    rows = [("ab"[seed % 2], f"d{seed}", *cell) for seed in range(8) for cell in cells(table(seed))]
    found = imported(tmp_path, csv(tmp_path / "a.csv", rows, head="domain,document,layer,expert,count"), **SIZES)
    counts = found.routes
    assert counts.by_documents and counts.shape.document_ids == tuple(f"d{seed}" for seed in range(8))
    assert counts.shape.document_domain.tolist() == [0, 1] * 4
    assert np.array_equal(hits(found), np.stack([table(seed) for seed in range(8)]))
    result = dbes.score(tmp_path / "out", permutations=19)
    assert np.isfinite(result.record("specialization").score_low)
    assert np.isnan(result.record("stiffness").value)


def test_rows_that_are_not_there_are_zero(tmp_path):
    counts = np.zeros((2, EXPERTS), np.int64)
    counts[:, :2] = 40
    rows = [row for row in cells(counts) if row[2]]
    found = imported(tmp_path, csv(tmp_path / "a.csv", rows), **SIZES)
    assert np.array_equal(hits(found)[0], counts)


def test_layers_numbered_from_1(tmp_path):
    path = csv(tmp_path / "a.csv", cells(table(0), first=1))
    config = foreign.config(tmp_path, layers=3, experts=EXPERTS, k=K)
    assert imported(tmp_path, path, **SIZES).routes.shape.layers == (1, 2, 3)
    assert imported(tmp_path, path, model_config=config, overwrite=True).routes.shape.layers == (0, 1, 2)


def test_a_dense_layer_of_zeros(tmp_path):
    counts = table(0, layers=4)
    counts[0] = 0
    path = csv(tmp_path / "a.csv", cells(counts))
    refused(tmp_path, path, "nothing was counted at layer 0.*--model-config", **SIZES)
    config = foreign.config(tmp_path, layers=4, experts=EXPERTS, k=K, first_k_dense_replace=1)
    assert imported(tmp_path, path, model_config=config).routes.shape.layers == (1, 2, 3)


def test_counts_at_a_layer_that_is_dense(tmp_path):
    config = foreign.config(tmp_path, layers=3, experts=EXPERTS, k=K, first_k_dense_replace=1)
    refused(tmp_path, csv(tmp_path / "a.csv", cells(table(0))), "counts at layers", model_config=config)


@pytest.mark.parametrize(
    ("rows", "head", "told"),
    [
        pytest.param([(0, 0, 1)], "layer,expert,n", "no column count", id="no counts"),
        pytest.param([(0, 0, -1)], "layer,expert,count", "line 2: count is '-1'", id="negative"),
        pytest.param([(0, 0, 1.5)], "layer,expert,count", "line 2: count is '1.5'", id="fraction"),
        pytest.param([(0, 0, "nan")], "layer,expert,count", "count is 'nan'", id="NaN"),
        pytest.param([(0, 0, "9" * 400)], "layer,expert,count", "count is '999", id="a long number"),
        pytest.param([(0, 8, 1)], "layer,expert,count", "expert 8 at layer 0, but the model has 8", id="no such expert"),
        pytest.param([(0, 0, 1), (0, 0, 2)], "layer,expert,count", "line 3: layer 0, expert 0 stands there twice", id="twice"),
        pytest.param([(0, 0)], "layer,expert,count", "line 2: 2 columns", id="a short line"),
        pytest.param([(10**9, 0, 1)], "layer,expert,count", "layer 1000000000", id="a huge layer"),
        pytest.param([(0, 0, '"1')], "layer,expert,count", "not CSV", id="an open quote"),
        pytest.param([], "layer,expert,count", "no counts in it", id="empty"),
        pytest.param([(0, 0, 4), (0, 1, 4), (1, 0, 5), (1, 1, 5)], "layer,expert,count", "8 slots at layer 0, but 10 at layer 1",
                     id="unequal layers"),
        pytest.param([(0, 0, 4), (0, 1, 3)], "layer,expert,count", "no multiple of top_k = 2", id="half a token"),
        pytest.param([(0, 0, 9), (0, 1, 1)], "layer,expert,count", "chooses an expert at most once", id="more than its tokens"),
    ],
)  # fmt: skip
def test_csv_files_that_cannot_be(tmp_path, rows, head, told):
    refused(tmp_path, csv(tmp_path / "a.csv", rows, head=head), told, **SIZES)


def test_sizes_are_never_guessed(tmp_path):
    path = csv(tmp_path / "a.csv", cells(table(0)))
    refused(tmp_path, path, "--experts", top_k=K)
    refused(tmp_path, path, "--top-k", experts=EXPERTS)


def written(folder: Path, kind: str, content: dict[Any, Any]) -> Path:
    import torch

    path = folder / f"law.{kind}"
    if kind == "json":
        plain = {str(name): {str(key): np.asarray(each).tolist() for key, each in value.items()} if isinstance(value, dict)
                 else np.asarray(value).tolist() for name, value in content.items()}  # fmt: skip
        path.write_text(json.dumps(plain))
    elif kind == "npz":
        np.savez(path, **{str(name): value for name, value in content.items()})
    else:
        torch.save({name: torch.as_tensor(np.asarray(value)) for name, value in content.items()}, path)
    return path


@pytest.mark.parametrize("kind", ["json", "npz", "pt"])
@pytest.mark.parametrize("form", ["layers x experts", "steps x layers x experts", "by layer", "by layer, named"])
def test_arrays_of_counts(tmp_path, kind, form):
    counts = table(0)
    content: dict[Any, Any] = {
        "layers x experts": {"logical_count": counts},
        "steps x layers x experts": {"logical_count": np.stack([table(1), table(2)])},
        "by layer": dict(enumerate(counts)),
        "by layer, named": {f"layer_{layer + 1}": row for layer, row in enumerate(counts)},
    }[form]
    found = imported(tmp_path, written(tmp_path, kind, content), top_k=K)
    assert np.array_equal(hits(found)[0], table(1) + table(2) if form.startswith("steps") else counts)
    assert found.routes.shape.domains == ("law",) and found.routes.shape.layers == ((1, 2, 3) if "named" in form else (0, 1, 2))


def test_domains_by_name(tmp_path):
    path = written(tmp_path, "json", {"law": dict(enumerate(table(0))), "code": {"logical_count": table(1)}})
    found = imported(tmp_path, path, top_k=K, format="counts")
    assert found.routes.shape.domains == ("law", "code") and np.array_equal(hits(found), np.stack([table(0), table(1)]))
    path = written(tmp_path, "npz", {"law": table(0), "code": table(1), "layers": np.asarray([2, 5, 7])})
    found = imported(tmp_path, path, top_k=K, format="counts", overwrite=True)
    assert found.routes.shape.domains == ("law", "code") and found.routes.shape.layers == (2, 5, 7)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"logical_count": [[1, 2], [3]]}, "unequal length"),
        ({"logical_count": [[1.5, 2]]}, "whole numbers"),
        ({"logical_count": [[-1, 2]]}, "whole numbers"),
        ({"logical_count": [1, 2]}, "expected \\[layers, experts\\]"),
        ({"logical_count": [["a"]]}, "expected counts"),
        ({"0": [1, 1], "1": [1, 1, 2]}, "experts in one table"),
        ({"0": [1, 1], "layer_0": [1, 1]}, "a layer stands in it twice"),
        ({}, "expected arrays"),
        ({"law": {"a": {"b": {}}}}, "nothing that is a table"),
    ],
)
def test_json_that_is_no_counts(tmp_path, content, told):
    refused(tmp_path, foreign.write_json(tmp_path / "a.json", content), told, format="counts", top_k=1)


def test_pickles_are_not_read(tmp_path):
    import torch

    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "a.pt"
    torch.save({"logical_count": Harm()}, path)
    refused(tmp_path, path, "without running code", format="counts", top_k=K)
    path.write_bytes(pickle.dumps({"logical_count": Harm()}))
    refused(tmp_path, path, "without running code|not a readable file", format="counts", top_k=K)
    assert not (tmp_path / "ran").exists()


def test_tensors_larger_than_their_file(tmp_path):
    import torch

    path = tmp_path / "a.pt"
    torch.save({"logical_count": torch.ones(1, dtype=torch.int64).expand(10**9, 8)}, path)
    refused(tmp_path, path, "more than the file holds", format="counts", top_k=K)


def test_cut_files_of_torch(tmp_path):
    path = written(tmp_path, "pt", {"logical_count": table(0)})
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:length])
        refused(tmp_path, path, "not a readable file of torch|without running code", format="counts", top_k=K)


def test_tables_of_two_models(tmp_path):
    one, other = csv(tmp_path / "a.csv", cells(table(0))), csv(tmp_path / "b.csv", cells(table(0)[:2]))
    with pytest.raises(SourceError, match="of another model"):
        imported(tmp_path, one, other, **SIZES)
