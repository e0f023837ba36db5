"""Importing: the schema of our own, what all formats share (domains, sizes, checks, files), and that what is written can be scored."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
from typer.testing import CliRunner

import dbes
from dbes.cli import app
from dbes.errors import DbesError, SettingError, SourceError
from dbes.importing import routes as writing
from dbes.importing.sizes import model_sizes

LAYERS, EXPERTS, K = 3, 8, 2


def documents(count: int = 12, tokens: int = 20, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"doc-{number}": foreign.routing(rng, tokens + number, LAYERS, EXPERTS, K) for number in range(count)}


def lines(texts: dict[str, np.ndarray], **more: Any) -> list[dict[str, Any]]:
    return [{"id": name, "domain": "ab"[place % 2], "routes": ids.tolist(), **more} for place, (name, ids) in enumerate(texts.items())]


def imported(tmp_path: Path, *sources: Path, **options: Any) -> Any:
    return dbes.import_routing(list(sources), output_path=tmp_path / "out", **{"experts": EXPERTS, **options})


def refused(tmp_path: Path, records: list[Any], **options: Any) -> str:
    """The message of an import that fails; it is one line, names the file, and leaves nothing behind."""
    path = foreign.write_lines(tmp_path / "in" / "bad.jsonl", records)
    with pytest.raises(DbesError) as caught:
        imported(tmp_path, path, **{"format": "jsonl", **options})
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    message = str(caught.value)
    assert "\n" not in message and "bad.jsonl" in message
    return message


def test_documents_keep_their_routes_and_domains(tmp_path):
    texts = documents()
    path = foreign.write_lines(tmp_path / "a.jsonl", lines(texts))
    found = imported(tmp_path, path)
    assert found.format == "jsonl" and any("taken for jsonl" in note for note in found.told)
    trace = dbes.Trace.load(tmp_path / "out")
    assert trace.shape.domains == ("a", "b") and trace.shape.layers == (0, 1, 2) and trace.shape.experts == (EXPERTS,) * 3
    rows = foreign.rows_of(trace)
    assert rows.keys() == texts.keys()
    for name, ids in texts.items():
        assert np.array_equal(rows[name], np.sort(ids, axis=2))
    (shard,) = list(trace)
    assert shard.weights is None and shard.token_ids is None and shard.phase is None


def test_columns_of_tokens_are_kept(tmp_path):
    ids = np.asarray([[[0, 3]], [[5, 1]], [[-1, -1]]])
    record = {
        "id": "x", "routes": ids.tolist(), "weights": [[[0.75, 0.25]], [[0.5, 0.5]], [[0, 0]]], "token_ids": [7, 8, 9],
        "phase": [0, 0, 1], "positions": [4, 5, 9],
    }  # fmt: skip
    found = imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", [{"layers": [5], "experts": 8, "top_k": 2}, record]), experts=None)
    (shard,) = list(found.routes)
    assert found.routes.shape.layers == (5,)
    assert shard.ids.tolist() == [[[0, 3]], [[5, 1]], [[255, 255]]]
    assert shard.weights.tolist() == record["weights"] and shard.token_ids.tolist() == [7, 8, 9]
    assert shard.phase.tolist() == [0, 0, 1] and shard.positions.tolist() == [4, 5, 9]
    assert any("1 tokens have no routing" in note for note in found.told)


def test_base64_and_lists_are_the_same(tmp_path):
    texts = documents(4)
    packed = [{**line, "routes": foreign.base64_npy(texts[line["id"]].astype(np.uint8))} for line in lines(texts)]
    for name, records in (("lists", lines(texts)), ("packed", packed)):
        dbes.import_routing(foreign.write_lines(tmp_path / f"{name}.jsonl", records), output_path=tmp_path / name, experts=EXPERTS)
    one, other = (foreign.rows_of(dbes.Trace.load(tmp_path / name)) for name in ("lists", "packed"))
    assert all(np.array_equal(one[name], other[name]) for name in texts)


@pytest.mark.parametrize("experts", [8, 255, 256, 300])
def test_the_largest_expert_is_no_missing_slot(tmp_path, experts):
    ids = np.asarray([[[experts - 1, 0]], [[-1, -1]]])
    found = imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", [{"id": "x", "routes": ids.tolist()}]), experts=experts)
    assert foreign.rows_of(found.routes)["x"].tolist() == [[[0, experts - 1]], [[-1, -1]]]


def test_gzip_is_read_line_by_line(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines(documents(4))).encode()))
    assert len(imported(tmp_path, path, format="jsonl").routes.shape.document_ids) == 4


def test_shards_and_pieces_of_long_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_TOKENS", 50)
    texts = documents(6) | {"long": foreign.routing(np.random.default_rng(1), 120, LAYERS, EXPERTS, K)}
    found = imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", lines(texts)))
    trace = found.routes
    assert all(len(shard) <= 50 for shard in trace) and len(trace.entries) > 3
    rows = foreign.rows_of(trace)
    whole = np.concatenate([rows[f"long#{number}"] for number in range(3)])
    assert np.array_equal(whole, np.sort(texts["long"], axis=2))
    assert all(np.array_equal(rows[name], np.sort(ids, axis=2)) for name, ids in texts.items() if name != "long")
    sources = dict(zip(trace.shape.document_ids, trace.shape.document_source, strict=True))
    assert sources["long#0"] == sources["long#2"] == "long" and sources["doc-1"] == "doc-1"
    positions = np.concatenate([shard.positions[shard.document >= 6] for shard in trace])
    assert positions.tolist() == list(range(120))
    assert any("cut to pieces" in note for note in found.told)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        pytest.param({"id": "x", "routes": [[[8, 0]]]}, "id 8 in row 0 at layer 0, but the model has 8 experts", id="id too large"),
        pytest.param({"id": "x", "routes": [[[-2, 0]]]}, "id -2", id="negative id"),
        pytest.param({"id": "x", "routes": [[[1, 2]], [[3, 3]]]}, "stands twice in row 1", id="an expert twice"),
        pytest.param({"id": "x", "routes": [[[1, 2]], [[3]]]}, "rows of unequal length", id="ragged"),
        pytest.param({"id": "x", "routes": [[[1.5, 2]]]}, "whole numbers", id="fractions"),
        pytest.param({"id": "x", "routes": [[[True, False]]]}, "whole numbers", id="booleans"),
        pytest.param({"id": "x", "routes": [[["1", "2"]]]}, "whole numbers", id="texts"),
        pytest.param({"id": "x", "routes": [[[10**30, 2]]]}, "whole numbers", id="beyond 64 bits"),
        pytest.param({"id": "x", "routes": [1, 2]}, "expected 3 axes", id="too few axes"),
        pytest.param({"id": "x", "routes": {"a": 1}}, "routes", id="no list"),
        pytest.param({"id": "x", "routes": "@@@"}, "not base64", id="no base64"),
        pytest.param({"id": "x", "routes": "AAAA"}, "not a .npy file", id="no npy"),
        pytest.param({"id": "", "routes": [[[1, 2]]]}, "id", id="no id"),
        pytest.param({"id": "x", "routes": [[[1, 2]]], "token_ids": [1, 2]}, "token_ids: 2 entries for 1 tokens", id="too many token ids"),
        pytest.param({"id": "x", "routes": [[[1, 2]]], "token_ids": [-1]}, "token ids from 0 on", id="negative token id"),
        pytest.param({"id": "x", "routes": [[[1, 2]]], "phase": [2]}, "phase", id="no such phase"),
        pytest.param({"id": "x", "routes": [[[1, 2]]], "weights": [[[1.0]]]}, "weights: shape", id="weights of another shape"),
        pytest.param({"id": "x", "routes": [[[1, 2]]], "weights": [[[1e39, 0]]]}, "NaN or infinity", id="infinite weight"),
        pytest.param({"id": "x", "routes": [[[1, 2]]], "weights": [[[1e6, 0]]]}, "weights", id="weight beyond float16"),
        pytest.param({"id": "x", "routes": [[[1, 2]], [[3, 4]]], "positions": [3, 3]}, "positions must ascend", id="positions stand still"),
        pytest.param({"id": "x", "routes": [[[1, 2]]], "rutes": 1}, "rutes", id="unknown field"),
        pytest.param([1], "expected a JSON object", id="no object"),
    ],
)
def test_records_that_cannot_be(tmp_path, record, told):
    message = refused(tmp_path, [{"id": "fine", "routes": [[[0, 1]]]}, record])
    assert told in message and "line 2" in message


def test_nan_and_depth_and_damage(tmp_path):
    path = tmp_path / "bad.jsonl"
    deep = '{"id": "x", "routes": ' + "[" * 100_000 + "]" * 100_000 + "}"
    for text, told in (
        ('{"id": "x", "routes": [[[NaN, 1]]]}', "NaN"),
        (deep, "nested"),
        ('{"id": "x", "routes": [[[1,', "not JSON"),
        ("\udcff", "not UTF-8"),
    ):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(SourceError, match=f"bad.jsonl, line 1.*{told}"):
            imported(tmp_path, path, format="jsonl")


def test_brackets_in_texts_are_no_depth(tmp_path):
    record = {"id": "x", "routes": [[[1, 2]]], "metadata": {"prompt": '"[[{' * 40 + "\\"}}
    assert imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", [record])).routes.tokens == 1


@pytest.mark.parametrize("kind", ["repeated", "cut"])
def test_gzip_that_is_a_bomb_or_cut(tmp_path, kind):
    path = tmp_path / "a.jsonl.gz"
    many = 40 if kind == "repeated" else 2
    records = [{"id": str(number), "routes": [[[0, 1]]], "metadata": {"fill": " " * 2**20}} for number in range(many)]
    packed = gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode())
    path.write_bytes(packed if kind == "repeated" else packed[:-20])
    with pytest.raises(SourceError, match="unpacks to more than" if kind == "repeated" else "damaged gzip"):
        imported(tmp_path, path, format="jsonl")


def test_documents_must_be_alike(tmp_path):
    fine = {"id": "a", "routes": [[[0, 1]]]}
    assert "token_ids" in refused(tmp_path, [fine, {"id": "b", "routes": [[[0, 1]]], "token_ids": [1]}])
    assert "of another model" in refused(tmp_path, [fine, {"id": "b", "routes": [[[0, 1], [2, 3]]]}])
    assert "of another model" in refused(tmp_path, [fine, {"id": "b", "routes": [[[0, 1, 2]]]}])
    assert "stands in" in refused(tmp_path, [fine, fine])
    assert "top_k" in refused(tmp_path, [fine], top_k=3)
    assert "--experts" in refused(tmp_path, [fine], experts=None)
    assert "experts" in refused(tmp_path, [{"experts": 16}, fine])


def test_a_domain_map_of_globs(tmp_path):
    for name in ("law/a", "law/b", "code/a", "other/a"):
        foreign.write_lines(tmp_path / "logs" / f"{name}.jsonl", [{"id": name, "domain": "wrong", "routes": [[[0, 1]]]}])
    (tmp_path / "map.yaml").write_text('"law/*": statutes\n"logs/code/*": programs\n"nothing/*": never\n', "utf-8")
    found = imported(tmp_path, tmp_path / "logs", domain_map=tmp_path / "map.yaml")
    shape = found.routes.shape
    named = {name: shape.domains[index] for name, index in zip(shape.document_ids, shape.document_domain, strict=True)}
    assert named == {"code/a": "programs", "law/a": "statutes", "law/b": "statutes"}
    for told in ("1 documents were left out by the domain map, or fit no entry", "'nothing/*' fits nothing"):
        assert any(told in note for note in found.told)
    result = dbes.score(tmp_path / "out", permutations=19)
    assert any("fits nothing" in warning for warning in result.warnings)


def test_a_domain_map_of_ids_and_fields(tmp_path):
    records = [
        {"id": name, "routes": [[[0, 1]]], "metadata": {"topic": topic, "prompt": prompt}}
        for name, topic, prompt in (("r1", "law", "p"), ("r2", "law", "p"), ("s1", "code", "q"), ("s2", "code", "r"))
    ]
    path = foreign.write_lines(tmp_path / "a.jsonl", records)
    rules = {"ids": {"r1": {"domain": "special", "document": "one"}, "r2": "special"}, "field": "topic", "document": "prompt"}
    shape = imported(tmp_path, path, domain_map=rules).routes.shape
    assert [shape.domains[index] for index in shape.document_domain] == ["special", "special", "code", "code"]
    assert shape.document_source == ("one", "p", "q", "r")


@pytest.mark.parametrize(
    ("given", "told"),
    [({}, "expected a mapping"), ({"law/*": 3}, "law"), ({"field": 7}, "field"), ({"ids": {"a": {"dom": "x"}}}, "dom"), ({"a": {}}, "a")],
)
def test_domain_maps_that_are_none(tmp_path, given, told):
    path = foreign.write_lines(tmp_path / "a.jsonl", lines(documents(2)))
    (tmp_path / "map.json").write_text(json.dumps(given), "utf-8")
    with pytest.raises(SettingError, match=told):
        imported(tmp_path, path, domain_map=tmp_path / "map.json")


def test_a_map_that_fits_nothing(tmp_path):
    path = foreign.write_lines(tmp_path / "a.jsonl", lines(documents(2)))
    with pytest.raises(SourceError, match="nothing was imported"):
        imported(tmp_path, path, domain_map={"lwa/*": "law"})


def test_what_stands_in_the_folder_is_kept(tmp_path):
    path = foreign.write_lines(tmp_path / "a.jsonl", lines(documents(2)))
    imported(tmp_path, path)
    with pytest.raises(SourceError, match="--overwrite"):
        imported(tmp_path, path)
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    bad = foreign.write_lines(tmp_path / "bad.jsonl", [{"id": "x", "routes": [[[0, 0]]]}])
    with pytest.raises(SourceError):
        imported(tmp_path, bad, overwrite=True)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    imported(tmp_path, foreign.write_lines(tmp_path / "b.jsonl", lines(documents(3))), overwrite=True)
    assert len(dbes.Trace.load(tmp_path / "out").shape.document_ids) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(SourceError, match="not empty"):
        dbes.import_routing(path, output_path=tmp_path / "mine", experts=8, overwrite=True)


def test_a_folder_inside_the_sources_is_no_source(tmp_path):
    foreign.write_lines(tmp_path / "logs" / "z.jsonl", lines(documents(2)))
    for _ in range(2):
        found = dbes.import_routing(tmp_path / "logs", output_path=tmp_path / "logs" / "a", experts=EXPERTS, overwrite=True)
        assert len(found.routes.shape.document_ids) == 2


def test_what_an_interrupted_import_left_is_no_part_of_the_next(tmp_path):
    left = tmp_path / ".out.import.part"
    left.mkdir()
    (left / "shard-00007.safetensors").write_bytes(b"old")
    imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", lines(documents(2))))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    assert not left.exists()


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no such file"):
        imported(tmp_path, tmp_path / "none")
    with pytest.raises(SourceError, match="no file in this folder"):
        imported(tmp_path, tmp_path / "empty")
    path = foreign.write_lines(tmp_path / "a.jsonl", lines(documents(2)))
    with pytest.raises(SourceError, match="given twice"):
        imported(tmp_path, path, path)
    with pytest.raises(SourceError, match="of no format"):
        (tmp_path / "README.md").write_text("hello")
        imported(tmp_path, tmp_path / "README.md")
    with pytest.raises(SettingError, match="format"):
        imported(tmp_path, path, format="vlm")


def test_links_out_of_a_folder_are_not_followed(tmp_path):
    outside = foreign.write_lines(tmp_path / "outside.jsonl", [{"id": "secret", "routes": [[[0, 1]]]}])
    foreign.write_lines(tmp_path / "logs" / "a.jsonl", [{"id": "a", "routes": [[[0, 1]]]}])
    (tmp_path / "logs" / "b.jsonl").symlink_to(outside)
    assert imported(tmp_path, tmp_path / "logs").routes.shape.document_ids == ("a",)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        pytest.param({"num_experts": 8}, [0, 1, 2, 3, 4, 5], id="all"),
        pytest.param({"n_routed_experts": 8, "first_k_dense_replace": 1, "moe_layer_freq": 1}, [1, 2, 3, 4, 5], id="DeepSeek"),
        pytest.param({"n_routed_experts": 8, "first_k_dense_replace": 1, "moe_layer_freq": 2}, [2, 4], id="DeepSeek, every other"),
        pytest.param({"num_experts": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1, 5], id="Qwen"),
        pytest.param({"moe_num_experts": 8, "moe_layer_start_index": 1, "moe_layer_interval": 1, "moe_layer_end_index": 4}, [1, 2, 3, 4],
                     id="Ernie"),
        pytest.param({"num_local_experts": 8, "interleave_moe_layer_step": 2}, [1, 3, 5], id="Llama 4"),
        pytest.param({"num_experts": 8, "expert_layer_period": 2, "expert_layer_offset": 1}, [1, 3, 5], id="Jamba"),
        pytest.param({"num_experts": 8, "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4}, [2, 3, 4, 5], id="layer types"),
        pytest.param({"n_routed_experts": 8, "moe_layer_freq": [0, 1, 1, 0, 1, 1]}, [1, 2, 4, 5], id="a list"),
        pytest.param({"text_config": {"num_experts": 8, "num_hidden_layers": 6, "mlp_only_layers": [0]}}, [1, 2, 3, 4, 5], id="text part"),
    ],
)  # fmt: skip
def test_configs_tell_dense_layers(tmp_path, config, layers):
    path = foreign.write_json(tmp_path / "config.json", {"num_hidden_layers": 6, **config})
    found = model_sizes(path, experts=None, top_k=2)
    assert list(found.moe_layers or ()) == layers and found.experts == 8 and found.top_k == 2


@pytest.mark.parametrize(
    ("config", "options", "told"),
    [
        ({}, {}, "num_hidden_layers"),
        ({"num_hidden_layers": 2, "num_experts": 8}, {"experts": 16}, "16 was given"),
        ({"num_hidden_layers": 2, "num_experts": [8, 16]}, {}, "one whole number"),
        ({"num_hidden_layers": 10**9}, {}, "num_hidden_layers"),
        ({"num_hidden_layers": 2, "first_k_dense_replace": 2}, {}, "no layer has experts"),
        ([], {}, "JSON object"),
    ],
)
def test_configs_that_are_none(tmp_path, config, options, told):
    path = foreign.write_json(tmp_path / "config.json", config)
    with pytest.raises(SettingError, match=told):
        model_sizes(path, experts=options.get("experts"), top_k=None)


def test_the_command(tmp_path):
    foreign.write_lines(tmp_path / "logs" / "law" / "a.jsonl", lines(documents(3)))
    run = CliRunner().invoke(
        app,
        ["import", str(tmp_path / "logs"), "--out", str(tmp_path / "out"), "--experts", "8", "--format", "jsonl"],
    )
    assert run.exit_code == 0, run.output
    assert "trace of 63 tokens in 3 documents, 3 layers x 8 experts, top 2, 2 domains, from jsonl" in run.stdout
    run = CliRunner().invoke(app, ["import", str(tmp_path / "logs"), "--out", str(tmp_path / "out"), "--experts", "8"])
    assert run.exit_code == 1 and "--overwrite" in run.stderr
    run = CliRunner().invoke(app, ["import", str(tmp_path / "logs"), "--out", str(tmp_path / "new")])
    assert run.exit_code == 2 and "--experts" in run.stderr


def test_the_command_knows_every_format():
    from dbes.cli.importing import FORMATS
    from dbes.importing.detection import AUTO
    from dbes.importing.detection import FORMATS as KNOWN

    assert (AUTO, *KNOWN) == FORMATS


def test_a_page_of_texts_of_one_length(tmp_path):
    texts = {name: ids[:20] for name, ids in documents(16).items()}
    imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", lines(texts)))
    dbes.score(tmp_path / "out", permutations=19, output_path=tmp_path / "result")
    assert Path(str(dbes.report(tmp_path / "result"))).is_file()


def test_the_page_of_formats_names_every_format(tmp_path):
    from dbes.importing.detection import FORMATS

    page = (Path(__file__).resolve().parents[1] / "docs" / "formats.md").read_text("utf-8")
    assert all(f"\n| `{name}` |" in page for name in FORMATS)
    example = page.split("```json\n")[1].split("\n")[0]
    (tmp_path / "a.jsonl").write_text(example)
    assert imported(tmp_path, tmp_path / "a.jsonl").routes.tokens == 2


def test_what_a_source_lacks_is_nan_with_a_reason(tmp_path):
    imported(tmp_path, foreign.write_lines(tmp_path / "a.jsonl", lines(documents(16))))
    result = dbes.score(tmp_path / "out", permutations=19, output_path=tmp_path / "result")
    assert any("no gate weights" in warning for warning in result.warnings)
    assert any("no selection scores" in warning for warning in result.warnings)
    for metric in ("stiffness", "ngram_expertise_2"):
        assert np.isnan(result.record(metric).value)
    assert np.isfinite(result.record("specialization").value)
    page = dbes.report(tmp_path / "result")
    assert page is not None and Path(page).is_file()
