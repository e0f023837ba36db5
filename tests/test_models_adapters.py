"""An adapter is applied and merged, or refused: never ignored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dbes.errors import ModelError
from dbes.models import adapters, load_model
from dbes.models.doctor import examine

needs_peft = pytest.mark.skipif(not adapters.is_installed("peft"), reason="peft is not installed")
IDS = torch.arange(3, 23)[None]


@pytest.fixture
def base(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))


def adapter_files(folder: Path, base: object = "some/base") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    return folder


def refused(folder: Path, match: str) -> None:
    for call in (load_model, examine):
        with pytest.raises(ModelError, match=match) as caught:
            call(folder)
        assert "\n" not in str(caught.value)


def test_without_peft_an_adapter_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "is_installed", lambda _: False)
    match = r"holds a PEFT adapter .*install peft \(pip install 'dbes\[peft\]'\)"
    refused(adapter_files(base), match)
    refused(adapter_files(tmp_path / "alone", str(base)), match)


def test_half_an_adapter(base: Path) -> None:
    adapter_files(base)
    (base / "adapter_model.safetensors").rename(base / "adapter_model.bin")
    refused(base, r"adapter_model\.safetensors: missing, though there is an adapter here; adapter_model\.bin is a pickle")
    (base / "adapter_model.bin").rename(base / "adapter_model.safetensors")
    (base / "adapter_config.json").write_text("[]")
    refused(base, r"adapter_config\.json: expected a JSON object, found list")
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": 3}')
    refused(base, "base_model_name_or_path 3, expected a folder or a hub id")
    (base / "adapter_config.json").unlink()
    refused(base, r"adapter_config\.json: missing, though there is an adapter here")


@pytest.fixture
def with_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "is_installed", lambda _: True)


@pytest.mark.usefixtures("with_peft")
def test_an_adapter_without_its_base(base: Path, tmp_path: Path) -> None:
    alone = adapter_files(tmp_path / "alone", None)
    refused(alone, "an adapter whose config names no base")
    refused(adapter_files(alone, str(tmp_path / "gone")), "gone: no such folder")
    refused(adapter_files(alone, str(alone)), "has an adapter of its own; merge that one first")
    refused(adapter_files(alone, str(adapter_files(base))), "has an adapter of its own; merge that one first")


def trained(base: Path, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)).eval()


@needs_peft
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("experts", [False, True], ids=["attention", "experts"])
def test_an_adapter_is_merged(base: Path, tmp_path: Path, experts: bool) -> None:
    targets = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]} if experts else {}
    model = trained(base, target_modules=["q_proj", "v_proj"], **targets)
    alone = tmp_path / "alone"
    model.save_pretrained(alone)
    first, plain = load_model(alone), load_model(base)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(alone / name, base)
    second = load_model(base)
    memory = load_model(model, tokenizer=plain.tokenizer)
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        for loaded in (first, second, memory):
            assert torch.allclose(loaded.model(input_ids=IDS).logits, wanted, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(plain.model(input_ids=IDS).logits, wanted, atol=1e-1)
    assert len({plain.revision, first.revision, second.revision, memory.revision}) == 4
    assert first.notes == (f"an adapter, merged into {base}",) and second.notes == ("the adapter beside the weights was merged into them",)
    for subject in (base, model):
        found = examine(subject)
        assert found.ok and all(layer.scores == "exact" for layer in found.layers), found.rows()


@needs_peft
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_adapter_of_another_model(base: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    trained(base, target_modules=["q_proj"]).save_pretrained(alone)
    path = alone / "adapter_model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, path)
    refused(alone, "is not in the adapter; it was not made for this base")
    save_file({**tensors, first.replace(".0.", ".9."): tensors[first].clone()}, path)
    refused(alone, "is in the adapter but not in the model; it was not made for this base")
    path.write_bytes(b"")
    refused(alone, "the adapter cannot be loaded")


@needs_peft
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_learned_prompts_are_refused(base: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, TaskType, get_peft_model

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))
    model.save_pretrained(tmp_path / "prompt")
    refused(tmp_path / "prompt", "does not change weights, so it cannot be merged")
    with pytest.raises(ModelError, match="puts learned tokens before every text"):
        examine(model)


def test_what_is_no_model() -> None:
    with pytest.raises(ModelError, match="Linear: expected a model of transformers"):
        examine(torch.nn.Linear(1, 1))  # pyright: ignore[reportArgumentType]
