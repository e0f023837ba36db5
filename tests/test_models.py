"""Checkpoints that load, and those that say why they do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import character_tokenizer, discovered, tiny_model
from safetensors.torch import load_file, save_file

from dbes import models
from dbes.errors import ModelError
from dbes.models import find_sites, folder_fingerprint, load_model, max_positions
from dbes.recording import record_documents
from dbes.sites import expert_weights, router_std

MOCK = Path(__file__).with_name("mock_remote_moe.py")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock") / "tiny-olmoe"
    tiny_model("olmoe").save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(stock: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stock, tmp_path / "tiny-olmoe"))


@pytest.fixture
def remote_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose model is its own Python code."""
    from mock_remote_moe import MockMoeConfig, MockMoeForCausalLM

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "remote"
    torch.manual_seed(0)
    MockMoeForCausalLM(MockMoeConfig()).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    shutil.copy(MOCK, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "mock_remote_moe.MockMoeConfig",
        "AutoModelForCausalLM": "mock_remote_moe.MockMoeForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def test_a_folder_loads(stock: Path) -> None:
    loaded = load_model(stock)
    assert (loaded.name, loaded.dtype, loaded.device) == ("tiny-olmoe", "float32", "cpu")
    assert loaded.revision == folder_fingerprint(stock) and loaded.revision.startswith("sha256:")
    assert loaded.parameters == sum(parameter.numel() for parameter in loaded.model.parameters())
    assert not loaded.model.training and loaded.config["num_experts"] == 8 and max_positions(loaded.model) == 128
    assert len(find_sites(loaded.model)) == 4
    assert load_model(stock, dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("family", discovered())
def test_every_family_loads_what_it_saved(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(tmp_path).model.state_dict()
    for name, tensor in tiny_model(family).state_dict().items():
        if "balancing_biases" not in name:  # zaya: overwritten on load, upstream
            assert torch.equal(tensor, loaded[name]), name


def test_device_map(stock: Path) -> None:
    assert load_model(stock, device_map="auto").device == "cpu"


def test_disk_offload_records_the_same(stock: Path, tmp_path: Path) -> None:
    from accelerate import disk_offload
    from rounding import assert_same_routes
    from test_recording import written

    plain = load_model(stock)
    offloaded = load_model(tiny_model("olmoe"), tokenizer=character_tokenizer())
    offloaded.model.load_state_dict(plain.model.state_dict())
    disk_offload(offloaded.model, str(tmp_path / "disk"), execution_device=torch.device("cpu"))
    assert any(parameter.is_meta for parameter in offloaded.model.parameters())
    one, other = (record_documents(model, written(), domains=("a", "b"), window=40) for model in (plain, offloaded))
    assert_same_routes(one.trace, other.trace)


def test_a_model_in_memory_is_identified_by_its_weights() -> None:
    one, other = (load_model(tiny_model("olmoe"), tokenizer=character_tokenizer()) for _ in range(2))
    assert one.revision == other.revision and one.name == "OlmoeForCausalLM"
    with torch.no_grad():
        other.model.model.layers[1].mlp.gate.weight[0, 0] += 1
    assert load_model(other.model, tokenizer=character_tokenizer()).revision != one.revision
    with pytest.raises(ModelError, match="needs its tokenizer"):
        load_model(tiny_model("olmoe"))


def test_the_fingerprint_sees_config_and_weights(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = folder_fingerprint(checkpoint)
    tensors = load_file(weights_of(checkpoint))
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, weights_of(checkpoint), {"format": "pt"})
    second = folder_fingerprint(checkpoint)
    (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text() + "\n")
    assert len({first, second, folder_fingerprint(checkpoint)}) == 3
    monkeypatch.setattr(models, "WHOLE_FILE", 1)
    monkeypatch.setattr(models, "EDGE", 64)
    large = folder_fingerprint(checkpoint)
    content = bytearray(weights_of(checkpoint).read_bytes())
    content[-1] ^= 1
    weights_of(checkpoint).write_bytes(bytes(content))
    assert folder_fingerprint(checkpoint) != large


def test_tokenizers_are_told_apart() -> None:
    one, other = character_tokenizer(), character_tokenizer(special=False)
    assert models.tokenizer_fingerprint(one) == models.tokenizer_fingerprint(character_tokenizer())
    assert models.tokenizer_fingerprint(one) != models.tokenizer_fingerprint(other)


def test_remote_code_runs_only_when_allowed(remote_checkpoint: Path) -> None:
    from test_recording import written

    with pytest.raises(ModelError, match=r"comes with its own Python code.*--trust-remote-code"):
        load_model(remote_checkpoint)
    loaded = load_model(remote_checkpoint, trust_remote_code=True)
    assert [site.adapter for site in find_sites(loaded.model)] == ["modules", "modules"]
    assert record_documents(loaded, written(), domains=("a", "b"), window=40).trace.shape.layers == (1, 2)


class TestErrors:
    """Each names the folder or id, what was expected, and what to do."""

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no such folder; give a checkpoint folder or a hub id"):
            load_model(str(tmp_path / "missing"))
        with pytest.raises(ModelError, match="no such folder"):
            load_model(Path("missing"))

    def test_no_config(self, checkpoint: Path) -> None:
        (checkpoint / "config.json").unlink()
        with pytest.raises(ModelError, match=r"no config\.json here"):
            load_model(checkpoint)

    def test_broken_config(self, checkpoint: Path) -> None:
        (checkpoint / "config.json").write_text("{")
        with pytest.raises(ModelError, match=r"config\.json: cannot be read as JSON"):
            load_model(checkpoint)

    def test_unknown_architecture(self, checkpoint: Path) -> None:
        (checkpoint / "config.json").write_text('{"model_type": "from_the_future"}')
        with pytest.raises(ModelError, match=r"transformers .* does not know this architecture"):
            load_model(checkpoint)

    def test_no_tokenizer(self, checkpoint: Path) -> None:
        for path in checkpoint.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(ModelError, match="no tokenizer here"):
            load_model(checkpoint)

    def test_no_weights(self, checkpoint: Path) -> None:
        weights_of(checkpoint).unlink()
        with pytest.raises(ModelError, match=r"no \*\.safetensors here"):
            load_model(checkpoint)

    def test_pickled_weights(self, checkpoint: Path) -> None:
        weights_of(checkpoint).unlink()
        torch.save({}, checkpoint / "pytorch_model.bin")
        with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle and is not loaded: convert it"):
            load_model(checkpoint)

    @pytest.mark.parametrize("damage", ["truncated", "corrupt", "empty"])
    def test_damaged_weights(self, checkpoint: Path, damage: str) -> None:
        path = weights_of(checkpoint)
        content = path.read_bytes()
        path.write_bytes({"truncated": content[: len(content) // 2], "corrupt": b"\xff" * 100 + content[100:], "empty": b""}[damage])
        with pytest.raises(ModelError, match=r"model\.safetensors: corrupt or truncated safetensors .*copy or download it again"):
            load_model(checkpoint)

    def test_a_lost_part(self, checkpoint: Path) -> None:
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors: this part of the weights is missing"):
            load_model(checkpoint)

    def test_missing_tensors(self, checkpoint: Path) -> None:
        tensors = load_file(weights_of(checkpoint))
        del tensors["model.layers.2.mlp.gate.weight"]
        save_file(tensors, weights_of(checkpoint), {"format": "pt"})
        with pytest.raises(ModelError, match=r"1 tensors are not in the weights \(first: model\.layers\.2\.mlp\.gate\.weight\)"):
            load_model(checkpoint)

    def test_weights_of_another_shape(self, checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
        with pytest.raises(ModelError, match="the model cannot be loaded"):
            load_model(checkpoint)

    def test_dense(self, tmp_path: Path) -> None:
        config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
        character_tokenizer().save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="LlamaForCausalLM is not a Mixture-of-Experts model"):
            load_model(tmp_path)

    @pytest.mark.parametrize("dtype", ["int8", "precise"])
    def test_dtype(self, stock: Path, dtype: str) -> None:
        with pytest.raises(ModelError, match=f"dtype '{dtype}': expected auto, float32, bfloat16 or float16"):
            load_model(stock, dtype=dtype)

    def test_hub_unreachable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise OSError("We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files.")

        with pytest.raises(ModelError, match="the Hugging Face hub cannot be reached"):  # offline mode, nothing cached
            load_model("nobody/no-such-model")
        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
        with pytest.raises(ModelError, match=r"nobody/no-such-model: the Hugging Face hub cannot be reached.*give a folder"):
            load_model("nobody/no-such-model")

    def test_hub_id_that_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise OSError("nobody/x is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'")

        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
        with pytest.raises(ModelError, match="neither a folder nor a repository you can read"):
            load_model("nobody/x")


def test_weights_of_one_expert() -> None:
    model = tiny_model("olmoe")
    site = find_sites(model)[0]
    up, down = expert_weights(site, 3)
    assert up.data_ptr() == model.model.layers[0].mlp.experts.gate_up_proj[3].data_ptr()
    assert down.shape == model.model.layers[0].mlp.experts.down_proj[3].shape
    flat = find_sites(tiny_model("dbrx"))[0]
    assert [tuple(part.shape) for part in expert_weights(flat, 7)] == [(48, 32)] * 3
    site.experts.gate_up_proj = torch.nn.Parameter(torch.zeros(3))
    site.experts.down_proj = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ModelError, match="no parameter of OlmoeExperts has one row per expert"):
        expert_weights(site, 0)


def test_scale_of_a_router_without_one_matrix() -> None:
    assert router_std(find_sites(tiny_model("zaya"))[0], 32) == 32**-0.5
    site = find_sites(tiny_model("olmoe"))[0]
    assert router_std(site, 32) == pytest.approx(float(site.router.weight.data.std()))
