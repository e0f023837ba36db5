"""Fingerprints tell apart whatever can route differently, and cost one reading of large files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from families import character_tokenizer, tiny_model
from safetensors.torch import save_file

from dbes.errors import ModelError
from dbes.models import folder_fingerprint, identity, model_fingerprint, tokenizer_fingerprint
from dbes.shipped import EMBEDDED_MODEL

EMBEDDED_REVISION = "sha256:08a6d0c502582e1073753e683c157b69bc0ccde781bed162ee03f4b2184c53bf"
"""Published with the results of the embedded checkpoint: it does not change."""


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "SETTLED", -1.0)
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))


def altered(folder: Path) -> None:
    """One bit in the middle of the weights, size and times as before."""
    path = folder / "model.safetensors"
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_the_embedded_checkpoint_keeps_its_revision() -> None:
    assert folder_fingerprint(EMBEDDED_MODEL) == EMBEDDED_REVISION


@pytest.mark.parametrize("whole", [0, identity.WHOLE_FILE], ids=["kept digests", "small files"])
def test_every_byte_counts(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, whole: int) -> None:
    monkeypatch.setattr(identity, "WHOLE_FILE", whole)
    seen = [folder_fingerprint(checkpoint)]
    assert folder_fingerprint(checkpoint) == seen[0]
    altered(checkpoint)
    seen.append(folder_fingerprint(checkpoint))
    (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text() + "\n")
    seen.append(folder_fingerprint(checkpoint))
    (checkpoint / "adapter_config.json").write_text("{}")
    seen.append(folder_fingerprint(checkpoint))
    save_file({"a": torch.ones(1)}, checkpoint / "adapter_model.safetensors")
    seen.append(folder_fingerprint(checkpoint))
    (checkpoint / "modeling.py").write_text("pass")
    seen.append(folder_fingerprint(checkpoint))
    assert len(set(seen)) == 6


def test_a_large_file_is_read_once(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "WHOLE_FILE", 1)
    read: list[str] = []
    real = identity.sha256_of
    monkeypatch.setattr(identity, "sha256_of", lambda path: read.append(path.name) or real(path))
    first = folder_fingerprint(checkpoint)
    assert folder_fingerprint(checkpoint) == first and read.count("model.safetensors") == 1
    for entry in (tmp_path / "cache").rglob("*.json"):
        entry.write_text("{")  # a damaged cache is not believed
    assert folder_fingerprint(checkpoint) == first and read.count("model.safetensors") == 2
    altered(checkpoint)
    assert folder_fingerprint(checkpoint) != first


def test_a_cache_that_cannot_be_written_is_done_without(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = folder_fingerprint(checkpoint)
    monkeypatch.setattr(identity, "WHOLE_FILE", 1)
    (tmp_path / "file").write_text("")
    for place in (str(tmp_path / "file"), "relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
        assert folder_fingerprint(checkpoint).startswith("sha256:") and folder_fingerprint(checkpoint) != first


def test_what_cannot_be_read(checkpoint: Path) -> None:
    (checkpoint / "more.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"more\.safetensors: expected a file, this is a folder"):
        folder_fingerprint(checkpoint)


def test_models_in_memory() -> None:
    one, other = tiny_model("olmoe"), tiny_model("olmoe")
    assert model_fingerprint(one) == model_fingerprint(other)
    middle = other.model.layers[1].mlp.experts.gate_up_proj
    with torch.no_grad():
        middle[4, 24, 16] += 1e-3
    assert model_fingerprint(one) != model_fingerprint(other)
    assert model_fingerprint(one.bfloat16()) != model_fingerprint(tiny_model("olmoe"))


def test_offloaded_weights_count_too(tmp_path: Path) -> None:
    from accelerate import disk_offload

    seen = set()
    for number, change in enumerate((0.0, 1e-3)):
        model = tiny_model("olmoe")
        with torch.no_grad():
            model.model.layers[1].mlp.experts.gate_up_proj[4, 24, 16] += change
        seen.add(model_fingerprint(model))
        disk_offload(model, str(tmp_path / str(number)), execution_device=torch.device("cpu"))
        seen.add(model_fingerprint(model))
    assert len(seen) == 2
    with pytest.raises(ModelError, match="on the meta device"):
        model_fingerprint(tiny_model("olmoe").to("meta"))


def test_tokenizers_are_told_apart() -> None:
    one, other = character_tokenizer(), character_tokenizer(special=False)
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(character_tokenizer())
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)
