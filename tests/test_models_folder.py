"""What is wrong with a checkpoint folder is said in one line before anything is loaded, by `dbes doctor` as by a recording."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dbes.errors import ModelError
from dbes.models import load_model
from dbes.models.doctor import examine
from dbes.models.folder import check_folder, find_folder, read_tensors, unread_files, weight_files

INDEX = "model.safetensors.index.json"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))


def written(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    save_file(tensors, folder / name, {"format": "pt"})
    return folder


def refused(folder: Path, match: str) -> None:
    for call in (load_model, examine):
        with pytest.raises(ModelError, match=match) as caught:
            call(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("beside", [True, False], ids=["beside the weights", "without weights"])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "not JSON"),
        ("[]", "expected a weight_map from tensors to files, found list"),
        ("{}", "expected a weight_map from tensors to files, found none"),
        ('{"weight_map": {}}', "found an empty one"),
        ('{"weight_map": ["a"]}', "expected a weight_map"),
        ('{"weight_map": {"a": 3}}', "a is said to be in 3, expected the name of a file of this folder"),
        ('{"weight_map": {"a": "../b.safetensors"}}', r"\.\./b\.safetensors, expected the name of a file of this folder"),
        ('{"weight_map": {"a": "/b.safetensors"}}', "expected the name of a file of this folder"),
        ('{"weight_map": {"a": ".."}}', "expected the name of a file of this folder"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "is not a safetensors file"),
        ('{"weight_map": {"a": "model-9.safetensors"}}', "this part of the weights is missing"),
    ],
)
def test_an_index_that_is_none(checkpoint: Path, content: str, match: str, beside: bool) -> None:
    (checkpoint / INDEX).write_text(content)
    if not beside:
        (checkpoint / "model.safetensors").unlink()
    refused(checkpoint, match)


@pytest.mark.parametrize(("content", "match"), [("[]", "found list"), ("null", "found NoneType"), ('{"model_type": 7}', "model_type 7")])
def test_a_config_that_is_none(checkpoint: Path, content: str, match: str) -> None:
    (checkpoint / "config.json").write_text(content)
    refused(checkpoint, match)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_pipes_are_not_waited_for(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    refused(checkpoint, f"{name}: expected a file, this is a pipe, socket or device")


def test_a_file_given_as_the_model(checkpoint: Path) -> None:
    (checkpoint / "model.gguf").write_bytes(b"GGUF")
    refused(checkpoint / "model.gguf", "a GGUF file; .*give the folder or the hub id of the checkpoint that it was converted from")
    refused(checkpoint / "config.json", "expected a folder, this is a file; give the folder that holds the checkpoint")
    refused(checkpoint / "model.safetensors", "expected a folder, this is a file")
    with pytest.raises(ModelError, match="no such folder"):
        find_folder("missing.gguf")
    assert find_folder("some/model") is None and find_folder(checkpoint) == checkpoint


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("model.gguf", r"model\.gguf is a GGUF file and is not loaded"),
        ("pytorch_model.bin", "is a pickle and is not loaded"),
        (
            "model-00001-of-00002.safetensors",
            "neither model.safetensors nor .* here, model-00001-of-00002.safetensors; the index is missing",
        ),
    ],
)
def test_weights_that_are_not_read(checkpoint: Path, name: str, match: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    refused(checkpoint, match)


def damage_empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def damage_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


@pytest.mark.parametrize(("damage", "match"), [(damage_empty, "corrupt or truncated safetensors"), (damage_folder, "this is a folder")])
def test_damaged_weights(checkpoint: Path, damage: Callable[[Path], None], match: str) -> None:
    damage(checkpoint)
    refused(checkpoint, match)


def test_a_folder_of_no_tensors_or_none_to_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hold no tensors"):
        read_tensors(written(tmp_path, {}))


def test_eight_bits_need_their_scale(tmp_path: Path) -> None:
    narrow = torch.ones(2, 2).to(torch.float8_e4m3fn)
    for scale in ("a.weight_scale_inv", "a.weight_scale", "a.scale"):
        assert len(read_tensors(written(tmp_path, {"a.weight": narrow, scale: torch.ones(1)}))) == 2
    fused = {"experts.up": narrow, "experts.up_scale_inv": torch.ones(1).to(torch.float8_e8m0fnu)}
    assert read_tensors(written(tmp_path, fused))["experts.up"].dtype == "F8_E4M3"
    with pytest.raises(ModelError, match=r"a\.weight is F8_E4M3 without a scale"):
        read_tensors(written(tmp_path, {"a.weight": narrow, "a.input_scale": torch.ones(1), "b.weight_scale": torch.ones(1)}))


def test_experts_are_stored_without_gaps(tmp_path: Path) -> None:
    tensors = {f"mlp.experts.{number}.up.weight": torch.ones(2, 2) for number in (0, 1, 3, 4)}
    with pytest.raises(ModelError, match=r"mlp\.experts\.\*\.up\.weight is there for 4 experts up to number 4, but not for 2"):
        read_tensors(written(tmp_path, tensors))


@pytest.mark.parametrize(
    "tensors",
    [
        {"norm.weight": torch.ones(2), "model.norm.weight": torch.ones(2)},
        {"mlp.experts.0.up.weight": torch.ones(2, 2), "mlp.experts.up_proj": torch.ones(1, 2, 2)},
    ],
)
def test_one_place_has_one_tensor(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ModelError, match="are both in the weights, for one place in the model"):
        read_tensors(written(tmp_path, tensors))
    parts = {"a.safetensors": "a", "b.safetensors": "b"}
    for name in parts:
        written(tmp_path, {"twice": torch.ones(1)}, name)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {part: name for name, part in parts.items()}}))
    with pytest.raises(ModelError, match="holds twice, as another file here does"):
        read_tensors(tmp_path)


def test_files_that_are_not_read_are_named(checkpoint: Path) -> None:
    written(checkpoint, {"a": torch.ones(1)}, "consolidated.safetensors")
    assert unread_files(checkpoint) == ("consolidated.safetensors",) and weight_files(checkpoint)[0].name == "model.safetensors"
    assert load_model(checkpoint).notes == ("files beside the weights that were not read: consolidated.safetensors",)
    check_folder(checkpoint, trust_remote_code=False)
