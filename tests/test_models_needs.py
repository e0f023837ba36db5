"""What a checkpoint needs, against models that are really built; and that one that does not fit is not begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EXPERTS, REPRESENTATIVES, TOP_K, character_tokenizer, discovered, representatives, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dbes.errors import ModelError
from dbes.models import fitting, load
from dbes.models.fitting import choose_dtype
from dbes.models.folder import StoredTensor
from dbes.models.headers import stored_tensors
from dbes.models.load import load_config, load_model
from dbes.models.memory import Available
from dbes.models.needs import Needs, measure, skeleton_of, stored_bytes


def needs_of(folder: Path) -> Needs:
    config = load_config(str(folder))
    skeleton = skeleton_of(str(folder), config, trust_remote_code=False)
    assert skeleton is not None and all(parameter.is_meta for parameter in skeleton.parameters())
    return measure(skeleton, config, stored_tensors(str(folder)))


def held(model: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("olmoe")
    tiny_model("olmoe").save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", representatives(discovered()))
def test_weights_are_those_of_the_loaded_model_to_the_byte(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    needs = needs_of(tmp_path)
    for dtype in ("float32", "bfloat16", "float16"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
        assert needs.weights[dtype] == held(model), dtype
        layers = needs.depth * needs.largest[dtype]
        assert needs.largest[dtype] <= needs.weights[dtype] - needs.outside[dtype] <= layers
    assert needs.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert needs.files == sum(path.stat().st_size - header(path) for path in tmp_path.glob("*.safetensors"))
    assert needs.routed < needs.parameters
    assert needs.active < needs.parameters


def header(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_count_once(tied: bool, tmp_path: Path) -> None:
    model = tiny_model("olmoe", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    needs = needs_of(tmp_path)
    table = model.get_input_embeddings().weight.numel()
    assert needs.weights["float32"] == held(model)
    outside = held(model.model.norm) + held(model.model.rotary_emb)
    assert needs.outside["float32"] == 4 * table * (1 if tied else 2) + outside


def test_active_parameters_by_hand(olmoe: Path) -> None:
    needs = needs_of(olmoe)
    expert = 3 * 32 * 48
    assert [(each.experts, each.top_k, each.expert_parameters) for each in needs.layers] == [(EXPERTS, TOP_K, expert)] * 4
    assert needs.active == needs.parameters - 4 * (EXPERTS - TOP_K) * expert
    assert needs.routed == 4 * EXPERTS * expert


def blocks(folder: Path, dtype: torch.dtype, *, size: int = 32) -> Path:
    """A checkpoint of DeepSeek's kind: projections as fp8 with a scale for every block of [size, size], the rest in ``dtype``."""
    model = tiny_model("deepseek_v3", hidden_size=64, moe_intermediate_size=64, intermediate_size=64)
    model.to(dtype).save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight") or any(length % size for length in tensor.shape):
            tensors[name] = tensor
            continue
        rows, columns = (length // size for length in tensor.shape)
        tensors[name] = tensor.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(rows, columns)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    quantization = {"quant_method": "fp8", "weight_block_size": [size, size], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}), "utf-8")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_blocks_count_as_they_lie_in_memory(dtype: str, tmp_path: Path) -> None:
    # transformers leaves what is not quantized in the dtype of the file
    needs = needs_of(blocks(tmp_path, getattr(torch, dtype)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    assert needs.quantization == "fp8"
    assert needs.files is not None and needs.files < needs.weights[dtype]
    if not torch.cuda.is_available():
        assert needs.weights[dtype] == held(model)


@pytest.mark.parametrize(
    ("stored", "size"),
    [("F32", 24), ("BF16", 12), ("F8_E4M3", 6), ("U8", 6), ("I64", 48), ("F4", 3), ("BOOL", 6), ("F8_E8M0", 6), ("C64", 48)],
)
def test_bytes_of_stored_tensors(stored: str, size: int) -> None:
    assert stored_bytes(StoredTensor(stored, (2, 3))) == size


def test_ways_that_stay_quantized_count_as_they_are_stored(tmp_path: Path) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    skeleton = skeleton_of("tiny", config, trust_remote_code=False)
    assert skeleton is not None
    config.quantization_config = {"quant_method": "gptq"}
    needs = measure(skeleton, config, {"packed": StoredTensor("I32", (100, 10))})
    assert set(needs.weights.values()) == {4000}


class Begun(Exception):
    """Weights were asked for."""


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: Any, **__: Any) -> None:
        raise Begun

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", begun)


def limited(monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    monkeypatch.setattr(fitting, "memory_at", lambda *_, **__: Available(left, "the limit of the control group /job"))


@pytest.mark.usefixtures("untouched")
def test_a_checkpoint_that_does_not_fit_is_not_begun(olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 1000)
    with pytest.raises(ModelError) as refused:
        load_model(olmoe)
    message = str(refused.value)
    assert "\n" not in message
    assert "does not fit in memory, so it was not loaded" in message
    assert "1 kB are left by the limit of the control group /job; use a machine with more memory" in message


@pytest.mark.usefixtures("untouched")
def test_what_is_asked_for_and_does_not_fit_is_refused_with_what_does(olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = needs_of(olmoe)
    limited(monkeypatch, needs.memory("bfloat16", tokens=fitting.SMALLEST_BATCH))
    with pytest.raises(ModelError, match=r"needed in float32 .*--dtype bfloat16, which needs "):
        load_model(olmoe, dtype="float32")


def test_bfloat16_is_taken_where_float32_does_not_fit(
    olmoe: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needs = needs_of(olmoe)
    limited(monkeypatch, needs.memory("float32", tokens=fitting.SMALLEST_BATCH) - 1)
    loaded = load_model(olmoe)
    assert loaded.dtype == "bfloat16"
    assert any(note.startswith("loaded in bfloat16: float32 needs ") for note in loaded.notes)
    assert "loaded in bfloat16" in caplog.text
    limited(monkeypatch, needs.memory("float32", tokens=fitting.SMALLEST_BATCH))
    whole = load_model(olmoe)
    assert (whole.dtype, whole.notes) == ("float32", ())


def test_streaming_is_offered_only_where_it_fits(olmoe: Path) -> None:
    needs = needs_of(olmoe)
    streaming = needs.streaming("bfloat16", tokens=fitting.SMALLEST_BATCH)
    for left, offered in ((streaming, True), (streaming - 1, False)):
        said = fitting.refusal_of("m", needs, dtype="bfloat16", available=Available(left, "x"))
        assert ("--engine streaming" in said) is offered


def test_where_memory_is_unknown_nothing_is_refused(olmoe: Path) -> None:
    assert choose_dtype("m", needs_of(olmoe), asked="auto", device_map={"model": "cpu", "lm_head": "disk"}) == ("auto", ())


def test_representatives_have_experts_that_can_be_counted() -> None:
    for family in REPRESENTATIVES:
        skeleton = skeleton_of(family, tiny_config(family), trust_remote_code=False)
        assert skeleton is not None
        needs = measure(skeleton, tiny_config(family))
        assert all(each.expert_parameters for each in needs.layers), family
