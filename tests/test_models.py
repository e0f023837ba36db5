"""Checkpoints that load, and those that say why they do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import NOT_CAUSAL, character_tokenizer, composites, discovered, tiny_composite, tiny_model
from safetensors.torch import load_file, save_file

from dbes.errors import ModelError
from dbes.models import find_sites, folder_fingerprint, load_model
from dbes.models.doctor import examine
from dbes.models.sites import expert_weights, max_positions, router_std
from dbes.recording.record import record_documents

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


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


@pytest.mark.slow
@pytest.mark.parametrize("model_type", composites())
def test_every_composite_model_is_recorded_from_its_folder_as_from_memory(model_type: str, tmp_path: Path) -> None:
    from rounding import assert_same_routes
    from test_recording import written

    whole = tiny_composite(model_type)
    whole.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    if model_type in NOT_CAUSAL:
        with pytest.raises(ModelError, match=NOT_CAUSAL[model_type]):
            load_model(tmp_path)
        return
    loaded = load_model(tmp_path, tokenizer=character_tokenizer())
    assert not loaded.notes or "parts for images, sound or speech" in loaded.notes[0]
    memory = load_model(whole, tokenizer=character_tokenizer())
    one, other = (record_documents(model, written(), domains=("a", "b"), window=40) for model in (loaded, memory))
    assert_same_routes(one.trace, other.trace)
    found = examine(tmp_path)
    assert found.ok, found.rows()
    for path in (*tmp_path.glob("*.safetensors*"), *tmp_path.glob("tokenizer*")):
        path.unlink()
    assert examine(tmp_path).ok


@pytest.mark.parametrize("changes", [{"dtype": torch.bfloat16}, {"max_shard_size": "50KB"}, {"tie_word_embeddings": True}])
def test_layouts_of_checkpoints(changes: dict[str, Any], tmp_path: Path) -> None:
    tied = changes.pop("tie_word_embeddings", False)
    model = tiny_model("olmoe", tie_word_embeddings=tied).to(changes.pop("dtype", torch.float32))
    model.save_pretrained(tmp_path, **changes)
    character_tokenizer().save_pretrained(tmp_path)
    if tied:  # an output layer of its own although config.json says that it is the embedding
        tensors = load_file(weights_of(tmp_path))
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, weights_of(tmp_path), {"format": "pt"})
    loaded = load_model(tmp_path)
    assert not loaded.notes and all(
        torch.equal(tensor.float(), loaded.model.state_dict()[name]) for name, tensor in model.state_dict().items()
    )


def test_hub_models_are_checked_and_known_by_their_commit(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--some--olmoe"
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(transformers.utils.hub, "constants", huggingface_hub.constants)
    loaded = load_model("some/olmoe")
    assert (loaded.name, loaded.revision) == ("some/olmoe", commit)
    edit(repository / "snapshots" / commit, num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"some/olmoe: .*the weights hold 4 layers, config\.json names 2"):
        load_model("some/olmoe")


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
        with pytest.raises(ModelError, match=r"config\.json: not JSON"):
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
        edit(checkpoint, intermediate_size=32)
        with pytest.raises(
            ModelError, match=r"experts\.down_proj has the shape \[8, 32, 48\] in the weights, \[8, 32, 32\] by config\.json"
        ):
            load_model(checkpoint)

    @pytest.mark.parametrize("top_k", [0, 9, 99])
    def test_more_experts_per_token_than_there_are(self, checkpoint: Path, top_k: int) -> None:
        edit(checkpoint, num_experts_per_tok=top_k)
        with pytest.raises(ModelError, match=f"layer 0 .*: {top_k} experts per token of 8 experts"):
            load_model(checkpoint)

    def test_a_config_of_the_wrong_types(self, checkpoint: Path) -> None:
        edit(checkpoint, num_experts_per_tok="two")
        with pytest.raises(ModelError, match=r"num_experts_per_tok.*expected int, got str") as caught:
            load_model(checkpoint)
        assert "\n" not in str(caught.value)

    def test_a_tokenizer_that_cannot_be_read(self, checkpoint: Path) -> None:
        (checkpoint / "tokenizer.json").write_text("{")
        with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
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

    @pytest.mark.parametrize(
        "problem", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
    )
    def test_too_large(self, stock: Path, problem: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise problem

        monkeypatch.setattr(transformers.OlmoeForCausalLM, "from_pretrained", refuse)
        with pytest.raises(ModelError, match="tiny-olmoe: the model does not fit in memory"):
            load_model(stock)

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
